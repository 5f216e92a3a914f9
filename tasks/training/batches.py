"""Row groups to batches: streamed, split, shuffled inside a window, with memory that does not grow with the data.

Shape legend: N rows of a row group or window, B rows of a batch, F numbers and C categories of one row.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from tasks.training.errors import ColumnError
from tasks.training.features import Features
from tasks.training.groups import RowGroup, Split, generator

__all__ = ["Batch", "RowGroup", "Split", "Stream", "ahead"]

T = TypeVar("T")


class Batch(NamedTuple):
    """One gradient step's rows. Views that the model must not write to."""

    x_BF: Tensor  # float32
    ids_BC: Tensor | None  # int64; None: there are no category columns
    y_B: Tensor  # float32, or int64 class numbers for multiclass


class Stream:
    """One pass over row groups, as batches of exactly `batch_size` rows (the last may be smaller).

    Unshuffled (`shuffle_seed` None), the batches are those of a plain loop over the rows in order. Shuffled, the row
    groups come in a random order, as many whole row groups as fit `window_bytes` once encoded are mixed, and windows
    follow each other. A row group that is larger than the window by itself is cut into equal slices that come
    in a random order, so the setting bounds the encoded rows; only the Arrow table of one row group must fit beside.
    Batches straddle windows, never passes. Every random number derives from `shuffle_seed` and a window's position.

    Memory: the window, its permuted copy that is being consumed, the next one, and the Arrow tables of the row group
    being encoded. One window is prepared ahead in a thread.

    Raises ColumnError while iterating (see `Features`); after the last batch if a whole column of the pass is null.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        features: Features,
        *,
        batch_size: int,
        window_bytes: int,
        shuffle_seed: tuple[str | int, ...] | None,
        split: Split | None = None,
    ) -> None:
        self._groups = groups
        self._features = features
        self._batch_size = batch_size
        self._window_rows = max(1, window_bytes // features.row_bytes)
        self._seed = shuffle_seed
        self._split = split
        self.unlabelled = 0
        """Rows left out so far because their target is null. Whole once the iteration has ended."""

    def __iter__(self) -> Iterator[Batch]:
        self.unlabelled = 0
        return _rebatched(ahead(self._in_order() if self._seed is None else self._shuffled(self._seed)), self._batch_size)

    # ---- blocks of any number of rows --------------------------------------------------------------------------------
    def _in_order(self) -> Iterator[Batch]:
        for piece in self._pieces(range(len(self._groups)), None):
            encoded = self._features.encode(piece.table, piece.where)
            ...

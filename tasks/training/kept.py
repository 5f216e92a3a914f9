"""Rows that are encoded once and kept: a small dataset is passed over hundreds of times.

Shape legend: N rows.
"""

from collections.abc import Generator, Sequence

import torch

from tidemill.tasks.training.batches import Stream
from tidemill.tasks.training.cutting import Batch, Blocks, after, joined, rebatched, sliced
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup, Subset, generator
from tidemill.tasks.training.order import Place


class Kept:
    """All labelled rows of row groups (of `split`), encoded. Passes over them are `KeptStream`."""

    def __init__(self, groups: Sequence[RowGroup], features: Features, window_bytes: int, split: Subset | None) -> None:
        """Reads and encodes them. Raises ColumnError: as `Stream` does, or no row is left."""
        self.name = f"{groups[0].name}{f' and {len(groups) - 1} more' if len(groups) > 1 else ''}"
        rows = max(1, sum(group.num_rows for group in groups))
        stream = Stream(groups, features, batch_size=rows, window_bytes=window_bytes, split=split)
        batches = list(stream)
        if not batches:
            raise ColumnError(
                f"{self.name}: no row with all targets is left on one side of a holdout, by which epochs are chosen: give "
                "more of them, or epochs"
            )
        self.block = joined(batches)
        self.unlabelled = stream.unlabelled

    @property
    def rows(self) -> int:
        """How many they are."""
        return len(self.block.y_B)


class KeptStream:
    """One pass over kept rows, as `Stream` is one over row groups; a shuffled one is a single window of all rows.

    Of a single row group that fits a window it gives the same batches as `Stream`.
    """

    def __init__(
        self,
        kept: Kept,
        *,
        batch_size: int,
        shuffle_seed: tuple[str | int, ...] | None = None,
        plan: Sequence[Blocks] | None = None,
        start: Place | None = None,
    ) -> None:
        """As of `Stream`."""
        self._kept, self._seed = kept, shuffle_seed
        self._used = 0 if start is None else start.rows
        self._sizes: list[tuple[int, int | None]] = [(batch_size, None)]
        if plan is not None:
            self._sizes = [*after([(part.size * part.held, part.blocks) for part in plan], self._used)]
        self.rows, self.unlabelled = kept.rows, kept.unlabelled

    def __iter__(self) -> Generator[Batch]:
        block = self._kept.block
        if self._seed is not None:
            rows = len(block.y_B)
            place_N = torch.randperm(rows, generator=generator(*self._seed, "window", 0), dtype=torch.int32).long()
            order_N = torch.empty_like(place_N).scatter_(0, place_N, torch.arange(rows))
            block = Batch._make(None if tensor is None else tensor.index_select(0, order_N) for tensor in block)
        return rebatched(iter([sliced(block, self._used)]), iter(self._sizes))

    def place(self, rows: int) -> Place:
        """As of `Stream`."""
        return Place(rows)

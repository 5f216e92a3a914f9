"""Which rows of a pass come when: row groups, slices of them, and windows of slices. And how far a pass is.

Shape legend: N rows of a row group.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tidemill.tasks.training.groups import RowGroup, Subset, generator


class Place(NamedTuple):
    """How far a pass is that stands between two of its batches, or of the blocks of its plan."""

    rows: int
    """That were handed out; of the split, with a target."""
    windows: int = 0
    """All of whose rows are among these."""
    before: int = 0
    """The rows of these windows."""
    unlabelled: int = 0
    """Rows of these windows that were left out because their target is null."""


class Slice(NamedTuple):
    """Neighbouring rows of one row group."""

    group: RowGroup
    start: int
    stop: int
    wanted_N: Tensor | None
    """bool: rows on our side of the split; None: all of them"""
    rows: int
    """How many are wanted."""


class Order:
    """Which rows come when."""

    def __init__(
        self,
        groups: Sequence[RowGroup],
        window_rows: int,
        seed: tuple[str | int, ...] | None,
        split: Subset | None,
    ) -> None:
        self._groups, self._window_rows, self._seed, self._split = groups, window_rows, seed, split

    def turns(self) -> list[RowGroup]:
        """The row groups that have rows, in the order of the pass."""
        groups = [self._groups[i] for i in self._order("groups", len(self._groups))]
        return [group for group in groups if group.num_rows]

    def wanted(self, group: RowGroup) -> Tensor | None:
        """bool [N]: rows on our side of the split; None: all of them."""
        return None if self._split is None else self._split.rows(group)

    def cut(self, group: RowGroup, wanted_N: Tensor | None) -> Iterator[Slice]:
        """A row group as slices of at most a window, in order or permuted."""
        slices = self.slices(group)
        size = -(-group.num_rows // slices)
        for i in self._order(f"slices of {group.name}", slices):
            start, stop = i * size, min((i + 1) * size, group.num_rows)
            if wanted_N is None:
                yield Slice(group, start, stop, None, stop - start)
            else:
                yield Slice(group, start, stop, wanted_N[start:stop], int(wanted_N[start:stop].sum()))

    def slices(self, group: RowGroup) -> int:
        """Into how many slices a row group is cut."""
        return -(-group.num_rows // self._window_rows)

    def _order(self, what: str, count: int) -> Iterable[int]:
        if self._seed is None:
            return range(count)
        return torch.randperm(count, generator=generator(*self._seed, what)).tolist()


def grouped(slices: Iterable[Slice], window_rows: int) -> Iterator[list[Slice]]:
    """Neighbouring slices, as many together as fit a window."""
    window: list[Slice] = []
    rows = 0
    for piece in slices:
        if rows + piece.rows > window_rows and window:
            yield window
            window, rows = [], 0
        window.append(piece)
        rows += piece.rows
    if window:
        yield window

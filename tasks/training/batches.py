"""Row groups to batches: streamed, split, shuffled inside a window, with memory that does not grow with the data.

Shape legend: N rows of a row group, slice or window, B rows of a batch, F numbers and C categories of one row.
"""

from collections.abc import Iterable, Iterator, Sequence
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
    """Rows for one gradient step. They are views: read only."""

    x_BF: Tensor  # float32
    ids_BC: Tensor | None  # int64; None: there are no category columns
    y_B: Tensor  # float32, or int64 class numbers for multiclass


class _Slice(NamedTuple):
    """Neighbouring rows of one row group."""

    table: pa.Table
    where: str
    wanted_N: Tensor | None  # bool: rows on our side of the split; None: all of them


class Stream:
    """One pass over row groups, in batches of `batch_size` rows (only the last may be smaller).

    Unshuffled (`shuffle_seed` None), the batches are those of a plain loop over the rows in order. Shuffled, the row
    groups come in a random order, as many of them as fit `window_bytes` once encoded are mixed row by row, and window
    follows window. A row group that is larger than the window is cut into equal slices, which come in a random order,
    so that the setting always bounds the encoded rows. Every random number derives from `shuffle_seed` and from the
    position of a group or window in the pass.

    A row group is read, and a window prepared, each in a thread while the one before it is used. In memory at a time:
    the Arrow tables of two row groups, the window being filled, its permuted copy, and the window being used.

    Iterating raises ColumnError (see `Features`); after the last batch, if a whole column turns out to be null.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        features: Features,
        *,
        batch_size: int,
        window_bytes: int,
        shuffle_seed: tuple[str | int, ...] | None = None,
        split: Split | None = None,
    ) -> None:
        self._groups = groups
        self._features = features
        self._batch_size = batch_size
        self._window_rows = max(1, window_bytes // features.row_bytes)
        self._seed = shuffle_seed
        self._split = split
        self.unlabelled = 0  # rows of the split left out because their target is null; final after the last batch

    def __iter__(self) -> Iterator[Batch]:
        self.unlabelled = 0
        blocks = map(self._encoded, self._slices()) if self._seed is None else self._windows(self._seed)
        return _rebatched(ahead(blocks), self._batch_size)

    def _windows(self, seed: tuple[str | int, ...]) -> Iterator[Batch]:
        capacity = min(self._window_rows, sum(group.num_rows for group in self._groups))
        x_NF = torch.empty(capacity, self._features.numbers)
        rest: list[Batch] = []  # what the window holds beside x
        filled = position = 0
        for piece in self._slices():
            if filled + piece.table.num_rows > capacity:
                yield _permuted(x_NF[:filled], rest, generator(*seed, "window", position))
                rest, filled, position = [], 0, position + 1
            room_NF = x_NF[filled : filled + piece.table.num_rows]
            block = self._encoded(piece, room_NF)
            kept = len(block.y_B)
            if block.x_BF is not room_NF:  # rows were left out
                room_NF[:kept] = block.x_BF
            rest.append(block)
            filled += kept
        if filled:
            yield _permuted(x_NF[:filled], rest, generator(*seed, "window", position))

    def _slices(self) -> Iterator[_Slice]:
        """Row groups, in order or permuted, read and cut to at most a window each."""
        names = self._features.names(labelled=True)
        nulls, labels, rows = [0] * (len(names) - 1), 0, 0
        order = self._order("groups", len(self._groups))
        for group, table in ahead(self._tables([self._groups[i] for i in order], names)):
            nulls = [n + table.column(name).null_count for n, name in zip(nulls, names, strict=False)]
            labels += table.num_rows - table.column(names[-1]).null_count
            rows += table.num_rows
            wanted_N = None if self._split is None else self._split.rows(group)
            count = -(-group.num_rows // self._window_rows)
            size = -(-group.num_rows // count)
            for i in self._order(f"slices of {group.name}", count):
                part_N = None if wanted_N is None else wanted_N[i * size : (i + 1) * size]
                yield _Slice(table.slice(i * size, size), group.name, part_N)
        if rows and not labels:
            raise ColumnError(f"target {names[-1]!r} is null in all {rows} rows: write labels to it")
        if column := self._features.improbably_null(nulls, rows):
            raise ColumnError(
                f"column {column!r} is null in all {rows} rows: was it renamed, or does its producer fail?"
            )

    def _tables(self, groups: Iterable[RowGroup], names: list[str]) -> Iterator[tuple[RowGroup, pa.Table]]:
        for group in groups:
            if group.num_rows:
                self._features.check(group.schema, group.name)
                table = group.read(names)
                assert table.num_rows == group.num_rows, f"{group.name} announced another number of rows than it read"
                yield group, table

    def _order(self, what: str, count: int) -> Iterable[int]:
        if self._seed is None:
            return range(count)
        return torch.randperm(count, generator=generator(*self._seed, what)).tolist()

    def _encoded(self, piece: _Slice, out_NF: Tensor | None = None) -> Batch:
        """The rows of a slice that are wanted and labelled. x_BF is `out_NF` itself if that is all of them."""
        x_NF, ids_NC, y_N, labelled_N = self._features.encode(piece.table, piece.where, out_NF=out_NF)
        assert y_N is not None, "encoded with labels"
        wanted_N = piece.wanted_N
        if labelled_N is not None:
            missing_N = ~labelled_N if wanted_N is None else wanted_N & ~labelled_N
            self.unlabelled += int(missing_N.sum())
            wanted_N = labelled_N if wanted_N is None else wanted_N & labelled_N
        block = Batch(x_NF, ids_NC, y_N)
        return block if wanted_N is None else _taken(block, wanted_N.nonzero().squeeze(1))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="tidemill-ahead") as executor:
        coming = executor.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = executor.submit(next, items, end)
            yield item  # type: ignore[misc]  # only `end` is no T


def _permuted(x_NF: Tensor, rest: list[Batch], random: torch.Generator) -> Batch:
    order_N = torch.randperm(len(x_NF), generator=random, dtype=torch.int32)  # half the memory traffic of int64
    ids = [block.ids_BC for block in rest if block.ids_BC is not None]
    return _taken(Batch(x_NF, torch.cat(ids) if ids else None, torch.cat([block.y_B for block in rest])), order_N)


def _taken(block: Batch, rows_N: Tensor) -> Batch:
    # index_select: the same gather as block.x_BF[rows_N], measured twice as fast.
    x_BF, ids_BC, y_B = block
    ids_BC = None if ids_BC is None else ids_BC.index_select(0, rows_N)
    return Batch(x_BF.index_select(0, rows_N), ids_BC, y_B.index_select(0, rows_N))


def _rebatched(blocks: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Blocks of any length as batches of `size` rows: views, except where a batch straddles two blocks."""
    carried: list[Batch] = []
    missing = 0  # rows until the carried ones are a batch
    for block in blocks:
        rows = len(block.y_B)
        start = min(missing, rows)
        if start:
            carried.append(_copied(block, 0, start))
            missing -= start
            if missing:
                continue
            yield _joined(carried)
            carried = []
        stop = rows - (rows - start) % size
        if start < stop:
            xs, ys = torch.split(block.x_BF[start:stop], size), torch.split(block.y_B[start:stop], size)
            ids = repeat(None) if block.ids_BC is None else torch.split(block.ids_BC[start:stop], size)
            yield from map(Batch, xs, ids, ys)
        if stop < rows:
            carried, missing = [_copied(block, stop, rows)], size - (rows - stop)
    if carried:
        yield _joined(carried)


def _copied(block: Batch, start: int, stop: int) -> Batch:
    """Rows of a block as a copy, so that a few rows do not keep the whole block in memory."""
    x_BF, ids_BC, y_B = block
    ids_BC = None if ids_BC is None else ids_BC[start:stop].clone()
    return Batch(x_BF[start:stop].clone(), ids_BC, y_B[start:stop].clone())


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    ids = [part.ids_BC for part in parts if part.ids_BC is not None]
    return Batch(torch.cat([p.x_BF for p in parts]), torch.cat(ids) if ids else None, torch.cat([p.y_B for p in parts]))

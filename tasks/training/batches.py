"""Row groups to batches: streamed, split, shuffled inside a window, with memory that does not grow with the data.

Shape legend: N rows of a row group, slice or window, B rows of a batch, F numbers and C ids of one row, T targets.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from itertools import repeat
from typing import Final, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # ships no type hints
from torch import Tensor

from tasks.training.errors import ColumnError
from tasks.training.features import Features
from tasks.training.groups import RowGroup, Split, generator

__all__ = ["Batch", "RowGroup", "Split", "Stream", "ahead", "in_batches", "joined"]

TAKEN_ROWS: Final = 131_072  # positions that numpy turns into int64 at a time
VIEWS: Final = 128
"""Batches that are cut at a time: so many objects that die as fast as they are made keep the garbage collector away."""

T = TypeVar("T")


class Batch(NamedTuple):
    """Rows for one gradient step. They are views: read only."""

    x_BF: Tensor  # float32
    ids_BC: Tensor | None  # int64, laid out as `Features.ids` says; None: no categories and no sequences
    y_B: Tensor  # float32 ([B, T] of several targets), or int64 class numbers for multiclass
    w_B: Tensor | None = None  # float32, sample weights; None: the spec has none


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
        self.rows = 0  # of the split, with a target; final after the last batch, like the next
        self.unlabelled = 0  # rows of the split left out because their target is null

    def __iter__(self) -> Generator[Batch]:
        self.rows = self.unlabelled = 0
        blocks = self._in_order() if self._seed is None else self._windows(self._seed)
        return _rebatched(blocks if self._is_one_block else ahead(blocks), self._batch_size)

    @property
    def _is_one_block(self) -> bool:
        """Whether there is nothing to prepare ahead: starting threads takes longer than reading a small shard."""
        return len(self._groups) == 1 and self._groups[0].num_rows <= self._window_rows

    def _in_order(self) -> Generator[Batch]:
        for piece in self._slices():
            yield self._encoded(piece)

    def _windows(self, seed: tuple[str | int, ...]) -> Generator[Batch]:
        capacity = min(self._window_rows, sum(group.num_rows for group in self._groups))
        x_NF = torch.empty(capacity, self._features.numbers)
        ids_NC = torch.empty(capacity, self._features.ids, dtype=torch.int64) if self._features.ids else None
        y_N = w_N = None  # made for the first block, which has their types
        filled = position = 0

        def permuted(window: Batch) -> Batch:
            order = generator(*seed, "window", position)
            # int32: half the memory, and the time, of int64.
            order_N = torch.randperm(filled, generator=order, dtype=torch.int32)
            return _taken(_each(window, lambda tensor: tensor[:filled]), order_N)

        for piece in self._slices():
            if filled + piece.table.num_rows > capacity:
                yield permuted(Batch(x_NF, ids_NC, cast(Tensor, y_N), w_N))
                filled, position = 0, position + 1
            room_NF = x_NF[filled : filled + piece.table.num_rows]
            room_NC = None if ids_NC is None else ids_NC[filled : filled + piece.table.num_rows]
            block = self._encoded(piece, room_NF, room_NC)
            if y_N is None:
                y_N, w_N = (
                    None if tensor is None else tensor.new_empty((capacity, *tensor.shape[1:]))
                    for tensor in (block.y_B, block.w_B)
                )
            end = filled + len(block.y_B)
            for room, rows in zip((x_NF, ids_NC, y_N, w_N), block, strict=True):
                if room is not None and rows is not None and rows is not room_NF and rows is not room_NC:
                    room[filled:end] = rows
            filled = end
        if filled:
            yield permuted(Batch(x_NF, ids_NC, cast(Tensor, y_N), w_N))

    def _slices(self) -> Iterator[_Slice]:
        """Row groups, in order or permuted, read and cut to at most a window each."""
        columns = [column.name for column in self._features.columns]
        nulls, labels, rows = [0] * len(columns), 0, 0
        order = self._order("groups", len(self._groups))
        tables = self._tables([self._groups[i] for i in order])
        for group, table in tables if len(self._groups) == 1 else ahead(tables):
            nulls = [n + table.column(name).null_count for n, name in zip(nulls, columns, strict=True)]
            labels += self._features.labelled(table)
            rows += table.num_rows
            wanted_N = None if self._split is None else self._split.rows(group)
            count = -(-group.num_rows // self._window_rows)
            size = -(-group.num_rows // count)
            for i in self._order(f"slices of {group.name}", count):
                part_N = None if wanted_N is None else wanted_N[i * size : (i + 1) * size]
                yield _Slice(table.slice(i * size, size), group.name, part_N)
        if rows and not labels:
            targets = " or ".join(map(repr, self._features.targets))
            raise ColumnError(f"target {targets} is null in all {rows} rows: write labels to it")
        if column := self._features.improbably_null(nulls, rows):
            raise ColumnError(
                f"column {column!r} is null in all {rows} rows: was it renamed, or does its producer fail?"
            )

    def _tables(self, groups: Iterable[RowGroup]) -> Generator[tuple[RowGroup, pa.Table]]:
        names = self._features.names(labelled=True)
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

    def _encoded(self, piece: _Slice, out_NF: Tensor | None = None, out_NC: Tensor | None = None) -> Batch:
        """The rows of a slice that are wanted and labelled. x_BF and ids_BC are the `out` ones if that is all of them."""
        encoded = self._features.encode(piece.table, piece.where, out_NF=out_NF, out_NC=out_NC)
        assert encoded.y_N is not None, "encoded with labels"
        wanted_N, labelled_N = piece.wanted_N, encoded.labelled_N
        if labelled_N is not None:
            missing_N = ~labelled_N if wanted_N is None else wanted_N & ~labelled_N
            self.unlabelled += int(missing_N.sum())
            wanted_N = labelled_N if wanted_N is None else wanted_N & labelled_N
        block = Batch(encoded.x_NF, encoded.ids_NC, encoded.y_N, encoded.w_N)
        if wanted_N is not None:
            block = _taken(block, wanted_N.nonzero().squeeze(1))
        self.rows += len(block.y_B)
        return block


def ahead(items: Generator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used. In the end `items` is closed.

    It is closed even if an error's traceback still refers to it: otherwise the garbage collector would close it, at a time
    and in a thread of its choice. Joining a thread while another one starts is a deadlock in CPython 3.11.
    """
    end = object()
    name = "tidemill-ahead"
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_work_alone) as executor:
        coming = executor.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = executor.submit(next, items, end)
            yield item  # type: ignore[misc]  # only `end` is no T


def _work_alone() -> None:
    """Lets torch's operators in this thread use no other one.

    OpenMP gives every thread its own helpers. Where there are more of all of them than cores, helpers sleep between operators in
    place of spinning: training a net of 256 hidden units with 2 threads on 2 cores fell to 0.74 of its speed.
    """
    torch.get_num_threads()  # torch sets a thread up at its first use, which would undo the limit
    _openmp().limit(limits=1, user_api="openmp")  # of this thread, by OpenMP's rules


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController()


def _each(block: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return Batch._make(None if tensor is None else change(tensor) for tensor in block)


def _taken(block: Batch, rows_N: Tensor) -> Batch:
    """Copies of these rows, in this order."""
    positions = rows_N.numpy()

    def taken(tensor: Tensor) -> Tensor:
        # numpy's gather, measured twice as fast as torch's; into torch's memory, which is aligned: matrix products may round
        # otherwise at another alignment. Not mode "raise", for which numpy makes a copy of `out`. A part at a time,
        # because it makes an int64 of every position.
        values, out = tensor.numpy(), tensor.new_empty((len(positions), *tensor.shape[1:]))
        for at in range(0, len(positions), TAKEN_ROWS):
            part = slice(at, at + TAKEN_ROWS)
            np.take(values, positions[part], axis=0, out=out.numpy()[part], mode="clip")
        return out

    return _each(block, taken)


def _rebatched(blocks: Iterator[Batch], size: int) -> Generator[Batch]:
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
            yield joined(carried)
            carried = []
        stop = rows - (rows - start) % size
        if start < stop:
            whole = Batch._make(None if tensor is None else tensor[start:stop] for tensor in block)
            yield from in_batches(whole, size)
        if stop < rows:
            carried, missing = [_copied(block, stop, rows)], size - (rows - stop)
    if carried:
        yield joined(carried)


def _copied(block: Batch, start: int, stop: int) -> Batch:
    """Rows of a block as a copy, so that a few rows do not keep the whole block in memory."""
    return _each(block, lambda tensor: tensor[start:stop].clone())


def in_batches(block: Batch, size: int) -> Iterator[Batch]:
    """The block as batches of `size` rows, views; the last may be smaller."""
    for at in range(0, len(block.y_B), size * VIEWS):
        some = (
            repeat(None) if tensor is None else torch.split(tensor[at : at + size * VIEWS], size) for tensor in block
        )
        yield from map(Batch, *some)


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches as one."""
    if len(parts) == 1:
        return parts[0]
    return Batch._make(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True))

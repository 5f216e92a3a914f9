"""Blocks of rows cut into batches, and batches joined.

Shape legend: B rows of a batch, F numbers and C ids of one row, T targets.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tidemill.tasks.training.errors import ColumnError

VIEWS: Final = 128
"""Batches that are cut at a time. Few enough die as fast as they are made, so that the garbage collector does not run."""


class Batch(NamedTuple):
    """Rows for one gradient step. They are views: read only."""

    x_BF: Tensor
    """float32"""
    ids_BC: Tensor | None
    """int64, laid out as `Features.ids` says; None: no categories and no sequences"""
    y_B: Tensor
    """float32 ([B, T] of several targets), or int64 class numbers for multiclass"""
    w_B: Tensor | None = None
    """float32, sample weights; None: the spec has none"""


_batch = partial(tuple.__new__, Batch)  # of a tuple of its fields; Batch(...) is a call of Python more


class Blocks(NamedTuple):
    """Neighbouring batches of a pass that have one size, as blocks that each hold some of them."""

    size: int
    """Rows of a batch."""
    held: int
    """Batches in a block."""
    blocks: int
    """How many blocks."""


def even(rows: int, at_most: int) -> list[tuple[int, int]]:
    """(rows of a batch, how many such batches): as few batches of `at_most` rows as hold all, which differ by at most one row.

    So no batch is of one row alone, which a batch norm cannot train on, unless there is no other row.
    """
    if not rows:
        return []
    batches = -(-rows // at_most)
    size, larger = divmod(rows, batches)
    return [(size + 1, larger), (size, batches - larger)] if larger else [(size, batches)]


def after(sizes: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """What follows the first rows, of (rows of a batch, how many of them follow each other); a batch ends with them.

    Raises:
        ColumnError: no batch does. The rows were cut otherwise when the place was stored.
    """
    found = []
    for size, count in sizes:
        used = min(count, rows // size)
        rows -= used * size
        if count > used:
            if rows:
                break
            found.append((size, count - used))
    if rows:
        raise ColumnError("no batch of the pass ends where a checkpoint stands: were the files rewritten?")
    return found


def rebatched(blocks: Iterator[Batch], sizes: Iterator[tuple[int, int | None]]) -> Generator[Batch]:
    """Blocks of any length as batches of these sizes: views, except where a batch straddles two blocks.

    Args:
        blocks: In order.
        sizes: (rows of a batch, how many of them follow each other; None: all, and what is left is a smaller batch).

    Raises:
        ColumnError: there are fewer rows.
    """
    carried: list[Batch] = []
    size, left = next(sizes, (1, None))
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
            carried, left = [], None if left is None else left - 1
        while True:
            if left == 0:
                size, left = next(sizes, (size, None))
                continue
            whole = (rows - start) // size
            some = whole if left is None else min(whole, left)
            stop = start + some * size
            if some:
                yield from in_batches(sliced(block, start, stop), size)
            start, left = stop, None if left is None else left - some
            if left != 0:
                break
        if start < rows:
            carried, missing = [_copied(block, start, rows)], size - (rows - start)
    if carried:
        if left is not None:
            raise ColumnError(
                "fewer rows have all targets than were counted before the pass: were the files rewritten?"
            )
        yield joined(carried)


def _copied(block: Batch, start: int, stop: int) -> Batch:
    """Rows of a block as a copy, so that a few rows do not keep the whole block in memory."""
    return Batch._make(None if tensor is None else tensor.clone() for tensor in sliced(block, start, stop))


def sliced(block: Batch, start: int, stop: int | None = None) -> Batch:
    """Rows of a block, as views."""
    return Batch._make(None if tensor is None else tensor[start:stop] for tensor in block)


def in_batches(block: Batch, size: int) -> Iterator[Batch]:
    """The block as batches of `size` rows, views; the last may be smaller."""
    for at in range(0, len(block.y_B), size * VIEWS):
        some = (
            repeat(None) if tensor is None else torch.split(tensor[at : at + size * VIEWS], size) for tensor in block
        )
        yield from map(_batch, zip(*some, strict=False))  # of one length, but for None, which repeats without end


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches as one."""
    if len(parts) == 1:
        return parts[0]
    return Batch._make(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True))

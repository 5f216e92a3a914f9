"""Columns of an Arrow table into one row-major tensor: numbers standardised on the way, rows in any order.

Shape legend: N rows, F numbers of one row, K numbers of one column, B rows of a block, T numbers of a tile.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.columns import as_tensor, from_arrow

BLOCK_ROWS: Final = 32_768
"""Rows filled in at a time, at most; as many numbers, at most, as follow. Of more, a column's values and the block do not stay in
the cache together. Of fewer, calls are so short that Python's lock is always asked for, by the thread that trains too."""
BLOCK_NUMBERS: Final = 524_288
TOGETHER: Final = 32
"""So many plain columns side by side are made row-major by Arrow, in one call; of fewer, numpy is faster, column by column."""
CALL_NUMBERS: Final = 512
"""At least, of one column on average: of less, the calls would take longer than the copying."""
TILE_NUMBERS: Final = 256
"""Numbers that one loop scales, so that tables of few columns still vectorise."""
PLACED_ROWS: Final = 65_536
"""At a time."""


def pack(
    columns: Sequence[tuple[pa.Array[Any], int | None]],
    center_F: Tensor,
    scale_F: Tensor,
    x_NF: Tensor,
    places_N: Tensor | None = None,
    *,
    soft_limit: float | None = None,
    limited: int = 0,
) -> bool:
    """Fills x_NF (contiguous float32) with (value - center) / scale, and 0 for nulls. Returns whether all is finite.

    `columns` are (array, width of a vector or None); center_F and scale_F are float64. With `places_N` the rows go
    where `place` puts them. With `soft_limit` the first `limited` numbers z of a row become z / sqrt(1 + (z / soft_limit)^2).

    Types that are exact in float32 are copied as they are, a block at a time, and scaled while the block is in the
    cache. The others (int64, float64, decimals, times) are scaled column by column in float64 first: a timestamp has
    no useful digits left in float32. Which way a column goes depends on its type only, so that the bits of a row
    do not depend on its neighbours.
    """
    f = x_NF.shape[1]
    center_F, scale_F = center_F.clone(), scale_F.clone()  # becomes (0, 1) where a column is scaled beforehand
    # (place in a row, values [B] or [B, K] of some rows)
    parts: list[tuple[int | slice, Callable[[slice], np.ndarray]]] = []
    at = 0
    for plain, some in groupby(columns, key=_is_plain):
        run = list(some)
        if plain and len(run) >= TOGETHER:
            parts.append((slice(at, at + len(run)), _together([array for array, _ in run])))
            at += len(run)
            continue
        for array, width in run:
            here = slice(at, at + (width or 1))
            parts.append((here if width else at, _values(array, width, center_F[here], scale_F[here])))
            at = here.stop

    tile = max(1, TILE_NUMBERS // max(1, f))
    center_F, scale_F = center_F.float(), scale_F.float()
    scaling = bool((center_F != 0).any() or (scale_F != 1).any())
    if scaling:
        center_T, scale_T = center_F.repeat(tile), scale_F.repeat(tile)
    finite = True
    n = len(columns[0][0]) if columns else 0
    for rows, x_BF in blocks(n, x_NF, places_N, columns=len(columns), multiple=tile):
        x = x_BF.numpy()  # numpy copies into columns of rows faster than torch does
        for column, values in parts:
            x[:, column] = values(rows)
        if scaling:
            whole = len(x_BF) // tile * tile
            x_BF[:whole].view(-1, tile * f).sub_(center_T).div_(scale_T)
            x_BF[whole:].sub_(center_F).div_(scale_F)
        # NaN and infinity survive every addition, and a sum is nearly free; one of huge numbers may overflow by itself.
        finite = finite and (math.isfinite(x_BF.sum().item()) or bool(torch.isfinite(x_BF).all()))
        if soft_limit is not None:
            soften(x_BF[:, :limited], soft_limit)
    return finite


def soften(z_BF: Tensor, soft_limit: float) -> None:
    """Each z becomes z / sqrt(1 + (z / soft_limit)^2), in place."""
    z_BF.div_(torch.hypot(z_BF / soft_limit, torch.ones(())))  # no square, which float32 may not hold


def _is_plain(column: tuple[pa.Array[Any], int | None]) -> bool:
    """Whether the values of a column are copied as they are."""
    array, width = column
    return not width and array.type == pa.float32() and not array.null_count


def _together(arrays: Sequence[pa.Array[Any]]) -> Callable[[slice], np.ndarray]:
    """Gives the values [B, K] of some rows of K plain columns: Arrow makes them row-major in one call."""
    batch = pa.record_batch(list(arrays), names=[str(i) for i in range(len(arrays))])
    return lambda rows: batch.slice(rows.start, rows.stop - rows.start).to_tensor(row_major=True).to_numpy()


def _values(
    array: pa.Array[Any], width: int | None, center_K: Tensor, scale_K: Tensor
) -> Callable[[slice], np.ndarray]:
    """Gives the float32 values of some rows of a column, [B], or [B, K] of vectors.

    Either still to be scaled, with nulls at the centre, or scaled, with center_K and scale_K set to (0, 1) in place.
    """

    def shaped(values_BK: Tensor) -> np.ndarray:
        return values_BK.numpy() if width else values_BK.squeeze(1).numpy()

    if _is_plain((array, width)):  # a view, made once
        values = from_arrow(array).numpy()
        return lambda rows: values[rows]
    kind = as_tensor(array.slice(0, 0), width)[0].dtype
    center, scale = center_K.clone(), scale_K.clone()
    if kind == torch.float64:
        center_K.zero_()
        scale_K.fill_(1.0)

    def of(rows: slice) -> np.ndarray:
        values_BK, present_BK = as_tensor(array.slice(rows.start, rows.stop - rows.start), width)
        empty_K = center.float()
        if kind == torch.float64:
            values_BK, empty_K = values_BK.sub(center).div_(scale).float(), torch.zeros_like(empty_K)
        return shaped(values_BK if present_BK is None else torch.where(present_BK, values_BK, empty_K))

    return of


def blocks(
    n: int, out_NW: Tensor, places_N: Tensor | None, *, columns: int, multiple: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, tensor to fill with them) of some of n rows after the other, so few that they stay in the cache.

    Filled by one call for each of the columns, the tensor [B, W] is in its place in `out_NW`, or is put there by `place` before
    the next one comes. All blocks but the last have a number of rows that `multiple` divides.
    """
    width = max(1, out_NW.shape[1])
    size = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // width), CALL_NUMBERS * columns // width)
    size = -(-size // multiple) * multiple
    room_BW = None if places_N is None else out_NW.new_empty(min(size, n), out_NW.shape[1])
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        if places_N is None or room_BW is None:
            yield rows, out_NW[rows]
        else:
            block_BW = room_BW[: rows.stop - start]
            yield rows, block_BW
            place(block_BW, places_N[rows], out_NW)


def place(rows_N: Tensor, places_N: Tensor, out: Tensor) -> None:
    """out[places_N[i]] = rows_N[i]. Rows whose place is negative are left out. Both tensors are contiguous, of one dtype.

    numpy's `put` of whole rows as opaque items: faster than any gather, which waits for memory, as stores do not.
    """
    every, room = places_N.numpy(), out.numpy()
    for at in range(0, len(every), PLACED_ROWS):  # an int64 is made of every place
        places, rows = every[at : at + PLACED_ROWS], rows_N[at : at + PLACED_ROWS].numpy()
        if places.min() < 0:
            kept = places >= 0
            places, rows = places[kept], rows[kept]
        if out.dim() == 1:  # of single numbers, this is the fastest
            out.scatter_(0, torch.from_numpy(places).long(), torch.from_numpy(rows))
        elif rows.size:
            opaque = f"V{rows[0].nbytes}"
            # All places are in range; mode "raise" is slower.
            np.put(room.view(opaque), places, rows.view(opaque), mode="clip")

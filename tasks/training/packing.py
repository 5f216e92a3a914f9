"""Columns of an Arrow table into one row-major tensor: numbers standardised on the way, rows in any order.

Shape legend: N rows, F numbers of one row, K numbers of one column, B rows of a block, T numbers of a tile.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tasks.training.columns import as_tensor

BLOCK_NUMBERS: Final = 262_144
"""Numbers filled in at a time. So many are still in the cache when they are scaled and put in their places; of a smaller block,
the calls for each of its columns would take longer than the copying."""
BLOCK_ROWS: Final = 2048  # at least, of rows however wide
TILE_NUMBERS: Final = 256  # numbers that one loop scales, so that tables of few columns still vectorise


def pack(
    columns: Sequence[tuple[pa.Array[Any], int | None]],
    center_F: Tensor,
    scale_F: Tensor,
    x_NF: Tensor,
    positions_N: Tensor | None = None,
) -> bool:
    """Fills x_NF (contiguous float32) with (value - center) / scale, and 0 for nulls. Returns whether all is finite.

    `columns` are (array, width of a vector or None); center_F and scale_F are float64. With `positions_N` the rows go
    where `place` puts them.

    Types that are exact in float32 are copied as they are, a block at a time, and scaled while the block is in the
    cache. The others (int64, float64, decimals, times) are scaled column by column in float64 first: a timestamp has
    no useful digits left in float32. Which way a column goes depends on its type only, so that the bits of a row
    do not depend on its neighbours.
    """
    f = x_NF.shape[1]
    n = len(columns[0][0]) if columns else 0
    center_F, scale_F = center_F.clone(), scale_F.clone()  # becomes (0, 1) where a column is scaled beforehand
    parts: list[tuple[int | slice, np.ndarray]] = []  # (place in a row, values [N] or [N, K])
    at = 0
    for array, width in columns:
        here = slice(at, at + (width or 1))
        values = _prepared(array, width, center_F[here], scale_F[here]).numpy()
        parts.append((at, values[:, 0]) if width is None else (here, values))
        at = here.stop

    tile = max(1, TILE_NUMBERS // max(1, f))
    center_F, scale_F = center_F.float(), scale_F.float()
    scaling = bool((center_F != 0).any() or (scale_F != 1).any())
    if scaling:
        center_T, scale_T = center_F.repeat(tile), scale_F.repeat(tile)
    finite = True
    for rows, x_BF in blocks(n, x_NF, positions_N, multiple=tile):
        x = x_BF.numpy()  # numpy copies into columns of rows faster than torch and Arrow do
        for column, values in parts:
            x[:, column] = values[rows]
        if scaling:
            whole = len(x_BF) // tile * tile
            x_BF[:whole].view(-1, tile * f).sub_(center_T).div_(scale_T)
            x_BF[whole:].sub_(center_F).div_(scale_F)
        # NaN and infinity survive every addition, and a sum is nearly free; one of huge numbers may overflow by itself.
        finite = finite and (math.isfinite(x_BF.sum().item()) or bool(torch.isfinite(x_BF).all()))
    return finite


def blocks(n: int, out_NW: Tensor, positions_N: Tensor | None, *, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """(rows, tensor to fill with them) of some of n rows after the other, so few that they stay in the cache.

    Filled, the tensor [B, W] is in its place in `out_NW`, or is put there by `place` before the next one comes. All blocks but
    the last have a number of rows that `multiple` divides.
    """
    width = max(1, out_NW.shape[1])
    size = -(-max(BLOCK_ROWS, BLOCK_NUMBERS // width) // multiple) * multiple
    room_BW = None if positions_N is None else out_NW.new_empty(min(size, n), out_NW.shape[1])
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        if positions_N is None or room_BW is None:
            yield rows, out_NW[rows]
        else:
            block_BW = room_BW[: rows.stop - start]
            yield rows, block_BW
            place(block_BW, positions_N[rows], out_NW)


def place(rows_N: Tensor, positions_N: Tensor, out: Tensor) -> None:
    """out[positions_N[i]] = rows_N[i]. Rows at negative positions go nowhere. Both tensors are contiguous, of one dtype.

    numpy's `put` of whole rows as opaque items: faster than any gather, which waits for memory, as stores do not.
    """
    positions, rows, places = positions_N.numpy(), rows_N.numpy(), out.numpy()
    if positions.min(initial=0) < 0:
        kept = positions >= 0
        positions, rows = positions[kept], rows[kept]
    if rows.size:
        opaque = f"V{rows[0].nbytes}"
        np.put(places.view(opaque), positions, rows.view(opaque), mode="clip")  # "raise" is slower; all are in range


def _prepared(array: pa.Array[Any], width: int | None, center_K: Tensor, scale_K: Tensor) -> Tensor:
    """float32 values [N, K] of one column; K is 1 if it is no vector.

    Either still to be scaled, with nulls at the centre, or scaled, with center_K and scale_K set to (0, 1) in place.
    """
    values_NK, present_NK = as_tensor(array, width)
    if values_NK.dtype == torch.float64:
        values_NK = values_NK.sub(center_K).div_(scale_K).float()
        center_K.zero_()
        scale_K.fill_(1.0)
    return values_NK if present_NK is None else torch.where(present_NK, values_NK, center_K.float())

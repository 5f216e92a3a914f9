"""Number columns of an Arrow table into one row-major float32 tensor, standardised on the way.

Shape legend: N rows, F numbers of one row, K numbers of one column, B rows of a block, T numbers of a tile.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tasks.training.columns import as_tensor

BLOCK_NUMBERS: Final = 262_144
"""float32s filled in and scaled at a time. So many are still in the cache when they are scaled; of a smaller block, the calls
for each of its columns would take longer than the copying."""
BLOCK_ROWS: Final = 2048  # at least, of rows however wide
TILE_NUMBERS: Final = 256  # numbers that one loop scales, so that tables of few columns still vectorise


def pack(columns: Sequence[tuple[pa.Array[Any], int | None]], center_F: Tensor, scale_F: Tensor, x_NF: Tensor) -> bool:
    """Fills x_NF (contiguous float32) with (value - center) / scale, and 0 for nulls. Returns whether all is finite.

    `columns` are (array, width of a vector or None); center_F and scale_F are float64.

    Types that are exact in float32 are copied as they are, a block at a time, and scaled while the block is in the
    cache. The others (int64, float64, decimals, times) are scaled column by column in float64 first: a timestamp has
    no useful digits left in float32. Which way a column goes depends on its type only, so that the bits of a row
    do not depend on its neighbours.
    """
    n, f = x_NF.shape
    if not n or not f:
        return True
    center_F, scale_F = center_F.clone(), scale_F.clone()  # becomes (0, 1) where a column is scaled beforehand
    parts: list[tuple[int | slice, np.ndarray]] = []  # (place in a row, values [N] or [N, K])
    at = 0
    for array, width in columns:
        here = slice(at, at + (width or 1))
        values = _prepared(array, width, center_F[here], scale_F[here]).numpy()
        parts.append((at, values[:, 0]) if width is None else (here, values))
        at = here.stop

    tile = max(1, TILE_NUMBERS // f)
    center_F, scale_F = center_F.float(), scale_F.float()
    scaling = bool((center_F != 0).any() or (scale_F != 1).any())
    if scaling:
        center_T, scale_T = center_F.repeat(tile), scale_F.repeat(tile)
    block = -(-max(BLOCK_ROWS, BLOCK_NUMBERS // f) // tile) * tile
    x = x_NF.numpy()  # numpy copies into columns of rows faster than torch and Arrow do
    total = torch.zeros(())  # NaN and infinity survive every addition, and one sum is nearly free
    for start in range(0, n, block):
        rows = slice(start, start + block)
        for place, values in parts:
            x[rows, place] = values[rows]
        x_BF = x_NF[rows]
        if scaling:
            whole = len(x_BF) // tile * tile
            x_BF[:whole].view(-1, tile * f).sub_(center_T).div_(scale_T)
            x_BF[whole:].sub_(center_F).div_(scale_F)
        total += x_BF.sum()
    # A sum of huge numbers may overflow by itself, so only the values are evidence.
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x_NF).all())


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

"""Number columns of an Arrow table into one row-major float32 tensor, standardised on the way.

Shape legend: N rows, F numbers of one row, K numbers of one column, B rows of a block, T numbers of a tile.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor

from tasks.training.columns import EXACT_IN_FLOAT32, as_tensor, from_arrow, numbers, to_arrow

BLOCK_NUMBERS: Final = 262_144  # float32s transposed at a time: measured best for 99 columns
NARROW_BLOCK_NUMBERS: Final = 1_048_576  # float32s of narrow rows at a time: more gain nothing
NARROW: Final = 16
"""Up to so many numbers a row, a cache line, columns are copied in one by one: twice as fast as transposing blocks of them. Of
wider rows each line would be fetched again for every column."""
TILE_NUMBERS: Final = 256  # numbers that one loop scales, so that tables of few columns still vectorise


def pack(columns: Sequence[tuple[pa.Array[Any], int | None]], center_F: Tensor, scale_F: Tensor, x_NF: Tensor) -> bool:
    """Fills x_NF (contiguous float32) with (value - center) / scale, and 0 for nulls. Returns whether all is finite.

    `columns` are (array, width of a vector or None); center_F and scale_F are float64.

    Types that are exact in float32 are transposed as they are, a block at a time, and scaled while the block is in the
    cache. The others (int64, float64, decimals, times) are scaled column by column in float64 first: a timestamp has
    no useful digits left in float32. Which way a column goes depends on its type only, so that the bits of a row
    do not depend on its neighbours.
    """
    n, f = x_NF.shape
    if not n or not f:
        return True
    center_F, scale_F = center_F.clone(), scale_F.clone()  # becomes (0, 1) where a column is scaled beforehand
    runs: list[tuple[int, int, pa.RecordBatch | Tensor]] = []  # (first number, one past the last, values)
    plain: list[pa.Array[Any]] = []  # neighbouring plain columns, which Arrow transposes together

    def end_run(at: int) -> None:
        if f <= NARROW:
            first = at - len(plain)
            runs.extend((first + i, first + i + 1, from_arrow(array).view(-1, 1)) for i, array in enumerate(plain))
        elif plain:
            runs.append((at - len(plain), at, pa.RecordBatch.from_arrays(plain, [str(i) for i in range(len(plain))])))
        plain.clear()

    at = 0
    for array, width in columns:
        stop = at + (width or 1)
        prepared = _prepared(array, width, center_F[at:stop], scale_F[at:stop])
        if isinstance(prepared, Tensor):
            end_run(at)
            runs.append((at, stop, prepared))
        else:
            plain.append(prepared)
        at = stop
    end_run(at)

    tile = max(1, TILE_NUMBERS // f)
    center_F, scale_F = center_F.float(), scale_F.float()
    center_T, scale_T = center_F.repeat(tile), scale_F.repeat(tile)
    scaling = bool((center_F != 0).any() or (scale_F != 1).any())
    block = max(1, (NARROW_BLOCK_NUMBERS if f <= NARROW else BLOCK_NUMBERS) // (f * tile)) * tile
    total = torch.zeros(())  # NaN and infinity survive every addition, and one sum is nearly free
    for start in range(0, n, block):
        x_BF = x_NF[start : start + block]
        for first, stop, values in runs:
            if isinstance(values, Tensor):
                x_BF[:, first:stop] = values[start : start + block]
            else:
                x_BF[:, first:stop] = from_arrow(values.slice(start, block).to_tensor(row_major=True))
        if scaling:
            whole = len(x_BF) // tile * tile
            x_BF[:whole].view(-1, tile * f).sub_(center_T).div_(scale_T)
            x_BF[whole:].sub_(center_F).div_(scale_F)
        total += x_BF.sum()
    # A sum of huge numbers may overflow by itself, so only the values are evidence.
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x_NF).all())


def _prepared(array: pa.Array[Any], width: int | None, center_K: Tensor, scale_K: Tensor) -> pa.Array[Any] | Tensor:
    """float32 values of one column: an Arrow array [N] if plain, a tensor [N, K] if a vector.

    Either still to be scaled, with nulls at the centre, or scaled, with center_K and scale_K set to (0, 1) in place.
    """
    if width is None and array.type in EXACT_IN_FLOAT32:
        plain = numbers(array)
        return plain.fill_null(center_K.float().item()) if plain.null_count else plain
    values_NK, present_NK = as_tensor(array, width)
    if values_NK.dtype == torch.float64:
        values_NK = values_NK.sub(center_K).div_(scale_K).float()
        center_K.zero_()
        scale_K.fill_(1.0)
    if present_NK is not None:
        values_NK = torch.where(present_NK, values_NK, center_K.float())
    return to_arrow(values_NK.view(-1)) if width is None else values_NK

"""Arrow columns as numbers, bucket ids and seconds: no statistics, no state.

Shape legend: N rows, K numbers of a vector column (1 for a plain column), V distinct values, I items of all lists of a
column, L length of a padded sequence, B some neighbouring rows.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import math
from collections.abc import Callable
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tidemill.tasks.training.families import family_of

EXACT_IN_FLOAT32: Final = (pa.bool_(), pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.float16(), pa.float32())
TICKS_PER_SECOND: Final = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
SECONDS_PER_DAY: Final = 86_400.0
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)
ROUNDED_BEYOND: Final[dict[Any, int]] = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
"""Larger whole numbers may have been rounded to fit the type."""


def one_array(column: pa.ChunkedArray[Any]) -> pa.Array[Any]:
    """The column as one array, without a copy when it is one chunk."""
    if column.num_chunks == 1:
        return cast("pa.Array[Any]", column.chunk(0))  # the stubs say ChunkedArray
    return column.combine_chunks()


def numbers(array: pa.Array[Any]) -> pa.Array[Any]:
    """float32 [N] if every value of the array's type is exact in float32, else float64 [N]; nulls stay null.

    Dates and timestamps become seconds since 1970-01-01T00:00Z (naive ones count as UTC), times of day and durations
    become seconds. Integers beyond 2**53 are rounded.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return numbers(array.cast(kind.value_type))
    if kind == pa.float32():
        return array
    if kind in EXACT_IN_FLOAT32:
        return array.cast(pa.float32())
    if pa.types.is_date32(kind):
        return pc.multiply(array.cast(pa.int32()).cast(pa.float64()), SECONDS_PER_DAY)
    if pa.types.is_date64(kind):
        return _seconds(array.cast(pa.int64()), TICKS_PER_SECOND["ms"])
    if pa.types.is_temporal(kind):  # timestamps, times of day, durations
        ticks = array.cast(pa.int32() if pa.types.is_time32(kind) else pa.int64())
        return _seconds(ticks, TICKS_PER_SECOND[cast(Any, kind).unit])
    return array.cast(pa.float64(), safe=False)


def _seconds(ticks: pa.Array[Any], per_second: float) -> pa.Array[Any]:
    return pc.divide(ticks.cast(pa.float64(), safe=False), per_second)  # rounds once


def as_tensor(array: pa.Array[Any], width: int | None) -> tuple[Tensor, Tensor | None]:
    """A number, time, duration or vector column as (values_NK, present_NK).

    values_NK is float32 or float64 as `numbers` says, with 0 for nulls. It may be a read-only view of Arrow's memory:
    never write to it. present_NK is bool, or None when nothing is null; all numbers of a null vector are null.
    """
    n, k = len(array), width or 1
    flat = array
    holed: list[pa.Array[Any]] = []  # lists with nulls, the outermost first
    while pa.types.is_fixed_size_list(flat.type):
        if flat.null_count:
            holed.append(flat)
        lists = cast("pa.FixedSizeListArray[Any, Any]", flat)
        size = lists.type.list_size
        flat = lists.values.slice(lists.offset * size, len(lists) * size)
    flat = numbers(flat)
    values_NK = from_arrow(flat.fill_null(0.0) if flat.null_count else flat).view(n, k)
    if not flat.null_count and not holed:
        return values_NK, None
    present_NK = _present(flat).view(n, k)
    for level in holed:
        present_NK.view(len(level), -1).logical_and_(_present(level).unsqueeze(1))
    return values_NK, present_NK


def _present(array: pa.Array[Any]) -> Tensor:
    return from_arrow(array.is_valid().cast(pa.uint8())).bool()


_ARROW: Final = {torch.int64: pa.int64(), torch.float32: pa.float32(), torch.float64: pa.float64()}


def from_arrow(array: pa.Array[Any]) -> Tensor:
    """A view of Arrow's memory. DLPack, because `Array.to_numpy` imports pandas where that is installed (0.7 s)."""
    return torch.utils.dlpack.from_dlpack(array)


def to_arrow(values_N: Tensor) -> pa.Array[Any]:
    """The other way, for int64, float32 and float64 without nulls. `pa.array` of a NumPy array imports pandas as well."""
    return pa.Array.from_buffers(
        _ARROW[values_N.dtype], len(values_N), [None, pa.py_buffer(values_N.contiguous().numpy().data)]
    )


Ids = Callable[[slice], Tensor]  # of some rows: int64 [B], or [B, L] of sequences


def bucket_ids(array: pa.Array[Any], buckets: int) -> Ids:
    """For each row 0 if it is null, else 1 + hash mod `buckets` of the value (`hash_bucket` of its `canonical` bytes).

    Each distinct value is hashed once, at once; rows only look their id up.

    Raises:
        ValueError: a value is no category; see `canonical`.
    """
    if pa.types.is_decimal32(array.type) or pa.types.is_decimal64(array.type):  # Arrow makes no dictionary of them
        array = array.cast(pa.decimal128(18, array.type.scale))
    encoded = cast("pa.DictionaryArray[Any, Any]", array)
    if not pa.types.is_dictionary(array.type):
        encoded = array.dictionary_encode()
    elif len(encoded.dictionary) > len(array):  # a slice that uses little of its dictionary
        encoded = array.cast(array.type.value_type).dictionary_encode()
    values = encoded.dictionary
    if family_of(values.type) == ("text", None):
        values = values.cast(pa.large_binary())  # string to binary is free and skips the decoding of UTF-8
    ids_V = torch.tensor([0, *(_bucket(value, values.type, buckets) for value in values.to_pylist())])

    def ids(rows: slice) -> Tensor:
        indices = encoded.indices.slice(rows.start, rows.stop - rows.start).cast(pa.int64())
        if not indices.null_count:
            return ids_V.index_select(0, from_arrow(indices) + 1)
        # Not `fill_null`: making its Arrow scalar imports pandas where that is installed.
        stored = pa.Array.from_buffers(pa.int64(), len(indices), [None, indices.buffers()[1]], offset=indices.offset)
        return ids_V.index_select(0, torch.where(_present(indices), from_arrow(stored), -1) + 1)

    return ids


def sequence_ids(array: pa.Array[Any], buckets: int, length: int) -> Ids:
    """For each row the `bucket_ids` of the last L items of a list column. A shorter list is followed by 0, a null one all 0.

    Raises:
        ValueError: a value is no category; see `canonical`.
    """
    n = len(array)
    lists = cast("pa.ListArray[Any]", array)
    offsets = from_arrow(lists.offsets).long()
    starts_N = offsets[:n]
    views = pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type)
    stops_N = starts_N + from_arrow(cast(Any, array).sizes) if views else offsets[1:]
    if array.null_count:  # a null list may have items in memory
        stops_N = torch.where(_present(array), stops_N, starts_N)
    first = int(starts_N.min()) if n else 0
    values = lists.values.slice(first, int(stops_N.max()) - first if n else 0)
    all_ids = bucket_ids(values, buckets)(slice(0, len(values)))
    ids_I = torch.cat([torch.zeros(1, dtype=torch.int64), all_ids])  # item 0 is the padding
    used_N = (stops_N - starts_N).clamp(max=length)
    start_N = stops_N - used_N - (first - 1)
    steps_L = torch.arange(length)

    def ids(rows: slice) -> Tensor:
        items_BL = start_N[rows].unsqueeze(1) + steps_L
        items_BL.masked_fill_(steps_L >= used_N[rows].unsqueeze(1), 0)
        return ids_I.index_select(0, items_BL.view(-1)).view_as(items_BL)

    return ids


def _bucket(value: bytes | float | Decimal | None, kind: pa.DataType, buckets: int) -> int:
    return 0 if value is None else 1 + hash_bucket(canonical(value, kind), buckets)


def canonical(value: bytes | float | Decimal, kind: Any) -> bytes:
    """The bytes that stand for a category of Arrow's type `kind`, the same whatever the type of the file is.

    Text stands for itself as UTF-8, and a whole number for its digits: int8 3, float64 3.0 and decimal 3.00 agree. A fraction
    stands for the shortest digits that name its nearest float32: 0.1 agrees in float32, float64 and decimals, and so does 1/3.

    Raises:
        ValueError: NaN or infinity; or a whole number that the type may have rounded (`ROUNDED_BEYOND`), or a fraction that
            float16 has rounded: the same number in a wider type would be another category.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return str(int(value)).encode()
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a category: write nulls for missing values")
    if value == int(value):
        if isinstance(value, float) and abs(value) > ROUNDED_BEYOND[kind]:
            raise ValueError(
                f"{value:.17g} is not a category: {kind.bit_width} bits of a float round whole numbers beyond "
                f"{ROUNDED_BEYOND[kind]:,}; write integers or text"
            )
        return str(int(value)).encode()
    if kind == pa.float16() and float(str(np.float16(value))) != value:
        raise ValueError(
            f"{np.float16(value)!s} is not a category: float16 has rounded it; write float32, float64, decimals or text"
        )
    if not -MAX_FLOAT32 < value < MAX_FLOAT32:  # of decimals only: there are no such fractions in a float64
        raise ValueError(f"{value} is not a category: it is beyond float32; write text")
    nearest = float(str(np.float32(float(value))))
    return (str(int(nearest)) if nearest == int(nearest) else repr(nearest)).encode()


def hash_bucket(data: bytes, buckets: int) -> int:
    """BLAKE2b (RFC 7693) with an 8-byte digest, read big-endian, modulo `buckets`: the same on every machine."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") % buckets

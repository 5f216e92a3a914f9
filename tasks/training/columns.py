"""Arrow columns as numbers, bucket ids and seconds: no statistics, no state.

Shape legend: N rows, K numbers of a vector column (1 for a plain column), V distinct values, I items of all lists of a
column, L length of a padded sequence, B some neighbouring rows.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Final, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

Family = Literal["number", "time", "duration", "text", "list of integers", "list of text"]

EXACT_IN_FLOAT32: Final = (pa.bool_(), pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.float16(), pa.float32())
TICKS_PER_SECOND: Final = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
SECONDS_PER_DAY: Final = 86_400.0


def family_of(kind: pa.DataType) -> tuple[Family, int | None] | None:
    """What a column of this Arrow type holds, and its width if it is a vector. None: not usable as an input.

    The rule of types that change between files: types of one family and width are interchangeable, others are refused,
    since they would change what the numbers mean. So bool, int32, int64, float16, float64 and decimals are all numbers;
    string, large_string, binary and dictionaries of them are all text; a list may become a large_list, and its items
    follow the same rule. From a number to text, from a date to a number or from 3 numbers to 4 there is no way but a
    new model. A category that the dataset did not have is no change of type: it is hashed like any other.

    A vector is a fixed-size list of numbers. Fixed-size lists inside each other, such as [channels][height][width], are
    one vector of all their numbers in row-major order.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return None if types.is_nested(kind.value_type) else family_of(kind.value_type)
    if types.is_fixed_size_list(kind):
        item = family_of(kind.value_type)
        if item is None or item[0] != "number" or not kind.list_size:
            return None
        return "number", kind.list_size * (item[1] or 1)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        item_kind = kind.value_type.value_type if types.is_dictionary(kind.value_type) else kind.value_type
        if types.is_integer(item_kind):
            return "list of integers", None
        return ("list of text", None) if family_of(item_kind) == ("text", None) else None
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "number", None
    if types.is_date(kind) or types.is_timestamp(kind):
        return "time", None
    if types.is_time(kind) or types.is_duration(kind):
        return "duration", None
    text = (types.is_string, types.is_large_string, types.is_string_view)
    data = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return ("text", None) if any(test(kind) for test in (*text, *data)) else None


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


def from_arrow(array: pa.Array[Any]) -> Tensor:
    """A view of Arrow's memory. DLPack, because `Array.to_numpy` imports pandas where that is installed (0.7 s)."""
    return torch.utils.dlpack.from_dlpack(array)


Ids = Callable[[slice], Tensor]  # of some rows: int64 [B], or [B, L] of sequences


def bucket_ids(array: pa.Array[Any], buckets: int) -> Ids:
    """For each row 0 if it is null, else 1 + hash mod `buckets` of the value (`hash_bucket` of its `canonical` bytes).

    Each distinct value is hashed once, at once; rows only look their id up.
    Raises ValueError for NaN and infinity.
    """
    encoded = cast("pa.DictionaryArray[Any, Any]", array)
    if not pa.types.is_dictionary(array.type):
        encoded = array.dictionary_encode()
    elif len(encoded.dictionary) > len(array):  # a slice that uses little of its dictionary
        encoded = array.cast(array.type.value_type).dictionary_encode()
    values = encoded.dictionary
    if family_of(values.type) == ("text", None):
        values = values.cast(pa.large_binary())  # string to binary is free and skips the decoding of UTF-8
    ids_V = torch.tensor([0, *_bucket_of_each(values.to_pylist(), buckets)])

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

    Raises ValueError for NaN and infinity.
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


def _bucket_of_each(values: Sequence[Any], buckets: int) -> list[int]:
    return [0 if value is None else 1 + hash_bucket(canonical(value), buckets) for value in values]


def canonical(value: bytes | float | Decimal) -> bytes:
    """The bytes that stand for a category: text as UTF-8, numbers as digits, so that int8 3 and float64 3.0 agree.

    Raises ValueError for NaN and infinity.
    """
    if isinstance(value, bytes):
        return value
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a category")
    whole = isinstance(value, int) or value == int(value)
    return (str(int(value)) if whole else repr(float(value))).encode()


def hash_bucket(data: bytes, buckets: int) -> int:
    """BLAKE2b (RFC 7693) with an 8-byte digest, read big-endian, modulo `buckets`: the same on every machine."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") % buckets

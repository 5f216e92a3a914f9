"""What was asked and answered, as the rows of a shard: the model's features, and the columns of a log of requests."""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tidemill.tasks.serving.values import BELOW_MICROSECONDS, EPOCH, EPOCH_UTC, StoredType
from tidemill.tasks.training.classes import predicted_columns
from tidemill.tasks.training.columns import one_array
from tidemill.tasks.training.families import family_of, is_untyped, type_of
from tidemill.tasks.training.inputs import Input
from tidemill.tasks.training.request_log import PREFIX, REQUEST, TIME, TYPES, VERSION

if TYPE_CHECKING:
    from tidemill.tasks.serving.predictor import Predictor

_OVERHEAD: Final = 2048
"""Bytes that an answer takes in memory beside the rows of its request and its outputs."""
_MICROSECOND: Final = dt.timedelta(microseconds=1)
_NANOSECONDS: Final = {"ns": 1, "us": 1000, "ms": 10**6, "s": 10**9}
_NUMBERS: Final = {
    str(kind): kind
    for kind in (
        *(pa.bool_(), pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.int16(), pa.int32(), pa.int64()),
        *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    )
}


@dataclass(frozen=True, slots=True)
class Answered:
    """One request and its answer."""

    predictor: Predictor
    request: str
    """Its id."""
    at: float
    """When it was answered, in seconds since 1970."""
    outputs: Tensor
    """[N] or [N, O]."""
    body: bytes
    """As it came: of JSON, Python's objects would take ten times as much memory."""
    table: pa.Table | None = None
    """Its rows, if it is no JSON: the model's features only, which may lie in the memory of the body."""

    @property
    def rows(self) -> int:
        return len(self.outputs)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        decoded = 0 if self.table is None else self.table.nbytes
        return _OVERHEAD + len(self.body) + decoded + 4 * self.outputs.numel()


def table_of_answers(answers: Sequence[Answered]) -> pa.Table:
    """The rows of several requests, in order: all JSON or all tables, and answered by the same predictor."""
    predictor = answers[0].predictor
    features = predictor.network.features
    if answers[0].table is None:
        rows = list[dict[str, Any]]()
        for answered in answers:
            given = orjson.loads(answered.body)
            rows += [given] if isinstance(given, dict) else given
        table = table_of_rows(rows, features.columns, predictor.version.manifest.columns)
    else:
        table = pa.concat_tables([answered.table for answered in answers if answered.table is not None])
        for i, column in enumerate(table.columns):
            table = table.set_column(i, table.field(i).name, _without_null_entries(column))
    ids = [f"{answered.request}/{row}" for answered in answers for row in range(answered.rows)]
    times = [round(answered.at * 1e6) for answered in answers for _ in range(answered.rows)]
    version = predictor.version.number
    for name, listed in ((REQUEST, ids), (TIME, times), (VERSION, [version] * len(ids))):
        table = table.append_column(name, pa.array(listed, TYPES[name]))
    for field, values in predicted_columns(torch.cat([answered.outputs for answered in answers]), features.labels):
        table = table.append_column(field.with_name(PREFIX + field.name), values)
    return table


def _without_null_entries(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """The same values; Parquet takes no dictionary that has null among its entries."""
    kind: Any = column.type
    if not pa.types.is_dictionary(kind):
        return column
    chunks = cast("list[pa.DictionaryArray[Any, Any]]", column.chunks)
    if not any(chunk.dictionary.null_count for chunk in chunks):
        return column
    found = list[Any]()
    for chunk in chunks:  # not decoded: of one long text in all rows, that would take more memory than there is
        entries = chunk.dictionary.drop_null()
        places = pc.index_in(chunk.dictionary, value_set=entries, skip_nulls=True)
        found.append(pa.DictionaryArray.from_arrays(places.take(chunk.indices), entries))
    return pa.chunked_array(found)


def fault_of(table: pa.Table, columns: Sequence[Input]) -> tuple[int | None, str | None]:
    """(row, column) that is at fault in a table that was refused: a column that is missing, twice there, or of another family, or
    the first row with NaN or infinity; None for what cannot be said.
    """
    for column in columns:
        if table.column_names.count(column.name) != 1:
            return None, column.name
        kind = table.schema.field(column.name).type
        if not is_untyped(kind) and family_of(kind) != (column.family, column.width):
            return None, column.name
    for column in columns:
        if column.family != "number" or column.buckets:
            continue
        values = one_array(table.column(column.name))
        rows: pa.Array[Any] = pa.array(range(len(values)))
        while pa.types.is_fixed_size_list(values.type):
            rows, values = rows.take(pc.list_parent_indices(values)), pc.list_flatten(values)
        if (place := pc.index(pc.is_finite(values.cast(pa.float32(), safe=False)), False).as_py()) >= 0:
            return rows[place].as_py(), column.name
    return None, None


# ---- rows of JSON ----------------------------------------------------------------------------------------------------
def table_of_rows(rows: Sequence[dict[str, Any]], columns: Sequence[Input], types: Mapping[str, str]) -> pa.Table:
    """Rows that the row encoder takes, as a table that is encoded to the same inputs.

    Args:
        rows: Each has a value, or None, for each column.
        columns: Of the model.
        types: Names of the Arrow types that the columns have in the dataset, as far as they are known.
    """
    arrays = [_array([row[column.name] for row in rows], column, types.get(column.name, "")) for column in columns]
    return pa.Table.from_arrays(arrays, names=[column.name for column in columns])


def _array(values: list[Any], column: Input, name: str) -> pa.Array[Any]:
    if column.family == "time":
        return _ticks(list(map(_time, values)), StoredType(name).unit, lambda unit: pa.timestamp(unit, "UTC"))
    if column.family == "duration":
        return _ticks(list(map(_duration, values)), StoredType(name).unit, pa.duration)
    if column.family != "number":
        return pa.array(values, type_of(column.family, None))
    if column.width is not None:
        item = _NUMBERS.get(name.partition(">")[0].rpartition(": ")[2].removesuffix(" not null"), pa.float64())
        numbers = [number for value in values for number in _flat(value, column.width)]
        return pa.FixedSizeListArray.from_arrays(
            _numbers(numbers, item), column.width, mask=pa.array([value is None for value in values])
        )
    array = _numbers(values, _NUMBERS.get(name, pa.int64() if column.buckets else pa.float64()))
    if column.buckets and pa.types.is_floating(array.type) and any(map(_is_rounded, values)):
        raise ValueError(f"column {column.name!r} has fractions beside integers that a float rounds")
    return array


def _numbers(values: list[Any], kind: pa.DataType) -> pa.Array[Any]:
    """Of the dataset's type if it can hold them all, else of one that can."""
    if kind == pa.bool_() and all(value in (None, 0, 1) for value in values):
        return pa.array([None if value is None else bool(value) for value in values], kind)
    values = [int(value) if isinstance(value, bool) else value for value in values]
    if pa.types.is_integer(kind) and any(isinstance(value, float) and not value.is_integer() for value in values):
        kind = pa.float64()  # Arrow would cut fractions off
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError):
        if all(value is None or isinstance(value, int) for value in values):
            return pa.array(values, pa.int64() if min(filter(None, values), default=0) < 0 else pa.uint64())
        return pa.array([None if value is None else float(value) for value in values], pa.float64())


def _is_rounded(value: Any) -> bool:
    return type(value) is int and abs(value) > 2**53


def _flat(value: Any, width: int) -> list[Any]:
    """The numbers of a vector, of lists inside each other too."""
    if value is None:
        return [None] * width
    if len(value) == width and not any(isinstance(item, list) for item in value):
        return list(value)
    inner = width // len(value)
    return [number for item in value for number in _flat(item, inner)]


def _ticks(nanos: list[int | None], unit: str, kind: Callable[[Any], pa.DataType]) -> pa.Array[Any]:
    """In microseconds, or in nanoseconds if the dataset has them; what is too far out for these, in coarser units."""
    for of, size in list(_NANOSECONDS.items())[unit != "ns" :]:
        with suppress(OverflowError, pa.ArrowException):
            return pa.array([None if value is None else (value + size // 2) // size for value in nanos], kind(of))
    raise ValueError("a time is beyond 64 bits of seconds")


def _time(value: Any) -> int | None:
    """Nanoseconds since 1970."""
    if value is None:
        return None
    time = dt.datetime.fromisoformat(value)
    below = BELOW_MICROSECONDS.search(value)
    nanos = 0 if below is None else int(below[1][:3].ljust(3, "0"))
    return (time - (EPOCH_UTC if time.tzinfo else EPOCH)) // _MICROSECOND * 1000 + nanos


def _duration(value: Any) -> int | None:
    """Nanoseconds."""
    if value is None:
        return None
    if isinstance(value, str):
        time = dt.time.fromisoformat(value)
        return dt.timedelta(0, time.second, time.microsecond, 0, time.minute, time.hour) // _MICROSECOND * 1000
    return round(value * 1e9) if isinstance(value, float) else value * 10**9

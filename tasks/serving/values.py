"""What one value of a dict adds to the inputs of its row: numbers that are scaled as `packing.pack` does, or ids.

A float of Python does not say whether a table would hold it as float32 or float64, and these are scaled in different ways: the
Arrow types of the dataset decide, as the version's manifest names them.

Shape legend: K numbers of one column.
"""

import datetime as dt
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, Final
from uuid import UUID

import numpy as np
import pyarrow as pa

from tidemill.tasks.training.columns import SECONDS_PER_DAY, TICKS_PER_SECOND, canonical, hash_bucket
from tidemill.tasks.training.inputs import Input

REMEMBERED: Final = 32_768
"""Values of a column whose ids are remembered."""
LONGEST: Final = 256
"""Longer texts, in characters, are hashed each time, as are ints beyond 64 bits: what is remembered stays small."""
_INT64: Final = 2**63
_EXACT_IN_FLOAT32: Final = frozenset(("bool", "int8", "uint8", "int16", "uint16", "halffloat", "float"))
"""`columns.EXACT_IN_FLOAT32` by the names that a manifest has for them."""
_NO_NUMBERS: Final = frozenset("mMc")
"""Kinds of numpy's types that Python reads as numbers of any unit, or of which it drops a part: times, and complex numbers."""
_FLOATS: Final = {"halffloat": pa.float16(), "float": pa.float32()}
PLAIN: Final = frozenset((float, int, bool))
INTEGERS: Final = frozenset((int, type(None)))
EPOCH: Final = dt.datetime(1970, 1, 1)
EPOCH_UTC: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_FIRST_DAY: Final = EPOCH.toordinal()
_MICROSECONDS: Final = {"s": 1_000_000, "ms": 1_000, "us": 1}
BELOW_MICROSECONDS: Final = re.compile(r"[.,]\d{6}(\d+)")

Add = Callable[[Any, list[Any]], None]
"""Appends what one value of a column adds to the numbers, or to the ids, of a row."""


class StoredType:
    """What the name of an Arrow type, as a manifest has it, says of how its values are encoded."""

    def __init__(self, name: str) -> None:
        self.item = name.partition(">")[0].rpartition(": ")[2].removesuffix(" not null")
        """The name of the type of a vector's numbers; of another column that of its own."""
        self.shape = tuple(int(size) for size in reversed(re.findall(r">\[(\d+)\]", name)))
        """Of a vector: the sizes of its lists, the outermost first."""
        self.exact_in_float32 = self.item in _EXACT_IN_FLOAT32
        unit = re.search(r"\[(s|ms|us|ns)\b", name)
        self.unit = unit[1] if unit else "s" if name.startswith("date32") else "us"


# ---- numbers ---------------------------------------------------------------------------------------------------------
def number_of(column: Input, kind: StoredType, center_K: Sequence[float], scale_K: Sequence[float]) -> Add:
    """Adds numbers that are scaled in float64 already, or are as they came: to be rounded to float32 and scaled there."""
    if column.width is not None:
        return _vector(column.width, kind, center_K, scale_K)
    if column.family == "time":
        return _scaled(lambda value: _seconds(value, kind.unit), center_K[0], scale_K[0])
    if column.family == "duration":
        return _scaled(lambda value: _length(value, kind.unit), center_K[0], scale_K[0])
    if kind.exact_in_float32:
        return _exact(_rounded if kind.item == "halffloat" else _as_float, center_K[0])
    return _float64(center_K[0], scale_K[0])


def _float64(center: float, scale: float) -> Add:
    def add(value: Any, numbers: list[float]) -> None:
        if value is None:
            numbers.append(0.0)
        elif type(value) in PLAIN:
            numbers.append((value - center) / scale)
        else:
            numbers.append((_as_float(value) - center) / scale)

    return add


def _scaled(read: Callable[[Any], float], center: float, scale: float) -> Add:
    def add(value: Any, numbers: list[float]) -> None:
        numbers.append(0.0 if value is None else (read(value) - center) / scale)

    return add


def _exact(read: Callable[[Any], float], center: float) -> Add:
    empty = float(np.float32(center))

    def add(value: Any, numbers: list[float]) -> None:
        numbers.append(empty if value is None else read(value))

    return add


def _vector(width: int, kind: StoredType, center_K: Sequence[float], scale_K: Sequence[float]) -> Add:
    """A list, a tuple or a numpy array of `width` numbers or None, or lists inside each other as in the dataset."""
    exact = kind.exact_in_float32
    read = _rounded if kind.item == "halffloat" else _as_float
    empty_K: list[float] = np.array(center_K, np.float32).tolist() if exact else [0.0] * width
    shape = kind.shape or (width,)

    def add(value: Any, numbers: list[float]) -> None:
        if value is None:
            numbers.extend(empty_K)
            return
        items = _items(value)
        if len(items) != width or (len(shape) > 1 and len(items) == shape[0] and _is_nested(items)):
            items = _flat(items, shape)
        plain = PLAIN.issuperset(map(type, items))
        if exact:
            if plain and read is _as_float:
                numbers.extend(map(float, items))
            else:
                numbers.extend(e if v is None else read(v) for v, e in zip(items, empty_K, strict=True))
        elif plain:
            numbers.extend([(v - c) / s for v, c, s in zip(items, center_K, scale_K, strict=True)])
        else:
            given = zip(items, center_K, scale_K, strict=True)
            numbers.extend(0.0 if v is None else (read(v) - c) / s for v, c, s in given)

    return add


def _is_nested(items: Sequence[Any]) -> bool:
    return any(isinstance(item, list | tuple | np.ndarray) for item in items)


def _flat(items: Sequence[Any], shape: Sequence[int]) -> Sequence[Any]:
    """The numbers of lists inside each other, row-major; those of a list that is None are None."""
    if len(items) != shape[0]:
        raise ValueError(
            f"holds a list of {len(items)}, but the model takes {' lists of '.join(map(str, shape))} numbers"
        )
    if len(shape) == 1:
        return items
    inner, found = shape[1:], list[Any]()
    for item in items:
        found += [None] * math.prod(inner) if item is None else _flat(_items(item), inner)
    return found


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind not in _NO_NUMBERS:
        items: list[Any] = value.tolist()
        return items
    raise _other(value, "a list")


def _as_float(value: Any) -> float:
    """A number, a boolean (0 or 1), a Decimal, or one of numpy's.

    A Decimal is rounded as Arrow rounds decimals.
    """
    if type(value) in PLAIN:
        return float(value)
    if isinstance(value, np.number | np.bool_) and value.dtype.kind not in _NO_NUMBERS:
        return float(value)
    if isinstance(value, Decimal):
        found: float = pa.scalar(value).cast(pa.float64()).as_py()
        return found
    if isinstance(value, float | int):
        return float(value)
    raise _other(value, "a number")


def _rounded(value: Any) -> float:
    return float(np.float16(_as_float(value)))


# ---- times -----------------------------------------------------------------------------------------------------------
def _seconds(value: Any, unit: str) -> float:
    """Seconds since 1970-01-01T00:00Z of a datetime, a date, or either as ISO 8601 text. What has no time zone is UTC."""
    below = ""
    if isinstance(value, str):
        try:
            text, value = value, dt.datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(
                f"holds {_shown(value)}, but the model takes a time: give ISO 8601, as 2026-11-28T12:00:00Z"
            ) from None
        if ("." in text or "," in text) and (more := BELOW_MICROSECONDS.search(text)) is not None:
            below = more[1]
    if isinstance(value, dt.datetime):
        since = value - (EPOCH if value.tzinfo is None else EPOCH_UTC)
        return _of_ticks(since, unit, below)
    if isinstance(value, dt.date):
        return (value.toordinal() - _FIRST_DAY) * SECONDS_PER_DAY
    raise _other(value, "a time: give ISO 8601 text")


def _length(value: Any, unit: str) -> float:
    """Seconds of a timedelta, of a time of day, of one as ISO 8601 text, or of a number: this many seconds."""
    if isinstance(value, str):
        try:
            value = dt.time.fromisoformat(value)
        except ValueError:
            raise ValueError(
                f"holds {_shown(value)}, but the model takes a time of day, as 12:30:00, or seconds"
            ) from None
    if isinstance(value, dt.time):
        if value.tzinfo is not None:
            raise ValueError(f"holds {value}, a time of day with a time zone: give it without one")
        of_day = dt.timedelta(0, value.second, value.microsecond, 0, value.minute, value.hour)
        return _of_ticks(of_day, unit, "")
    if isinstance(value, dt.timedelta):
        return _of_ticks(value, unit, "")
    if isinstance(value, np.timedelta64):
        raise _other(value, "a timedelta, or seconds")
    return _as_float(value)


def _of_ticks(span: dt.timedelta, unit: str, below: str) -> float:
    """Seconds as `columns.numbers` has them of a column of this unit: its ticks as a float64, divided by those of a second.

    A span that the unit cannot hold is taken in a finer one. `below`: digits after those of the microseconds.
    """
    micros = (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds
    nanos = int(below[:3].ljust(3, "0")) if below else getattr(span, "nanoseconds", 0)  # pandas has them
    if unit == "ns" or nanos:
        return float(micros * 1000 + nanos) / TICKS_PER_SECOND["ns"]
    ticks, rest = divmod(micros, _MICROSECONDS[unit])
    return float(micros) / TICKS_PER_SECOND["us"] if rest else float(ticks) / TICKS_PER_SECOND[unit]


# ---- categories ------------------------------------------------------------------------------------------------------
class Ids(dict[Any, int]):
    """The id of each value of a column: as `columns.bucket_ids` has it. Those that were asked for are remembered.

    Equal keys of a dict may be of several types, as 1 and True are: whoever asks has made sure that all of them would do.
    """

    def __init__(self, buckets: int, data_of: Callable[[Any], bytes]) -> None:
        """`data_of`: the bytes that stand for a value. Raises ValueError: it is no category."""
        super().__init__()
        self._buckets, self._data_of = buckets, data_of

    def __missing__(self, value: Any) -> int:
        found = self.of(value)
        if _is_small(value):
            if len(self) >= REMEMBERED:
                self.clear()
            self[value] = found
        return found

    def of(self, value: Any) -> int:
        """The id of a value, not remembered."""
        return 0 if value is None else 1 + hash_bucket(self._data_of(value), self._buckets)


def _is_small(value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= LONGEST
    return not isinstance(value, int) or -_INT64 <= value < _INT64


def ids_of(column: Input, kind: StoredType) -> Ids:
    """The ids of the values of a category or a sequence.

    A category is text, bytes or UUIDs; of numbers an int, a boolean, a float or a Decimal. An int never passes through a float. A
    sequence holds text or ints.
    """
    if column.family in ("text", "list of text"):
        return Ids(column.buckets, _text)
    if column.length:
        return Ids(column.buckets, _integer)
    return Ids(column.buckets, partial(_number, kind=_FLOATS.get(kind.item, pa.float64())))


def category_of(column: Input, known: Ids) -> Add:
    """Adds the id of a value."""
    if column.family == "text":

        def add_text(value: Any, ids: list[int]) -> None:
            ids.append(known[value])

        return add_text

    def add_number(value: Any, ids: list[int]) -> None:
        ids.append(known[value] if type(value) is int else known.of(value))

    return add_number


def sequence_of(column: Input, known: Ids) -> Add:
    """Adds those of a list, a tuple or a numpy array; its last items count, as many as the spec says."""
    length, text = column.length, column.family == "list of text"
    padding = [0] * length

    def add(value: Any, ids: list[int]) -> None:
        if value is None:
            ids.extend(padding)
            return
        items = _items(value)[-length:]
        remembered = text or INTEGERS.issuperset(map(type, items))
        ids.extend(map(known.__getitem__ if remembered else known.of, items))
        ids.extend(padding[len(items) :])

    return add


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if isinstance(value, UUID):
        return value.bytes
    raise _other(value, "text")


def _integer(value: Any) -> bytes:
    if type(value) is int or (isinstance(value, np.integer) and value.dtype.kind not in _NO_NUMBERS):
        return canonical(int(value), None)
    raise _other(value, "an integer")


def _number(value: Any, kind: Any) -> bytes:
    if isinstance(value, np.generic) and value.dtype.kind not in _NO_NUMBERS:
        value = value.item()
    if not isinstance(value, int | float | Decimal):
        raise _other(value, "a number")
    return canonical(value, kind)


# ---- words -----------------------------------------------------------------------------------------------------------
def _other(value: object, wanted: str) -> ValueError:
    return ValueError(f"{held(value)}, but the model takes {wanted}")


def held(value: object) -> str:
    """What a column holds, for a message."""
    return f"holds {_shown(value)} ({type(value).__name__})"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # of lists inside each other
        text = reprlib.repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

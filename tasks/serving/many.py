"""What the values of a column of many rows add to the inputs: the bits that `values.py` adds one by one, by numpy.

Shape legend: N rows, K numbers and L ids of one column, W numbers or ids of a row.
"""

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, Final

import numpy as np

from tidemill.tasks.serving.values import (
    BELOW_MICROSECONDS,
    EPOCH,
    EPOCH_UTC,
    INTEGERS,
    PLAIN,
    Add,
    Ids,
    StoredType,
    category_of,
    ids_of,
    number_of,
    sequence_of,
)
from tidemill.tasks.training.columns import TICKS_PER_SECOND
from tidemill.tasks.training.inputs import Input

Values = Sequence[Any]
Array = np.ndarray[Any, Any]
Many = Callable[[Values, set[type]], Array | None]
"""From the values of a column and the set of their types, without None, to [N] or [N, W]. None: not all are of a type that is
read here. What is no value of the column raises what `values.py` raises, or passes on what Python or numpy raises."""

_NONE: Final = type(None)
_MICROSECOND: Final = dt.timedelta(microseconds=1)
_EXACT_SECONDS: Final = 2**53 / 1e6
"""So long before which a float64 counts microseconds without a gap: 285 years."""


@dataclass(frozen=True)
class Part:
    """One column: how it is read, and its place in the numbers, or in the ids, of a row."""

    column: int
    """Its place among the columns of the features."""
    here: int | slice
    add: Add
    many: Many
    empty: Any
    """What None adds: a number, or one for each place."""

    def fill(self, values: Values, out_NW: Array) -> None:
        """Write what the column adds to each row. Raises what `Many` raises: a value that the column cannot hold."""
        out, kinds, given = out_NW[:, self.here], set(map(type, values)), values
        if _NONE in kinds:
            kinds.remove(_NONE)
            out[:] = self.empty
            given = [value for value in values if value is not None]
            if not given:
                return
        found = self.many(given, kinds)
        if found is None:
            one_by_one = list[Any]()
            for value in values:
                self.add(value, one_by_one)
            out[:] = np.array(one_by_one).reshape(out.shape)
        elif given is values:
            out[:] = found
        else:
            out[[value is not None for value in values]] = found


def number_part(
    i: int, column: Input, kind: StoredType, center_K: Sequence[float], scale_K: Sequence[float], at: int
) -> Part:
    """Column `i` of the features, whose numbers begin at place `at`."""
    empty = np.array(center_K, np.float32) if kind.exact_in_float32 else 0.0
    here = slice(at, at + column.numbers) if column.width else at
    add, many = number_of(column, kind, center_K, scale_K), _many_numbers(column, kind, center_K, scale_K)
    return Part(i, here, add, many, empty)


def id_part(i: int, column: Input, kind: StoredType, at: int) -> Part:
    """Column `i` of the features, whose ids begin at place `at`."""
    known = ids_of(column, kind)
    if column.length:
        return Part(i, slice(at, at + column.length), sequence_of(column, known), _many_ids(column, known), 0)
    return Part(i, at, category_of(column, known), _many_ids(column, known), 0)


# ---- numbers ---------------------------------------------------------------------------------------------------------
def _many_numbers(column: Input, kind: StoredType, center_K: Sequence[float], scale_K: Sequence[float]) -> Many:
    """As `values.number_of`."""
    if kind.item == "halffloat":
        return lambda values, kinds: None
    read: Many = _plain
    if column.width is not None:
        read = _vectors(column.width)
    elif column.family == "time":
        read = _times(kind.unit)
    if kind.exact_in_float32:
        return read
    center = np.array(center_K) if column.width else center_K[0]
    scale = np.array(scale_K) if column.width else scale_K[0]

    def scaled(values: Values, kinds: set[type]) -> Array | None:
        found = read(values, kinds)
        return None if found is None else (found - center) / scale

    return scaled


def _plain(values: Values, kinds: set[type]) -> Array | None:
    return np.array(values, np.float64) if kinds <= PLAIN else None


def _vectors(width: int) -> Many:
    def of(values: Values, kinds: set[type]) -> Array | None:
        if kinds != {list} or set(map(len, values)) != {width}:
            return None
        flat = list(chain.from_iterable(values))
        found = _plain(flat, set(map(type, flat)))
        return None if found is None else found.reshape(-1, width)

    return of


def _times(unit: str) -> Many:
    """Of datetimes, or of ISO 8601 text without nanoseconds, all with a time zone or all without one."""

    def of(values: Values, kinds: set[type]) -> Array | None:
        seconds_N: Array | None = None
        if kinds == {str}:
            text, texts = "\n".join(values), values
            if ("." in text or "," in text) and BELOW_MICROSECONDS.search(text) is not None:
                return None
            values = list(map(dt.datetime.fromisoformat, texts))  # refuses what numpy alone would read
            if _is_plain(text, len(texts)):
                seconds_N = np.array(texts, "datetime64[s]").astype(np.float64)
        elif kinds != {dt.datetime} or len(set(map(attrgetter("tzinfo"), values))) > 1:
            return None
        epoch = EPOCH if values[0].tzinfo is None else EPOCH_UTC
        # A quotient of two whole numbers that a float64 holds is rounded once, whatever the unit in which they are counted
        if seconds_N is None:
            seconds_N = np.array([(value - epoch).total_seconds() for value in values])
        if abs(seconds_N).max() >= _EXACT_SECONDS:
            return None
        if unit != "ns":
            return seconds_N
        return np.array([(value - epoch) // _MICROSECOND * 1000 for value in values]) / TICKS_PER_SECOND["ns"]

    return of


def _is_plain(text: str, count: int) -> bool:
    """Whether lines of ISO 8601 all have the form 2026-11-28T12:30:15, which numpy reads as Python does, all at once."""
    return (
        len(text) == 20 * count - 1
        and text[4::20] == text[7::20] == "-" * count
        and text[13::20] == text[16::20] == ":" * count
        and text[19::20] == "\n" * (count - 1)
    )


# ---- ids -------------------------------------------------------------------------------------------------------------
def _many_ids(column: Input, known: Ids) -> Many:
    """As `values.category_of` and `values.sequence_of`."""
    text = column.family in ("text", "list of text")

    def ids(values: Values) -> Array:
        return np.fromiter(map(known.__getitem__, values), np.int64, len(values))

    def categories(values: Values, kinds: set[type]) -> Array | None:
        return ids(values) if text or kinds == {int} else None

    def sequences(values: Values, kinds: set[type]) -> Array | None:
        if kinds != {list}:
            return None
        used = list(map(len, values))
        if max(used) > column.length:
            values = [value[-column.length :] for value in values]
            used = list(map(len, values))
        flat = list(chain.from_iterable(values))
        if not text and not INTEGERS.issuperset(map(type, flat)):
            return None
        ids_NL = np.zeros((len(values), column.length), np.int64)
        ids_NL[np.arange(column.length) < np.array(used)[:, None]] = ids(flat)
        return ids_NL

    return sequences if column.length else categories

"""One comparison of a condition against a column of an Arrow type: of rows, and of the bounds between which rows lie.

All is compared within the type of the column, exactly. Whole numbers, decimals and times are whole multiples of a unit, so that
`t >= value` says the same as `t >= (value in units, rounded up)`, and no rounding ever moves a row. To a column of floats a
number is given as the nearest float of its type: a column of float32 that holds 0.1 should equal 0.1.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tidemill.storage.conditions import (
    EITHER,
    OPERATORS,
    BadCondition,
    Bounds,
    Compare,
    In,
    Instant,
    IsNull,
    Key,
    Leaf,
    Like,
    Operator,
    Truth,
    Truths,
)
from tidemill.storage.sql import instant_of

NANOSECONDS: Final = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
DAY: Final = 86_400 * 10**9
"""In nanoseconds."""
_DECIMAL_BITS: Final = 128
"""Of the smallest decimals of which Arrow has all comparisons."""
_TEXT_UNIT: Final = "us"
"""Of times that are written as text."""

Column: TypeAlias = "pa.ChunkedArray[Any]"


class Comparison:
    """A comparison with all that the type of its column decides."""

    def __init__(self, leaf: Leaf, kind: Any) -> None:
        """`kind` is the Arrow type of the column.

        Raises:
            BadCondition: such a column is not compared with such a value.
        """
        self.leaf = leaf
        kind = _held(kind)
        self._floats = pa.types.is_floating(kind)
        self._test: _Test | None = None
        if not isinstance(leaf, IsNull):
            made: Any = {Like: _like, In: _in, Compare: _compare}[type(leaf)]
            self._test = made(leaf, kind)

    def of_rows(self, column: Column) -> Column:
        """bool [N]: the truth of it for each row; null where it is neither.

        Raises:
            BadCondition: text is no time.
        """
        test: Any = pc.is_null if self._test is None else self._test.rows
        several: Any = pa.chunked_array  # its stubs know each type by name
        if isinstance(column.type, pa.BaseExtensionType):
            column = several([chunk.storage for chunk in _chunks(column)], column.type.storage_type)
        if pa.types.is_dictionary(column.type):
            # Each distinct value once. A row without a value has no index, and comes out null.
            parts = [pc.take(_chunked(test(_chunked(c.dictionary))), c.indices) for c in _chunks(column)]
            found = several([chunk for part in parts for chunk in _chunked(part).chunks], pa.bool_())
            whole: Column = found.fill_null(True) if self._test is None else found
            return whole
        return _chunked(test(column))

    def within(self, bounds: Bounds) -> Truths:
        """The truths that it may have for rows of which so much is known."""
        if self._test is None:
            return frozenset(truth for truth, may in ((True, bounds.nulls), (False, bounds.values)) if may)
        found: Truths = frozenset()
        if bounds.values:
            known = bounds.low is not None and bounds.high is not None
            found = self._test.within(bounds.low, bounds.high) if known else EITHER
            if self._floats:  # bounds leave NaN out, which is unlike every number
                found |= self._test.nan
        return found | {None} if bounds.nulls else found


@dataclass(frozen=True, slots=True)
class _Test:
    """How values are compared."""

    rows: Callable[[Column], Any]
    within: Callable[[Key, Key], Truths]
    nan: Truths = frozenset()
    """Of a value that is not a number."""
    equal: _Equal | None = None
    """Of `=` with one value of the column's type, or with a value that it cannot hold."""


@dataclass(frozen=True, slots=True)
class _Equal:
    """What equals a value."""

    key: Key
    scalar: pa.Scalar[Any] | None
    """None: nothing does."""
    prepared: Callable[[Column], Column] | None = None
    """Makes of a column one of the type of `scalar`."""


def comparison(leaf: Leaf, kind: Any) -> Comparison:
    """`Comparison`, made once for the row groups of a dataset. Raises as it does."""
    return _made(leaf, isinstance(leaf, Compare) and isinstance(leaf.value, bool), kind)


@functools.lru_cache(256)
def _made(leaf: Leaf, boolean: bool, kind: Any) -> Comparison:
    """`boolean` tells TRUE from 1, which are equal."""
    return Comparison(leaf, kind)


def of_value(leaf: Leaf, value: pa.Scalar[Any]) -> Truth:
    """The truth of a comparison for one value, such as that of a folder.

    Raises:
        BadCondition: as of `Comparison`.
    """
    several: Any = pa.repeat  # its stubs know each type by name
    one = several(value, 1)
    truth: Truth = comparison(leaf, value.type).of_rows(_chunked(one))[0].as_py()
    return truth


# ---- what kinds of columns are compared with ----------------------------------------------------------------------------
def _compare(leaf: Compare, kind: Any) -> _Test:
    types, value = pa.types, leaf.value
    if types.is_null(kind):
        return _Test(lambda column: pa.nulls(len(column), pa.bool_()), lambda low, high: EITHER)
    if types.is_boolean(kind):
        if isinstance(value, bool) and leaf.operator in ("=", "<>"):
            return _plain(leaf.operator, value, kind)
        raise _unlike(leaf, "booleans", "TRUE or FALSE, by = or <>")
    if _is_text(kind):
        return _of_text(leaf, kind)
    if types.is_temporal(kind) and (unit := time_unit(kind)) is not None:
        if isinstance(value, str | Instant):
            when = instant_of(value) if isinstance(value, str) else value
            return _in_units(leaf.operator, Fraction(when.nanoseconds, unit), pa.int64(), _as_integers)
        raise _unlike(leaf, "times", "a time: DATE '2024-05-31' or TIMESTAMP '2024-05-31 12:30:00'")
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)):
        raise BadCondition(f"column {leaf.column!r} is of type {kind}, which no condition compares")
    if isinstance(value, bool) or not isinstance(value, Fraction):
        hint = " (--last needs a column of dates or times)" if isinstance(value, Instant) else ""
        raise _unlike(leaf, "numbers", f"a number{hint}")
    if types.is_floating(kind):
        return _of_floats(leaf.operator, value, kind)
    return _in_units(leaf.operator, value * 10 ** (kind.scale if types.is_decimal(kind) else 0), kind)


def _in(leaf: In, kind: Any) -> _Test:
    """All values at once: lists of thousands of them are asked of each row."""
    tests = [_compare(Compare(leaf.column, "=", value), kind) for value in leaf.values]
    known = [test.equal for test in tests if test.equal is not None]
    if len(known) < len(tests):  # text beside times, or a column of nulls
        return _Test(lambda column: functools.reduce(pc.or_kleene, (t.rows(column) for t in tests)), lambda *_: EITHER)
    held = {one.key: one for one in known if one.scalar is not None}
    if not held:
        return _constant(False)
    keys, first = sorted(held), next(iter(held.values()))
    scalars = [one.scalar for one in held.values()]
    if 0.0 in held and pa.types.is_floating(kind):
        scalars += [
            pa.scalar(zero, _comparable_type(kind)) for zero in (0.0, -0.0)
        ]  # equal, and not the same to `is_in`
    values = pa.array(scalars)

    def rows(column: Column) -> Any:
        found = pc.is_in(column if first.prepared is None else first.prepared(column), value_set=values)
        return pc.if_else(pc.is_valid(column), found, pa.scalar(None, pa.bool_()))

    def within(low: Key, high: Key) -> Truths:
        place = bisect.bisect_left(keys, low)
        some = place < len(keys) and keys[place] <= high
        return frozenset((some,)) if low == high or not some else EITHER

    return _Test(rows, within, frozenset((False,)))


def _like(leaf: Like, kind: Any) -> _Test:
    if pa.types.is_null(kind):
        return _Test(lambda column: pa.nulls(len(column), pa.bool_()), lambda low, high: EITHER)
    if not _is_text(kind):
        raise BadCondition(f"column {leaf.column!r} is of type {kind}: LIKE is for text")
    pattern = leaf.pattern.replace("\\", "\\\\")  # Arrow has an escape
    begins = min((leaf.pattern.index(c) for c in "%_" if c in leaf.pattern), default=len(leaf.pattern))
    prefix = leaf.pattern[:begins]

    def within(low: str, high: str) -> Truths:
        if low[:begins] > prefix or high[:begins] < prefix:
            return frozenset((False,))
        return EITHER

    return _Test(lambda column: pc.match_like(_comparable(column), pattern), within)


def _of_text(leaf: Compare, kind: Any) -> _Test:
    if isinstance(leaf.value, str):
        return _plain(leaf.operator, leaf.value, _comparable_type(kind), _comparable)
    if isinstance(leaf.value, Instant):
        when = Fraction(leaf.value.nanoseconds, NANOSECONDS[_TEXT_UNIT])
        test = _in_units(leaf.operator, when, pa.int64(), lambda column: _as_integers(_as_times(leaf, column)))
        return _Test(test.rows, lambda low, high: EITHER)
    raise _unlike(leaf, "text", f"text in single quotes{'' if isinstance(leaf.value, bool) else ', or with a time'}")


def _of_floats(operator: Operator, value: Fraction, kind: Any) -> _Test:
    largest = Fraction(2) ** 1024 - Fraction(2) ** 970
    wide = float(value) if abs(value) < largest else math.inf if value > 0 else -math.inf
    with np.errstate(over="ignore"):
        nearest = wide if kind == pa.float64() else float(kind.to_pandas_dtype()(wide))
    test = _plain(operator, nearest, _comparable_type(kind), _comparable)
    return dataclasses.replace(test, nan=frozenset((operator == "<>",)))


def _in_units(
    operator: Operator, value: Fraction, kind: Any, prepared: Callable[[Column], Column] | None = None
) -> _Test:
    """Against columns whose values are whole multiples of a unit; `value` is in units. `kind`: of `prepared` columns."""
    if value.denominator != 1:
        if operator in ("=", "<>"):
            return _constant(operator == "<>")
        value = Fraction(math.ceil(value) if operator in (">=", "<") else math.floor(value))
    units = int(value)
    lowest, highest = _range(kind)
    if not lowest <= units <= highest:
        above = units > highest
        return _constant(operator == "<>" or operator in (("<", "<=") if above else (">", ">=")))
    if pa.types.is_decimal(kind):
        wide = _comparable_type(kind)
        scalar = pa.scalar(Decimal(units).scaleb(-kind.scale, Context(prec=kind.precision + 1)), wide)
        return _plain(operator, units, wide, _comparable, scalar)
    return _plain(operator, units, kind, prepared)


def _range(kind: Any) -> tuple[int, int]:
    """The least and the greatest number of units that a type holds."""
    if pa.types.is_decimal(kind):
        return 1 - 10**kind.precision, 10**kind.precision - 1
    if pa.types.is_unsigned_integer(kind):
        return 0, 2**kind.bit_width - 1
    return -(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1


_ROWS: Final[Mapping[Operator, Callable[..., Any]]] = {
    "=": pc.equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def _plain(
    operator: Operator,
    key: Key,
    kind: Any,
    prepared: Callable[[Column], Column] | None = None,
    scalar: pa.Scalar[Any] | None = None,
) -> _Test:
    """Against one value of the type `kind`."""
    other = pa.scalar(key, kind) if scalar is None else scalar
    compared, compare = _ROWS[operator], OPERATORS[operator]

    def within(low: Key, high: Key) -> Truths:
        if operator in ("=", "<>"):
            found = frozenset((True, False)) if low <= key <= high else frozenset((False,))
            found = frozenset((True,)) if low == high == key else found
            return found if operator == "=" else frozenset(not truth for truth in found)
        return frozenset((compare(low, key), compare(high, key)))  # monotonic: the ends tell of all between

    def rows(column: Column) -> Any:
        return compared(column if prepared is None else prepared(column), other)

    return _Test(rows, within, equal=_Equal(key, other, prepared) if operator == "=" else None)


def _constant(truth: bool) -> _Test:
    """The same for every value that is there."""
    found = pa.scalar(truth)

    def rows(column: Column) -> Any:
        return pc.if_else(pc.is_valid(column), found, pa.scalar(None, pa.bool_()))

    return _Test(rows, lambda low, high: frozenset((truth,)), equal=None if truth else _Equal(None, None))


# ---- columns as they can be compared ------------------------------------------------------------------------------------
def _held(kind: Any) -> Any:
    """The type of the values that a column of an extension, or of a dictionary, holds."""
    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return kind


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _comparable_type(kind: Any) -> Any:
    """One that holds the same values. Arrow compares neither views nor floats of 16 bits, nor lists of small decimals."""
    types = pa.types
    if types.is_decimal(kind) and kind.bit_width < _DECIMAL_BITS:
        return pa.decimal128(kind.precision, kind.scale)
    return pa.large_string() if types.is_string_view(kind) else pa.float32() if types.is_float16(kind) else kind


def _comparable(column: Column) -> Column:
    kind = _comparable_type(column.type)
    return column if kind == column.type else column.cast(kind)


def time_unit(kind: Any) -> int | None:
    """Nanoseconds of one unit of a type of dates and times; None of a time of day or a duration."""
    if pa.types.is_timestamp(kind):
        return NANOSECONDS[kind.unit]
    return DAY if pa.types.is_date32(kind) else NANOSECONDS["ms"] if pa.types.is_date64(kind) else None


def _as_integers(column: Column) -> Column:
    """Times as int64, in their unit."""
    return (column.cast(pa.int32()) if pa.types.is_date32(column.type) else column).cast(pa.int64())


def _as_times(leaf: Leaf, column: Column) -> Column:
    """Text in ISO 8601 as times, with zones or without."""
    text, problems = _comparable(column), list[str]()
    for zone in (None, "UTC"):
        try:
            return text.cast(pa.timestamp(_TEXT_UNIT, zone))
        except pa.ArrowInvalid as error:
            problems.append(str(error).partition(". If ")[0])
    without, with_zones = problems
    problem = with_zones if "expected no zone offset" in without else without
    raise BadCondition(
        f"column {leaf.column!r} holds text that is no time ({problem}): compare it with text in single quotes, or name a "
        "column of times"
    )


def _unlike(leaf: Compare, what: str, wanted: str) -> BadCondition:
    value = leaf.value
    told = (
        value.text
        if isinstance(value, Instant)
        else f"{Decimal(value.numerator) / value.denominator:g}"
        if isinstance(value, Fraction)
        else repr(value)
    )
    return BadCondition(f"column {leaf.column!r} holds {what}: compare it with {wanted}, not with {told}")


def _chunks(column: Column) -> list[Any]:
    return list(column.chunks)


def _chunked(found: Any) -> Column:
    return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])

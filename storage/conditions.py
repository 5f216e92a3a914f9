"""Conditions on rows, and what can be said of them before the rows are read: three-valued logic, as SQL has it.

A comparison with a null is neither true nor false. A row is chosen where the whole condition is true. What is known of a column,
such as the value of its folder or the least and greatest of a row group, leaves a set of `Truths` that a condition may have.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, TypeAlias

Truth: TypeAlias = bool | None
"""True, false, or neither, where a null is compared."""
Truths: TypeAlias = frozenset[Truth]
"""Those that are possible."""
EITHER: Final[Truths] = frozenset((True, False))
ANY: Final[Truths] = frozenset((True, False, None))

Key: TypeAlias = Any
"""A value as Python compares it: a number in units of its column's type, or text."""

Operator: TypeAlias = Literal["=", "<>", "<", "<=", ">", ">="]
OPERATORS: Final[Mapping[Operator, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class BadCondition(ValueError):
    """A condition that cannot be read, or that does not fit the column that it is about. One line, without a place."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A point in time."""

    nanoseconds: int
    """Since 1970 in UTC."""
    text: str
    """As it was given."""


Value: TypeAlias = Fraction | str | bool | Instant
"""What a column can be compared with. A number is exact: no float stands between the text and the column's type."""


@dataclass(frozen=True, slots=True)
class Compare:
    """`column operator value`"""

    column: str
    operator: Operator
    value: Value


@dataclass(frozen=True, slots=True)
class Like:
    """`column LIKE pattern`: % stands for any characters, _ for one. There is no escape."""

    column: str
    pattern: str


@dataclass(frozen=True, eq=False, slots=True)
class In:
    """`column IN (values)`. Two of them are never equal: comparing thousands of values would take long."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class IsNull:
    """`column IS NULL`"""

    column: str


Leaf: TypeAlias = Compare | Like | In | IsNull


@dataclass(frozen=True, slots=True)
class Not:
    part: Condition


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What is left of a condition whose truth is known."""

    truth: Truth


Condition: TypeAlias = Leaf | Not | And | Or | Known


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is known of the values of a column in some rows."""

    low: Key = None
    high: Key = None
    """All values lie between them, both included; None: nothing is known."""
    nulls: bool = True
    """Whether some may be missing."""
    values: bool = True
    """Whether some may be there."""


def leaves(condition: Condition) -> Iterator[Leaf]:
    """The comparisons that it consists of, from left to right."""
    match condition:
        case Not(part):
            yield from leaves(part)
        case And(parts) | Or(parts):
            for one in parts:
                yield from leaves(one)
        case Known():
            return
        case _:
            yield condition


def columns(condition: Condition) -> list[str]:
    """The names of the columns that it is about, each once."""
    return list(dict.fromkeys(leaf.column for leaf in leaves(condition)))


def truths(condition: Condition, of_leaf: Callable[[Leaf], Truths]) -> Truths:
    """The truths that a condition may have, by those that its comparisons may have.

    They are taken to be independent of each other, so that the answer may have too many, and never too few.
    """
    match condition:
        case Known(truth):
            return frozenset((truth,))
        case Not(part):
            return frozenset(None if truth is None else not truth for truth in truths(part, of_leaf))
        case And(parts):
            return _combined((truths(part, of_leaf) for part in parts), stops=False)
        case Or(parts):
            return _combined((truths(part, of_leaf) for part in parts), stops=True)
        case _:
            return of_leaf(condition)


def _combined(parts: Iterable[Truths], *, stops: bool) -> Truths:
    """Of AND (`stops`: false) or OR (true), by Kleene: one part that stops decides; else one that is unknown does."""
    found: Truths = frozenset((not stops,))
    for part in parts:
        found = frozenset(
            stops if stops in (one, other) else None if None in (one, other) else not stops
            for one in found
            for other in part
        )
    return found


def given(condition: Condition, of_leaf: Callable[[Leaf], Truth | Leaf]) -> Condition:
    """What is left of a condition where the truth of some comparisons is known; `of_leaf` gives back those that are not."""
    match condition:
        case Known():
            return condition
        case Not(part):
            left = given(part, of_leaf)
            return Known(None if left.truth is None else not left.truth) if isinstance(left, Known) else Not(left)
        case And(parts):
            return _left([given(part, of_leaf) for part in parts], And, stops=False)
        case Or(parts):
            return _left([given(part, of_leaf) for part in parts], Or, stops=True)
        case _:
            found = of_leaf(condition)
            return Known(found) if found is None or isinstance(found, bool) else found


def _left(parts: list[Condition], made: type[And] | type[Or], *, stops: bool) -> Condition:
    if Known(stops) in parts:
        return Known(stops)
    open_parts = tuple(part for part in parts if part != Known(not stops))
    if all(isinstance(part, Known) for part in open_parts):
        return Known(None) if open_parts else Known(not stops)
    return open_parts[0] if len(open_parts) == 1 else made(open_parts)

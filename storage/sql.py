"""Conditions as SQL says them: a subset, parsed by sqlglot. What is not in it is refused by name.

    column = <> != < <= > >= value      column [NOT] BETWEEN value AND value     column IS [NOT] NULL
    column [NOT] IN (value, ...)        column [NOT] LIKE 'pattern'              column      (of booleans)
    NOT, AND, OR, parentheses

A value is a number, 'text', TRUE, FALSE, DATE 'yyyy-mm-dd' or TIMESTAMP 'yyyy-mm-dd hh:mm:ss'. Names of columns are taken as they
stand; one with other characters than letters, digits and _ stands in double quotes.
"""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from tidemill.storage.conditions import (
    And,
    BadCondition,
    Compare,
    Condition,
    In,
    Instant,
    IsNull,
    Like,
    Not,
    Operator,
    Or,
    Value,
)

if TYPE_CHECKING:
    from sqlglot import exp

_DIALECT: Final = "duckdb"  # whose names and quotes are those of standard SQL
_SUPPORTED: Final = (
    "a condition compares columns with values (= <> < <= > >=, [NOT] IN, BETWEEN, LIKE, IS [NOT] NULL), "
    "joined by AND, OR, NOT"
)
_SAID: Final = {"Required keyword": "something is missing", "Error tokenizing": "a quote or a comment is not closed"}
"""How messages of sqlglot that tell of its own classes begin -> what they mean."""
_LARGEST_EXPONENT: Final = 400
"""No column holds numbers beyond 10 to this power; an exact number with more digits would take memory without a bound."""
_SECONDS: Final = {"w": 7 * 86_400, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_LONGEST: Final = timedelta(days=36_500)


@lru_cache(64)
def parse(text: str) -> Condition:
    """The condition that a text says.

    Raises:
        BadCondition: it says none, or one outside of the subset.
    """
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        found = cast("exp.Expression", sqlglot.parse_one(text, dialect=_DIALECT, into=exp.Condition))
        _refuse_slips(text, found)
        return _condition(found)
    except SqlglotError as error:
        told = getattr(error, "errors", None)
        what = told[0].get("description", "") if told else str(error)
        what = next(
            (ours for theirs, ours in _SAID.items() if what.startswith(theirs)), " ".join(what.split()).rstrip(".")
        )
        at = f" at {told[0]['highlight']!r}" if told and told[0].get("highlight") else ""
        raise BadCondition(
            f"{text!r} cannot be read as SQL{at}: {what}; {_SUPPORTED}. A column with a name that is a word of SQL stands in "
            "double quotes"
        ) from error
    except RecursionError as error:
        raise BadCondition(f"the condition is nested too deeply: {_SUPPORTED}") from error


def duration(text: str) -> timedelta:
    """A length of time such as `90d`: weeks (w), days, hours, minutes (m) or seconds.

    Raises:
        BadCondition: it is none, or longer than 100 years.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,9})([wdhms])", text)
    if found is None or (seconds := int(found[1]) * _SECONDS[found[2]]) > _LONGEST.total_seconds():
        raise BadCondition(
            f"{text!r} is no length of time: give a whole number with w, d, h, m or s, such as 90d or 12h, of at most 36500d"
        )
    return timedelta(seconds=seconds)


def instant(when: datetime) -> Instant:
    """A time of Python, which has microseconds; without a zone it is UTC."""
    aware = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    since = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return Instant((since // timedelta(microseconds=1)) * 1_000, aware.astimezone(UTC).isoformat())


def instant_of(text: str) -> Instant:
    """A time as ISO 8601 writes it, with up to nine digits of a second; without a zone it is UTC.

    Raises:
        BadCondition: it is none.
    """
    found = re.fullmatch(
        r"(\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?)(?:(?<=:\d\d)\.(\d{1,9}))?\s*(.*)", text.strip()
    )
    try:
        if found is None:
            raise ValueError("another form")
        whole, fraction, zone = found[1], found[2] or "", found[3]
        if zone and (len(whole) == 10 or re.fullmatch(r"[zZ]|[+-]\d\d(:?\d\d)?", zone) is None):
            raise ValueError("no zone")
        base = instant(datetime.fromisoformat(whole + (zone if len(zone) != 3 else f"{zone}:00")))
    except ValueError as error:
        raise BadCondition(
            f"{text!r} is no time: write '2024-05-31' or '2024-05-31 12:30:00', with a zone as +02:00 or without one for UTC"
        ) from error
    return Instant(base.nanoseconds + int(fraction.ljust(9, "0")), text)


# ---- what sqlglot passes over -------------------------------------------------------------------------------------------
def _refuse_slips(text: str, found: exp.Expression) -> None:
    """What no SQL has and sqlglot reads all the same, as where a variable of a shell was empty: `a IN (, 'x')`, `a BETWEEN 1 2`.

    Raises:
        BadCondition: there is such a slip.
    """
    import sqlglot
    from sqlglot import TokenType as T
    from sqlglot import exp

    tokens = sqlglot.tokenize(text, dialect=_DIALECT)
    kinds = [token.token_type for token in tokens]
    pairs = set(itertools.pairwise(kinds))
    joined = sum(1 for _ in found.find_all(exp.And, exp.Between))
    slips = (
        (pairs & {(T.L_PAREN, T.COMMA), (T.COMMA, T.COMMA), (T.COMMA, T.R_PAREN)}, "a value is missing beside a comma"),
        (kinds.count(T.L_PAREN) != kinds.count(T.R_PAREN), "a parenthesis is missing"),
        (kinds.count(T.AND) < joined, "BETWEEN low AND high lacks its AND"),
        ((T.NOT, T.IS) in pairs, "IS stands before NOT"),
        (any(token.token_type is T.NOT and token.text == "!" for token in tokens), "write NOT in place of !"),
    )
    for slip, told in slips:
        if slip:
            raise BadCondition(f"{text!r} cannot be read as SQL: {told}; {_SUPPORTED}")


# ---- from sqlglot's tree to ours --------------------------------------------------------------------------------------
_FLIPPED: Final[dict[Operator, Operator]] = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "<>": "<>"}


def _condition(node: Any) -> Condition:
    from sqlglot import exp

    kind = type(node)
    if kind is exp.Paren:
        return _condition(_parts(node, "this")["this"])
    if kind is exp.Not:
        return Not(_condition(_parts(node, "this")["this"]))
    if kind is exp.And or kind is exp.Or:
        parts = tuple(_condition(part) for part in _flat(node, kind))
        return And(parts) if kind is exp.And else Or(parts)
    if kind is exp.Column:
        return Compare(_column(node), "=", True)
    found = _leaf(node)
    return Not(found) if node.args.get("negate") else found


def _flat(node: Any, kind: type) -> list[Any]:
    """The parts of a chain of the same operator, which nests to the left."""
    parts = list[Any]()
    while type(node) is kind:
        both = _parts(node, "this", "expression")
        parts.append(both["expression"])
        node = both["this"]
    return [node, *reversed(parts)]


def _leaf(node: Any) -> Condition:
    from sqlglot import exp

    operators: dict[type, Operator] = {
        exp.EQ: "=",
        exp.NEQ: "<>",
        exp.LT: "<",
        exp.LTE: "<=",
        exp.GT: ">",
        exp.GTE: ">=",
    }
    if (operator := operators.get(type(node))) is not None:
        left, right = _parts(node, "this", "expression").values()
        if isinstance(right, exp.Column) and not isinstance(left, exp.Column):
            return Compare(_column(right), _FLIPPED[operator], _value(left))
        return Compare(_column(left), operator, _value(right))
    if isinstance(node, exp.Between):
        name, low, high = _parts(node, "this", "low", "high").values()
        return And((Compare(_column(name), ">=", _value(low)), Compare(_column(name), "<=", _value(high))))
    if isinstance(node, exp.In):
        name, values = _parts(node, "this", "expressions").values()
        if values:
            return In(_column(name), tuple(_value(value) for value in values))
    if type(node) is exp.Like:
        name, pattern = _parts(node, "this", "expression").values()
        if isinstance(text := _value(pattern), str):
            return Like(_column(name), text)
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return IsNull(_column(_parts(node, "this", "expression")["this"]))
    raise _refused(node)


def _column(node: Any) -> str:
    from sqlglot import exp

    if not isinstance(node, exp.Column):
        raise _refused(node)
    if node.args.get("table"):
        raise BadCondition(f"{_told(node)} is no name of a column: one with a dot stands in double quotes")
    return str(_parts(_parts(node, "this")["this"], "this", "quoted")["this"])


def _value(node: Any) -> Value:
    from sqlglot import exp

    if isinstance(node, exp.Paren):
        return _value(_parts(node, "this")["this"])
    if isinstance(node, exp.Neg):
        value = _value(_parts(node, "this")["this"])
        if isinstance(value, Fraction):
            return -value
    elif isinstance(node, exp.Boolean):
        return bool(node.this)
    elif isinstance(node, exp.Literal):
        return str(node.this) if node.is_string else _number(str(node.this))
    elif isinstance(node, exp.Cast):
        literal, kind = _parts(node, "this", "to").values()
        types = exp.DataType.Type
        times = (types.DATE, types.TIMESTAMP, types.TIMESTAMPNTZ, types.TIMESTAMPTZ)
        if isinstance(literal, exp.Literal) and literal.is_string and kind.this in times:
            if kind.this == types.DATE and len(str(literal.this).strip()) > len("2024-05-31"):
                raise BadCondition(
                    f"{literal.this!r} is no day: write DATE '2024-05-31', or TIMESTAMP for a time of it"
                )
            return instant_of(str(literal.this))
    elif isinstance(node, exp.Null):
        raise BadCondition("nothing equals NULL: ask column IS NULL, or IS NOT NULL")
    elif isinstance(node, exp.Column):
        raise BadCondition(
            f"{_told(node)} is a column where a value is meant: text stands in single quotes, and a column is compared with "
            "values only"
        )
    raise _refused(node)


def _parts(node: Any, *names: str) -> dict[str, Any]:
    """These arguments of a node, which has no others: what sqlglot says with one that we do not know is never passed over.

    All that is negated bears `negate` or stands below a NOT, as versions of sqlglot have it.
    """
    if any(value for name, value in node.args.items() if name not in (*names, "negate", "_type")):
        raise _refused(node)
    return {name: node.args.get(name) for name in names}


def _number(text: str) -> Fraction:
    try:
        value = Decimal(text)
    except ArithmeticError as error:
        raise BadCondition(f"{text} is no number") from error
    if not value.is_finite() or (value and not -_LARGEST_EXPONENT < value.adjusted() < _LARGEST_EXPONENT):
        raise BadCondition(f"{text} is beyond what any column holds")
    return Fraction(value)


def _refused(node: Any) -> BadCondition:
    return BadCondition(f"{_told(node)} is not supported: {_SUPPORTED}")


def _told(node: Any) -> str:
    return repr(" ".join(node.sql(dialect=_DIALECT).split()))

"""Conditions as SQL says them: what is in the subset is read as SQL means it, and all else is refused by name."""

import logging
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest

from tidemill.storage.conditions import And, BadCondition, Compare, Condition, In, Instant, IsNull, Like, Not, Or
from tidemill.storage.sql import duration, instant, instant_of, parse

A = Compare("a", "=", Fraction(1))
B = Compare("b", "=", True)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("a = 1", A),
        ("a <> -1.5e1", Compare("a", "<>", Fraction(-15))),
        ("a != .1", Compare("a", "<>", Fraction(1, 10))),
        ("1 < a", Compare("a", ">", Fraction(1))),
        ("'x' >= a", Compare("a", "<=", "x")),
        ("\"odd name.\" = 'it''s'", Compare("odd name.", "=", "it's")),
        ("b", B),
        ("b = FALSE", Compare("b", "=", False)),
        ("not a = 1 and b", And((Not(A), B))),
        ("a = 1 or b and a = 1", Or((A, And((B, A))))),
        ("(a = 1 or b) and a = 1", And((Or((A, B)), A))),
        ("a between 1 and 2", And((Compare("a", ">=", Fraction(1)), Compare("a", "<=", Fraction(2))))),
        ("a not between 1 and 1", Not(And((Compare("a", ">=", Fraction(1)), Compare("a", "<=", Fraction(1)))))),
        ("a in (1)", In("a", (Fraction(1),))),
        ("a not in (1, 'x')", Not(In("a", (Fraction(1), "x")))),
        ("a like 'x%_'", Like("a", "x%_")),
        ("a not like 'x'", Not(Like("a", "x"))),
        ("a is null", IsNull("a")),
        ("a is not null", Not(IsNull("a"))),
        ("date >= date '1970-01-02'", Compare("date", ">=", Instant(86_400 * 10**9, "1970-01-02"))),
        ("t < timestamp '1970-01-01 00:00:01.000000001'", Compare("t", "<", Instant(10**9 + 1, "1970-01-01 00:00:01.000000001"))),
        ("t < timestamp '1970-01-01 01:00+01'", Compare("t", "<", Instant(0, "1970-01-01 01:00+01"))),
        ("a = 1 -- or not (", A),
        ("a not in (',', '(')", Not(In("a", (",", "(")))),
    ],
)  # fmt: skip
def test_what_a_condition_means(text: str, means: Condition) -> None:
    assert repr(parse(text)) == repr(means)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read as SQL"),
        ("a = 1 and", "cannot be read as SQL"),
        ("a b", "cannot be read as SQL at 'b'"),
        ("a = 'x", "cannot be read as SQL: a quote or a comment is not closed"),
        ("a = 1 /* or", "a quote or a comment is not closed"),
        ("a = 1; drop table a", "cannot be read as SQL at 'drop'"),
        ("a = b", "'b' is a column where a value is meant"),
        ('a = "b"', "text stands in single quotes"),
        ("a.b = 1", "one with a dot stands in double quotes"),
        ("a = NULL", "ask column IS NULL"),
        ("a in (1, null)", "ask column IS NULL"),
        ("a in ()", "not supported"),
        ("a in (select 1)", "not supported"),
        ("a ilike 'x'", "not supported"),
        ("a like 'x' escape '!'", "not supported"),
        ("a like b", "a value is meant"),
        ("a is true", "not supported"),
        ("a is distinct from 1", "not supported"),
        ("a + 1 = 2", "'a \\+ 1' is not supported"),
        ("lower(a) = 'x'", "not supported"),
        ("a::int = 1", "not supported"),
        ("count(*) > 1", "not supported"),
        ("1 = 1", "not supported"),
        ("true", "not supported"),
        ("a = ?", "not supported"),
        ("a = 'x' 'y'", "not supported"),
        ("a = 1e999999999", "beyond what any column holds"),
        ("a = timestamp '2024-13-01'", "is no time: write"),
        ("a = timestamp '2024-01-01 10:00 CEST'", "is no time: write"),
        ("a = date '2024-01-01+02'", "is no day: write"),
        ("a = date '2024-01-01 10:00'", "is no day: write"),
        ("a in (, 'x')", "a value is missing beside a comma"),
        ("a in ('x', )", "a value is missing beside a comma"),
        ("a in (1,, 2)", "a value is missing beside a comma"),
        ("a between 1 2", "BETWEEN low AND high lacks its AND"),
        ("a = cast('2024-01-01' as date or b", "a parenthesis is missing"),
        ("a not is null", "IS stands before NOT"),
        ("a ! null", "write NOT in place of !"),
        ("! b", "write NOT in place of !"),
        ("case = 1", "a word of SQL stands in double quotes"),
        ("(" * 3000 + "a = 1" + ")" * 3000, "nested too deeply"),
    ],
)
def test_what_is_not_in_the_subset_is_refused_by_name(text: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(BadCondition, match=told) as refused:
        parse(text)
    assert "\n" not in str(refused.value)
    assert not caplog.records


def test_long_chains_are_read() -> None:
    found = parse(" or ".join(f"a = {i}" for i in range(3000)))
    assert isinstance(found, Or)
    assert found.parts[1:3] == (Compare("a", "=", Fraction(1)), Compare("a", "=", Fraction(2)))


def test_lengths_of_time() -> None:
    assert duration("90d") == timedelta(days=90)
    assert [duration(text).total_seconds() for text in ("2w", "12h", "30m", "45s")] == [1_209_600, 43_200, 1_800, 45]


@pytest.mark.parametrize("text", ["", "90", "0d", "-1d", "1.5h", "1y", "d", "36501d", "99999999999w", "1 d"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(BadCondition, match="is no length of time"):
        duration(text)


def test_times_of_python_and_of_text_are_the_same() -> None:
    for moment in (
        datetime(2024, 5, 31, 12, 30, 0, 123456, tzinfo=UTC),
        datetime(1900, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    ):
        assert instant_of(moment.isoformat()).nanoseconds == instant(moment).nanoseconds

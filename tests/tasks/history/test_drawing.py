"""Charts as SVG: what is drawn, where, and that no text can break out of it."""

import base64
import itertools
import math
from xml.etree import ElementTree

import pytest

from tidemill.tasks.history.drawing import (
    Chart,
    Scale,
    as_picture,
    beyond,
    escaped,
    limits,
    short,
    ticks,
    told_apart,
)

SVG = "{http://www.w3.org/2000/svg}"


def paths(chart: Chart, kind: str) -> list[str]:
    return [path.attrib["d"] for path in ElementTree.fromstring(chart.svg()).iter("path") if path.get("class") == kind]


def test_a_value_beyond_the_axis_is_drawn_at_its_end() -> None:
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert [scale(value) for value in (-5, 0, 5, 10, 99)] == [100, 100, 50, 0, 0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (0.93, 1.11, [0.95, 1.0, 1.05, 1.1]),
        (-3.0, 3.0, [-2, 0, 2]),
        (5.0, 5.0, [5.0]),
        (0.0, math.inf, [0.0]),
    ],
)
def test_ticks_are_round_numbers_inside_of_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5 if high != 3 else 3) == pytest.approx(expected)


def test_ticks_that_differ_little_have_words_that_differ() -> None:
    assert told_apart([23.00001, 23.00002]) == ["23.00001", "23.00002"]
    assert told_apart([0.1, 0.2, 0.3]) == ["0.1", "0.2", "0.3"]
    assert told_apart([1000.0, 2500.0]) == ["1,000", "2,500"]


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (1500, "1,500"), (0.012346, "0.01235"), (2.5e7, "2.5e+07"), (-3.0, "-3")]
)
def test_numbers_are_short(value: float, words: str) -> None:
    assert short(value) == words


def test_a_few_extreme_values_do_not_press_the_others_flat_and_are_counted() -> None:
    values = [20.0 + i % 5 for i in range(100)] + [65.0, 1e6, None, math.nan]
    low, high = limits(values)
    assert 19 < low < 20
    assert 24 < high < 26
    assert beyond(values, low, high) == 2


def test_where_nearly_all_values_are_the_same_the_others_are_seen() -> None:
    low, high = limits([0.0] * 90 + [1.0] * 10)
    assert low < 0
    assert high > 1


def test_where_many_values_lie_far_out_all_are_seen() -> None:
    low, high = limits([0.001 * i for i in range(80)] + [9.0] * 20)
    assert low < 0
    assert high > 9


def test_limits_of_nothing_and_of_one_value_are_some() -> None:
    assert limits([]) == (0.0, 1.0)
    low, high = limits([7.0])
    assert low < 7 < high
    low, high = limits([0.0, 0.0], with_zero=True)
    assert low <= 0 < high


def test_a_missing_value_breaks_the_line_and_a_value_alone_is_a_dot() -> None:
    chart = Chart("c", (1, 6), (0, 1))
    chart.line([(1, 0.1), (2, 0.2), (3, None), (4, 0.4), (5, math.nan), (6, 0.6)], "a")
    (line,) = paths(chart, "a")
    (dots,) = paths(chart, "a dots big")
    assert line.count("M") == 1
    assert dots.count("M") == 2
    assert "nan" not in chart.svg()


def test_an_area_is_drawn_where_both_lines_have_a_value() -> None:
    chart = Chart("c", (1, 4), (0, 1))
    chart.between([(1, 0.1), (2, 0.2), (3, None), (4, 0.4)], [(1, 0.3), (2, 0.4), (3, 0.5), (4, 0.6)])
    (area,) = paths(chart, "fill")
    assert area.count("M") == 1
    assert area.count("L") == 3


def test_text_can_break_out_of_nothing_and_hides_nothing() -> None:
    hostile = "</title><script>alert('\"&')</script>\x00\n\u202egnp.exe \ud800"
    told = escaped(hostile)
    assert "<" not in told
    assert '"' not in told
    assert "\\x00\\n\\u202egnp.exe \\ud800" in told
    chart = Chart(hostile, (0, 1), (0, 1))
    chart.rule(0.5, hostile)
    chart.columns([(0.5, hostile)])
    chart.hovers([(0.5, [hostile, "second line"])])
    tree = ElementTree.fromstring(chart.svg())
    assert tree.find(".//script") is None
    title = tree.find(".//title")
    assert title is not None
    assert title.text is not None
    assert title.text.endswith("\nsecond line")


def test_a_picture_is_whole_in_itself() -> None:
    chart = Chart("loss", (0, 3), (0, 1))
    chart.rows()
    chart.line([(0, 0.2), (3, 0.8)], "a")
    head, _, data = as_picture(chart).partition(",")
    assert head == "data:image/svg+xml;base64"
    text = base64.b64decode(data).decode()
    tree = ElementTree.fromstring(text)
    assert (tree.tag, tree.get("width"), tree.get("height")) == (f"{SVG}svg", "1040", "270")
    assert tree.find(f"{SVG}rect") is not None
    assert "--tm-a:" in text
    assert "url(" not in text


def test_columns_to_hover_over_cover_the_plot_without_overlapping() -> None:
    chart = Chart("c", (0, 10), (0, 1))
    chart.hovers([(1.0, ["one"]), (2.0, ["two"]), (9.0, ["three"])])
    rects = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in ElementTree.fromstring(chart.svg()).iter("rect")]
    for (left, width), (right, _) in itertools.pairwise(rects):
        assert left + width == pytest.approx(right, abs=0.11)
    assert rects[0][0] == 56
    assert rects[-1][0] + rects[-1][1] == pytest.approx(1040 - 14, abs=0.11)

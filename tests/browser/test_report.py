"""The report in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Look
from tests.tasks.history.made import Story, wave
from tidemill.tasks.history.charts import Frozen
from tidemill.tasks.history.page import page
from tidemill.tasks.history.reading import HistoryReader

pytestmark = pytest.mark.browser

HOSTILE = "</title><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def written(story: Story, folder: Path, frozen: Frozen | None = None) -> str:
    """The URL of a story's report."""
    found = HistoryReader(story.log).read()
    file = folder / "report.html"
    file.write_text(page(found) if frozen is None else page(found, frozen), encoding="utf-8")
    return file.as_uri()


def long_story(versions: int, shards: int) -> Story:
    story = Story()
    story.batch([5.0, 3.5, 3.0, 2.8, 2.75])
    for number in range(1, versions):
        rejected = {f"{HOSTILE}-{number}": f"it is no Parquet file {HOSTILE}"} if number % 90 == 0 else {}
        refused = number % 11 == 0
        story.online(
            [wave(number * shards + i) for i in range(shards)],
            champion=wave(number * shards) + (0.0 if refused else 0.6),
            decision="refused" if refused else "promoted",
            rejected=rejected,
            keys=[f"2026/{number:05d}-{i}.parquet" for i in range(shards)],
        )
    return story


def colour(seen: Page, selector: str, name: str) -> str:
    return str(seen.eval_on_selector(selector, f"e => getComputedStyle(e)[{name!r}]"))


@pytest.mark.parametrize("dark", [False, True])
def test_a_thousand_versions_light_and_dark(
    look: Look, keep: Callable[[Page, str], None], tmp_path: Path, dark: bool
) -> None:
    url = written(long_story(1000, 3), tmp_path)
    seen = look(url, dark=dark)
    keep(seen, f"report-{'dark' if dark else 'light'}")
    assert seen.title() == "flights: version 999"
    assert seen.locator("h2").all_inner_texts()[:2] == [
        "Error on each shard before it was trained on",
        "Difference to the champion of the time so far",
    ]
    charts = seen.locator("svg")
    assert charts.count() == 4
    for chart in charts.all():
        box = chart.bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 100
    ground, words = colour(seen, ".tidemill", "backgroundColor"), colour(seen, ".tidemill", "color")
    assert (ground, words) == (
        ("rgb(11, 18, 32)", "rgb(226, 232, 240)") if dark else ("rgb(255, 255, 255)", "rgb(15, 23, 42)")
    )
    line = "svg.tm path.a:not(.dots)"
    assert colour(seen, line, "stroke") == ("rgb(45, 212, 191)" if dark else "rgb(15, 118, 110)")


def test_text_stays_inside_of_its_chart_and_the_page_fits_a_narrow_screen(look: Look, tmp_path: Path) -> None:
    url = written(long_story(60, 2), tmp_path, Frozen({number: wave(number) + 2 for number in range(1, 119)}))
    for width in (1280, 400):
        seen = look(url, width=width)
        assert seen.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        out = seen.evaluate(
            """() => [...document.querySelectorAll('svg text')].filter(text => {
                const t = text.getBoundingClientRect(), s = text.ownerSVGElement.getBoundingClientRect();
                return t.left < s.left - 1 || t.right > s.right + 1 || t.bottom > s.bottom + 1 || t.top < s.top - 1;
            }).map(text => text.textContent)"""
        )
        assert out == []


def test_labels_below_a_chart_do_not_lie_over_each_other(look: Look, tmp_path: Path) -> None:
    seen = look(written(long_story(1000, 1), tmp_path))
    over = seen.evaluate(
        """() => [...document.querySelectorAll('svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
            return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
                p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom).map(([b]) => [a, b]));
        })"""
    )
    assert over == []


def test_the_pointer_finds_what_a_point_stands_for(look: Look, tmp_path: Path) -> None:
    seen = look(written(long_story(20, 2), tmp_path))
    chart = seen.locator("svg").first
    box = chart.bounding_box()
    assert box is not None
    seen.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    under = seen.locator("svg rect.hit:hover title")
    assert under.count() == 1
    said = under.text_content() or ""
    assert said.startswith("version ")
    assert "mae: online" in said
    assert colour(seen, "svg rect.hit:hover", "fill") != "rgba(0, 0, 0, 0)"


def test_hostile_names_run_nothing(look: Look, tmp_path: Path) -> None:
    seen = look(written(long_story(200, 1), tmp_path))
    assert seen.title() == "flights: version 199"
    assert seen.locator("img, script").count() == 0
    assert "<script>document.title" in seen.inner_text("body")

"""The report: a whole page for each kind of history, small, self-contained, and true to the manifests."""

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tasks.history.made import SPEC, Story, wave
from tidemill.tasks.history.charts import Charts, Frozen
from tidemill.tasks.history.notebook import batch_end, history, online_end
from tidemill.tasks.history.page import charts, page
from tidemill.tasks.history.reading import LAST, HistoryReader

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Checks that each element is closed in its turn, and remembers the elements and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read(text: str) -> Balanced:
    """A page, looked through: all is closed, the charts are XML, and nothing is asked for from elsewhere."""
    found = Balanced(text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert not {"script", "link", "img", "iframe", "object", "a", "form", "base"} & {tag for tag, _ in found.seen}
    names = {name for _, attributes in found.seen for name in attributes}
    assert not {"src", "href", "style", "srcset"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"\b(nan|inf|None)\b(?!\.)", " ".join(found.words))
    return found


def told(story: Story, **arguments: Any) -> str:
    """All words of a story's page."""
    return "\n".join(read(page(HistoryReader(story.log).read(), **arguments)).words)


def long_story(versions: int, shards: int = 4) -> Story:
    story = Story()
    story.batch()
    for number in range(1, versions):
        scores = [wave(number * shards + i) for i in range(shards)]
        decision = "refused" if number % 9 == 0 else "promoted"
        rejected = {f"broken-{number}.parquet": "it has no column 'distance'"} if number % 50 == 0 else {}
        story.online(scores, champion=wave(number) + 0.3, decision=decision, rejected=rejected)
    return story


def test_a_model_of_one_version_has_its_losses_its_score_and_what_it_is_made_of() -> None:
    story = Story()
    story.batch()
    words = told(story)
    assert "No shard has been trained on" in words
    assert "loss by epoch" in page(HistoryReader(story.log).read())
    assert "on 40 held-out rows" in words
    for part in (
        "distance, carrier (category)",
        "factory mlp",
        "400 rows",
        "tidemill 0.1.0",
        "torch 2.13.0",
        "ab" * 32,
    ):
        assert part in words


def test_the_baseline_stands_beside_the_score_where_the_manifest_has_one() -> None:
    story = Story()
    story.batch(baseline={"mae": 3.25, "rmse": 4.5})
    assert "baseline 3.25" in told(story)


def test_the_version_that_was_replaced_stands_beside_the_score_or_why_it_was_not_compared() -> None:
    story = Story()
    story.batch(replaced={"alias": "champion", "version": 1204, "score": {"mae": 3.25, "rmse": 4.5}})
    assert "version 1,204, which it replaced: 3.25" in told(story)
    story.batch(replaced={"alias": "champion", "version": 0, "reason": "it is for <another> target"})
    assert "not compared with version 0, which it replaced: it is for <another> target" in told(story)


def test_a_page_tells_the_errors_the_decisions_and_the_rejected_shards() -> None:
    story = Story()
    story.batch()
    story.online([10.0, 20.0], champion=20.0)
    story.online([30.0], champion=20.0, decision="refused", rejected={"torn.parquet": "its footer is cut off"})
    words = told(story)
    assert "its footer is cut off" in words
    assert "+0.0%" in words  # 60 rows of 3 shards against 60
    assert "version 1\n000000.parquet: 100 rows\nmae: online 10, champion 20\nchampion moved to 1" in words
    assert "mae: online 30, champion 20" in words
    assert "refused 2: mae 30 against 20 on 100 rows of the last shards" in words
    assert "champion moved to 1" in words
    assert words.count("its footer is cut off") == 1


def test_rollbacks_and_batch_trainings_in_between_are_named_in_the_chart() -> None:
    story = Story()
    story.batch()
    story.online([1.0])
    story.rollback(0)
    story.online([2.0])
    story.batch(losses=[9.0], epoch_holdout=[8.0], best_epoch=1)
    words = told(story)
    assert "back to 0" in words
    assert "rollback to 0" in words
    assert "version 4, of which epoch 1 was registered; orange: on the holdout" in words
    assert "none since the last batch training" in words


def test_a_history_of_batch_trainings_alone_has_no_empty_charts() -> None:
    story = Story()
    for _ in range(3):
        story.batch(losses=[])
    text = page(HistoryReader(story.log).read())
    read(text)
    assert "<svg" not in text


def test_a_classification_is_told_by_its_loss() -> None:
    story = Story(spec={**SPEC, "task": "binary", "loss": "bce"})
    story.batch()
    story.online([0.3, 0.2], metric="loss", champion=0.25)
    words = told(story)
    assert "loss; lower is better" in words
    assert "loss online" in words


def test_shards_without_a_score_leave_gaps() -> None:
    story = Story()
    story.batch()
    story.online([1.0, None, 2.0], champion=None, decision=None)
    story.online([None], champion=None, decision=None)
    assert "none that is finite" in told(story)


def test_what_is_rejected_after_the_last_shard_is_marked_too() -> None:
    story = Story()
    story.batch()
    story.online([1.0, 2.0])
    story.online([], rejected={"late.parquet": "torn"}, decision=None)
    chart = page(HistoryReader(story.log).read())
    assert 'class="rejected"' in chart
    assert "rejected 1: late.parquet" in "\n".join(read(chart).words)


def test_versions_that_only_reject_are_told_of() -> None:
    story = Story()
    story.batch()
    story.online([], rejected={f"{i}.parquet": f"reason {i}" for i in range(40)}, decision=None)
    words = told(story)
    assert "The last 30 of 40." in words
    assert "reason 39" in words
    assert "reason 9\n" not in words


def test_a_thousand_versions_are_a_small_page_that_says_what_a_point_is() -> None:
    story = long_story(LAST)
    text = page(HistoryReader(story.log).read())
    assert len(text.encode()) < 150_000
    words = "\n".join(read(text).words)
    assert "Each point is the mean of 17 shards in a row" in words
    assert "1,000 of 1,000 versions" in words
    assert "3,996" in words


def test_no_shard_is_lost_between_the_points() -> None:
    drawn = Charts(HistoryReader(long_story(120).log).read(), most=50)
    assert len(drawn.points) <= 50
    assert sum(len(point.shards) for point in drawn.points) == 119 * 4
    assert sum(point.rows for point in drawn.points) == 119 * 400
    versions = [version.number for point in drawn.points for version in point.versions]
    assert versions == list(range(120))
    first = drawn.points[0]
    scores = [shard.score["mae"] for _, shard in first.shards]
    assert first.online == pytest.approx(sum(scores) / len(scores))
    assert (first.low, first.high) == (min(scores), max(scores))


def test_a_history_that_was_cut_says_so() -> None:
    story = long_story(30)
    text = page(HistoryReader(story.log, last=10).read())
    words = "\n".join(read(text).words)
    assert "10 of 30 versions" in words
    assert "The batch training lies before these versions." in words


def test_the_frozen_model_is_drawn_and_the_difference_counts_rows_that_both_have() -> None:
    story = Story()
    story.batch()
    story.online([10.0, 30.0, 30.0], champion=None, decision=None)
    words = told(story, frozen=Frozen({1: 20.0, 2: 40.0}, ["The frozen model has no score on 1 of 3 shards: why not."]))
    assert "frozen 20" in words
    assert "as the batch training left it" in words
    assert "The frozen model has no score on 1 of 3 shards: why not." in words
    drawn = Charts(HistoryReader(story.log).read(), Frozen({1: 20.0, 2: 40.0}))
    gain = drawn.difference()
    assert gain is not None
    assert "frozen" in gain.label


HOSTILE = "</title></script><script>alert(1)</script>'\"&\n\u202e\x00.parquet"


def test_names_and_reasons_of_any_text_are_shown_and_do_nothing() -> None:
    spec = {
        **SPEC,
        "target": HOSTILE,
        "features": [{"name": HOSTILE, "kind": "category"}],
        HOSTILE: {HOSTILE: [HOSTILE]},
    }
    story = Story(spec=spec)
    story.batch()
    story.online([1.0], keys=[HOSTILE], rejected={HOSTILE: HOSTILE})
    story.online([1.0] * 3, keys=[f"{HOSTILE}{i}" * 40 for i in range(3)])
    words = told(story)
    assert "<script>alert(1)</script>" in words  # as text
    assert "\u202e" not in words
    assert "\x00" not in words


def test_a_page_may_ask_for_itself_again() -> None:
    story = Story()
    story.batch()
    found = HistoryReader(story.log).read()
    assert '<meta http-equiv="refresh" content="15">' in page(found, refresh_seconds=15)
    assert "refresh" not in page(found)


def test_a_notebook_shows_a_history_as_charts_whose_styles_stay_inside() -> None:
    found = history(long_story(20).log.store.url, "flights")
    shown = found._repr_html_()
    assert shown == charts(found)
    read(shown)
    assert "<svg" in shown
    sheet = re.search(r"<style>(.*?)</style>", shown, re.DOTALL)
    assert sheet is not None
    rules = re.findall(r"(?:^|[{}])\s*([^{}@]+?)\s*(?=\{)", sheet[1])
    assert len(rules) > 30
    assert [s for rule in rules for s in rule.split(",") if not s.startswith((".tidemill", ".tm "))] == []


def test_a_notebook_shows_the_end_of_a_run_as_its_numbers() -> None:
    shown = batch_end("m<", 7, True, {"epoch_loss": [2.0, 1.0], "holdout": {"mae": 1.25, "rmse": 1.5}})
    words = read(shown).words
    assert {"7", "version of m<", "1.25", "mae"} <= set(words)
    assert "<svg" in shown
    read(batch_end("m", 0, False, {}))
    words = read(online_end("m", 9, {"shards": 1200, "rejected": 0}, {"mae": 1.5}, {"mae": 1.75})).words
    assert {"9", "1,200", "1.5", "1.75"} <= set(words)

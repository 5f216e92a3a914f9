"""When a run trains on what waits, and what it may cost to find out. The detectors are River's own."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from tidemill.storage.errors import ShardRejected
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.triggers import Judged, Trigger
from tidemill.tasks.settings import Triggers
from tidemill.tasks.training.errors import ColumnError, SpecError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DETECTORS = ["adwin", "page_hinkley"]


def shard(i: int, size: int = 100, age: float = 10.0, etag: str = "e") -> ObjectInfo:
    return ObjectInfo(f"{i:05}.parquet", size, etag, NOW - timedelta(seconds=age))


def shards(count: int) -> list[ObjectInfo]:
    return [shard(i) for i in range(count)]


class Answers:
    """Tells rows and losses by key, and notes what it was asked. A missing answer is None; an error is raised."""

    def __init__(self, rows: object = None, losses: object = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self._rows, self._losses = rows, losses

    def rows(self, info: ObjectInfo) -> int | None:
        return self._answer("rows", self._rows, info)

    def loss(self, info: ObjectInfo) -> Judged | None:
        found = self._answer("loss", self._losses, info)
        return Judged(10, found) if isinstance(found, float) else found

    def _answer(self, what: str, answers: object, info: ObjectInfo):
        self.asked.append((what, info.key))
        found = answers.get(info.key) if isinstance(answers, dict) else answers
        if isinstance(found, Exception):
            raise found
        return found

    def count(self, what: str) -> int:
        return sum(w == what for w, _ in self.asked)


def fired(trigger: Trigger, waiting: Sequence[ObjectInfo], answers: Answers | None = None) -> list[str]:
    answers = answers or Answers()
    return list(trigger.fired(waiting, answers.rows, answers.loss, NOW))


def decide(
    settings: dict[str, object],
    waiting: Sequence[ObjectInfo],
    answers: Answers | None = None,
    past: Sequence[Judged] = (),
) -> list[str]:
    return fired(Trigger(Triggers.model_validate(settings), past), waiting, answers)


def noisy(count: int, seed: int, level: float = 1.0) -> list[float]:
    source = random.Random(seed)
    return [level + 0.1 * source.gauss(0.0, 1.0) for _ in range(count)]


def seen(losses: Sequence[float]) -> list[Judged]:
    return [Judged(10, loss) for loss in losses]


def shifted(name: str, past: Sequence[Judged], losses: Sequence[float]) -> int | None:
    """After how many of the waiting shards the detector fires, looking at each one as it comes."""
    trigger = Trigger(Triggers.model_validate({"drift": name}), past)
    answers = Answers(losses={shard(i).key: loss for i, loss in enumerate(losses)})
    return next((n for n in range(1, len(losses) + 1) if fired(trigger, shards(n), answers)), None)


# ---- each alone ------------------------------------------------------------------------------------------------------
def test_with_no_trigger_set_whatever_waits_is_trained_at_once_and_nothing_is_asked() -> None:
    answers = Answers()
    assert decide({}, shards(1), answers) == ["at_once"]
    assert (answers.asked, decide({}, [])) == ([], [])


@pytest.mark.parametrize(
    "settings", [{"min_rows": 1}, {"min_bytes": 1}, {"max_wait_seconds": 1}, {"drift": "adwin"}, {"score_drop": 0.0}]
)
def test_an_empty_inbox_fires_nothing(settings: dict[str, object]) -> None:
    assert decide(settings, [], past=seen([1.0] * 20)) == []


@pytest.mark.parametrize(("rows", "expected"), [(33, []), (34, ["min_rows"])])
def test_min_rows(rows: int, expected: list[str]) -> None:
    assert decide({"min_rows": 100}, shards(3), Answers(rows=rows)) == expected


@pytest.mark.parametrize(("size", "expected"), [(99, []), (100, ["min_bytes"])])
def test_min_bytes(size: int, expected: list[str]) -> None:
    assert decide({"min_bytes": 300}, [shard(i, size) for i in range(3)]) == expected


@pytest.mark.parametrize(("age", "expected"), [(59.0, []), (60.0, ["max_wait_seconds"]), (-3600.0, [])])
def test_max_wait_is_that_of_the_oldest_and_a_clock_that_is_ahead_is_no_age(age: float, expected: list[str]) -> None:
    assert decide({"max_wait_seconds": 60}, [shard(0, age=age), shard(1, age=age - 1.0)]) == expected


@pytest.mark.parametrize(("loss", "expected"), [(1.09, []), (1.11, ["score_drop"])])
def test_score_drop(loss: float, expected: list[str]) -> None:
    assert decide({"score_drop": 0.1}, shards(2), Answers(losses=loss), seen([0.5, 1.5])) == expected


def test_score_drop_weighs_losses_by_rows_on_both_sides() -> None:
    past = [Judged(30, 1.0), Judged(10, 5.0)]  # mean 2
    waiting = {shard(0).key: Judged(90, 1.0), shard(1).key: Judged(10, 12.0)}  # mean 2.1, of shards 6.5
    assert decide({"score_drop": 0.1}, shards(2), Answers(losses=waiting), past) == []
    assert decide({"score_drop": 0.04}, shards(2), Answers(losses=waiting), past) == ["score_drop"]


def test_score_drop_compares_with_the_window_only_and_knows_negative_losses() -> None:
    past = seen([9.0] * 50 + [-1.0] * 10)
    settings = {"score_drop": 0.2, "recent_shards": 10}
    assert decide(settings, shards(1), Answers(losses=-0.9), past) == []
    assert decide(settings, shards(1), Answers(losses=-0.7), past) == ["score_drop"]


def test_score_drop_without_a_history_begins_one() -> None:
    unlabelled = Judged(0, float("nan"))
    assert decide({"score_drop": 0.1}, shards(1), Answers(losses=1.0), [unlabelled]) == ["no_history"]
    assert decide({"score_drop": 0.1}, shards(1), Answers(losses=unlabelled)) == []


# ---- drift -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_rise_by_three_deviations_is_found_within_ten_shards_in_any_unit(name: str, scale: float) -> None:
    for seed in range(10):
        past = seen([scale * loss for loss in noisy(64, seed)])
        found = shifted(name, past, [scale * loss for loss in noisy(10, 100 + seed, level=1.3)])
        assert found is not None
        assert found > 1, "one shard is no drift"


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("seed", range(2))
def test_five_hundred_stationary_shards_raise_no_alarm(name: str, seed: int) -> None:
    """Consumed by eights, as another trigger would."""
    losses = noisy(64 + 500, seed)
    alarms = [shifted(name, seen(losses[:i]), losses[i : i + 8]) for i in range(64, len(losses), 8)]
    assert alarms == [None] * 63


@pytest.mark.parametrize("name", DETECTORS)
def test_five_hundred_stationary_shards_that_all_wait_raise_no_alarm(name: str) -> None:
    answers = Answers(losses={shard(i).key: loss for i, loss in enumerate(noisy(500, 7))})
    assert decide({"drift": name}, shards(500), answers) == []


@pytest.mark.parametrize("name", DETECTORS)
def test_a_fall_of_the_loss_is_no_drift(name: str) -> None:
    assert shifted(name, seen(noisy(64, 1)), noisy(30, 2, level=0.5)) is None


@pytest.mark.parametrize("name", DETECTORS)
def test_what_drifted_before_is_over_once_it_was_trained_on(name: str) -> None:
    history = noisy(22, 1) + noisy(12, 2, level=50.0) + noisy(30, 3)
    assert shifted(name, seen(history), noisy(20, 4)) is None
    assert shifted(name, seen(history), noisy(20, 5, level=1.4)) is not None, "the jump is not taken for noise"


@pytest.mark.parametrize("name", DETECTORS)
def test_one_broken_shard_among_good_ones_is_no_drift(name: str) -> None:
    assert shifted(name, seen(noisy(64, 1)), [*noisy(5, 2), 1e9, *noisy(5, 3)]) is None


@pytest.mark.parametrize("name", DETECTORS)
def test_equal_losses_are_no_drift_but_a_change_of_them_is(name: str) -> None:
    assert shifted(name, seen([0.7] * 64), [0.7, 0.7 + 1e-9] * 10) is None
    assert shifted(name, seen([0.7] * 64), [0.8] * 10) is not None
    assert shifted(name, [], [0.7]) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_worse_than_any(loss: float) -> None:
    settings = {"drift": "adwin", "score_drop": 5.0}
    assert decide(settings, shards(3), Answers(losses=loss), seen([1.0])) == ["drift", "score_drop"]


# ---- any of them, the cheap ones first -------------------------------------------------------------------------------
def test_those_of_equal_cost_are_all_named() -> None:
    settings = {"min_bytes": 1, "max_wait_seconds": 1, "min_rows": 1}
    assert decide(settings, shards(2)) == ["min_bytes", "max_wait_seconds"]


EVERY = {"min_bytes": 1_000, "max_wait_seconds": 1e6, "min_rows": 1_000, "drift": "adwin", "score_drop": 0.1}


def test_a_costly_question_is_not_asked_if_a_cheaper_trigger_fires() -> None:
    answers = Answers(rows=400, losses=1.0)
    assert decide(EVERY, shards(10), answers) == ["min_bytes"]
    assert answers.asked == []
    assert decide(EVERY, shards(9), answers) == ["min_rows"]
    assert (answers.count("rows"), answers.count("loss")) == (3, 0), "the others could not change the answer"


def test_what_no_trigger_needs_is_never_asked() -> None:
    answers = Answers(rows=1, losses=1.0)
    assert decide({"min_rows": 100}, shards(3), answers) == []
    assert answers.count("loss") == 0
    assert decide({"score_drop": 1.0}, shards(3), answers, seen([1.0])) == []
    assert answers.count("rows") == 3, "of the first decision alone"


def test_each_shard_is_asked_for_once_and_new_bytes_under_its_key_anew() -> None:
    trigger = Trigger(Triggers.model_validate(EVERY), seen(noisy(64, 1)))
    answers = Answers(rows=1, losses=1.0)
    for count in (3, 3, 5, 5):
        assert fired(trigger, shards(count), answers) == []
    assert (answers.count("rows"), answers.count("loss")) == (5, 5)
    fired(trigger, [*shards(4), shard(4, etag="other")], answers)
    assert (answers.count("rows"), answers.count("loss")) == (6, 6)


def test_what_no_longer_waits_is_forgotten() -> None:
    trigger = Trigger(Triggers(min_rows=1_000), [])
    answers = Answers(rows=1)
    fired(trigger, shards(5), answers)
    fired(trigger, shards(2), answers)
    fired(trigger, shards(5), answers)
    assert answers.count("rows") == 5 + 3


def test_a_new_process_decides_as_the_old_one_would() -> None:
    """Looking at every shard as it comes, or once at the end, or half way with a new process."""
    losses = {shard(i).key: loss for i, loss in enumerate(noisy(20, 5) + noisy(20, 6, level=1.25))}
    past = seen(noisy(200, 4))
    for name in DETECTORS:
        settings = {"drift": name, "score_drop": 0.15, "min_rows": 10_000}
        old = Trigger(Triggers.model_validate(settings), past)
        answers = Answers(rows=1, losses=losses)
        decisions = [fired(old, shards(n), answers) for n in range(1, 41)]
        assert decisions == [decide(settings, shards(n), answers, past[-64:]) for n in range(1, 41)]
        assert [] in decisions
        assert ["drift"] in decisions


# ---- shards that cannot be read --------------------------------------------------------------------------------------
def test_a_shard_that_is_not_whole_yet_does_not_count_and_is_asked_for_again() -> None:
    trigger = Trigger(Triggers(min_rows=20, score_drop=0.5), seen([1.0]))
    rows: dict[str, int] = {shard(0).key: 10}
    losses: dict[str, float] = {shard(0).key: 1.0}
    answers = Answers(rows, losses)
    assert fired(trigger, shards(2), answers) == []
    rows[shard(1).key] = 10
    assert fired(trigger, shards(2), answers) == ["min_rows"]
    assert answers.count("rows") == 3


@pytest.mark.parametrize("settings", [{"min_rows": 10_000}, {"drift": "adwin"}, {"score_drop": 9.0}])
@pytest.mark.parametrize("error", [ShardRejected("its footer is corrupt"), ColumnError("no column 'a'")])
def test_a_shard_that_can_never_be_used_fires_so_that_a_step_rejects_it(
    settings: dict[str, object], error: Exception
) -> None:
    answers = Answers({shard(0).key: 10, shard(1).key: error}, {shard(0).key: 1.0, shard(1).key: error})
    assert decide(settings, shards(3), answers, seen([1.0])) == ["unreadable"]


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.fixture
def _no_river(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("river", "river.drift"):
        monkeypatch.setitem(sys.modules, name, None)
    return


@pytest.mark.usefixtures("_no_river")
def test_without_river_drift_is_refused_at_once_and_the_others_work() -> None:
    with pytest.raises(SpecError, match=r"drift='adwin' needs River .* install 'tidemill\[drift\]'"):
        Trigger(Triggers(drift="adwin"), [])
    assert decide({"min_bytes": 1, "score_drop": 0.1}, shards(1)) == ["min_bytes"]


@pytest.mark.parametrize(
    "wrong", [{"min_rows": 0}, {"drift": "ddm"}, {"score_drop": -0.1}, {"max_wait_seconds": 0}, {"rows": 1}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Triggers.model_validate(wrong)


def test_settings_say_whether_any_is_given_and_whether_history_is_needed() -> None:
    kinds: list[Callable[[Triggers], bool]] = [lambda t: t.given, lambda t: t.by_score]
    asked = [{}, {"recent_shards": 20}, {"min_rows": 1}, {"min_bytes": 1}, {"max_wait_seconds": 1}, {"drift": "adwin"}]
    told = [tuple(kind(Triggers.model_validate(settings)) for kind in kinds) for settings in asked]
    assert told == [(False, False)] * 2 + [(True, False)] * 3 + [(True, True)]
    assert Triggers(score_drop=0.0).by_score


def test_the_command_line_can_import_the_settings_without_anything_heavy() -> None:
    heavy = "{'torch', 'river', 'pyarrow', 'numpy', 'prefect'}"
    code = f"import sys, tidemill.tasks.online.triggers; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

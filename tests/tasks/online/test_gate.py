"""The champion: its scores beside the learner's, the decision on each version, and what many refusals lead to."""

import datetime
import uuid
from collections.abc import Callable, Mapping

import pyarrow as pa
import pytest

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, FaultStore
from tidemill.storage.aliases import Alias, all_aliases, find_alias, promote
from tidemill.storage.errors import Unavailable
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Compared, Consumed, Entry, Gate
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.errors import GateClosed
from tidemill.tasks.online.gate import decide
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.step import OnlineRun, Outcome, retraining, step
from tidemill.tasks.settings import GateSettings, OnlineSettings
from tidemill.tasks.training.loop import Score, score
from tidemill.tasks.versions import load_learner

GOOD = {f"{i:02}.parquet": rows(60, 100 + i) for i in range(4)}
POISON = {f"{i:02}.parquet": rows(60, 100 + i, slope=-2.0) for i in range(4, 8)}
RECOVERY = {f"{i:02}.parquet": rows(60, 100 + i) for i in range(8, 10)}


class World:
    """A registry with version 0, an inbox, a holdout and an archive, all in memory."""

    def __init__(self) -> None:
        self.root = f"memory://{uuid.uuid4().hex}"
        put(self.url("dataset"), {"part-0.parquet": rows(200, 0)})
        put(self.url("holdout"), {"part-0.parquet": rows(100, 1)})
        self.train("dataset")

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    @property
    def log(self) -> VersionLog:
        return open_log(self.url("registry"), "model")

    def train(self, dataset: str) -> None:
        batch.train(self.url(dataset), self.url("registry"), "model", SPEC)

    def run(
        self,
        stores: Callable[[str], Store] = open_store,
        gate: Mapping[str, object] | None = None,
        **settings: object,
    ) -> OnlineRun:
        defaults = {"grace_seconds": 0, "limits": {"max_shards": 1}, "gate": {"recent_shards": 3, **(gate or {})}}
        return OnlineRun(
            self.url("inbox"),
            self.url("registry"),
            "model",
            OnlineSettings.model_validate(defaults | settings),
            stores,
        )

    def drain(self, shards: dict[str, pa.Table], **settings: object) -> OnlineReport:
        put(self.url("inbox"), shards)
        run = self.run(**settings)
        while step(run).outcome is Outcome.COMMITTED:
            pass
        return run.report

    def gate(self, number: int) -> Gate:
        gate = self.log.version(number).manifest.gate
        assert gate is not None
        return gate

    @property
    def champion(self) -> int:
        return all_aliases(self.log)["champion"]

    def error(self, number: int) -> float:
        """Of a version, on the holdout."""
        learner = load_learner(self.log, self.log.version(number))
        return score(learner, batch.take_snapshot(self.url("holdout")).row_groups).metrics["rmse"]


@pytest.fixture
def world() -> World:
    return World()


# ---- the decision ----------------------------------------------------------------------------------------------------
def shard(learner: float, champion: float, rows: int = 10) -> Consumed:
    now = datetime.datetime.now(datetime.UTC)
    return Consumed(
        inbox="i", key="k", sha256="s", etag="e", size=1, last_modified=now, ordinal=0, rows=rows, unlabelled=0,
        score={"rmse": learner}, champion={"rmse": champion},
    )  # fmt: skip


def scored(value: float) -> Score:
    return Score(7, value**2, {"rmse": value})


def decided(window: list[Consumed], holdout: tuple[Score, Score] | None = None, before: Gate | None = None) -> Gate:
    settings = GateSettings(tolerance=0.1, refusals=3, after_refusals="stop")
    gate = decide(settings, Alias(4, 2), "rmse", window, holdout, before)
    assert gate is not None
    return gate


@pytest.mark.parametrize(
    ("learner", "champion", "decision"),
    [(1.0, 1.0, "promoted"), (1.1, 1.0, "promoted"), (1.11, 1.0, "refused"), (0.1, 1.0, "promoted")],
)
def test_a_version_may_be_worse_by_the_tolerance_only(learner: float, champion: float, decision: str) -> None:
    assert decided([shard(learner, champion)]).decision == decision
    gate = decided([shard(1.0, 1.0)], (scored(learner), scored(champion)))
    assert gate.decision == decision
    assert gate.holdout == Compared(rows=7, learner=learner, champion=champion)


def test_the_window_is_weighted_by_rows() -> None:
    gate = decided([shard(1.0, 2.0, rows=30), shard(5.0, 2.0, rows=10)])
    assert gate.recent == Compared(rows=40, learner=2.0, champion=2.0)


def test_shards_that_one_of_the_two_could_not_score_do_not_count() -> None:
    unscored = shard(9.0, 1.0).model_copy(update={"champion": {}})
    assert decided([unscored, shard(1.0, 1.0)]).recent.rows == 10
    assert decide(GateSettings(), Alias(0, 0), "rmse", [unscored], None, None) is None


def test_a_score_that_is_not_finite_is_refused() -> None:
    assert decided([shard(1.0, 1.0)], (scored(float("nan")), scored(1.0))).decision == "refused"
    broken = shard(1.0, 1.0).model_copy(update={"score": {}})  # what is left of a score that is not finite
    gate = decided([shard(1.0, 2.0), broken])
    assert (gate.decision, gate.recent.rows) == ("refused", 20)


def test_refusals_are_counted_in_a_row() -> None:
    gates: list[Gate] = []
    for value in (2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0):
        gates.append(decided([shard(value, 1.0)], before=gates[-1] if gates else None))
    assert [gate.refusals for gate in gates] == [1, 2, 0, 1, 2, 3, 4]


def test_refusals_are_counted_anew_once_somebody_has_moved_the_alias() -> None:
    before = decided([shard(2.0, 1.0)]).model_copy(update={"moves": 1})
    assert decided([shard(2.0, 1.0)], before=before).refusals == 1


@pytest.mark.parametrize(
    ("settings", "metric"),
    [({}, "rmse"), ({"loss": "l1"}, "mae"), ({"task": "binary"}, "loss")],
)
def test_the_metric_is_in_the_targets_unit_where_it_has_one(settings: dict[str, str], metric: str) -> None:
    assert SPEC.model_validate(SPEC.model_dump() | {"loss": None} | settings).main_metric == metric


# ---- in a run --------------------------------------------------------------------------------------------------------
def test_the_champion_scores_the_same_shards_and_moves_to_versions_that_are_not_worse(world: World) -> None:
    report = world.drain(GOOD)
    assert (world.champion, world.log.head().number, report.promoted, report.refused) == (4, 4, 4, 0)
    frozen = load_learner(world.log, world.log.version(1))  # champion when 2 was trained
    manifest = world.log.version(2).manifest
    put(world.url("again"), {"01.parquet": GOOD["01.parquet"]})
    expected = score(frozen, batch.take_snapshot(world.url("again")).row_groups)
    assert manifest.consumed[0].champion == {"loss": expected.loss, **expected.metrics}
    assert manifest.gate == Gate(
        champion=1,
        moves=1,
        metric="rmse",
        decision="promoted",
        tolerance=0.05,
        recent=manifest.gate.recent if manifest.gate else None,
        refusals=0,
    )


def test_a_frozen_champion_is_scored_and_stays(world: World) -> None:
    report = world.drain(GOOD, gate={"champion": "score"})
    assert world.champion == 0
    assert set(report.champion) == {"loss", "mae", "rmse"}
    frozen = load_learner(world.log, world.log.version(0))
    put(world.url("again"), GOOD)
    expected = score(frozen, batch.take_snapshot(world.url("again")).row_groups)
    assert report.champion["mae"] == pytest.approx(expected.metrics["mae"])
    assert world.log.head().manifest.gate is None


def test_nothing_is_compared_when_the_champion_is_to_be_ignored_or_missing(world: World) -> None:
    for gate in ({"champion": "ignore"}, {"alias": "nobody"}):
        report = world.drain(GOOD, gate=gate)
        assert (report.champion, report.promoted, world.champion) == ({}, 0, 0)


def test_poison_does_not_reach_the_champion(world: World) -> None:
    """Labels flip for four shards. With the gate the champion's error on the holdout stays; the learner's explodes."""
    world.drain(GOOD | POISON, gate={"holdout_dataset": world.url("holdout")})
    decisions = [world.gate(number).decision for number in range(1, 9)]
    assert decisions == ["promoted"] * 4 + ["refused"] * 4
    assert world.champion == 4
    assert world.error(4) <= 1.05 * min(world.error(number) for number in range(5))
    assert world.error(8) > 10 * world.error(4)
    holdout = world.log.version(8).manifest.metrics["holdout"]
    assert (holdout["rows"], holdout["rmse"]) == (100, pytest.approx(world.error(8)))


def refused(world: World, best: float) -> Entry:
    """A version that was refused, when the best champion so far had this error on the holdout."""
    alias = find_alias(world.log, "champion")
    assert alias is not None
    gate = Gate(
        champion=alias.version,
        moves=alias.moves,
        metric="rmse",
        decision="refused",
        tolerance=0.05,
        recent=Compared(rows=1, learner=9.0, champion=best),
        holdout=Compared(rows=100, learner=9.0, champion=best),
        refusals=1,
    )
    head = world.log.head().manifest
    return Entry(kind="online", spec=head.spec, blobs=head.blobs, gate=gate)


def on_holdout(world: World) -> float:
    """What a run that begins now would compare with."""
    run = world.run(gate={"holdout_dataset": world.url("holdout")})
    found = run.champion.holdout(run.head().learner)
    assert found is not None
    assert found[1] is not None
    return found[1].metrics["rmse"]


def test_champions_may_not_get_worse_step_by_step(world: World) -> None:
    """What an earlier champion had reached is the measure, through rollbacks too, until somebody else moves the alias."""
    own = world.error(0)
    assert on_holdout(world) == pytest.approx(own)
    world.log.commit(world.log.head(), refused(world, best=own / 2))
    assert on_holdout(world) == pytest.approx(own / 2)
    world.log.rollback(world.log.version(0))
    assert on_holdout(world) == pytest.approx(own / 2)
    promote(world.log, "champion", world.log.version(1))
    promote(world.log, "champion", world.log.version(0))
    assert on_holdout(world) == pytest.approx(own)


def test_what_was_reached_on_another_holdout_is_no_measure(world: World) -> None:
    world.log.commit(world.log.head(), refused(world, best=1e-9))
    put(world.url("holdout"), {"part-1.parquet": rows(10, 2)})
    assert on_holdout(world) == pytest.approx(world.error(0))


def test_a_run_that_goes_on_notices_that_somebody_has_moved_the_alias(world: World) -> None:
    put(world.url("inbox"), POISON)
    run = world.run(gate={"holdout_dataset": world.url("holdout")})
    step(run)
    promote(world.log, "champion", world.log.head())
    step(run)  # had begun before it could know
    step(run)
    assert [world.gate(number).champion for number in (1, 2, 3)] == [0, 0, 1]


def test_many_refusals_stop_the_run_until_a_person_decides(world: World) -> None:
    gate = {"holdout_dataset": world.url("holdout"), "refusals": 2, "after_refusals": "stop"}
    with pytest.raises(GateClosed, match=r"2 versions in a row, up to 6, were worse than champion 4 .*rmse .* holdout"):
        world.drain(GOOD | POISON, gate=gate)
    assert keys(world.url("inbox")) == ["06.parquet", "07.parquet"], "nothing more was trained on"
    with pytest.raises(GateClosed):
        step(world.run(gate=gate))
    promote(world.log, "champion", world.log.head())
    assert step(world.run(gate=gate)).version == 7


def test_many_refusals_may_roll_back_to_the_champion(world: World) -> None:
    gate = {"holdout_dataset": world.url("holdout"), "refusals": 2, "after_refusals": "rollback"}
    world.drain(GOOD | POISON | RECOVERY, gate=gate)
    history = [version.manifest for version in world.log.history(world.log.head())][::-1]
    # 5, 6 refused; 7 goes back; 8, 9 refused; 10 goes back; then two good shards
    assert [m.rolled_back_to for m in history] == [None] * 7 + [4, None, None, 4, None, None]
    assert world.champion == world.log.head().number == 12
    assert world.error(12) < 2 * world.error(4)
    assert sum(len(manifest.consumed) for manifest in history) == 10


def test_a_run_that_was_frozen_before_a_rollback_gives_up_nothing(world: World) -> None:
    """Woken, it must not roll back what others have committed since: their shards are gone."""
    gate = {"holdout_dataset": world.url("holdout"), "refusals": 2, "after_refusals": "rollback"}
    put(world.url("inbox"), GOOD | POISON)
    run, frozen = world.run(gate=gate), world.run(gate=gate)
    while world.log.head().number < 6:
        step(run)
    frozen.head()
    assert step(run).version == 7
    assert step(frozen).outcome is Outcome.LOST
    assert world.log.head().number == 7
    put(world.url("inbox"), RECOVERY)
    while step(run).outcome is Outcome.COMMITTED:
        pass
    assert step(frozen).outcome is Outcome.IDLE  # the alias has moved as well
    assert world.log.head().number == world.champion == 12


@pytest.mark.parametrize("then", ["stop", "rollback"])
def test_whoever_moves_the_alias_has_decided(then: str, world: World) -> None:
    """Even to a version that is not the head."""
    gate = {"holdout_dataset": world.url("holdout"), "refusals": 2, "after_refusals": then}
    put(world.url("inbox"), GOOD | POISON)
    run = world.run(gate=gate)
    while world.log.head().number < 6:
        step(run)
    promote(world.log, "champion", world.log.version(3))
    assert [step(run).version, step(run).version] == [7, 8]
    assert [world.log.version(number).manifest.kind for number in (7, 8)] == ["online", "online"]
    assert (world.gate(8).champion, world.gate(8).refusals) == (3, 1)  # the seventh had begun before it could know


def test_many_refusals_may_ask_for_a_batch_training(world: World) -> None:
    gate = {
        "holdout_dataset": world.url("holdout"),
        "refusals": 2,
        "after_refusals": {"retrain_on": world.url("dataset")},
    }
    put(world.url("inbox"), GOOD | POISON)
    run = world.run(gate=gate, after_commit={"archive_to": world.url("dataset/archive")})
    outcomes = [step(run).outcome for _ in range(7)]
    assert outcomes == [Outcome.COMMITTED] * 6 + [Outcome.RETRAIN]
    world.train("dataset")
    assert world.log.head().manifest.dataset is not None
    assert world.log.head().manifest.dataset.files == 1 + 6, "the dataset, and what was archived"
    run.forget()
    outcomes = [step(run).outcome for _ in range(3)]
    assert outcomes == [Outcome.COMMITTED, Outcome.COMMITTED, Outcome.RETRAIN], "the rest is poison too"
    assert run.report.head == 9


def test_a_model_is_trained_anew_on_the_rows_that_are_asked_for(world: World) -> None:
    gate = {"after_refusals": {"retrain_on": world.url("dataset"), "where": "a > 0", "last": "90d", "time_column": "t"}}
    dataset, _, _, _, settings = retraining(world.run(gate=gate))
    assert dataset == world.url("dataset")
    assert (settings.where, settings.last, settings.time_column) == ("a > 0", "90d", "t")


# ---- crashes and restarts --------------------------------------------------------------------------------------------
def test_an_alias_that_a_killed_run_left_behind_is_moved_by_the_next(world: World) -> None:
    put(world.url("inbox"), GOOD)

    def dies(call: Call) -> None:
        if call.verb in ("replace", "create") and "aliases" in call.key and call.phase == "before":
            raise Unavailable("killed")

    with pytest.raises(Unavailable):
        step(world.run(lambda url: FaultStore(open_store(url), dies)))
    assert (world.log.head().number, world.champion) == (1, 0)
    world.run().head()
    assert world.champion == 1


def test_an_alias_that_a_person_moved_back_stays(world: World) -> None:
    world.drain(GOOD)
    assert world.champion == 4
    promote(world.log, "champion", world.log.version(3))
    world.run().head()  # the head says: from 3, after three moves, to 4
    assert world.gate(4).champion == 3
    assert world.champion == 3


@pytest.mark.slow
def test_runs_of_one_step_each_decide_as_one_run_does() -> None:
    straight, restarted = World(), World()
    for world in (straight, restarted):
        put(world.url("inbox"), GOOD | POISON)
    run = straight.run(gate={"holdout_dataset": straight.url("holdout")})
    for _ in range(8):
        step(run)
        step(restarted.run(gate={"holdout_dataset": restarted.url("holdout")}))
    for number in range(1, 9):
        ours, theirs = (world.log.version(number).manifest for world in (straight, restarted))
        assert ours.gate == theirs.gate
        assert ours.metrics == theirs.metrics


def test_windowed_and_cumulative_scores_are_those_of_the_shards(world: World) -> None:
    report = world.drain(GOOD, limits={"max_shards": 3})
    consumed = [shard for number in (1, 2) for shard in world.log.version(number).manifest.consumed]
    metrics = world.log.head().manifest.metrics
    for name, shards in (("recent", consumed[-3:]), ("cumulative", consumed)):
        assert metrics[name]["shards"] == len(shards)
        for who, scores in (("score", [s.score for s in shards]), ("champion", [s.champion for s in shards])):
            mean = sum(s["mae"] * 60 for s in scores) / (60 * len(scores))
            assert metrics[name][who]["mean"]["mae"] == pytest.approx(mean)
    assert report.recent == metrics["recent"]["score"]["mean"]
    assert report.recent_champion == metrics["recent"]["champion"]["mean"]


# ---- columns over time -----------------------------------------------------------------------------------------------
def test_new_columns_are_recorded_rejected_or_ignored(world: World) -> None:
    more = rows(40, 5).append_column("c", [[1] * 40])
    world.drain({"10.parquet": more}, new_columns="ignore")
    assert world.log.head().manifest.new_columns == {}
    world.drain({"11.parquet": more} | GOOD, new_columns="add")
    assert world.log.head().manifest.new_columns == {"c": "int64"}
    report = world.drain({"12.parquet": more}, new_columns="fail")
    assert "12.parquet has columns that the dataset of the batch training had not: c" in str(report.last_rejected)


# ---- triggers --------------------------------------------------------------------------------------------------------
def test_shards_wait_until_there_are_enough_rows(world: World) -> None:
    settings = {"train_when": {"min_rows": 150}, "limits": {"max_shards": 10}}
    report = world.drain({"00.parquet": GOOD["00.parquet"], "01.parquet": GOOD["01.parquet"]}, **settings)
    assert (report.versions, report.waiting) == (0, 2)
    report = world.drain({"02.parquet": GOOD["02.parquet"]}, **settings)
    assert (report.versions, report.shards) == (1, 3)
    assert world.log.head().manifest.fired == ("min_rows",)


def test_all_that_was_listed_is_trained_on_once_a_trigger_fired(world: World) -> None:
    report = world.drain(GOOD, train_when={"min_rows": 200}, limits={"max_shards": 1})
    assert (report.versions, report.shards) == (4, 4)
    assert {version.manifest.fired for version in world.log.history(world.log.head(), 4)} == {("min_rows",)}


def test_a_worse_score_is_a_reason_to_train(world: World) -> None:
    world.drain(GOOD)
    settings = {"train_when": {"score_drop": 1.0}}
    assert world.drain(RECOVERY, **settings).versions == 0, "the model does as well as before"
    report = world.drain(POISON, **settings)
    assert report.shards == len(POISON) + len(RECOVERY)
    assert world.log.head().manifest.fired == ("score_drop",)


def test_what_the_gate_compares_is_what_may_drop(world: World) -> None:
    """The root of the mean squared error, in the target's unit: the loss, its square, would have risen by more."""
    world.drain(GOOD)
    put(world.url("inbox"), POISON)
    run = world.run()
    learner, found = load_learner(world.log, world.log.head()), []
    for key in POISON:
        shard = run.places.inbox.read(run.places.inbox.store.stat(key))
        assert shard is not None
        found.append((shard.info.key, score(learner, shard.row_groups())))
    past = [s for version in world.log.history(world.log.head(), 64) for s in version.manifest.consumed]
    usual = {name: sum(s.score[name] * s.rows for s in past) / sum(s.rows for s in past) for name in ("rmse", "loss")}
    rows = sum(s.rows for _, s in found)
    rise = sum(s.metrics["rmse"] * s.rows for _, s in found) / rows / usual["rmse"] - 1
    by_loss = sum(s.loss * s.rows for _, s in found) / rows / usual["loss"] - 1
    assert by_loss > 1.5 * rise
    assert world.drain({}, train_when={"score_drop": 1.2 * rise}).versions == 0
    assert world.drain({}, train_when={"score_drop": 0.9 * rise}).versions > 0


def test_drift_is_a_reason_to_train_in_a_process_of_its_own_each_time(world: World) -> None:
    usual = {f"{i:03}.parquet": rows(20, 500 + i) for i in range(30)}
    world.drain(usual, limits={"max_shards": 64})
    settings = {"train_when": {"drift": "page_hinkley"}}
    assert world.drain({f"1{i:02}.parquet": rows(20, 600 + i) for i in range(5)}, **settings).versions == 0
    shifted = {f"2{i:02}.parquet": rows(20, 700 + i, slope=6.0) for i in range(20)}
    for key, table in shifted.items():
        if world.drain({key: table}, **settings).versions:
            break
    assert world.log.head().manifest.fired == ("drift",)


def test_what_can_never_be_read_does_not_wait(world: World) -> None:
    put(world.url("inbox"), {"00.parquet": b"PAR1 this is no Parquet file PAR1"})
    report = world.drain({}, train_when={"min_rows": 1000})
    assert report.rejected == 1
    assert world.log.head().manifest.fired == ("unreadable",)

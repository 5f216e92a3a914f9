"""Labels that arrive later: both shards in one version, whoever kills the run, scored by the version that had served."""

import contextlib
import datetime
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, Phase, fail_at, hooked
from tests.storage.shards import requeue
from tidemill.storage.audit import audit
from tidemill.storage.chain import Version
from tidemill.storage.disposal import quarantined
from tidemill.storage.errors import PlacesOverlap, Unavailable
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Compared, Entry, Gate
from tidemill.storage.store import Store
from tidemill.storage.tombstones import Seen
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import delayed
from tidemill.tasks.online.gate import served_at
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.step import OnlineRun, Outcome, step
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.loop import score
from tidemill.tasks.versions import load_learner


def features(count: int, seed: int) -> pa.Table:
    table = rows(count, seed)
    return table.drop_columns("y").append_column("id", [list(range(count))])


def labels(count: int, seed: int) -> pa.Table:
    """In another order than the features, and without the last one."""
    table = rows(count, seed).select(["y"]).append_column("id", [list(range(count))])
    return table.take(list(range(count - 1))[::-1])


class World:
    """A registry with version 0, and two inboxes, in memory or below another root."""

    def __init__(self, root: str | None = None) -> None:
        self.root = root or f"memory://{uuid.uuid4().hex}"
        put(self.url("dataset"), {"part-0.parquet": rows(200, 0)})
        for name in ("inbox", "labels"):
            put(self.url(name), {})
        batch.train(self.url("dataset"), self.url("registry"), "model", SPEC)

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    @property
    def log(self) -> VersionLog:
        return open_log(self.url("registry"), "model")

    def run(self, stores: Callable[[str], Store] = open_store, **settings: object) -> OnlineRun:
        defaults = {
            "labels": {"inbox": self.url("labels"), "key": "id"},
            "grace_seconds": 0,
            "limits": {"max_shards": 2},
        }
        settings = {**defaults, **settings}
        return OnlineRun(
            self.url("inbox"), self.url("registry"), "model", OnlineSettings.model_validate(settings), stores
        )

    def drain(self, **settings: object) -> OnlineReport:
        run = self.run(**settings)
        while step(run).outcome is not Outcome.IDLE:
            pass
        return run.report

    @property
    def left(self) -> tuple[list[str], list[str]]:
        return keys(self.url("inbox")), keys(self.url("labels"))


@pytest.fixture
def world() -> World:
    return World()


def test_features_wait_for_their_labels_and_both_are_consumed_together(world: World) -> None:
    put(world.url("inbox"), {f"{i}.parquet": features(50, i) for i in range(3)})
    assert world.drain().versions == 0
    put(world.url("labels"), {"1.parquet": labels(50, 1), "9.parquet": labels(50, 9)})
    report = world.drain()
    assert (report.shards, report.rows, report.unlabelled, report.waiting) == (1, 49, 1, 2)
    assert world.left == (["0.parquet", "2.parquet"], ["9.parquet"])
    consumed = world.log.head().manifest.consumed[0]
    (joined,) = consumed.labels
    assert (consumed.key, joined.key, joined.column) == ("1.parquet", "1.parquet", "id")
    assert joined.unmatched == 0


def test_it_is_the_same_as_if_the_labels_had_come_with_the_features(world: World) -> None:
    other = World()
    put(world.url("inbox"), {"0.parquet": features(50, 1)})
    put(world.url("labels"), {"0.parquet": labels(50, 1)})
    y = rows(50, 1).column("y").to_pylist()
    put(other.url("inbox"), {"0.parquet": features(50, 1).append_column("y", [[*y[:-1], None]])})
    world.drain()
    other.drain(labels=None)
    ours, theirs = world.log.head().manifest, other.log.head().manifest
    assert ours.blobs.weights.sha256 == theirs.blobs.weights.sha256
    assert ours.consumed[0].score == theirs.consumed[0].score


def test_the_version_that_served_when_the_features_arrived_is_scored(world: World) -> None:
    put(world.url("inbox"), {"0.parquet": features(50, 1)})
    arrived = open_store(world.url("inbox")).stat("0.parquet").last_modified
    put(world.url("inbox"), {"1.parquet": features(50, 2)})
    put(world.url("labels"), {"1.parquet": labels(50, 2)})
    world.drain()  # version 1 comes after the features of shard 0
    put(world.url("labels"), {"0.parquet": labels(50, 1)})
    world.drain()
    head = world.log.head()
    assert (head.number, served_at(world.log, world.log.version, head, arrived).number) == (2, 0)
    predicted = head.manifest.consumed[0].predicted
    assert predicted is not None
    assert predicted.version == 0
    put(world.url("again"), {"0.parquet": rows(50, 1).slice(0, 49)})
    expected = score(load_learner(world.log, world.log.version(0)), batch.take_snapshot(world.url("again")).row_groups)
    assert predicted.score["mae"] == pytest.approx(expected.metrics["mae"])
    assert head.manifest.consumed[0].score["mae"] != predicted.score["mae"]


def test_who_served_when(world: World) -> None:
    put(world.url("inbox"), {f"{i}.parquet": features(50, i) for i in range(5)})
    put(world.url("labels"), {f"{i}.parquet": labels(50, i) for i in range(5)})
    world.drain(limits={"max_shards": 1})
    head, log = world.log.head(), world.log
    for number in range(1, head.number + 1):
        created = log.version(number).manifest.created
        assert served_at(log, log.version, head, created).number == number
        assert served_at(log, log.version, head, created - datetime.timedelta(microseconds=1)).number == number - 1
    assert served_at(log, log.version, head, datetime.datetime.min.replace(tzinfo=datetime.UTC)).number == 0


def later(world: World, moves: int | None, champion: int = 0, decision: str = "promoted") -> Version:
    """One more version: decided on with the alias so, or not at all."""
    compared = Compared(rows=1, learner=1.0, champion=1.0)
    gate = None if moves is None else Gate.model_validate(
        {"champion": champion, "moves": moves, "metric": "rmse", "decision": decision, "tolerance": 0.1, "refusals": 0}
        | {"recent": compared}
    )  # fmt: skip
    head = world.log.head()
    entry = Entry(kind="online", spec=head.manifest.spec, blobs=head.manifest.blobs, gate=gate)
    return world.log.commit(head, entry)


def test_a_refused_version_has_not_served_unless_somebody_promoted_it(world: World) -> None:
    history = [
        (later(world, 0), 1),
        (later(world, 1, champion=1, decision="refused"), 1),
        (later(world, None), 1),  # rejected shards only
        (later(world, 2, champion=2, decision="refused"), 2),  # somebody had promoted version 2
    ]
    head = world.log.head()
    for version, served in history:
        assert served_at(world.log, world.log.version, head, version.manifest.created).number == served


@pytest.mark.parametrize("champion", ["score", "ignore"])
def test_where_no_gate_moves_the_alias_it_names_what_served(world: World, champion: str) -> None:
    for number in range(2):
        put(world.url("inbox"), {f"{number}.parquet": features(50, number)})
        put(world.url("labels"), {f"{number}.parquet": labels(50, number)})
        world.drain(gate={"champion": champion})
    predicted = world.log.head().manifest.consumed[0].predicted
    assert predicted is not None
    assert (world.log.head().number, predicted.version) == (2, 0)


def test_bad_labels_go_to_quarantine_and_their_features_wait_for_better_ones(world: World) -> None:
    put(world.url("inbox"), {"0.parquet": features(50, 1)})
    contradicting = pa.table({"id": [1, 1], "y": [0.5, 0.7]})
    put(world.url("labels"), {"0.parquet": contradicting})
    report = world.drain()
    assert (report.shards, report.rejected) == (0, 1)
    assert world.left == (["0.parquet"], [])
    (reason,) = quarantined(world.log).values()
    assert reason["inbox"] == world.url("labels")
    put(world.url("labels"), {"0.parquet": labels(50, 1)})
    assert world.drain().shards == 1
    assert world.left == ([], [])


OTHERS = labels(50, 1).set_column(1, "id", [[1000 + i for i in range(49)]])
NO_NUMBER = labels(50, 1).set_column(0, "y", [[float("inf")] * 49])
NO_LABEL = labels(50, 1).set_column(0, "y", pa.nulls(49, pa.float64()))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(OTHERS, "no label for any row"), (NO_NUMBER, "'y'"), (NO_LABEL, "no label for any row")],
    ids=["of other rows", "no numbers", "nulls"],
)
def test_features_are_not_blamed_for_their_labels(bad: pa.Table, reason: str, world: World) -> None:
    put(world.url("inbox"), {"0.parquet": features(50, 1)})
    put(world.url("labels"), {"0.parquet": bad})
    assert world.drain().rejected == 1
    assert world.left == (["0.parquet"], [])
    (about,) = quarantined(world.log).values()
    assert about["inbox"] == world.url("labels")
    assert reason in about["reason"]


def test_labels_whose_features_are_not_there_hide_no_others_and_are_told_of_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delayed, "LISTED", 2)
    put(world.url("labels"), {f"{i}.parquet": labels(50, i) for i in range(5)})
    put(world.url("inbox"), {f"{i}.parquet": features(50, i) for i in (3, 4)})
    run = world.run()
    for _ in range(3):
        step(run)
    assert world.left == ([], ["0.parquet", "1.parquet", "2.parquet"])
    assert caplog.text.count("holds 3 shards of labels, and most of their features do not wait") == 1


def test_more_labels_than_are_matched_at_a_time_come_in_turn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delayed, "LISTED", 2)
    put(world.url("labels"), {f"{i}.parquet": labels(50, i) for i in range(5)})
    put(world.url("inbox"), {f"{i}.parquet": features(50, i) for i in range(5)})
    run = world.run()
    while step(run).outcome is not Outcome.IDLE:
        pass
    assert world.left == ([], [])


def test_kept_labels_with_new_etags_hide_no_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup was put back over the inbox of labels: the same bytes, other inodes and times. The features have their etags."""
    monkeypatch.setattr(delayed, "LISTED", 2)
    world = World(str(tmp_path))
    for name in ("inbox", "labels"):
        (tmp_path / name).mkdir(exist_ok=True)
    put(world.url("inbox"), {f"{i}.parquet": features(50, i) for i in range(4)})
    put(world.url("labels"), {f"{i}.parquet": labels(50, i) for i in range(4)})
    assert world.drain(after_commit="keep").shards == 4
    for path in sorted((tmp_path / "labels").glob("*.parquet")):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    put(world.url("inbox"), {"7.parquet": features(50, 7)})
    put(world.url("labels"), {"7.parquet": labels(50, 7)})
    assert world.drain(after_commit="keep").shards == 1


def test_features_that_cannot_be_joined_are_rejected_and_find_their_labels_when_they_are_sent_back(
    world: World,
) -> None:
    put(world.url("inbox"), {"0.parquet": features(50, 1).drop_columns("id")})
    put(world.url("labels"), {"0.parquet": labels(50, 1)})
    assert world.drain().rejected == 1
    assert world.left == ([], ["0.parquet"])
    (name,) = quarantined(world.log)
    back = requeue(world.log, name)
    assert back != "0.parquet"
    assert world.drain().rejected == 1, "it is matched with its labels under its new name, and rejected again"


def test_nothing_is_trained_twice_when_either_is_sent_again(world: World) -> None:
    for _ in range(3):
        put(world.url("inbox"), {"0.parquet": features(50, 1)})
        put(world.url("labels"), {"0.parquet": labels(50, 1)})
        world.drain()
    assert world.log.head().number == 1
    assert world.left == ([], [])


def test_archived_shards_give_the_same_bits_again(world: World) -> None:
    put(world.url("inbox"), {f"{i}.parquet": features(50, i) for i in range(3)})
    put(world.url("labels"), {f"{i}.parquet": labels(50, i) for i in range(3)})
    world.drain(after_commit={"archive_to": world.url("archive")})
    assert len(keys(world.url("archive"))) == 6
    assert audit(world.log).findings == []
    again = reproduce(world.log, [open_store(world.url("archive"))])
    assert (again.reproduced, again.findings) == (2, [])


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before", "after"])
def test_an_error_or_a_lost_answer_at_a_call_loses_nothing_and_trains_nothing_twice(phase: Phase, full: bool) -> None:
    """At each storage call in turn (CI: each fifth), and another run comes after it."""

    def filled() -> World:
        world = World()
        put(world.url("inbox"), {f"{i}.parquet": features(30, i) for i in range(3)})
        put(world.url("labels"), {f"{i}.parquet": labels(30, i) for i in range(3)})
        return world

    clean, calls = filled(), list[Call]()
    clean.drain(stores=hooked(calls.append))
    reference = clean.log.head().manifest.blobs
    last = max(call.index for call in calls)
    assert last > 50
    for index in range(0, last + 1, 1 if full else 5):
        world = filled()
        with contextlib.suppress(Unavailable):
            world.drain(stores=hooked(fail_at(index, phase, Unavailable("no answer"))))
        world.drain()
        assert audit(world.log).findings == []
        assert world.left == ([], [])
        blobs = world.log.head().manifest.blobs
        assert (blobs.weights.sha256, blobs.state.sha256) == (reference.weights.sha256, reference.state.sha256)


def test_inboxes_within_each_other_are_refused(world: World) -> None:
    with pytest.raises(PlacesOverlap, match=r"the inbox, .* holds the labels inbox .* beside each other"):
        world.run(labels={"inbox": world.url("inbox/labels"), "key": "id"})


def test_labels_and_their_key_go_together() -> None:
    with pytest.raises(ValueError, match=r"labels\.key"):
        OnlineSettings.model_validate({"labels": {"inbox": "s3://bucket/labels"}})


def test_bad_labels_do_not_wait_for_a_trigger(world: World) -> None:
    put(world.url("inbox"), {"0.parquet": features(50, 1)})
    put(world.url("labels"), {"0.parquet": pa.table({"id": [1, 1], "y": [0.5, 0.7]})})
    assert world.drain(train_when={"score_drop": 100.0}).rejected == 1
    assert world.log.head().manifest.fired == ("unreadable",)


def test_labels_that_are_too_large_stay(world: World) -> None:
    put(world.url("inbox"), {"0.parquet": features(50, 1)})
    put(world.url("labels"), {"0.parquet": labels(50, 1)})
    assert world.drain(limits={"max_shard_bytes": 100}).versions == 0
    assert world.left == (["0.parquet"], ["0.parquet"])


def test_labels_that_come_again_with_their_features_under_other_etags_do_not_wait_for_ever(tmp_path: Path) -> None:
    """As after `cp -p` of both inboxes to another disk. A local etag is of the file, not of its bytes."""

    class OnDisk(World):
        def url(self, name: str) -> str:
            return str(tmp_path / name)

    world = OnDisk()
    for after_commit in ("keep", "delete"):
        name = f"{after_commit}.parquet"
        put(world.url("inbox"), {name: features(50, 1)})
        put(world.url("labels"), {name: labels(50, 1)})
        world.drain(after_commit="keep")
        for place in ("inbox", "labels"):
            shutil.copytree(tmp_path / place, tmp_path / "copy")
            shutil.rmtree(tmp_path / place)
            (tmp_path / "copy").rename(tmp_path / place)
        run = world.run(after_commit=after_commit)
        assert step(run).outcome is Outcome.IDLE
        seen = Seen(run.head().tombstones, run.head().owed)
        left = [info for info in run.places.labels.store.list() if not seen.consumed(run.places.labels.url, info)]
        assert left == [], "every shard of labels that is there is known as consumed"
    assert world.left == ([], []), "and removed where nothing is kept"

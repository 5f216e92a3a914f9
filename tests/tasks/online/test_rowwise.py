"""Labels that come row by row: features wait until each row has one, or their time is over. None is lost, the last one counts."""

import contextlib
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, Dated, Hook, Numbering, Phase, act_at, fail_at
from tidemill.storage.audit import audit
from tidemill.storage.disposal import quarantined
from tidemill.storage.errors import CorruptObject, PermissionDenied, Unavailable
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Consumed, Entry, OpenLabels
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import ledger, rowwise
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.step import OnlineRun, Outcome, step
from tidemill.tasks.online.used import decoded, encoded
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import BatchSettings, OnlineSettings

HOUR = 3600.0


def features(begin: int, end: int) -> pa.Table:
    """Rows of one stream: row i has the same values in whichever shard it is, and the key `r<i>`."""
    return rows(400, 1).drop_columns("y").append_column("id", [[f"r{i}" for i in range(400)]]).slice(begin, end - begin)


def labels(*which: int, plus: float = 0.0) -> pa.Table:
    """Their labels, in this order; with `plus` others."""
    y = rows(400, 1)["y"].to_pylist()
    return pa.table({"id": [f"r{i}" for i in which], "y": [y[i] + plus for i in which]})


class World:
    """A registry with version 0, an inbox and one for labels, and the times at which their shards were written."""

    def __init__(self, root: str | None = None) -> None:
        self.root = root or f"memory://{uuid.uuid4().hex}"
        self.began = datetime.now(UTC)
        self.dates: dict[str, datetime] = {}
        put(self.url("dataset"), {"part-0.parquet": rows(200, 0)})
        for name in ("inbox", "labels"):
            put(self.url(name), {})
        batch.train(self.url("dataset"), self.url("registry"), "model", SPEC)

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    def put(self, name: str, key: str, table: pa.Table | bytes, ago: float = 0.0) -> None:
        """Put a shard, written so many seconds before this world began."""
        put(self.url(name), {key: table})
        self.dates[f"{open_store(self.url(name)).url}/{key}"] = self.began - timedelta(seconds=ago)

    @property
    def log(self) -> VersionLog:
        return open_log(self.url("registry"), "model")

    def run(self, hook: Hook = lambda call: None, concurrency: int | None = None, **settings: Any) -> OnlineRun:
        wanted = {"grace_seconds": 0, "limits": {"max_shards": 2}, "labels": {}} | settings
        wanted["labels"] = {"inbox": self.url("labels"), "key": "id", "wait_seconds": HOUR} | wanted["labels"]

        numbering = Numbering()

        def stores(url: str) -> Store:
            return Dated(open_store(url), self.dates, hook, numbering, concurrency)

        return OnlineRun(
            self.url("inbox"), self.url("registry"), "model", OnlineSettings.model_validate(wanted), stores
        )

    def drain(self, hook: Hook = lambda call: None, concurrency: int | None = None, **settings: Any) -> OnlineReport:
        run = self.run(hook, concurrency, **settings)
        while step(run).outcome is not Outcome.IDLE:
            pass
        assert audit(self.log).findings == []
        return run.report

    @property
    def left(self) -> tuple[list[str], list[str]]:
        return keys(self.url("inbox")), keys(self.url("labels"))

    @property
    def consumed(self) -> list[Consumed]:
        """All that was ever trained on, in order."""
        return [
            shard
            for number in range(self.log.head().number + 1)
            for shard in self.log.version(number).manifest.consumed
        ]

    @property
    def bits(self) -> tuple[str, str]:
        blobs = self.log.head().manifest.blobs
        return blobs.weights.sha256, blobs.state.sha256


@pytest.fixture
def world() -> World:
    return World()


def test_features_are_trained_on_once_each_row_has_a_label_as_if_all_had_come_together(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 50), ago=50)
    world.put("labels", "1.parquet", labels(*range(30)), ago=40)
    assert world.drain().shards == 0
    assert world.left == (["f.parquet"], ["1.parquet"])
    world.put("labels", "0.parquet", labels(*range(49, 29, -1)), ago=30)
    report = world.drain()
    assert (report.shards, report.rows, report.unlabelled) == (1, 50, 0)
    assert world.left == ([], [])
    (shard,) = world.consumed
    assert [(each.key, each.rows, each.column) for each in shard.joined or ()] == [
        ("1.parquet", 30, "id"),
        ("0.parquet", 20, "id"),
    ]
    other = World()
    other.put("inbox", "f.parquet", features(0, 50).append_column("y", rows(400, 1)["y"].slice(0, 50)))
    run = OnlineRun(other.url("inbox"), other.url("registry"), "model", OnlineSettings())
    assert step(run).outcome is Outcome.COMMITTED
    assert other.bits == world.bits


def test_a_shard_of_labels_stays_until_each_of_its_rows_is_used(world: World) -> None:
    for at, key in enumerate("abc"):
        world.put("inbox", f"{key}.parquet", features(10 * at, 10 * at + 10), ago=90 - at)
    world.put("labels", "most.parquet", labels(*range(25)), ago=50)
    world.drain()
    assert world.left == (["c.parquet"], ["most.parquet"])
    (there,) = world.log.head().manifest.open_labels or ()
    assert (there.key, there.rows, decoded(there).tolist()) == ("most.parquet", 25, [True] * 20 + [False] * 5)
    world.put("labels", "rest.parquet", labels(*range(25, 30)), ago=40)
    world.drain()
    assert world.left == ([], [])
    head = world.log.head().manifest
    assert head.open_labels is None
    assert [(done.key, done.rows, done.unmatched) for done in head.done_labels or ()] == [
        ("most.parquet", 25, 0),
        ("rest.parquet", 5, 0),
    ]


def test_the_last_label_of_a_row_counts(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 4), ago=60)
    world.put("labels", "z.parquet", labels(0, 1, 2, plus=5.0), ago=50)
    twice = pa.concat_tables([labels(3, 1, plus=7.0), labels(3)])
    world.put("labels", "b.parquet", twice, ago=40)
    world.put("labels", "a.parquet", labels(2, plus=9.0), ago=40)
    world.put("labels", "c.parquet", labels(2), ago=40)
    world.drain(after_commit={"archive_to": world.url("archive")})
    other = World()
    y = rows(400, 1)["y"].to_pylist()
    other.put("inbox", "f.parquet", features(0, 4).append_column("y", [[y[0] + 5.0, y[1] + 7.0, y[2], y[3]]]))
    step(OnlineRun(other.url("inbox"), other.url("registry"), "model", OnlineSettings()))
    assert other.bits == world.bits
    assert [(each.key, each.rows) for each in world.consumed[0].joined or ()] == [
        ("z.parquet", 1),
        ("b.parquet", 2),
        ("c.parquet", 1),
    ]
    assert world.left == ([], []), "labels that another has overtaken are used too"
    again = reproduce(world.log, [open_store(world.url("archive"))])
    assert (again.reproduced, again.findings) == (1, [])


def test_what_has_no_label_in_time_is_trained_on_without_and_counted(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 20), ago=HOUR + 60)
    world.put("inbox", "none.parquet", features(20, 30), ago=HOUR + 50)
    world.put("inbox", "young.parquet", features(30, 40), ago=HOUR - 60)
    world.put("labels", "some.parquet", labels(*range(15)), ago=70)
    world.put("labels", "late.parquet", labels(15, 16), ago=50)
    world.put("labels", "later.parquet", labels(30), ago=40)
    report = world.drain()
    assert (report.shards, report.rows, report.unlabelled, report.rejected) == (2, 15, 15, 0)
    assert [shard.joined for shard in world.consumed][1] == ()
    assert world.left == (["young.parquet"], ["late.parquet", "later.parquet"]), "whose time is not over"


def test_labels_of_no_use_are_rejected_once_their_time_is_over_and_no_sooner(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 10), ago=2 * HOUR)
    world.put("labels", "some.parquet", labels(0, 1, 300), ago=HOUR + 120)
    world.put("labels", "unknown.parquet", labels(301, 302), ago=HOUR + 60)
    world.put("labels", "waits.parquet", labels(303), ago=HOUR - 60)
    report = world.drain()
    assert (report.rows, report.unlabelled, report.rejected) == (2, 8, 1)
    (reason,) = quarantined(world.log).values()
    assert (reason["key"], "within 3600 seconds" in reason["reason"]) == ("unknown.parquet", True)
    done = [
        each for n in range(1, world.log.head().number + 1) for each in world.log.version(n).manifest.done_labels or ()
    ]
    assert [(each.key, each.rows, each.unmatched) for each in done] == [("some.parquet", 3, 1)]
    assert world.left == ([], ["waits.parquet"])


def test_labels_may_come_before_their_features(world: World) -> None:
    world.put("labels", "l.parquet", labels(*range(10)), ago=600)
    assert world.drain().rejected == 0
    world.put("inbox", "f.parquet", features(0, 10), ago=10)
    assert world.drain().rows == 10
    assert world.left == ([], [])


def test_features_wait_the_whole_time_where_labels_may_be_corrected(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 10), ago=HOUR - 60)
    world.put("labels", "l.parquet", labels(*range(10), plus=3.0), ago=500)
    world.put("labels", "m.parquet", labels(*range(10)), ago=400)
    assert world.drain(labels={"corrections": True}).shards == 0
    world.dates = {url: when - timedelta(seconds=120) for url, when in world.dates.items()}
    assert world.drain(labels={"corrections": True}).shards == 1
    assert [each.key for each in world.consumed[0].joined or ()] == ["m.parquet"]


def test_a_null_takes_a_label_back_and_a_row_without_a_key_has_none(world: World) -> None:
    table = features(0, 10).set_column(2, "id", [[None, *(f"r{i}" for i in range(1, 10))]])
    world.put("inbox", "f.parquet", table, ago=HOUR + 60)
    world.put("labels", "l.parquet", labels(*range(10)), ago=500)
    world.put("labels", "m.parquet", pa.table({"id": ["r3"], "y": pa.array([None], pa.float64())}), ago=400)
    report = world.drain()
    assert (report.rows, report.unlabelled) == (8, 2)


def test_numbers_and_the_text_that_writes_them_are_the_same_key_and_labels_may_have_several_types(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 3).set_column(2, "id", pa.array([1, 2, 3], pa.int16())), ago=60)
    world.put("labels", "l.parquet", pa.table({"id": ["1", "2"], "y": pa.array([1, 2], pa.int32())}), ago=50)
    world.put("labels", "m.parquet", pa.table({"id": pa.array([3], pa.uint64()), "y": [0.5]}), ago=40)
    report = world.drain(after_commit={"archive_to": world.url("archive")})
    assert (report.rows, report.unlabelled) == (3, 0)
    assert reproduce(world.log, [open_store(world.url("archive"))]).findings == []


def test_the_order_of_training_is_that_in_which_shards_became_ready_whenever_that_is_seen(world: World) -> None:
    """One that waits in vain for a row is ready when its time is over, after those that were complete before."""

    def fill(some: World) -> None:
        some.put("inbox", "in-vain.parquet", features(0, 10), ago=HOUR + 100)
        some.put("inbox", "a.parquet", features(10, 20), ago=HOUR + 50)
        some.put("labels", "l.parquet", labels(*range(9), *range(10, 20)), ago=HOUR)
        some.put("inbox", "b.parquet", features(20, 30), ago=HOUR - 40)

    fill(world)
    world.put("labels", "m.parquet", labels(*range(20, 30)), ago=10)
    world.drain()
    assert [shard.key for shard in world.consumed] == ["a.parquet", "in-vain.parquet", "b.parquet"]
    other = World()
    fill(other)
    other.dates = {url: when + timedelta(seconds=200) for url, when in other.dates.items()}  # no time is over
    other.drain()
    other.dates = {url: when - timedelta(seconds=200) for url, when in other.dates.items()}
    other.put("labels", "m.parquet", labels(*range(20, 30)), ago=10)
    other.drain()
    assert [shard.key for shard in other.consumed] == ["a.parquet", "in-vain.parquet", "b.parquet"]
    assert other.bits == world.bits


def test_labels_that_cannot_be_read_let_no_time_be_over(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 10), ago=HOUR + 60)
    world.put("inbox", "whole.parquet", features(10, 20), ago=HOUR + 50)
    world.put("labels", "l.parquet", labels(*range(10)), ago=500)
    world.put("labels", "whole.parquet", labels(*range(10, 20)), ago=500)

    def deny(call: Call) -> None:
        if (call.verb, call.key, call.phase) == ("read", "l.parquet", "before"):
            raise PermissionDenied("not for you")

    report = world.drain(deny)
    assert (report.shards, report.passed_over) == (1, 1)
    assert world.left == (["f.parquet"], ["l.parquet"])
    assert world.drain().rows == 10
    assert world.left == ([], [])


def test_bad_labels_are_rejected_at_once_and_features_without_a_key_in_their_turn(world: World) -> None:
    world.put("inbox", "f.parquet", features(0, 10), ago=60)
    world.put("inbox", "no-key.parquet", features(0, 10).drop_columns("id"), ago=50)
    world.put("inbox", "has-target.parquet", rows(10, 3).append_column("id", [[f"r{i}" for i in range(10)]]), ago=55)
    world.put("labels", "l.parquet", labels(*range(10)), ago=30)
    world.put("labels", "bad.parquet", pa.table({"id": ["r1"], "y": [float("inf")]}), ago=30)
    world.put("labels", "no-file.parquet", b"PAR1" + b"x" * 30 + b"PAR1", ago=30)
    report = world.drain()
    assert (report.shards, report.rejected) == (1, 4)
    assert {about["key"] for about in quarantined(world.log).values()} == {
        *("no-key.parquet", "has-target.parquet", "bad.parquet", "no-file.parquet")
    }


def test_labels_that_others_remove_or_replace_are_carried_on_no_longer(world: World) -> None:
    for key in ("gone", "replaced"):
        at = 100 * (key == "replaced")
        world.put("inbox", f"{key}.parquet", features(at, at + 10), ago=60)
        world.put("labels", f"{key}.parquet", labels(*range(at, at + 11)), ago=50)
    world.drain()
    assert len(world.log.head().manifest.open_labels or ()) == 2
    open_store(world.url("labels")).delete("gone.parquet")
    world.put("labels", "replaced.parquet", labels(200, 201), ago=5)
    world.put("inbox", "f.parquet", features(200, 202), ago=5)
    world.drain()
    assert world.log.head().manifest.open_labels is None
    assert world.left == ([], [])


@pytest.mark.parametrize("change", ["rollback", "batch"])
def test_what_is_used_is_carried_on_by_versions_of_every_kind(world: World, change: str) -> None:
    world.put("inbox", "a.parquet", features(0, 10), ago=90)
    world.put("labels", "l.parquet", labels(*range(20)), ago=50)
    world.drain()
    before = world.log.head().manifest.open_labels
    assert before is not None
    if change == "rollback":
        world.log.rollback(world.log.version(0))
    else:
        batch.train(world.url("dataset"), world.url("registry"), "model", SPEC, BatchSettings(again=True))
    assert world.log.head().manifest.open_labels == before
    world.put("inbox", "b.parquet", features(10, 20), ago=40)
    world.drain()
    assert world.left == ([], [])


def test_an_audit_finds_a_version_that_forgets_what_is_used(world: World) -> None:
    world.put("inbox", "a.parquet", features(0, 10), ago=90)
    world.put("labels", "l.parquet", labels(*range(20)), ago=50)
    world.drain()
    head = world.log.head()
    world.log.rollback(head)
    assert audit(world.log).findings == []
    fields = {name: getattr(world.log.head().manifest, name) for name in Entry.model_fields}
    world.log.commit(world.log.head(), Entry(**fields | {"open_labels": None}))
    assert [found for found in audit(world.log).findings if "l.parquet" in found]


@pytest.mark.parametrize("limited", ["labels listed", "labels in memory", "features in memory"])
def test_no_more_is_looked_at_together_than_fits_and_all_has_its_turn(
    limited: str, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Orphans of labels hide no labels, and features that wait in vain no features."""
    room, name, most = {
        "labels listed": (rowwise, "LISTED", 10),
        "labels in memory": (ledger, "LABELS_BYTES", 8000),
        "features in memory": (ledger, "KEYS_BYTES", 900),
    }[limited]
    monkeypatch.setattr(room, name, most)
    monkeypatch.setattr(ledger, "AHEAD_BYTES", 1)
    size = 500 if limited == "labels in memory" else 1
    for at in range(8):
        world.put("inbox", f"{at}.parquet", features(40 * at, 40 * at + 40), ago=HOUR + 200 - at)
        world.put("labels", f"{at}.parquet", labels(*range(40 * at, 40 * at + 39)), ago=HOUR + 100 - at)
        if limited != "features in memory":
            orphans = pa.table({"id": [f"orphan {i}" for i in range(size)], "y": [0.0] * size})
            world.put("labels", f"{at}-orphan.parquet", orphans, ago=2 * HOUR + 100 - at)
    report = world.drain()
    assert (report.shards, report.rows, report.unlabelled) == (8, 312, 8)
    assert world.left == ([], [])
    told = "are looked at together, the oldest first" in caplog.text
    assert told == (limited != "features in memory")


def test_labels_and_features_that_are_sent_again_are_used_once(world: World) -> None:
    for _ in range(3):
        world.put("inbox", "f.parquet", features(0, 10), ago=60)
        world.put("labels", "l.parquet", labels(*range(10)), ago=50)
        world.drain()
    assert world.log.head().number == 1
    assert world.left == ([], [])


def test_kept_shards_are_used_once_whichever_etags_they_have(tmp_path: Any) -> None:
    world = World(str(tmp_path))
    world.put("inbox", "f.parquet", features(0, 10), ago=60)
    world.put("labels", "l.parquet", labels(*range(10)), ago=50)
    for _ in range(3):
        world.drain(after_commit="keep")
        for name in ("inbox/f.parquet", "labels/l.parquet"):
            data = (tmp_path / name).read_bytes()
            (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(data)
    assert world.log.head().number == 1
    world.drain()
    assert world.left == ([], [])


def test_a_follower_reads_each_shard_once_while_it_waits(world: World) -> None:
    calls: list[Call] = []
    world.put("inbox", "f.parquet", features(0, 10), ago=60)
    world.put("labels", "l.parquet", labels(*range(5)), ago=50)
    run = world.run(calls.append)
    for _ in range(3):
        assert step(run).outcome is Outcome.IDLE
    reads = [call.key for call in calls if call.verb == "read" and call.phase == "before" and ".parquet" in call.key]
    assert sorted(reads) == ["f.parquet", "l.parquet"]
    world.put("labels", "m.parquet", labels(*range(5, 10)), ago=10)
    assert run.poll()
    assert step(run).outcome is Outcome.COMMITTED


def filled() -> World:
    """Four shards of features, and labels of them that come too early, too late, corrected, and of nobody."""
    world = World()
    for at in range(4):
        world.put("inbox", f"{at}.parquet", features(10 * at, 10 * at + 10), ago=HOUR + 300 - at)
        world.put("labels", f"{at}.parquet", labels(*range(10 * at + 5, 10 * at + 15)), ago=HOUR + 200 - at)
    world.put("labels", "first.parquet", labels(*range(4), 399), ago=HOUR + 250)
    world.put("labels", "wrong.parquet", labels(12, 13, plus=9.0), ago=HOUR + 290)
    world.put("labels", "orphan.parquet", labels(390), ago=HOUR + 210)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before", "after"])
def test_an_error_or_a_lost_answer_at_a_call_loses_no_label_and_uses_none_twice(phase: Phase, full: bool) -> None:
    """At each storage call in turn (CI: each seventeenth), and another run comes after it."""
    clean, calls = filled(), list[Call]()
    clean.drain(calls.append)
    assert clean.left == ([], [])
    last = max(call.index for call in calls)
    for index in range(0, last + 1, 1 if full else 17):
        world = filled()
        with contextlib.suppress(Unavailable):
            world.drain(fail_at(index, phase, Unavailable("no answer")))
        world.drain()
        assert world.left == ([], [])
        assert world.bits == clean.bits
        assert [about["key"] for about in quarantined(world.log).values()] == ["orphan.parquet"]


@pytest.mark.slow
def test_another_run_takes_a_step_at_any_call_and_no_label_is_lost(full: bool) -> None:
    """Before each storage call in turn (CI: each seventeenth); the run that is overtaken goes on."""
    clean, calls = filled(), list[Call]()
    clean.drain(calls.append)
    for index in range(0, max(call.index for call in calls) + 1, 1 if full else 17):
        world = filled()
        world.drain(act_at(index, "before", lambda world=world: step(world.run())), concurrency=1)
        world.drain()
        assert world.left == ([], [])
        assert world.bits == clean.bits
        assert [about["key"] for about in quarantined(world.log).values()] == ["orphan.parquet"]


def test_what_is_used_is_read_back_as_it_was_written_or_refused() -> None:
    import numpy as np

    used = np.random.default_rng(0).random(1001) < 0.3
    record = {"inbox": "i", "key": "k", "sha256": "s", "etag": "e", "size": 1, "last_modified": datetime.now(UTC)}
    labels = OpenLabels(**record, rows=1001, used=encoded(used))
    assert (decoded(labels) == used).all()
    for bad in ("", "no base64!", encoded(used[:900]), encoded(np.zeros(10**7, dtype=bool)), labels.used[:-8]):
        with pytest.raises(CorruptObject, match="i/k"):
            decoded(labels.model_copy(update={"used": bad}))

"""Online training as plain functions: what one step consumes, rejects, commits and removes. No Prefect."""

import datetime
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path

import pyarrow as pa
import pytest

from tests.data import SPEC, keys, parquet, put, rows
from tests.storage.faults import Call, Deny, FaultStore, Numbering, hooked, together
from tests.storage.shards import requeue
from tidemill.flows import views
from tidemill.storage import disposal, tombstones
from tidemill.storage.audit import audit
from tidemill.storage.errors import (
    CorruptObject,
    PermissionDenied,
    UnknownModel,
    UnknownVersion,
    UnsupportedFormat,
)
from tidemill.storage.inbox import open_inbox
from tidemill.storage.log import open_log
from tidemill.storage.manifest import FORMAT, Entry, Owed, encode, sha256
from tidemill.storage.probe import check_inbox
from tidemill.storage.retention import collect_garbage
from tidemill.storage.status import look
from tidemill.storage.store import ObjectInfo, Promises, Store
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import selection
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun, Outcome
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.errors import StateMismatch
from tidemill.tasks.training.loop import score
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

MakeUrl = Callable[[str], str]


def begin(registry: str, dataset: str, spec: Spec = SPEC) -> None:
    """Version 0, from a dataset of 200 rows."""
    put(dataset, {"part-0.parquet": rows(200, 0)})
    batch.train(dataset, registry, "model", spec)


@pytest.fixture
def registry(make_url: MakeUrl) -> str:
    begin(make_url("registry"), make_url("dataset"))
    return make_url("registry")


@pytest.fixture
def memory_registry(memory_url: MakeUrl) -> str:
    begin(memory_url("registry"), memory_url("dataset"))
    return memory_url("registry")


def open_run(inbox: str, registry: str, stores: Callable[[str], Store] = open_store, **settings: object) -> OnlineRun:
    return OnlineRun(inbox, registry, "model", OnlineSettings.model_validate({"grace_seconds": 0} | settings), stores)


def drain(run: OnlineRun) -> online.OnlineReport:
    """Step after step of a run that is already open, and may be looked into."""
    while online.step(run).outcome is not Outcome.IDLE:
        pass
    return run.report


def days(count: int, start: int = 0) -> dict[str, pa.Table]:
    return {f"{i:02}.parquet": rows(40 + i, 100 + i, slope=3.0) for i in range(start, start + count)}


# ---- the ordinary day ------------------------------------------------------------------------------------------------
def test_a_step_consumes_commits_and_removes(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(3))
    run = open_run(make_url("inbox"), registry)
    assert online.step(run) == online.Step(Outcome.COMMITTED, 1)
    assert online.step(run) == online.Step(Outcome.IDLE)
    assert keys(make_url("inbox")) == []

    manifest = open_log(registry, "model").head().manifest
    assert (manifest.version, manifest.kind) == (1, "online")
    assert [(s.key, s.rows, s.ordinal) for s in manifest.consumed] == [
        ("00.parquet", 40, 0),
        ("01.parquet", 41, 1),
        ("02.parquet", 42, 2),
    ]
    assert manifest.counters["shards"] == 3
    assert [debt.key for debt in manifest.owed] == ["00.parquet", "01.parquet", "02.parquet"]
    assert manifest.environment["torch"]


def test_the_score_is_that_of_the_model_before_it_trained_on_the_shard(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(2))
    log = open_log(registry, "model")
    run = open_run(make_url("inbox"), registry, limits={"max_shards": 1})
    shard = run.places.inbox.read(run.places.inbox.store.stat("00.parquet"))
    assert shard is not None
    expected = score(load_learner(log, log.head()), shard.row_groups())
    report = drain(run)
    assert log.version(1).manifest.consumed[0].score == {"loss": expected.loss, **expected.metrics}
    assert log.version(2).manifest.consumed[0].score["mae"] < expected.metrics["mae"], "it learned from the first"
    weighted = [(s.rows, s.score["mae"]) for n in (1, 2) for s in log.version(n).manifest.consumed]
    assert report.score["mae"] == pytest.approx(sum(r * m for r, m in weighted) / sum(r for r, _ in weighted))


def test_bits_do_not_depend_on_where_commits_fall(registry: str, make_url: MakeUrl) -> None:
    digests = []
    for max_shards in (1, 2, 6):
        name = f"by-{max_shards}"
        begin(make_url(f"{name}/registry"), make_url(f"{name}/dataset"))
        put(make_url(f"{name}/inbox"), days(6))
        drain(
            open_run(
                make_url(f"{name}/inbox"), make_url(f"{name}/registry"), limits={"max_shards": max_shards}, passes=2
            )
        )
        blobs = open_log(make_url(f"{name}/registry"), "model").head().manifest.blobs
        digests.append((blobs.weights.sha256, blobs.state.sha256))
    assert len(set(digests)) == 1


@pytest.mark.parametrize(
    ("limits", "commits"), [({"max_shards": 2}, [2, 2, 1]), ({"max_rows": 50}, [2, 2, 1]), ({"max_bytes": 1}, [1] * 5)]
)
def test_limits_of_a_commit(limits, commits, memory_registry: str, memory_url: MakeUrl) -> None:
    put(memory_url("inbox"), days(5))
    report = drain(open_run(memory_url("inbox"), memory_registry, limits=limits))
    log = open_log(memory_registry, "model")
    assert [len(log.version(n).manifest.consumed) for n in range(1, report.head + 1)] == commits


def test_archive_keeps_the_whole_key(registry: str, make_url: MakeUrl) -> None:
    shards = {"2024/a.parquet": rows(30, 1), "2025/a.parquet": rows(30, 2)}
    put(make_url("inbox"), shards)
    drain(open_run(make_url("inbox"), registry, after_commit={"archive_to": make_url("archive")}))
    assert keys(make_url("inbox")) == []
    archive = open_store(make_url("archive"))
    assert {key: archive.read(key) for key in keys(make_url("archive"))} == {k: parquet(t) for k, t in shards.items()}


def test_keep_leaves_shards_and_never_trains_them_again(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(3))
    assert drain(open_run(make_url("inbox"), registry, after_commit="keep")).shards == 3
    report = drain(open_run(make_url("inbox"), registry, after_commit="keep"))
    assert (report.shards, report.waiting, len(keys(make_url("inbox")))) == (0, 0, 3)


def test_what_was_kept_is_archived_by_a_run_that_archives(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(3))
    drain(open_run(make_url("inbox"), registry, after_commit="keep"))
    report = drain(open_run(make_url("inbox"), registry, after_commit={"archive_to": make_url("archive")}))
    assert (report.shards, report.duplicates, keys(make_url("inbox"))) == (0, 3, [])
    assert keys(make_url("archive")) == sorted(days(3))


def test_what_was_kept_is_remembered_until_it_is_removed(
    memory_registry: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it is: more than the tombstones' window and than one listing."""
    monkeypatch.setattr(selection, "LISTED_AHEAD", 2)
    monkeypatch.setattr(tombstones, "WHOLE_VERSIONS", 1)
    monkeypatch.setattr(Tombstones, "prune", partialmethod(Tombstones.prune, window=1))
    put(memory_url("inbox"), days(7))
    drain(open_run(memory_url("inbox"), memory_registry, after_commit="keep"))
    put(memory_url("inbox"), days(4, start=10))
    report = drain(open_run(memory_url("inbox"), memory_registry, limits={"max_shards": 1}))
    assert report.shards == 4
    drain(open_run(memory_url("inbox"), memory_registry))
    assert keys(memory_url("inbox")) == []
    put(memory_url("inbox"), days(1, start=20))
    drain(open_run(memory_url("inbox"), memory_registry))
    log = open_log(memory_registry, "model")
    assert log.head().manifest.counters["shards"] == 7 + 4 + 1
    put(memory_url("inbox"), days(1, start=21))
    drain(open_run(memory_url("inbox"), memory_registry))
    assert len(log.tombstones(log.head())) <= 2  # the window, and one since: nothing else is in the inbox


def test_what_arrives_later_is_consumed_even_under_a_lower_key(registry: str, make_url: MakeUrl) -> None:
    run = open_run(make_url("inbox"), registry)
    put(make_url("inbox"), days(2, start=5))
    drain(run)
    put(make_url("inbox"), days(2))
    assert drain(run).shards == 4
    assert keys(make_url("inbox")) == []


def test_rows_without_a_label_are_counted_and_left_out(memory_registry: str, memory_url: MakeUrl) -> None:
    table = rows(40, 1)
    labels = [None if i < 10 else y for i, y in enumerate(table["y"].to_pylist())]
    put(memory_url("inbox"), {"a.parquet": table.set_column(2, "y", [labels])})
    report = drain(open_run(memory_url("inbox"), memory_registry))
    assert (report.rows, report.unlabelled) == (30, 10)


# ---- sent again ------------------------------------------------------------------------------------------------------
def test_a_shard_that_is_sent_again_is_removed_and_not_trained_on(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(2))
    drain(open_run(make_url("inbox"), registry, limits={"max_shards": 1}))
    put(make_url("inbox"), days(1))
    report = drain(open_run(make_url("inbox"), registry))
    assert (report.shards, report.duplicates, report.versions, report.waiting) == (0, 1, 0, 0)
    assert keys(make_url("inbox")) == []


def test_other_bytes_under_the_same_key_are_other_data(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(1))
    drain(open_run(make_url("inbox"), registry))
    put(make_url("inbox"), {"00.parquet": rows(55, 77)})
    assert drain(open_run(make_url("inbox"), registry)).rows == 55


def test_a_producer_that_overwrites_a_shard_after_it_was_read_loses_nothing(registry: str, make_url: MakeUrl) -> None:
    """Overwritten between the commit and the delete: the delete is refused, the new bytes are consumed next."""
    put(make_url("inbox"), days(1))
    plain = open_store(make_url("inbox"))

    def overwrite(call: Call) -> None:
        if call.verb == "delete" and call.phase == "before" and call.key == "00.parquet" and not overwritten:
            overwritten.append(plain.write("00.parquet", parquet(rows(66, 66))))

    overwritten: list[ObjectInfo] = []

    def stores(url: str) -> Store:
        return FaultStore(open_store(url), overwrite)

    report = drain(open_run(make_url("inbox"), registry, stores))
    assert (report.shards, report.rows) == (2, 40 + 66)
    assert keys(make_url("inbox")) == []


def in_place(path: Path, data: bytes) -> None:
    """As the inode of a removed file that `cp -p`, tar or rsync has used again."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


class ForgetsBytes(FaultStore):
    """Removes what has the remembered etag, whatever its bytes are now."""

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        super().delete(key, if_match=if_match)


def rewritten_before_its_removal(
    folder: Path, how: str, kind: type[FaultStore] = FaultStore, **settings: object
) -> tuple[str, str, list[str]]:
    """sha256 of a shard, of what was written into its file between its commit and its removal, and of what was consumed."""
    registry, inbox, path = str(folder / "registry"), folder / "inbox", folder / "inbox" / "a.parquet"
    begin(registry, str(folder / "dataset"))
    old = parquet(rows(40, 1))
    new = next(data for seed in range(2, 10_000) if len(data := parquet(rows(40, seed))) == len(old))
    inbox.mkdir()
    path.write_bytes(old)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = old  # from now on, until the pages are written back, stores change no time
        written: list[Call] = []

        def rewrite(call: Call) -> None:
            committed = call.key == "a.parquet" and open_log(registry, "model").head().number == 1
            if committed and call.phase == "before" and not written:
                written.append(call)
                if how == "in place":
                    in_place(path, new)
                else:
                    mapped[:] = new

        numbering = Numbering()
        stores = lambda url: kind(open_store(url), rewrite, numbering, 1)  # noqa: E731
        drain(open_run(str(inbox), registry, stores, **settings))
        assert written
    drain(open_run(str(inbox), registry, **settings))
    log = open_log(registry, "model")
    return (
        sha256(old),
        sha256(new),
        [shard.sha256 for version in log.history(log.head()) for shard in version.manifest.consumed],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "after_commit"),
    [("in place", "delete"), ("in place", "archive"), ("memory map", "delete"), ("memory map", "archive")],
)
def test_new_bytes_under_the_inode_size_and_time_of_a_consumed_shard_are_not_lost(
    tmp_path: Path, how: str, after_commit: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On a local disk; before the consumed shard is removed."""
    inbox = tmp_path / "inbox"
    settings = {"after_commit": "delete" if after_commit == "delete" else {"archive_to": str(tmp_path / "archive")}}
    old, new, consumed = rewritten_before_its_removal(tmp_path, how, **settings)
    if (how, after_commit) == (
        "memory map",
        "archive",
    ):  # it cannot be copied as what was consumed: it stays, and is named
        assert consumed == [old]
        assert sha256((inbox / "a.parquet").read_bytes()) == new
        assert "inbox/a.parquet stays in the inbox" in caplog.text
    else:
        assert sorted(consumed) == sorted([old, new])
        assert keys(str(inbox)) == []


def test_a_store_that_compares_no_bytes_before_a_removal_is_caught(tmp_path: Path) -> None:
    """The control of the test above: etags alone lose what a memory map has written."""
    old, _, consumed = rewritten_before_its_removal(tmp_path, "memory map", ForgetsBytes)
    assert consumed == [old]
    assert keys(str(tmp_path / "inbox")) == []


def test_what_another_run_owes_is_removed_as_its_store_can(
    registry: str, make_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in an inbox that is not this run's, if it is allowed: whether its deletes compare etags has to be asked there too."""
    monkeypatch.setenv("TIDEMILL_PLACES", make_url("inbox"))
    put(make_url("inbox"), days(1))

    def crash(call: Call) -> None:
        if call.verb == "delete" and call.key == "00.parquet":
            raise PermissionDenied("not now")

    drain(open_run(make_url("inbox"), registry, lambda url: FaultStore(open_store(url), crash)))
    assert open_log(registry, "model").head().manifest.owed
    opened: dict[str, Store] = {}

    def stores(url: str) -> Store:
        store = open_store(url)
        store.promises = Promises(compares_on_delete=False)  # as if nobody had asked yet
        return opened.setdefault(store.url, store)

    put(make_url("other"), days(1, start=5))
    drain(open_run(make_url("other"), registry, stores))
    assert keys(make_url("inbox")) == []
    store = open_store(make_url("inbox"))
    check_inbox(store)
    assert opened[store.url].promises == store.promises


# ---- bad shards ------------------------------------------------------------------------------------------------------
RUNNING = SPEC.model_copy(update={"running_statistics": True, "standardize_features": True, "standardize_target": True})


@pytest.mark.parametrize("column", ["a", "y"])
@pytest.mark.parametrize("value", [1e30, 1e200])
def test_values_far_out_do_not_become_running_statistics(column: str, value: float, memory_url: MakeUrl) -> None:
    """Believed once, they would be for ever: the shard is rejected, and the model is that of a run without it."""
    far = rows(10, 1)
    far = far.set_column(far.schema.get_field_index(column), column, [[0.0] * 9 + [value]])
    states = []
    for name, shards in {"with": days(3) | {"01b.parquet": parquet(far)}, "without": days(3)}.items():
        begin(memory_url(f"{name}/registry"), memory_url(f"{name}/dataset"), RUNNING)
        put(memory_url(f"{name}/inbox"), shards)
        report = drain(open_run(memory_url(f"{name}/inbox"), memory_url(f"{name}/registry")))
        assert report.shards == 3
        log = open_log(memory_url(f"{name}/registry"), "model")
        states.append(log.head().manifest.blobs.state.sha256)
        if name == "with":
            ((_, about),) = disposal.quarantined(log).items()
            assert about["key"] == "01b.parquet"
            assert f"'{column}'" in about["reason"]
    assert states[0] == states[1]


BAD = {
    "corrupt": (b"PAR1" + b"x" * 100 + (50).to_bytes(4, "little") + b"PAR1", "footer cannot be read"),
    "empty": (b"", "0 bytes"),
    "foreign": (b"a,b,y\n1,2,3\n" * 10, "does not begin and end with PAR1"),
    "no rows": (parquet(rows(10, 1).slice(0, 0)), "no rows"),
    "missing column": (parquet(rows(10, 1).drop_columns("b")), "'b'"),
    "retyped column": (parquet(rows(10, 1).set_column(0, "a", [["text"] * 10])), "'a'"),
    "null column": (parquet(rows(100, 1).set_column(0, "a", pa.nulls(100, pa.float64()))), "'a'"),
    "no labels": (parquet(rows(10, 1).set_column(2, "y", pa.array([None] * 10, pa.float64()))), "'y'"),
    "not a number": (parquet(rows(10, 1).set_column(0, "a", [[float("nan")] * 10])), "'a'"),
    "infinite": (parquet(rows(10, 1).set_column(0, "a", [[float("inf")] * 10])), "'a'"),
    "breaks training": (parquet(rows(10, 1).set_column(2, "y", [[1e38] * 10])), "made the loss inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_rejected_once_and_the_others_are_trained(
    name: str, memory_registry: str, memory_url: MakeUrl
) -> None:
    """The weights are those of a run without it; its bytes are in quarantine, with the reason."""
    data, reason = BAD[name]
    put(memory_url("inbox"), days(3) | {"01b.parquet": data})
    report = drain(open_run(memory_url("inbox"), memory_registry))
    assert (report.shards, report.rejected, keys(memory_url("inbox"))) == (3, 1, [])
    log = open_log(memory_registry, "model")
    ((kept, about),) = disposal.quarantined(log).items()
    assert log.store.read(f"model/quarantine/{kept}") == data
    assert about["key"] == "01b.parquet"
    assert re.search(reason, about["reason"])

    begin(memory_url("clean/registry"), memory_url("clean/dataset"))
    put(memory_url("clean/inbox"), days(3))
    drain(open_run(memory_url("clean/inbox"), memory_url("clean/registry")))
    clean = open_log(memory_url("clean/registry"), "model").head().manifest.blobs
    assert log.head().manifest.blobs.weights.sha256 == clean.weights.sha256
    assert log.head().manifest.blobs.state.sha256 == clean.state.sha256


def test_a_shard_mended_after_it_broke_the_training_is_trained_on_from_the_head(
    memory_registry: str, memory_url: MakeUrl
) -> None:
    """The bytes that were rejected are gone. The new ones are another shard."""
    put(memory_url("inbox"), {"00.parquet": rows(10, 1).set_column(2, "y", [[1e38] * 10])})
    mended: list[None] = []

    def mend(call: Call) -> None:
        if call.verb == "read" and call.key == "00.parquet" and call.phase == "after" and not mended:
            mended.append(put(memory_url("inbox"), days(1)))

    report = drain(open_run(memory_url("inbox"), memory_registry, lambda url: FaultStore(open_store(url), mend)))
    assert (report.shards, report.rejected, report.rows) == (1, 1, 40)

    begin(memory_url("clean/registry"), memory_url("clean/dataset"))
    put(memory_url("clean/inbox"), days(1))
    drain(open_run(memory_url("clean/inbox"), memory_url("clean/registry")))
    mended_log, clean = (
        open_log(memory_url(where), "model").head().manifest for where in ("registry", "clean/registry")
    )
    assert mended_log.blobs.weights.sha256 == clean.blobs.weights.sha256


def test_versions_that_only_rejected_are_passed_over_not_without_end(
    memory_registry: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(memory_url("inbox"), days(2))
    drain(open_run(memory_url("inbox"), memory_registry))
    put(memory_url("inbox"), {f"{i}.parquet": b"no Parquet" for i in range(4)})
    drain(open_run(memory_url("inbox"), memory_registry, limits={"max_shards": 1}))
    assert open_log(memory_registry, "model").head().number == 1 + 4
    assert len(open_run(memory_url("inbox"), memory_registry).head().recent) == 2
    monkeypatch.setattr(online, "PASSED_OVER", 3)
    assert len(open_run(memory_url("inbox"), memory_registry).head().recent) == 0


def test_a_shard_that_is_still_being_written_is_waited_for(memory_registry: str, memory_url: MakeUrl) -> None:
    whole = parquet(rows(30, 1))
    put(memory_url("inbox"), {"slow.parquet": whole[: len(whole) // 2]} | days(1))
    run = open_run(memory_url("inbox"), memory_registry, grace_seconds=3600)
    report = drain(run)
    assert (report.shards, report.rejected, report.waiting) == (1, 0, 1)
    put(memory_url("inbox"), {"slow.parquet": whole})
    assert drain(run).rows == 40 + 30


def test_a_requeued_shard_is_consumed_once_the_reason_is_gone(registry: str, make_url: MakeUrl) -> None:
    whole = parquet(rows(30, 1))
    put(make_url("inbox"), {"sub/late.parquet": whole[:-1]})
    drain(open_run(make_url("inbox"), registry))
    log = open_log(registry, "model")
    (name,) = disposal.quarantined(log)
    back = requeue(log, name)
    assert back.startswith("sub/late.requeued-")
    assert keys(make_url("inbox")) == [back]
    open_store(make_url("inbox")).write(back, whole)
    assert drain(open_run(make_url("inbox"), registry)).rows == 30
    assert disposal.quarantined(log) == {}


def test_a_shard_too_large_for_memory_stays(memory_registry: str, memory_url: MakeUrl, caplog) -> None:
    put(memory_url("inbox"), days(1) | {"00a.parquet": rows(5000, 3)})
    report = drain(open_run(memory_url("inbox"), memory_registry, limits={"max_shard_bytes": 20_000}))
    assert (report.shards, report.waiting) == (1, 1)
    assert keys(memory_url("inbox")) == ["00a.parquet"]
    assert "max_shard_bytes" in caplog.text


def test_shards_too_large_do_not_hide_others(
    memory_registry: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LISTED_AHEAD", 2)
    put(memory_url("inbox"), {f"0{i}.parquet": rows(5000, i) for i in range(3)} | days(3, start=5))
    assert drain(open_run(memory_url("inbox"), memory_registry, limits={"max_shard_bytes": 20_000})).shards == 3


def test_hidden_and_unfinished_names_are_not_shards(memory_registry: str, memory_url: MakeUrl) -> None:
    ignored = {".hidden.parquet": b"x", "_SUCCESS": b"", "a.parquet.tmp": b"x", "_temporary/a.parquet": b"x"}
    put(memory_url("inbox"), ignored)
    assert drain(open_run(memory_url("inbox"), memory_registry)).versions == 0
    assert set(keys(memory_url("inbox"))) == set(ignored)


# ---- denied, overlapping, rolled back --------------------------------------------------------------------------------
class ReadOnly(FaultStore):
    """An inbox whose credentials may not delete; `allowed` lifts it."""

    allowed = False

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        if not self.allowed and not key.startswith("."):
            raise PermissionDenied(f"not allowed to delete {key}")
        super().delete(key, if_match=if_match, sha256=sha256)


def test_a_denied_delete_is_carried_and_never_trained_again(registry: str, make_url: MakeUrl, caplog) -> None:
    put(make_url("inbox"), days(2))
    locked = ReadOnly(open_store(make_url("inbox")), lambda call: None)

    def stores(url: str) -> Store:
        return locked if url == make_url("inbox") or url == locked.url else open_store(url)

    report = drain(open_run(make_url("inbox"), registry, stores))
    assert (report.shards, report.owed) == (2, 2)
    assert "not allowed to delete" in caplog.text
    put(make_url("inbox"), days(1, start=2))
    report = drain(open_run(make_url("inbox"), registry, stores))
    assert (report.shards, report.owed) == (1, 3), "only the new one; all three are owed"
    locked.allowed = True
    report = drain(open_run(make_url("inbox"), registry, stores))
    assert (report.shards, report.owed, keys(make_url("inbox"))) == (0, 0, [])


def test_of_overlapping_runs_one_wins_and_the_other_starts_again(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(4))
    first, second = (open_run(make_url("inbox"), registry, limits={"max_shards": 2}) for _ in range(2))
    assert first.poll()
    assert online.step(second).outcome is Outcome.COMMITTED
    assert online.step(first).outcome is Outcome.LOST
    drain(first)
    drain(second)
    log = open_log(registry, "model")
    consumed = [s.key for v in list(log.history(log.head()))[::-1] for s in v.manifest.consumed]
    assert consumed == ["00.parquet", "01.parquet", "02.parquet", "03.parquet"]


def test_a_lost_race_is_an_outcome_and_no_error(memory_registry: str, memory_url: MakeUrl) -> None:
    put(memory_url("inbox"), days(1))
    run = open_run(memory_url("inbox"), memory_registry)
    run.head()
    log = open_log(memory_registry, "model")
    log.rollback(log.version(0))
    assert online.step(run).outcome is Outcome.LOST
    assert online.step(run) == online.Step(Outcome.COMMITTED, 2)
    assert run.report.lost_races == 1


def test_a_head_that_retention_removes_while_it_is_read_is_a_lost_race(
    memory_registry: str, memory_url: MakeUrl
) -> None:
    put(memory_url("inbox"), days(4))
    online.step(open_run(memory_url("inbox"), memory_registry, limits={"max_shards": 1}))
    frozen = [True]

    def others_go_on(call: Call) -> None:
        if frozen and call.verb == "read" and call.key.endswith(".safetensors"):
            frozen.clear()
            drain(open_run(memory_url("inbox"), memory_registry, limits={"max_shards": 1}))
            assert collect_garbage(open_log(memory_registry, "model"), keep=1)

    run = open_run(memory_url("inbox"), memory_registry, stores=lambda url: FaultStore(open_store(url), others_go_on))
    assert online.step(run).outcome is Outcome.LOST
    assert online.step(run).outcome is Outcome.IDLE
    assert open_log(memory_registry, "model").head().number == 4


def test_a_head_without_blobs_is_an_error(memory_registry: str, memory_url: MakeUrl) -> None:
    log = open_log(memory_registry, "model")
    log.store.delete(log.head().manifest.blobs.weights.key)
    with pytest.raises(UnknownVersion, match="is gone"):
        online.step(open_run(memory_url("inbox"), memory_registry))


def test_training_continues_from_a_rollback_and_remembers_what_was_consumed(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(2))
    drain(open_run(make_url("inbox"), registry, limits={"max_shards": 1}))
    log = open_log(registry, "model")
    weights = log.version(1).manifest.blobs.weights.sha256
    assert log.rollback(log.version(1)).manifest.blobs.weights.sha256 == weights
    put(make_url("inbox"), days(3))  # 0 and 1 again, and a new one
    assert drain(open_run(make_url("inbox"), registry)).shards == 1
    assert keys(make_url("inbox")) == []
    assert log.head().manifest.consumed[0].ordinal == 1, "the learner went back to one shard seen"


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_an_unknown_model_is_named_with_the_nearest_one(registry: str, make_url: MakeUrl) -> None:
    with pytest.raises(UnknownModel, match="'model'"):
        OnlineRun(make_url("inbox"), registry, "modle", OnlineSettings())


@pytest.mark.parametrize("blob", ["weights", "state"])
def test_an_edited_blob_is_refused_and_the_inbox_untouched(blob: str, registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(1))
    log = open_log(registry, "model")
    ref = getattr(log.head().manifest.blobs, blob)
    data = bytearray(log.store.read(ref.key))
    data[-1] ^= 1
    log.store.write(ref.key, bytes(data))
    with pytest.raises(CorruptObject, match="sha256"):
        online.step(open_run(make_url("inbox"), registry))
    assert keys(make_url("inbox")) == ["00.parquet"]


def test_a_manifest_of_a_newer_format_is_refused(memory_registry: str, memory_url: MakeUrl) -> None:
    store = open_store(memory_registry)
    major, minor = FORMAT.split(".")
    newer = f"{major}.{int(minor) + 1}"
    fields = json.loads(store.read("model/log/00000000.json"))
    store.write("model/log/00000000.json", json.dumps(fields | {"format": newer}).encode())
    with pytest.raises(UnsupportedFormat, match="Upgrade"):
        open_run(memory_url("inbox"), memory_registry)


def test_an_error_leaves_nothing_half_trained_in_memory(memory_registry: str, memory_url: MakeUrl) -> None:
    """The store fails when the manifest is written: the next step starts from the head and gets the same bits."""
    put(memory_url("inbox"), days(2))
    failures: Iterator[None] = iter([None])

    def fail_once(call: Call) -> None:
        if call.verb == "create" and "/log/" in call.key and call.phase == "before" and next(failures, 1) is None:
            raise PermissionDenied("no")

    run = open_run(memory_url("inbox"), memory_registry, lambda url: FaultStore(open_store(url), fail_once))
    with pytest.raises(PermissionDenied):
        online.step(run)
    drain(run)
    begin(memory_url("clean/registry"), memory_url("clean/dataset"))
    put(memory_url("clean/inbox"), days(2))
    drain(open_run(memory_url("clean/inbox"), memory_url("clean/registry")))
    digests = {
        open_log(url, "model").head().manifest.blobs.state.sha256
        for url in (memory_registry, memory_url("clean/registry"))
    }
    assert len(digests) == 1


def test_a_changed_environment_is_said(memory_registry: str, memory_url: MakeUrl, caplog) -> None:
    put(memory_url("inbox"), days(1))
    log = open_log(memory_registry, "model")
    manifest = log.head().manifest
    other = manifest.model_dump(include={"kind", "spec", "blobs"}) | {
        "environment": {**manifest.environment, "torch": "1.0"}
    }
    log.commit(log.head(), Entry.model_validate(other))
    with caplog.at_level(logging.WARNING):
        drain(open_run(memory_url("inbox"), memory_registry))
    assert "bits may differ" in caplog.text


def test_the_report_says_since_when_the_oldest_waits(memory_registry: str, memory_url: MakeUrl) -> None:
    before = datetime.datetime.now(datetime.UTC)
    put(memory_url("inbox"), {"a.parquet": b"PAR1 half"})
    report = drain(open_run(memory_url("inbox"), memory_registry, grace_seconds=3600))
    assert report.waiting == 1
    assert report.oldest_waiting is not None
    assert before - datetime.timedelta(seconds=2) <= report.oldest_waiting
    assert json.loads(report.model_dump_json())["waiting"] == 1


def test_a_model_whose_code_changed_is_refused(memory_registry: str, memory_url: MakeUrl) -> None:
    log = open_log(memory_registry, "model")
    manifest = log.head().manifest
    spec = manifest.spec | {"model": {"factory": "mlp", "arguments": {"hidden": [4]}}}
    log.commit(log.head(), Entry.model_validate(manifest.model_dump(include={"kind", "blobs"}) | {"spec": spec}))
    with pytest.raises(StateMismatch):
        online.step(open_run(memory_url("inbox"), memory_registry))


# ---- a history that goes while a run is under way -----------------------------------------------------------------------
def remove_and_begin_anew(registry: str, dataset: str) -> None:
    store = open_store(registry)
    for key in keys(registry):
        store.delete(key)
    begin(registry, dataset)


@pytest.mark.parametrize("after_commit", ["delete", "archive"])
def test_a_follower_of_a_history_that_was_begun_anew_stops_and_removes_nothing(
    registry: str, make_url: MakeUrl, after_commit: str
) -> None:
    settings = {"after_commit": {"archive_to": make_url("archive")}} if after_commit == "archive" else {}
    run = open_run(make_url("inbox"), registry, limits={"max_shards": 1}, **settings)
    put(make_url("inbox"), days(3))
    drain(run)
    remove_and_begin_anew(registry, make_url("dataset"))
    before = keys(registry)
    put(make_url("inbox"), days(2, start=3))
    with pytest.raises(CorruptObject, match="removed, restored or begun anew"):
        online.step(run)
    assert keys(make_url("inbox")) == ["03.parquet", "04.parquet"]
    assert keys(registry) == before, "neither an orphan nor its blobs"

    drain(run)  # asked again, it goes on from what is there
    log = open_log(registry, "model")
    assert [s.key for n in (1, 2) for s in log.version(n).manifest.consumed] == ["03.parquet", "04.parquet"]


def test_shards_put_again_for_a_model_that_was_begun_anew_are_no_duplicates(registry: str, make_url: MakeUrl) -> None:
    run = open_run(make_url("inbox"), registry)
    put(make_url("inbox"), days(2))
    drain(run)
    remove_and_begin_anew(registry, make_url("dataset"))
    put(make_url("inbox"), days(2))
    with pytest.raises(CorruptObject, match="removed, restored or begun anew"):
        drain(run)
    assert keys(make_url("inbox")) == ["00.parquet", "01.parquet"]
    assert drain(run).shards == 4, "two of each history"


def test_debts_of_a_history_that_is_gone_are_not_paid(
    memory_registry: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "DISPOSE_AGAIN_SECONDS", -1.0)
    inbox = memory_url("inbox")
    deny = Deny(inbox, "delete")
    run = open_run(inbox, memory_registry, hooked(deny))
    put(inbox, days(1))
    drain(run)
    remove_and_begin_anew(memory_registry, memory_url("dataset"))
    deny.denied = False
    with pytest.raises(CorruptObject, match="removed, restored or begun anew"):
        online.step(run)
    assert keys(inbox) == ["00.parquet"]


def test_what_another_run_committed_is_made_durable_before_its_debts_are_paid(registry: str, make_url: MakeUrl) -> None:
    calls: list[Call] = []
    inbox = make_url("inbox")
    put(inbox, days(2))
    other = open_run(inbox, registry, hooked(Deny(open_store(inbox).url, "delete")), limits={"max_shards": 1})
    assert online.step(other).outcome is Outcome.COMMITTED
    run = open_run(inbox, registry, hooked(calls.append), limits={"max_shards": 1})
    online.step(run)
    log_key = "model/log/00000001.json"
    verbs = [
        (call.verb, call.key) for call in calls if call.phase == "before" and call.verb in ("make_durable", "delete")
    ]
    first = verbs.index(("delete", "00.parquet"))
    assert ("make_durable", log_key) in verbs[:first]


@pytest.mark.parametrize(("lost", "champion"), [(1, "move"), (2, "score")], ids=["the alias tells", "blobs tell"])
def test_a_registry_restored_from_an_older_log_is_noticed(
    registry: str, make_url: MakeUrl, lost: int, champion: str
) -> None:
    put(make_url("inbox"), days(3))
    drain(open_run(make_url("inbox"), registry, limits={"max_shards": 1}, gate={"champion": champion}))
    log = open_log(registry, "model")
    head = log.head().number
    assert audit(log).findings == []
    for number in range(head, head - lost, -1):
        log.store.delete(f"model/log/{number:08d}.json")
    [finding] = [found for found in audit(log).findings if "there were more" in found]
    assert re.search(rf"ends with version {head - lost}, but .*Their shards have left the inbox", finding)
    facts, words = views.status(look(log, behind_seconds=900))
    assert facts.lost_versions == [finding]
    assert finding in words


# ---- only in places that the run knows -----------------------------------------------------------------------------------
def test_a_forged_debt_is_carried_on_named_and_paid_only_where_it_is_allowed(
    registry: str, make_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, inbox = open_store(make_url("victim")), make_url("inbox")
    victim.write("precious.db", b"precious")
    log = open_log(registry, "model")
    manifest = log.head().manifest
    debt = Owed(
        inbox=victim.url,
        key="precious.db",
        sha256=sha256(b"precious"),
        etag=victim.stat("precious.db").etag,
        action="delete",
    )
    log.store.write("model/log/00000000.json", encode(manifest.model_copy(update={"owed": (debt,)})))
    put(inbox, days(2))
    run = open_run(inbox, registry, limits={"max_shards": 1})
    assert drain(run).shards == 2, "never fatal"
    assert keys(victim.url) == ["precious.db"]
    assert log.head().manifest.owed[0] == debt, "carried on"
    facts, words = views.status(look(log, behind_seconds=900))
    assert facts.owed_in[victim.url] == 1
    assert f"1 removal in {victim.url}" in words

    monkeypatch.setenv("TIDEMILL_PLACES", f"memory://other, {victim.url}")
    drain(open_run(inbox, registry))
    assert keys(victim.url) == []


def test_denied_deletes_do_not_cost_the_square_of_their_number(memory_registry: str, memory_url: MakeUrl) -> None:
    calls: list[Call] = []
    inbox = memory_url("inbox")
    put(inbox, days(12))
    hook = together(calls.append, Deny(open_store(inbox).url, "delete"))
    run = open_run(inbox, memory_registry, hooked(hook), limits={"max_shards": 1})
    report = drain(run)
    assert (report.shards, report.owed) == (12, 12)
    deletes = [call for call in calls if call.verb == "delete" and call.key.endswith(".parquet")]
    assert len(deletes) == 12, "each is tried once, and all of them again after a while"


def test_what_can_be_no_shard_is_passed_over_counted_named_once_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(str(tmp_path / "registry"), str(tmp_path / "dataset"))
    inbox = tmp_path / "inbox"
    put(str(inbox), days(2))
    (tmp_path / "outside.parquet").write_bytes(b"secret")
    (inbox / "link.parquet").symlink_to(tmp_path / "outside.parquet")
    (inbox / "loop.parquet").symlink_to("loop.parquet")
    (inbox / ".hidden").symlink_to("nowhere")
    os.mkfifo(inbox / "pipe.parquet")
    run = open_run(str(inbox), str(tmp_path / "registry"), limits={"max_shards": 1})
    report = drain(run)
    assert (report.shards, report.rejected, report.passed_over) == (2, 0, 3)
    assert caplog.text.count("link.parquet is passed over") == 1
    found = look(open_log(str(tmp_path / "registry"), "model"), open_inbox(str(inbox)), behind_seconds=900)
    facts, words = views.status(found)
    assert set(facts.passed_over) == {"link.parquet", "loop.parquet", "pipe.parquet"}
    assert "passed over: 3 entries" in words
    assert sorted(path.name for path in inbox.iterdir() if path.name.endswith(".parquet")) == [
        "link.parquet",
        "loop.parquet",
        "pipe.parquet",
    ]

"""What is selected: nothing hides what is younger, what a trigger has read is not read again, what cannot be read is told."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data import keys, parquet, put, rows
from tests.storage.faults import Call, hooked
from tests.tasks.online.test_step import begin, days, drain, open_run
from tidemill.storage.errors import PermissionDenied
from tidemill.storage.urls import open_store
from tidemill.tasks.online import selection
from tidemill.tasks.online.step import Outcome, step

MakeUrl = Callable[[str], str]


@pytest.fixture
def registry(make_url: MakeUrl) -> str:
    begin(make_url("registry"), make_url("dataset"))
    return make_url("registry")


def test_shards_that_are_not_whole_do_not_hide_younger_ones(
    registry: str, make_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LISTED_AHEAD", 2)
    put(make_url("inbox"), {f"0{i}.parquet": b"PAR1 half" for i in range(5)})
    put(make_url("inbox"), days(1, start=7))
    report = drain(open_run(make_url("inbox"), registry, grace_seconds=3600))
    assert (report.shards, report.waiting) == (1, 5)


def test_kept_shards_with_new_etags_do_not_hide_new_ones_and_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup was put back over the inbox: the same bytes, other inodes and times."""
    monkeypatch.setattr(selection, "LISTED_AHEAD", 2)
    inbox, registry = tmp_path / "inbox", str(tmp_path / "registry")
    inbox.mkdir()
    begin(registry, str(tmp_path / "dataset"))
    put(str(inbox), days(5))
    drain(open_run(str(inbox), registry, after_commit="keep"))
    for path in sorted(inbox.glob("*.parquet")):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    put(str(inbox), days(2, start=7))
    read: Counter[str] = Counter()

    def note(call: Call) -> None:
        if (call.verb, call.phase) == ("read", "after") and call.url.endswith("/inbox"):
            read[call.key] += 1

    run = open_run(str(inbox), registry, hooked(note), after_commit="keep", limits={"max_shards": 1})
    assert drain(run).shards == 2
    assert drain(run).shards == 2
    assert read == {f"{i:02}.parquet": 1 for i in (0, 1, 2, 3, 4, 7, 8)}


def denied(*denied_keys: str) -> Callable[[Call], None]:
    def hook(call: Call) -> None:
        if call.verb == "read" and call.phase == "before" and call.key in denied_keys:
            raise PermissionDenied(f"not allowed to read {call.key}")

    return hook


def test_an_object_that_cannot_be_read_is_passed_over_counted_and_named_once(
    registry: str, make_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    put(make_url("inbox"), days(3))
    run = open_run(make_url("inbox"), registry, hooked(denied("01.parquet")))
    report = drain(run)
    assert (report.shards, report.rejected, report.waiting, report.passed_over) == (2, 0, 1, 1)
    ((url, reason),) = report.last_passed_over.items()
    assert url.endswith("/inbox/01.parquet")
    assert reason == "not allowed to read 01.parquet"
    assert not run.poll(), "a follower does not wake for it"
    assert run.report.passed_over == 1
    assert step(run).outcome is Outcome.IDLE
    told = [r for r in caplog.records if r.levelno == logging.WARNING and "is passed over" in r.getMessage()]
    assert len(told) == 1
    assert keys(make_url("inbox")) == ["01.parquet"]
    assert drain(open_run(make_url("inbox"), registry)).shards == 1, "once it can be read, it is trained on"


def test_labels_that_cannot_be_read_leave_their_features_waiting(memory_url: MakeUrl) -> None:
    begin(memory_url("registry"), memory_url("dataset"))
    for i in range(2):
        table = rows(30, i).append_column("id", [list(range(30))])
        put(memory_url("inbox"), {f"{i}.parquet": table.drop_columns("y")})
        put(memory_url("labels"), {f"{i}.parquet": table.select(["y", "id"])})
    labels = open_store(memory_url("labels")).url

    def hook(call: Call) -> None:
        if call.url == labels:
            denied("0.parquet")(call)

    settings = {"labels": {"inbox": memory_url("labels"), "key": "id"}}
    report = drain(open_run(memory_url("inbox"), memory_url("registry"), hooked(hook), **settings))
    assert (report.shards, report.passed_over) == (1, 1)
    assert drain(open_run(memory_url("inbox"), memory_url("registry"), **settings)).shards == 1


def test_what_is_too_large_is_counted_too(memory_url: MakeUrl) -> None:
    begin(memory_url("registry"), memory_url("dataset"))
    put(memory_url("inbox"), days(1) | {"00a.parquet": rows(5000, 3)})
    run = open_run(memory_url("inbox"), memory_url("registry"), limits={"max_shard_bytes": 20_000})
    report = drain(run)
    assert report.passed_over == 1
    ((url, reason),) = report.last_passed_over.items()
    assert url.endswith("00a.parquet")
    assert "limits.max_shard_bytes" in reason


@pytest.mark.parametrize("trigger", [{"score_drop": 100.0}, {"score_drop": 1e9, "min_bytes": 10**9}])
def test_what_a_trigger_has_read_is_not_read_again(trigger: dict[str, float], registry: str, make_url: MakeUrl) -> None:
    """Over several looks, too: a shard that waits is fetched once in all, and trained on as it was read."""
    put(make_url("inbox"), days(1))
    drain(open_run(make_url("inbox"), registry))
    put(make_url("inbox"), days(3, start=2))
    read: Counter[str] = Counter()

    def note(call: Call) -> None:
        if (call.verb, call.phase) == ("read", "after") and call.key.endswith(".parquet"):
            read[call.key] += 1

    run = open_run(make_url("inbox"), registry, hooked(note), train_when=trigger)
    for _ in range(3):
        assert not run.poll()
    put(make_url("inbox"), {"09.parquet": parquet(rows(2000, 1, slope=-1e12))})
    while step(run).outcome is not Outcome.IDLE:
        pass
    assert run.report.shards == 4
    assert read == dict.fromkeys(["02.parquet", "03.parquet", "04.parquet", "09.parquet"], 1)

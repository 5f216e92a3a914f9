"""`drain` and `follow` in plain Python: no Prefect, a store that is away is tried again, a signal ends it after the step."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from tests.data import keys, put, rows
from tests.storage.faults import Call, hooked
from tests.tasks.online.test_step import begin, days
from tidemill.storage.errors import PermissionDenied, PlacesOverlap, Unavailable, UnknownModel
from tidemill.storage.log import open_log
from tidemill.tasks import retrying
from tidemill.tasks.online import drain, follow
from tidemill.tasks.settings import Archive, GateSettings, Limits, OnlineSettings, Retrain

MakeUrl = Callable[[str], str]
PATIENT = OnlineSettings(poll_seconds=0.01)


@pytest.fixture
def registry(make_url: MakeUrl) -> str:
    begin(make_url("registry"), make_url("dataset"))
    return make_url("registry")


@pytest.fixture
def memory_registry(memory_url: MakeUrl) -> str:
    begin(memory_url("registry"), memory_url("dataset"))
    return memory_url("registry")


def test_drain_trains_on_all_that_is_there(registry: str, make_url: MakeUrl) -> None:
    put(make_url("inbox"), days(3))
    report = drain(make_url("inbox"), registry, "model", OnlineSettings(limits=Limits(max_shards=2)))
    assert (report.shards, report.versions, report.head, keys(make_url("inbox"))) == (3, 2, 2, [])


def test_drain_is_drain_whatever_the_mode_says(memory_registry: str, memory_url: MakeUrl) -> None:
    put(memory_url("inbox"), days(1))
    assert drain(memory_url("inbox"), memory_registry, "model", OnlineSettings(mode="follow")).shards == 1


def test_follow_trains_on_what_arrives_until_it_is_told_to_stop(registry: str, make_url: MakeUrl) -> None:
    """The second shard arrives when an empty inbox is looked at, the signal when the second commit's delete is done."""
    put(make_url("inbox"), days(1))
    arrived: list[None] = []

    def hook(call: Call) -> None:
        if call.phase != "after":
            return
        if call.verb == "delete" and call.key == "01.parquet":
            signal.raise_signal(signal.SIGTERM)
        if call.verb == "list" and call.key == "" and not keys(make_url("inbox")) and not arrived:
            arrived.append(put(make_url("inbox"), days(1, start=1)))

    before = signal.getsignal(signal.SIGTERM)
    report = follow(make_url("inbox"), registry, "model", PATIENT, stores=hooked(hook, concurrency=1))
    assert (report.shards, report.versions, keys(make_url("inbox"))) == (2, 2, [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_follow_ends_when_its_time_is_up(memory_registry: str, memory_url: MakeUrl) -> None:
    """In a thread, too, which gets no signals."""
    settings = PATIENT.model_copy(update={"stop_after_seconds": 0.2})
    put(memory_url("inbox"), days(1))
    reports: list[int] = []
    thread = threading.Thread(
        target=lambda: reports.append(follow(memory_url("inbox"), memory_registry, "model", settings).shards)
    )
    thread.start()
    thread.join(60)
    assert reports == [1]


def test_a_store_that_is_away_is_tried_again(
    memory_registry: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retrying, "BACKOFF_SECONDS", 0.001)
    put(memory_url("inbox"), days(2))
    left = ["create", "write", "list"]

    def away(call: Call) -> None:
        if call.phase == "before" and left and call.verb == left[-1]:
            left.pop()
            raise Unavailable("away")

    report = drain(memory_url("inbox"), memory_registry, "model", stores=hooked(away))
    assert (report.shards, left) == (2, [])
    assert caplog.text.count("to be tried again: away") == 3


@pytest.mark.parametrize("error", [PermissionDenied("no"), ValueError("no")])
def test_no_other_error_is(error: Exception, memory_registry: str, memory_url: MakeUrl) -> None:
    put(memory_url("inbox"), days(1))
    calls: list[str] = []

    def fail(call: Call) -> None:
        if call.phase == "before" and call.verb == "create" and "/log/" in call.key:
            calls.append(call.key)
            raise error

    with pytest.raises(type(error)):
        drain(memory_url("inbox"), memory_registry, "model", stores=hooked(fail))
    assert len(calls) == 1


def test_too_many_refusals_retrain_on_the_dataset_with_the_archive(memory_registry: str, memory_url: MakeUrl) -> None:
    """Through the same stores as everything else."""
    put(memory_url("inbox"), {f"{i}.parquet": rows(40, i, slope=-50.0) for i in range(4)})
    put(memory_url("holdout"), {"part-0.parquet": rows(100, 9)})
    refusals = {"holdout_dataset": memory_url("holdout"), "refusals": 2, "tolerance": 0.0}
    settings = OnlineSettings(
        limits=Limits(max_shards=1),
        after_commit=Archive(archive_to=memory_url("dataset") + "/archive"),
        gate=GateSettings(**refusals, after_refusals=Retrain(retrain_on=memory_url("dataset"))),
    )
    urls: set[str] = set()
    stores = hooked(lambda call: urls.add(call.url))
    assert drain(memory_url("inbox"), memory_registry, "model", settings, stores=stores).refused >= 2
    log = open_log(memory_registry, "model")
    kinds = [version.manifest.kind for version in log.history(log.head())][::-1]
    assert kinds.index("batch", 1) == 3, "0 batch, two refused, then a batch training"
    assert {memory_url("dataset"), memory_url("holdout")} <= urls


def test_retraining_leaves_out_a_holdout_inside_its_dataset(memory_registry: str, memory_url: MakeUrl) -> None:
    dataset, holdout = memory_url("dataset"), memory_url("dataset") + "/holdout"
    put(memory_url("inbox"), {f"{i}.parquet": rows(40, i, slope=-50.0) for i in range(2)})
    put(holdout, {"part-0.parquet": rows(100, 9)})
    gate = {"holdout_dataset": holdout, "refusals": 2, "tolerance": 0.0, "after_refusals": {"retrain_on": dataset}}
    settings = {"limits": {"max_shards": 1}, "after_commit": {"archive_to": f"{dataset}/archive"}, "gate": gate}
    drain(memory_url("inbox"), memory_registry, "model", OnlineSettings.model_validate(settings))
    manifest = open_log(memory_registry, "model").head().manifest
    assert (manifest.kind, manifest.metrics["holdout_rows"]) == ("batch", 100)
    assert manifest.dataset is not None
    assert manifest.dataset.rows == 200 + 2 * 40
    gate["holdout_dataset"] = dataset
    with pytest.raises(PlacesOverlap, match="nothing would be left to train on"):
        drain(memory_url("inbox"), memory_registry, "model", OnlineSettings.model_validate(settings))


def test_an_unknown_model_is_said_at_once(memory_registry: str, memory_url: MakeUrl) -> None:
    with pytest.raises(UnknownModel):
        drain(memory_url("inbox"), memory_registry, "modle")


@pytest.mark.slow
def test_importing_the_doors_folder_is_light_and_the_doors_need_no_prefect() -> None:
    code = (
        "import sys, tidemill.tasks.online; assert not {'torch', 'pyarrow', 'prefect'} & set(sys.modules); "
        "from tidemill.tasks.online import drain, follow; assert 'prefect' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

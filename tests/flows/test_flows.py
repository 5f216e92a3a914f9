"""The flows, called from Python as a user would."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import ParameterTypeError
from prefect.states import Failed

from tests.flows.conftest import Place
from tests.flows.data import SPEC_FIELDS, parquet
from tests.guarantees.audit import audit
from tests.s3_server import wait_until
from tidemill.flows.batch import batch_training
from tidemill.flows.maintenance import maintenance
from tidemill.flows.online import online_training
from tidemill.storage.aliases import all_aliases
from tidemill.storage.errors import StoreNotFound, Unavailable, UnknownModel
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import wrappers
from tidemill.tasks.batch import VersionInfo
from tidemill.tasks.errors import GateClosed
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.settings import BatchSettings, GateSettings, OnlineSettings, Retrain

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.xdist_group("flows")]  # one worker, one server

local_and_s3 = pytest.mark.parametrize("make_url", ["local", "s3"], indirect=True)
memory = pytest.mark.parametrize("make_url", ["memory"], indirect=True)
local = pytest.mark.parametrize("make_url", ["local"], indirect=True)


def train(place: Place) -> VersionLog:
    """A place's model at version 0."""
    batch_training(place.dataset, place.registry, "model", place.spec)
    return open_log(place.registry, "model")


@local_and_s3
def test_batch_then_online(place: Place) -> None:
    """The main job: train from a dataset, then from the shards that arrive."""
    info = batch_training(place.dataset, place.registry, "model", place.spec, BatchSettings(holdout=0.2))
    assert isinstance(info, VersionInfo)
    assert (info.model, info.version, info.trained) == ("model", 0, True)
    assert info.metrics["holdout"]["loss"] < 0.1

    shards = place.drop("first.parquet", "second.parquet", "sub/third.parquet")
    report = online_training(place.inbox, place.registry, "model", OnlineSettings(limits={"max_shards": 2}))
    assert isinstance(report, OnlineReport)
    assert (report.first_version, report.head, report.versions) == (1, 2, 2)
    assert (report.shards, report.rows, report.rejected) == (3, 150, 0)
    assert report.score["loss"] < 0.1

    assert place.inbox_keys() == []
    log = open_log(place.registry, "model")
    audit(log, shards.items())
    assert all_aliases(log) == {"champion": 2}


@memory
def test_the_same_batch_run_again_returns_its_version(place: Place) -> None:
    first = batch_training(place.dataset, place.registry, "model", place.spec)
    again = batch_training(place.dataset, place.registry, "model", place.spec)
    assert again == first.model_copy(update={"trained": False, "notes": again.notes})

    other = batch_training(place.dataset, place.registry, "model", place.spec.model_copy(update={"seed": 1}))
    assert (other.version, other.trained) == (1, True)


@memory
def test_shards_are_archived_for_the_next_batch_run(place: Place) -> None:
    log = train(place)
    shards = place.drop("a.parquet", "b.parquet")
    settings = OnlineSettings(after_commit={"archive_to": f"{place.dataset}/archive"})
    online_training(place.inbox, place.registry, "model", settings)
    assert place.inbox_keys() == []
    again = batch_training(place.dataset, place.registry, "model", place.spec)
    assert (again.version, again.trained) == (2, True)
    dataset = log.head().manifest.dataset
    assert dataset is not None
    assert (dataset.files, dataset.rows) == (4, 500)
    audit_counts = [shard.key for version in log.history(log.head()) for shard in version.manifest.consumed]
    assert sorted(audit_counts) == sorted(shards)


@memory
def test_versions_that_are_refused_lead_to_a_batch_training(place: Place) -> None:
    """Opposite labels: two versions are refused, the model is trained anew, and the run goes on from there."""
    log = train(place)
    open_store(f"{place.archive}/holdout").write("part.parquet", parquet(100, seed="holdout"))
    for name in ("a", "b", "c"):
        open_store(place.inbox).write(f"{name}.parquet", parquet(50, seed=name, sign=-1))
    settings = OnlineSettings(
        limits={"max_shards": 1},
        gate=GateSettings(
            holdout_dataset=f"{place.archive}/holdout",
            refusals=2,
            after_refusals=Retrain(retrain_on=place.dataset),
        ),
        after_commit={"archive_to": f"{place.dataset}/archive"},
    )
    online_training(place.inbox, place.registry, "model", settings)
    history = [version.manifest for version in log.history(log.head())][::-1]
    assert [manifest.kind for manifest in history] == ["batch", "online", "online", "batch", "online"]
    assert history[3].dataset is not None
    assert history[3].dataset.files == 4
    assert all_aliases(log)["champion"] in (3, 4)
    assert place.inbox_keys() == []


@memory
def test_retraining_on_the_same_data_is_no_way_out(place: Place) -> None:
    spec = place.spec.model_copy(update={"task": "regression"})  # left open, a retraining would settle it: another run
    batch_training(place.dataset, place.registry, "model", spec)
    log = open_log(place.registry, "model")
    open_store(f"{place.archive}/holdout").write("part.parquet", parquet(100, seed="holdout"))
    open_store(place.inbox).write("a.parquet", parquet(50, seed="a", sign=-1))
    settings = OnlineSettings(
        gate=GateSettings(
            holdout_dataset=f"{place.archive}/holdout",
            refusals=1,
            after_refusals=Retrain(retrain_on=place.dataset),
        )
    )
    with pytest.raises(GateClosed, match="was trained on before, as version 0, with this spec"):
        online_training(place.inbox, place.registry, "model", settings)
    assert log.head().number == 1


@memory
def test_an_empty_inbox_is_skipped(place: Place) -> None:
    """The state has a name that stands out in the list of runs, and the caller gets its report all the same."""
    train(place)
    state = online_training(place.inbox, place.registry, "model", return_state=True)
    assert (state.name, state.is_completed()) == ("Skipped", True)
    report = online_training(place.inbox, place.registry, "model")
    assert (report.head, report.versions, report.first_version) == (0, 0, None)


@memory
def test_follow_stops_after_the_time_given(place: Place) -> None:
    log = train(place)
    shards = place.drop("a.parquet")
    settings = OnlineSettings(mode="follow", poll_seconds=0.1, stop_after_seconds=1.5)
    began = time.monotonic()
    report = online_training(place.inbox, place.registry, "model", settings)
    assert 1.5 <= time.monotonic() - began < 30
    assert report.shards == 1
    audit(log, shards.items())


@memory
def test_follow_picks_up_what_arrives_and_stops_on_a_signal(place: Place) -> None:
    log = train(place)
    shards = place.drop("a.parquet")

    def drop_then_stop() -> None:
        wait_until(lambda: log.head().number == 1, seconds=60, what="version 1")
        shards.update(place.drop("b.parquet"))
        wait_until(lambda: log.head().number == 2, seconds=60, what="version 2")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=drop_then_stop)
    thread.start()
    settings = OnlineSettings(mode="follow", poll_seconds=0.05, stop_after_seconds=120)
    report = online_training(place.inbox, place.registry, "model", settings)
    thread.join()
    assert (report.versions, report.shards) == (2, 2)
    audit(log, shards.items())


@memory
def test_waiting_leaves_no_trace_in_prefect(place: Place) -> None:
    """A follower looks all day: only steps that had something to look at are task runs."""
    train(place)
    settings = OnlineSettings(mode="follow", poll_seconds=0.01, stop_after_seconds=1)
    state = online_training(place.inbox, place.registry, "model", settings, return_state=True)
    assert state.state_details.flow_run_id is not None
    found = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))

    def task_runs() -> list[TaskRun]:
        with get_client(sync_client=True) as client:
            return client.read_task_runs(flow_run_filter=found)

    wait_until(lambda: len(task_runs()) >= 2, seconds=30, what="Prefect's record of the task runs")
    assert sorted(run.name for run in task_runs()) == ["model: open inbox", "model: to version 1"]


@local
def test_sigterm_ends_follow_after_the_step_in_hand(place: Place, tmp_path: Path) -> None:
    """As a service manager stops it: exit code 0, a report, and every shard so far consumed exactly once."""
    log = train(place)
    shards = place.drop(*(f"{i:02}.parquet" for i in range(40)))
    command = [sys.executable, "-m", "tidemill", "follow", place.inbox, place.registry, "model", "--json"]
    with (tmp_path / "errors").open("wb") as errors:
        child = subprocess.Popen([*command, "--limits.max-shards", "1"], stdout=subprocess.PIPE, stderr=errors)
    try:
        wait_until(lambda: log.head().number > 0 or child.poll() is not None, seconds=90, what="the first commit")
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0, (tmp_path / "errors").read_text()
    report = OnlineReport.model_validate(json.loads(output))
    assert report.versions == report.shards == report.head == log.head().number
    left = place.inbox_keys()
    assert len(left) == 40 - report.shards
    audit(log, ((key, data) for key, data in shards.items() if key not in left))


@memory
def test_maintenance_removes_blobs_out_of_retention(place: Place) -> None:
    log = train(place)
    place.drop("a.parquet", "b.parquet", "c.parquet")
    online_training(
        place.inbox, place.registry, "model", OnlineSettings(limits={"max_shards": 1}, gate={"champion": "score"})
    )
    removed = maintenance(place.registry, "model", keep=1)
    assert removed == 2 * 2  # versions 1 and 2; 0 is the champion and 3 the head
    assert [version.number for version in log.history(log.head())] == [3, 2, 1, 0]
    blobs = {info.key.split("/")[-1][:8] for info in log.store.list("model/blobs/")}
    assert blobs == {"00000000", "00000003"}


# ---- what is refused -------------------------------------------------------------------------------------------------
@memory
def test_a_wrong_setting_is_refused_by_name(place: Place) -> None:
    with pytest.raises(ParameterTypeError, match=r"spec\.epochs"):
        batch_training(place.dataset, place.registry, "model", SPEC_FIELDS | {"epochs": 0})  # type: ignore[arg-type]
    with pytest.raises(ParameterTypeError, match=r"settings\.max_shard\b"):
        online_training(place.inbox, place.registry, "model", {"max_shard": 5})  # type: ignore[arg-type]
    with pytest.raises(ParameterTypeError, match="after_commit"):
        online_training(place.inbox, place.registry, "model", {"after_commit": "archive"})  # type: ignore[arg-type]


@memory
def test_settings_may_be_plain_mappings(place: Place) -> None:
    """As deployments give them."""
    info = batch_training(place.dataset, place.registry, "model", SPEC_FIELDS, {"holdout": 0})  # type: ignore[arg-type]
    assert info.metrics["holdout_rows"] == 0


@memory
def test_a_model_that_does_not_exist(place: Place) -> None:
    """A wrong name is never a fresh start; the error reaches the caller as it was raised."""
    with pytest.raises(UnknownModel, match="holds no model 'model'"):
        online_training(place.inbox, place.registry, "model")
    with pytest.raises(StoreNotFound):
        batch_training("/no/such/folder", place.registry, "model", place.spec)


# ---- retries ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("error", "retried"), [(Unavailable("away"), True), (ValueError("wrong"), False)])
def test_only_a_store_that_was_away_is_tried_again(error: Exception, retried: bool) -> None:
    calls = []

    def work() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return "done"

    task = wrappers._task(work, "work", "work").with_options(retry_delay_seconds=0)

    @flow
    def run() -> str:
        return task()

    if retried:
        assert run() == "done"
    else:
        with pytest.raises(ValueError, match="wrong"):
            run()
    assert len(calls) == 1 + retried


def test_every_task_tries_again_and_stores_nothing() -> None:
    online = wrappers.online_steps
    tasks = (*vars(wrappers.batch_steps).values(), online.open_run, online.step, wrappers.collect_garbage)
    for task in tasks:
        assert task.retries == 3
        assert task.retry_delay_seconds == [10, 20, 40]
        assert task.retry_condition_fn is wrappers._may_pass
        assert task.persist_result is False
    state = Failed(data=Unavailable("away"))
    assert wrappers._may_pass(online.step, None, state)  # type: ignore[arg-type]


@memory
def test_runs_have_names(place: Place) -> None:
    train(place)
    with get_client(sync_client=True) as client:
        names = FlowRunFilter(name=FlowRunFilterName(any_=["train-model"]))
        assert client.read_flow_runs(flow_run_filter=names)

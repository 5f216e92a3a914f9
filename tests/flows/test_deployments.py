"""Deployments, end to end: a Prefect server, `prefect deploy`, a worker, S3, and schedules that make the runs."""

import datetime
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterName,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import Settings
from prefect.states import Completed

from tests.data import put
from tests.flows.conftest import Place
from tests.flows.data import OWN_MODEL, SPEC
from tests.flows.prefect_server import stop
from tests.guarantees.audit import audit
from tests.s3_server import wait_until
from tidemill.flows.online import online_training
from tidemill.flows.tenants import NotStarted, fan_out
from tidemill.storage.aliases import all_aliases
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.tenants.pairs import Pair, PairsError

pytestmark = pytest.mark.xdist_group("flows")  # one worker, one server

SHIPPED = Path(__file__).parents[2] / "prefect.yaml"
POOL = "tidemill"


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """A client of a server that has the work pool which `prefect.yaml` names, and no deployments once the test is over."""
    with get_client(sync_client=True) as opened:
        opened.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        yield opened
        for deployment in opened.read_deployments():
            opened.delete_deployment(deployment.id)


def deploy(folder: Path) -> None:
    """`prefect deploy --all` in a folder that holds nothing but a `prefect.yaml`."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@contextmanager
def worker(folder: Path) -> Iterator[None]:
    """A worker that is stopped at the end; what it and its runs print is in `worker.log`."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", "test"]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    with (folder / "worker.log").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=elsewhere, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        stop(process, signal.SIGINT)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a run that it had just started


def test_the_shipped_file_deploys_as_it_is(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Its parameters satisfy the flows' schemas, and Prefect understood what it says of schedules and limits."""
    shutil.copy(SHIPPED, tmp_path)
    deploy(tmp_path)
    found = {deployment.name: deployment for deployment in client.read_deployments()}
    assert set(found) == {"batch", "online", "follow", "ranks", "tenants", "tenant", "maintenance"}
    schedules = {"follow": [False], "ranks": [False], "tenants": [False], "tenant": []}
    for deployment in found.values():
        assert deployment.work_pool_name == POOL
        assert deployment.tags == ["tidemill"]
        assert deployment.entrypoint is not None
        assert deployment.entrypoint.startswith("tidemill.flows.")
        assert deployment.enforce_parameter_schema
        assert deployment.job_variables["env"]["PREFECT_LOGGING_EXTRA_LOGGERS"] == "tidemill"
        assert [schedule.active for schedule in deployment.schedules] == schedules.get(deployment.name, [True])
    new, waits = ConcurrencyLimitStrategy.CANCEL_NEW, ConcurrencyLimitStrategy.ENQUEUE
    limits = {"batch": (1, new), "online": (1, new), "follow": (1, waits), "ranks": (1, waits)}
    for name, (most, strategy) in (limits | {"tenants": (1, new), "tenant": (8, waits)}).items():
        limit, options = found[name].global_concurrency_limit, found[name].concurrency_options
        assert limit is not None
        assert options is not None
        assert (limit.limit, options.collision_strategy) == (most, strategy)
    assert found["maintenance"].global_concurrency_limit is None


def test_prefect_understands_what_the_docs_say_of_old_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (SHIPPED.parent / "docs" / "deployment.md").read_text()
    said = dict(re.findall(r"^ +export (PREFECT_SERVER_\w+)=(\S+)", text, re.MULTILINE))
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    server = Settings().server
    assert server.services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    assert server.services.db_vacuum.retention_period == datetime.timedelta(weeks=1)
    assert server.concurrency.lease_storage == said["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    importlib.import_module(server.concurrency.lease_storage)


@pytest.mark.parametrize("make_url", ["local"], indirect=True)
def test_of_many_models_each_that_has_something_to_do_gets_a_run_of_its_own_and_never_two(
    client: SyncPrefectClient, make_url: Callable[[str], str]
) -> None:
    client.create_deployment(
        flow_id=client.create_flow(online_training),
        name="tenant",
        work_pool_name=POOL,
        entrypoint="tidemill.flows.online.online_training",
    )
    registry = make_url("registry")
    pairs = [Pair(inbox=make_url(f"inbox/{name}"), registry=registry, model=name) for name in "abc"]
    pairs.append(Pair(inbox=make_url("inbox") + "/nowhere", registry=registry, model="d"))
    pairs.append(pairs[2].model_copy(update={"inbox": make_url("inbox/e"), "model": "e"}))
    for name in "ace":
        put(make_url(f"inbox/{name}"), {"1.parquet": b"a shard"})
    with pytest.raises(PairsError, match=r"^metrics_file all\.prom: each of these runs would write its own"):
        fan_out(pairs, settings=OnlineSettings(metrics_file="all.prom"))
    own = {"limits": {"max_shards": 3}}
    pairs[0] = pairs[0].model_copy(update={"settings": own})

    def runs() -> dict[str, FlowRun]:
        found = client.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["tenant"])))
        assert len({run.parameters["model"] for run in found}) == len(found)
        return {run.parameters["model"]: run for run in found}

    with pytest.raises(NotStarted, match=r"1 of 5 models could not be looked after: d: .*nowhere"):
        fan_out(pairs, settings=OnlineSettings(poll_seconds=7.0))
    assert set(runs()) == {"a", "c", "e"}
    settings = OnlineSettings.model_validate(runs()["a"].parameters["settings"])
    assert (settings.limits.max_shards, settings.poll_seconds) == (3, 7.0)
    client.set_flow_run_state(runs()["a"].id, Completed(), force=True)
    client.delete_flow_run(runs()["a"].id)
    put(make_url("inbox/b"), {"1.parquet": b"a shard"})
    assert fan_out(pairs[:3]) == ["a", "b"]  # c waits for a worker
    assert set(runs()) == {"a", "b", "c", "e"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
def test_schedules_run_both_pipelines(
    client: SyncPrefectClient, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = place.drop("a.parquet", "b.parquet", "sub/c.parquet")
    write_deployments(tmp_path, place)
    log = open_log(place.registry, "model")
    with worker(tmp_path):
        deploy(tmp_path)
        batch = client.read_deployment_by_name("batch-training/batch")
        online = client.read_deployment_by_name("online-training/online")

        run = scheduled_run(client, batch, tmp_path)
        assert run.state_name == "Completed"
        assert log.head().number == 0
        wait_until(lambda: "epoch 2 of 2" in messages(client, run), seconds=30, what="our progress in Prefect's log")

        # Before there is a model, an online run could only fail
        run = scheduled_run(client, online, tmp_path)
        assert run.state_name == "Completed"

    assert log.head().number >= 1
    assert place.inbox_keys() == []
    archive = open_store(place.archive)
    assert {info.key: archive.read(info.key) for info in archive.list()} == shards
    monkeypatch.syspath_prepend(tmp_path)  # the audit, which trains again, builds the model in this process
    monkeypatch.setenv("TIDEMILL_FACTORIES", "mymodel")
    audit(log, shards.items())
    assert all_aliases(log)["champion"] == log.head().number


def write_deployments(folder: Path, place: Place) -> None:
    """The shipped file with our URLs and spec, and schedules that are still inactive."""
    content: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    batch, online, *_ = content["deployments"]
    content["deployments"] = [batch, online]
    batch["parameters"] |= {
        "dataset": place.dataset,
        "registry": place.registry,
        "model": "model",
        "spec": SPEC.model_dump(mode="json") | {"model": {"factory": "mymodel:build"}},
    }
    online["parameters"] |= {"inbox": place.inbox, "registry": place.registry, "model": "model"}
    online["parameters"]["settings"] |= {"after_commit": {"archive_to": place.archive}, "limits": {"max_shards": 2}}
    for deployment in (batch, online):
        (schedule,) = deployment["schedules"]
        schedule["active"] = False
        deployment["work_pool"]["job_variables"]["env"] |= {"OMP_NUM_THREADS": "1", "TIDEMILL_FACTORIES": "mymodel"}
    (folder / "prefect.yaml").write_text(yaml.safe_dump(content))
    (folder / "mymodel.py").write_text(OWN_MODEL)


def scheduled_run(client: SyncPrefectClient, deployment: DeploymentResponse, folder: Path) -> FlowRun:
    """The first run of a deployment that ends in another way than by being cancelled in favour of one before it.

    Its schedule is active until then, with a run in 5 seconds; each one more that starts meanwhile costs seconds of a core.
    """
    soon = IntervalSchedule(
        interval=datetime.timedelta(seconds=30),
        anchor_date=datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5),
    )
    (schedule,) = deployment.schedules
    client.update_deployment_schedule(deployment.id, schedule.id, active=True, schedule=soon)
    of_it = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    ended: list[FlowRun] = []

    def has_ended() -> bool:
        runs = client.read_flow_runs(deployment_filter=of_it)
        ended[:] = [r for r in runs if r.state is not None and r.state.is_final() and not r.state.is_cancelled()]
        return bool(ended)

    try:
        wait_until(has_ended, seconds=120, what=f"a run of {deployment.name}")
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{(folder / 'worker.log').read_text()}") from None
    client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    run = min(ended, key=lambda r: r.expected_start_time or r.created or datetime.datetime.max)
    assert run.auto_scheduled
    assert run.state is not None
    assert run.state.is_completed(), f"{run.state}\n{(folder / 'worker.log').read_text()}"
    return run


def messages(client: SyncPrefectClient, run: FlowRun) -> str:
    """What a run has logged, as the UI shows it."""
    of_it = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    return "\n".join(record.message for record in client.read_logs(of_it))

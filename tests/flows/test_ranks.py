"""A flow run by several ranks: a work pool whose command is torchrun."""

import sys
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling

from tests.flows.conftest import Place
from tests.flows.data import SPEC
from tests.flows.test_deployments import SHIPPED, client, deploy, messages, worker
from tests.guarantees.audit import audit
from tests.guarantees.children import train
from tests.s3_server import wait_until
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import BatchSettings

__all__ = ["client"]  # a fixture
pytestmark = [pytest.mark.xdist_group("flows"), pytest.mark.ranks]
SECONDS: Final = 180.0


def write_deployment(folder: Path, place: Place) -> None:
    """The shipped deployment with our URLs, and this Python in its command."""
    content: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    (ranks,) = [each for each in content["deployments"] if each["name"] == "ranks"]
    ranks["parameters"] |= {"inbox": place.inbox, "registry": place.registry}
    ranks["parameters"]["settings"] = {"mode": "follow", "poll_seconds": 0.2}
    variables = ranks["work_pool"]["job_variables"]
    assert variables["command"].startswith("python -m torch.distributed.run ")
    variables["command"] = sys.executable + variables["command"].removeprefix("python")
    content["deployments"] = [ranks]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(content))


def ranks_of_runs() -> dict[int, psutil.Process]:
    """The ranks that this user's torchrun has started for flow runs of this test's server, and that live now."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            said = process.environ()
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
        if "TORCHELASTIC_RUN_ID" in said and "PREFECT__FLOW_RUN_ID" in said:
            found[int(said["RANK"])] = process
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
def test_a_flow_run_goes_on_after_its_leader_was_killed_and_cancelling_it_ends_all(
    client: SyncPrefectClient, place: Place, tmp_path: Path
) -> None:
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    log = open_log(place.registry, "model")
    shards = place.drop("a.parquet")
    write_deployment(tmp_path, place)
    with worker(tmp_path):
        deploy(tmp_path)
        deployment = client.read_deployment_by_name("online-training/ranks")
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"model": "model"})
        try:
            wait_until(lambda: log.head().number == 1, seconds=SECONDS, what="version 1")
            leader = ranks_of_runs()[0]
            leader.kill()
            wait_until(lambda: not leader.is_running(), seconds=10, what="its end")
            shards |= place.drop("b.parquet")
            wait_until(lambda: log.head().number == 2, seconds=SECONDS, what="version 2, by the same flow run")
            now = client.read_flow_run(run.id)
            assert now.state_type == StateType.RUNNING
            assert now.run_count == 2
            ranks = ranks_of_runs()
            assert set(ranks) == {0, 1}

            client.set_flow_run_state(run.id, Cancelling())
            wait_until(
                lambda: client.read_flow_run(run.id).state_type == StateType.CANCELLED,
                seconds=SECONDS,
                what="cancelled",
            )
            wait_until(lambda: not any(r.is_running() for r in ranks.values()), seconds=SECONDS, what="all have ended")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{(tmp_path / 'worker.log').read_text()[-6000:]}") from None
    assert "2 ranks train together" in messages(client, run)
    assert place.inbox_keys() == []
    audit(log, shards.items())

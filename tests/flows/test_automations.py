"""Automations on a real server: events reach a webhook, and an uploaded shard begins a run."""

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest
from prefect.automations import AutomationCore, EventTrigger
from prefect.client.orchestration import SyncPrefectClient, get_client

from tests.s3_server import wait_until
from tidemill.flows import automations, events
from tidemill.flows.events import resource
from tidemill.flows.online import online_training

SHORTEST: Final = timedelta(seconds=10)
"""Prefect takes no shorter time for what does not happen."""

pytestmark = pytest.mark.xdist_group("flows")


@contextmanager
def listening() -> Iterator[tuple[str, list[Any]]]:
    """(URL of a webhook, what was posted to it)."""
    heard: list[Any] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """A client of a server without automations, before and after."""
    with get_client(sync_client=True) as opened:
        yield opened
        for automation in opened.read_automations():
            opened.delete_automation(automation.id)


def post(api: str, event: str, about: dict[str, str], payload: dict[str, Any]) -> None:
    """What whoever has no Prefect sends."""
    sent = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": about,
        "payload": payload,
    }
    httpx.post(f"{api}/events", json=[sent], timeout=30).raise_for_status()


def test_a_rejected_shard_reaches_the_webhook(client: SyncPrefectClient, prefect_api: str) -> None:
    with listening() as (url, heard):
        names = automations.create(webhook=url, quiet_minutes=60)
        assert names == [
            "tidemill: shard rejected",
            "tidemill: version refused",
            "tidemill: inbox behind",
            "tidemill: no commit",
        ]
        assert automations.create(webhook=url, quiet_minutes=30) == names
        known = {automation.name: automation for automation in client.read_automations()}
        assert set(known) == set(names)
        assert known["tidemill: no commit"].description == "no commit for 30 minutes"
        about = {"key": 'odd "name".parquet', "reason": "torn"}

        def told() -> bool:  # the server takes a moment to know of an automation
            post(prefect_api, events.REJECTED, resource("s3://r", "m.1"), about)
            return bool(heard)

        wait_until(told, seconds=60, what="the webhook's call")
        assert heard[0] == {
            "automation": "tidemill: shard rejected",
            "model": "tidemill.model.m.1",
            "event": events.REJECTED,
            "payload": about,
        }


def test_a_model_that_has_committed_and_commits_nothing_more_reaches_the_webhook(
    client: SyncPrefectClient, prefect_api: str
) -> None:
    with listening() as (url, heard):
        automations.create(webhook=url, quiet_minutes=1)
        (quiet,) = client.read_automations_by_name("tidemill: no commit")
        assert isinstance(quiet.trigger, EventTrigger)
        assert quiet.trigger.within == timedelta(minutes=1)
        quiet.trigger.within = SHORTEST  # a minute is long
        sooner = AutomationCore(name=quiet.name, trigger=quiet.trigger, actions=quiet.actions)
        client.update_automation(quiet.id, sooner)
        posted = -math.inf

        def told() -> bool:
            nonlocal posted  # seldom, for a commit is what ends the quiet; and the server takes a moment to know of an automation
            if time.monotonic() > posted + 2 * SHORTEST.total_seconds():
                post(prefect_api, events.COMMITTED, resource("s3://r", "quiet"), {"version": 1})
                posted = time.monotonic()
            return bool(heard)

        wait_until(told, seconds=90, what="the webhook's call")
        assert time.monotonic() > posted + SHORTEST.total_seconds() - 1
        assert (heard[0]["automation"], heard[0]["model"]) == ("tidemill: no commit", "tidemill.model.quiet")


def test_an_uploaded_shard_begins_one_run_for_many(client: SyncPrefectClient, prefect_api: str) -> None:
    flow = client.create_flow(online_training)
    deployment = client.create_deployment(flow, name="woken", parameters={"inbox": "i", "registry": "r", "model": "m"})
    assert automations.create(wake="online-training/woken") == ["tidemill: wake online-training/woken"]

    def runs() -> int:
        return len([run for run in client.read_flow_runs() if run.deployment_id == deployment])

    def woken() -> bool:
        for number in range(5):
            post(prefect_api, events.UPLOADED, {"prefect.resource.id": "inbox.m"}, {"key": f"{number}.parquet"})
        return runs() > 0

    wait_until(woken, seconds=60, what="a run that the event has begun")
    assert runs() == 1
    client.delete_deployment(deployment)


@pytest.mark.usefixtures("client")
def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to do"):
        automations.create()
    with pytest.raises(ValueError, match="no deployment online-training/none"):
        automations.create(wake="online-training/none")
    with pytest.raises(ValueError, match="no block slack-webhook/none"):
        automations.create(notify="slack-webhook/none")

"""What Prefect is told of a run: events and artifacts. None of it can fail a run, hold it up, or fill the server."""

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import Artifact, TaskRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.flows.conftest import Place
from tests.flows.data import NOT_PARQUET
from tests.s3_server import wait_until
from tests.tasks.history.made import Story
from tidemill.flows import artifacts, events
from tidemill.flows.artifacts import KEPT, Artifacts, key_of
from tidemill.flows.batch import batch_training
from tidemill.flows.events import Emitter
from tidemill.flows.online import online_training
from tidemill.flows.telling import telling
from tidemill.progress import Activity, happened, listening
from tidemill.storage.urls import open_store
from tidemill.tasks.history.markdown import rows, summary
from tidemill.tasks.history.reading import HistoryReader
from tidemill.tasks.online.events import Committed, Looked
from tidemill.tasks.settings import OnlineSettings

pytestmark = pytest.mark.xdist_group("flows")
local = pytest.mark.parametrize("make_url", ["local"], indirect=True)
memory = pytest.mark.parametrize("make_url", ["memory"], indirect=True)


# ---- what there is to say --------------------------------------------------------------------------------------------
def spoken(*happenings: object, behind_seconds: float = 60.0) -> list[tuple[str, dict[str, Any]]]:
    """The events that these things are."""
    found: list[tuple[str, dict[str, Any]]] = []

    class Heard(Emitter):
        def _emit(self, name: str, payload: dict[str, Any]) -> None:
            found.append((name, payload))

    with listening(Heard("s3://r", "m", behind_seconds)):
        for happening in happenings:
            happened(happening)
    return found


def test_a_version_is_an_event_and_so_is_each_decision_and_rejection() -> None:
    story = Story()
    story.batch()
    moved = story.online([1.0, 2.0], champion=2.0)
    refused = story.online([3.0], champion=2.0, decision="refused", rejected={"x\n.parquet": "torn"})
    told = spoken(Committed(moved.manifest, 1, 0), Committed(refused.manifest, 1, 0))
    assert [name for name, _ in told] == [
        events.COMMITTED,
        events.MOVED,
        events.COMMITTED,
        events.REFUSED,
        events.REJECTED,
    ]
    assert told[0][1]["rows"] == 200
    assert told[1][1] == {"from": 0, "to": 1, "metric": "mae", "learner": 1.0, "champion": 2.0}
    assert (told[3][1]["version"], told[3][1]["refusals"], told[3][1]["champion_version"]) == (2, 1, 1)
    assert (told[4][1]["key"], told[4][1]["reason"]) == ("x\\n.parquet", "torn")


def test_an_alias_that_somebody_else_moved_is_no_move_of_this_version() -> None:
    story = Story()
    story.batch()
    moved = story.online([1.0])
    assert [name for name, _ in spoken(Committed(moved.manifest, 7, 0))] == [events.COMMITTED]


def test_of_many_rejected_shards_the_first_have_events_and_the_last_says_how_many_more_there_are() -> None:
    story = Story()
    story.batch()
    many = story.online([], rejected={f"{i}.parquet": "torn" for i in range(events.NAMED + 5)})
    told = [payload for name, payload in spoken(Committed(many.manifest, 0, 0)) if name == events.REJECTED]
    assert len(told) == events.NAMED
    assert told[-1]["more"] == 5
    assert "more" not in told[0]


def test_an_inbox_is_behind_once_until_as_much_time_has_passed_again() -> None:
    old = datetime.now(UTC) - timedelta(seconds=100)
    looked = Looked("m", 3, 7, old, 0, 0)
    recent = Looked("m", 3, 7, datetime.now(UTC), 0, 0)
    told = spoken(recent, looked, looked, Looked("m", 3, 0, None, 0, 0), looked)
    assert [name for name, _ in told] == [events.BEHIND]
    assert told[0][1]["waiting"] == 7
    assert 99 < told[0][1]["oldest_seconds"] < 110
    assert len(spoken(looked, looked, behind_seconds=1e-6)) == 2


@pytest.mark.parametrize("model", ["flights", "Flights", "a.b", "a-b", "A_B", "9.", "flights-shards"])
def test_every_name_of_a_model_has_keys_that_prefect_takes(model: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key_of(model, "summary"))


def test_models_of_different_names_have_different_keys() -> None:
    names = ["flights", "Flights", "a.b", "a-b", "A_B", "a_b", "shards-flights", "flights-shards"]
    keys = [key_of(name, kind) for name in names for kind in ("summary", "shards", "progress")]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)


def test_the_summary_has_pictures_and_numbers_and_no_text_in_it_is_markdown() -> None:
    story = Story()
    story.batch()
    story.online([1.0, 2.0])
    story.online([3.0], decision="refused", rejected={"`[a](http://b)|<script>`": "![x](http://evil/y.png) <b>"})
    found = HistoryReader(story.log).read()
    text = summary(found, "3 shards, the oldest since yesterday")
    pictures = re.findall(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    assert len(pictures) == 2
    assert all(base64.b64decode(picture).startswith(b"<svg") for picture in pictures)
    assert "**Waiting**: 3 shards, the oldest since yesterday" in text
    assert "| 2 | online | 1 | 100 | 3 | 2 | refused |" in text
    assert "](http" not in text.replace("\\]\\(http", "")
    assert "<b>" not in text.replace("\\<b\\>", "")
    table = rows(found)
    assert {tuple(row) for row in table} == {("version", "shard", "rows", "online", "champion", "rejected")}
    assert [row["version"] for row in table] == [2, 2, 1, 1]
    assert all("](" not in str(row["shard"]) and "](" not in str(row["rejected"]) for row in table)


# ---- on a server -----------------------------------------------------------------------------------------------------
def artifacts_of(**filters: Any) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(**filters))


def artifacts_of_run(flow_run: UUID) -> dict[str, Artifact]:
    """By key. On a slow machine there is one of progress too."""
    found = artifacts_of(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
    return {str(artifact.key): artifact for artifact in found if artifact.type != "progress"}


def events_of(model: str, api: str) -> list[dict[str, Any]]:
    """Those of one model, oldest first."""
    query = {"filter": {"resource": {"id": [f"tidemill.model.{model}"]}, "order": "ASC"}, "limit": 50}
    answer = httpx.post(f"{api}/events/filter", json=query, timeout=30)
    answer.raise_for_status()
    return list(answer.json()["events"])


@memory
def test_a_run_leaves_a_summary_a_table_and_events_about_the_model(place: Place, prefect_api: str) -> None:
    model = f"m{uuid4().hex[:8]}"
    batch = batch_training(place.dataset, place.registry, model, place.spec, return_state=True)
    made = artifacts_of_run(batch.state_details.flow_run_id)
    assert set(made) == {f"tidemill-summary-{model}"}
    place.drop("a.parquet", "b.parquet")
    open_store(place.inbox).write("broken.parquet", NOT_PARQUET)
    settings = OnlineSettings(limits={"max_shards": 2}, grace_seconds=0, behind_seconds=1e-6)
    state = online_training(place.inbox, place.registry, model, settings, return_state=True)
    assert state.is_completed()
    made = artifacts_of_run(state.state_details.flow_run_id)
    assert set(made) == {f"tidemill-summary-{model}", f"tidemill-shards-{model}"}
    summary_, table = made[f"tidemill-summary-{model}"], made[f"tidemill-shards-{model}"]
    assert summary_.type == "markdown"
    assert "broken.parquet" in str(summary_.data)
    assert "data:image/svg+xml;base64," in str(summary_.data)
    shards = {row["shard"]: row for row in json.loads(str(table.data))}
    assert shards["a.parquet"]["rows"] == 50
    assert shards["broken.parquet"]["rejected"]
    wanted = {events.COMMITTED, events.MOVED, events.REJECTED, events.BEHIND}
    wait_until(
        lambda: wanted <= {event["event"] for event in events_of(model, prefect_api)},
        seconds=30,
        what="Tidemill's events on the server",
    )
    rejected = [event for event in events_of(model, prefect_api) if event["event"] == events.REJECTED]
    assert [event["payload"]["key"] for event in rejected] == ["broken.parquet"]
    assert rejected[0]["resource"]["prefect.resource.name"] == model
    assert rejected[0]["resource"]["tidemill.registry"] == place.registry
    runs = [related for related in rejected[0]["related"] if related["prefect.resource.role"] == "flow-run"]
    assert runs[0]["prefect.resource.id"] == f"prefect.flow-run.{state.state_details.flow_run_id}"


@memory
@pytest.mark.usefixtures("prefect_api")
def test_a_run_that_changes_nothing_leaves_nothing(place: Place) -> None:
    """Of 1,440 looks a day at an inbox."""
    batch_training(place.dataset, place.registry, "model", place.spec)
    again = batch_training(place.dataset, place.registry, "model", place.spec, return_state=True)
    assert artifacts_of_run(again.state_details.flow_run_id) == {}
    state = online_training(place.inbox, place.registry, "model", return_state=True)
    assert state.name == "Skipped"
    assert artifacts_of_run(state.state_details.flow_run_id) == {}


@memory
@pytest.mark.usefixtures("prefect_api")
def test_runs_of_tasks_say_model_epoch_and_version(place: Place) -> None:
    def names(flow_run: UUID) -> set[str]:
        found = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
        with get_client(sync_client=True) as client:
            runs: list[TaskRun] = client.read_task_runs(flow_run_filter=found)
        return {run.name for run in runs}

    batch = batch_training(place.dataset, place.registry, "model", place.spec, return_state=True)
    expected = {"model: epoch 1 of 2", "model: epoch 2 of 2", "model: promote version 0", "model: fit"}
    wait_until(lambda: expected <= names(batch.state_details.flow_run_id), seconds=30, what="names of task runs")
    place.drop("a.parquet")
    online = online_training(place.inbox, place.registry, "model", return_state=True)
    expected = {"model: open inbox", "model: to version 1", "model: to version 2"}
    wait_until(lambda: expected == names(online.state_details.flow_run_id), seconds=30, what="names of task runs")


def committed() -> Committed:
    story = Story()
    story.batch()
    return Committed(story.online([1.0]).manifest, 1, 0)


@pytest.mark.usefixtures("prefect_api")
def test_progress_is_one_artifact_that_is_brought_up_to_date_and_old_ones_go() -> None:
    key = key_of(model := f"m{uuid4().hex[:8]}", "progress")
    for _ in range(KEPT + 2):
        shown = Artifacts("memory://none", model, uuid4())
        shown.open()
        shown._next = 0.0
        activity = Activity("epoch 1 of 2", total=100, ahead=100)
        shown.on_activity(activity)
        activity.done = activity.rows = 50
        shown._next = 0.0
        shown.on_activity(activity)
        shown.close()
    kept = artifacts_of(key=ArtifactFilterKey(any_=[key]))
    assert len(kept) == KEPT
    assert {artifact.data for artifact in kept} == {25.0}
    assert "epoch 1 of 2: 50 of 100 rows" in str(kept[0].description)


# ---- a server that does not behave -----------------------------------------------------------------------------------
@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []
        ended = threading.Event()

        def take() -> None:
            server.settimeout(0.1)
            while not ended.is_set():
                try:
                    taken.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/api"
        finally:
            ended.set()
            thread.join()
            for connection in taken:
                connection.close()


def test_a_server_that_does_not_answer_holds_up_the_end_of_a_run_for_a_few_seconds_at_most(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with silent_server() as url, temporary_settings({PREFECT_API_URL: url}):
        shown = Artifacts("memory://none", "m", uuid4())
        shown.open()
        began = time.monotonic()
        shown.on_event(committed())
        assert time.monotonic() - began < 0.1
        shown.close()
        assert time.monotonic() - began < artifacts.PARTING_SECONDS + 2
    assert "no more artifacts of this run" in caplog.text


def test_a_server_that_is_gone_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/api"
    story = Story()
    story.batch()
    with temporary_settings({PREFECT_API_URL: url}):
        shown = Artifacts(story.log.store.url, "flights", uuid4())
        shown.open()
        shown.on_event(Committed(story.online([1.0]).manifest, 1, 0))
        began = time.monotonic()
        shown.close()
        assert time.monotonic() - began < 5
    assert "no more artifacts of this run" in caplog.text


def test_outside_of_a_flow_run_nobody_listens() -> None:
    threads = threading.active_count()
    with telling("memory://none", "m", 1.0):
        assert threading.active_count() == threads
        happened(committed())

"""`tidemill.train`, `drain` and `follow` from wherever they may be called: plain, and as flow runs where a server is set up."""

import asyncio
import contextvars
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings

import tidemill
from tests.flows.conftest import Place
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store

pytestmark = pytest.mark.xdist_group("flows")  # one worker, one server

T = TypeVar("T")
ROOT = Path(__file__).parents[2]

s3 = pytest.mark.parametrize("make_url", ["s3"], indirect=True)
memory = pytest.mark.parametrize("make_url", ["memory"], indirect=True)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Prefect server is set up, though another test of this session may have started one."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


# ---- where it is called ----------------------------------------------------------------------------------------------
def here(call: Callable[[], T]) -> T:
    return call()


def in_a_running_loop(call: Callable[[], T]) -> T:
    """As in a cell of a notebook."""

    async def cell() -> T:
        return call()

    return asyncio.run(cell())


def in_a_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        # With the context, which holds the settings that the tests have given Prefect in this process
        return pool.submit(contextvars.copy_context().run, call).result()


def in_a_thread_of_a_loop(call: Callable[[], T]) -> T:
    async def cell() -> T:
        return await asyncio.to_thread(call)

    return asyncio.run(cell())


def in_a_flow(call: Callable[[], T]) -> T:
    @flow(validate_parameters=False)
    def outer() -> list[T]:
        return [call()]

    return outer()[0]


PLAIN = [here, in_a_running_loop, in_a_thread, in_a_thread_of_a_loop]


def trained_drained_and_followed(place: Place, called: Callable[[Callable[[], object]], object]) -> None:
    """All three, each called so; a shard for each of the last two."""
    places = (place.inbox, place.registry, "model")
    version = called(lambda: tidemill.train(place.dataset, place.registry, "model", place.spec))
    assert isinstance(version, tidemill.VersionInfo)
    assert (version.version, version.trained) == (0, True)
    place.drop("a.parquet")
    report = called(lambda: tidemill.drain(*places))
    assert isinstance(report, tidemill.OnlineReport)
    assert (report.head, report.shards) == (1, 1)
    place.drop("b.parquet")
    following = tidemill.OnlineSettings(stop_after_seconds=1.0, poll_seconds=0.1)
    report = called(lambda: tidemill.follow(*places, following))
    assert isinstance(report, tidemill.OnlineReport)
    assert (report.head, report.shards) == (2, 1)
    report = called(lambda: tidemill.drain(*places))
    assert isinstance(report, tidemill.OnlineReport)
    assert (report.head, report.versions) == (2, 0)
    assert place.inbox_keys() == []


@s3
@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("called", PLAIN)
def test_plain_calls_work_anywhere(place: Place, called: Callable[[Callable[[], object]], object]) -> None:
    trained_drained_and_followed(place, called)


@s3
@pytest.mark.parametrize("called", [*PLAIN, in_a_flow])
def test_flow_runs_work_anywhere(
    place: Place, prefect_api: str, called: Callable[[Callable[[], object]], object]
) -> None:
    before = len(runs("train-model")), len(runs("online-model"))
    trained_drained_and_followed(place, called)
    assert runs("train-model")[before[0] :] == ["Completed"]
    assert sorted(runs("online-model")[before[1] :]) == ["Completed", "Completed", "Skipped"]


ASYNC_FLOW = """
import asyncio, sys
import tidemill
from prefect import flow
from tests.flows.data import SPEC

@flow
async def outer(dataset: str, inbox: str, registry: str) -> list[int]:
    version = tidemill.train(dataset, registry, "model", SPEC)
    report = tidemill.drain(inbox, registry, "model")
    following = tidemill.OnlineSettings(stop_after_seconds=0.5, poll_seconds=0.1)
    return [version.version, report.head, tidemill.follow(inbox, registry, "model", following).head]

assert asyncio.run(outer(*sys.argv[1:])) == [0, 1, 1]
"""
"""Prefect leaves the connections of an async flow's client to the garbage collector: in a process of its own."""


@s3
def test_an_async_flow_may_call_them(place: Place, prefect_api: str) -> None:
    place.drop("a.parquet")
    before = len(runs("train-model"))
    command = [sys.executable, "-c", ASYNC_FLOW, place.dataset, place.inbox, place.registry]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert runs("train-model")[before:] == ["Completed"]
    assert place.inbox_keys() == []


def runs(name: str) -> list[str]:
    """Names of the states of all flow runs of this name, the oldest first."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    return [run.state_name or "" for run in sorted(found, key=lambda run: run.start_time or run.expected_start_time)]


@memory
def test_a_table_in_memory_is_no_parameter_of_a_flow_run(place: Place, prefect_api: str) -> None:
    before = len(runs("train-model"))
    table = pq.read_table(io.BytesIO(open_store(place.dataset).read("part-0.parquet")))
    assert tidemill.train(table, place.registry, "model", place.spec).trained
    assert open_log(place.registry, "model").head().number == 0
    assert len(runs("train-model")) == before


def test_what_is_no_argument_is_told_by_its_name(place: Place) -> None:
    spec = tidemill.Spec(target="y")
    for wrong, told in (
        (lambda: tidemill.train(Path(place.dataset), place.registry, "m", spec), "not PosixPath: of a path give str"),
        (
            lambda: tidemill.train([1], place.registry, "m", spec),
            "dataset is a URL, as text, or a pyarrow.Table, not list",
        ),
        (
            lambda: tidemill.train(place.dataset, Path("r"), "m", spec),
            "registry is text, not PosixPath: of a path give str(path)",
        ),
        (lambda: tidemill.train(place.dataset, place.registry, 5, spec), "model is text, not int"),
        (lambda: tidemill.drain(None, place.registry, "m"), "inbox is text, not NoneType"),
        (
            lambda: tidemill.train(place.dataset, place.registry, "m", {"target": "y"}),
            "spec is a tidemill.Spec, not dict",
        ),
        (
            lambda: tidemill.drain(place.inbox, place.registry, "m", {}),
            "settings is a tidemill.OnlineSettings, not dict",
        ),
        (lambda: tidemill.follow(place.inbox, place.registry, "m", None), "OnlineSettings, not NoneType"),
    ):
        with pytest.raises(TypeError, match=re.escape(told)):
            wrong()
    with pytest.raises(ValueError, match="last is 0: ask for one version or more"):
        tidemill.history(place.registry, "m", 0)

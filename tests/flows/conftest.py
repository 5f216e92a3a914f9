"""One Prefect server for all tests of the flows, and small data that a linear model learns."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings

from tests.flows.data import NOT_PARQUET, SPEC, parquet
from tests.flows.prefect_server import prefect_environment, running_prefect_server
from tests.guarantees.children import drain, train
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.spec import Spec


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that this process and its children use until the session ends; the URL of its API."""
    folder = tmp_path_factory.mktemp("prefect")
    with running_prefect_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        for name, value in (prefect_environment(folder) | {"PREFECT_API_URL": url}).items():
            patch.setenv(name, value)
        # This process read its settings when it imported Prefect. Without heartbeats a flow ends a second sooner.
        settings = {PREFECT_API_URL: url, PREFECT_HOME: folder, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings):
            yield url
            # What is still to be sent must go before the server does: Prefect would try for a minute when Python exits
            # (in a thread, where no event loop runs, as Playwright's does in this one)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(APILogWorker.drain_all).result()
                pool.submit(EventsWorker.drain_all).result()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Place:
    """URLs of a dataset of two files, an empty inbox and an empty registry."""

    dataset: str
    inbox: str
    registry: str
    archive: str
    spec: Spec = SPEC

    def drop(self, *names: str) -> dict[str, bytes]:
        """Put shards into the inbox, one after the other; each name has its own rows. Returns key -> bytes."""
        shards = {name: parquet(50, seed=name) for name in names}
        for key, data in shards.items():
            open_store(self.inbox).write(key, data)
        return shards

    def inbox_keys(self) -> list[str]:
        return sorted(info.key for info in open_store(self.inbox).list())


@pytest.fixture
def place(make_url: Callable[[str], str]) -> Place:
    """An empty place with a dataset, on each backend that the test asks for (memory, local, s3: all)."""
    made = Place(*(make_url(name) for name in ("dataset", "inbox", "registry", "archive")))
    for i in range(2):
        open_store(made.dataset).write(f"part-{i}.parquet", parquet(200, seed=f"part-{i}"))
    return made


@pytest.fixture
def model(place: Place) -> Place:
    """A place with versions 0 (batch, champion), 1 and 2 (online) of "model", and one shard in quarantine."""
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    place.drop("a.parquet", "b.parquet")
    open_store(place.inbox).write("c.parquet", NOT_PARQUET)
    settings = OnlineSettings(limits={"max_shards": 2}, grace_seconds=0, gate={"champion": "score"})
    drain(open_store, place.inbox, place.registry, settings)
    return place

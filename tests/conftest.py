"""Fixtures that every test may use: an S3 server, and the same empty place on each backend."""

import os
import uuid
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Final

import pytest
from botocore.client import BaseClient

from tests.s3_server import S3, s3_for_tests
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

BUCKET = "tidemill-tests"
MINIO_LIKE: Final = "minio-like"
"""One more backend of `make_url`, in suites that ask for it: S3 behind a proxy that answers as MinIO does
(`tests/guarantees/minio_like.py`)."""

GCS: Final = "gcs"
"""Google's client before an emulator (`tests/cloud_servers.py`), in suites that ask for it."""
AZURE: Final = "azure"
CLOUDS: Final = (pytest.param(GCS, marks=pytest.mark.clouds), pytest.param(AZURE, marks=pytest.mark.clouds))
"""Backends of `make_url` that only `make test-clouds` starts."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="The full figures of tests/guarantees (make prove), not a sample."
    )
    parser.addoption(
        "--piece",
        type=_piece,
        default=slice(None),
        metavar="K/N",
        help="The K-th of N pieces of each sweep of kills, such as 1/6 (with --full): all pieces are the whole sweep.",
    )
    parser.addoption("--quick", action="store_true", help="Only what needs no server and takes no time (make quick).")
    parser.addoption(
        "--power",
        action="store_true",
        help="The power-loss test too: it makes and mounts file systems, so only root can.",
    )


def _piece(given: str) -> slice:
    """The K-th of N pieces: each N-th item, from the K-th on, so that all pieces take the same time."""
    number, _, pieces = given.partition("/")
    if not 1 <= int(number) <= int(pieces):
        raise ValueError(given)
    return slice(int(number) - 1, None, int(pieces))


SLOW_FOLDERS: Final = frozenset({"browser", "docs", "flows", "guarantees", "keras", "ranks"})
"""All of whose tests start servers or processes, or need another environment."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """--quick does not even import what it leaves out: to import the tests takes as long as to run a thousand of them."""
    if config.getoption("--quick") and collection_path.is_dir() and collection_path.name in SLOW_FOLDERS:
        return True
    return None  # as the other rules say


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the options do not ask for. The power-loss test is not left out in silence for want of root."""
    power = [item for item in items if item.path.name == "test_power.py"]
    if config.getoption("--power") and power and os.geteuid():
        raise pytest.UsageError("the power-loss test mounts file systems: run it as root, or name other tests by ARGS")
    left_out = set() if config.getoption("--power") else {*power}
    if not config.getoption("--full"):
        left_out |= {item for item in items if item.get_closest_marker("prove") is not None}
    if config.getoption("--quick"):
        known = {item.nodeid for item in items}
        left_out |= {item for item in items if _takes_long(item) or _is_repeated_on_disk(item, known)}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


SERVERS: Final = frozenset({"s3_server", "gcs_server", "azure_server", "prefect_api"})
"""Fixtures that start one. Whoever asks for them, or for a fixture that does, is left out of --quick."""


def _takes_long(item: pytest.Item) -> bool:
    """Whether a test needs a server, starts processes, or is marked `slow`."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return (
        not SERVERS.isdisjoint(getattr(item, "fixturenames", ()))
        or any(value in ("s3", MINIO_LIKE, GCS, AZURE) for value in parameters if isinstance(value, str))
        or not SLOW_FOLDERS.isdisjoint(item.path.relative_to(item.config.rootpath).parts)
        or item.get_closest_marker("slow") is not None
    )


def _is_repeated_on_disk(item: pytest.Item, known: Set[str]) -> bool:
    """Whether a test of `tasks` is there in memory too. What differs between the stores is tried in tests/storage."""
    test, bracket, parameters = item.nodeid.partition("[")
    return (
        "tests/tasks/" in test
        and "local" in parameters
        and test + bracket + parameters.replace("local", "memory") in known
    )


# Before anyone imports torch: its threads, one a core in each of several test processes, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to make the full figures of docs/guarantees.md. CI makes a sample of each."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def piece(request: pytest.FixtureRequest) -> slice:
    """Which moments of a sweep of kills are taken: all, unless --piece says otherwise."""
    found: slice = request.config.getoption("--piece")
    return found


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server with one bucket, `BUCKET`; the AWS variables point to it, as admin, until the session ends."""
    assert not request.config.getoption("--quick"), (
        'name the backend in a parameter "s3", so that --quick leaves this test out'
    )
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as s3, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
            patch.delenv(name)
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        with s3.client() as client:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
        yield s3


@pytest.fixture(scope="session")
def minio_like(s3_server: S3) -> Iterator[str]:
    """The endpoint of a proxy before the S3 server that answers as MinIO does."""
    from tests.guarantees.minio_like import MinioLike

    with MinioLike(s3_server) as proxy:
        yield proxy.endpoint


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An emulator of Google Cloud Storage with one bucket, `BUCKET`; the variables point to it until the session ends."""
    from tests.cloud_servers import gcs_for_tests

    with gcs_for_tests(tmp_path_factory.mktemp("gcs")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Azurite with one container, `BUCKET`; the variables point to it until the session ends."""
    from tests.cloud_servers import azure_for_tests

    with azure_for_tests(tmp_path_factory.mktemp("azure")) as variables, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AZURE_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(params=["memory", "local", "s3"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """`make_url(name)` is the URL of an empty root, of one backend after the other; the same name gives the same URL.

    All exist already, as far as the backend knows such a thing.
    """
    return urls_of(request, tmp_path)


def urls_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """What `make_url` is for the backend that the fixture's parameter names."""
    unique = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    if request.param in (GCS, AZURE):
        request.getfixturevalue(f"{request.param}_server")
    if request.param == MINIO_LIKE:
        endpoint = request.getfixturevalue("minio_like")
        request.getfixturevalue("monkeypatch").setenv("AWS_ENDPOINT_URL_S3", endpoint)

    def url(name: str) -> str:
        if request.param == "memory":
            return f"memory://{unique}/{name}"
        if request.param in ("s3", MINIO_LIKE):
            return f"s3://{BUCKET}/{unique}/{name}"
        if request.param in (GCS, AZURE):
            return f"{'gs' if request.param == GCS else 'az'}://{BUCKET}/{unique}/{name}"
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    return url


@pytest.fixture
def store(make_url: Callable[[str], str]) -> Store:
    """A fresh, empty store, of one backend after the other."""
    return open_store(make_url("store"))


@pytest.fixture(scope="session")
def s3_client(s3_server: S3) -> Iterator[BaseClient]:
    """A plain client, to look past the store."""
    with s3_server.client() as client:
        yield client

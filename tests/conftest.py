"""Fixtures that every test may use: an S3 server, and the same empty place on each backend."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.client import BaseClient

from tests.s3_server import S3, s3_for_tests
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

BUCKET = "tidemill-tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="The full figures of tests/guarantees (make prove), not a sample."
    )


# Before anyone imports torch: its threads, one a core in each of several test processes, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to make the full figures of docs/guarantees.md. CI makes a sample of each."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server with one bucket, `BUCKET`; the AWS variables point to it, as admin, until the session ends."""
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as s3, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
            patch.delenv(name)
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        with s3.client() as client:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
        yield s3


@pytest.fixture(params=["memory", "local", "s3"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """`make_url(name)` is the URL of an empty root, of one backend after the other; the same name gives the same URL.

    All exist already, as far as the backend knows such a thing.
    """
    unique = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("s3_server")

    def url(name: str) -> str:
        if request.param == "memory":
            return f"memory://{unique}/{name}"
        if request.param == "s3":
            return f"s3://{BUCKET}/{unique}/{name}"
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

"""What Google's and Azure's clients say, and what Tidemill makes of it. What the stores promise is in test_conformance.py."""

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from aiohttp import hdrs, web
from azure.core import exceptions as azure
from azure.storage.blob import StorageErrorCode
from google.api_core import exceptions as google
from google.auth import exceptions as google_auth

from tests.cloud_servers import AZURE_ENDPOINT
from tests.conftest import CLOUDS, urls_of
from tests.guarantees.proxy import Answer, Asked, Fault, FaultProxy
from tests.storage.faults import FaultStore
from tests.storage.histories import grow, keys
from tidemill.storage import azure_errors, gcs_errors
from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    InvalidURL,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StoreFull,
    StoreNotFound,
    Unavailable,
)
from tidemill.storage.log import VersionLog
from tidemill.storage.pieces import Pieces
from tidemill.storage.remote import RemoteStore, Transient
from tidemill.storage.retention import collect_garbage
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

SECRET = "s3cr3t"


# ---- what refusals mean ----------------------------------------------------------------------------------------------
def of_azure(status: int, code: str) -> azure.HttpResponseError:
    """An error as the SDK raises it, with a request's number that no user needs."""
    response = SimpleNamespace(
        status_code=status, reason="said so", headers={"x-ms-error-code": code}, text=lambda: "", request=None
    )
    error = azure.HttpResponseError(message=f"In words.\nRequestId:1234\nTime:now\nErrorCode:{code}", response=response)
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("status", "code", "kind", "told"),
    [
        (409, "BlobAlreadyExists", PreconditionFailed, "does not have the etag"),
        (412, "ConditionNotMet", PreconditionFailed, "does not have the etag"),
        (412, "LeaseIdMissing", PermissionDenied, "a lease holds it"),
        (409, "BlobImmutableDueToPolicy", PermissionDenied, "legal hold"),
        (409, "BlobArchived", PermissionDenied, "another tier"),
        (409, "SnapshotsPresent", PermissionDenied, "snapshots"),
        (409, "ResourceTypeMismatch", InvalidKey, "a folder would need the same name"),
        (404, "ContainerNotFound", StoreNotFound, "Check the URL"),
        (404, "BlobNotFound", NotFound, "does not exist"),
        (404, "", NotFound, "does not exist"),
        (416, "InvalidRange", CorruptObject, "shorter"),
        (403, "AuthenticationFailed", PermissionDenied, "AZURE_STORAGE_KEY"),
        (403, "AuthorizationPermissionMismatch", PermissionDenied, "Storage Blob Data Contributor"),
        (403, "AuthorizationFailure", PermissionDenied, "firewall"),
        (403, "Strange", PermissionDenied, "may not create"),
        (400, "OutOfRangeInput", InvalidKey, "1,024"),
        (503, "ServerBusy", Transient, "ServerBusy"),
        (500, "InternalError", Transient, "In words"),
        (409, "ContainerBeingDeleted", Transient, "ContainerBeingDeleted"),
        (400, "Md5Mismatch", Transient, "Md5Mismatch"),
        (429, "", Transient, "429"),
        (507, "", StoreFull, "raise the quota"),
        (400, "Strange", StorageError, "the store refused create: Strange (400): In words"),
    ],
)
def test_what_azure_refuses_is_told_on_one_line(status: int, code: str, kind: type[Exception], told: str):
    error = azure_errors.translated(of_azure(status, code), "create", "az://c/key", "key")
    assert type(error) is kind
    assert told in str(error)
    assert "RequestId" not in str(error)
    assert isinstance(error, Transient) or str(error).startswith("az://c/key")


def test_codes_of_azure_are_spelled_as_its_client_does():
    codes = {*azure_errors._LOST, *azure_errors._HELD, *azure_errors._BUSY}
    known = {code.value for code in StorageErrorCode}
    # Of these the client has no name; they are in the service's documents
    newer = {"UnauthorizedBlobOverwrite", "BlobImmutableDueToPolicy", "TargetConditionNotMet"}
    assert codes - newer <= known


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (azure.ServiceRequestError("connection refused"), Transient, "connection refused"),
        (azure.ServiceResponseError("reset"), Transient, "reset"),
        (azure.IncompleteReadError("half"), Transient, "half"),
        (azure.DecodeError("no XML"), Transient, "no XML"),
        (azure.ClientAuthenticationError("DefaultAzureCredential failed\nand more"), PermissionDenied, "az login"),
        (ValueError(f"Connection string is malformed: {SECRET}"), StorageError, "AZURE_STORAGE_CONNECTION_STRING"),
        (OSError("no route"), Transient, "no route"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_no_answer_of_azure_means(error: Exception, kind: type[Exception], told: str):
    found = azure_errors.translated(error, "read", "az://c/key", "key")
    assert type(found) is kind
    assert told in str(found)
    assert SECRET not in str(found)
    assert "\n" not in str(found)


def of_google(status: int, message: str = "In words.", reason: str = "because") -> google.GoogleAPICallError:
    return google.from_http_status(
        status, f"GET https://storage.googleapis.com/storage/v1/b/x: {message}", errors=[{"reason": reason}]
    )


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (of_google(412), PreconditionFailed, "does not have the etag"),
        (of_google(404, "The specified bucket does not exist."), StoreNotFound, "Check the URL"),
        (of_google(404, "No such object: b/key"), NotFound, "does not exist"),
        (of_google(416), CorruptObject, "shorter"),
        (of_google(429, reason="rateLimitExceeded"), Transient, "rateLimitExceeded (429): GET In words"),
        (of_google(503), Transient, "503"),
        (of_google(401), PermissionDenied, "GOOGLE_APPLICATION_CREDENTIALS"),
        (of_google(403), PermissionDenied, "Storage Object Admin"),
        (of_google(403, "Object is under active retention"), PermissionDenied, "retention policy"),
        (of_google(400, reason="invalid"), StorageError, "the store refused create: invalid (400): GET In words"),
        (google_auth.DefaultCredentialsError("none"), PermissionDenied, "gcloud auth application-default login"),
        (google_auth.RefreshError("revoked"), PermissionDenied, "gcloud auth application-default login"),
        (google_auth.TransportError("no network"), Transient, "no network"),
        (requests.ConnectionError("refused"), Transient, "refused"),
        (requests.Timeout("slow"), Transient, "slow"),
        (requests.exceptions.InvalidURL("no host"), StorageError, "STORAGE_EMULATOR_HOST"),
        (requests.exceptions.JSONDecodeError("half", "", 0), Transient, "half"),
        (ValueError("odd"), StorageError, "Check the URL"),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else None,
)
def test_what_google_refuses_is_told_on_one_line(error: Exception, kind: type[Exception], told: str):
    found = gcs_errors.translated(error, "create", "gs://b/key", "key")
    assert type(found) is kind
    assert told in str(found)
    assert "googleapis" not in str(found)
    assert "\n" not in str(found)


def test_a_container_or_bucket_of_an_impossible_name_is_a_wrong_url():
    assert type(azure_errors.translated(of_azure(400, "InvalidResourceName"), "list", "az://C", None)) is InvalidURL
    assert type(gcs_errors.translated(of_google(400), "list", "gs://C", None)) is InvalidURL


# ---- before a server -------------------------------------------------------------------------------------------------
@pytest.fixture(params=CLOUDS)
def make_url(request: pytest.FixtureRequest, tmp_path: Any) -> Callable[[str], str]:
    return urls_of(request, tmp_path)


class KeepsAtIt(FaultProxy):
    """Where the server says where an upload goes on, that is here."""

    async def _forward(self, request: web.Request, data: bytes) -> Answer:
        answer = await super()._forward(request, data)
        if (place := answer.headers.get(hdrs.LOCATION)) is not None:
            answer.headers[hdrs.LOCATION] = place.replace(str(self._upstream).rstrip("/"), self.endpoint)
        return answer


@pytest.fixture
def faults(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Store, FaultProxy]]]:
    """`faults(*plan)`: the store through a proxy that does these to the next requests, one after the other; None: nothing."""
    assert [*store.list()] == []  # its client is made while the variables are those of the server
    is_google = store.url.startswith("gs:")
    connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    endpoint = os.environ["STORAGE_EMULATOR_HOST"] if is_google else AZURE_ENDPOINT.search(connection)[1]
    with KeepsAtIt(endpoint) as proxy:
        if is_google:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        else:
            monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection.replace(endpoint, proxy.endpoint))
        monkeypatch.setattr(RemoteStore, "retry_seconds", 20.0)

        def through(*plan: Fault | None) -> tuple[Store, FaultProxy]:
            waiting = [*plan]

            def next_fault(asked: Asked) -> Fault | None:
                return waiting.pop(0) if waiting else None

            proxy.use(next_fault)
            return open_store(store.url), proxy

        yield through


@pytest.mark.parametrize(
    "fault", [Fault.RESET, Fault.DROPPED, Fault.ERROR_503, Fault.TRUNCATED, Fault.FLIPPED], ids=lambda fault: fault.name
)
def test_a_read_that_the_network_breaks_is_made_again(
    fault: Fault, store: Store, faults: Callable[..., tuple[Store, FaultProxy]]
):
    data = random.Random(0).randbytes(50_000)
    etag = store.write("a", data).etag
    through, proxy = faults(fault, fault)

    assert through.read("a", if_match=etag) == data
    assert len(proxy.asked) >= 2


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.ERROR_503], ids=lambda fault: fault.name)
def test_a_create_that_was_not_applied_is_made_again(
    fault: Fault, store: Store, faults: Callable[..., tuple[Store, FaultProxy]]
):
    through, _ = faults(fault)
    info = through.create("a", b"data")
    assert store.stat("a").etag == info.etag


def test_a_create_whose_answer_was_lost_meets_itself(store: Store, faults: Callable[..., tuple[Store, FaultProxy]]):
    through, _ = faults(Fault.DROPPED)
    with pytest.raises(AlreadyExists):
        through.create("a", b"data")
    assert store.read("a") == b"data"


def test_a_store_that_stays_away_is_unavailable_and_said_so_once(
    store: Store,
    faults: Callable[..., tuple[Store, FaultProxy]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    monkeypatch.setattr(RemoteStore, "retry_seconds", 3.0)
    through, _ = faults(*[Fault.ERROR_503] * 1000)
    with pytest.raises(Unavailable, match=r"stat of .*/a failed for . s: .*\(503\).*Check that"):
        through.stat("a")
    assert len([record for record in caplog.records if record.name == "tidemill.storage"]) <= 1
    for secret in filter(None, ("AccountKey", *os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"))):
        assert secret not in caplog.text


def test_each_verb_is_one_request(store: Store, faults: Callable[..., tuple[Store, FaultProxy]]):
    through, proxy = faults()
    info = through.create("a", b"first")
    through.stat("a")
    through.read("a", if_match=info.etag)
    through.read("a", start=1, length=2)
    other = through.replace("a", b"second", if_match=info.etag)
    assert [found.etag for found in through.list()] == [other.etag]
    through.delete("a", if_match=other.etag)
    put = "POST" if store.url.startswith("gs:") else "PUT"
    stat = "GET" if store.url.startswith("gs:") else "HEAD"
    assert [asked.method for asked, _ in proxy.asked] == [put, stat, "GET", "GET", put, "GET", "DELETE"]


# ---- large objects ---------------------------------------------------------------------------------------------------
PART = 3 * 2**20
"""Bytes. Google takes multiples of 256 KiB, and its client makes one request of what has up to 8 MiB."""


class Made(Pieces):
    """Bytes that are made as they are taken, a quarter of a part at a time."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        draw = random.Random(0)
        for at in range(0, self._size, PART // 4):
            yield memoryview(draw.randbytes(min(PART // 4, self._size - at)))


def in_small_parts(store: Store) -> Store:
    store.part_bytes, store.concurrency = PART, 1
    return store


def test_a_large_object_is_never_whole_in_memory(store: Store):
    data = Made(30 * PART)
    tracemalloc.start()
    try:
        written = in_small_parts(store).write_pieces("a", data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10 * PART
    assert store.read("a", if_match=written.etag) == data.joined()


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.DROPPED, Fault.ERROR_503], ids=lambda fault: fault.name)
def test_a_part_that_the_network_breaks_is_sent_again_by_itself(
    fault: Fault, store: Store, faults: Callable[..., tuple[Store, FaultProxy]]
):
    data = Made(3 * PART + 7)
    through, proxy = faults()
    in_small_parts(through).write_pieces("whole", data)
    requests = [asked.method for asked, _ in proxy.asked]
    one_more = "POST" if store.url.startswith("gs:") else "PUT"  # before the parts, or after them
    assert sorted(requests) == sorted([one_more, *["PUT"] * 4])
    for number in range(len(requests)):
        through, proxy = faults(*[None] * number, fault)
        written = in_small_parts(through).write_pieces("a", data)
        assert len(proxy.asked) == len(requests) + 1, number
        assert (written.etag, store.read("a")) == (store.stat("a").etag, data.joined()), number


CHILD = """
import os, signal, sys
from tidemill.storage.log import open_log
from tidemill.storage.manifest import Blobs, Entry

class Deadly:
    nbytes = 9 * 2**20 + 1
    def __getitem__(self, part):
        if moment != "written" and part.start >= int(moment):
            os.kill(os.getpid(), signal.SIGKILL)
        return memoryview(bytes(self.nbytes))[part]

url, moment = sys.argv[1:]
log = open_log(url, "taxi")
log.store.part_bytes = 3 * 2**20
head = log.head()
weights = log.write_blob(head.number + 1, "safetensors", [Deadly()])
if moment == "written":
    os.kill(os.getpid(), signal.SIGKILL)
blobs = Blobs(weights=weights, state=weights, tombstones=log.carried_tombstones(head))
log.commit(head, Entry(kind="online", spec={}, blobs=blobs))
"""


@pytest.mark.parametrize("moment", [0, 4 * 2**20, 8 * 2**20, "written"])
def test_a_kill_while_a_blob_goes_up_leaves_nothing_that_counts(store: Store, moment: int | str):
    def run(moment: int | str) -> int:
        command = [sys.executable, "-c", CHILD, store.url, str(moment)]
        return subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode

    log = VersionLog(store, "taxi")
    grow(log, 2)
    before = keys(store)
    assert run(moment) == -signal.SIGKILL
    assert len(keys(store) - before) == (moment == "written"), "what is not complete is no object"
    assert log.head().number == 1
    assert run(10**9) == 0
    collect_garbage(log, keep=3)
    head = log.head()
    assert head.number == 2
    named = {ref.key for version in log.history(head, 3) for ref in version.manifest.blobs.refs}
    assert keys(store, "taxi/blobs/") == named
    log.verify_blob(head.manifest.blobs.weights)


def test_a_dataset_is_read_by_row_groups_and_not_whole(store: Store):
    rows = 200_000
    draw = random.Random(0)
    sink = pa.BufferOutputStream()
    table = pa.table({"x": range(rows), "noise": [draw.random() for _ in range(rows)]})
    pq.write_table(table, sink, row_group_size=rows // 10)
    data = sink.getvalue().to_pybytes()
    for name in ("a", "b"):
        store.write(f"day={name}/part.parquet", data)
    read = 0

    class Weighed(FaultStore):
        def read(self, key: str, **which: Any) -> bytes:
            nonlocal read
            found = super().read(key, **which)
            read += len(found)
            return found

    taken = snapshot(store.url, lambda url: Weighed(open_store(url), lambda _: None))
    assert (taken.ref.url, taken.ref.files, taken.ref.rows) == (store.url, 2, 2 * rows)
    assert len(taken.row_groups) == 20
    assert read < len(data)  # the footers of both

    read = 0
    assert taken.row_groups[12].read(["x"]).column("x").to_pylist() == [*range(40_000, 60_000)]
    assert 0 < read < len(data) / 10


def test_a_forked_process_opens_its_own_connections(store: Store):
    store.write("a", b"data")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.send(open_store(store.url).read("a"))

    process = context.Process(target=child)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == b"data"
    process.join(60)
    assert store.read("a") == b"data"


def test_a_store_of_google_without_credentials_sends_requests_unsigned(monkeypatch: pytest.MonkeyPatch):
    from tidemill.storage import gcs

    monkeypatch.setattr(
        "google.auth.default", lambda *_, **__: (_ for _ in ()).throw(google_auth.DefaultCredentialsError())
    )
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    client = gcs._client(-1, gcs._variables())
    assert type(client._credentials).__name__ == "AnonymousCredentials"


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.stat("a"),
        lambda store: store.read("a"),
        lambda store: store.create("a", b""),
        lambda store: store.delete("a"),
        lambda store: [*store.list()],
    ],
    ids=["stat", "read", "create", "delete", "list"],
)
def test_credentials_for_google_that_are_named_and_not_there_are_told_by_every_call(
    call: Callable[[Store], object], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/credentials.json")
    with pytest.raises(PermissionDenied, match=r"/nowhere/credentials\.json was not found.*: set GOOGLE_APPLICATION"):
        call(open_store("gs://bucket/place"))

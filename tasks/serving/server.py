"""The HTTP server of one worker: what it answers, and what it refuses. To serve in another way, start from this file.

`POST /predict` takes rows as JSON, as an Arrow stream or as a Parquet file, and answers with their predictions and the version
that made them. One version does the whole of a request, wherever the alias moves meanwhile. A small body is predicted where it
arrives; a large one in a thread, and not too many of those at once, so that it holds up nobody. Requests are not predicted
together: a layer gives a row other last bits beside other rows, and an answer must not depend on who else asks.
"""

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send
from torch import Tensor

from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.serving.answers import AnswerLog
from tidemill.tasks.serving.bodies import JSON, KINDS, rows_of
from tidemill.tasks.serving.errors import Refused
from tidemill.tasks.serving.following import Following
from tidemill.tasks.serving.loading import load
from tidemill.tasks.serving.metrics import Numbers
from tidemill.tasks.serving.openapi import document
from tidemill.tasks.serving.predictor import Predictor
from tidemill.tasks.serving.served import Served
from tidemill.tasks.serving.tables import Answered, fault_of
from tidemill.tasks.settings import ServeSettings
from tidemill.tasks.training.classes import predicted_columns
from tidemill.tasks.training.errors import ColumnError, ModelError

logger = logging.getLogger("tidemill.serve")

SMALL_BYTES: Final = 64 * 1024
"""A body of at most this size is predicted at once, which takes a few milliseconds."""
DROPPED_BYTES: Final = 16 * 2**20
"""Of a body that is too large, this many bytes more are read."""
LARGE_AT_ONCE: Final = 4
"""Larger bodies that are read and predicted at a time. Others wait, unread."""
CLOSING_SECONDS: Final = 10.0
"""How long a server that ends waits for the log of answers."""
_ID: Final = re.compile(rb"[!-~]{1,128}")


class Service:
    """What the routes share. It is the application behind `/predict` itself, in plain ASGI: a route's usual wrapping, and a
    request made of the scope, would take a third of the time of a prediction."""

    def __init__(self, settings: ServeSettings, token: str | None, numbers: Numbers) -> None:
        self.settings, self.numbers = settings, numbers
        self.served: Served | None = None
        self.log: AnswerLog | None = None
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    @property
    def now(self) -> Predictor | None:
        """The version to answer with; None: there is none yet."""
        return None if self.served is None else self.served.now

    def close(self) -> None:
        """Store the log of answers, and follow the alias no longer."""
        if self.log is not None:
            self.log.close(CLOSING_SECONDS)
        if self.served is not None:
            self.served.close()

    # ---- predictions -------------------------------------------------------------------------------------------------
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /predict."""
        began = time.perf_counter()
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"")
        has_id = _ID.fullmatch(asked) is not None
        told = {"x-request-id": asked.decode() if has_id else secrets.token_hex(16)}
        status = 500  # of whatever is not foreseen here
        try:
            self._check_token(headers)
            if asked and not has_id:
                raise Refused(400, "x-request-id takes 1 to 128 characters of ASCII, without spaces")
            answer = await self._predicted(receive, headers, told)
            status = answer.status_code
        except Refused as refused:
            status = refused.status
            answer = refusal(refused, told)
        except ClientDisconnect:
            status = 499  # as nginx counts those that went away
            return
        finally:
            self.numbers.answered(status, time.perf_counter() - began)
        await answer(scope, receive, send)

    async def _predicted(self, receive: Receive, headers: Mapping[bytes, bytes], told: dict[str, str]) -> Response:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        if kind not in KINDS or b"content-encoding" in headers:
            raise Refused(415, f"send a body, not compressed, whose content-type is one of {', '.join(KINDS)}")
        length = int(headers.get(b"content-length", -1))  # digits, or the parser had refused it
        if length > self.settings.max_body_bytes + DROPPED_BYTES:
            raise self._too_large()
        if 0 <= length <= SMALL_BYTES:
            return self._answer(await self._body(receive), kind, told)
        try:
            await asyncio.wait_for(self._large.acquire(), self.settings.max_seconds)
        except TimeoutError as error:
            raise Refused(503, "too many large requests are under way: try again later") from error
        try:
            return await asyncio.to_thread(self._answer, await self._body(receive), kind, told)
        finally:
            self._large.release()

    async def _body(self, receive: Receive) -> bytes:
        """The body, whole, if it is not too large and comes in time.

        What is too large is read to its end and dropped, up to `DROPPED_BYTES`: who still sends when the connection is closed may
        never see the answer.
        """
        most, seconds = self.settings.max_body_bytes, self.settings.max_seconds
        parts, size, more = list[bytes](), 0, True
        try:
            async with asyncio.timeout(seconds):
                while more and size <= most + DROPPED_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= most:
                        parts.append(part)
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {seconds:g} seconds") from error
        if size > most:
            raise self._too_large()
        return b"".join(parts)

    def _answer(self, body: bytes, kind: str, told: dict[str, str]) -> Response:
        """The predictions for a body. Threads may call it at once."""
        predictor = self.now  # once: the alias may move at any time
        if predictor is None:
            raise Refused(503, "there is no version to serve yet")
        told["x-tidemill-version"] = str(predictor.version.number)
        rows = rows_of(body, kind, predictor.network.features.names(labelled=False), self.settings.max_rows)
        try:
            outputs = predictor.outputs(rows)
        except ColumnError as error:
            if isinstance(rows, pa.Table):
                row, column = fault_of(rows, predictor.network.features.columns)
            else:
                row, column = getattr(error, "row", None), getattr(error, "column", None)
            raise Refused(422, str(error), row=row, column=column) from error
        except ModelError as error:
            logger.error("%s", error)  # it names files of this machine, which are nobody else's business
            raise Refused(500, "the model failed on these rows: the log of the server says how") from error
        self.numbers.rows.inc(len(outputs))
        if self.log is not None:
            table = rows if isinstance(rows, pa.Table) else None
            self.log.add(Answered(predictor, told["x-request-id"], time.time(), outputs, body, table))
        return answer(predictor, outputs, told)

    def _check_token(self, headers: Mapping[bytes, bytes]) -> None:
        if self._authorization is not None and not hmac.compare_digest(
            headers.get(b"authorization", b""), self._authorization
        ):
            raise Refused(401, "send the header authorization: Bearer TOKEN, with the token of this server")

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self.settings.max_body_bytes:,} bytes: send fewer rows at once")

    # ---- what else there is ------------------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        """GET /health: 200 as long as the server answers at all."""
        return json_of(200, {"alive": True})

    async def ready(self, request: Request) -> Response:
        """GET /ready: 503 until there is a version to serve."""
        predictor = self.now
        if predictor is None:
            return json_of(503, {"ready": False, "version": None})
        return json_of(200, {"ready": True, "version": predictor.version.number})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return self._guarded(request, lambda: self._metrics(request))

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: what the version that is served takes and gives."""
        return self._guarded(request, lambda: json_of(200, document(self.now, self.settings)))

    async def tell(self) -> None:
        """Until it is cancelled: say each second what is served. Of several workers, any may be asked for the metrics of all."""
        while True:
            self._tell()
            await asyncio.sleep(1)

    def _tell(self) -> None:
        if self.served is not None and (predictor := self.served.now) is not None:
            self.numbers.version.set(predictor.version.number)
            self.numbers.last_look.set(self.served.looked)

    def _metrics(self, request: Request) -> Response:
        self._tell()
        body, content_type = self.numbers.shown(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    def _guarded(self, request: Request, make: Callable[[], Response]) -> Response:
        try:
            self._check_token(dict(request.scope["headers"]))
            return make()
        except Refused as refused:
            return refusal(refused, {})

    def routes(self) -> list[Route]:
        return [
            Route("/predict", self, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
        ]


# ---- answers ---------------------------------------------------------------------------------------------------------
def answer(predictor: Predictor, outputs: Tensor, headers: dict[str, str]) -> Response:
    """Predictions, one for each row in order, beside the version that made them and the id of the request."""
    found: dict[str, Any] = {"version": predictor.version.number, "request": headers["x-request-id"]}
    if predictor.labels is None:
        found["predictions"] = outputs.numpy()
    else:
        labels, probabilities = (array for _, array in predicted_columns(outputs, predictor.labels))
        found |= {"predictions": labels.to_pylist(), "labels": predictor.labels}
        found["probabilities"] = pc.list_flatten(probabilities).to_numpy().reshape(len(outputs), -1)
    return json_of(200, found, headers)


def refusal(refused: Refused, headers: Mapping[str, str]) -> Response:
    """Why a request was refused, and which row and column are at fault, if one is."""
    found = {"detail": refused.reason, "row": refused.row, "column": refused.column}
    headers = dict(headers)
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refused.status in (408, 413):  # what else is on its way is not read
        headers["connection"] = "close"
    return json_of(refused.status, {name: value for name, value in found.items() if value is not None}, headers)


def json_of(status: int, content: object, headers: Mapping[str, str] | None = None) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type=JSON)


# ---- the application -------------------------------------------------------------------------------------------------
def application(
    registry: str,
    model: str,
    settings: ServeSettings,
    token: str | None = None,
    url: str = "",
    *,
    stores: Callable[[str], Store] = open_store,
) -> Router:
    """What uvicorn runs in each worker.

    Args:
        registry: URL below which models live.
        model: Name of the model.
        settings: What to serve, and what a request may cost.
        token: Who asks for predictions or numbers must send it; None: nobody need.
        url: Where the server listens, for its log line.
        stores: Opens the store at a URL.
    """
    service = Service(settings, token, Numbers(model))

    def follow() -> Following:
        return load(registry, model, settings.alias, follow=settings.poll_seconds, stores=stores)

    @contextlib.asynccontextmanager
    async def running(_: object) -> AsyncIterator[None]:
        # Before the first connection is taken: the worker in place of a killed one must not answer that it has no version
        service.served = await asyncio.to_thread(Served, follow, settings.poll_seconds)
        if settings.log_to is not None:
            service.log = AnswerLog(stores(settings.log_to), settings.log_rows, settings.log_seconds, service.numbers)
        logger.info("%s/predict answers for %s of %s", url, settings.alias, model)
        telling = asyncio.create_task(service.tell())
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.to_thread(service.close)

    return Router(service.routes(), lifespan=running)

"""A proxy in front of a real S3 server, with the faults of a network: resets, dropped answers, stalls, errors, broken bodies.

It forwards each request as it was signed, with the same Host header, and runs in a thread of its own.
"""

import asyncio
import enum
import io
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

from aiohttp import ClientError, ClientSession, DummyCookieJar, hdrs, web
from multidict import CIMultiDict
from yarl import URL

T = TypeVar("T")

LATENCY_SECONDS = 0.05


class Fault(enum.Enum):
    """What can happen to one request."""

    RESET = "the connection is reset before the request is forwarded"
    DROPPED = "the request is applied, then the connection is reset: the answer is lost"
    STALLED = "no answer until the client gives up; the request is never applied"
    LATE = "no answer until the client gives up; then the request is applied all the same"
    SLOW = "the request waits before it is forwarded"
    ERROR_500 = "500 InternalError, not applied"
    ERROR_503 = "503 SlowDown, not applied"
    ERROR_409 = "409 ConditionalRequestConflict, not applied"
    TRUNCATED = "the connection closes in the middle of the body"
    SHORT = "the body ends early, and Content-Length agrees with it"
    EMPTY = "there is no body, and Content-Length agrees with it"
    FLIPPED = "one bit of an object's body is another"


_ERRORS = {
    Fault.ERROR_500: (500, "InternalError"),
    Fault.ERROR_503: (503, "SlowDown"),
    Fault.ERROR_409: (409, "ConditionalRequestConflict"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as plans see it."""

    number: int
    """0 for the first request since the plan was set."""
    method: str
    path: str
    """/bucket/key, decoded; /bucket alone for a listing."""
    conditional: bool
    """It has If-Match or If-None-Match."""

    @property
    def possible(self) -> tuple[Fault, ...]:
        """The faults that can happen to such a request, in a fixed order."""
        is_object = "/" in self.path[1:]
        impossible = set()
        if self.method not in ("PUT", "DELETE") or not self.conditional:
            impossible.add(Fault.ERROR_409)
        if self.method != "GET":
            impossible |= {Fault.TRUNCATED, Fault.SHORT, Fault.EMPTY}
        if self.method != "GET" or not is_object:
            impossible.add(Fault.FLIPPED)
        return tuple(fault for fault in Fault if fault not in impossible)


Plan = Callable[[Asked], Fault | None]
"""Which fault happens to a request. Called in the proxy's thread."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said, or what is said in its place."""

    status: int
    headers: CIMultiDict[str]
    body: bytes


class FaultProxy:
    """Listens on 127.0.0.1 as long as the context is open. Without a plan it only forwards."""

    def __init__(self, endpoint: str) -> None:
        self._upstream = URL(endpoint)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._pending: set[asyncio.Future[Any]] = set()
        self._plan: Plan = lambda _: None
        self._checksums = True
        self.asked: list[tuple[Asked, Fault | None]] = []
        """Every request since the plan was set, and what happened to it."""

    def use(self, plan: Plan | None = None, *, checksums: bool = True) -> None:
        """Set the plan (None: no faults) and start to count anew, once nothing is pending: all that is late has been applied.

        Without `checksums` no answer has one: so answer servers that keep none, and any server for objects put without.
        """
        self._run(self._settled())
        self.asked = []
        self._plan = plan or (lambda _: None)
        self._checksums = checksums

    def __enter__(self) -> Self:
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._run(self._start())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _start(self) -> int:
        self._session = ClientSession(cookie_jar=DummyCookieJar(), auto_decompress=False)
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", r"/{path:[\s\S]*}", self._handle)
        # Cancellation: a stalled handler learns that its client has given up.
        self._runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._settled()
        await self._session.close()

    async def _settled(self) -> None:
        """Wait for every request, those included whose client has given up."""
        while self._pending:
            await asyncio.wait(self._pending)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        done = self._loop.create_future()
        self._pending.add(done)
        try:
            return await self._answer(request)
        finally:
            self._pending.remove(done)
            done.set_result(None)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        conditional = hdrs.IF_MATCH in request.headers or hdrs.IF_NONE_MATCH in request.headers
        asked = Asked(len(self.asked), request.method, request.path, conditional)
        fault = self._plan(asked)
        assert fault is None or fault in asked.possible, (fault, asked)
        self.asked.append((asked, fault))
        match fault:
            case Fault.RESET:
                return _reset(request)
            case Fault.STALLED:
                await asyncio.Event().wait()
            case Fault.LATE:
                try:
                    await asyncio.Event().wait()
                finally:
                    late = self._loop.create_task(self._forward(request, data))
                    self._pending.add(late)
                    late.add_done_callback(self._pending.remove)
            case Fault.SLOW:
                await asyncio.sleep(LATENCY_SECONDS)
            case Fault.ERROR_500 | Fault.ERROR_503 | Fault.ERROR_409:
                status, code = _ERRORS[fault]
                xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
                return web.Response(status=status, text=xml, content_type="application/xml")
        try:
            answer = await self._forward(request, data)
        except ClientError:  # the server is away: so is what its client sees of it
            return _reset(request)
        if fault is Fault.DROPPED:
            return _reset(request)
        if fault is Fault.TRUNCATED:
            return await _truncated(request, answer)
        return web.Response(
            status=answer.status, headers=answer.headers, body=_broken(answer.body, fault, asked.number) or None
        )

    async def _forward(self, request: web.Request, data: bytes) -> Answer:
        return await self._send(request.method, request, request.headers.copy(), data)

    def upstream(self, request: web.Request, *, query: bool = True) -> URL:
        """Where the request goes to."""
        path = request.raw_path if query else request.raw_path.partition("?")[0]
        return self._upstream.join(URL(path, encoded=True))

    async def _send(
        self, method: str, request: web.Request, headers: CIMultiDict[str], data: bytes, *, query: bool = True
    ) -> Answer:
        headers.pop(hdrs.EXPECT, None)  # answered here; not signed
        async with self._session.request(
            method,
            self.upstream(request, query=query),
            headers=headers,
            data=io.BytesIO(data) if data else None,
            allow_redirects=False,
            skip_auto_headers=(hdrs.CONTENT_TYPE, hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING),
        ) as upstream:
            body = await upstream.read()
            kept = upstream.headers.copy()
        for name in [*kept]:
            if not self._checksums and name.lower().startswith("x-amz-checksum-"):
                kept.popall(name, None)
        kept.popall(hdrs.TRANSFER_ENCODING, None)
        kept.popall(hdrs.CONNECTION, None)
        if method != "HEAD":
            kept.popall(hdrs.CONTENT_LENGTH, None)  # follows from the body
        return Answer(upstream.status, kept, body)


def _reset(request: web.Request) -> web.Response:
    """Close with a TCP reset. Nobody receives the response."""
    if (transport := request.transport) is not None:
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()


async def _truncated(request: web.Request, answer: Answer) -> web.StreamResponse:
    """All of the headers and half of the body, then the end of the connection."""
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(answer.body)
    await response.prepare(request)
    await response.write(answer.body[: len(answer.body) // 2])
    assert request.transport is not None
    request.transport.close()  # what was written is still sent
    return response


def _broken(body: bytes, fault: Fault | None, number: int) -> bytes:
    """The body as it is, cut, or with one bit flipped; where follows from the number of the request."""
    if fault is Fault.EMPTY or not body:
        return b""
    draw = Random(number)
    place = draw.randrange(len(body))
    if fault is Fault.SHORT:
        return body[: max(place, 1)]
    if fault is Fault.FLIPPED:
        return body[:place] + bytes([body[place] ^ 1 << draw.randrange(8)]) + body[place + 1 :]
    return body

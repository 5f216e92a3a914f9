"""What a run answers on a port of this machine: `/` the report, `/metrics` its numbers, `/health` whether it is alive and well.

Nothing of it can fail or slow a run. A page is made anew when somebody looks, but never takes more than a tenth of the time: a
look that comes sooner gets the page before it. Slow readers and crowds are cut off.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from tidemill.progress import Activity
from tidemill.storage.errors import StorageError
from tidemill.storage.inbox import Inbox
from tidemill.storage.log import VersionLog

if TYPE_CHECKING:
    from tidemill.tasks.history.reading import HistoryReader

logger = logging.getLogger("tidemill.web")

T = TypeVar("T")

SHARE: Final = 0.1
"""Of the time, that a page may take to be made."""
AT_ONCE: Final = 8
"""So many answers are under way; who comes then is sent away."""
SLOW_SECONDS: Final = 10.0
"""A reader that takes longer for a part of its request or of the answer is cut off."""
REFRESH_SECONDS: Final = 10
"""How often a browser asks for the report again."""
HERE: Final = frozenset({"127.0.0.1", "localhost"})
"""By other names nobody is answered: a web page elsewhere may let its own name lead here, to read what is not its own."""
TEXT: Final = "text/plain; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"
JSON: Final = "application/json"


class Fresh(Generic[T]):
    """What is made anew when it is asked for, unless making it takes too large a share of the time."""

    def __init__(self, make: Callable[[], T], share: float = SHARE) -> None:
        self._make, self._share = make, share
        self._lock = threading.Lock()
        self._made: list[T] = []
        self._due = 0.0

    def get(self) -> T:
        """The newest that may be had. Raises what `make` raises."""
        if self._made and time.monotonic() < self._due:
            return self._made[0]
        with self._lock:  # who comes meanwhile waits for this one
            if not self._made or time.monotonic() >= self._due:
                began = time.monotonic()
                self._made = [self._make()]
                self._due = time.monotonic() + (time.monotonic() - began) * (1 / self._share - 1)
            return self._made[0]


class Pulse:
    """When a run last did anything. Listens to it (`tidemill.progress`)."""

    def __init__(self) -> None:
        self._beat = time.monotonic()

    def on_activity(self, activity: Activity) -> None:
        self._beat = time.monotonic()

    def on_event(self, event: object) -> None:
        self._beat = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self._beat


class Answers(Protocol):
    """What there is to be seen."""

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """(status, content type, body) for a path; `accept` is the header of that name."""


class Pages:
    """What there is to be seen of a run."""

    def __init__(self, log: VersionLog, inbox: Inbox, behind_seconds: float, pulse: Pulse) -> None:
        self._log, self._inbox, self._behind, self._pulse = log, inbox, behind_seconds, pulse
        self._reader: HistoryReader | None = None
        self._report, self._state = Fresh(self._make_report), Fresh(self._make_state)

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """(status, content type, body) for a path."""
        match path.partition("?")[0]:
            case "/":
                return 200, HTML, self._report.get()
            case "/health":
                return self._health()
            case "/metrics":
                return all_metrics(accept)
        return 404, TEXT, b"There are: / (the report), /health, /metrics\n"

    def _make_report(self) -> bytes:
        from tidemill.tasks.history.page import page
        from tidemill.tasks.history.reading import HistoryReader

        if self._reader is None:
            self._reader = HistoryReader(self._log)
        return page(self._reader.read(), refresh_seconds=REFRESH_SECONDS).encode()

    def _make_state(self) -> dict[str, Any]:
        from tidemill.storage.status import look

        try:
            return look(self._log, self._inbox, behind_seconds=self._behind).model_dump(mode="json")
        except StorageError as error:
            return {"error": str(error)}

    def _health(self) -> tuple[int, str, bytes]:
        """503 if the run has done nothing for longer than `behind_seconds`. Problems alone are no reason to end a run."""
        age = self._pulse.age
        alive = age < self._behind
        facts = {"alive": alive, "seconds_since_it_did_anything": round(age, 1), "status": self._state.get()}
        return 200 if alive else 503, JSON, json.dumps(facts).encode()


def all_metrics(accept: str) -> tuple[int, str, bytes]:
    """The numbers of this process, as Prometheus wants them."""
    from prometheus_client import REGISTRY
    from prometheus_client.exposition import choose_encoder

    encode, content_type = choose_encoder(accept)
    return 200, content_type, encode(REGISTRY)


class _Server(ThreadingHTTPServer):
    """Answers in threads that end with the process, and in not too many of them."""

    daemon_threads = True
    request_queue_size = 2 * AT_ONCE

    def __init__(self, port: int, pages: Answers) -> None:
        self.pages, self._free = pages, threading.Semaphore(AT_ONCE)
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be had
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a reader went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SLOW_SECONDS

    def do_GET(self) -> None:
        try:
            if _host(self.headers.get("Host", "")) not in HERE:
                code, content_type, body = 403, TEXT, b"Ask for 127.0.0.1 or localhost.\n"
            else:
                code, content_type, body = self.server.pages.answer(self.path, self.headers.get("Accept", ""))
        except Exception as error:  # of whatever class: it is told to who asked, and to nobody else
            logger.debug("%s", self.path, exc_info=True)
            code, content_type, body = 500, TEXT, f"{type(error).__name__}: {error}\n".encode()
        self.send_response(code)
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # a name that http.server looks for

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _host(given: str) -> str:
    """`localhost` of `localhost:9400`, and nothing of nothing."""
    return given.rpartition(":")[0] if given.rpartition(":")[2].isdecimal() else given


@contextlib.contextmanager
def served_at(port: int, pages: Answers) -> Iterator[None]:
    """While the context is open, the pages are served at this port of 127.0.0.1; 0: at one that is free. A taken port is told."""
    try:
        server = _Server(port, pages)
    except (OSError, OverflowError) as error:
        logger.warning("no page at port %d: %s. The run goes on", port, error)
        yield
        return
    logger.info("http://127.0.0.1:%d/ shows the report; /metrics and /health are there too", server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="tidemill-web", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        with contextlib.suppress(OSError):
            server.server_close()

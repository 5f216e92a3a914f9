"""Numbers of a server for Prometheus, of all its workers together.

Each metric has its entry in `docs/operations.md`. Where there are several workers, each writes its numbers to files of one folder
(the multiprocess mode of Prometheus's client), so that a scrape that any of them answers tells of all, and what a killed worker
has counted still counts.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from tidemill.tasks.online.metrics import Told

METRICS: Final = {
    "tidemill_served_version": Told("gauge", "Version that is served; of several workers, the oldest."),
    "tidemill_served_last_look_timestamp_seconds": Told(
        "gauge", "When the alias was last looked up; of several workers, the earliest."
    ),
    "tidemill_served_requests": Told("counter", "Requests for predictions, by the status code of their answer."),
    "tidemill_served_rows": Told("counter", "Rows predicted."),
    "tidemill_served_request_seconds": Told("histogram", "From the head of a request to its answer."),
    "tidemill_served_logged_rows": Told("counter", "Rows of answers in stored shards."),
    "tidemill_served_log_waiting_rows": Told("gauge", "Rows of answers that are in no stored shard yet."),
    "tidemill_served_log_dropped_rows": Told("counter", "Rows of answers that will be in no shard."),
}
"""All of them; each has the label `model`, `tidemill_served_requests` also `code`."""

BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, float("inf"))
"""Seconds."""
_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Prometheus's client reads it when it is imported."""


class Numbers:
    """What one worker counts. Threads may share it."""

    def __init__(self, model: str) -> None:
        _forget_dead_workers()
        self._registry = CollectorRegistry()
        told = {name: (name, about.help, ["model"]) for name, about in METRICS.items()}

        def gauge(name: str, mode: str) -> Gauge:
            return Gauge(*told[name], registry=self._registry, multiprocess_mode=mode).labels(model)  # type: ignore[arg-type]  # one of its words

        def counter(name: str) -> Counter:
            return Counter(*told[name], registry=self._registry).labels(model)

        self.version = gauge("tidemill_served_version", "livemin")
        self.last_look = gauge("tidemill_served_last_look_timestamp_seconds", "livemin")
        self.rows = counter("tidemill_served_rows")
        self._seconds = Histogram(
            *told["tidemill_served_request_seconds"], buckets=BUCKETS, registry=self._registry
        ).labels(model)
        self.logged = counter("tidemill_served_logged_rows")
        self.waiting = gauge("tidemill_served_log_waiting_rows", "livesum")
        self.dropped = counter("tidemill_served_log_dropped_rows")
        self._requests = Counter(
            "tidemill_served_requests",
            METRICS["tidemill_served_requests"].help,
            ["model", "code"],
            registry=self._registry,
        )
        self._by_code: dict[int, Counter] = {}
        self._model = model
        self._of_code(200)  # there from the start: what appears with 1 has never increased

    def answered(self, code: int, seconds: float) -> None:
        """Count a request by the status code of its answer, and how long that took."""
        self._of_code(code).inc()
        self._seconds.observe(seconds)

    def _of_code(self, code: int) -> Counter:
        if (counter := self._by_code.get(code)) is None:
            counter = self._by_code[code] = self._requests.labels(self._model, str(code))
        return counter

    def shown(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) for a scrape."""
        encode, content_type = choose_encoder(accept)
        registry = self._registry
        if _FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return encode(registry), content_type


@contextlib.contextmanager
def of_several_workers() -> Iterator[None]:
    """While the context is open, processes that are started count together."""
    with tempfile.TemporaryDirectory(prefix="tidemill-metrics-") as folder:
        os.environ[_FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[_FOLDER]


def _forget_dead_workers() -> None:
    """What a worker that was killed has last shown by a gauge holds no more. Its successor, which counts here, says so."""
    if (folder := os.environ.get(_FOLDER)) is None:
        return
    for pid in {int(path.stem.rpartition("_")[2]) for path in Path(folder).glob("gauge_live*.db")}:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError):  # gone; or its number is another's by now
            mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]

"""A server whose processes are killed: what its clients notice, and what its log of answers loses."""

import http.client
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import pyarrow.parquet as pq
import pytest

from tests.data import keys
from tests.s3_server import wait_until
from tests.tasks.online.test_step import begin
from tidemill.storage.urls import open_store
from tidemill.tasks.training.request_log import REQUEST

MakeUrl = Callable[[str], str]
ROOT: Final = Path(__file__).parents[2]
HEADERS: Final = {"content-type": "application/json"}
local = pytest.mark.parametrize("make_url", ["local"], indirect=True)


@dataclass
class Running:
    """`tidemill serve` in processes of its own."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    def workers(self) -> list[psutil.Process]:
        """Those that answer; not the helper of Python's multiprocessing."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@contextmanager
def served(folder: Path, registry: str, *arguments: str) -> Iterator[Running]:
    log = folder / "serve.log"
    command = [sys.executable, "-m", "tidemill", "serve", registry, "model", "--port", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stderr=output)
    try:
        workers = int(arguments[arguments.index("--workers") + 1])

        def answers() -> list[str]:
            assert process.poll() is None, log.read_text()
            return re.findall(r"http://127\.0\.0\.1:(\d+)/predict answers", log.read_text())

        wait_until(lambda: len(answers()) == workers, seconds=120, what="the workers")
        yield Running(process, int(answers()[0]), log)
    finally:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            process.kill()
            for child in children:
                child.kill()
        process.wait()


@dataclass
class Asking:
    """One connection that asks at a steady rate, and asks on over a new one where it breaks."""

    port: int
    name: str
    every: float
    """Seconds between two requests."""
    answered: dict[str, float] = field(default_factory=dict)
    """Id of each request that was answered -> when."""
    failed: int = 0
    versions: set[str] = field(default_factory=set)

    def run(self, over: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        due, number = time.monotonic(), 0
        while not over.wait(max(0.0, due - time.monotonic())):
            due += self.every
            number += 1
            request = f"{self.name}-{number}"
            try:
                connection.request("POST", "/predict", b'{"a": 1.0, "b": 2.0}', HEADERS | {"x-request-id": request})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200, answer.status
                self.answered[request] = time.monotonic()
            except (OSError, http.client.HTTPException):
                self.failed += 1
                connection.close()
        connection.close()


def logged(inbox: str) -> list[str]:
    """The requests in all shards, each of which is whole."""
    store = open_store(inbox)
    return [
        request.removesuffix("/0")
        for key in keys(inbox)
        for request in pq.read_table(io.BytesIO(store.read(key)), columns=[REQUEST]).column(0).to_pylist()
    ]


def metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@local
def test_a_killed_worker_takes_seconds_of_the_log_with_it_and_fails_hardly_a_request(
    make_url: MakeUrl, tmp_path: Path, full: bool
) -> None:
    """And the server ends as it should: what is under way is answered, and the log is stored."""
    rate, seconds, log_seconds = (1000, 300, 5) if full else (300, 6, 1)
    begin(make_url("registry"), make_url("dataset"))
    inbox = make_url("inbox")
    with served(
        tmp_path, make_url("registry"), *("--workers", "2", "--log-to", inbox, "--log-seconds", str(log_seconds))
    ) as at:
        over = threading.Event()
        asking = [Asking(at.port, f"{i}", 16 / rate) for i in range(16)]
        threads = [threading.Thread(target=one.run, args=(over,)) for one in asking]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)  # load before the kill
        victim = at.workers()[0]
        victim.kill()
        killed = time.monotonic()
        wait_until(lambda: at.log.read_text().count("/predict answers") == 3, seconds=60, what="another worker")
        time.sleep(seconds / 2)  # and after it
        over.set()
        for thread in threads:
            thread.join()
        assert len(at.workers()) == 2
        answered = {request: when for one in asking for request, when in one.answered.items()}
        failed = sum(one.failed for one in asking)
        assert metric(at.port, 'tidemill_served_requests_total{code="200"') >= len(
            answered
        )  # the killed one's count too

        # A second one finds the port taken
        second = [sys.executable, "-m", "tidemill", "serve", make_url("registry"), "model", "--port", str(at.port)]
        taken = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert taken.returncode == 1
        assert re.fullmatch(
            rf"tidemill: port {at.port} of 127\.0\.0\.1 cannot .* Choose another one: .*\n", taken.stderr
        )

        # SIGTERM in the midst of a request
        with socket.create_connection(("127.0.0.1", at.port)) as late:
            late.sendall(
                b"POST /predict HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\nx-request-id: late\r\n"
                b'content-length: 20\r\n\r\n{"a": 1.0,'
            )
            wait_until(lambda: metric(at.port, "tidemill_served_requests_total") > 0, seconds=10, what="an answer")
            at.process.terminate()
            wait_until(lambda: not listens(at.port), seconds=30, what="the end")
            late.sendall(b' "b": 2.0}')
            assert late.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert at.process.wait(60) == 0, at.log.read_text()

    found = logged(inbox)
    stored = set(found)
    assert len(found) == len(stored)
    assert "late" in stored
    missing = [when for request, when in answered.items() if request not in stored]
    assert all(killed - log_seconds <= when <= killed + 0.5 for when in missing)
    assert len(answered) > 0.9 * rate * seconds
    assert failed <= 0.01 * (len(answered) + failed)
    print(f"{len(answered)} answered, {failed} failed, {len(missing)} of them in no shard")


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@local
def test_workers_end_with_their_parent(make_url: MakeUrl, tmp_path: Path) -> None:
    begin(make_url("registry"), make_url("dataset"))
    with served(tmp_path, make_url("registry"), "--workers", "2") as at:
        workers = at.workers()
        os.kill(at.process.pid, signal.SIGKILL)
        at.process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=30)
        assert (len(gone), alive) == (2, [])
        assert not listens(at.port)

"""How long after a shard was put does a server answer with a version that has learned from it? On S3, the whole loop.

    .venv/bin/python benchmarks/fresh.py                       # 300 shards, one each second
    .venv/bin/python benchmarks/fresh.py --shards 20 --every 0.5

`tidemill follow` and `tidemill serve` run as processes of their own and look each 0.2 s, on an S3 server that is started here
(`tests/s3_server.py`). The gate is open: each version becomes the champion. A client asks for one row without pause, on one
connection, and notes the version of each answer; the manifests tell afterwards which version has learned from which shard. Fails
if an answer is no 200, or is of an older version than the one before. Prints one JSON line for each shard, then the summary.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.online import NAMES, begin, in_process, s3, say, shard  # noqa: E402  # found by the line above

MODEL: Final = "net"  # what `begin` trains
POLL: Final = "0.2"


@contextmanager
def command(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of tidemill, ended by SIGTERM."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidemill", *words], env=environment, stdout=said, stderr=said
        )
        try:
            yield process
        except BaseException:
            said.seek(0)
            sys.stderr.write(said.read().decode())
            raise
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Client(threading.Thread):
    """Asks for one row, again and again, on one connection."""

    def __init__(self, port: int, pause: float) -> None:
        super().__init__(daemon=True)
        self.first: dict[int, float] = {}
        """Version -> when its first answer was there."""
        self.answers, self.failure = 0, ""
        self._port, self._pause, self._ending = port, pause, threading.Event()

    def run(self) -> None:
        body = json.dumps(dict.fromkeys(NAMES, 0.5))
        connection, newest = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60), -1
        while not self._ending.wait(self._pause):
            try:
                connection.request("POST", "/predict", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                said = answer.read()
            except OSError as error:
                self.failure = repr(error)
                return
            number = int(answer.headers.get("x-tidemill-version", -1))
            if answer.status != 200 or number < newest:
                self.failure = f"{answer.status}, of version {number} after {newest}: {said[:200]!r}"
                return
            newest = number
            self.first.setdefault(number, time.time())
            self.answers += 1

    def end(self) -> None:
        self._ending.set()
        self.join()


def measure(options: argparse.Namespace, bucket: str) -> None:
    from tests.s3_server import wait_until
    from tidemill.storage.log import VersionLog
    from tidemill.storage.urls import open_store

    inbox, registry, port = f"{bucket}/inbox", f"{bucket}/registry", free_port()
    in_process(begin, registry)
    contents, store = [shard(options.rows, seed) for seed in range(10)], open_store(inbox)
    put: dict[str, float] = {}
    following = ("follow", inbox, registry, MODEL, "--poll-seconds", POLL, "--gate.tolerance", "100")
    serving = ("serve", registry, MODEL, "--poll-seconds", POLL, "--port", str(port))
    with command(*following), command(*serving):
        wait_until(lambda: _listens(port), seconds=120, what="the server starts")
        client = Client(port, options.pause)
        client.start()
        store.write("first.parquet", contents[0])
        wait_until(lambda: 1 in client.first or client.failure != "", seconds=120, what="the first version is served")
        assert not client.failure, client.failure
        begun = time.monotonic()
        for number in range(options.shards):
            time.sleep(max(0.0, begun + number * options.every - time.monotonic()))
            key = f"{number:06}.parquet"
            put[key] = time.time()  # before: the upload is part of the way
            store.write(key, contents[number % len(contents)])
        log = VersionLog(open_store(registry), MODEL)
        learned: dict[str, int] = {}
        unread = 1

        def all_served() -> bool:
            nonlocal unread
            while log.has(unread):
                learned.update((one.key, unread) for one in log.version(unread).manifest.consumed)
                unread += 1
            return client.failure != "" or (put.keys() <= learned.keys() and max(client.first) >= unread - 1)

        wait_until(all_served, seconds=120, what="all shards are in a version that is served")
        client.end()
    assert not client.failure, client.failure
    waited = []
    for key, at in put.items():
        waited.append(min(time for version, time in client.first.items() if version >= learned[key]) - at)
        say("fresh", "shard", key=key, version=learned[key], seconds=round(waited[-1], 3))
    waited.sort()
    say(
        *("fresh", "summary"),
        shards=len(waited),
        versions=unread - 1,
        answers=client.answers,
        median_seconds=round(statistics.median(waited), 3),
        p99_seconds=round(waited[-1 - len(waited) // 100], 3),
        most_seconds=round(waited[-1], 3),
    )


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=300, help="how many are put")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one to the next")
    parser.add_argument("--rows", type=int, default=1000, help="rows of a shard")
    parser.add_argument("--pause", type=float, default=0.01, help="seconds between an answer and the next request")
    options = parser.parse_args()
    with s3() as bucket:
        measure(options, bucket)


if __name__ == "__main__":
    main()

"""`tidemill serve` beside LitServe and MLflow's server, which call the same loaded model; and swaps of the champion under load.

    .venv/bin/python benchmarks/serving.py peers --litserve VENV/bin/python --mlflow VENV/bin/python
    .venv/bin/python benchmarks/serving.py peers --seconds 2 --rounds 1 --cases 1x16      # ours alone, quickly, one case
    .venv/bin/python benchmarks/serving.py swaps
    .venv/bin/python benchmarks/serving.py freshness

A peer has an environment of its own, in which tidemill can be imported too: litserve==0.2.19; mlflow-skinny==3.17.2, and
mlflow==3.17.2 with --no-deps, as it asks for an older pyarrow. The client is `wrk`, which must be on the PATH. The model is an
MLP (64, 32) of numbers, a time, a boolean, a vector, two categories and two sequences. Each server has one worker and one thread
of torch. In each round they are asked one after the other, in another order each time; the table has medians of the rounds. CPU
is that of all processes of a server.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PEERS = ROOT / "benchmarks/serving_peers"
MODEL = "mixed"
SPEC = {
    "features": [
        *("x0", "x1", "at", "flag", "vector"),
        {"name": "city", "kind": "category", "buckets": 1024},
        {"name": "hour", "kind": "category", "buckets": 64},
        {"name": "tags", "length": 8, "buckets": 256},
        {"name": "hist", "length": 10, "buckets": 1000},
    ],
    "target": "y",
    "model": {"factory": "mlp", "arguments": {"hidden": [64, 32]}},
    "epochs": 1,
}
CASES = ((1, 1), (1, 16), (100, 1), (100, 16))
"""(rows of a request, connections)"""


def case(text: str) -> tuple[int, int]:
    """One of these, as `1x16`."""
    count, connections = text.split("x")
    return int(count), int(connections)


# ---- the model and the rows ------------------------------------------------------------------------------------------
def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the model, as JSON has them."""
    import numpy as np

    random = np.random.default_rng(seed)
    found = []
    for x0, x1, second in zip(
        random.normal(size=count), random.normal(size=count), random.integers(0, 3e7, count), strict=True
    ):
        found.append(
            {
                "x0": float(x0),
                "x1": float(x1),
                "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1_750_000_000 + int(second))),
                "flag": bool(random.integers(2)),
                "vector": random.normal(size=4).tolist(),
                "city": f"city {random.integers(500)}",
                "hour": int(random.integers(24)),
                "tags": [f"tag {tag}" for tag in random.integers(0, 100, random.integers(0, 9))],
                "hist": random.integers(0, 5000, random.integers(0, 11)).tolist(),
            }
        )
    return found


def begin(folder: Path) -> None:
    """Version 0 of the model, below `folder`."""
    import datetime as dt

    import pyarrow as pa
    import pyarrow.parquet as pq

    import tidemill

    given = rows(5000, 0)
    columns: dict[str, Any] = {name: [row[name] for row in given] for name in given[0]}
    columns["at"] = [dt.datetime.fromisoformat(at) for at in columns["at"]]
    columns["vector"] = pa.array(columns["vector"], pa.list_(pa.float64(), 4))
    columns["y"] = [row["x0"] - 2 * row["vector"][1] + (row["hour"] > 12) for row in given]
    (folder / "data").mkdir()
    pq.write_table(pa.table(columns), folder / "data" / "part.parquet")
    tidemill.train(str(folder / "data"), str(folder / "registry"), MODEL, tidemill.Spec.model_validate(SPEC))


# ---- servers ---------------------------------------------------------------------------------------------------------
class Server:
    """A server in processes of its own."""

    def __init__(self, name: str, command: list[str], port: int, path: str, wraps: str = "%s") -> None:
        import psutil

        self.name, self.path, self.wraps = name, path, wraps
        self.url = f"http://127.0.0.1:{port}{path}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = psutil.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        self._wait()

    def body(self, count: int) -> str:
        """`count` rows as this server takes them."""
        given = rows(count, count)
        return self.wraps % json.dumps(given)

    def _wait(self) -> None:
        told: object = None
        for _ in range(600):
            if self._process.poll() is not None:
                break
            try:
                self.predict(1)
                return
            except OSError as error:
                told = error.read() if isinstance(error, urllib.error.HTTPError) else error
                time.sleep(0.2)
        self.close()
        self._log.seek(0)
        raise SystemExit(f"{self.name} does not answer: {told!r}\n{self._log.read().decode()[-4000:]}")

    def predict(self, count: int) -> list[float]:
        """The predictions for `count` rows."""
        request = urllib.request.Request(
            self.url, self.body(count).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[float] = json.load(answer)["predictions"]
        return found

    def _all(self) -> list[Any]:
        return [self._process, *self._process.children(recursive=True)]

    def cpu(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._all())

    def memory(self) -> float:
        """MiB that all its processes hold."""
        return sum(process.memory_info().rss for process in self._all()) / 2**20

    def close(self) -> None:
        import psutil

        try:
            processes = self._all()
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def started(options: argparse.Namespace, registry: str) -> Iterator[list[Server]]:
    """Ours and the peers that there are environments for."""
    servers = []
    try:
        port = free_port()
        ours = ["serve", registry, MODEL, "--port", str(port)]
        servers.append(Server("tidemill", [sys.executable, "-m", "tidemill", *ours], port, "/predict"))
        if options.litserve:
            port = free_port()
            command = [options.litserve, str(PEERS / "on_litserve.py"), registry, MODEL, str(port)]
            servers.append(Server("litserve", command, port, "/predict"))
        if options.mlflow:
            port = free_port()
            command = [options.mlflow, str(PEERS / "on_mlflow.py"), registry, MODEL, str(port)]
            servers.append(Server("mlflow", command, port, "/invocations", '{"dataframe_records": %s}'))
        yield servers
    finally:
        for server in servers:
            server.close()


# ---- the client ------------------------------------------------------------------------------------------------------
_DONE = """
done = function(summary, latency, requests)
  io.write(string.format('{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "max": %f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout))
end
"""


def asked(server: Server, count: int, connections: int, seconds: float) -> dict[str, float]:
    """What wrk measures, in milliseconds, with the server's CPU in microseconds a request."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f"wrk.method = 'POST'\nwrk.body = [==[{server.body(count)}]==]\n")
        script.write(f"wrk.headers['Content-Type'] = 'application/json'\n{_DONE}")
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", script.name, server.url]
        before = server.cpu()
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent = server.cpu() - before
    found: dict[str, float] = json.loads(re.findall(r"^\{.*\}$", told, re.MULTILINE)[-1])
    return found | {"rate": found["requests"] / found["seconds"], "cpu": 1e6 * spent / found["requests"]}


def peers(options: argparse.Namespace) -> None:
    """Each server in each case, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        begin(Path(folder))
        with started(options, f"{folder}/registry") as servers:
            expected = servers[0].predict(100)
            for server in servers[1:]:
                assert all(
                    abs(a - b) <= 1e-5 * max(1, abs(b)) for a, b in zip(server.predict(100), expected, strict=True)
                )
            found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
            for number in range(options.rounds):
                for count, connections in options.cases:
                    turn = number % len(servers)
                    for server in servers[turn:] + servers[:turn]:
                        measured = asked(server, count, connections, options.seconds)
                        found.setdefault((server.name, count, connections), []).append(measured)
                        which = {"server": server.name, "rows": count, "connections": connections, "round": number}
                        print(json.dumps(which | {key: round(value, 3) for key, value in measured.items()}), flush=True)
            table(servers, options.cases, found)


def table(
    servers: list[Server], cases: list[tuple[int, int]], found: dict[tuple[str, int, int], list[dict[str, float]]]
) -> None:
    """Medians of the rounds, and ours to each peer's."""
    print("\n| server | rows | connections | p50 ms | p99 ms | requests/s | CPU us a request | MiB | errors |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")

    def median(name: str, count: int, connections: int, what: str) -> float:
        return statistics.median(each[what] for each in found[name, count, connections])

    for (count, connections), server in itertools.product(cases, servers):
        of = (server.name, count, connections)
        p50, p99, rate, cpu = (median(*of, what) for what in ("p50", "p99", "rate", "cpu"))
        errors = sum(each["errors"] for each in found[of])
        print(
            f"| {server.name} | {count} | {connections} | {p50:.2f} | {p99:.2f} | {rate:,.0f} | {cpu:,.0f} | "
            f"{server.memory():.0f} | {errors:.0f} |"
        )
    for (count, connections), peer in itertools.product(cases, servers[1:]):
        ratio = {
            what: median(servers[0].name, count, connections, what) / median(peer.name, count, connections, what)
            for what in ("p50", "p99", "rate", "cpu")
        }
        words = ", ".join(f"{what} {value:.2f}" for what, value in ratio.items())
        print(f"ours to {peer.name}'s, rows {count}, connections {connections}: {words}")


# ---- swaps -----------------------------------------------------------------------------------------------------------
def swaps(options: argparse.Namespace) -> None:
    """The champion moves 50 times while connections ask without a pause, of several workers: who answers with what?"""
    import http.client
    import threading

    import pyarrow.parquet as pq

    import tidemill
    from tidemill.storage.aliases import promote, resolve

    with tempfile.TemporaryDirectory() as folder:
        begin(Path(folder))
        registry, inbox = f"{folder}/registry", Path(folder, "inbox")
        inbox.mkdir()
        shard = pq.read_table(f"{folder}/data/part.parquet").slice(0, 100)
        for number in range(options.swaps):
            pq.write_table(shard, inbox / f"{number:04}.parquet")
        settings = {"limits": {"max_shards": 1}, "gate": {"champion": "ignore"}}
        tidemill.drain(str(inbox), registry, MODEL, tidemill.OnlineSettings.model_validate(settings))
        log = tidemill.open_log(registry, MODEL, writable=True)
        port = free_port()
        command = ["serve", registry, MODEL, "--port", str(port), "--workers", str(options.workers)]
        command += ["--poll-seconds", "0.05"]
        server = Server("tidemill", [sys.executable, "-m", "tidemill", *command], port, "/predict")
        body, over = server.body(1).encode(), threading.Event()
        seen: list[list[tuple[int, int, float]]] = [[] for _ in range(options.connections)]

        def ask(answers: list[tuple[int, int, float]]) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            while not over.is_set():
                began = time.perf_counter()
                connection.request("POST", "/predict", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                version = int(answer.headers["x-tidemill-version"])
                answers.append((answer.status, version, time.perf_counter() - began))

        threads = [threading.Thread(target=ask, args=(answers,)) for answers in seen]
        for thread in threads:
            thread.start()
        for number in range(1, options.swaps + 1):
            promote(log, "champion", resolve(log, str(number)))
            time.sleep(options.pause)
        over.set()
        for thread in threads:
            thread.join()
        server.close()
    every = sorted(seconds for answers in seen for _, _, seconds in answers)
    back = sum(b < a for answers in seen for (_, a, _), (_, b, _) in itertools.pairwise(answers))
    print(
        json.dumps(
            {
                "swaps": options.swaps,
                "workers": options.workers,
                "requests": len(every),
                "errors": sum(status != 200 for answers in seen for status, _, _ in answers),
                "older_after_newer": back,
                "versions_seen": len({version for answers in seen for _, version, _ in answers}),
                "p50_ms": round(1e3 * statistics.median(every), 2),
                "p99_ms": round(1e3 * every[-1 - len(every) // 100], 2),
                "max_ms": round(1e3 * every[-1], 2),
            }
        )
    )


# ---- freshness -------------------------------------------------------------------------------------------------------
def freshness(options: argparse.Namespace) -> None:
    """From the upload of a shard to the first answer of a version that contains it. `follow` and `serve` are on S3."""
    import http.client
    import io
    import threading

    import pyarrow.parquet as pq

    from tests.s3_server import running_server
    from tidemill.storage.log import VersionLog
    from tidemill.storage.urls import open_store

    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder, "s3")) as s3:
        os.environ |= s3.s3.environment()
        with s3.s3.client() as client:
            client.create_bucket(Bucket="benchmark")
        begin(Path(folder))
        registry, inbox = open_store("s3://benchmark/registry"), open_store("s3://benchmark/inbox")
        for file in Path(folder, "registry").rglob("*"):
            if file.is_file():
                registry.write(file.relative_to(f"{folder}/registry").as_posix(), file.read_bytes())
        sink = io.BytesIO()
        pq.write_table(pq.read_table(f"{folder}/data/part.parquet").slice(0, 1000), sink)
        poll = ["--poll-seconds", "0.2"]
        port = free_port()
        command = ["serve", registry.url, MODEL, "--port", str(port), *poll]
        server = Server("tidemill", [sys.executable, "-m", "tidemill", *command], port, "/predict")
        command = ["follow", inbox.url, registry.url, MODEL, *poll, "--gate.tolerance", "100"]
        follower = subprocess.Popen([sys.executable, "-m", "tidemill", *command], stderr=subprocess.DEVNULL)
        body, over, seen = server.body(1).encode(), threading.Event(), dict[int, float]()

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            while not over.wait(0.01):  # how exactly a version's time is seen
                connection.request("POST", "/predict", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                seen.setdefault(int(answer.headers["x-tidemill-version"]), time.time())

        asking = threading.Thread(target=ask)
        asking.start()
        inbox.write("first.parquet", sink.getvalue())
        while max(seen, default=0) < 1:
            time.sleep(0.1)
        put, began = dict[str, float](), time.monotonic()
        for number in range(options.shards):
            time.sleep(max(0.0, began + number * options.every - time.monotonic()))
            key = f"{number:06}.parquet"
            inbox.write(key, sink.getvalue())
            put[key] = time.time()
        log = VersionLog(registry, MODEL)
        while log.head().manifest.counters["shards"] <= options.shards:  # and the first one
            time.sleep(0.1)
        while max(seen) < log.head().number:
            time.sleep(0.1)
        over.set()
        asking.join()
        follower.terminate()
        follower.wait()
        server.close()
        waited = sorted(
            min(when for version, when in seen.items() if version >= each.number) - put[shard.key]
            for each in log.history(log.head())
            for shard in each.manifest.consumed
            if shard.key in put
        )
        print(
            json.dumps(
                {
                    "shards": len(waited),
                    "versions": log.head().number,
                    "p50_seconds": round(statistics.median(waited), 3),
                    "p99_seconds": round(waited[-1 - len(waited) // 100], 3),
                    "max_seconds": round(waited[-1], 3),
                }
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    suite = suites.add_parser("peers")
    suite.add_argument("--litserve", help="the Python of an environment that has LitServe")
    suite.add_argument("--mlflow", help="the Python of an environment that has MLflow")
    suite.add_argument("--seconds", type=float, default=5)
    suite.add_argument("--rounds", type=int, default=3)
    suite.add_argument("--cases", nargs="+", type=case, default=CASES, help="rows x connections, such as 1x16")
    suite = suites.add_parser("swaps")
    suite.add_argument("--swaps", type=int, default=50)
    suite.add_argument("--workers", type=int, default=2)
    suite.add_argument("--connections", type=int, default=8)
    suite.add_argument("--pause", type=float, default=0.3, help="seconds between two swaps")
    suite = suites.add_parser("freshness")
    suite.add_argument("--shards", type=int, default=200)
    suite.add_argument("--every", type=float, default=1.0, help="seconds between two shards")
    options = parser.parse_args()
    {"peers": peers, "swaps": swaps, "freshness": freshness}[options.suite](options)


if __name__ == "__main__":
    main()

"""Many models in one process beside one model with as many shards: rows per second, the start of the process included.

    .venv/bin/python -m benchmarks.tenants                                  # 100 models x 20 shards of 1,000 rows, local and S3
    .venv/bin/python -m benchmarks.tenants --tenants 10 --where local --repeat 1
    .venv/bin/python -m benchmarks.tenants --tenants 10 --repeat 7 --inside  # in this process, without its start

One of the many is poisoned: its head is not what was committed. Its shards stay where they are, and do not count. Both run as
a user runs them, `tidemill follow --mode drain`, by turns, each in a process of its own. The S3 server is started here
(`tests/s3_server.py`). Prints one JSON line for each run, then the ratio of the rates by clock and by CPU, round by round,
and the medians. On a busy machine, that by the CPU counts.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.online import BUCKET, NAMES, fill, shard

ROWS = 1000
SPEC = {
    "features": NAMES,
    "target": "y",
    "model": {"factory": "mlp", "arguments": {"hidden": [64, 32]}},
    "batch_size": 64,
    "epochs": 1,
}


def begin(registry: str, names: list[str]) -> None:
    """Version 0 of each: trained once, and copied."""
    from tidemill.storage.log import VersionLog
    from tidemill.storage.urls import open_store
    from tidemill.tasks import batch
    from tidemill.tasks.settings import BatchSettings
    from tidemill.tasks.training.spec import Spec

    dataset = f"{registry}-dataset"
    open_store(dataset).write("part.parquet", shard(1000, 0))
    for name in names:
        batch.train(dataset, registry, name, Spec.model_validate(SPEC), BatchSettings(holdout=0))
        assert VersionLog(open_store(registry), name).head().number == 0


def poison(registry: str, name: str) -> None:
    """Other weights than were committed."""
    from tidemill.storage.log import open_log
    from tidemill.storage.urls import open_store

    blob = open_log(registry, name).head().manifest.blobs.weights
    open_store(registry).write(blob.key, bytes(blob.bytes))


def pairs_of(base: str, names: list[str]) -> list[dict[str, str]]:
    return [{"inbox": f"{base}/inbox/{name}", "registry": f"{base}/registry", "model": name} for name in names]


def command(rows: int, *arguments: str) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(what was measured, exit code, what it printed) of `tidemill`, from the start of its process to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tidemill", *arguments, "--mode", "drain", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done.stdout:
        sys.exit(done.stderr[-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    measured = {
        **{"seconds": round(seconds, 2), "rows_a_second": round(rows / seconds)},
        **{"cpu_seconds": round(cpu, 2), "rows_a_cpu_second": round(rows / cpu)},
    }
    return measured, done.returncode, json.loads(done.stdout)


def many(base: str, folder: Path, tenants: int, shards: int, learners: int) -> dict[str, Any]:
    names = [f"m{number:04}" for number in range(tenants)]
    begin(f"{base}/registry", names)
    poison(f"{base}/registry", names[tenants // 2])
    contents = [shard(ROWS, seed) for seed in range(8)]
    pairs = pairs_of(base, names)
    for pair in pairs:
        fill(pair["inbox"], contents, shards)
    file = folder / "pairs.json"
    file.write_text(json.dumps(pairs))
    rows = (tenants - 1) * shards * ROWS
    measured, code, report = command(rows, "follow", "--pairs", str(file), "--learners", str(learners))
    done = [each for each in report["models"].values() if each["shards"] == shards]
    assert (code, len(report["failing"]), len(done)) == (1, 1, tenants - 1), (code, report["failing"], len(done))
    return measured


def one(base: str, shards: int) -> dict[str, Any]:
    begin(f"{base}/registry", ["one"])
    fill(f"{base}/inbox", [shard(ROWS, seed) for seed in range(8)], shards)
    measured, code, report = command(shards * ROWS, "follow", f"{base}/inbox", f"{base}/registry", "one")
    assert (code, report["shards"]) == (0, shards)
    return measured


def inside(base: str, tenants: int, shards: int) -> dict[str, float]:
    """What was measured of a drain in this process. None is poisoned."""
    from tidemill.tasks import online
    from tidemill.tasks.tenants import doors
    from tidemill.tasks.tenants.pairs import Pair

    names = [f"m{number:04}" for number in range(tenants)]
    begin(f"{base}/registry", names)
    pairs = pairs_of(base, names)
    for pair in pairs:
        fill(pair["inbox"], [shard(ROWS, seed) for seed in range(8)], shards)
    began, cpu = time.perf_counter(), time.process_time()
    report = doors.drain([Pair(**pair) for pair in pairs]) if tenants > 1 else online.drain(*pairs[0].values())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert report.shards == tenants * shards
    rows = report.shards * ROWS
    return {
        **{"seconds": round(seconds, 2), "rows_a_second": round(rows / seconds)},
        **{"cpu_seconds": round(cpu, 2), "rows_a_cpu_second": round(rows / cpu)},
    }


@contextmanager
def places(where: str, folder: Path) -> Iterator[str]:
    """The URL below which everything lies."""
    if where == "local":
        yield str(folder / "stores")
        return
    from tests.s3_server import running_server

    with running_server(folder) as server:
        os.environ |= server.s3.environment()
        with server.s3.client() as client:
            client.create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--shards", type=int, default=20, help="of each")
    parser.add_argument("--learners", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--where", choices=["local", "s3"], nargs="+", default=["local", "s3"])
    parser.add_argument("--inside", action="store_true", help="in this process, without its start")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for where in options.where:
        ratios: dict[str, list[float]] = {"rows_a_second": [], "rows_a_cpu_second": []}
        with tempfile.TemporaryDirectory() as name, places(where, Path(name)) as base:
            if options.inside:
                inside(f"{base}/warm-up/many", 2, 2)
                inside(f"{base}/warm-up/one", 1, 2)
            for number in range(options.repeat):
                rates = {}
                for case in ("many", "one")[:: 1 if number % 2 == 0 else -1]:
                    below = f"{base}/{number}/{case}"
                    tenants, shards = options.tenants, options.shards
                    if options.inside:
                        found = inside(below, *((tenants, shards) if case == "many" else (1, tenants * shards)))
                    elif case == "many":
                        found = many(below, Path(name), tenants, shards, options.learners)
                    else:
                        found = one(below, tenants * shards)
                    rates[case] = found
                    print(json.dumps({"suite": "tenants", "where": where, "case": case, **found}), flush=True)
                for rate, found in ratios.items():
                    found.append(round(rates["many"][rate] / rates["one"][rate], 3))
        told = {"medians": {rate: statistics.median(found) for rate, found in ratios.items()}}
        print(json.dumps({"suite": "tenants", "where": where, "case": "many to one", **told, **ratios}), flush=True)


if __name__ == "__main__":
    main()

"""What it costs to tell Prefect of a run: a drain with artifacts and events beside the same drain without.

    .venv/bin/python -m benchmarks.told                        # 1,000 shards of 1,000 rows, 8 pairs: a quarter of an hour
    .venv/bin/python -m benchmarks.told --shards 20 --pairs 2  # that it runs

Both are flow runs on one server, each in a process of its own, in turn; every other pair begins with the other. Measured are the
CPU seconds of the process, from the start of the flow run to the end of its last record. A ratio is without / with: 1 means that
telling costs nothing. Printed are the median of the ratios and its interval (`before_after.py`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.before_after import interval
from tests.flows.prefect_server import prefect_environment, running_prefect_server

FEATURES: Final = 10
SHARDS_A_COMMIT: Final = 8


def write_rows(path: Path, rows: int, seed: int) -> None:
    """A Parquet file of a linear target with noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, FEATURES), dtype=np.float32)
    columns = {f"x{i}": x[:, i] for i in range(FEATURES)}
    pq.write_table(pa.table(columns | {"y": x.sum(1) + 0.1 * rng.standard_normal(rows, dtype=np.float32)}), path)


def drain(folder: Path, told: bool) -> None:
    """Drain the inbox as a flow run, and print the CPU seconds of it."""
    import torch
    from prefect import flow
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    from tidemill.flows.telling import telling
    from tidemill.tasks import wrappers
    from tidemill.tasks.online.doors import run_by
    from tidemill.tasks.settings import OnlineSettings

    torch.set_num_threads(1)
    settings = OnlineSettings(limits={"max_shards": SHARDS_A_COMMIT})
    inbox, registry = str(folder / "inbox"), str(folder / "registry")

    @flow(name="drain")
    def run() -> int:
        with telling(registry, "m", settings.behind_seconds) if told else nullcontext():
            return run_by(wrappers.online_steps, inbox, registry, "m", settings).shards

    began = time.process_time()
    shards = run()
    APILogWorker.drain_all()
    EventsWorker.drain_all()
    print(json.dumps({"shards": shards, "cpu_seconds": time.process_time() - began}))


def measured(prepared: Path, environment: dict[str, str], told: bool) -> float:
    """CPU seconds of a drain of a copy of what was prepared."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(prepared, folder, dirs_exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.told", "--run", folder, *(["--told"] if told else [])]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["shards"] == len(list((prepared / "inbox").iterdir()))
    return float(found["cpu_seconds"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shards", type=int, default=1000)
    options.add_argument("--rows", type=int, default=1000, help="of each shard")
    options.add_argument("--pairs", type=int, default=8, help="at least six for an interval")
    options.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--told", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.run is not None:
        drain(chosen.run, chosen.told)
        return
    from tidemill.tasks.batch import train
    from tidemill.tasks.training.spec import Spec

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        prepared = Path(folder)
        for name in ("data", "inbox"):
            (prepared / name).mkdir()
        write_rows(prepared / "data" / "part.parquet", 10_000, seed=0)
        for number in range(chosen.shards):
            write_rows(prepared / "inbox" / f"{number:06d}.parquet", chosen.rows, seed=1 + number)
        spec = Spec(features=[f"x{i}" for i in range(FEATURES)], target="y", epochs=1)
        train(str(prepared / "data"), str(prepared / "registry"), "m", spec)
        ratios = []
        with running_prefect_server(Path(home)) as url:
            environment = os.environ | prefect_environment(Path(home)) | {"PREFECT_API_URL": url}
            for number in range(chosen.pairs):
                turns = (False, True) if number % 2 == 0 else (True, False)
                taken = {told: measured(prepared, environment, told) for told in turns}
                ratios.append(taken[False] / taken[True])
                print(f"without {taken[False]:.2f} s, with {taken[True]:.2f} s of CPU: {ratios[-1]:.3f}", flush=True)
    found = interval(ratios)
    print(f"median {median(ratios):.3f}" + ("" if found is None else f", interval {found[0]:.3f} to {found[1]:.3f}"))


if __name__ == "__main__":
    main()

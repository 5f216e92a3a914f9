"""Peak memory of one epoch, for datasets of different sizes: it must not grow with the data.

    .venv/bin/python benchmarks/memory.py                          # 4 and 16 million rows of 11 float32 columns
    .venv/bin/python benchmarks/memory.py --rows 500000 2000000 --repeat 1

Each epoch runs in a process of its own, which trains `examples/net.py` and reports the kernel's high-water mark of its resident
memory (`VmHWM`), and that mark before the epoch. Sizes take turns. Prints one JSON line for each epoch, then the median peak of
each size and the ratio of the largest to the smallest of these.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
FILE_ROWS, GROUP_ROWS = 262_144, 131_072


def write(folder: Path, rows: int) -> None:
    """x0 to x9 and y, float32, in files of 2 row groups."""
    folder.mkdir()
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - start)
        x = np.random.default_rng(number).standard_normal((10, count), dtype=np.float32)
        columns = {f"x{i}": x[i] for i in range(10)} | {"y": x.sum(0)}
        pq.write_table(pa.table(columns), folder / f"{number:05}.parquet", row_group_size=GROUP_ROWS)


def high_water_mb() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def epoch(folder: str, window_bytes: int) -> dict[str, float]:
    """Train one epoch; megabytes before it, and at the peak."""
    from tasks import batch
    from tasks.settings import BatchSettings
    from tasks.training.spec import Spec

    spec = Spec.model_validate(
        {
            "features": [f"x{i}" for i in range(10)],
            "target": "y",
            "model": {"factory": "examples.net:Net"},
            "batch_size": 1024,
            "epochs": 1,
            "standardize_features": False,
            "window_bytes": window_bytes,
        }
    )
    settings = BatchSettings(holdout=0)
    run = batch.open_run(batch.take_snapshot(folder), "memory://benchmark/registry", "net", spec, settings)
    batch.prepare(run)
    before = high_water_mb()
    batch.train_epoch(run, 0)
    return {"rows": run.learner.counters.rows, "before_mb": before, "peak_mb": high_water_mb()}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, nargs="+", default=[4 * 2**20, 16 * 2**20])
    options.add_argument("--window-bytes", type=int, default=32 * 2**20)
    options.add_argument("--repeat", type=int, default=3)
    chosen = options.parse_args()
    peaks: dict[int, list[float]] = {rows: [] for rows in chosen.rows}
    with tempfile.TemporaryDirectory() as folder:
        for rows in peaks:
            write(Path(folder) / str(rows), rows)
        for rows in list(peaks) * chosen.repeat:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result = pool.apply(epoch, (str(Path(folder) / str(rows)), chosen.window_bytes))
            print(json.dumps(result), flush=True)
            peaks[rows].append(result["peak_mb"])
    medians = {rows: statistics.median(found) for rows, found in peaks.items()}
    ratio = round(max(medians.values()) / min(medians.values()), 4)
    print(json.dumps({"median_peak_mb": medians, "largest_to_smallest": ratio}))


if __name__ == "__main__":
    main()

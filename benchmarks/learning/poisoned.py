"""Injected poison: how much worse does what is served become, with the gate and without it?

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.poisoned [--seeds 3] [--rows 10000]

A batch model, then the stream through real online runs on a store in memory, one version a shard. In the middle of the stream a
fifth of the shards is poisoned: labels flipped, a sensor stuck at 0 or full of noise, or one shard sent again and again under new
keys. After each version the error on a fixed holdout (a fifth of the batch part) is looked up: of the champion, which the gate
moves, and of the head, which is what would be served without a gate. Needs the `bench` extra. Writes OUT, a table (Markdown).
"""

import argparse
import io
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.learning import poison
from benchmarks.learning.ours import BUCKETS
from benchmarks.learning.streams import STREAMS, Stream, Y
from storage.log import open_log
from storage.urls import open_store
from tasks import batch, online
from tasks.gate import metric_of
from tasks.settings import BatchSettings, OnlineSettings
from tasks.training.spec import Column, Spec

TOLERANCE: Final = 0.05
RATE: Final = 0.1
COPIES: Final = 20


def poisons(stream: Stream) -> dict[str, Callable[[list[pa.Table]], Iterable[pa.Table]]]:
    """What is done to the shards of a stream."""
    first = 2 * len(stream.shards) // 5
    last = 3 * len(stream.shards) // 5
    sensor = stream.numbers[0]

    def hit(what: poison.Poison) -> Callable[[list[pa.Table]], Iterable[pa.Table]]:
        return lambda shards: poison.during(shards, first, last, what)

    return {
        "none": lambda shards: shards,
        "labels flipped": hit(poison.flipped_labels()),
        "sensor stuck": hit(poison.broken_sensor(sensor, "stuck")),
        "sensor noise": hit(poison.broken_sensor(sensor, "garbage")),
        f"a shard {COPIES} times": lambda shards: poison.duplicated(shards, first, COPIES),
    }


def spec_for(stream: Stream, seed: int) -> Spec:
    """An mlp, as in `benchmarks.learning.ours`."""
    columns = [
        Column(name=name, kind="category", buckets=BUCKETS) if name in stream.categories else Column(name=name)
        for name in stream.features
    ]
    return Spec.model_validate(
        {
            "features": columns,
            "target": Y,
            "task": stream.task,
            "loss": stream.loss,
            "model": {"factory": "mlp"},
            "learning_rate": RATE,
            "clip_norm": 1.0,
            "batch_size": 32,
            "epochs": 5,
            "seed": seed,
            "standardize_target": stream.task == "regression",
        }
    )


def put(url: str, key: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    open_store(url).write(key, sink.getvalue())


def traced(stream: Stream, shards: Iterable[pa.Table], seed: int) -> tuple[float, float, float]:
    """Holdout errors: of the batch model, the worst of all champions, and the worst of all heads."""
    root = f"memory://{uuid.uuid4().hex}"
    rows = stream.batch.num_rows * 4 // 5
    put(f"{root}/dataset", "part.parquet", stream.batch.slice(0, rows))
    put(f"{root}/holdout", "part.parquet", stream.batch.slice(rows))
    settings = BatchSettings(holdout_dataset=f"{root}/holdout", device="cpu")
    spec = spec_for(stream, seed)
    run = batch.open_run(batch.take_snapshot(f"{root}/dataset"), f"{root}/registry", "model", spec, settings)
    for epoch in run.epochs_left:
        batch.train_epoch(run, epoch)
    first = batch.register(run, batch.evaluate(run))
    batch.finish(run, first)
    metric = metric_of(spec)
    errors: dict[int, float] = {0: float(first.manifest.metrics["holdout"][metric])}
    log = open_log(f"{root}/registry", "model")
    follower = online.open_run(
        *(f"{root}/inbox", f"{root}/registry", "model"),
        OnlineSettings(max_shards=1, tolerance=TOLERANCE, holdout_dataset=f"{root}/holdout", device="cpu"),
    )
    champions = [0]
    for number, shard in enumerate(shards):
        put(f"{root}/inbox", f"{number:06}.parquet", shard)
        made = online.step(follower)
        if made.version is None:
            continue
        found: dict[str, Any] = log.version(made.version).manifest.metrics.get("holdout", {})
        errors[made.version] = float(found.get(metric, float("inf")))
        champions.append(log.aliases()["champion"])
    return errors[0], max(errors[champion] for champion in champions), max(errors.values())


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.poisoned", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument(
        "--streams", nargs="+", choices=list(STREAMS), default=["flights", "electricity", "sea", "hyperplane"]
    )
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rows", type=int, default=10_000)
    options.add_argument("--quick", action="store_true", help="sea, 1 seed, 4000 rows")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "poisoned.md")
    given = options.parse_args()
    if given.quick:
        given.streams, given.seeds, given.rows = ["sea"], 1, 4000
    torch.set_num_threads(1)
    lines = [
        "| stream | poison | batch model | worst champion, with the gate | worst head, without it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in given.streams:
        for what in poisons(STREAMS[name](0, given.rows)):
            cells: list[list[float]] = [[], [], []]
            for seed in range(given.seeds):
                stream = STREAMS[name](seed, given.rows)
                before, gated, free = traced(stream, poisons(stream)[what](stream.shards), seed)
                for cell, value in zip(cells, (before, gated / before - 1, free / before - 1), strict=True):
                    cell.append(value)
            mean = sum(cells[0]) / len(cells[0])
            lines.append(f"| {name} | {what} | {mean:.4g} | {max(cells[1]):+.1%} | {max(cells[2]):+.1%} |")
            print(lines[-1], flush=True)
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

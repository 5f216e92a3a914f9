"""Injected poison: how much worse does what is served become, with the gate and without it?

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.poisoned [--seeds 3] [--rows 10000]

A batch model, then the stream through real online runs on a store in memory, one version a shard. In the middle of the stream a
fifth of the shards is poisoned: labels flipped, a sensor stuck at 0 or full of noise, or one shard sent again and again under new
keys. After each version the error on a fixed holdout (a fifth of the batch part) is looked up: of the champion, which the gate
moves, and of the head, which is what would be served without a gate: the gate never changes what is trained. Learning rate and
epochs are those that `benchmarks.learning` chooses for `online`. Needs the `bench` extra. Writes OUT, a table (Markdown).
"""

import argparse
import io
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.learning import poison
from benchmarks.learning.ours import BATCH_SIZE, BUCKETS, CLIP_NORM, PASSES, Tidemill
from benchmarks.learning.protocol import Settings, choose
from benchmarks.learning.streams import STREAMS, Stream, Y
from tidemill.storage.aliases import all_aliases
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import step as online
from tidemill.tasks.settings import BatchSettings, GateSettings, Limits, OnlineSettings
from tidemill.tasks.training.spec import Column, Spec

TOLERANCE: Final = 0.05
COPIES: Final = 20


@dataclass(frozen=True)
class Errors:
    """On the holdout: of the batch model, and after each version of the champion and of the head."""

    batch: float
    champions: list[float]
    heads: list[float]


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


def spec_for(stream: Stream, settings: Settings, seed: int) -> Spec:
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
            "learning_rate": settings.rate,
            "clip_norm": CLIP_NORM["mlp"],
            "batch_size": BATCH_SIZE["mlp"],
            "epochs": settings.epochs,
            "seed": seed,
            "standardize_target": stream.task == "regression",
        }
    )


def put(url: str, key: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    open_store(url).write(key, sink.getvalue())


def traced(stream: Stream, shards: Iterable[pa.Table], chosen: Settings, seed: int) -> Errors:
    """A batch training, then an online run over these shards, one version each."""
    root = f"memory://{uuid.uuid4().hex}"
    rows = stream.batch.num_rows * 4 // 5
    put(f"{root}/dataset", "part.parquet", stream.batch.slice(0, rows))
    put(f"{root}/holdout", "part.parquet", stream.batch.slice(rows))
    settings = BatchSettings(holdout_dataset=f"{root}/holdout", device="cpu")
    spec = spec_for(stream, chosen, seed)
    first = batch.train(f"{root}/dataset", f"{root}/registry", "model", spec, settings)
    metric = spec.main_metric
    errors: dict[int, float] = {0: float(first.metrics["holdout"][metric])}
    log = open_log(f"{root}/registry", "model")
    follower = online.open_run(
        *(f"{root}/inbox", f"{root}/registry", "model"),
        OnlineSettings(
            limits=Limits(max_shards=1),
            gate=GateSettings(tolerance=TOLERANCE, holdout_dataset=f"{root}/holdout"),
            passes=PASSES["mlp"],
            device="cpu",
        ),
    )
    champions = [0]
    for number, shard in enumerate(shards):
        put(f"{root}/inbox", f"{number:06}.parquet", shard)
        made = online.step(follower)
        if made.version is None:
            continue
        found: dict[str, Any] = log.version(made.version).manifest.metrics.get("holdout", {})
        errors[made.version] = float(found.get(metric, float("inf")))
        champions.append(all_aliases(log)["champion"])
    return Errors(errors[0], [errors[champion] for champion in champions], list(errors.values()))


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.poisoned", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument(
        "--streams", nargs="+", choices=list(STREAMS), default=["steady", "flights", "electricity", "sea", "hyperplane"]
    )
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rows", type=int, default=10_000)
    options.add_argument("--quick", action="store_true", help="sea, 1 seed, 4000 rows")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "poisoned.md")
    given = options.parse_args()
    if given.quick:
        given.streams, given.seeds, given.rows = ["sea"], 1, 4000
        given.out = given.out.with_stem(f"{given.out.stem}-quick")  # the record of the full run stays
    torch.set_num_threads(1)
    lines = [
        "| stream | poison | batch model | worst champion, with the gate | last champion | worst head, without it | last head |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in given.streams:
        chosen = choose(Tidemill, [STREAMS[name](seed, given.rows) for seed in range(given.seeds)])
        for what in poisons(STREAMS[name](0, given.rows)):
            found = []
            for seed in range(given.seeds):
                stream = STREAMS[name](seed, given.rows)
                found.append(traced(stream, poisons(stream)[what](stream.shards), chosen, seed))
            lines.append(f"| {name} | {what} | {' | '.join(cells(found))} |")
            print(lines[-1], flush=True)
            given.out.write_text("\n".join(lines) + "\n")


def cells(found: list[Errors]) -> list[str]:
    """Mean over seeds of the batch model's error; of the others the change from it, of the seed where it is worst."""
    mean = sum(errors.batch for errors in found) / len(found)
    columns = (
        [max(errors.champions) / errors.batch for errors in found],
        [errors.champions[-1] / errors.batch for errors in found],
        [max(errors.heads) / errors.batch for errors in found],
        [errors.heads[-1] / errors.batch for errors in found],
    )
    return [f"{mean:.4g}", *(f"{max(column) - 1:+.1%}" for column in columns)]


if __name__ == "__main__":
    main()

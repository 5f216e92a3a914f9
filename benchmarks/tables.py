"""What an online shard costs where a model has a large table with sparse gradients: CPU time by the size of the table.

    .venv/bin/python benchmarks/tables.py                         # tables of 10 MB, 100 MB and 1 GB: 5 GB of memory
    .venv/bin/python benchmarks/tables.py --bytes 1000000 10000000

Each size runs in a process of its own, under SparseAdam. A shard has 1,000 rows, each with another id. First a learner without a
store: a shard is scored by it and by the champion, and trained on; then it is asked which rows have changed, and the champion
moves. Then all of it on a local folder, which takes four times the bytes of the table: one shard a commit, and what each has
written. The first shard after a start is not counted: the learner is read, and looks at all of its table once. Medians of the
CPU time, of all threads, in milliseconds. Prints one JSON line for each size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
EMBEDDING = 64
ROWS = 1000
SHARDS = 9


def shard(number: int) -> Any:
    import pyarrow as pa

    from tidemill.tasks.training.groups import TableGroup

    ids = [f"id {number * ROWS + i}" for i in range(ROWS)]
    numbers = [i / ROWS for i in range(ROWS)]
    return TableGroup(f"shard {number}", pa.table({"c": ids, "x": numbers, "y": numbers}))


def spec_of(size: int) -> Any:
    from tidemill.tasks.training.spec import Spec

    return Spec.model_validate(
        {
            "features": [{"name": "c", "kind": "category", "buckets": size // EMBEDDING // 4}, "x"],
            "target": "y",
            "model": {"factory": "mlp", "arguments": {"embedding": EMBEDDING, "sparse": True}},
            "optimizer": {"name": "sparse_adam"},
            "epochs": 1,
        }
    )


def in_memory(size: int) -> dict[str, float]:
    """What is done with a shard."""
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.learner import Learner
    from tidemill.tasks.training.loop import score, train_shard
    from tidemill.tasks.training.steps import Steps

    spec, first = spec_of(size), [shard(0)]
    learner = Learner.create(spec, Features.resolve(spec, first[0].schema).fit(first))
    steps = Steps(learner)
    train_shard(steps, first, 1)
    learner.committed()
    champion = learner.network()
    found: dict[str, list[float]] = {"score": [], "train": [], "touched": [], "champion": []}
    for number in range(1, SHARDS + 1):
        groups, marks = [shard(number)], [time.process_time()]
        score(learner, groups)
        score(champion, groups)
        marks.append(time.process_time())
        train_shard(steps, groups, 1)
        marks.append(time.process_time())
        weights, _ = learner.touched()
        learner.committed()
        marks.append(time.process_time())
        champion = learner.network(champion.renewed(learner))
        marks.append(time.process_time())
        assert 0.8 * ROWS < sum(map(len, weights.values())) <= ROWS + 1
        for name, (begin, end) in zip(found, pairwise(marks), strict=True):
            found[name].append(1000 * (end - begin))
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def on_a_folder(size: int) -> dict[str, float]:
    """Commits of one shard each, and the bytes that they have written."""
    import pyarrow.parquet as pq

    from tidemill.tasks import batch
    from tidemill.tasks.online.step import OnlineRun, step
    from tidemill.tasks.settings import OnlineSettings

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(SHARDS + 2):
            place = folder / ("inbox" if number else "data") / f"{number:02}.parquet"
            place.parent.mkdir(exist_ok=True)
            pq.write_table(shard(number).table, place)
        batch.train(str(folder / "data"), str(folder / "registry"), "m", spec_of(size))
        settings = OnlineSettings.model_validate({"grace_seconds": 0, "limits": {"max_shards": 1}})
        run = OnlineRun(str(folder / "inbox"), str(folder / "registry"), "m", settings)
        took, stored = [], [stored_bytes(folder / "registry")]
        for _ in range(SHARDS + 1):
            began = time.process_time()
            step(run)
            took.append(1000 * (time.process_time() - began))
            stored.append(stored_bytes(folder / "registry"))
    written = [after - before for before, after in pairwise(stored)]
    return {"commit": round(statistics.median(took[1:]), 2), "written_bytes": statistics.median(written[1:])}


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[10_000_000, 100_000_000, 1_000_000_000])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        size = asked.bytes[0]
        print(json.dumps({"table_bytes": size, **in_memory(size), **on_a_folder(size)}))
        return
    for size in asked.bytes:
        subprocess.run([sys.executable, __file__, "--one", "--bytes", str(size)], check=True)


if __name__ == "__main__":
    main()

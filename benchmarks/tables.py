"""What an online shard costs where a model has a large table with sparse gradients: CPU time by the size of the table.

    .venv/bin/python benchmarks/tables.py                         # tables of 10 MB, 100 MB and 1 GB: 5 GB of memory
    .venv/bin/python benchmarks/tables.py --bytes 1000000 10000000

Each size runs in a process of its own, under SparseAdam, without a store. A shard has 1,000 rows, each with another id. It is
scored by the learner and the champion, and trained on; then it is asked which rows have changed, and the champion moves: all that
a commit does beside reading the shard and storing the version. The learner looks at all of a table when it is made, and at its
first shard. The shards after that are measured: the median of the CPU time, of all threads. Prints one JSON line for each size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
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


def measure(size: int) -> dict[str, float]:
    """CPU milliseconds of what is done with a shard, in medians."""
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.learner import Learner
    from tidemill.tasks.training.loop import score, train_shard
    from tidemill.tasks.training.spec import Spec
    from tidemill.tasks.training.steps import Steps

    spec = Spec.model_validate(
        {
            "features": [{"name": "c", "kind": "category", "buckets": size // EMBEDDING // 4}, "x"],
            "target": "y",
            "model": {"factory": "mlp", "arguments": {"embedding": EMBEDDING, "sparse": True}},
            "optimizer": {"name": "sparse_adam"},
        }
    )
    first = [shard(0)]
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
        for name, begin, end in zip(found, marks, marks[1:], strict=False):
            found[name].append(1000 * (end - begin))
    medians = {name: round(statistics.median(values), 2) for name, values in found.items()}
    return medians | {"all": round(sum(medians.values()), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[10_000_000, 100_000_000, 1_000_000_000])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps({"table_bytes": asked.bytes[0], **measure(asked.bytes[0])}))
        return
    for size in asked.bytes:
        subprocess.run([sys.executable, __file__, "--one", "--bytes", str(size)], check=True)


if __name__ == "__main__":
    main()

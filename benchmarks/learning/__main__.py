"""Prequential error of frozen, online, replaying and retrained models on drifting streams, beside River and scikit-learn.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning                 # all streams, 3 seeds
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning --quick         # a minute or two: two streams, one seed
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning --streams sea agrawal --seeds 2

Needs the `bench` extra. Every learner has the same columns, the same shards, and its learning rate and epochs from the same
grid, chosen on the batch parts of all seeds. Writes raw results (JSON lines), a table (Markdown) and a plot for
each stream: OUT.jsonl, OUT.md, OUT-STREAM.png.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.learning import protocol, report
from benchmarks.learning.ours import Tidemill
from benchmarks.learning.peers import RiverLinear, RiverLinearByRow, RiverLinearTwice, RiverTree, SklearnSGD
from benchmarks.learning.protocol import Make, Settings, choose, summary
from benchmarks.learning.streams import STREAMS
from tidemill.tasks.training.spec import ReplayMemory

ROWS: Final = 10_000  # of a generated stream
REPLAY: Final = ReplayMemory(rows=4000, ratio=1.0)
# What is compared, and whose settings it takes: its own, or those chosen for another.
LEARNERS: Final[dict[str, tuple[Make, str | None]]] = {
    "frozen": (partial(Tidemill, policy="frozen"), "frozen"),
    "online": (Tidemill, "online"),
    "replay": (partial(Tidemill, replay=REPLAY), "replay"),
    "retrain": (partial(Tidemill, policy="retrain"), "frozen"),
    "online running": (partial(Tidemill, running=True), "online"),
    "river": (RiverLinear, "river"),
    "linear online": (partial(Tidemill, factory="linear"), "river"),  # the same steps: at the same rate
    "river twice": (RiverLinearTwice, "river twice"),
    "river by row": (RiverLinearByRow, "river"),
    "sklearn": (SklearnSGD, "sklearn"),
    "river tree": (RiverTree, None),  # for orientation, first seed only: it takes longer than all others together
}


def run(name: str, seeds: int, rows: int, learners: list[str]) -> list[dict[str, Any]]:
    """One result for each learner and seed."""
    results: list[dict[str, Any]] = []
    chosen: dict[str, Settings] = {}
    streams = [STREAMS[name](seed, rows) for seed in range(seeds)]
    for seed, stream in enumerate(streams):
        for learner in learners:
            make, source = LEARNERS[learner]
            if source is None and seed:
                continue
            if source is not None and source not in chosen:
                chosen[source] = choose(LEARNERS[source][0], streams)
            settings = Settings(0.0, 1) if source is None else chosen[source]
            began = time.process_time()
            found = summary(stream, protocol.run(make(stream, settings, seed), stream))
            about = {
                "stream": name,
                "learner": learner,
                "seed": seed,
                "seconds": round(time.process_time() - began, 2),
                "rate": settings.rate,
                "epochs": settings.epochs,
            }
            results.append(about | {"metrics": found})
            print(
                f"{name:>14} {learner:>14} seed {seed}:",
                {metric: round(value, 4) for metric, value in found.items() if metric != "by_shard"},
                f"rate {settings.rate}, {settings.epochs} epochs, {about['seconds']} s",
                flush=True,
            )
    return results


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    options.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rows", type=int, default=ROWS, help="of a generated stream; real ones are thinned alike")
    options.add_argument("--quick", action="store_true", help="sea and returning, 1 seed, 4000 rows")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results.md")
    given = options.parse_args()
    if given.quick:
        given.streams, given.seeds, given.rows = ["sea", "returning"], 1, 4000
        given.learners = [name for name in given.learners if name != "river tree"]
        given.out = given.out.with_stem(f"{given.out.stem}-quick")  # the record of the full run stays
    torch.set_num_threads(1)
    began = time.process_time()
    results: list[dict[str, Any]] = []
    for name in given.streams:
        results += run(name, given.seeds, given.rows, given.learners)
        with given.out.with_suffix(".jsonl").open("w") as file:  # after each stream: the last one may be an hour away
            file.writelines(json.dumps(line) + "\n" for line in report.flat(results))
        given.out.write_text(report.markdown(results, given.seeds))
    report.plot(results, given.out)
    print(given.out.read_text())
    print(f"{time.process_time() - began:.0f} s of CPU; {given.out}")


if __name__ == "__main__":
    main()

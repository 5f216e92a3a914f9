"""After `tidemill train` without another flag: does learning from the stream, as `tidemill follow` does, hold what it had?

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.defaults_online
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.defaults_online --streams steady --seeds 1

Needs the `bench` extra. Each shard is predicted before it is learned from, once. `frozen` never learns; `online` goes on with
the recipe's optimizer as it is; `no decay` goes on without its weight decay. Prints the error over the stream, and the ratios to
that of `frozen`: mean over the seeds, and its standard error.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from typing import Final

import numpy as np
import pyarrow as pa
import torch

from benchmarks.learning.ours import groups_of
from benchmarks.learning.protocol import errors, targets
from benchmarks.learning.streams import STREAMS, Stream, Y
from tidemill.storage.log import open_log
from tidemill.tasks.batch import train
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, train_shard
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.versions import load_learner

ROWS: Final = 10_000  # of a generated stream


def trained(stream: Stream, seed: int) -> Callable[[], Learner]:
    """Loads the version that `tidemill train` has made of the batch part, anew at each call."""
    asked = Spec(features=stream.features, target=Y, task=stream.task, recipe=1, seed=seed)
    registry = tempfile.mkdtemp(prefix="tidemill-defaults-")
    train(stream.batch, registry, "m", asked)
    log = open_log(registry, "m")
    return lambda: load_learner(log, log.head())


def predicted(learner: Learner, table: pa.Table) -> np.ndarray:
    return torch.cat(list(predict(learner, groups_of(table)))).double().numpy()


def followed(learner: Learner, stream: Stream, *, learns: bool = True, decays: bool = True) -> dict[str, float]:
    """The errors over the stream, of predictions made before each shard is learned from."""
    if not decays:
        for group in learner.optimizer.param_groups:
            group["weight_decay"] = 0.0
    steps, found = Steps(learner), []
    for shard in stream.shards:
        found.append(predicted(learner, shard))
        if learns:
            train_shard(steps, groups_of(shard), passes=1)
    return errors(stream, np.concatenate(found), targets(stream.shards))


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.defaults_online", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument(
        "--streams", nargs="+", choices=list(STREAMS), default=["flights", "electricity", "friedman-gra"]
    )
    options.add_argument("--seeds", type=int, default=3)
    given = options.parse_args()
    torch.set_num_threads(1)
    print("| stream | error | frozen | online | online / frozen | no decay / frozen |\n" + "| --- " * 6 + "|")
    for name in given.streams:
        runs = []
        for seed in range(given.seeds):
            stream = STREAMS[name](seed, ROWS)
            load = trained(stream, seed)
            frozen, online = followed(load(), stream, learns=False), followed(load(), stream)
            runs.append((frozen, online, followed(load(), stream, decays=False)))
        for metric in runs[0][0]:
            frozen, online, bare = np.array([[run[metric] for run in kind] for kind in zip(*runs, strict=True)])
            cells = [f"{frozen.mean():.4g}", f"{online.mean():.4g}"]
            for ratio in (online / frozen, bare / frozen):
                error = ratio.std(ddof=1) / math.sqrt(len(ratio)) if len(ratio) > 1 else math.nan
                cells.append(f"{ratio.mean():.3f} ± {error:.3f}")
            print(f"| {name} | {metric} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Ranks beside bare DistributedDataParallel: rows a second on the MLP 10-256-256-1 at a global batch of 2048.

    .venv/bin/python benchmarks/ranks.py                         # 2 ranks, 9 rounds: about 2 minutes
    .venv/bin/python benchmarks/ranks.py --ranks 4 --rounds 3

Each rank is a process with one thread of torch. In a round each case trains one epoch, one after the other, in another order
each time; all ranks begin and end together. `ddp` is a loop by hand over shuffled tensors in memory, each rank with its share of
each batch: no data is read. `ranks` and `parts` are Tidemill's training, which reads Parquet, decodes and shuffles too, on every
rank. `alone` is Tidemill in one process of the group while the others wait, with one thread; `threads` the same with as many
threads as there are ranks. The table has medians of the rounds: rows a second, CPU seconds of the first rank for an epoch, and
the rate as a share of that of `ddp` in the same round, with the lowest and the highest. Exit code 1: `ranks` is below 0.95 of
`ddp`, or `parts` below 0.9.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BATCH: Final = 2048
ROWS: Final = 128 * BATCH
GROUP_ROWS: Final = 32 * BATCH
COLUMNS: Final = [f"x{i}" for i in range(10)]
LEAST: Final = {"ranks": 0.95, "parts": 0.9}
"""Of the rate of bare DDP."""
PARTS: Final = 4


def write_data(folder: str) -> None:
    """One Parquet file of float32 columns and a target that follows from them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    columns = {name: random.normal(size=ROWS).astype(np.float32) for name in COLUMNS}
    columns["y"] = np.sin(columns["x0"]) + columns["x1"] * columns["x2"]
    (Path(folder) / "data").mkdir()
    pq.write_table(pa.table(columns), f"{folder}/data/part-0.parquet", row_group_size=GROUP_ROWS)


# ---- one rank --------------------------------------------------------------------------------------------------------
def rank(number: int, size: int, folder: str, rounds: int, others: bool, result: Connection) -> None:
    """Train all cases, round after round. The first rank sends {case: [(seconds, its CPU seconds) of each epoch]}."""
    import torch
    from torch import distributed
    from torch.distributed import FileStore

    from tidemill.tasks.ranks.launched import Place
    from tidemill.tasks.ranks.transport import TorchGroup

    torch.set_num_threads(1)
    store = FileStore(f"{folder}/default", size)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=timedelta(seconds=120))
    group = TorchGroup(FileStore(f"{folder}/ours", size), Place(number, size), 120)
    cases: dict[str, Callable[[int], None]] = {
        "ddp": ddp(number, size, folder),
        "ranks": ours(folder, group, None),
        "parts": ours(folder, group, PARTS),
    }
    if number == 0 and others:
        cases |= {"alone": ours(folder, None, None), "threads": threaded(ours(folder, None, None), size)}
    names = [*LEAST, "ddp", *(["alone", "threads"] if others else [])]
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(1 + rounds):
        for name in order.sample(names, len(names)):
            distributed.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            if name in cases:
                cases[name](turn)
            distributed.barrier()
            if turn:  # the first one warms up
                took[name].append((time.perf_counter() - began, time.process_time() - cpu))
    if number == 0:
        result.send(took)
    distributed.destroy_process_group()


def ddp(number: int, size: int, folder: str) -> Callable[[int], None]:
    """Epochs of bare DDP over tensors in memory."""
    import pyarrow.parquet as pq
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    table = pq.read_table(f"{folder}/data")
    x_NF = torch.stack([torch.from_numpy(table.column(name).to_numpy().copy()) for name in COLUMNS], 1)
    y_N1 = torch.from_numpy(table.column("y").to_numpy().copy()).unsqueeze(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    model, loss_function = DistributedDataParallel(net), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    share = BATCH // size

    def epoch(turn: int) -> None:
        order_N = torch.randperm(ROWS, generator=torch.Generator().manual_seed(turn))
        total = torch.zeros((), dtype=torch.float64)
        for at in range(number * share, ROWS, BATCH):
            rows = order_N[at : at + share]
            optimizer.zero_grad()
            loss = loss_function(model(x_NF[rows]), y_N1[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        assert torch.isfinite(total)

    return epoch


def ours(folder: str, group: Any, parts: int | None) -> Callable[[int], None]:
    """Epochs of Tidemill's training; `group`: the ranks, or None for one process."""
    from tidemill.storage.dataset import snapshot
    from tidemill.tasks.ranks.group import ALONE
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.learner import Learner
    from tidemill.tasks.training.loop import train_pass
    from tidemill.tasks.training.spec import Spec
    from tidemill.tasks.training.steps import Steps

    spec = Spec.model_validate(
        {
            **{"features": COLUMNS, "target": "y", "batch_size": BATCH, "standardize_features": False, "parts": parts},
            **{"model": {"factory": "mlp", "arguments": {"hidden": [256, 256]}}},
        }
    )
    groups = snapshot(f"{folder}/data").row_groups
    learner = Learner.create(spec, Features.resolve(spec, groups[0].schema).fit(groups))
    steps = Steps(learner, group=group or ALONE)

    def epoch(turn: int) -> None:
        result = train_pass(steps, groups, key=("epoch", turn))
        assert result.rows == ROWS

    return epoch


def threaded(epoch: Callable[[int], None], threads: int) -> Callable[[int], None]:
    """The same with so many threads of torch."""
    import torch

    def wrapped(turn: int) -> None:
        torch.set_num_threads(threads)
        try:
            epoch(turn)
        finally:
            torch.set_num_threads(1)

    return wrapped


# ---- all of them -----------------------------------------------------------------------------------------------------
@contextmanager
def started(size: int, rounds: int, others: bool) -> Iterator[Connection]:
    """So many ranks over data of their own; the result comes through the connection."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        processes = [context.Process(target=rank, args=(i, size, folder, rounds, others, sending)) for i in range(size)]
        for process in processes:
            process.start()
        sending.close()
        try:
            yield receiving
        finally:
            for process in processes:
                process.join(30)
                if process.is_alive():
                    process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--brief", action="store_true", help="neither alone nor threads")
    given = parser.parse_args()
    with started(given.ranks, given.rounds, not given.brief) as receiving:
        took: dict[str, list[tuple[float, float]]] = receiving.recv()
    failed = []
    for name, of_case in took.items():
        shares = [bare / own for (bare, _), (own, _) in zip(took["ddp"], of_case, strict=True)]
        found = {
            "case": name,
            "ranks": given.ranks,
            "rows_s": round(ROWS / statistics.median(seconds for seconds, _ in of_case)),
            "cpu_s": round(statistics.median(cpu for _, cpu in of_case), 3),
            "of_ddp": round(statistics.median(shares), 3),
            "lowest": round(min(shares), 3),
            "highest": round(max(shares), 3),
        }
        print(json.dumps(found), flush=True)
        if found["of_ddp"] < LEAST.get(name, 0.0):
            failed.append(name)
    if failed:
        sys.exit(f"below the least share of bare DDP: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""Training on a GPU: the same bits after a kill, and rows a second beside loops by hand. Under 8 minutes; prints JSON lines,
each as soon as it is known.

    .venv/bin/python benchmarks/gpu.py --out gpu.jsonl
    .venv/bin/python benchmarks/gpu.py --device cpu --seconds 0.5        # that the script runs, where there is no GPU

It makes its own data: Parquet of 20 float32 columns. First a training is killed after two of four epochs and started again; its
weights and state must be those of one that nobody killed, with deterministic algorithms. Where there are several GPUs, two
ranks (NCCL) with `parts` must have the bits of one process; where there is one, what ranks do by NCCL is done by a group of one.
Then rates, of one case after the other in each round: `ours` reads Parquet, shuffles, trains in float32, `ours bfloat16` by
autocast; `bare` is a loop by hand that picks batches out of tensors in memory, and copies them by way of pinned memory;
`resident` the same over tensors on the GPU. Rounds that would begin after `LAST_SECONDS` are left out. Exit code 1: bits differ,
or a training has failed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
COLUMNS: Final = [f"x{i}" for i in range(20)]
ROUNDS: Final = 3
CASES: Final = ((256, 2048), (1024, 8192))
"""(units of each of two hidden layers, rows of a batch)"""
LAST_SECONDS: Final = 400.0
"""After so long no round begins, so that all is told within 8 minutes."""
TRAINING_SECONDS: Final = 150.0
"""A training of the small data that takes longer has failed."""
KILL_AFTER: Final = 2
EPOCHS: Final = 4
DETERMINISTIC: Final = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What torch asks for beside `use_deterministic_algorithms`; see its notes on reproducibility."""


def write_data(folder: str, rows: int) -> None:
    """One Parquet file of `rows` rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    columns = {name: random.normal(size=rows).astype(np.float32) for name in COLUMNS}
    columns["y"] = np.sin(columns["x0"]) + columns["x1"] * columns["x2"]
    os.makedirs(folder)
    pq.write_table(pa.table(columns), f"{folder}/part-0.parquet", row_group_size=65_536)


def spec_of(units: int, batch: int, **settings: Any) -> Any:
    """The training that is measured."""
    from tidemill.tasks.training.spec import Spec

    common = {"features": COLUMNS, "target": "y", "batch_size": batch, "standardize_features": False}
    model = {"factory": "mlp", "arguments": {"hidden": [units, units], "dropout": 0.1}}
    return Spec.model_validate({**common, "model": model, **settings})


# ---- bits ------------------------------------------------------------------------------------------------------------
def train(data: str, registry: str, device: str, killed: bool) -> None:
    """A batch training in this process, which dies after some of the epochs if it is to be `killed`."""
    import dataclasses

    import torch

    from tidemill.tasks import batch
    from tidemill.tasks.batch_run import BatchRun
    from tidemill.tasks.settings import BatchSettings

    torch.use_deterministic_algorithms(True)

    def train_epoch(run: BatchRun, epoch: int) -> float:
        loss = batch.train_epoch(run, epoch)
        if killed and epoch + 1 == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    steps = dataclasses.replace(batch.PLAIN, train_epoch=train_epoch)
    spec = spec_of(256, 512, epochs=EPOCHS, optimizer={"name": "adam"}, learning_rate=1e-3)
    batch.train_by(steps, data, registry, "gpu", spec, BatchSettings(device=device, holdout=0.1))


def killed_and_not(data: str, folder: str, device: str) -> dict[str, Any]:
    """Whether a training that was killed and started again has the bits of one that was not."""
    from tidemill.storage.log import open_log

    about, found = {"case": "killed and started again"}, {}
    for name, kills in (("straight", (False,)), ("killed", (True, False))):
        for killed in kills:
            command = [sys.executable, __file__, "--device", device, "--train", data, f"{folder}/{name}"]
            arguments = [*command, *(["--killed"] if killed else [])]
            try:
                ended = subprocess.run(
                    arguments, check=False, env=os.environ | DETERMINISTIC, timeout=TRAINING_SECONDS
                ).returncode
            except subprocess.TimeoutExpired:
                return about | {"same_bits": False, "why": f"a training took longer than {TRAINING_SECONDS:.0f} s"}
            if ended != (-signal.SIGKILL if killed else 0):
                return about | {"same_bits": False, "why": f"a training ended with {ended}"}
        blobs = open_log(f"{folder}/{name}", "gpu").head().manifest.blobs
        found[name] = (blobs.weights.sha256, blobs.state.sha256)
    return about | {"same_bits": found["straight"] == found["killed"]}


def rank(number: int, size: int, folder: str, data: str, result: Any) -> None:
    """One of the ranks that train with parts; sends the sha256 of its weights and state."""
    os.environ |= DETERMINISTIC
    import hashlib

    import torch
    from torch.distributed import FileStore

    from tidemill.storage.dataset import snapshot
    from tidemill.tasks.ranks.group import ALONE, Group
    from tidemill.tasks.ranks.launched import Place
    from tidemill.tasks.ranks.transport import TorchGroup
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.learner import Learner
    from tidemill.tasks.training.loop import train_pass
    from tidemill.tasks.training.steps import Steps

    torch.use_deterministic_algorithms(True)
    torch.cuda.set_device(number)
    group: Group = ALONE if size == 1 else TorchGroup(FileStore(f"{folder}/store", size), Place(number, size), 60)
    groups = snapshot(data).row_groups[:1]
    spec = spec_of(256, 512, parts=4)
    learner = Learner.create(spec, Features.resolve(spec, groups[0].schema).fit(groups), "cuda")
    train_pass(Steps(learner, group=group), groups, key=("epoch", 0))
    result.send([hashlib.sha256(part).hexdigest() for part in learner.dump()])


def alone_by_nccl(folder: str, device: str) -> dict[str, Any]:
    """Whether a group of one rank can be made, and NCCL carries its tensors: its sums, and what is sent."""
    about = {"case": "a group of one rank by NCCL"}
    if device != "cuda":
        return about | {"skipped": "it needs a GPU"}
    result = multiprocessing.get_context("spawn").Process(target=carry, args=(f"{folder}/alone",))
    result.start()
    result.join(TRAINING_SECONDS)
    if result.exitcode is None:
        result.kill()
    return about | {"same_bits": result.exitcode == 0}


def carry(store: str) -> None:
    """Fails unless a group of one leaves tensors on the GPU as they are."""
    import torch
    from torch.distributed import FileStore

    from tidemill.tasks.ranks.launched import Place
    from tidemill.tasks.ranks.transport import TorchGroup

    group = TorchGroup(FileStore(store, 1), Place(0, 1), 60)
    for dtype in (torch.float32, torch.float64, torch.int32):
        flat = torch.arange(1000, device="cuda").to(dtype)
        expected = flat.clone()
        group.sum_(flat)
        group.broadcast_(flat)
        if not torch.equal(flat, expected):
            raise SystemExit(f"NCCL has changed a tensor of {dtype}")


def two_ranks(data: str, folder: str, device: str) -> dict[str, Any]:
    """Whether two ranks on two GPUs have the bits of one process."""
    import torch

    about = {"case": "two ranks with parts"}
    if device != "cuda" or torch.cuda.device_count() < 2:
        return about | {"skipped": "it needs two GPUs"}
    context = multiprocessing.get_context("spawn")
    found = []
    for size in (1, 2):
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=rank, args=(number, size, folder, data, sending))
            for number, (_, sending) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        found += [receiving.recv() for receiving, _ in pipes if receiving.poll(60)]
        for process in processes:
            process.join(30)
            if process.exitcode is None:
                process.kill()
    return about | {"same_bits": len(found) == 3 and all(digests == found[0] for digests in found)}


# ---- rates -----------------------------------------------------------------------------------------------------------
def ours(data: str, device: str, units: int, batch: int, precision: str) -> Callable[[int], int]:
    """Passes of Tidemill's training: each returns its rows."""
    from tidemill.storage.dataset import snapshot
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.learner import Learner
    from tidemill.tasks.training.loop import train_pass
    from tidemill.tasks.training.steps import Steps

    spec = spec_of(units, batch, precision=precision)
    groups = snapshot(data).row_groups
    steps = Steps(Learner.create(spec, Features.resolve(spec, groups[0].schema).fit(groups), device))
    return lambda turn: train_pass(steps, groups, key=("epoch", turn)).rows


def bare(data: str, device: str, units: int, batch: int, *, resident: bool) -> Callable[[int], int]:
    """Passes of a loop by hand over tensors in memory, which are shuffled once a pass."""
    import pyarrow.parquet as pq
    import torch
    from torch import nn

    table = pq.read_table(data)
    x_NF = torch.stack([torch.from_numpy(table.column(name).to_numpy().copy()) for name in COLUMNS], 1)
    y_N1 = torch.from_numpy(table.column("y").to_numpy().copy()).unsqueeze(1)
    place = torch.device(device)
    if resident:
        x_NF, y_N1 = x_NF.to(place), y_N1.to(place)
    layers = [nn.Linear(20, units), nn.ReLU(), nn.Dropout(0.1), nn.Linear(units, units), nn.ReLU(), nn.Dropout(0.1)]
    model, loss_function = nn.Sequential(*layers, nn.Linear(units, 1)).to(place), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def epoch(turn: int) -> int:
        order_N = torch.randperm(len(x_NF), device=x_NF.device)
        total = torch.zeros((), dtype=torch.float64, device=place)
        for at in range(0, len(x_NF), batch):
            rows = order_N[at : at + batch]
            x_BF, y_B1 = x_NF[rows], y_N1[rows]
            if device == "cuda" and not resident:
                x_BF = x_BF.pin_memory().to(place, non_blocking=True)
                y_B1 = y_B1.pin_memory().to(place, non_blocking=True)
            optimizer.zero_grad()
            loss = loss_function(model(x_BF), y_B1)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        assert torch.isfinite(total)  # waits for the device
        return len(x_NF)

    return epoch


def rates(data: str, device: str, units: int, batch: int, seconds: float, last: float) -> list[dict[str, Any]]:
    """Rows a second of each case: the median of rounds of about so many seconds, none of which begins after a moment."""
    passes = {
        "ours": ours(data, device, units, batch, "float32"),
        "ours bfloat16": ours(data, device, units, batch, "bfloat16"),
        "bare": bare(data, device, units, batch, resident=False),
        "resident": bare(data, device, units, batch, resident=True),
    }
    found: dict[str, list[float]] = {name: [] for name in passes}
    for one in passes.values():
        one(-1)  # warms up
    for turn in range(ROUNDS):
        if turn and time.monotonic() > last:
            break
        for name, one in passes.items():
            rows, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                rows += one(turn)
            found[name].append(rows / (time.perf_counter() - began))
    shares = {name: [a / b for a, b in zip(of, found["bare"], strict=True)] for name, of in found.items()}
    return [
        {
            **{"case": name, "units": units, "batch": batch, "rows_s": round(statistics.median(of_case))},
            "rounds": len(of_case),
            "of_bare": round(statistics.median(shares[name]), 3),
        }
        for name, of_case in found.items()
    ]


# ---- all of it -------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each case in a round")
    parser.add_argument("--rows", type=int, default=2**21)
    parser.add_argument("--out", help="a file for the lines, beside stdout")
    parser.add_argument("--train", nargs=2, metavar=("DATA", "REGISTRY"), help=argparse.SUPPRESS)
    parser.add_argument("--killed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(*given.train, given.device, given.killed)
        return
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device here")
    last, lines = time.monotonic() + LAST_SECONDS, list[dict[str, Any]]()

    def tell(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if given.out:
            Path(given.out).write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    tell(
        {
            **{"torch": torch.__version__, "threads": torch.get_num_threads()},
            "device": torch.cuda.get_device_name() if given.device == "cuda" else given.device,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        data, small = f"{folder}/data", f"{folder}/small"
        write_data(data, given.rows)
        write_data(small, min(given.rows, 2**17))
        tell(killed_and_not(small, folder, given.device))
        tell(alone_by_nccl(folder, given.device))
        tell(two_ranks(small, folder, given.device))
        for units, batch in CASES:
            for line in rates(data, given.device, units, batch, given.seconds, last):
                tell(line)
    if not all(line.get("same_bits", True) for line in lines):
        sys.exit("bits differ, or a training has failed")


if __name__ == "__main__":
    main()

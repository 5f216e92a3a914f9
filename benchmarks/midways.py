"""What checkpoints inside of an epoch cost, in CPU time, at the default; and how much work a kill repeats at most.

    OMP_NUM_THREADS=1 python -m benchmarks.midways [--seconds 75]

Trains three networks for about so many seconds each, in one epoch that would take much longer, and stops them as a kill would.
Columns: MB of a checkpoint, how many were stored, CPU ms of each, their share of the CPU time of the run, and the longest time
between two of them, which is what a kill repeats at most. A last line says how often one is stored that takes long.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tidemill.tasks import batch
from tidemill.tasks.batch_run import BatchRun
from tidemill.tasks.midways import Midways
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.midway import Midway
from tidemill.tasks.training.spec import Spec

WIDTHS: Final = (64, 1024, 2560)
"""Of two hidden layers."""
ROWS: Final = 8_000_000


class Stopped(BaseException):
    """The time is over."""


class Measured(Midways):
    """Notes what checkpoints take, and ends the run after some time."""

    def __init__(self, run: BatchRun, settings: BatchSettings, seconds: float) -> None:
        super().__init__(run._copied, settings.checkpoint_seconds)
        self._until: float | None = None
        self._length = seconds
        self.costs: list[float] = []
        self.times: list[float] = []
        self.began_cpu = 0.0

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self._until, self.times, self.began_cpu = (
            time.monotonic() + self._length,
            [time.monotonic()],
            time.process_time(),
        )

    def due(self, rows: int) -> bool:
        if self._until is not None and time.monotonic() > self._until:
            raise Stopped
        return super().due(rows)

    def keep(self, midway: Midway) -> None:
        super().keep(midway)
        super().wait()  # so that its cost is known
        self.costs.append(self._cost)
        self.times.append(time.monotonic())


def measured(folder: Path, width: int, seconds: float) -> tuple[Any, ...]:
    spec = Spec(
        target="y",
        model={"factory": "mlp", "arguments": {"hidden": [width, width]}},
        optimizer={"name": "adam"},
        learning_rate=1e-4,
        batch_size=64,
        epochs=1,
        task="regression",
    )
    settings = BatchSettings(holdout=0, device="cpu")
    run = batch.open_run(
        batch.take_snapshot(str(folder / "data")), str(folder / "registry"), f"w{width}", spec, settings
    )
    batch.prepare(run)
    run.midways = keeper = Measured(run, settings, seconds)
    weights, _ = run.load_or_fit().dump()
    size = 3 * len(weights)  # the state of Adam comes with the first step
    try:
        batch.train_epoch(run, 0)
        print("the epoch has ended: raise ROWS")
    except Stopped:
        pass
    cpu = time.process_time() - keeper.began_cpu
    gaps = [later - earlier for earlier, later in zip(keeper.times, keeper.times[1:], strict=False)]
    cost = sum(keeper.costs)
    return (
        size / 1e6,
        len(keeper.costs),
        1e3 * cost / max(1, len(keeper.costs)),
        100 * cost / cpu,
        max(gaps, default=0.0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        columns = {f"x{i}": torch.randn(ROWS, generator=torch.Generator().manual_seed(i)).numpy() for i in range(10)}
        pq.write_table(pa.table(columns | {"y": columns["x0"]}), folder / "data" / "0.parquet", row_group_size=100_000)
        print("MB   stored   CPU ms each   share of CPU %   longest time between s")
        for width in WIDTHS:
            mb, count, each, share, gap = measured(folder, width, seconds)
            print(f"{mb:<8.1f}{count:<8}{each:<14.1f}{share:<17.2f}{gap:.1f}", flush=True)


if __name__ == "__main__":
    main()

"""SIGKILL at random times inside of epochs: the same bits, and no more work is repeated than came since the last checkpoint."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch

from tests.data import parquet
from tests.guarantees.audit import audit
from tests.guarantees.children import DEADLINE, bits, fill, start_child, start_server
from tidemill.progress import Activity, listening
from tidemill.storage.log import open_log
from tidemill.tasks import batch
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.spec import Spec

ALLOWED = 60.0
"""Seconds of work that may be repeated at the default."""
EVERY = 2_000
"""Rows between two checkpoints of the sample."""


class Noted:
    """A listener: writes to a file how far a run is."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1)

    def on_activity(self, activity: Activity) -> None:
        if activity.what.startswith("epoch") and activity.total is not None and activity.rows:
            epoch = int(activity.what.split()[1]) - 1
            self._file.write(f"{time.monotonic()} {epoch * activity.total + activity.rows}\n")

    def on_event(self, event: object) -> None:
        pass


def noted_train(dataset: str, registry: str, spec: Spec, settings: BatchSettings, file: str) -> None:
    with listening(Noted(Path(file))):
        batch.train(dataset, registry, "model", spec, settings)


def read(file: Path) -> list[tuple[float, int]]:
    """(time, rows of all epochs) after each batch, as far as whole lines were written."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [line.split() for line in lines if line.endswith("\n")]
    return [(float(at), int(rows)) for at, rows in found]


def test_killed_at_random_times(full: bool, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The full one: epochs of minutes, the default checkpoints, 20 kills. The sample, in seconds: one after so many rows."""
    kills, most, rows, width = (20, 75.0, 400_000, 768) if full else (3, 1.5, 24_000, 128)
    settings = BatchSettings(device="cpu", checkpoint_rows=None if full else EVERY)
    start_server()
    random_rows = torch.randn(8, rows, generator=torch.Generator().manual_seed(0))
    columns = {f"x{i}": x.tolist() for i, x in enumerate(random_rows)}
    fill(str(tmp_path / "dataset"), {"part.parquet": parquet(pa.table(columns | {"y": columns["x0"]}), rows // 40)})
    spec = Spec(
        target="y",
        model={"factory": "mlp", "arguments": {"hidden": [width, width], "dropout": 0.1}},
        optimizer={"name": "adam"},
        learning_rate=1e-4,
        ema_decay=0.99,
        shuffle_bytes=rows * 10,
        epochs=3,
    )

    def run(registry: str, file: Path, kill_after: float | None = None) -> bool:
        """Whether the run came to its end; it is killed so many seconds after it has begun, or gone on, to train."""
        child = start_child(noted_train, str(tmp_path / "dataset"), registry, spec, settings, str(file))
        until = time.monotonic() + DEADLINE
        while kill_after is not None and child.is_alive() and not read(file):
            assert time.monotonic() < until
            time.sleep(0.01)
        child.join(kill_after if kill_after is not None else DEADLINE * (20 if full else 1))
        if not child.is_alive():
            return True
        assert kill_after is not None, "it does not come to an end"
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return False

    assert run(str(tmp_path / "whole"), tmp_path / "whole.txt")
    draw, registry = random.Random(1), str(tmp_path / "registry")
    seconds: list[float] = []  # of work that was repeated after each kill
    repeated: list[int] = []  # and rows
    before: list[tuple[float, int]] = []
    for number in range(kills + 1):
        file = tmp_path / f"{number}.txt"
        ended = run(registry, file, draw.uniform(0.2 * most, most) if number < kills else None)
        steps = read(file)
        if before and steps:
            # From where the killed run had come to, back to where this one began, by the times of the killed one.
            (last, reached), began = before[-1], steps[0][1]
            seconds.append(last - next(at for at, rows_then in before if rows_then >= min(began, reached)))
            repeated.append(max(0, reached - began))
        before = steps
        if ended:
            break
    whole, log = (open_log(str(tmp_path / name), "model") for name in ("whole", "registry"))
    audit(log, [])
    assert bits(log) == bits(whole)
    assert log.head().manifest.metrics == whole.head().manifest.metrics
    assert repeated, "it was killed while it trained"
    if full:
        assert max(seconds) <= ALLOWED
    else:  # what comes while one is stored, and until the next one is
        assert max(repeated) <= 2 * EVERY + spec.batch_size
    told = f"{len(repeated)} kills, at most {max(seconds):.1f} s of work repeated, {max(repeated):,} rows"
    record_property("killed inside of epochs", told)
    print(told)

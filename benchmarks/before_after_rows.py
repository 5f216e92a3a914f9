"""What `before_after.py` measures, in a process of its own, of the checkout that comes first on `PYTHONPATH`.

    PYTHONPATH=CHECKOUT .venv/bin/python -P benchmarks/before_after_rows.py data FOLDER [--small]
    PYTHONPATH=CHECKOUT .venv/bin/python -P benchmarks/before_after_rows.py ROW[,ROW...] FOLDER SCRATCH [--small]

The second form prints a line of JSON for each row: `rows`, how many rows of data went through, and `cpu_seconds` of the process
with all of its threads (of its children for `startup`). What is done once, such as imports, compilation and the first epoch, is
not counted.

A checkout is one of today, or an old one: up to 583fb7b the packages are called `flows`, `tasks` and `storage`. Bodies take what
is there, and call functions only with arguments that all checkouts understand.
"""

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

CHECKOUT: Final = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
PACKAGE: Final = "tidemill." if (CHECKOUT / "tidemill").is_dir() else ""
NAMES: Final = tuple(f"x{i}" for i in range(10))


@dataclass(frozen=True)
class Size:
    """How much a row does: about two CPU seconds, or as little as shows that it runs."""

    groups: int
    """Row groups of the dataset."""
    group_rows: int
    epochs: int
    """Epochs of batches of 64 rows that are measured; four times as many of 1,024 rows and of compiled steps."""
    shards: int
    """Small shards."""
    large_rows: int
    large_shards: int
    repeat: int
    """How often a command is started; predictions are made four times as often."""


FULL: Final = Size(groups=4, group_rows=65_536, epochs=6, shards=400, large_rows=150_000, large_shards=6, repeat=8)
SMALL: Final = Size(groups=1, group_rows=8_192, epochs=1, shards=4, large_rows=2_000, large_shards=1, repeat=1)
SHARD_ROWS: Final = 500
WARM_UP_SHARDS: Final = 3


class Spent:
    """The CPU seconds of a part of this process."""

    seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began


# ---- data ------------------------------------------------------------------------------------------------------------
def write_data(folder: Path, size: Size) -> None:
    """The dataset, and one shard of each size. Both checkouts read the same bytes."""
    (folder / "dataset").mkdir()
    _write(folder / "dataset" / "part.parquet", size.groups * size.group_rows, size.group_rows, 0)
    _write(folder / "small.parquet", SHARD_ROWS, SHARD_ROWS, 1)
    _write(folder / "large.parquet", size.large_rows, 131_072, 2)


def _write(path: Path, rows: int, group_rows: int, seed: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = np.random.default_rng(seed).standard_normal((len(NAMES), rows), dtype=np.float32)
    columns = dict(zip(NAMES, x, strict=True)) | {"y": x.sum(0) / len(NAMES)}
    pq.write_table(pa.table(columns), path, row_group_size=group_rows)


# ---- the product, as this checkout has it ----------------------------------------------------------------------------
def product(name: str) -> ModuleType:
    """A module of the checkout; nobody else's."""
    module = importlib.import_module(PACKAGE + name)
    assert module.__file__ is not None
    assert Path(module.__file__).is_relative_to(CHECKOUT), f"{module.__file__} is not in {CHECKOUT}"
    return module


def _spec(**more: Any) -> Any:
    settings = {"features": NAMES, "target": "y", "model": {"factory": "examples.net:Net"}, "batch_size": 64}
    return product("tasks.training.spec").Spec.model_validate(settings | more)


def _no_holdout() -> Any:
    settings = product("tasks.settings").BatchSettings
    return settings(**{next(name for name in ("holdout_share", "holdout") if name in settings.model_fields): 0})


def _batch_run(data: Path, scratch: Path, spec: Any) -> Any:
    batch = product("tasks.batch")
    dataset = batch.take_snapshot(str(data / "dataset"))
    run = batch.open_run(dataset, str(scratch / "registry"), "net", spec, _no_holdout())
    batch.prepare(run)
    return run


def _version_0(data: Path, scratch: Path, **spec: Any) -> Any:
    """A registry with a model that was trained for one epoch."""
    batch = product("tasks.batch")
    run = _batch_run(data, scratch, _spec(epochs=1, **spec))
    batch.train_epoch(run, 0)
    batch.finish(run, batch.register(run, batch.evaluate(run)))


# ---- rows ------------------------------------------------------------------------------------------------------------
def loader(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """Parquet files to shuffled batches of 64 rows."""
    spec = _spec(standardize_features=False)
    groups = product("storage.dataset").snapshot(str(data / "dataset")).row_groups
    features = product("tasks.training.features").Features.resolve(spec, groups[0].schema).fit(groups, None)

    def one_pass(number: int) -> int:
        stream = product("tasks.training.batches").Stream(
            *(groups, features),
            batch_size=spec.batch_size,
            window_bytes=spec.window_bytes,
            shuffle_seed=(spec.seed, "epoch", number),
        )
        return sum(len(batch[0]) for batch in stream)

    one_pass(0)
    with spent.counted():
        return sum(one_pass(number) for number in range(1, 1 + 5 * size.epochs))


def _epochs(data: Path, scratch: Path, spent: Spent, epochs: int, **spec: Any) -> int:
    """Epochs of a batch run, each with its checkpoint, after a first one that is not counted."""
    batch = product("tasks.batch")
    run = _batch_run(data, scratch, _spec(epochs=1 + epochs, **spec))
    batch.train_epoch(run, 0)
    with spent.counted():
        for epoch in range(1, 1 + epochs):
            batch.train_epoch(run, epoch)
    return epochs * int(run.dataset.ref.rows)


def train_64(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """Epochs of eager steps on batches of 64 rows, a small net."""
    return _epochs(data, scratch, spent, size.epochs)


def train_1024(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """Epochs of eager steps on batches of 1,024 rows, the same net."""
    return _epochs(data, scratch, spent, 4 * size.epochs, batch_size=1024)


def train_compiled(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """Epochs of compiled steps on batches of 64 rows, a linear model."""
    model = {"factory": "linear"}  # compiled fastest
    return _epochs(data, scratch, spent, 4 * size.epochs, model=model, compile="on")


def _online(data: Path, scratch: Path, spent: Spent, shard: Path, rows: int, count: int) -> int:
    """A backlog of a local inbox, after a few shards that are not counted."""
    _version_0(data, scratch)
    online, inbox = product("tasks.online.step" if PACKAGE else "tasks.online"), scratch / "inbox"
    inbox.mkdir()
    settings = product("tasks.settings").OnlineSettings()
    run = online.open_run(str(inbox), str(scratch / "registry"), "net", settings)

    def drained(shards: range) -> None:
        for number in shards:
            shutil.copyfile(shard, inbox / f"{number:06}.parquet")
        with spent.counted():
            while online.step(run).outcome is not online.Outcome.IDLE:
                pass

    drained(range(WARM_UP_SHARDS))
    spent.seconds, before = 0.0, run.report.shards
    drained(range(WARM_UP_SHARDS, WARM_UP_SHARDS + count))
    assert run.report.shards - before == count, f"{run.report.shards - before} shards of {count} were trained on"
    return count * rows


def online_small(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """A backlog of shards of 500 rows, each scored by learner and champion, trained on, committed, deleted."""
    return _online(data, scratch, spent, data / "small.parquet", SHARD_ROWS, size.shards)


def online_large(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """The same of shards of 150,000 rows."""
    return _online(data, scratch, spent, data / "large.parquet", size.large_rows, size.large_shards)


def predict(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """A version's predictions of the whole dataset, written as Parquet."""
    _version_0(data, scratch, batch_size=1024)
    function = product("tasks.predict").predict

    def predicted(number: int) -> int:
        done = function(str(scratch / "registry"), "net", str(data / "dataset"), str(scratch / f"out-{number}"))
        return int(done.rows)

    predicted(0)
    with spent.counted():
        return sum(map(predicted, range(1, 1 + 4 * size.repeat)))


def startup(data: Path, scratch: Path, size: Size, spent: Spent) -> int:
    """`tidemill log` of a registry, from its start to its end: a row is one command."""
    _version_0(data, scratch, batch_size=1024)
    command = [sys.executable, "-P", "-m", "tidemill" if PACKAGE else "flows", "log", str(scratch / "registry"), "net"]

    def start() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    start()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(size.repeat):
        start()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return size.repeat


ROWS: Final[dict[str, Callable[[Path, Path, Size, Spent], int]]] = {
    "loader": loader,
    "train-64": train_64,
    "train-1024": train_1024,
    "train-compiled": train_compiled,
    "online-small": online_small,
    "online-large": online_large,
    "predict": predict,
    "startup": startup,
}


def main() -> None:
    name, folder, *scratch = (argument for argument in sys.argv[1:] if argument != "--small")
    size = SMALL if "--small" in sys.argv else FULL
    if name == "data":
        write_data(Path(folder), size)
        return
    import torch

    torch.set_num_threads(1)
    for row in name.split(","):
        place, spent = Path(*scratch, row), Spent()
        place.mkdir()
        rows = ROWS[row](Path(folder), place, size, spent)
        print(json.dumps({"row": row, "rows": rows, "cpu_seconds": spent.seconds}), flush=True)


if __name__ == "__main__":
    main()

"""What a command costs before it does its work: the light commands, and a batch and an online run line by line.

    .venv/bin/python benchmarks/startup.py                                  # all that docs/performance.md shows
    .venv/bin/python benchmarks/startup.py --only help status --repeat 3
    .venv/bin/python benchmarks/startup.py --against 583fb7b                # a first model beside an old one and a bare script

Every measurement is a process of its own, on a dataset of 400 rows, an empty inbox and a registry in a local folder; kinds take
turns. A whole command is the real one, `python -m tidemill ...`, from its spawning to its end. The lines come from other
processes, which do the same in the same order and look at the clock in between: they add up to about the whole. Prefect's
database exists already. `DO_NOT_TRACK=1`, `OMP_NUM_THREADS=1`.

Prints one JSON line for each measurement, then the medians of each kind. `cpu` counts the children that the process waited for,
the temporary server among them; that of a line counts the process alone, but for `exit`, which has the children's. On a busy
machine it is the steadier of the two.

`--against` measures `train` as a whole, with one fixed spec (a linear model, SGD, 2 epochs): of an older commit (`git worktree`,
with this environment's packages) and of this checkout, each with and without a running Prefect server, and a bare script that
imports torch and pyarrow and trains the same.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
HEAVY = ("torch", "prefect", "pyarrow", "numpy", "pandas", "s3fs", "cyclopts", "pydantic", "torchmetrics", "scipy")
SPEC = {"features": ["a", "b", "c"], "target": "y", "epochs": 1}
FIRST: dict[str, Any] = SPEC | {
    "features": ["a", "b"],
    "epochs": 2,
    "model": {"factory": "linear"},
    "optimizer": {"name": "sgd"},
    "batch_size": 64,
}
"""The fixed spec of `--against`."""
LIGHT = {
    "interpreter": ["-c", "pass"],
    "help": ["-m", "tidemill", "--help"],
    "train help": ["-m", "tidemill", "train", "--help"],
    "status": ["-m", "tidemill", "status", "registry", "model", "--inbox", "inbox"],
    "log": ["-m", "tidemill", "log", "registry", "model"],
    "show": ["-m", "tidemill", "show", "registry", "model"],
    "promote": ["-m", "tidemill", "promote", "registry", "model", "0"],
    "requeue": ["-m", "tidemill", "requeue", "registry", "model"],
    "gc": ["-m", "tidemill", "gc", "registry", "model"],
    "audit": ["-m", "tidemill", "audit", "registry", "model"],
    "rollback": ["-m", "tidemill", "rollback", "registry", "model", "0"],
}
TRAIN_FLAGS = ["--features", "a", "b", "c", "--target", "y", "--epochs", "1"]
FOLLOW = ["-m", "tidemill", "follow", "inbox", "registry", "model", "--mode", "drain"]
PREDICT = ["-m", "tidemill", "predict", "registry", "model", "data", "predictions"]


class Lines:
    """What the time went into, from the start of the process on."""

    def __init__(self) -> None:
        atexit.register(gc.freeze)  # as the command line does
        self._last = (float(os.environ["STARTUP_BEGAN"]), 0.0)
        self._seconds: dict[str, tuple[float, float]] = {}

    def end(self, line: str) -> None:
        """What passed since the end of the line before was this: wall and CPU seconds."""
        now = (time.time(), time.process_time())
        self._seconds[line] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now

    def print(self) -> None:
        print(json.dumps({"lines": self._seconds, "last": self._last}), flush=True)


# ---- in a process of its own -----------------------------------------------------------------------------------------
def run_lines(kind: str) -> None:
    """One flow run, `train` or `follow`."""
    lines = Lines()
    lines.end("interpreter")
    _import(lines)
    from prefect import get_client

    from tidemill.flows.batch import batch_training
    from tidemill.flows.online import online_training
    from tidemill.tasks.settings import OnlineSettings
    from tidemill.tasks.training.spec import Spec

    lines.end("import of the flows")
    get_client(sync_client=True)
    lines.end("temporary server" if "PREFECT_API_URL" not in os.environ else "import of Prefect's client")

    def running(flow: object, flow_run: object, state: object) -> None:
        lines.end("flow engine: begin")

    def completed(flow: object, flow_run: object, state: object) -> None:
        lines.end("body of the flow")

    hooks: dict[str, Any] = {"on_running": [running], "on_completion": [completed]}
    if kind == "train":
        flow = batch_training.with_options(**hooks)
        flow("data", f"new-{os.getpid()}", "model", Spec.model_validate(SPEC))
    else:
        online = online_training.with_options(**hooks)
        online("inbox", "registry", "model", OnlineSettings(mode="drain"))
    lines.end("flow engine: end")
    lines.print()


def bare_lines(kind: str) -> None:
    """The work of the same run, by plain functions: what stays without Prefect."""
    lines = Lines()
    lines.end("interpreter")
    _import(lines, prefect=False)
    from tidemill.storage.probe import check_preconditions
    from tidemill.storage.urls import open_store
    from tidemill.tasks import batch
    from tidemill.tasks.online import step as online
    from tidemill.tasks.settings import BatchSettings, OnlineSettings
    from tidemill.tasks.training.spec import Spec

    registry = f"new-{os.getpid()}" if kind == "train" else "registry"
    Path(registry).mkdir(exist_ok=True)
    check_preconditions(open_store(registry))
    lines.end("work: probe of the registry")
    if kind == "train":
        taken = batch.take_snapshot("data")
        lines.end("work: snapshot")
        run = batch.open_run(taken, registry, "model", Spec.model_validate(SPEC), BatchSettings())
        lines.end("work: open")
        batch.prepare(run)
        lines.end("work: fit")
        while (epoch := run.next_epoch()) is not None:
            batch.train_epoch(run, epoch)
        lines.end("work: epoch")
        score = batch.evaluate(run)
        lines.end("work: evaluate")
        version = batch.register(run, score)
        batch.finish(run, version)
        lines.end("work: register")
    else:
        following = online.open_run("inbox", registry, "model", OnlineSettings(mode="drain"))
        lines.end("work: open")
        online.step(following)
        lines.end("work: step")
    lines.print()


def alone() -> None:
    """A first model by hand: the same rows, net, optimizer, batches and epochs, a tenth held out and scored; weights stored."""
    import pyarrow.parquet as pq
    import torch

    torch.manual_seed(0)
    table = pq.read_table("data")
    x = torch.stack([torch.from_numpy(table[name].to_numpy()) for name in FIRST["features"]], 1).float()
    y = torch.from_numpy(table[FIRST["target"]].to_numpy()).float().unsqueeze(1)
    held_out = torch.rand(len(y)) < 0.1
    x = (x - x[~held_out].mean(0)) / x[~held_out].std(0)
    x_train, y_train = x[~held_out], y[~held_out]
    net, loss_function = torch.nn.Linear(x.shape[1], 1), torch.nn.MSELoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(FIRST["epochs"]):
        for rows in torch.randperm(len(y_train)).split(FIRST["batch_size"]):
            loss = loss_function(net(x_train[rows]), y_train[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        error = net(x[held_out]) - y[held_out]
    torch.save(net.state_dict(), "weights.pt")
    print(f"rmse {error.square().mean().sqrt():.4g}, mae {error.abs().mean():.4g}")


def _import(lines: Lines, *, prefect: bool = True) -> None:
    for line, modules in (
        ("the command line", ["tidemill.flows.cli"]),
        ("torch", ["torch"]),
        ("our tasks, pyarrow", ["tidemill.tasks.online.step"]),
        *([("Prefect", ["prefect.flows", "prefect.flow_engine", "prefect.task_engine"])] if prefect else []),
    ):
        for module in modules:
            importlib.import_module(module)
        lines.end(f"import of {line}")


def names(arguments: list[str]) -> None:
    """Which of the heavy packages `tidemill ARGUMENTS` imports."""
    from tidemill.flows.cli import main

    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
        main(arguments)
    print(json.dumps([name for name in HEAVY if name in sys.modules]))


# ---- around it -------------------------------------------------------------------------------------------------------
def spawned(arguments: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Wall and CPU seconds of one process and of the children that it waited for, and what it printed as `lines`."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.time()
        child = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment | {"STARTUP_BEGAN": repr(began)},
            cwd=folder,
            stdout=output,
            stderr=errors,
        )
        _, status, used = os.wait4(child.pid, 0)
        ended = time.time()
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        assert child.returncode == 0, errors.read()
        result: dict[str, Any] = {"wall": ended - began, "cpu": used.ru_utime + used.ru_stime}
        if "--lines" in arguments or "--bare" in arguments:
            printed = json.loads(output.read().splitlines()[-1])
            wall, cpu = printed["last"]
            result["lines"] = printed["lines"] | {"exit": (ended - wall, result["cpu"] - cpu)}
        return result


def train(registry: str, model: str) -> list[str]:
    return ["-m", "tidemill", "train", "data", registry, model, *TRAIN_FLAGS]


def prepare(folder: Path, environment: dict[str, str]) -> None:
    """A dataset, an empty inbox, and a registry with a model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("data", "inbox"):
        (folder / name).mkdir()
    columns: dict[str, Any] = {
        "a": [1.0, 2.0, 3.0, 4.0] * 100,
        "b": [1.0, 2.0, 0.0, 1.0] * 100,
        "c": ["red", "green", "blue", "red"] * 100,
        "y": [1.5, 2.5, 6.5, 7.5] * 100,
    }
    pq.write_table(pa.table(columns), folder / "data" / "rows.parquet")
    spawned([__file__, "--bare", "train"], environment, folder)
    next(folder.glob("new-*")).rename(folder / "registry")


def kinds(folder: Path, offline: dict[str, str], online: dict[str, str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured: name -> how, once."""
    this, numbers = str(Path(__file__).resolve()), itertools.count()
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, arguments in LIGHT.items():
        found[name] = partial(spawned, arguments, offline, folder)
    for server, environment, flags in (
        ("no server", offline, []),
        ("temporary server", offline, ["--prefect"]),
        ("running server", online, []),
    ):
        # Each time a registry of its own: a run that is repeated finds its version and trains nothing
        found[f"train, {server}"] = lambda e=environment, more=flags: spawned(
            [*train(f"registry-{next(numbers)}", "model"), *more], e, folder
        )
        found[f"follow, {server}"] = partial(spawned, [*FOLLOW, *flags], environment, folder)
    found["predict"] = partial(spawned, PREDICT, offline, folder)
    for server, environment in (("temporary server", offline), ("running server", online)):
        for kind in ("train", "follow"):
            found[f"{kind}, {server}, lines"] = partial(spawned, [this, "--lines", kind], environment, folder)
    for kind in ("train", "follow"):
        found[f"{kind}, no Prefect, lines"] = partial(spawned, [this, "--bare", kind], offline, folder)
    return found


def against(old: Path, folder: Path, offline: dict[str, str], online: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """A first model: name -> how it is measured, once. Each time in a registry of its own."""
    numbers = itertools.count()
    (folder / "spec.json").write_text(json.dumps(FIRST))

    def first(place: Path, environment: dict[str, str]) -> dict[str, Any]:
        module = "tidemill" if (place / "tidemill").is_dir() else "flows"  # as 583fb7b and older ones have it
        arguments = ["train", "data", f"first-{next(numbers)}", "model", "--spec", "spec.json"]
        return spawned(["-P", "-m", module, *arguments], environment | {"PYTHONPATH": str(place)}, folder)

    return {
        "bare script": partial(spawned, [str(Path(__file__).resolve()), "--alone"], offline, folder),
        "new, no server": partial(first, ROOT, offline),
        "old, no server": partial(first, old, offline),
        "new, running server": partial(first, ROOT, online),
        "old, running server": partial(first, old, online),
    }


def ratios(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of medians: what is promised of a first model."""
    middle = {name: medians(found) for name, found in results.items()}
    return {
        f"{a} / {b}": {of: round(middle[a][of] / middle[b][of], 3) for of in ("wall", "cpu")}
        for a, b in (
            ("new, no server", "old, no server"),
            ("new, no server", "bare script"),
            ("new, running server", "old, running server"),
        )
    }


def loaded(name: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Which heavy packages a light command imports."""
    if name not in LIGHT or name == "interpreter":
        return {}
    command = [sys.executable, __file__, "--names", *LIGHT[name][2:]]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return {"imports": json.loads(done.stdout)}


def medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: round(statistics.median(result[name] for result in results), 3) for name in ("wall", "cpu")
    }
    if "lines" in results[0]:
        found["lines"] = {
            line: [round(statistics.median(result["lines"][line][i] for result in results), 3) for i in range(2)]
            for line in results[0]["lines"]
        }
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--only", nargs="+", help="Kinds whose names contain one of these.")
    options.add_argument("--repeat", type=int, default=5)
    options.add_argument("--against", metavar="COMMIT", help="a first model instead, beside this older commit")
    options.add_argument("--lines", help=argparse.SUPPRESS)
    options.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--bare", help=argparse.SUPPRESS)
    options.add_argument("--names", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.lines:
        return run_lines(chosen.lines)
    if chosen.bare:
        return bare_lines(chosen.bare)
    if chosen.alone:
        return alone()
    if chosen.names:
        return names(chosen.names)

    from benchmarks.before_after import checkout
    from tests.flows.prefect_server import running_prefect_server

    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        offline = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": made,
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # as the command line does
        }
        prepare(folder, offline)
        online = dict(offline)
        if chosen.against:
            all_kinds = against(stack.enter_context(checkout(chosen.against)), folder, offline, online)
        else:
            all_kinds = kinds(folder, offline, online)
        todo = {
            name: measure
            for name, measure in all_kinds.items()
            if not chosen.only or any(part in name for part in chosen.only)
        }
        if any("temporary server" in name for name in todo):  # makes the database
            spawned([*FOLLOW, "--prefect"], offline, folder)
        if any("running server" in name for name in todo):
            (folder / "server").mkdir()
            url = stack.enter_context(running_prefect_server(folder / "server"))
            online |= {"PREFECT_HOME": str(folder / "server"), "PREFECT_API_URL": url}
        if chosen.against:  # what is imported first is compiled first, and a temporary server makes its database
            for measure in todo.values():
                measure()
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in todo}
        for name in list(todo) * chosen.repeat:
            result = todo[name]()
            results[name].append(result)
            print(json.dumps({"kind": name} | result), flush=True)
        for name, measured in results.items():
            print(json.dumps({"median of": name} | medians(measured) | loaded(name, folder, offline)), flush=True)
        if chosen.against and not chosen.only:
            for name, ratio in ratios(results).items():
                print(json.dumps({"ratio of": name} | ratio), flush=True)
    return None


if __name__ == "__main__":
    main()

"""The runs that the tests of the guarantees disturb, and the child processes in which they are killed or frozen.

Children are forked from a server process that has imported what they need (multiprocessing's "forkserver"): each is a process
of its own that can die, but none has to import torch again.
"""

import json
import multiprocessing
import os
import random
import signal
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import EveryNinth, parquet
from tests.storage.faults import Call, Dated, FaultStore, act_once, hooked, together
from tests.storage.segmented import InSegments
from tidemill.flows.display import Lines, Shown
from tidemill.progress import Activity, listening
from tidemill.storage import retention
from tidemill.storage.aliases import promote, resolve
from tidemill.storage.errors import NotFound, PreconditionFailed, UnknownVersion
from tidemill.storage.inbox import is_shard
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import DoneLabels, sha256
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.batch_run import BatchRun
from tidemill.tasks.choosing import backtest
from tidemill.tasks.choosing.compare import compare
from tidemill.tasks.online import doors
from tidemill.tasks.online import step as online
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.rowwise import RowLabels
from tidemill.tasks.online.work import Work
from tidemill.tasks.search import Clock
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.tenants import doors as tenants
from tidemill.tasks.tenants.pairs import Pair
from tidemill.tasks.training.spec import Spec

STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")
"""Variables that say how stores are reached begin so."""
T = TypeVar("T")
Stores = Callable[[str], Store]
MakeUrl = Callable[[str], str]

# ---- what the runs work on -------------------------------------------------------------------------------------------
# With all that makes a learner more than its weights.
SPEC = Spec.model_validate(
    {
        "features": [
            "a",
            "b",
            {"name": "c", "kind": "category", "buckets": 8},
            {"name": "d", "buckets": 8, "length": 3},
        ],
        "target": ["y", "z"],
        "sample_weight": "w",
        "model": {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.1}},
        "optimizer": {"name": "adam", "arguments": {"amsgrad": True}},
        "schedule": {"name": "cosine", "arguments": {"T_max": 50}, "warmup_steps": 20},
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "replay": {"rows": 30, "ratio": 0.5},
        "standardize_target": True,
        "running_statistics": True,
        "batch_size": 8,
        "epochs": 3,
        "seed": 5,
    }
)
WHOLE_VERSIONS = 2
"""Of `tidemill.storage.tombstones`, so that short histories have both, tombstones in a blob and tombstones in manifests."""
BATCH = BatchSettings(holdout=0.2)
ROWS = Spec.model_validate(
    SPEC.model_dump()
    | {
        "features": ["a", "b", {"name": "c", "kind": "category", "buckets": 512}],
        "optimizer": {"name": "sparse_adam"},
        "clip_norm": None,
        "ema_decay": None,
        "model": {"factory": "mlp", "arguments": {"hidden": [8], "embedding": 16, "sparse": True}},
    }
)
"""A table of which a shard changes a few rows: the optimizer leaves the others alone, and the learner notes which."""
CLASSES = Spec.model_validate(
    SPEC.model_dump()
    | {
        "target": "k",
        "task": "binary",
        "loss": None,
        "sample_weight": None,
        "class_weights": "balanced",
        "replay": {"rows": 20, "ratio": 1.0, "policy": "balanced"},
        "precision": "bfloat16",
        "standardize_target": False,
        "running_statistics": False,
    }
)
"""What the other spec cannot have beside what it has: classes of column k."""
ONLINE = OnlineSettings(limits={"max_shards": 2}, passes=2, grace_seconds=0, gate={"champion": "score"})
"""The champion stays version 0."""


def table(rows: int, seed: int, sign: int = 1) -> bytes:
    """A small Parquet file of learnable rows, in row groups of 12; with `sign` -1 their targets are the opposite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    colours = [["red", "green", None][i] for i in torch.randint(3, (rows,), generator=generator).tolist()]
    a, b = x.T
    tags = [[row, row % 3, None][: row % 4] for row in range(rows)]
    columns = {"a": a, "b": b, "c": colours, "d": tags, "y": sign * (a * 2 - b), "z": sign * (a + b), "w": 1 + a.abs()}
    plain = {name: list(column) if isinstance(column, list) else column.tolist() for name, column in columns.items()}
    return parquet(pa.table(plain), row_group_size=12)


DATASET = {f"part-{i}.parquet": table(40, i) for i in range(2)}
SHARDS = {f"{i:02}.parquet": table(20 + i, 10 + i, sign=-1 if i == 1 else 1) for i in range(6)}
REJECTED = {"03b.parquet": b"PAR1" + b"not a parquet file" * 10 + b"PAR1"}


def fill(url: str, objects: dict[str, bytes]) -> None:
    """Put objects one after the other, so that they have been written in the order of their keys."""
    store = open_store(url)
    for key in sorted(objects):
        store.write(key, objects[key])


def copy(source: str, target: str) -> None:
    """Put all objects of one store into another."""
    store = open_store(source)
    fill(target, {info.key: store.read(info.key) for info in store.list()})


def waiting(inbox: str) -> list[str]:
    """The keys of the shards in an inbox."""
    return sorted(info.key for info in open_store(inbox).list() if is_shard(info.key))


def bits(log: VersionLog) -> tuple[str, str]:
    """What must not depend on faults: sha256 of the head's weights and of its state."""
    blobs = log.head().manifest.blobs
    return blobs.weights.sha256, blobs.state.sha256


def sample(items: Sequence[T], count: int | None, seed: int = 0) -> list[T]:
    """One, drawn at random, of each of `count` parts of equal length; all for None."""
    if count is None or count >= len(items):
        return list(items)
    edges = [i * len(items) // max(count, 1) for i in range(count + 1)]
    draw = random.Random(seed)
    return [items[draw.randrange(a, b)] for a, b in pairwise(edges)]


# ---- the runs: what the flows and the command line do, without Prefect -----------------------------------------------
class Caller(Protocol):
    """How a task is called: `at_once`, or again after an error."""

    def __call__(self, task: Callable[[], T], /) -> T: ...


def at_once(task: Callable[[], T]) -> T:
    return task()


def drain(stores: Stores, inbox: str, registry: str, settings: OnlineSettings, call: Caller = at_once) -> None:
    """An online run until the inbox holds nothing to train on."""
    run = call(lambda: online.OnlineRun(inbox, registry, "model", settings, stores))
    while (outcome := call(lambda: online.step(run)).outcome) is not online.Outcome.IDLE:
        if outcome is online.Outcome.RETRAIN:
            dataset, _, _, spec, batch_settings = call(lambda: online.retraining(run))
            train(stores, dataset, registry, spec, batch_settings, call)
            run.forget()


def drain_pairs(stores: Stores, pairs: Sequence[Pair], settings: OnlineSettings, learners: int) -> None:
    """`tidemill follow --pairs --mode drain`, by which one of the pairs may be failing."""
    tenants.drain(pairs, settings, learners=learners, stores=stores)


def dated_drain(
    stores: Stores, inbox: str, registry: str, settings: OnlineSettings, dates: Mapping[str, datetime]
) -> None:
    """As `drain`, with shards that were written at these times (`Dated`)."""
    drain(lambda url: Dated(stores(url), dates), inbox, registry, settings)


def careless_drain(
    stores: Stores, inbox: str, registry: str, settings: OnlineSettings, dates: Mapping[str, datetime]
) -> None:
    """A broken protocol: a shard of labels is done with once any of its rows is used. What is in memory hides that."""
    close = RowLabels.close

    def careless(labels: RowLabels, work: Work, spelled: Callable[[str], str]) -> None:
        close(labels, work, spelled)
        used = [each for each in work.open_labels or () if not work.head.has(each)]
        done = [DoneLabels(**each.model_dump(exclude={"used"}), unmatched=0) for each in used]
        work.open_labels, work.done_labels = (), (*work.done_labels, *done)

    with patch.object(RowLabels, "close", careless):
        dated_drain(stores, inbox, registry, settings, dates)


class Watcher:
    """A listener (`tidemill.progress`) that asks for all there is to know."""

    def __init__(self) -> None:
        self.seen = 0

    def on_activity(self, activity: Activity) -> None:
        self.seen += 1
        if activity.loss is not None:
            activity.loss()

    def on_event(self, event: object) -> None:
        self.seen += 1


class DrawsAtOnce(Lines):
    """The display of a run whose stderr is no terminal, at each word that it hears."""

    every = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._due, self.drawn = 0.0, 0

    def draw(self, innermost: Shown) -> None:
        super().draw(innermost)
        self.drawn += 1


def watched_drain(stores: Stores, inbox: str, registry: str, settings: OnlineSettings, metrics_file: str) -> None:
    """`tidemill.drain` with everybody who may watch: a listener, a display, metrics in a file, a page."""
    watcher, display = Watcher(), DrawsAtOnce()
    with listening(watcher), listening(display):
        doors.drain(
            inbox,
            registry,
            "model",
            settings.model_copy(update={"metrics_file": metrics_file, "port": 0}),
            stores=stores,
        )
    assert watcher.seen
    assert display.drawn


def train(
    stores: Stores, dataset: str, registry: str, spec: Spec, settings: BatchSettings, call: Caller = at_once
) -> None:
    """A batch run from start to registration."""
    steps = batch.BatchSteps.of(lambda step: lambda *args: call(lambda: step(*args)))
    batch.train_by(steps, dataset, registry, "model", spec, settings, stores)


def delta_options(url: str) -> dict[str, str] | None:
    """What deltalake and polars take to reach a table; the rest comes from the variables that AWS's clients read too."""
    return {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL_S3"], "AWS_ALLOW_HTTP": "true"} if "s3:" in url else None


class DeltaWriter:
    """A hook: at each third call for a registry somebody writes to the Delta table that its run is trained on.

    One after the other: rows are appended, changed and deleted, files are rewritten, and those are removed that neither version
    `pinned` nor the one that was the newest at the start needs.
    """

    def __init__(self, url: str, registry: str, pinned: int) -> None:
        from deltalake import DeltaTable, write_deltalake

        def opened() -> DeltaTable:
            return DeltaTable(url, storage_options=options)

        options, kept = delta_options(url), [pinned]
        kept.append(opened().version())
        new = pq.read_table(pa.BufferReader(table(20, 99)))
        self._acts: list[Callable[[], object]] = [
            lambda: write_deltalake(url, new, mode="append", storage_options=options),
            lambda: opened().update({"y": "-y"}, predicate="a > 0"),
            lambda: opened().delete("b > 0.5"),
            lambda: opened().optimize.compact(),
            lambda: opened().vacuum(0, dry_run=False, enforce_retention_duration=False, keep_versions=kept),
        ]
        self._registry, self._calls, self._lock = open_store(registry).url, 0, threading.Lock()

    def __call__(self, call: Call) -> None:
        if (call.url, call.phase) == (self._registry, "before"):
            with self._lock:
                turn, rest = divmod(self._calls, 3)
                self._calls += 1
                if not rest:
                    self._acts[turn % len(self._acts)]()


def train_while_written(
    stores: Stores, dataset: str, registry: str, spec: Spec, settings: BatchSettings, pinned: int
) -> None:
    """A batch run on a Delta table that somebody writes to."""
    writer = DeltaWriter(dataset, registry, pinned)
    train(lambda url: FaultStore(stores(url), writer), dataset, registry, spec, settings)


def train_by_recipe(stores: Stores, dataset: str, registry: str, spec: Spec) -> None:
    """A batch run that finds out how long to train, with checkpoints in its searches and in the training on all rows."""

    def opened(*arguments: Any) -> BatchRun:
        run = batch.open_run(*arguments)
        run.clock = EveryNinth()
        return run

    steps = replace(batch.BatchSteps.of(lambda step: step), open_run=opened)
    batch.train_by(steps, dataset, registry, "model", spec, BatchSettings(), stores)


def compare_specs(stores: Stores, dataset: str, to: str, specs: dict[str, Spec], result: str) -> None:
    """`tidemill.compare`; what it tells is left in a file, but for where it is kept."""
    found = compare(dataset, specs, to, holdout=0.2, stores=stores)
    Path(result).write_text(found.model_dump_json(exclude={"registry", "page"}))


def backtest_spec(stores: Stores, registry: str, archive: str, to: str, spec: Spec, result: str) -> None:
    """`tidemill.backtest`, with a version after each of the log; what it tells is left in a file, but for where it is kept."""
    run = backtest.open_run(registry, "model", spec, [archive], to, stores=stores)
    run.clock = Clock(seconds=0)
    run.go_through()
    Path(result).write_text(backtest.told(run).model_dump_json(exclude={"kept_in", "page"}))


def rollback(stores: Stores, registry: str, version: str) -> None:
    """`tidemill rollback`."""
    log = VersionLog(stores(registry), "model")
    target = resolve(log, version)
    log.rollback(target)
    promote(log, "champion", target)


def collect_garbage(stores: Stores, registry: str, keep: int) -> None:
    """`tidemill gc`."""
    retention.collect_garbage(VersionLog(stores(registry), "model"), keep)


class InSegmentsPlaces(Places):
    """Files of any size are stored in segments, and of tables the rows that the learner has changed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.log = InSegments(self.log.store, self.log.model)


def drain_in_segments(stores: Stores, inbox: str, registry: str, settings: OnlineSettings) -> None:
    """As `drain`, with a collection after each step, which leaves the head what it names, and the aliases."""
    with patch.object(online, "Places", InSegmentsPlaces):
        run = online.OnlineRun(inbox, registry, "model", settings, stores)
        while online.step(run).outcome is not online.Outcome.IDLE:
            collect_garbage(stores, registry, 1)


class OnlyConsumed:
    """A hook: fails the run that is about to delete a shard before a committed version has consumed or rejected it."""

    def __init__(self, inbox: str, registry: str) -> None:
        self._inbox, self._log = open_store(inbox), VersionLog(open_store(registry), "model")
        self._seen: set[tuple[str, str]] = set()
        self._next = 0
        self._lock = threading.Lock()  # several deletes are under way

    def __call__(self, call: Call) -> None:
        if (call.url, call.verb, call.phase) != (self._inbox.url, "delete", "before") or not is_shard(call.key):
            return
        with self._lock:
            self._check(call)

    def _check(self, call: Call) -> None:
        assert call.if_match is not None, f"{call.key} is deleted whatever it is by now"
        try:
            shard = call.key, sha256(self._inbox.read(call.key, if_match=call.if_match))
        except (NotFound, PreconditionFailed):
            return  # then the delete will not touch it either
        while shard not in self._seen:
            try:
                manifest = self._log.version(self._next).manifest
            except UnknownVersion:
                raise AssertionError(f"{call.key} is deleted, though no committed version names these bytes") from None
            self._seen |= {(named.key, named.sha256) for named in (*manifest.consumed, *manifest.rejected)}
            self._next += 1


# ---- child processes -------------------------------------------------------------------------------------------------
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.guarantees.warm"])

DEADLINE = 240.0
"""Seconds after which a wait for other processes has failed."""


def start_server() -> None:
    """Start the server that children are forked from; by PYTHONPATH alone it finds what it shall import beforehand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        forkserver.ensure_running()


def start_child(run: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Call a function in a process of its own, which ends with this one unless this one is killed."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(STORE_VARIABLES)}
    child = _context.Process(target=_child, args=(environment, run, arguments), daemon=True)
    child.start()
    return child


def make_pipe() -> tuple[Connection, Connection]:
    """(the end that receives, the end that sends)."""
    return _context.Pipe(duplex=False)


def make_barrier(parties: int) -> Barrier:
    """Where so many processes wait for each other."""
    return _context.Barrier(parties)


def _child(environment: dict[str, str], run: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    run(*arguments)


def _report(result: Path, *facts: object) -> None:
    """Leave word to the parent, all of it or nothing."""
    unfinished = result.with_suffix(".tmp")
    unfinished.write_text(json.dumps(facts))
    unfinished.replace(result)


# ---- killed ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kill:
    """SIGKILL at a moment: before a storage call, or at `END`, after the last.

    The moment before a call is also the one after a call before it: in between nothing happens that outlives the process. Calls
    that are under way at that moment may or may not be applied.
    """

    moment: int | str
    """The number of the call, from 0, or its name: of calls that are under way together, any may come first."""
    delay: float = 0.0
    """Seconds from that moment on, for a kill in the middle of a call."""


END = "end"


class KillAt:
    """A hook for all stores of a process: notes the moments of all their calls, and kills at the one that is named."""

    def __init__(self, kill: Kill | None, result: Path) -> None:
        self._kill, self._result = kill, result
        self._moments, self._lock = list[str](), threading.Lock()  # several threads call stores

    def __call__(self, call: Call) -> None:
        if call.phase == "before":
            self.moment(call.name)

    def moment(self, name: str) -> None:
        with self._lock:
            if self._kill is not None and self._kill.moment in (len(self._moments), name):
                _report(self._result, self._moments, "killed")
                if not self._kill.delay:
                    os.kill(os.getpid(), signal.SIGKILL)
                timer = threading.Timer(self._kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True  # a run that is faster has not been killed
                timer.start()
            self._moments.append(name)

    def done(self) -> None:
        self.moment(END)
        _report(self._result, self._moments, "done")


def in_child(run: Callable[..., None], *arguments: Any, kill: Kill | None, tmp_path: Path) -> list[str] | None:
    """Run in a child process. The moments at which it could have been killed, or None if it was; fails on anything else."""
    result = tmp_path / uuid.uuid4().hex
    start_child(_to_be_killed, run, arguments, kill, result).join()
    # By files, not by exit codes, of which multiprocessing loses some when several threads wait for children.
    moments, how = json.loads(result.read_text()) if result.exists() else ([], "crashed")
    assert how in ("killed", "done"), "the child failed; its traceback is above"
    return None if how == "killed" else moments


def _to_be_killed(run: Callable[..., None], arguments: tuple[Any, ...], kill: Kill | None, result: Path) -> None:
    hook = KillAt(kill, result)
    run(hooked(hook), *arguments)
    hook.done()


# ---- overlapping and frozen ------------------------------------------------------------------------------------------
def drain_in_rounds(inbox: str, registry: str, rounds: int, barrier: Barrier, result: Path) -> None:
    """One of several trainers: drains the inbox once a round, together with the others; what it holds in memory stays.

    Reports the versions that it won, and how many races it lost.
    """
    try:
        stores = hooked(OnlyConsumed(inbox, registry))
        run = online.OnlineRun(inbox, registry, "model", ONLINE, stores)
        won: list[int | None] = []
        for _ in range(rounds):
            barrier.wait(DEADLINE)  # the shards of this round are there
            while (made := online.step(run)).outcome is not online.Outcome.IDLE:
                if made.outcome is online.Outcome.COMMITTED:
                    won.append(made.version)
            _report(result, won, run.report.lost_races)
            barrier.wait(DEADLINE)  # all have drained
    except BaseException:
        barrier.abort()  # nobody shall wait for this one
        raise


def step_and_freeze(inbox: str, registry: str, verb: str, key: str, result: Path) -> None:
    """One step of a run that stops itself before the first such call, with SIGSTOP; reports how the step ended."""
    freeze = act_once(verb, key, "before", lambda: os.kill(os.getpid(), signal.SIGSTOP))
    # A local folder: one call after the other, or it might stop while another delete holds the folder's lock.
    concurrency = None if inbox.startswith("s3:") else 1
    stores = hooked(together(freeze, OnlyConsumed(inbox, registry)), concurrency)
    run = online.OnlineRun(inbox, registry, "model", ONLINE, stores)
    _report(result, online.step(run).outcome.value)


def state_of(child: BaseProcess) -> str:
    """Its state as the kernel names it: T is stopped. Of a process that is gone: the empty string."""
    try:
        return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""

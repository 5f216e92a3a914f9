"""What the kill tests run in child processes: whole runs over stores that may send SIGKILL at any call.

Children are forked from a server process that has imported what they need (multiprocessing's "forkserver"): each is a process
of its own that can die, but none has to import torch again.
"""

import json
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import retention
from storage.dataset import snapshot
from storage.log import VersionLog
from storage.probe import check_preconditions
from storage.store import Store
from storage.urls import open_store
from tasks import batch, online
from tasks.settings import BatchSettings, OnlineSettings
from tasks.training.spec import Spec
from tests.storage.faults import Call, FaultStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.guarantees.warm"])

Kill = int | None
"""At which moment to kill, numbered from 0: one before every storage call, and one after the last.

The moment before a call is also the one after the call before: in between nothing happens that outlives the process.
"""


class KillAt:
    """A hook for all stores of a process: counts the moments of all their calls, and kills at the one that is named."""

    def __init__(self, kill: Kill, result: Path) -> None:
        self._kill, self._result = kill, result
        self._moments, self._lock = 0, threading.Lock()  # footers are read by several threads

    def __call__(self, call: Call) -> None:
        if call.phase == "before":
            self.moment()

    def moment(self) -> None:
        with self._lock:
            if self._kill == self._moments:
                self.report("killed")
                os.kill(os.getpid(), signal.SIGKILL)
            self._moments += 1

    def report(self, how: str) -> None:
        """Leave word to the parent."""
        self._result.write_text(json.dumps([self._moments, how]))


def in_child(run: Callable[..., None], *arguments: Any, kill: Kill, tmp_path: Path) -> int | None:
    """Run in a child process. At how many moments it could have been killed, or None if it was; fails on anything else."""
    result = tmp_path / uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    child = _context.Process(target=_child, args=(run, arguments, kill, environment, result))
    child.start()
    child.join()
    # By files, not by exit codes, of which multiprocessing loses some when several threads wait for children.
    moments, how = json.loads(result.read_text()) if result.exists() else (0, "crashed")
    assert how in ("killed", "done"), "the child failed; its traceback is above"
    return None if how == "killed" else moments


def start_server() -> None:
    """Start the server that children are forked from; by PYTHONPATH alone it finds what it shall import beforehand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        forkserver.ensure_running()


def _child(
    run: Callable[..., None], arguments: tuple[Any, ...], kill: Kill, environment: dict[str, str], result: Path
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    hook = KillAt(kill, result)
    run(lambda url: FaultStore(open_store(url), hook), *arguments)
    hook.moment()
    hook.report("done")


def drain(stores: Callable[[str], Store], inbox: str, registry: str, settings: OnlineSettings) -> None:
    """An online run until the inbox holds nothing to train on: what the flow does, without Prefect."""
    run = online.OnlineRun(inbox, registry, "model", settings, stores)
    while online.step(run).outcome is not online.Outcome.IDLE:
        pass


def train(stores: Callable[[str], Store], dataset: str, registry: str, spec: Spec, settings: BatchSettings) -> None:
    """A batch run from start to registration: what the flow does, without Prefect."""
    store = stores(registry)
    check_preconditions(store)
    run = batch.BatchRun(snapshot(dataset, stores), VersionLog(store, "model"), spec, settings)
    if run.registered is None:
        for epoch in run.epochs_left:
            batch.train_epoch(run, epoch)
        batch.finish(run, batch.register(run, batch.evaluate(run)))
    elif not run.registered[1]:
        batch.finish(run, run.registered[0])


def rollback(stores: Callable[[str], Store], registry: str, version: str) -> None:
    """`tidemill rollback`."""
    log = VersionLog(stores(registry), "model")
    target = log.resolve(version)
    log.rollback(version)
    log.promote("champion", target)


def collect_garbage(stores: Callable[[str], Store], registry: str, keep: int) -> None:
    """`tidemill gc`."""
    retention.collect_garbage(VersionLog(stores(registry), "model"), keep)

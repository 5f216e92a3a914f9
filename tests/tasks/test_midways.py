"""Batch training that is killed in the middle of an epoch: it goes on from there, and nothing else is changed by that."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.data import SPEC, put, rows
from tests.storage.faults import Call, hooked
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import Unavailable
from tidemill.storage.log import VersionLog
from tidemill.storage.records import DatasetRef
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch, midways
from tidemill.tasks.batch_run import BatchRun, run_key
from tidemill.tasks.midways import Copied, Midways
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.midway import Midway
from tidemill.tasks.training.order import Place
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]
EVERY = 64
"""Rows between two checkpoints."""


class Stopped(BaseException):
    """As if the process was killed, between two steps."""


class Stops(Midways):
    """Stores some checkpoints, and stops the run when one more is due."""

    def __init__(self, run: BatchRun, checkpoints: int, every: int = EVERY) -> None:
        super().__init__(run._copied, 1e9, every)
        self._left = checkpoints

    def keep(self, midway: Midway) -> None:
        if not self._left:
            raise Stopped
        self._left -= 1
        super().keep(midway)


@pytest.fixture
def dataset(memory_url: MakeUrl) -> str:
    url = memory_url("dataset")
    put(url, {f"part-{i}.parquet": rows(300, i) for i in range(3)})
    return url


def changed(**settings: Any) -> Spec:
    return Spec.model_validate(
        SPEC.model_dump()
        | {"shuffle_bytes": 2 * 170 * 16, "epochs": 2, "ema_decay": 0.9, "optimizer": {"name": "adam"}}
        | settings
    )


NOTHING: dict[str, Any] = {"features": ["b"], "target": "a", "epochs": "auto"}
"""Nothing can be learned, which a search soon finds out."""
LONG = "a search of what does not fit a window"
SPECS: dict[str, tuple[Spec, dict[str, Any]]] = {
    "epochs": (changed(), {}),
    "in order": (changed(shuffle=False), {}),
    "patience": (changed(epochs=4), {"patience": 2}),
    "a memory": (changed(replay={"rows": 50}), {"holdout": 0.0}),
    "a search": (changed(**NOTHING), {}),
    LONG: (changed(**NOTHING, batch_size=64), {"holdout": 0.2}),
}
MARKS = {"a search": pytest.mark.slow, LONG: pytest.mark.prove}


def opened(
    dataset: str, registry: str, spec: Spec, stores: Callable[[str], Store] = open_store, **more: Any
) -> BatchRun:
    settings = BatchSettings.model_validate({"checkpoint_rows": EVERY} | more)
    run = batch.open_run(batch.take_snapshot(dataset, None, stores), registry, "model", spec, settings, stores)
    run.clock.seconds = 1e9
    return run


def finished(run: BatchRun) -> VersionLog:
    batch.prepare(run)
    while (epoch := run.next_epoch()) is not None:
        batch.train_epoch(run, epoch)
    batch.finish(run, batch.register(run, batch.evaluate(run)))
    return run.log


def bits(log: VersionLog) -> tuple[str, str, object]:
    manifest = log.head().manifest
    return manifest.blobs.weights.sha256, manifest.blobs.state.sha256, manifest.metrics


@pytest.mark.parametrize(
    ("spec", "settings"),
    [pytest.param(*SPECS[name], marks=MARKS.get(name, ()), id=name) for name in SPECS],
)
def test_killed_inside_of_an_epoch_a_run_ends_with_the_same_bits(
    dataset: str, memory_url: MakeUrl, spec: Spec, settings: dict[str, Any]
) -> None:
    reference = finished(opened(dataset, memory_url("reference"), spec, checkpoint_rows=None, **settings))
    whole = finished(opened(dataset, memory_url("whole"), spec, checkpoint_rows=300, **settings))
    assert bits(whole) == bits(reference), "checkpoints change no bit"
    registry, stopped = memory_url("registry"), 0
    while True:
        run = opened(dataset, registry, spec, **settings)
        run.midways = Stops(run, 5, 300) if spec.searches else Stops(run, 5)
        try:
            log = finished(run)
        except Stopped:
            stopped += 1
            continue
        break
    assert stopped > 1
    assert bits(log) == bits(reference)
    left = [info.key.rpartition("/")[2] for info in log.store.list("model/runs/")]
    assert sorted(left) == ["done.json", "run.json"]


def test_a_kill_costs_what_came_since_the_last_checkpoint(dataset: str, memory_url: MakeUrl, caplog: Any) -> None:
    """And no row group is read that was used up before it."""
    run = opened(dataset, memory_url("registry"), changed(), holdout=0.0)
    run.midways = Stops(run, 9)
    with pytest.raises(Stopped):
        finished(run)
    reads: list[str] = []

    def hook(call: Call) -> None:
        if call.phase == "before" and call.verb == "read" and call.key.endswith(".parquet"):
            reads.append(call.key)

    caplog.set_level(logging.INFO)
    again = opened(dataset, memory_url("registry"), changed(), hooked(hook), holdout=0.0)
    steps = again.load_or_fit().counters.steps
    assert "going on from the checkpoint after epoch 0 of 2 and 576 rows of the next" in caplog.text
    reads.clear()
    batch.train_epoch(again, 0)
    assert again.load_or_fit().counters.steps - steps == 57 - 36
    rest = len(reads)
    reads.clear()
    batch.train_epoch(again, 1)
    assert 0 < rest <= 0.6 * len(reads)


def test_no_more_than_two_checkpoints_are_kept_inside_of_epochs(dataset: str, memory_url: MakeUrl) -> None:
    run = opened(dataset, memory_url("registry"), changed(epochs=3), holdout=0.0)
    run.midways = Stops(run, 18)
    with pytest.raises(Stopped):
        finished(run)
    names = [info.key.rpartition("/")[2] for info in run.log.store.list("model/runs/")]
    checkpoints = [name for name in names if name.endswith(".json") and name[0] == "0"]
    assert len(checkpoints) == 2
    assert all(name.startswith("00000001.") for name in checkpoints)
    assert len(names) == len(checkpoints) * 3 + 1


def test_a_damaged_checkpoint_costs_a_little_more(dataset: str, memory_url: MakeUrl) -> None:
    reference = finished(opened(dataset, memory_url("reference"), changed()))
    run = opened(dataset, memory_url("registry"), changed())
    run.midways = Stops(run, 5)
    with pytest.raises(Stopped):
        finished(run)
    store = run.log.store
    newest = max(info.key for info in store.list("model/runs/") if ".state." in info.key)
    store.write(newest, b"damaged")
    assert bits(finished(opened(dataset, memory_url("registry"), changed()))) == bits(reference)


# ---- what cannot fail a run ------------------------------------------------------------------------------------------
def test_a_store_that_fails_inside_of_an_epoch_fails_no_run(
    dataset: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(call: Call) -> None:
        inside = "." in call.key.rpartition("/")[2].partition("-")[0].removesuffix(".json")
        if call.verb == "write" and call.phase == "before" and "/runs/" in call.key and inside:
            raise Unavailable("no answer")

    reference = finished(opened(dataset, memory_url("reference"), changed()))
    log = finished(opened(dataset, memory_url("registry"), changed(), hooked(hook)))
    assert bits(log) == bits(reference)
    assert "a checkpoint inside of the epoch was not stored, training goes on: Unavailable: no answer" in caplog.text


def test_settings_of_checkpoints_are_no_part_of_the_key() -> None:
    dataset = Snapshot(DatasetRef(url="memory://d", fingerprint="f", files=1, rows=1), ())
    often = BatchSettings(checkpoint_seconds=1, checkpoint_rows=10)
    assert run_key(dataset, SPEC, often) == run_key(dataset, SPEC, BatchSettings())


# ---- when, and how ---------------------------------------------------------------------------------------------------
def at(rows: int) -> Midway:
    return Midway(place=Place(rows), loss=0.0, steps=1, random={})


def test_it_is_written_beside_the_steps_and_one_at_a_time() -> None:
    writes, release = [], threading.Event()

    def store() -> None:
        writes.append(threading.current_thread())
        assert release.wait(30)

    keeper = Midways(lambda midway: Copied(10, store), seconds=1e-9)
    keeper.keep(at(1))
    while not writes:
        time.sleep(0.001)
    assert writes[0] is not threading.current_thread()
    assert not keeper.due(2), "the one before is under way"
    release.set()
    keeper.wait()
    busy(0.2)
    assert keeper.due(2)


def test_a_large_one_is_stored_while_the_steps_wait() -> None:
    writes = []
    keeper = Midways(
        lambda midway: Copied(midways.ASIDE_BYTES + 1, lambda: writes.append(threading.current_thread())), seconds=1
    )
    keeper.keep(at(1))
    assert writes == [threading.current_thread()]


def test_rows_decide_where_they_are_asked_for() -> None:
    keeper = Midways(lambda midway: Copied(1, lambda: None), seconds=1e9, rows=100)
    keeper.begin(50)
    assert [keeper.due(rows) for rows in (100, 149, 150)] == [False, False, True]
    keeper.keep(at(150))
    assert [keeper.due(rows) for rows in (249, 250)] == [False, True]
    keeper.begin(0)
    assert not keeper.due(99)


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_what_takes_long_is_stored_less_often() -> None:
    keeper = Midways(lambda midway: Copied(1, lambda: busy(0.006)), seconds=1e-9)
    keeper.keep(at(1))
    keeper.wait()
    keeper.stored(1)
    assert not keeper.due(2)
    busy(0.1)
    assert not keeper.due(2), "it would be more than 3%"
    busy(0.15)
    assert keeper.due(2)

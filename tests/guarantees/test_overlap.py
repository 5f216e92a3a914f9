"""Several trainers on one inbox, and trainers that were frozen: one winner per version; who lost deletes nothing."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import BrokenBarrierError

import pytest

from tests.conftest import CLOUDS, MINIO_LIKE
from tests.guarantees.audit import audit
from tests.guarantees.children import (
    BATCH,
    DATASET,
    DEADLINE,
    ONLINE,
    SHARDS,
    SPEC,
    MakeUrl,
    collect_garbage,
    copy,
    drain,
    drain_in_rounds,
    fill,
    make_barrier,
    start_child,
    start_server,
    state_of,
    step_and_freeze,
    table,
    train,
    waiting,
)
from tests.s3_server import wait_until
from tidemill.storage.log import VersionLog
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

SAMPLE, FULL = (4, 2), (16, 50)
"""How many trainers, and how many rounds."""


@pytest.fixture
def base(make_url: MakeUrl) -> str:
    """URL of a registry with version 0."""
    start_server()
    fill(make_url("dataset"), DATASET)
    train(open_store, make_url("dataset"), make_url("base"), SPEC, BATCH)
    return make_url("base")


@pytest.mark.parametrize("make_url", ["s3", MINIO_LIKE, *CLOUDS], indirect=True)
def test_overlapping_trainers(
    base: str, make_url: MakeUrl, tmp_path: Path, full: bool, record_property: Callable[[str, object], None]
) -> None:
    """All of them drain at once, round after round, each with the memory of its last round."""
    trainers, rounds = FULL if full else SAMPLE
    inbox, log = make_url("inbox"), VersionLog(open_store(base), "model")
    barrier, put = make_barrier(trainers + 1), dict[str, bytes]()
    results = [tmp_path / f"trainer-{i}" for i in range(trainers)]
    children = [start_child(drain_in_rounds, inbox, base, rounds, barrier, result) for result in results]
    lost = 0
    for number in range(rounds):
        shards = {f"{number:02}-{i}.parquet": table(12 + i, 100 * number + i) for i in range(4)}
        put |= shards
        fill(inbox, shards)
        try:
            barrier.wait(DEADLINE)  # go
            barrier.wait(DEADLINE)  # all have drained
        except BrokenBarrierError:
            pytest.fail("a trainer failed, or hangs; its traceback is above")
        history = audit(log, put.items())
        assert waiting(inbox) == []
        won, losses = zip(*(json.loads(result.read_text()) for result in results), strict=True)
        lost = sum(losses)
        assert Counter(version for each in won for version in each) == Counter(range(1, len(history)))
    for child in children:
        child.join(DEADLINE)
        assert child.exitcode == 0
    assert lost > 0, "they never met"
    figures = (
        f"{trainers} trainers, {rounds} rounds: {len(put)} shards, {log.head().number} versions, {lost} lost races"
    )
    record_property("overlap", figures)
    print(figures)


def snapshot_of(store: Store) -> dict[str, str]:
    """Everything in a store: key -> etag."""
    return {info.key: info.etag for info in store.list()}


@pytest.mark.parametrize("make_url", ["local", "s3", *CLOUDS], indirect=True)
@pytest.mark.parametrize(
    ("verb", "key", "outcome"),
    [("create", "/log/00000001.json", "lost"), ("delete", "00.parquet", "committed")],
    ids=["before its commit", "before its deletes"],
)
def test_a_frozen_trainer(verb: str, key: str, outcome: str, base: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """Others consume everything meanwhile, garbage is collected and the keys come again: it touches nothing of that."""
    inbox, registry, result = make_url("inbox"), make_url("registry"), tmp_path / "result"
    copy(base, registry)
    fill(inbox, SHARDS)
    log = VersionLog(open_store(registry), "model")
    frozen = start_child(step_and_freeze, inbox, registry, verb, key, result)
    wait_until(lambda: state_of(frozen) in ("T", ""), seconds=DEADLINE, what="the trainer stops itself")
    assert state_of(frozen) == "T", "it ended instead; its traceback is above"

    drain(open_store, inbox, registry, ONLINE)
    assert log.head().number >= 3
    assert waiting(inbox) == []
    collect_garbage(open_store, registry, 1)
    again = {name: table(15 + i, 200 + i) for i, name in enumerate(SHARDS)}
    fill(inbox, again)
    before = snapshot_of(open_store(inbox)), snapshot_of(log.store)

    assert frozen.pid is not None
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.join(DEADLINE)
    assert frozen.exitcode == 0
    assert json.loads(result.read_text()) == [outcome]
    assert (snapshot_of(open_store(inbox)), snapshot_of(log.store)) == before

    drain(open_store, inbox, registry, ONLINE)
    audit(log, [*SHARDS.items(), *again.items()])
    assert waiting(inbox) == []

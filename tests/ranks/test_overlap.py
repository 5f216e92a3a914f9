"""Leaders with crews of their own, and one without, train on one inbox at the same time: one wins each version."""

import json
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError

import pytest

from tests.conftest import BUCKET
from tests.guarantees.audit import audit
from tests.guarantees.children import (
    DEADLINE,
    drain_in_rounds,
    fill,
    make_barrier,
    start_child,
    start_server,
    table,
    waiting,
)
from tests.ranks.crews import joined, lead, registered, without_credentials
from tests.s3_server import S3
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store
from tidemill.tasks.ranks.crew import Crew, follow_orders

CREWS, ROUNDS = (2, 2, 1), 2
"""How many ranks each trainer has."""


def lead_in_rounds(store: str, size: int, inbox: str, registry: str, barrier: Barrier, result: Path) -> None:
    group = joined(0, size, store, lambda _: None)
    lead(group, lambda: drain_in_rounds(inbox, registry, ROUNDS, barrier, result))


def follow(store: str, rank: int, size: int) -> None:
    without_credentials()
    follow_orders(Crew(joined(rank, size, store, lambda _: None)))


@pytest.mark.ranks
def test_leaders_that_overlap_win_each_version_once_and_their_crews_go_on_from_what_others_have_won(
    s3_server: S3, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Who has lost a race reads the head, and so does its crew: else the ranks would differ before the next commit."""
    start_server()
    root = f"s3://{BUCKET}/{tmp_path.name}-{id(request):x}"
    inbox, registry = f"{root}/inbox", f"{root}/registry"
    registered(f"{root}/dataset", registry)
    log, put = VersionLog(open_store(registry), "model"), dict[str, bytes]()
    barrier, results, children = make_barrier(len(CREWS) + 1), list[Path](), []
    for number, size in enumerate(CREWS):
        store, result = str(tmp_path / f"store-{number}"), tmp_path / f"leader-{number}"
        results.append(result)
        children.append(start_child(lead_in_rounds, store, size, inbox, registry, barrier, result))
        children += [start_child(follow, store, rank, size) for rank in range(1, size)]
    lost = 0
    for number in range(ROUNDS):
        shards = {f"{number:02}-{i}.parquet": table(12 + i, 100 * number + i) for i in range(4)}
        put |= shards
        fill(inbox, shards)
        try:
            barrier.wait(DEADLINE)  # go
            barrier.wait(DEADLINE)  # all have drained
        except BrokenBarrierError:
            pytest.fail("a leader failed, or hangs; its traceback is above")
        history = audit(log, put.items())  # one process has the same bits, whoever has won
        assert waiting(inbox) == []
        won, losses = zip(*(json.loads(result.read_text()) for result in results), strict=True)
        lost = sum(losses)
        assert Counter(version for each in won for version in each) == Counter(range(1, len(history)))
    for child in children:
        child.join(DEADLINE)
        assert child.exitcode == 0
    assert lost > 0, "they never met"

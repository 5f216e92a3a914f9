"""Ranks on this machine that train online, each of which can be killed or stopped at any of its moments.

They are forked from the server of `tests/guarantees/children.py`. A moment of a rank is a call of its group or, of the leader, of
a store.
"""

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor
from torch.distributed import FileStore

from tests.guarantees.children import (
    BATCH,
    DATASET,
    DEADLINE,
    ONLINE,
    REJECTED,
    SHARDS,
    Kill,
    KillAt,
    fill,
    start_child,
    train,
)
from tests.guarantees.children import SPEC as ONE_PROCESS
from tests.storage.faults import hooked
from tidemill.storage.urls import open_store
from tidemill.tasks.online import doors
from tidemill.tasks.ranks.crew import Crew, follow_orders
from tidemill.tasks.ranks.group import ALONE, Group
from tidemill.tasks.ranks.launched import Place
from tidemill.tasks.ranks.leader import at_the_head_of
from tidemill.tasks.ranks.transport import TorchGroup
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.spec import Spec

SECONDS: Final = 600.0
"""How long a rank waits for another one that is not dead, where that is not what a test is about: so long that its leader, which
lets it hear of itself four times in that time, does so in no run, and the moments of a run are always the same."""
SPEC: Final = Spec.model_validate(ONE_PROCESS.model_dump() | {"parts": 4})
"""The bits are those of one process, whatever the number of ranks."""
INBOX: Final = SHARDS | REJECTED
"""Six good shards and a bad one."""


class Watched:
    """A group that calls a hook before each of its calls, with the name of the call: the same in every run."""

    def __init__(self, group: Group, hook: Callable[[str], None]) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._hook, self._seen = group, hook, Counter[str]()

    def sum_(self, flat: Tensor) -> None:
        self._moment("sum")
        self._group.sum_(flat)

    def sum_pair_(self, flat: Tensor, distance: int) -> None:
        self._moment(f"sum of pairs {distance}")
        self._group.sum_pair_(flat, distance)

    def broadcast_(self, tensor: Tensor) -> None:
        self._moment("broadcast")
        self._group.broadcast_(tensor)

    def _moment(self, what: str) -> None:
        self._seen[what] += 1
        self._hook(f"{what} {self._seen[what]}")


@dataclass(frozen=True)
class Ended:
    """What became of a rank."""

    how: str
    """done, killed, or lost: it has lost another one."""
    moments: Sequence[str] = ()
    """At which it could have been killed."""


def begin(base: str, inbox: str, registry: str) -> None:
    """An inbox with all shards, and a copy of the registry."""
    store, target = open_store(base), open_store(registry)
    for info in store.list():
        target.write(info.key, store.read(info.key))
    fill(inbox, INBOX)


def registered(dataset: str, registry: str, spec: Spec = SPEC) -> None:
    """Version 0, by one process."""
    fill(dataset, DATASET)
    train(open_store, dataset, registry, spec, BATCH)


def drained(
    size: int,
    inbox: str,
    registry: str,
    tmp_path: Path,
    *,
    kill: tuple[int, Kill] | None = None,
    settings: OnlineSettings = ONLINE,
) -> list[Ended]:
    """Have so many ranks drain an inbox, one of which is killed at a moment; what became of each."""
    store = str(tmp_path / uuid.uuid4().hex)
    results = [tmp_path / uuid.uuid4().hex for _ in range(size)]
    children = [
        start_child(
            drain_as_rank,
            (rank, size, store),
            (inbox, registry, settings),
            kill[1] if kill is not None and kill[0] == rank else None,
            result,
        )
        for rank, result in enumerate(results)
    ]
    for child in children:
        child.join(DEADLINE)
        assert not child.is_alive(), "a rank hangs"
    found = []
    for result in results:
        moments, how = json.loads(result.read_text()) if result.exists() else ([], "lost")
        found.append(Ended(how, moments))
    return found


def drain_as_rank(
    here: tuple[int, int, str], places: tuple[str, str, OnlineSettings], kill: Kill | None, result: Path
) -> None:
    """The body of a rank."""
    hook = KillAt(kill, result)
    group = joined(*here, hook.moment)
    if group.rank:
        without_credentials()
        follow_orders(Crew(group))
    else:
        inbox, registry, settings = places
        lead(group, lambda: doors.drain(inbox, registry, "model", settings, stores=hooked(hook)))
    hook.done()


def joined(rank: int, size: int, store: str, hook: Callable[[str], None], seconds: float = SECONDS) -> Group:
    """The group of ranks that meet in a file."""
    if size == 1:
        return ALONE
    return Watched(TorchGroup(FileStore(store, size), Place(rank, size), seconds), hook)


def lead(group: Group, run: Callable[[], object], seconds: float = SECONDS) -> None:
    """Run at the head of a group, or alone."""
    if group.size == 1:
        run()
        return
    with at_the_head_of(group, seconds):
        run()


def without_credentials() -> None:
    """A crew needs none: of a bucket it can read nothing."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]

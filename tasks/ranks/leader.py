"""What rank 0 does with the others: it has them train on the same shards, and asks before a commit whether all have equal bits.

The leader is a run as ever: it alone lists, reads, scores, commits and disposes. Where there is no crew, each function here is
the plain one.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, TypeVar

import pyarrow as pa
import torch

from tidemill.tasks.errors import RanksDiffer, RanksRefused
from tidemill.tasks.ranks import launched
from tidemill.tasks.ranks.alike import digest, together
from tidemill.tasks.ranks.ending import end_here
from tidemill.tasks.ranks.group import ALONE, Group
from tidemill.tasks.ranks.horovod import HorovodGroup
from tidemill.tasks.ranks.joining import joined
from tidemill.tasks.ranks.messages import farewell, gathered, send
from tidemill.tasks.training import loop
from tidemill.tasks.training.environment import environment
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

R = TypeVar("R")

PINGS: Final = 4
"""An idle crew hears of the leader this often in the time that a rank waits for another."""


class Leader:
    """The leader's hold on its crew. Orders are given one at a time; between them the crew hears that the leader lives."""

    def __init__(self, group: Group, timeout_seconds: float) -> None:
        self.group = group
        self._holds: Steps | None = None
        """Whose learner the crew has the like of."""
        self._held_steps = 0
        """How many steps that learner had taken when it was last the like of theirs."""
        self.dataset: object | None = None
        """The dataset that the crew was last told to read."""
        self._broken = False
        """The crew is in the middle of an order, and this rank no more."""
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._pinging = threading.Thread(
            target=self._ping, args=(timeout_seconds / PINGS,), name="tidemill-ranks", daemon=True
        )
        self._pinging.start()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.group.size

    @contextmanager
    def ordered(self, name: str, about: Mapping[str, Any], *parts: bytes | memoryview) -> Iterator[None]:
        """Send an order; the body of the context is the leader's share of it, with the same calls of the group as the crew's.

        An error that leaves the body leaves the crew where it cannot be reached.
        """
        with self._lock:
            if self._broken:
                end_here("it was interrupted in an order to the others, and cannot give another one")
            try:
                send(self.group, name, dict(about), *parts)
                yield
            except BaseException:
                self._broken = True
                raise

    def train_shard(self, steps: Steps, groups: Sequence[RowGroup], passes: int, labelled: int | None) -> PassResult:
        """As `loop.train_shard`, which all ranks do with these rows. Raises what that raises, here or on another rank."""
        names = steps.learner.features.names(labelled=True)
        about = {
            "ordinal": steps.learner.counters.shards,
            "passes": passes,
            "labelled": labelled,
            "groups": [group.name for group in groups],
        }

        def train() -> PassResult:
            return loop.train_shard(steps, groups, passes, labelled=labelled)

        return self.train(steps, "shard", about, train, (_written(group.read(names)) for group in groups))

    def train(
        self,
        steps: Steps,
        order: str,
        about: Mapping[str, Any],
        train: Callable[[], R],
        rows: Iterable[memoryview] = (),
    ) -> R:
        """Train while the crew, which has the like of the learner, carries out an order to do the same.

        Args:
            steps: Of the learner.
            order, about: What the crew hears.
            train: This rank's share.
            rows: Sent after the order, one by one.

        Raises:
            Exception: what `train` raises, here and on all other ranks.
        """
        with self._lock:
            self._load(steps)
            self._holds = None  # until it is known that all went through the same
            with self.ordered(order, about):
                for part in rows:
                    send(self.group, "rows", {}, part)
                outcome = together(self.group, train)
            if isinstance(outcome, Exception):
                raise outcome
            self._holds, self._held_steps = steps, steps.learner.counters.steps
            return outcome

    def _load(self, steps: Steps) -> None:
        """Have the crew hold the like of this learner, if it does not yet."""
        learner = steps.learner
        if self._holds is steps and self._held_steps == learner.counters.steps:
            return
        about = {
            "spec": learner.spec.model_dump(mode="json"),
            "expected": steps.expected,
            "device": learner.device.type,
            "folder": os.getcwd(),
        }
        with self.ordered("load", about, *learner.dump()):
            pass

    def agree(self, steps: Steps) -> None:
        """Make sure that all ranks hold the bytes of the learner of these steps.

        Raises:
            RanksDiffer: one does not.
        """
        if self._holds is not steps:
            return  # what all ranks trained on was taken back, or nothing was trained on
        with self.ordered("agree", {"counters": asdict(steps.learner.counters)}):
            digests = gathered(self.group, digest(steps.learner))
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            self._holds = None
            raise RanksDiffer(
                f"rank {', '.join(map(str, others))} of {self.size} has other weights or another state than rank 0 after the "
                "same rows: nothing was committed, and all ranks read the head again. If it happens again, their machines, their "
                "versions or the code of the model differ, or the model draws random numbers of its own"
            )

    def _ping(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            with self._lock:
                if not (self._closed.is_set() or self._broken):
                    send(self.group, "ping", {})

    def close(self) -> None:
        """Tell the crew that this is the end, if it is where it can hear that."""
        self._closed.set()
        with self._lock:
            if not self._broken:
                send(self.group, "stop", {})
                farewell(self.group)
        self._pinging.join()


def _written(table: pa.Table) -> memoryview:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return memoryview(sink.getvalue())


# ---- what the rooms of a run call ------------------------------------------------------------------------------------
_leader: Leader | None = None
"""Of this process, while it leads."""


@contextmanager
def leading() -> Iterator[None]:
    """While the context is open, this process leads the others that its launcher has started; it is as ever if there are none, or
    if it leads them already.

    Raises:
        RanksRefused: this process is one of the others.
    """
    place = launched.place()
    if place is None or _leader is not None:
        yield
        return
    if not place.leads:
        raise RanksRefused(f"this process is rank {place.rank} of {place.size}, and only rank 0 leads a run")
    seconds = launched.timeout_seconds()
    with at_the_head_of(joined(place, seconds), seconds):
        yield


@contextmanager
def at_the_head_of(group: Group, timeout_seconds: float) -> Iterator[Leader]:
    """The same, of a group whose other ranks are in `crew.follow_orders`."""
    global _leader
    leader = _leader = Leader(group, timeout_seconds)
    try:
        yield leader
    finally:
        _leader = None
        leader.close()


def leader() -> Leader | None:
    """Of this process; None: it has no crew."""
    return _leader


def steps_of(learner: Learner, expected: int = 0) -> Steps:
    """Gradient steps of a learner, which all ranks make together if there are several; `expected` is that of `Steps`.

    Raises:
        SpecError: Horovod is to add up parts.
        RanksRefused: this host has fewer GPUs than ranks that compute on one.
        TrainingError: what `Steps` raises.
    """
    group = ALONE if _leader is None else _leader.group
    if learner.spec.parts is not None and isinstance(group, HorovodGroup):
        raise SpecError(
            "parts: Horovod adds up in an order of its own: leave parts out, or let torchrun start the ranks"
        )
    if group.size > 1:
        launched.check_devices(learner.device.type, torch.cuda.device_count())
    return Steps(learner, expected, group=group)


def train_shard(steps: Steps, groups: Sequence[RowGroup], passes: int, *, labelled: int | None = None) -> PassResult:
    """As `loop.train_shard`, by all ranks together if there are several."""
    if _leader is None:
        return loop.train_shard(steps, groups, passes, labelled=labelled)
    return _leader.train_shard(steps, groups, passes, labelled)


def agree(steps: Steps) -> None:
    """Make sure that all ranks hold what this one is about to commit: the bytes of the learner of these steps.

    Raises:
        RanksDiffer: one does not.
    """
    if _leader is not None:
        _leader.agree(steps)


def environment_of(spec: Spec) -> dict[str, str | int]:
    """As `environment`; and `ranks`, how many there are, where bits depend on that: of several, if the spec has no parts."""
    found = environment()
    if _leader is not None and spec.parts is None:
        found["ranks"] = _leader.size
    return found

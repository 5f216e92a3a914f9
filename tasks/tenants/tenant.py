"""One of many: an online run as it is, opened and looked into by lookouts, and given its turns by the rota."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import Final

from tidemill.progress import happened, listening, under_way
from tidemill.storage.aliases import find_alias
from tidemill.storage.store import Store
from tidemill.tasks import batch
from tidemill.tasks.online import step as protocol
from tidemill.tasks.online.events import Looked, Stepped
from tidemill.tasks.online.metrics import Numbers
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.step import OnlineRun, Outcome, retrained, retraining
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.tenants.entries import entries
from tidemill.tasks.tenants.naming import speaking_of
from tidemill.tasks.tenants.pairs import Pair

logger = logging.getLogger("tidemill.tenants")

WHOLE_LOOK_SECONDS: Final = 60.0
"""A turn that found nothing to do is taken again after this time though the inbox, which is not empty, has not changed: what is
there may be ready by now (a grace period is over), or a denied deletion allowed. Sooner where the settings name less time."""

_BITS: Final = 2**64 - 1


@dataclass(frozen=True)
class _Sight:
    """What was in the inboxes at one moment."""

    entries: int
    mark: int
    """Equal marks of equally many entries: the same keys with the same etags."""


class Tenant:
    """A pair with its run, which is opened when it is first looked at, and again after a failure."""

    def __init__(
        self, pair: Pair, settings: OnlineSettings, stores: Callable[[str], Store], numbers: Numbers | None = None
    ) -> None:
        """
        Args:
            pair: Whose run it is.
            settings: Its own.
            stores: Opens the store at a URL.
            numbers: What it counts for Prometheus; None: nothing.
        """
        self.name, self.pair, self.settings = pair.called, pair, settings
        labels = None if settings.labels is None else settings.labels.wait_seconds
        self._patience = min(WHOLE_LOOK_SECONDS, settings.train_when.max_wait_seconds or inf, labels or inf)
        self._stores, self._numbers = stores, numbers
        self._run: OnlineRun | None = None
        self.failure: str | None = None
        """Why the last turn failed; None: it did not."""
        self.report: OnlineReport | None = None
        """None before it could be opened. It outlives the run."""
        self._has_committed = False
        self._sight: _Sight | None = None
        """What the last look saw, if it saw all of it."""
        self._settled: tuple[_Sight, float] | None = None
        """What there was before a turn that found nothing to do, and when that was."""

    @property
    def poll_seconds(self) -> float:
        """The pause after the first look that found nothing."""
        return self.settings.poll_seconds

    @property
    def places(self) -> Places | None:
        """Where it reads and writes; None while it is not open."""
        return None if self._run is None else self._run.places

    # ---- in the thread of a lookout ----------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Read the learner, and begin to read what waits, ahead of the turn that needs them; it pays debts and moves the alias as
        reading the head in the turn would.

        Raises:
            Exception: what `turn` raises. The turn would have.
        """
        run = self._run
        assert run is not None, "a look opens it"
        with self._telling():
            protocol.prepare(run)

    def look(self) -> bool:
        """Open the run if it is not; then whether a turn may find something to do.

        Raises:
            StorageError: what `OnlineRun` raises; or an inbox is away.
        """
        with speaking_of(self.name):
            if self._run is None:
                run = self._open()
                must = self._must_begin(run)
                run.places.head = None  # many wait for a turn, and only so many may take memory
                return must
            return self._see(self._run)

    def _open(self) -> OnlineRun:
        pair, settings = self.pair, self.settings
        run = OnlineRun(pair.inbox, pair.registry, pair.model, settings, self._stores)
        if self.report is not None:
            run.report = self.report  # it goes on counting
        if self._numbers is not None:
            _begin(self._numbers, run.places, settings)
        self._has_committed, self._sight, self._settled = False, None, None
        self._run, self.report = run, run.report
        return run

    def _must_begin(self, run: OnlineRun) -> bool:
        """Whether a first turn is needed. Where nothing waits, what a run before has left is finished without a learner.

        With an empty inbox nothing is owed in it. A rollback or a retraining, which the head may call for, is a turn's.
        """
        if self.settings.gate.after_refusals != "continue":
            return True
        if any(True for inbox in run.places.inboxes for _ in entries(inbox)):
            return True
        head = run.places.head
        assert head is not None, "the run was opened in this look"
        run.places.log.make_durable(head)  # before anything follows from it
        run.champion.finish(head)
        return False

    def _see(self, run: OnlineRun) -> bool:
        """Whether there is anything that the last turn has not seen. After a commit that left shards, the first will do."""
        there = (what for inbox in run.places.inboxes for what in entries(inbox))
        self._sight = None
        if self._has_committed and run.report.waiting:
            return next(there, None) is not None
        self._sight = sight = _sight(there)
        if not sight.entries:
            return False
        if self._settled is None:
            return True
        settled, since = self._settled
        return sight != settled or time.monotonic() - since > self._patience

    # ---- in the thread that trains -----------------------------------------------------------------------------------
    def turn(self) -> Outcome:
        """One step of the run, or the batch training that it asks for.

        Raises:
            Exception: what `step` raises. Nothing of it counts.
        """
        run = self._run
        assert run is not None, "a look opens it"
        began = time.monotonic()
        with self._telling(), under_way(self.name, unit="shards"):
            done = protocol.step(run)
            if done.outcome is Outcome.RETRAIN:
                retrained(run, batch.train(*retraining(run), stores=self._stores))
            elif done.outcome is Outcome.COMMITTED:
                happened(Stepped(time.monotonic() - began))
        idle = done.outcome is Outcome.IDLE
        self._settled = (self._sight, began) if idle and self._sight is not None else None
        self._has_committed = not idle
        return done.outcome

    def let_go(self) -> None:
        """Drop the learner and the champion."""
        if self._run is not None:
            self._run.forget()
            self._run.champion.forget()

    def failed(self, reason: str | None) -> None:
        """After a failure the next look opens the run anew, as the start of a process would."""
        self.failure = reason
        if reason is not None:
            self._run = None
        if self._numbers is not None:
            self._numbers.failing(reason is not None)

    def nothing_new(self) -> None:
        """Tell whoever listens that a look has found nothing new."""
        report, run = self.report, self._run
        if report is None or run is None:
            return
        if self._sight is not None and not self._sight.entries:
            report.look(0, None)
        with self._telling():
            happened(
                Looked(
                    self.pair.model,
                    report.head,
                    report.waiting,
                    report.oldest_waiting,
                    report.passed_over,
                    report.owed,
                )
            )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        with speaking_of(self.name), nullcontext() if self._numbers is None else listening(self._numbers):
            yield


def _begin(numbers: Numbers, places: Places, settings: OnlineSettings) -> None:
    """Count from where the model stands. It cannot fail the run, which finds out for itself what is wrong."""
    try:
        assert places.head is not None, "the places were opened a moment ago"
        numbers.begin(places.head.manifest, find_alias(places.log, settings.gate.alias))
    except Exception as error:  # noqa: BLE001  # of whatever class
        logger.warning("%s is not counted from where it stands: %r", places.log.url, error)


def _sight(there: Iterator[tuple[str, str]]) -> _Sight:
    """In any order, and in no more memory than two numbers: a kept inbox may hold millions."""
    count = mark = 0
    for entry in there:
        count, mark = count + 1, (mark + hash(entry)) & _BITS
    return _Sight(count, mark)

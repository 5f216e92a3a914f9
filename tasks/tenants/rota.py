"""Whose turn it is: one commit each, round and round; with pauses that grow where there is nothing to do, or where it failed.

Nothing here knows what a turn does, and the clock is handed in: `benchmarks/cost.py` runs this same code on a clock that jumps.
"""

import heapq
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tidemill.storage.errors import StorageError, Unavailable, on_one_line
from tidemill.tasks.errors import GateClosed, MissingExtra
from tidemill.tasks.online.step import Outcome
from tidemill.tasks.retrying import BACKOFF_SECONDS, RETRIES
from tidemill.tasks.stopping import Stop
from tidemill.tasks.training.errors import TrainingError

logger = logging.getLogger("tidemill.tenants")

IDLE_MOST: Final = 12
"""The pause between two looks at an inbox where nothing waits doubles, up to this many times `poll_seconds`."""
FAILED_MOST_SECONDS: Final = 600.0
"""The pause after a failure doubles up to this, from `BACKOFF_SECONDS` on."""
AHEAD: Final = 3
"""So many whose turns come next prepare for them while others have theirs, as far as the bound of learners leaves room."""
ENDS_SECONDS: Final = 5.0
"""How long the end waits for those who prepare. Who takes longer, mostly because a store is slow or away, is left behind and ends
with the process, wherever it is then. Nothing is lost, as by a kill; if it was inside of torch, the exit may be a crash. What it
fails of is not told."""


class Member(Protocol):
    """One of those who take turns."""

    @property
    def name(self) -> str: ...

    @property
    def poll_seconds(self) -> float:
        """The pause after the first look that found nothing."""

    def look(self) -> bool:
        """Whether a turn may find something to do. Called in another thread, never during a turn of the same member."""

    def prepare(self) -> None:
        """Take the memory that a turn needs, so that the turn finds it; it may write, as the turn may.

        Called in another thread, as `look`, before a turn. With an error the turn would have failed too.
        """

    def turn(self) -> Outcome:
        """Take one step. With an error nothing of it counts."""

    def nothing_new(self) -> None:
        """A look has found nothing to do."""

    def let_go(self) -> None:
        """Give up the memory that a turn needs; the next turn takes it again."""

    def failed(self, reason: str | None) -> None:
        """How the last turn or look ended: with this error, or well (None)."""


class Looks(Protocol):
    """Who looks ahead: `tidemill.tasks.tenants.lookouts`."""

    def send(self, who: Any, look: Callable[[], bool]) -> None: ...

    def back(self) -> list[tuple[Any, bool | Exception]]: ...

    def wait(self, seconds: float, stop: Stop) -> None: ...


@dataclass(eq=False)
class _Place:
    """Where one member stands."""

    member: Member
    idle: int = 0
    """How many times in a row nothing was found."""
    failures: int = 0
    """How many times in a row it failed."""
    queued: bool = False
    """Whether it stands in the queue for turns."""
    looked: bool = False
    """Whether a look since its last turn has found something."""
    away: bool = False
    """Whether a lookout is with it, who looks or prepares: it has no turn meanwhile, and others overtake it."""


class _Learners:
    """Who keeps a learner in memory: so many at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, Member] = OrderedDict()
        """By name, the one whose turn was longest ago first."""
        self.coming: set[str] = set()
        """The names of those who prepare, or have done so, and must not lose it before their turn."""

    def __contains__(self, member: Member) -> bool:
        return member.name in self._kept

    def make_room_for(self, member: Member) -> None:
        """It keeps one from now on. Of those who have had a turn since they took theirs, whose was longest ago give it up."""
        self._kept.pop(member.name, None)
        while len(self._kept) >= self._most:
            self.give_up(next(one for name, one in self._kept.items() if name not in self.coming))
        self._kept[member.name] = member

    def give_up(self, member: Member) -> None:
        """It keeps none any more, if it did."""
        self.coming.discard(member.name)
        if self._kept.pop(member.name, None) is not None:
            member.let_go()


class Rota:
    """Members take turns until all are done, or until it is time to stop."""

    def __init__(
        self,
        members: Sequence[Member],
        looks: Looks,
        *,
        drains: bool,
        learners: int,
        now: Callable[[], float],
        after_turn: Callable[[Member, Outcome], None] = lambda member, outcome: None,
        alive: Callable[[int], None] = lambda failing: None,
    ) -> None:
        """
        Args:
            members: Who takes turns; the first turns are in this order, as far as the looks before them take equally long.
            looks: Who looks ahead.
            drains: A member is done once it has found nothing to do, or has failed for good; else it is looked at again.
            learners: The most members that may keep the memory of their last turn.
            now: The clock, in seconds.
            after_turn: Is told who had a turn, and how it ended.
            alive: Is called with the number of those that fail, whenever nobody has anything to do.
        """
        self._looks, self._drains, self._now = looks, drains, now
        self._after_turn, self._alive = after_turn, alive
        self._ready: deque[_Place] = deque()
        """Whose turn comes next."""
        self._ahead = min(AHEAD, learners - 1)
        self._front = learners + AHEAD
        """How many of them are looked at ahead of their turns, and may overtake each other."""
        self._later: list[tuple[float, int, _Place]] = []
        """Due moment, a number that makes it unique, and who is to be looked at then: a heap."""
        self._number = itertools.count()
        self._learners = _Learners(learners)
        self.failing: dict[str, str] = {}
        """Whose last turn, or last look, failed -> why."""
        self._left = len(members)
        for member in members:
            self._look(_Place(member))

    def go(self, stop: Stop) -> None:
        """Until it is time to stop, between two turns; or until all are done."""
        while self._left and not stop:
            self._send_who_is_due()
            for place, found in self._looks.back():
                self._heard(place, found)
            place = self._whose_turn()
            self._send_ahead()
            if place is not None:
                self._turn(place)
            elif self._left:
                self._alive(len(self.failing))
                due = self._later[0][0] - self._now() if self._later else float("inf")
                self._looks.wait(max(0.0, due), stop)
        self._wait_for_who_prepares()

    def _wait_for_who_prepares(self) -> None:
        """As long as `ENDS_SECONDS`: the interpreter may crash if it ends while a thread is inside of torch."""
        ends = Stop(ENDS_SECONDS)
        while not ends and any(place.away and place.member.name in self._learners.coming for place in self._ready):
            self._looks.wait(ENDS_SECONDS, ends)
            for place, found in self._looks.back():
                place.away = False
                if isinstance(found, Exception):
                    self._failed(place, found, ends=True)

    # ---- looks -------------------------------------------------------------------------------------------------------
    def _look(self, place: _Place) -> None:
        place.away = True
        self._looks.send(place, place.member.look)

    def _prepare(self, place: _Place) -> None:
        member = place.member

        def prepared() -> bool:
            member.prepare()
            return True

        place.away = True
        self._learners.make_room_for(member)
        self._learners.coming.add(member.name)
        self._looks.send(place, prepared)

    def _send_who_is_due(self) -> None:
        while self._later and self._later[0][0] <= self._now():
            self._look(heapq.heappop(self._later)[2])

    def _send_ahead(self) -> None:
        """Whoever has a turn soon and keeps no learner is looked at; then it prepares, if there is room for one more.

        So no learner is read to find that nothing is left, and none is waited for while others have their turns.
        """
        for place in itertools.islice(self._ready, self._front):
            if place.away or place.member in self._learners:
                continue
            if not place.looked:
                self._look(place)
            elif len(self._learners.coming) < self._ahead:
                self._prepare(place)

    def _heard(self, place: _Place, found: bool | Exception) -> None:
        place.away = False
        if isinstance(found, Exception):
            self._failed(place, found)
        elif not found:
            place.member.nothing_new()
            self._nothing_to_do(place)
        else:
            place.looked = True
            self._queue(place)

    # ---- turns -------------------------------------------------------------------------------------------------------
    def _whose_turn(self) -> _Place | None:
        """The first in the queue who is prepared; with room for one learner alone, who has something to do. None: nobody yet."""
        for number, place in enumerate(itertools.islice(self._ready, self._front)):
            if not place.away and (place.member in self._learners or (place.looked and not self._ahead)):
                del self._ready[number]
                place.queued = False
                self._learners.coming.discard(place.member.name)
                self._learners.make_room_for(place.member)
                return place
        return None

    def _queue(self, place: _Place) -> None:
        if not place.queued:
            place.queued = True
            self._ready.append(place)

    def _leave_queue(self, place: _Place) -> None:
        if place.queued:
            place.queued = False
            self._ready.remove(place)

    def _turn(self, place: _Place) -> None:
        member, place.looked = place.member, False
        try:
            outcome = _turn_of(member)
        except Exception as error:  # noqa: BLE001  # of whatever class: it is that member's, and the others go on
            self._failed(place, error)
            return
        self._after_turn(member, outcome)
        if outcome is Outcome.IDLE:
            self._nothing_to_do(place)
            return
        if outcome is not Outcome.COMMITTED:  # its learner is gone: it is read ahead of the next turn, as any other
            self._learners.give_up(member)
        self._well(place)
        place.idle = 0
        self._queue(place)

    def _nothing_to_do(self, place: _Place) -> None:
        self._leave_queue(place)
        self._well(place)
        if self._drains:
            self._done(place)
            return
        pause = place.member.poll_seconds * min(2**place.idle, IDLE_MOST)
        place.idle = min(place.idle + 1, IDLE_MOST)
        self._again(place, pause)

    # ---- failures ----------------------------------------------------------------------------------------------------
    def _failed(self, place: _Place, error: Exception, *, ends: bool = False) -> None:
        member = place.member
        self._leave_queue(place)
        self._learners.give_up(member)
        place.looked = False
        reason = on_one_line(str(error) or repr(error))
        member.failed(reason)
        place.failures += 1
        again = not self._drains or (isinstance(error, Unavailable) and place.failures <= RETRIES)
        pause = min(BACKOFF_SECONDS * 2.0 ** min(place.failures - 1, 10), FAILED_MOST_SECONDS)
        then = f"it is tried again in {pause:.0f} s" if again else "it is given up in this run"
        first, self.failing[member.name] = self.failing.get(member.name) != reason, reason
        logger.log(
            logging.ERROR if first else logging.DEBUG,
            "%s failed: %s. %s",
            member.name,
            reason.rstrip("."),
            "The run ends" if ends else f"The others go on; {then}",
            exc_info=error if first and not _is_ours(error) else None,
        )
        if again:
            self._again(place, pause)
        else:
            self._done(place)

    def _well(self, place: _Place) -> None:
        place.failures = 0
        if self.failing.pop(place.member.name, None) is not None:
            place.member.failed(None)
            logger.info("%s is well again", place.member.name)

    # ---- all of them --------------------------------------------------------------------------------------------------------
    def _again(self, place: _Place, pause: float) -> None:
        heapq.heappush(self._later, (self._now() + pause, next(self._number), place))

    def _done(self, place: _Place) -> None:
        self._left -= 1
        self._learners.give_up(place.member)


def _turn_of(member: Member) -> Outcome:
    """Its turn. Code of its model that ends the program ends that turn alone."""
    try:
        return member.turn()
    except SystemExit as error:
        raise RuntimeError(f"its code wants to end the program, with SystemExit: {error}") from error


def _is_ours(error: Exception) -> bool:
    """Whether its message says all that there is to know; that of others needs the traceback."""
    return isinstance(error, StorageError | TrainingError | GateClosed | MissingExtra)

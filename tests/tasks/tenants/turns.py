"""A clock that jumps, and members that do what a test wants: for the rota alone."""

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from tidemill.tasks.online.step import Outcome
from tidemill.tasks.stopping import Stop


class Clock:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Looks:
    """Looks that come back at once, or after the time that the clock says they take; in the order in which they are done."""

    def __init__(self, clock: Clock, seconds: Callable[[Any], float] = lambda place: 0.0) -> None:
        self._clock, self._seconds = clock, seconds
        self._under_way: list[tuple[float, int, Any, bool | Exception]] = []
        self._number = itertools.count()

    def send(self, who: Any, look: Callable[[], bool]) -> None:
        try:
            found: bool | Exception = look()
        except Exception as error:  # noqa: BLE001  # as the threads do
            found = error
        heapq.heappush(self._under_way, (self._clock.now + self._seconds(who), next(self._number), who, found))

    def back(self) -> list[tuple[Any, bool | Exception]]:
        found = []
        while self._under_way and self._under_way[0][0] <= self._clock.now:
            _, _, who, what = heapq.heappop(self._under_way)
            found.append((who, what))
        return found

    def wait(self, seconds: float, stop: Stop) -> None:
        ends = self._clock.now + seconds
        if self._under_way:
            ends = min(ends, self._under_way[0][0])
        assert ends < float("inf"), "it would wait for ever"
        self._clock.now = max(self._clock.now, ends)


class One:
    """A member with commits to make; `events` takes down what is done with it."""

    poll_seconds = 1.0

    def __init__(
        self, name: str, commits: int, events: list[str], errors: Iterable[Exception] = (), at: str = "turn"
    ) -> None:
        """The first turns, looks or preparations (`at`) raise these errors, one each."""
        self.name, self.left, self.events, self.at = name, commits, events, at
        self._errors = [*errors]
        self.told: list[str | None] = []
        self.warm = False

    def look(self) -> bool:
        self.events.append(f"look {self.name}")
        self._fail("look")
        return self.left > 0

    def prepare(self) -> None:
        self.events.append(f"prepare {self.name}")
        self._fail("prepare")
        self.warm = True

    def turn(self) -> Outcome:
        self.events.append(f"turn {self.name}")
        self._fail("turn")
        self.warm = True
        if not self.left:
            return Outcome.IDLE
        self.left -= 1
        return Outcome.COMMITTED

    def nothing_new(self) -> None:
        self.events.append(f"nothing {self.name}")

    def let_go(self) -> None:
        self.events.append(f"let go {self.name}")
        self.warm = False

    def failed(self, reason: str | None) -> None:
        self.told.append(reason)

    def _fail(self, at: str) -> None:
        if at == self.at and self._errors:
            raise self._errors.pop(0)

"""What a check is given: a store below which nothing else is, hands on it, and how much to do."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from tidemill.storage.certify.hands import TOGETHER, Call, Hands
from tidemill.storage.errors import AlreadyExists, NotFound, PreconditionFailed, StorageError
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import Store

T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT: Final = TOGETHER
"""How many calls are under way where a rate is measured, and where objects are prepared or removed."""
OBJECT: Final = bytes(30_000)
"""About a manifest with some shards: what rates and latencies are measured on."""
NO_ETAG: Final = "0123456789abcdef0123456789abcdef"
"""Has the form of an etag, and belongs to no object."""


class Broken(Exception):
    """A promise does not hold. The message says what was seen."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done. The defaults take a few seconds on a local disk, and about a minute where a request takes 30 ms."""

    rounds: int = 100
    """How often each race is run: a fault that shows in 5% of the rounds is missed once in 170 checks."""
    objects: int = 1050
    """How many objects the listing has: more than the 1,000 of a page of S3."""
    looks: int = 10
    """How often several look at once at what another does, and twice as often in the middle of it."""
    calls: int = 100
    """How many calls each latency is measured on."""
    large_bytes: int = 32 * 2**20


WHOLE: Final = Effort()


@dataclass(slots=True)
class Trial:
    """One place being tried."""

    store: Store
    hands: Hands
    effort: Effort
    bytes_per_second: dict[str, float] = field(default_factory=dict)
    """Of one large object, by verb."""
    per_second: dict[str, float] = field(default_factory=dict)
    """Calls a second with `IN_FLIGHT` under way, by verb."""

    def many(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each item, `IN_FLIGHT` at once."""
        return concurrently(function, items, IN_FLIGHT)

    def race(self, calls: Sequence[Call]) -> list[int]:
        """The places of those among calls made at one instant that succeed. To lose is to be told of another object.

        Raises:
            StorageError: a call failed otherwise.
        """
        results = self.hands.together(calls)
        for result in results:
            if isinstance(result, StorageError) and not isinstance(
                result, AlreadyExists | PreconditionFailed | NotFound
            ):
                raise result
        return [place for place, result in enumerate(results) if not isinstance(result, StorageError)]

    def one_winner(
        self, what: str, round_of: Callable[[int], Sequence[Call]], check: Callable[[int, int], None]
    ) -> str:
        """Run `rounds` races. `check` is told the round and its winner.

        A round without a winner counts: if an answer is lost, the winner asks again and meets its own object.

        Raises:
            Broken: in some round several calls succeeded.
        """
        several = list[int]()
        for number in range(self.effort.rounds):
            winners = self.race(round_of(number))
            if len(winners) > 1:
                several.append(len(winners))
            elif winners:
                check(number, winners[0])
        if several:
            raise Broken(
                f"{what}: up to {max(several)} of {TOGETHER} succeeded at once, in {len(several)} of {self.effort.rounds} rounds"
            )
        return f"{self.effort.rounds} rounds of {TOGETHER} at once"


def value(result: Any) -> Any:
    """What a call of `Hands.together` returned; raises what it raised."""
    if isinstance(result, StorageError):
        raise result
    return result


def refused(error: type[StorageError], call: Callable[[], object], otherwise: str) -> None:
    """Raises Broken if the call succeeds where it must be refused."""
    with suppress(error):
        call()
        raise Broken(otherwise)

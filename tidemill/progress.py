"""What is under way, told by the loops to whoever listens: by default to nobody, at the cost of a function call.

A listener hears of activities (a pass over a dataset, an epoch, a drain) as they begin, go on and end, and of what happened (a
version was committed, an inbox was looked at). It runs in the thread that tells, so it should return at once. It cannot fail
a run: one that raises hears nothing more. Nothing is told from inside compiled code, or from threads that work ahead.

Who listens belongs to the context (`contextvars`): of two runs in one process each has its own listeners.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Final, Protocol, TypeVar

logger = logging.getLogger("tidemill")

T = TypeVar("T")

IN_RESULT: Final = "in_result"
"""Attribute of log records that say what the result of `train` says too: who prints that need not show them."""


class Listener(Protocol):
    """Whoever wants to know."""

    def on_activity(self, activity: "Activity") -> None:
        """An activity began, went on, or ended: it says itself which. Called often: once for each batch of rows."""

    def on_event(self, event: object) -> None:
        """Something happened; what there is, the rooms define that tell it (`tidemill.tasks.online.events`)."""


class Activity:
    """Something that takes a while, and how far it is."""

    __slots__ = ("_ears", "ahead", "began", "done", "ended", "loss", "newest", "rows", "total", "unit", "what")

    def __init__(
        self, what: str, unit: str = "rows", total: int | None = None, ahead: int = 0, ears: "tuple[_Ear, ...]" = ()
    ) -> None:
        self.what = what
        """In words: `epoch 3 of 20`."""
        self.unit = unit
        """What `total`, `ahead` and `done` count."""
        self.total = total
        """How much there is in all, as far as it is known now; None: that cannot be known."""
        self.ahead = ahead
        """How much more is still to come after this activity, of the same kind: the epochs after this one."""
        self.done = 0
        self.rows = 0
        """How many rows that was."""
        self.loss: Callable[[], float] | None = None
        """The mean loss so far. To be asked now and then only, and from the thread that tells: it may wait for a device."""
        self.newest: datetime | None = None
        """When the shard in hand was written: how far behind its producers a drain is."""
        self.began = time.monotonic()
        self.ended = False
        self._ears = ears

    def advance(
        self,
        done: int,
        *,
        rows: int | None = None,
        loss: Callable[[], float] | None = None,
        newest: datetime | None = None,
    ) -> None:
        """Tell that `done` more units are done. Without `rows`, the units are rows."""
        if not self._ears:
            return
        self.done += done
        self.rows += done if rows is None else rows
        self.loss, self.newest = loss or self.loss, newest or self.newest
        self.tell()

    def expect(self, total: int) -> None:
        """Tell how much there is in all."""
        if self._ears:
            self.total = total
            self.tell()

    def tell(self) -> None:
        """Tell how things are."""
        for ear in self._ears:
            ear.on_activity(self)


class _Ear:
    """A listener that can do no harm."""

    __slots__ = ("_deaf", "_listener")

    def __init__(self, listener: Listener) -> None:
        self._listener, self._deaf = listener, False

    def on_activity(self, activity: Activity) -> None:
        if not self._deaf:
            try:
                self._listener.on_activity(activity)
            except Exception as error:  # noqa: BLE001  # of whatever class: no run ends because of one who watches
                self._give_up(error)

    def on_event(self, event: object) -> None:
        if not self._deaf:
            try:
                self._listener.on_event(event)
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._deaf = True
        logger.warning("%s is told nothing more of this run: %r", type(self._listener).__name__, error)


NOBODY: Final = Activity("")
"""What an activity is of which nobody wants to hear."""

_ears: ContextVar[tuple[_Ear, ...]] = ContextVar("tidemill_listeners", default=())
_current: ContextVar[Activity] = ContextVar("tidemill_activity", default=NOBODY)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While the context is open, this listener hears what this context does."""
    token = _ears.set((*_ears.get(), _Ear(listener)))
    try:
        yield
    finally:
        _ears.reset(token)


@contextlib.contextmanager
def under_way(what: str, *, unit: str = "rows", total: int | None = None, ahead: int = 0) -> Iterator[Activity]:
    """While the context is open, this is under way. The arguments are those of `Activity`."""
    if not (ears := _ears.get()):
        yield NOBODY
        return
    activity = Activity(what, unit, total, ahead, ears)
    token = _current.set(activity)
    activity.tell()
    try:
        yield activity
    finally:
        _current.reset(token)
        activity.ended = True
        activity.tell()


def each(what: str, items: Sequence[T], *, unit: str) -> Iterator[T]:
    """The items, one after the other, as an activity of its own: the next is asked for once the one before is done."""
    activity = Activity(what, unit, len(items), ears=_ears.get())
    activity.tell()
    try:
        for item in items:
            yield item
            activity.advance(1, rows=0)
    finally:
        activity.ended = True
        activity.tell()


def current() -> Activity:
    """The innermost activity under way: for what is too deep inside of it to be handed it."""
    return _current.get()


def happened(event: object) -> None:
    """Tell that something happened."""
    for ear in _ears.get():
        ear.on_event(event)

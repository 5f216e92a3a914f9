"""SIGTERM and Ctrl-C as requests: finish the step in hand, then stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether to stop: a signal asked for it, or the time is up.

    No `threading.Event`: its lock is not reentrant, so a handler that sets it while the main thread is inside `wait` can wait for
    itself for ever.
    """

    def __init__(self, after_seconds: float | None = None) -> None:
        self._asked = False
        self._ends = float("inf") if after_seconds is None else time.monotonic() + after_seconds

    def __bool__(self) -> bool:
        """True once it is time to stop."""
        return self._asked or time.monotonic() >= self._ends

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until it is time to stop."""
        wakes = time.monotonic() + seconds
        while not self and (left := min(wakes, self._ends) - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = True


@contextlib.contextmanager
def stop_on_signals(after_seconds: float | None = None) -> Iterator[Stop]:
    """While the context is open, SIGTERM and SIGINT only ask to stop; the second SIGINT interrupts, as ever.

    Off the main thread signals cannot be had, and only the time can end it.
    """
    stop = Stop(after_seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What need not be done in a turn is done ahead, in threads: places are opened, inboxes looked into, learners and shards read. No
turn waits for a store that is away at these moments."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from tidemill.tasks.stopping import Stop

T = TypeVar("T")

_SLICE_SECONDS: Final = 0.1
"""How late a signal may be noticed."""


class Lookouts(Generic[T]):
    """A few threads that look, each at one place at a time, in the order in which they were sent.

    They are daemons: one that waits for a store that is away must not hold up the end of the process. Whatever they do may be
    cut off anywhere, as by a kill, and nothing is lost. One that may be inside of torch is waited for a while by who sent it: the
    interpreter may crash if it ends around that.
    """

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[T, Callable[[], bool]] | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[T, bool | Exception]] = queue.SimpleQueue()
        self._early: list[tuple[T, bool | Exception]] = []
        """What came back while somebody waited for it."""
        self._count = count
        for number in range(count):
            threading.Thread(target=self._look, name=f"tidemill-lookout-{number}", daemon=True).start()

    def send(self, who: T, look: Callable[[], bool]) -> None:
        """Have `look` called in one of the threads; what it returns or raises comes back with `who`."""
        self._jobs.put((who, look))

    def back(self) -> list[tuple[T, bool | Exception]]:
        """What has come back since the last call."""
        found, self._early = self._early, []
        while True:
            try:
                found.append(self._found.get_nowait())
            except queue.Empty:
                return found

    def wait(self, seconds: float, stop: Stop) -> None:
        """Return once something has come back, the time is over, or it is time to stop."""
        ends = time.monotonic() + seconds
        while not self._early and not stop and (left := ends - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._early.append(self._found.get(timeout=min(left, _SLICE_SECONDS)))

    def close(self) -> None:
        """Let the threads end. What has not begun is dropped; nobody waits for what is under way."""
        while True:
            try:
                self._jobs.get_nowait()
            except queue.Empty:
                break
        for _ in range(self._count):
            self._jobs.put(None)

    def _look(self) -> None:
        while (job := self._jobs.get()) is not None:
            who, look = job
            try:
                found: bool | Exception = look()
            except Exception as error:  # noqa: BLE001  # of whatever class: it is told to who sent us
                found = error
            except BaseException as error:  # noqa: BLE001  # some package's SystemExit: without an answer they would wait for ever
                found = RuntimeError(f"{type(error).__name__}: {error}")
            self._found.put((who, found))

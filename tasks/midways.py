"""Checkpoints in the middle of an epoch: when one is due, and how it is written while the steps go on.

None of it changes a bit of what is trained, or makes a run fail. A checkpoint holds what a learner is at one moment: it is copied
between two steps, and stored by a thread. One at a time is under way, so that no more than one copy is in memory.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from tidemill.tasks.training.errors import described
from tidemill.tasks.training.midway import Midway

CPU_SHARE: Final = 0.03
"""Of the CPU time of a run, that checkpoints may take where seconds decide: those of a large model are further apart."""
ASIDE_BYTES: Final = 256 * 2**20
"""The largest copy of a learner that is written beside the steps. A larger one is stored while they wait."""

logger = logging.getLogger("tidemill.batch")


class Copied(NamedTuple):
    """A checkpoint that is ready to be stored."""

    bytes: int
    store: Callable[[], None]


class Midways:
    """Says when the checkpoint of a pass is due, and stores it; see `tidemill.tasks.training.midway.Keeper`."""

    def __init__(self, copied: Callable[[Midway], Copied], seconds: float, rows: int | None = None) -> None:
        """A checkpoint is due these seconds after the last one, and after so many rows.

        `copied` makes it, of the learner as it is when it is called.
        """
        self._copied, self._seconds, self._rows = copied, seconds, rows
        self._writer: threading.Thread | None = None
        self._cost = 0.0
        """CPU seconds that the last checkpoint has taken."""
        self.stored(0)

    def begin(self, rows: int) -> None:
        """A pass begins, or goes on after so many rows."""
        self._last_rows = rows

    def stored(self, rows: int) -> None:
        """A checkpoint was stored, after so many rows of a pass."""
        self._last_rows, self._last, self._last_cpu = rows, time.monotonic(), time.process_time()

    def due(self, rows: int) -> bool:
        """As `Keeper.due`."""
        if self._rows is not None and rows - self._last_rows >= self._rows:
            return True
        if time.monotonic() - self._last < self._seconds or (self._writer is not None and self._writer.is_alive()):
            return False
        return CPU_SHARE * (time.process_time() - self._last_cpu) >= self._cost

    def keep(self, midway: Midway) -> None:
        """As `Keeper.keep`. Raises FactoryError: the learner cannot be stored, at the end of the epoch neither."""
        self.wait()
        began = time.thread_time()
        size, store = self._copied(midway)
        self._cost = time.thread_time() - began
        self.stored(midway.place.rows)
        if size > ASIDE_BYTES:
            self._write(store)
            return
        # No daemon: one that is under way when the process ends is stored.
        self._writer = threading.Thread(target=self._write, args=(store,), name="tidemill-checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Until nothing is written any more."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, store: Callable[[], None]) -> None:
        began = time.thread_time()
        try:
            store()
        except Exception as error:  # noqa: BLE001  # of whatever store: the one before it, or the next one, will do
            logger.warning("a checkpoint inside of the epoch was not stored, training goes on: %s", described(error))
        self._cost += time.thread_time() - began

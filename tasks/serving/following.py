"""A predictor that is kept at where its alias stands: a thread looks, loads the new version beside the old, and swaps."""

import logging
import threading
import time
from types import TracebackType
from typing import Final, Self

from tidemill.storage.aliases import find_alias, object_of
from tidemill.storage.errors import UnknownAlias, UnknownVersion, on_one_line
from tidemill.storage.log import VersionLog
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.serving.predictor import Predictor, predictor_of

logger = logging.getLogger("tidemill.serving")

FIRST_PAUSE: Final = 1.0
"""Seconds after which a version that could not be loaded is tried again; each time twice as many, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE: Final = 60.0
CLOSING: Final = 1.0
"""Seconds that `close` waits for the thread: a store that is away may hold it much longer."""


class Following:
    """The version that an alias names, always. `load` makes it, with `follow`; `close`, or the end of a `with` block, ends it.

    Whoever answers a request takes `now` once, and goes on with that: all of the answer is of one version, whatever becomes of
    the alias meanwhile. Where a version cannot be loaded, because the store is away or the version is damaged or gone, the one
    before goes on serving, and a warning is logged once. A new one is loaded beside the old one: both are in memory then.

    The thread does not outlive a fork: make one in each process.
    """

    now: Predictor
    """The predictor of this moment. Replaced whole, never changed. It goes back to an older version only if the alias did."""

    def __init__(self, log: VersionLog, alias: str, first: Predictor, every: float) -> None:
        """`every`: seconds between two looks at the alias, each one small request to the store."""
        self.now = first
        self.looked = time.time()
        """When the alias was last looked up, in seconds since 1970."""
        self._log, self._alias, self._every = log, alias, every
        self._seen: ObjectInfo | None = None  # the alias when `now` was found to be what it names
        self._wanted: int | None = None  # the version that is to be taken
        self._failed: tuple[ObjectInfo | None, type[Exception]] | None = None
        self._pause, self._again = FIRST_PAUSE, 0.0  # for the version that failed
        self._closed = threading.Event()
        self._swapping = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"tidemill-follow-{log.model}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End following. `now` stays what it is from here on, and can be used further."""
        with self._swapping:
            self._closed.set()
        self._thread.join(CLOSING)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the thread --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._closed.wait(min(self._every, threading.TIMEOUT_MAX)):
            alias: ObjectInfo | None = None
            try:
                alias = self._look()
                self.looked = time.time()
                if alias == self._seen:
                    self._failed = None
                elif not self._is_pausing(alias):
                    self._take(alias)
            except Exception as error:  # noqa: BLE001  # whatever it is, the version that is loaded goes on serving
                self._note(alias, error)

    def _look(self) -> ObjectInfo:
        alias = object_of(self._log, self._alias)
        if alias is None:
            raise UnknownAlias(f"{self._log.url} has no alias {self._alias!r} any more: `tidemill promote` makes one.")
        return alias

    def _is_pausing(self, alias: ObjectInfo) -> bool:
        """Whether the version is one that could not be loaded, and is not to be tried again yet."""
        return self._failed is not None and self._failed[0] == alias and time.monotonic() < self._again

    def _take(self, alias: ObjectInfo) -> None:
        """Load the version that the alias names, unless it is the one that is loaded, and put it in the place of that."""
        old, self._wanted = self.now, None
        if (stands := find_alias(self._log, self._alias)) is None:
            return  # removed since the look: the next one says so
        self._wanted = stands.version
        try:
            version = self._log.version(stands.version)
            new = old if version.sha256 == old.version.sha256 else predictor_of(self._log, version)
        except UnknownVersion:
            if self._look() != alias:
                return  # it moved on, and retention took what it had named: the next look finds the newer one
            raise
        with self._swapping:
            if self._closed.is_set():
                return
            self.now = new
        self._seen, self._failed = alias, None
        if new is not old:
            logger.info(
                "%s: %s is version %d now, after %d", self._log.url, self._alias, version.number, old.version.number
            )

    def _note(self, alias: ObjectInfo | None, error: Exception) -> None:
        """Say why there is no newer version, once for each reason; try a version that failed again later."""
        failed = alias, type(error)
        if alias is not None:
            if self._failed is None or self._failed[0] != alias:
                self._pause = FIRST_PAUSE
            self._again = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if failed != self._failed:
            named = "" if alias is None or self._wanted is None else f" to version {self._wanted}"
            logger.warning(
                "%s: %s cannot be followed%s; version %d goes on serving: %s: %s",
                self._log.url, self._alias, named, self.now.version.number, type(error).__name__, on_one_line(str(error)),
            )  # fmt: skip
        self._failed = failed

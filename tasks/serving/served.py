"""The version that a server answers with: none until there is one, and then wherever the alias stands."""

import logging
import threading
from collections.abc import Callable

from tidemill.storage.errors import on_one_line
from tidemill.tasks.serving.following import Following
from tidemill.tasks.serving.predictor import Predictor

logger = logging.getLogger("tidemill.serve")


class Served:
    """Waits for a first version in a thread, and follows its alias from there on."""

    def __init__(self, load: Callable[[], Following], every: float) -> None:
        """Returns once a version is loaded, or at once if the first try fails: it is tried again.

        Args:
            load: Loads the version that the alias names, and follows it.
            every: Seconds between two tries.
        """
        self._load, self._every = load, every
        self._following: Following | None = None
        self._told = ""
        self._closed = threading.Event()
        if not self._try():
            threading.Thread(target=self._wait, name="tidemill-wait", daemon=True).start()

    @property
    def now(self) -> Predictor | None:
        """The version of this moment. Who answers a request takes it once."""
        return None if self._following is None else self._following.now

    @property
    def looked(self) -> float:
        """When the alias was last looked up, in seconds since 1970; 0: never yet."""
        return 0.0 if self._following is None else self._following.looked

    def close(self) -> None:
        """Follow no longer."""
        self._closed.set()
        if self._following is not None:
            self._following.close()

    def _try(self) -> bool:
        try:
            following = self._load()
        except Exception as error:  # noqa: BLE001  # whatever it is, another version may mend it
            if (told := on_one_line(str(error))) != self._told:
                self._told = told
                logger.warning("there is no version to serve yet, and /ready says so: %s", told)
            return False
        self._following = following
        if self._closed.is_set():
            following.close()
        logger.info("version %d is served", following.now.version.number)
        return True

    def _wait(self) -> None:
        while not self._closed.wait(min(self._every, threading.TIMEOUT_MAX)) and not self._try():
            pass

"""What stores behind a network have in common: attempts, the keys on which servers disagree, comparing before acting."""

import logging
import re
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Final, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from tidemill.storage.errors import InvalidKey, PreconditionFailed, StorageError, Unavailable, on_one_line
from tidemill.storage.store import ObjectInfo, Store

logger = logging.getLogger("tidemill.storage")

R = TypeVar("R")

# SeaweedFS takes `a//b`, `/a/b` and `a\b` for `a/b`, so that a read or delete would hit another object; it refuses
# `.` and `..`. Azure takes `a\b` for `a/b`. Google Cloud Storage forbids `.` and `..`.
AMBIGUOUS: Final = re.compile(r"[\\\0\ud800-\udfff]|(^|/)\.{0,2}(/|$)")

_TOLD_AFTER_SECONDS: Final = 2.0
"""A call that has failed for this long says so: nothing listens there, or the server is down."""


class Transient(Exception):
    """A failure that may go away. `verdict` is what to raise when it does not."""

    def __init__(self, message: str, verdict: type[StorageError] = Unavailable) -> None:
        super().__init__(message)
        self.verdict = verdict


def retried(attempt: Callable[[], R], what: Callable[[], str], retry_seconds: float, remedy: str) -> R:
    """The answer of the first attempt that does not fail for a while only. Says so, once, if that takes long.

    Args:
        attempt: Makes one request.
        what: In words, for messages.
        retry_seconds: For how long to go on trying.
        remedy: What to check, such as "the store is up and AWS_ENDPOINT_URL_S3 names it".
    """
    began, told = time.monotonic(), False
    try:
        return attempt()
    except Transient as error:  # seldom: what follows costs a tenth of a request
        failures = [error]

    def again() -> R:
        if failures:
            raise failures.pop()
        return attempt()

    def before_sleep(state: RetryCallState) -> None:
        nonlocal told
        assert state.outcome is not None
        late = time.monotonic() - began + state.upcoming_sleep > _TOLD_AFTER_SECONDS and not told
        logger.log(
            logging.WARNING if late else logging.DEBUG,
            "%s: %s. Trying again for up to %.0f s. Check that %s",
            *(on_one_line(what()), state.outcome.exception(), retry_seconds, remedy),
        )
        told = told or late

    retrying = Retrying(
        retry=retry_if_exception_type(Transient),
        stop=stop_after_delay(max(0.0, began + retry_seconds - time.monotonic())),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(again)
    except Transient as failure:
        raise failure.verdict(
            f"{what()} failed for {time.monotonic() - began:.0f} s: {failure}. Check that {remedy}"
        ) from failure.__cause__


class RemoteStore(Store):
    """A bucket, or a prefix of one, behind a client of the cloud's own; see `azure.py` and `gcs.py`.

    Transient failures (no connection, time-outs, 5xx, throttling, broken bodies) are retried with exponential, jittered waits for
    `retry_seconds`; then `Unavailable` is raised. The clients themselves are told not to try again.

    Keys on which servers disagree raise `InvalidKey`: an empty, `.` or `..` segment, a backslash, NUL, half a surrogate pair, and
    what the cloud itself forbids. A listing skips such objects and warns once.
    """

    retry_seconds: float = 90.0
    """For how long a verb goes on trying. Tests shorten it."""

    concurrency = 8
    readers = 3

    _remedy: ClassVar[str]
    """What to check when the store cannot be reached."""
    _refused: ClassVar[re.Pattern[str]]
    """Finds something in each key that is refused."""
    _failures: ClassVar[tuple[type[BaseException], ...]]
    """All that the client raises when the store, the network or the configuration is at fault."""

    def __init__(self, url: str, prefix: str) -> None:
        self._root = f"{prefix}/" if prefix else ""
        self.url = f"{url}/{prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def _translated(self, error: BaseException, verb: str, where: str, key: str | None) -> StorageError | Transient:
        """What to raise for a failed request. `where` names its object, or its place if there is no `key`."""

    def _call(self, verb: str, key: str | None, request: Callable[[], R]) -> R:
        """The answer to one request, which is made again while its failures are transient."""
        where = self.url
        if key is not None:
            where = f"{self.url}/{key}"
            if self._refused.search(key):
                raise InvalidKey(
                    f"{where!r}: stores disagree about keys with empty, '.' or '..' segments, or such characters"
                )

        def attempt() -> R:
            try:
                return request()
            except self._failures as error:
                raise self._translated(error, verb, where, key) from error

        return retried(attempt, lambda: f"{verb} of {where}", self.retry_seconds, self._remedy)

    def _stat_if_match(self, key: str, if_match: str | None) -> ObjectInfo:
        found = self.stat(key)
        if if_match is not None and found.etag != if_match:
            raise PreconditionFailed(f"{self.url}/{key} has etag {found.etag}, not {if_match}")
        return found

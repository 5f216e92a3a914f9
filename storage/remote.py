"""What stores behind a network have in common: attempts, refusals, the keys on which servers disagree; verbs of two clouds."""

import logging
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Final, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreNotFound,
    Unavailable,
    on_one_line,
)
from tidemill.storage.store import ObjectInfo, PassedOver, Store

logger = logging.getLogger("tidemill.storage")

R = TypeVar("R")

# SeaweedFS takes `a//b`, `/a/b` and `a\b` for `a/b`, so that a read or delete would hit another object; it refuses
# `.` and `..`. Azure takes `a\b` for `a/b`. Google Cloud Storage forbids `.` and `..`.
AMBIGUOUS: Final = re.compile(r"[\\\0\ud800-\udfff]|(^|/)\.{0,2}(/|$)")
_USUAL: Final = re.compile(r"[\w=-][\w=.-]*(?:/[\w=-][\w=.-]*)*", re.ASCII)
"""What nearly all keys are, and no ambiguous one is: a fifth of the time to look for."""

_TOLD_AFTER_SECONDS: Final = 2.0
"""A call that has failed for this long says so: nothing listens there, or the server is down."""


def is_ambiguous(key: str) -> bool:
    """Whether stores disagree on what object a key names."""
    return _USUAL.fullmatch(key) is None and AMBIGUOUS.search(key) is not None


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


def usual(status: int, verb: str, where: str, *, missing: str = "") -> StorageError | None:
    """What a status means of every cloud, as far as it tells. `missing` says what is if it is not an object, with the remedy."""
    if status == 412:
        return PreconditionFailed(f"{where} does not have the etag that {verb} named")
    if status == 404 and missing:
        return StoreNotFound(f"{where}: there is no such {missing}")
    if status == 404:
        return NotFound(f"{where} does not exist")
    if status == 416:
        return CorruptObject(f"{where} is shorter than the range asked for")
    return None


class RemoteStore(Store):
    """A bucket, or a prefix of one, behind a client of the cloud's own; see `azure.py` and `gcs.py`.

    Transient failures (no connection, time-outs, 5xx, throttling, broken bodies) are retried with exponential, jittered waits for
    `retry_seconds`; then `Unavailable` is raised. The clients themselves are told not to try again.

    An etag is of one write: each makes another, also of the same bytes.

    Keys on which servers disagree raise `InvalidKey`: an empty, `.` or `..` segment, a backslash, NUL, half a surrogate pair, and
    what the cloud itself forbids. A listing skips such objects and warns once, but for folder markers (empty, key ends in `/`).
    """

    retry_seconds: float = 90.0
    """For how long a verb goes on trying. Tests shorten it."""

    part_bytes: int
    """Bytes of a part. A larger object that is written in pieces goes up in parts, each of them tried again by itself."""

    @property
    def one_call_below(self) -> int:
        return self.part_bytes

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

    # ---- requests, which each cloud makes in its own way -------------------------------------------------------------------
    @abstractmethod
    def _page(self, prefix: str, after: str, token: str | None) -> tuple[Sequence[ObjectInfo], str | None]:
        """Objects whose names begin so, under their names in the bucket; and what the next ones are asked for by.

        Where the cloud can begin a listing in its middle, those whose names sort before `after` are left out.
        """

    @abstractmethod
    def _get(self, key: str, if_match: str | None, start: int, length: int | None) -> bytes:
        """One GET: what there is of a range that begins in the object. All of an object is verified."""

    @abstractmethod
    def _put(
        self, verb: str, key: str, data: bytes, *, if_match: str | None = None, absent: bool = False
    ) -> ObjectInfo:
        """One PUT, on the condition that the object has an etag, or is absent."""

    @abstractmethod
    def _delete(self, key: str, if_match: str | None) -> None:
        """One DELETE."""

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

    # ---- verbs --------------------------------------------------------------------------------------------------------------
    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        """One request for each page, as they are consumed."""
        if self._refused.search(f"{prefix}x"):
            return  # no key of ours starts like that
        token: str | None = None
        while True:
            start = self._root + after if after else ""
            found, token = self._call("list", None, partial(self._page, self._root + prefix, start, token))
            for info in found:
                key = info.key.removeprefix(self._root)
                if not self._refused.search(key):
                    if key > after:
                        yield replace(info, key=key)
                elif info.size or not info.key.endswith("/"):
                    (passed_over or self._warn_of)(key, "stores disagree about such keys")
            if not token:
                return

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            if start > self._stat_if_match(key, if_match).size:
                raise CorruptObject(f"{self.url}/{key} has no byte {start}")
            return b""
        try:
            data = self._get(key, if_match, start, length)
        except CorruptObject:
            if start and length is None and start == self._stat_if_match(key, if_match).size:
                return b""  # nothing follows the last byte, which HTTP has no range for
            raise
        except PreconditionFailed:
            self.stat(key)  # the clouds answer 412 too where nothing is: raise NotFound then
            raise
        if length is not None and len(data) != length:
            raise CorruptObject(
                f"{self.url}/{key} has {start + len(data)} bytes, not bytes {start} to {start + length}"
            )
        return data

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        return self._put("write", key, data)

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        try:
            return self._put("create", key, data, absent=True)
        except PreconditionFailed as error:
            raise AlreadyExists(f"{self.url}/{key} exists") from error

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        try:
            return self._put("replace", key, data, if_match=if_match)
        except PreconditionFailed:
            self.stat(key)  # as in read
            raise

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        """An etag is of one write, so that `sha256` has nothing to add."""
        try:
            self._delete(key, if_match)
        except PreconditionFailed:
            self.stat(key)  # as in read
            raise

    def _stat_if_match(self, key: str, if_match: str | None) -> ObjectInfo:
        found = self.stat(key)
        if if_match is not None and found.etag != if_match:
            raise PreconditionFailed(f"{self.url}/{key} has etag {found.etag}, not {if_match}")
        return found

"""A place tried whole, in a folder of its own that is removed."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import urlsplit

from pydantic import BaseModel

from tidemill.progress import each
from tidemill.storage.certify.figures import Latency, latencies, rates
from tidemill.storage.certify.hands import Opener, hands_on
from tidemill.storage.certify.promises import PROMISES, Promise
from tidemill.storage.certify.trial import IN_FLIGHT, WHOLE, Broken, Effort, Trial
from tidemill.storage.errors import InvalidURL, NotFound, StorageError, StoreNotFound, Unavailable
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import ObjectInfo, Promises, Store
from tidemill.storage.urls import open_store

logger = logging.getLogger("tidemill.storage")

PREFIX: Final = ".tidemill_check-"
"""Of the folder in which a check writes. It is hidden: no dataset and no inbox reads below it."""
_OLD: Final = timedelta(hours=1)
"""No check takes that long: an older folder was left by one that was killed."""


class Kept(BaseModel):
    """Whether one promise holds."""

    promise: str
    holds: bool
    needed: bool
    """False: a limit that producers or operators can live with."""
    seen: str
    follows: str = ""
    """What follows from it, where it does not hold."""


class Certificate(BaseModel):
    """What a place promises, and how fast it is."""

    url: str
    fit: bool
    """Every promise holds that Tidemill needs."""
    promises: list[Kept]
    latencies: list[Latency]
    in_flight: int = IN_FLIGHT
    per_second: dict[str, float]
    """Calls a second with `in_flight` under way, by verb."""
    bytes_per_second: dict[str, float]
    """Of one large object, by verb."""
    left: list[str] = []
    """URLs of folders that could not be removed, or that another check may still be using."""


def certify(url: str, effort: Effort = WHOLE, stores: Opener = open_store) -> Certificate:
    """Try the place at `url`, which must exist.

    Args:
        url: Of a registry, a dataset or an inbox, or of where one shall be. Nothing that is there is touched.
        effort: How much is done.
        stores: Makes the store of a URL; a function of a module, since other processes call it too.

    Raises:
        InvalidURL: it names no store, or one in this process's memory.
        StoreNotFound: the bucket or folder does not exist.
        PermissionDenied: nothing may be created here.
        StoreFull: there is no room.
        Unavailable: the store has gone away meanwhile. What was written is removed if it can be reached.
    """
    place = stores(url)
    if urlsplit(place.url).scheme == "memory":
        raise InvalidURL(f"{place.url} lives in this process alone: there is nothing to check")
    left = list(_earlier(place, stores))
    own = f"{place.url.rstrip('/')}/{PREFIX}{uuid.uuid4().hex}"
    store = stores(own)
    # Whether the server compares is asked, where `delete` without the promise would compare by itself
    store.promises = Promises(compares_on_delete=True)
    logger.info("everything is written below %s, and removed at the end; if this is killed, remove it", own)
    with _removed(store, left):
        store.create("first", b"")
        with hands_on(own, stores) as hands:
            trial = Trial(store, hands, effort)
            kept = [tried(promise, trial) for promise in each("checking", PROMISES, unit="promises")]
        timed = latencies(trial)
        per_second = rates(trial)
    fit = all(one.holds or not one.needed for one in kept)
    return Certificate(
        url=place.url,
        fit=fit,
        promises=kept,
        latencies=timed,
        per_second=per_second,
        bytes_per_second=trial.bytes_per_second,
        left=left,
    )


def tried(promise: Promise, trial: Trial) -> Kept:
    """Whether one promise holds."""
    follows = ""
    try:
        seen, holds = promise.check(trial), True
    except Unavailable:
        raise
    except (Broken, StorageError) as error:
        seen, holds, follows = str(error), False, promise.follows
    return Kept(promise=promise.words, holds=holds, needed=promise.needed, seen=seen, follows=follows)


# ---- the folder ------------------------------------------------------------------------------------------------------
@contextmanager
def _removed(store: Store, left: list[str]) -> Iterator[None]:
    """Removes all of the store at the end, however that comes; notes its URL in `left`, and says so, if that fails."""
    try:
        yield
    finally:
        try:
            with suppress(StoreNotFound):  # nothing could be written
                remove(store)
        except StorageError as error:
            left.append(store.url)
            logger.warning("%s could not be removed, remove it: %s", store.url, error)


def remove(store: Store) -> None:
    """Remove every object of a store that is a check's own folder, and the folders of a local one.

    Raises:
        StorageError: something is left, and why.
    """

    def delete(info: ObjectInfo) -> None:
        with suppress(NotFound):
            store.delete(info.key, if_match=info.etag)  # a policy may forbid deletes that compare nothing

    for _ in range(3):  # some stores list an object only once another has gone
        infos = [*store.list()]
        if not infos:
            break
        concurrently(delete, infos, IN_FLIGHT)
    else:
        raise StorageError(f"{store.url}: objects that were deleted are still listed")
    if store.url.startswith("file://"):
        shutil.rmtree(_path(store))


def _path(store: Store) -> str:
    return store.url.removeprefix("file://")


def _earlier(place: Store, stores: Opener) -> Iterator[str]:
    """Removes the folders of checks that were killed. Yields the URLs of those that stay."""
    for name, newest in _folders(place).items():
        url = f"{place.url.rstrip('/')}/{name}"
        if datetime.now(UTC) - newest <= _OLD:
            yield url
            logger.warning("%s is of another check: if that is not running any more, remove it", url)
            continue
        try:
            remove(stores(url))
        except StorageError as error:
            yield url
            logger.warning("%s was left by a check that was killed, and could not be removed: %s", url, error)
        else:
            logger.info("%s, left by a check that was killed, is removed", url)


def _folders(place: Store) -> Mapping[str, datetime]:
    """Name of each folder of a check -> when something was last put there."""
    if place.url.startswith("file://"):
        path = _path(place)
        try:
            with os.scandir(path) as entries:
                found = [entry for entry in entries if entry.name.startswith(PREFIX)]
        except FileNotFoundError:
            raise StoreNotFound(f"{place.url}: there is no such folder. Check the URL, or make the folder") from None
        except OSError:
            found = []  # the first object says what is not allowed
        return {entry.name: datetime.fromtimestamp(entry.stat().st_mtime, UTC) for entry in found}
    newest: dict[str, datetime] = {}
    for info in place.list(PREFIX):
        name = info.key.partition("/")[0]
        newest[name] = max(info.last_modified, newest.get(name, info.last_modified))
    return newest

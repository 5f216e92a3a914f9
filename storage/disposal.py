"""What leaves an inbox once a committed version is done with it: deleted, archived or quarantined; and the way back.

Nothing here decides what was consumed: that stands in the version log alone. Every removal names the bytes that were consumed.
"""

import contextlib
import logging
import posixpath
import re
from collections.abc import Callable, Iterable
from typing import Final

from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StoreNotFound,
    on_one_line,
)
from tidemill.storage.inbox import original_key
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Owed, checked, sha256, verified
from tidemill.storage.overlap import PLACES
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import Store, create_or_same
from tidemill.storage.urls import open_store

logger = logging.getLogger("tidemill.storage")

NAME_BYTES: Final = 255
"""The longest name of a file in the usual file systems, and in some stores of objects."""

_QUARANTINED: Final = re.compile(r"\d{8,}-[0-9a-f]{32}")
_told: set[str] = set()
"""Places of debts that were warned of, for the life of this process."""


# ---- what a committed version owes -----------------------------------------------------------------------------------
def dispose(
    log: VersionLog, owed: Iterable[Owed], may_touch: Callable[[str], bool], stores: Callable[[str], Store] = open_store
) -> tuple[Owed, ...]:
    """Copy each owed object where it must go, then delete it, if it is still the one that was consumed.

    Only for debts of a committed version. Safe to repeat and to run twice at once: gone means done, other bytes mean new
    data, which stays.

    Args:
        log: Of the version that owes.
        owed: Its debts, or some of them.
        may_touch: Whether the place at a URL is one of the run's. A manifest alone must not decide where a run deletes.
        stores: Opens the places.

    Returns:
        What could not be disposed of now, to be carried on by the next version: what is still there in another place, what
        was denied, and what is of an inbox that is gone as a whole.
    """
    debts, others = list[Owed](), list[Owed]()
    for debt in owed:
        (debts if _is_of(log, debt, may_touch) else others).append(debt)
    elsewhere = _left_elsewhere(others, stores)
    for place in sorted({_place(debt) for debt in elsewhere} - _told):
        _told.add(place)
        logger.warning(
            "the head of %s owes the removal of objects in %s, which is no place of this run: nothing is done there, and the "
            "debt is carried on. Run with that inbox and archive, or name them in %s",
            *(log.url, on_one_line(place), PLACES),
        )
    inboxes = {url: stores(url) for url in {debt.inbox: None for debt in debts}}

    def is_paid(debt: Owed) -> bool:
        inbox = inboxes[debt.inbox]
        try:
            if debt.action == "delete" or _copied(log, inbox, debt, stores):
                inbox.delete(debt.key, if_match=debt.etag, sha256=debt.sha256)
        except (NotFound, PreconditionFailed):
            return True
        except (PermissionDenied, InvalidKey, StoreNotFound, CorruptObject) as error:
            logger.warning(
                "%s/%s stays in the inbox, and is remembered as consumed: %s of it failed: %s",
                *(debt.inbox, on_one_line(debt.key), debt.action, error),
            )
            return False
        return True

    # In turn where the copies go under one key, as of a shard and its labels: the first of them gets the plain name.
    same_place: dict[tuple[str | None, str], list[Owed]] = {}
    for debt in debts:
        same_place.setdefault((debt.destination, debt.key), []).append(debt)
    workers = max((inbox.concurrency for inbox in inboxes.values()), default=1)
    left = concurrently(lambda some: [debt for debt in some if not is_paid(debt)], same_place.values(), workers)
    return (*elsewhere, *(debt for some in left for debt in some))


def _is_of(log: VersionLog, debt: Owed, may_touch: Callable[[str], bool]) -> bool:
    """Whether a debt is in the run's places alone."""
    if debt.action == "quarantine":
        prefix, _, name = (debt.destination or "").rpartition("/")
        fits = prefix == f"{log.model}/quarantine" and _QUARANTINED.fullmatch(name) is not None
    else:
        fits = debt.action == "delete" or (debt.destination is not None and may_touch(debt.destination))
    return fits and may_touch(debt.inbox)


def _left_elsewhere(others: Iterable[Owed], stores: Callable[[str], Store]) -> list[Owed]:
    """Those debts of other places whose objects are still there. Their run may have paid since: nothing records that.

    This only looks: nothing is changed there. What cannot be looked at may still be there.
    """
    opened: dict[str, Store | None] = {}
    waiting = list(others)
    for url in {debt.inbox: None for debt in waiting}:
        try:
            opened[url] = stores(url)
        except StorageError:
            opened[url] = None

    def is_left(debt: Owed) -> bool:
        if (inbox := opened[debt.inbox]) is None:
            return True
        try:
            return inbox.stat(debt.key).etag == debt.etag
        except NotFound:
            return False
        except StorageError:
            return True

    workers = max((inbox.concurrency for inbox in opened.values() if inbox is not None), default=1)
    left = concurrently(is_left, waiting, workers)
    return [debt for debt, still in zip(waiting, left, strict=True) if still]


def _place(debt: Owed) -> str:
    """What a debt is about, in words."""
    return debt.inbox if debt.action == "delete" else f"{debt.inbox} ({debt.action} to {debt.destination})"


def _copied(log: VersionLog, inbox: Store, debt: Owed, stores: Callable[[str], Store]) -> bool:
    """Copy to the archive or to quarantine; False if the object is no longer there to copy."""
    assert debt.destination is not None
    try:
        data, mode = inbox.read(debt.key, if_match=debt.etag), inbox.mode(debt.key)
    except (NotFound, PreconditionFailed):
        return False
    if sha256(data) != debt.sha256:  # corrupted on the way, now or when it was consumed: keep the original
        raise CorruptObject("its bytes are not those that were consumed, though its etag is the same")
    if debt.action == "quarantine":
        reason = debt.model_dump(mode="json", include={"inbox", "key", "sha256", "etag", "reason"})
        log.store.write(debt.destination, data, mode=mode)
        log.store.write(f"{debt.destination}.json", checked(reason), mode=mode)
        return True
    archive = stores(debt.destination)
    for key in archive_keys(debt.key, debt.sha256):
        try:
            if create_or_same(archive, key, data, mode=mode):
                return True
        except NotFound:  # other bytes were there, and went before they were compared
            continue
        except StoreNotFound as error:  # not to be taken for a lost inbox
            raise StorageError(f"the archive cannot be written: {error}") from error
    raise StorageError(
        f"{debt.destination} holds other bytes under both names of {debt.key}; move them away and run again."
    )


def archive_keys(key: str, digest: str) -> tuple[str, str]:
    """Where an archive holds a shard: under its own key, or under the second name if other bytes were there before."""
    return key, second_name(key, digest[:16])


def second_name(key: str, mark: str) -> str:
    """The key with a mark before its ending; in a folder called by the mark if the name has no room for it."""
    folder, slash, name = key.rpartition("/")
    stem, suffix = posixpath.splitext(name)
    marked = f"{stem}.{mark}{suffix}"
    if len(marked.encode(errors="surrogatepass")) > NAME_BYTES:
        marked = f"{mark}/{name}"
    return f"{folder}{slash}{marked}"


# ---- quarantine ------------------------------------------------------------------------------------------------------
def quarantine_key(model: str, version: int, shard_sha256: str, key: str) -> str:
    """Where version `version` sends a rejected shard. The shard's own key stands in the reason beside it: it may be hostile."""
    identity = sha256(f"{shard_sha256} {key}".encode(errors="surrogatepass"))  # two keys may hold the same bytes
    return f"{model}/quarantine/{version:08d}-{identity[:32]}"


def quarantined(log: VersionLog) -> dict[str, dict[str, str]]:
    """Name in quarantine -> {inbox, key, sha256, etag, reason} of every rejected shard that is kept there."""
    prefix = f"{log.model}/quarantine/"
    names = sorted(i.key.removeprefix(prefix) for i in log.store.list(prefix) if i.key.endswith(".json"))
    kept = {}
    for name in names:
        with contextlib.suppress(NotFound):  # sent back since it was listed
            kept[name.removesuffix(".json")] = reason_of(log, prefix + name)
    return kept


def reason_of(log: VersionLog, key: str) -> dict[str, str]:
    """What stands beside a quarantined shard."""
    data = log.store.read(key)
    try:
        reason: dict[str, str] = verified(data)
        if {type(reason[name]) for name in ("inbox", "key", "sha256", "reason")} != {str}:
            raise TypeError("a field is no string")
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptObject(
            f"{log.store.url}/{key} is no reason of a rejection: {error!r}. Restore or delete it."
        ) from error
    return reason


def requeue(
    log: VersionLog, name: str, may_touch: Callable[[str], bool], stores: Callable[[str], Store] = open_store
) -> str:
    """Send a quarantined shard back to its inbox, under a new key, and return that key.

    A new key, because a run that slept since the rejection may still delete the old one. It follows from the name in
    quarantine, so that doing it twice (after a crash) finds the first copy or its tombstone.

    Args:
        log: Of the model whose quarantine it is.
        name: In quarantine.
        may_touch: Whether the place at a URL is one that the caller allows. A record in quarantine alone must not decide where
            a file is written.
        stores: Opens the places.

    Raises:
        PermissionDenied: its inbox is none of the allowed places.
        NotFound: nothing of that name is in quarantine.
        CorruptObject: its bytes are not those that were rejected.
        AlreadyExists: its new key is taken by other bytes. It stays in quarantine.
    """
    key = f"{log.model}/quarantine/{name}"
    try:
        if not _QUARANTINED.fullmatch(name):
            raise NotFound(name)
        reason = reason_of(log, f"{key}.json")
    except NotFound:
        known = ", ".join(quarantined(log)) or "it is empty"
        raise NotFound(f"{log.url}/quarantine holds no {name!r}; there is: {known}.") from None
    if not may_touch(reason["inbox"]):
        raise PermissionDenied(
            f"{log.url}/quarantine/{name} says that it came from {reason['inbox']}. A registry alone does not decide where files "
            f"are written: if that is right, give --inbox {reason['inbox']}, or name it in {PLACES}."
        )
    # Without the mark of an earlier time: a name that grew each time would end as one that no store takes.
    back = second_name(original_key(reason["key"]), f"requeued-{name}")
    try:
        data, mode = log.store.read(key), log.store.mode(key)
    except NotFound:  # a requeue that crashed had sent it back already
        _delete(log.store, f"{key}.json")
        return back
    if sha256(data) != reason["sha256"]:
        raise CorruptObject(f"{log.url}/quarantine/{name} is not the object that was rejected: its sha256 differs.")
    inbox = stores(reason["inbox"])
    with contextlib.suppress(NotFound):  # it had been sent back before, and was consumed in this moment
        if not create_or_same(inbox, back, data, mode=mode):
            raise AlreadyExists(f"{inbox.url}/{back} holds other bytes; move them away. The shard stays in quarantine.")
    _delete(log.store, key)
    _delete(log.store, f"{key}.json")
    return back


def _delete(store: Store, key: str) -> None:
    with contextlib.suppress(NotFound):  # another requeue was faster
        store.delete(key)

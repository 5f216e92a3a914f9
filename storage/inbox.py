"""The inbox: a prefix where producers drop shards. Each is read once, and leaves when a committed version is done with it.

Nothing here decides what was consumed: that stands in the version log alone. The inbox lists, reads what it listed and
nothing else (pinned by etag), and carries out what a committed version owes.
"""

import contextlib
import heapq
import logging
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    ShardRejected,
    StorageError,
    StoreNotFound,
    Unavailable,
    on_one_line,
)
from tidemill.storage.lakehouse import refuse_parts_of_tables, refuse_tables
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Owed, Rejected, checked, sha256, verified
from tidemill.storage.parallel import concurrently
from tidemill.storage.partitions import is_hidden
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store

if TYPE_CHECKING:
    from tidemill.storage.parquet import RowGroup

logger = logging.getLogger("tidemill.storage")

UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".inprogress", ".crdownload", ".crc")
"""Endings by which writers mark a file that is not whole yet, or is not data. Names that start with `.` or `_` are hidden too."""

_REQUEUED = re.compile(r"\.requeued-\d{8}-[0-9a-f]{32}")


@dataclass(frozen=True)
class Listing:
    """What an inbox held at one moment."""

    shards: list[ObjectInfo]
    """The oldest unknown ones, by (last modified, key), up to the limit that was asked for."""
    known: list[ObjectInfo]
    """Already consumed, yet still (or again) there."""
    waiting: int
    """How many unknown shards there are in all."""
    oldest: datetime | None
    """When the oldest of them was written."""


@dataclass(frozen=True)
class Shard:
    """One shard, read whole. Its identity is (inbox, key, sha256); the etag only pins reads and deletes."""

    inbox: str
    info: ObjectInfo
    data: bytes
    sha256: str

    def row_groups(self) -> "list[RowGroup]":
        """Its row groups, which decode from memory.

        Raises:
            NotReady: no Parquet magic at both ends.
            ShardRejected: a footer that does not parse, or no rows.
        """
        from tidemill.storage.parquet import ParquetFile, row_groups  # here, because listing an inbox needs no pyarrow

        def fetch(start: int, length: int) -> bytes:
            if start < 0 or start + length > len(self.data):
                raise ShardRejected(f"{self.info.key}: its footer points outside of the file; it is corrupt.")
            return self.data[start : start + length]

        groups = row_groups(ParquetFile(self.info.key, len(self.data), fetch, ShardRejected))
        if not groups:
            raise ShardRejected(f"{self.info.key} holds no rows.")
        return groups

    def rejected(self, reason: str) -> Rejected:
        return Rejected(
            inbox=self.inbox,
            key=self.info.key,
            sha256=self.sha256,
            etag=self.info.etag,
            size=self.info.size,
            last_modified=self.info.last_modified,
            reason=reason,
        )


class Inbox:
    """The shards below one URL."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._is_part_of_no_table = False

    @property
    def url(self) -> str:
        return self.store.url

    def list(
        self,
        limit: int,
        known: Callable[[ObjectInfo], bool],
        complete: Callable[[ObjectInfo], bool] = lambda info: True,
    ) -> Listing:
        """List the whole inbox, keeping only `limit` candidates in memory. A cursor would miss late, lower keys.

        What is not `complete` waits, and is no candidate.

        Raises:
            StoreNotFound: no such folder or bucket.
            UnsupportedTable: the inbox is, holds or is a part of a table of Delta Lake, Iceberg or Hudi.
        """
        if not self._is_part_of_no_table:
            refuse_parts_of_tables(self.url, open_store)
            self._is_part_of_no_table = True
        seen: list[ObjectInfo] = []
        waiting, oldest = 0, None

        def unknown() -> Iterable[ObjectInfo]:
            nonlocal waiting, oldest
            for info in refuse_tables(self.url, self.store.list()):
                if not is_shard(info.key):
                    continue
                if known(info):
                    if len(seen) < limit:
                        seen.append(info)
                    continue
                waiting += 1
                oldest = info.last_modified if oldest is None else min(oldest, info.last_modified)
                if complete(info):
                    yield info

        # At least one: for none, `nsmallest` would not even count what is there.
        shards = heapq.nsmallest(max(limit, 1), unknown(), key=lambda info: (info.last_modified, info.key))
        return Listing(shards[:limit], seen, waiting, oldest)

    def read(self, info: ObjectInfo) -> Shard | None:
        """The whole shard as it was listed, or None if it went or changed since: a later listing decides.

        Raises:
            Unavailable: another number of bytes came than was listed.
        """
        try:
            data = self.store.read(info.key, if_match=info.etag)
        except (NotFound, PreconditionFailed):
            return None
        if len(data) != info.size:
            raise Unavailable(f"{self.url}/{info.key}: {len(data)} bytes came of {info.size}; try again.")
        return Shard(self.url, info, data, sha256(data))

    def count_rows(self, info: ObjectInfo) -> int:
        """How many rows a shard has, by its footer alone.

        Raises:
            NotFound, PreconditionFailed: it went or changed since it was listed.
            NotReady: no Parquet magic at both ends.
            ShardRejected: a footer that does not parse.
        """
        from tidemill.storage.parquet import ParquetFile

        def fetch(start: int, length: int) -> bytes:
            return self.store.read(info.key, if_match=info.etag, start=start, length=length)

        return sum(ParquetFile(info.key, info.size, fetch, ShardRejected).group_rows)

    def is_stable(self, info: ObjectInfo, grace_seconds: float) -> bool:
        """True if the object has not been written to for the grace period, so that its writer must have given up."""
        return (datetime.now(UTC) - info.last_modified).total_seconds() >= grace_seconds


def open_inbox(url: str) -> Inbox:
    """The inbox at this URL."""
    return Inbox(open_store(url))


def original_key(key: str) -> str:
    """The key that a shard had before it was ever sent back from quarantine."""
    return _REQUEUED.sub("", key)


def is_shard(key: str) -> bool:
    """False for hidden and unfinished names, and for the markers that some tools leave for folders."""
    if key.endswith("/") or key.lower().endswith(UNFINISHED):
        return False
    return not is_hidden(key)


# ---- what a committed version owes -----------------------------------------------------------------------------------
def settle(log: VersionLog, owed: Iterable[Owed], stores: Callable[[str], Store] = open_store) -> tuple[Owed, ...]:
    """Copy each owed object where it must go, then delete it, if it is still the one that was consumed.

    Only for debts of a committed version. Safe to repeat and to run twice at once: gone means done, another etag means new
    data, which stays. Returns what could not be settled now (not allowed, or its inbox as a whole is gone), to be carried
    by the next version.
    """
    debts = list(owed)
    inboxes = {url: stores(url) for url in {debt.inbox: None for debt in debts}}

    def is_settled(debt: Owed) -> bool:
        inbox = inboxes[debt.inbox]
        try:
            if debt.then == "delete" or _copied(log, inbox, debt, stores):
                inbox.delete(debt.key, if_match=debt.etag, sha256=debt.sha256)
        except (NotFound, PreconditionFailed):
            return True
        except (PermissionDenied, InvalidKey, StoreNotFound, CorruptObject) as error:
            logger.warning(
                "%s/%s stays in the inbox, and is remembered as consumed: %s of it failed: %s",
                *(debt.inbox, on_one_line(debt.key), debt.then, error),
            )
            return False
        return True

    # In turn where the copies go under one key, as of a shard and its labels: the first of them gets the plain name.
    same_place: dict[tuple[str | None, str], list[Owed]] = {}
    for debt in debts:
        same_place.setdefault((debt.to, debt.key), []).append(debt)
    workers = max((inbox.concurrency for inbox in inboxes.values()), default=1)
    left = concurrently(lambda some: [debt for debt in some if not is_settled(debt)], same_place.values(), workers)
    return tuple(debt for some in left for debt in some)


def _copied(log: VersionLog, inbox: Store, debt: Owed, stores: Callable[[str], Store]) -> bool:
    """Copy to the archive or to quarantine; False if the object is no longer there to copy."""
    assert debt.to is not None
    try:
        data = inbox.read(debt.key, if_match=debt.etag)
    except (NotFound, PreconditionFailed):
        return False
    if sha256(data) != debt.sha256:  # corrupted on the way, now or when it was consumed: keep the original
        raise CorruptObject("its bytes are not those that were consumed, though its etag is the same")
    if debt.then == "quarantine":
        reason = debt.model_dump(mode="json", include={"inbox", "key", "sha256", "etag", "reason"})
        log.store.write(debt.to, data)
        log.store.write(f"{debt.to}.json", checked(reason))
        return True
    archive = stores(debt.to)
    for key in archive_keys(debt.key, debt.sha256):
        try:
            archive.create(key, data)
        except AlreadyExists:
            if not _holds(archive, key, debt.sha256):
                continue
        except StoreNotFound as error:  # not to be taken for a lost inbox
            raise StorageError(f"the archive cannot be written: {error}") from error
        return True
    raise StorageError(f"{debt.to} holds other bytes under both names of {debt.key}; move them away and run again.")


def archive_keys(key: str, digest: str) -> tuple[str, str]:
    """Where an archive holds a shard: under its own key, or under the second name if other bytes were there before."""
    stem, suffix = posixpath.splitext(key)
    return key, f"{stem}.{digest[:16]}{suffix}"


def _holds(store: Store, key: str, digest: str) -> bool:
    """True if exactly these bytes are at `key`."""
    try:
        return sha256(store.read(key)) == digest
    except NotFound:
        return False


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
            kept[name.removesuffix(".json")] = _reason(log, prefix + name)
    return kept


def _reason(log: VersionLog, key: str) -> dict[str, str]:
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


def requeue(log: VersionLog, name: str, stores: Callable[[str], Store] = open_store) -> str:
    """Send a quarantined shard back to its inbox, under a new key, and return that key.

    A new key, because a run that slept since the rejection may still delete the old one. It follows from the name in
    quarantine, so that doing it twice (after a crash) finds the first copy or its tombstone.

    Raises:
        NotFound: nothing of that name is in quarantine.
        CorruptObject: its bytes are not those that were rejected.
        AlreadyExists: its new key is taken by other bytes. It stays in quarantine.
    """
    key = f"{log.model}/quarantine/{name}"
    try:
        reason = _reason(log, f"{key}.json")
    except NotFound:
        known = ", ".join(quarantined(log)) or "it is empty"
        raise NotFound(f"{log.url}/quarantine holds no {name!r}; there is: {known}.") from None
    # Without the mark of an earlier time: a name that grew each time would end as one that no store takes.
    stem, suffix = posixpath.splitext(original_key(reason["key"]))
    back = f"{stem}.requeued-{name}{suffix}"
    try:
        data = log.store.read(key)
    except NotFound:  # a requeue that crashed had sent it back already
        _delete(log.store, f"{key}.json")
        return back
    if sha256(data) != reason["sha256"]:
        raise CorruptObject(f"{log.url}/quarantine/{name} is not the object that was rejected: its sha256 differs.")
    inbox = stores(reason["inbox"])
    try:
        inbox.create(back, data)
    except AlreadyExists:
        with contextlib.suppress(NotFound):  # consumed in this moment
            if sha256(inbox.read(back)) != reason["sha256"]:
                raise
        logger.info("%s/%s had been sent back before", inbox.url, on_one_line(back))
    _delete(log.store, key)
    _delete(log.store, f"{key}.json")
    return back


def _delete(store: Store, key: str) -> None:
    with contextlib.suppress(NotFound):  # another requeue was faster
        store.delete(key)

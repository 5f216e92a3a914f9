"""The inbox: a prefix where producers drop shards. Each is read once, and leaves when a committed version is done with it.

Nothing here decides what was consumed: that stands in the version log alone. The inbox lists, reads what it listed and
nothing else (pinned by etag), and carries out what a committed version owes.
"""

import heapq
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from tidemill.storage.errors import (
    InvalidURL,
    NotFound,
    PreconditionFailed,
    ShardRejected,
    StoreNotFound,
    Unavailable,
)
from tidemill.storage.lakehouse import refuse_parts_of_tables, refuse_tables
from tidemill.storage.manifest import Rejected, ShardRef, sha256
from tidemill.storage.partitions import is_hidden
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import looks_like_a_pattern, open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from tidemill.storage.parquet import RowGroup

logger = logging.getLogger("tidemill.storage")

UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".inprogress", ".crdownload", ".crc")
"""Endings by which writers mark a file that is not whole yet, or is not data. Names that start with `.` or `_` are hidden too."""

NAMED: Final = 1000
"""How many of the entries that it passes over a listing names."""

_REQUEUED: Final = re.compile(r"\.requeued-\d{8,}-[0-9a-f]{32}|(?<![^/])requeued-\d{8,}-[0-9a-f]{32}/")
"""A mark in the name; or a folder, where the name has no room for a mark (`tidemill.storage.disposal.second_name`)."""
_OF_A_FILE: Final = (".parquet", ".parq", ".pq")


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
    passed_over: dict[str, str] = field(default_factory=dict)
    """Entries that can be no shards though they are not hidden (links that lead out, pipes, folders that may not be listed, keys
    on which stores disagree): their keys, and why. At most `NAMED` of them."""


@dataclass(frozen=True)
class Shard:
    """One shard, read whole. Its identity is (inbox, key, sha256); the etag only pins reads and deletes."""

    inbox: str
    info: ObjectInfo
    data: bytes
    sha256: str

    def row_groups(self, types: "Mapping[str, pa.DataType] | None" = None) -> "list[RowGroup]":
        """Its row groups, which decode from memory. `name=value` folders of its key are columns, as in a dataset.

        Args:
            types: Types of such columns, as the model knows them. Of others, the value decides.

        Raises:
            NotReady: no Parquet magic at both ends.
            ShardRejected: a footer that does not parse, no rows, or a folder whose value is none of its column's type.
        """
        from tidemill.storage.parquet import ParquetFile, row_groups  # here, because listing an inbox needs no pyarrow

        def fetch(start: int, length: int) -> bytes:
            if start < 0 or start + length > len(self.data):
                raise ShardRejected(f"{self.info.key}: its footer points outside of the file; it is corrupt.")
            return self.data[start : start + length]

        groups = row_groups(ParquetFile(self.info.key, len(self.data), fetch, ShardRejected, types, whole=self.data))
        if not groups:
            raise ShardRejected(f"{self.info.key} holds no rows.")
        return groups

    @property
    def ref(self) -> ShardRef:
        """How manifests name it."""
        return ShardRef(
            inbox=self.inbox,
            key=self.info.key,
            sha256=self.sha256,
            etag=self.info.etag,
            size=self.info.size,
            last_modified=self.info.last_modified,
        )

    def rejected(self, reason: str) -> Rejected:
        return Rejected(**dict(self.ref), reason=reason)


class Inbox:
    """The shards below one URL."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._is_part_of_no_table = False

    @property
    def url(self) -> str:
        return self.store.url

    def refuse_no_folder(self) -> None:
        """An inbox is a folder. Where a store has no folders, nothing would ever be found below what is none.

        Raises:
            InvalidURL: nothing is there, and the URL is a pattern or has the name of a file.
        """
        pattern = looks_like_a_pattern(self.url)
        if not pattern and not self.url.lower().endswith(_OF_A_FILE):
            return
        try:
            there = next(iter(self.store.list(passed_over=lambda *_: None)), None) is not None
        except StoreNotFound:
            there = False
        else:
            there = there or self.url.startswith("file:")  # an empty folder of this name
        if not there:
            what = (
                "is a pattern, which is not expanded" if pattern else "has the name of a file, and nothing is below it"
            )
            raise InvalidURL(f"{self.url} {what}. Name the folder: all shards below it are read, at any depth.")

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
        passed_over: dict[str, str] = {}
        waiting, oldest = 0, None

        def pass_over(key: str, reason: str) -> None:
            if is_shard(key.removesuffix("/")) and len(passed_over) < NAMED:
                passed_over[key] = reason

        def unknown() -> Iterable[ObjectInfo]:
            nonlocal waiting, oldest
            for info in refuse_tables(self.url, self.store.list(passed_over=pass_over, inside=True)):
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
        return Listing(shards[:limit], seen, waiting, oldest, passed_over)

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
    """The inbox at this URL.

    Raises:
        InvalidURL: it is no store's URL, or none of a folder; see `Inbox.refuse_no_folder`.
    """
    inbox = Inbox(open_store(url))
    inbox.refuse_no_folder()
    return inbox


def original_key(key: str) -> str:
    """The key that a shard had before it was ever sent back from quarantine."""
    return _REQUEUED.sub("", key)


def is_shard(key: str) -> bool:
    """False for hidden and unfinished names, and for the markers that some tools leave for folders."""
    if key.endswith("/") or key.lower().endswith(UNFINISHED):
        return False
    return not is_hidden(key)

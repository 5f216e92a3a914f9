"""What a run has read of shards that wait for each other, features for their labels and labels for their features.

It saves reading them again at each look, and decides nothing: what is here follows from the bytes of objects that are there.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar

import pyarrow as pa

from tidemill.storage.errors import NotReady, ShardRejected
from tidemill.storage.inbox import Inbox, Shard
from tidemill.storage.manifest import ShardRef
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.latest import LabelRows, keys_of
from tidemill.tasks.online.matching import Match, matches
from tidemill.tasks.online.reading import AHEAD_BYTES, Later, fetched, may_be_the_shards, unfinished
from tidemill.tasks.training.errors import ColumnError, described
from tidemill.tasks.training.features import Features

KEYS_BYTES: Final = 256 * 2**20
"""Keys in memory of features that wait have no more bytes than this together: younger shards have their turn later."""
LABELS_BYTES: Final = 256 * 2**20
"""The same of labels with their keys."""
READ_AGAIN_SECONDS: Final = 60.0
"""How often it is tried to read what could not be read."""

Known = tuple[str, str]
"""Key and etag of an object of an inbox."""


@dataclass(frozen=True)
class Keys:
    """Of a shard of features that waits."""

    ref: ShardRef
    keys_N: pa.Array[Any] | None
    """The key of each row, as bytes. None: they cannot be read, and never can: who reads the shard in its turn finds out why."""

    @property
    def nbytes(self) -> int:
        return 0 if self.keys_N is None else self.keys_N.nbytes


@dataclass(frozen=True)
class Came:
    """A shard of labels that came."""

    ref: ShardRef
    rows: LabelRows | None
    reason: str = ""
    """Why it can never be used, where there are no rows."""

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes


@dataclass(frozen=True)
class Reach:
    """What is not known: the times of what was listed and not read, and the time from which on not even all is listed."""

    unread: tuple[datetime, ...] = ()
    beyond: datetime | None = None
    """What was written at this time or later may not have been looked at."""

    def has_all(self, moment: datetime, wait: timedelta) -> bool:
        """Whether all was read that was written within `wait` of a moment."""
        if self.beyond is not None and moment + wait >= self.beyond:
            return False
        return all(abs(other - moment) > wait for other in self.unread)


T = TypeVar("T", Keys, Came)


@dataclass
class Ledger:
    """Keys of features and rows of labels, by the key and the etag of their objects."""

    _features: dict[Known, Keys] = field(default_factory=dict)
    _labels: dict[Known, Came] = field(default_factory=dict)
    _denied: dict[Known, tuple[float, str]] = field(default_factory=dict)
    """What could not be read: when that was found (`time.monotonic`), and why."""
    _matched: tuple[tuple[Any, ...], list[Match]] | None = None
    """The last answer of `matches`, and what it is about: an idle run looks again and again."""

    def features(
        self,
        inbox: Inbox,
        listed: Sequence[ObjectInfo],
        reach: Reach,
        key: str,
        features: Features,
        grace_seconds: float,
    ) -> tuple[list[Keys], Reach]:
        """The keys of shards of features, in the order of the listing, up to `KEYS_BYTES`; and what is not known.

        Args:
            inbox: Where they were listed.
            listed: All of them, oldest first.
            reach: What the listing has left out.
            key: Their column.
            features: What training needs of a shard.
            grace_seconds: What is no whole Parquet file is unusable once it has not changed for this long.

        Raises:
            Unavailable, StoreNotFound: the store as a whole cannot be read.
        """

        def keys(shard: Shard) -> Keys:
            return Keys(shard.ref, keys_of(shard.row_groups(features.types), key))

        def unusable(ref: ShardRef, why: Exception) -> Keys:
            return Keys(ref, None)

        read = partial(_read, inbox, grace_seconds, keys, unusable)
        return self._held(self._features, read, inbox, listed, reach, KEYS_BYTES)

    def labels(
        self,
        inbox: Inbox,
        listed: Sequence[ObjectInfo],
        reach: Reach,
        key: str,
        features: Features,
        grace_seconds: float,
    ) -> tuple[list[Came], Reach]:
        """The rows of shards of labels; otherwise as `features`."""

        def came(shard: Shard) -> Came:
            where = f"{inbox.url}/{shard.ref.key}"
            rows = LabelRows(shard.row_groups(features.types), key, features.targets)
            features.check_targets(rows.table.schema, where)
            features.target(rows.table, where)
            return Came(shard.ref, rows)

        def unusable(ref: ShardRef, why: Exception) -> Came | Later:
            if isinstance(why, NotReady | ShardRejected | ColumnError):
                return Came(ref, None, str(why))
            return Later(described(why))  # nobody has thought of it: a person decides

        read = partial(_read, inbox, grace_seconds, came, unusable)
        return self._held(self._labels, read, inbox, listed, reach, LABELS_BYTES)

    def matches(self, waits: Sequence[Keys], labels: Sequence[Came], wait: timedelta) -> list[Match]:
        """How shards of features, whose keys are known, and shards of labels belong together; found anew where any differs."""
        found = [(each.ref.last_modified, each.keys_N) for each in waits if each.keys_N is not None]
        came = [(each.ref.last_modified, each.rows.keys_L) for each in labels if each.rows is not None]
        which = (*(_of(each.ref) for each in waits), None, *(_of(each.ref) for each in labels), wait)
        if self._matched is None or self._matched[0] != which:
            self._matched = which, matches(found, came, wait)
        return self._matched[1]

    def _held(
        self,
        held: dict[Known, T],
        read: Callable[[ObjectInfo], T | Later],
        inbox: Inbox,
        listed: Sequence[ObjectInfo],
        reach: Reach,
        most: int,
    ) -> tuple[list[T], Reach]:
        present = {_known(info) for info in listed}
        for gone in held.keys() - present:
            del held[gone]
        found, unread, size, seen = list[T](), list(reach.unread), 0, 0
        for chunk in _chunks(listed):
            new = [info for info in chunk if _known(info) not in held and not self._is_denied(inbox, info)]
            for info, what in zip(new, concurrently(read, new, inbox.store.concurrency), strict=True):
                if not isinstance(what, Later):
                    held[_known(info)] = what
                elif what.reason is not None:
                    self._denied[inbox.url, info.key] = time.monotonic(), what.reason
            there = [held.get(_known(info)) for info in chunk]
            found += [each for each in there if each is not None]
            unread += [info.last_modified for info, each in zip(chunk, there, strict=True) if each is None]
            size += sum(each.nbytes for each in there if each is not None)
            seen += len(chunk)
            if size > most and seen < len(listed):
                for info in listed[seen:]:
                    held.pop(_known(info), None)
                return found, Reach(tuple(unread), listed[seen].last_modified)
        return found, Reach(tuple(unread), reach.beyond)

    def _is_denied(self, inbox: Inbox, info: ObjectInfo) -> bool:
        when, _ = self._denied.get((inbox.url, info.key), (None, ""))
        return when is not None and time.monotonic() - when < READ_AGAIN_SECONDS

    def denied(self, inbox: Inbox) -> dict[str, str]:
        """Key -> reason of what could not be read lately."""
        now = time.monotonic()
        self._denied = {known: about for known, about in self._denied.items() if now - about[0] < READ_AGAIN_SECONDS}
        return {key: why for (url, key), (_, why) in self._denied.items() if url == inbox.url}


def _read(
    inbox: Inbox,
    grace_seconds: float,
    use: Callable[[Shard], T],
    unusable: Callable[[ShardRef, Exception], T | Later],
    info: ObjectInfo,
) -> T | Later:
    """What `use` makes of a shard; where that can never be, what `unusable` makes of the reason."""
    shard = fetched(inbox, info)
    if isinstance(shard, Later):
        return shard
    try:
        return use(shard)
    except NotReady as unready:
        found = unfinished(inbox, shard, unready, grace_seconds)
        return found if isinstance(found, Later) else unusable(shard.ref, unready)
    except Exception as error:
        if not may_be_the_shards(error):
            raise
        return unusable(shard.ref, error)


def _of(ref: ShardRef) -> tuple[str, str, datetime]:
    return ref.key, ref.etag, ref.last_modified


def _known(info: ObjectInfo) -> Known:
    return info.key, info.etag


def _chunks(listed: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    """Neighbours that are read at once: of at most `AHEAD_BYTES` together, or one."""
    chunk, size = list[ObjectInfo](), 0
    for info in listed:
        if chunk and size + info.size > AHEAD_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(info)
        size += info.size
    if chunk:
        yield chunk

"""What is in quarantine, at a glance: how much, and the newest of it with the reasons."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from typing import Final

from pydantic import BaseModel

from tidemill.storage.disposal import reason_of
from tidemill.storage.errors import CorruptObject, NotFound
from tidemill.storage.log import VersionLog
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import ObjectInfo

NEWEST: Final = 5
"""So many rejected shards are named with their reasons."""
MANY: Final = 2000
"""Objects that are listed one after the other. Of more, several parts are listed at once: a store takes as long for a page as
it takes to read it."""


class RejectedShard(BaseModel):
    """A shard in quarantine."""

    name: str
    """As `tidemill requeue` takes it."""
    version: int
    """The version that rejected it."""
    rejected: datetime
    inbox: str
    key: str
    reason: str


@dataclass(frozen=True)
class Quarantine:
    """What a model has in quarantine."""

    kept: int
    """Shards."""
    newest: list[RejectedShard]
    """The newest of them first; at most `NEWEST`."""
    lately: int
    """How many of them came since the moment that was asked about."""


@dataclass(frozen=True)
class _Counted:
    """The same of some objects there."""

    kept: int
    newest: list[ObjectInfo]
    lately: int


def rejected(log: VersionLog, head: int, since: datetime) -> Quarantine:
    """Counts by listings, and reads the newest reasons alone.

    Args:
        log: Of the model.
        head: Number of its head.
        since: A shard that was rejected after this came lately.
    """
    prefix = f"{log.model}/quarantine/"
    listing = log.store.list(prefix)
    few = list(islice(listing, MANY))
    shares = [""] if len(few) < MANY else _shares(head, log.store.concurrency)
    if len(shares) == 1:
        found = [_counted(chain(few, listing), since)]
    else:

        def share(number: int) -> _Counted:
            if number < len(shares):
                return _counted(log.store.list(f"{prefix}{shares[number]}"), since)
            return _counted(
                log.store.list(prefix, after=f"{prefix}{shares[-1]}~"), since
            )  # of versions since, or foreign

        found = concurrently(share, range(len(shares) + 1), log.store.concurrency)
    newest = _newest(chain.from_iterable(some.newest for some in found))
    read = concurrently(lambda info: _rejected(log, prefix, info), newest, log.store.concurrency)
    kept, lately = sum(some.kept for some in found), sum(some.lately for some in found)
    return Quarantine(kept, [shard for shard in read if shard is not None], lately)


def _shares(head: int, most: int) -> list[str]:
    """What the names in quarantine begin with, up to those of version `head`: at most `most` beginnings, in order."""
    if head >= 10**8:  # names are longer from there on
        return [""]
    free = next(digits for digits in range(9) if head // 10**digits < most)
    return [f"{first:0{8 - free}d}" if free < 8 else "" for first in range(head // 10**free + 1)]


def _counted(objects: Iterable[ObjectInfo], since: datetime) -> _Counted:
    kept = lately = 0

    def reasons() -> Iterator[ObjectInfo]:
        nonlocal kept, lately
        for info in objects:
            if info.key.endswith(".json"):
                kept += 1
                lately += info.last_modified > since
                yield info

    newest = _newest(reasons())
    return _Counted(kept, newest, lately)


def _newest(reasons: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    return heapq.nlargest(NEWEST, reasons, key=lambda info: info.key)  # names begin with the version


def _rejected(log: VersionLog, prefix: str, info: ObjectInfo) -> RejectedShard | None:
    """One of them; None if it was sent back since it was listed."""
    name = info.key.removeprefix(prefix).removesuffix(".json")
    number = name.partition("-")[0]
    try:
        about = reason_of(log, info.key)
    except NotFound:
        return None
    except CorruptObject as error:  # which must not hide all the rest
        about = {"inbox": "", "key": name, "reason": str(error)}
    return RejectedShard(
        name=name,
        version=int(number) if number.isdecimal() else -1,
        rejected=info.last_modified,
        inbox=about["inbox"],
        key=about["key"],
        reason=about["reason"].removeprefix(f"{about['key']}: "),
    )

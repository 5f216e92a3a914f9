"""What waits in the inbox and can be trained on: listed, told from what was consumed before, weighed by the triggers."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

from tidemill.storage.errors import ShardRejected
from tidemill.storage.inbox import Inbox, Listing, original_key
from tidemill.storage.manifest import Owed
from tidemill.storage.store import ObjectInfo
from tidemill.storage.tombstones import Seen
from tidemill.tasks.online.delayed import DelayedLabels
from tidemill.tasks.online.ledger import Reach
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.reading import (
    Later,
    Read,
    Reader,
    Unusable,
    count_rows,
    may_be_the_shards,
    read_shard,
)
from tidemill.tasks.online.rowwise import RowLabels
from tidemill.tasks.online.triggers import Judged, Reason
from tidemill.tasks.online.work import Head, Identity, Work, removal
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.errors import described
from tidemill.tasks.training.loop import score

LISTED_AHEAD: Final = 10_000
"""How many shards one listing of the inbox hands to the following steps: listing again for each would cost O(inbox) a step."""


@dataclass(frozen=True)
class Selection:
    """What one listing of the inbox found."""

    reader: Reader
    """The shards to train on, in order."""
    why: tuple[Reason, ...]
    """What fired. Empty: the triggers say to wait, and nothing is handed out."""
    complete: bool
    """True if the listing found every shard that is in the inbox and was consumed before."""
    listed: frozenset[Identity]
    """All that was found to train on, whether or not it is handed out."""
    waiting: int
    """How many shards are in the inbox that were not consumed before."""
    oldest: datetime | None
    """When the oldest of them was written."""
    duplicates: tuple[Owed, ...]
    """What was consumed before and is there again: to be removed. Empty where shards are kept."""
    passed_over: dict[Identity, str]
    """Shards that stay where they are until a person acts -> why."""
    warnings: tuple[str, ...] = ()
    labels: RowLabels | None = None
    """The labels that come row by row."""

    def __bool__(self) -> bool:
        """True while shards are left to train on, or labels that nothing waits for."""
        return bool(self.reader) or bool(self.labels)

    def close(self, work: Work, places: Places) -> None:
        """Add to the work of a commit what becomes of labels that come row by row."""
        if self.labels is not None:
            self.labels.close(work, places.spelled)

    @property
    def full(self) -> bool:
        """True if more may wait than a listing hands out."""
        return len(self.listed) >= LISTED_AHEAD


def select(head: Head, places: Places, settings: OnlineSettings, without: Collection[Identity] = ()) -> Selection:
    """List the inbox for the coming steps, oldest first.

    Args:
        head: What is consumed already, and the learner that scores what waits where a trigger asks for that.
        places: The inbox, and that of labels.
        settings: Limits, labels, triggers.
        without: Shards that could not be used a moment ago: they must not hide others.

    Raises:
        StoreNotFound: no such inbox.
        SpecError: a trigger needs a package that is not installed.
    """
    passed_over: dict[Identity, str] = {}
    inbox = places.inbox
    delayed: DelayedLabels | RowLabels | None = None
    seen = Seen(head.tombstones, head.owed, places.spelled)
    fits = _fits(inbox, settings, passed_over)

    def can_be_used(info: ObjectInfo) -> bool:
        return (inbox.url, info.key, info.etag) not in without and fits(info)

    listed = partial(inbox.list, LISTED_AHEAD, partial(seen.consumed, inbox.url))
    if settings.labels is None or places.labels is None:
        listing = listed(can_be_used)
        shards = listing.shards
    else:
        known, fit = partial(seen.consumed, places.labels.url), _fits(places.labels, settings, passed_over)
        if settings.labels.wait_seconds is None:
            awaited = partial(_awaited, inbox, seen, without)
            delayed = DelayedLabels(places.labels, settings.labels.key, settings.grace_seconds, known, fit, awaited)
            have = delayed.have
            listing = listed(lambda info: can_be_used(info) and have(info))
            shards = listing.shards
        else:
            delayed = RowLabels(
                (inbox, places.labels),
                settings.labels,
                head.learner.features,
                head.ledger,
                partial(_with_reach, listed, can_be_used),
                known,
                fit,
                head.has,
                settings.grace_seconds,
            )
            listing, shards = delayed.features, delayed.ready
    passed_over |= {(inbox.url, key, ""): reason for key, reason in listing.passed_over.items()}
    if delayed is not None:
        passed_over |= {(delayed.inbox.url, key, ""): reason for key, reason in delayed.passed_over.items()}
    consumed = {inbox: listing.known} if delayed is None else {inbox: listing.known, delayed.inbox: delayed.consumed}
    waiting = _Waiting(head, places, settings, delayed, shards)
    why = waiting.why()
    return Selection(
        reader=Reader(shards if why else [], waiting.read, waiting.size, inbox.store.concurrency),
        why=why,
        complete=all(len(there) < LISTED_AHEAD for there in consumed.values()),
        listed=frozenset((inbox.url, info.key, info.etag) for info in shards),
        waiting=listing.waiting,
        oldest=listing.oldest,
        duplicates=tuple(
            debt for where, there in consumed.items() for debt in _duplicates(seen, where, there, settings)
        )
        + (_sent_again(head, delayed, settings) if isinstance(delayed, RowLabels) else ()),
        passed_over=passed_over,
        warnings=() if delayed is None else delayed.warnings,
        labels=delayed if isinstance(delayed, RowLabels) else None,
    )


def _with_reach(
    listed: Callable[[Callable[[ObjectInfo], bool]], Listing], can_be_used: Callable[[ObjectInfo], bool]
) -> tuple[Listing, Reach]:
    """The listing of shards that wait for labels, and what it leaves out."""
    left_out = list[datetime]()

    def usable(info: ObjectInfo) -> bool:
        if not (can := can_be_used(info)):
            left_out.append(info.last_modified)
        return can

    listing = listed(usable)
    all_of_them = len(listing.shards) < LISTED_AHEAD
    return listing, Reach(tuple(left_out), None if all_of_them else listing.shards[-1].last_modified)


def _sent_again(head: Head, labels: RowLabels, settings: OnlineSettings) -> tuple[Owed, ...]:
    """The removal of labels that were consumed before and have come again under another etag; or they are known by it."""
    if settings.after_commit == "keep":
        for ref in labels.duplicates:
            head.tombstones.add(*ref.identity, ref.etag)
        return ()
    return tuple(removal(ref, settings) for ref in labels.duplicates)


def _awaited(inbox: Inbox, seen: Seen, without: Collection[Identity]) -> set[str]:
    """The original keys of all shards that wait, but for those that are left out."""
    keys: set[str] = set()

    def note(info: ObjectInfo) -> bool:
        if (inbox.url, info.key, info.etag) not in without:
            keys.add(original_key(info.key))
        return False  # none is to be handed out

    inbox.list(1, partial(seen.consumed, inbox.url), note)
    return keys


def _duplicates(seen: Seen, inbox: Inbox, consumed: list[ObjectInfo], settings: OnlineSettings) -> Iterator[Owed]:
    if settings.after_commit == "keep":
        return
    for info in consumed:
        if (before := seen.again(inbox.url, info)) is not None:
            yield removal(before, settings)


def _fits(inbox: Inbox, settings: OnlineSettings, passed_over: dict[Identity, str]) -> Callable[[ObjectInfo], bool]:
    """Whether an object is small enough to be read whole; notes in `passed_over` which is not."""
    limit = settings.limits.max_shard_bytes

    def fits(info: ObjectInfo) -> bool:
        if info.size > limit:
            passed_over[inbox.url, info.key, info.etag] = (
                f"it has {info.size:,} bytes, more than limits.max_shard_bytes={limit:,}; split it, or raise the limit"
            )
        return info.size <= limit

    return fits


class _Waiting:
    """The shards of a listing: how they are read, and whether they are enough."""

    def __init__(
        self,
        head: Head,
        places: Places,
        settings: OnlineSettings,
        delayed: DelayedLabels | RowLabels | None,
        shards: list[ObjectInfo],
    ) -> None:
        self._head, self._places, self._settings, self._delayed = head, places, settings, delayed
        self._kept = head.kept
        self._shards = shards
        complete = None if delayed is None else delayed.completed
        features = head.learner.features
        self._fetch = partial(read_shard, places.inbox, complete, features, settings.grace_seconds)

    def size(self, info: ObjectInfo) -> int:
        """Bytes that are read for a shard: its labels come with it."""
        return info.size + (0 if self._delayed is None else self._delayed.size(info))

    def read(self, info: ObjectInfo) -> Read:
        """As it was read when a trigger asked; else read now."""
        return self._kept.pop(self._identity(info)) or self._fetch(info)

    def _identity(self, info: ObjectInfo) -> tuple[str, str, str | None]:
        """Which bytes a shard is made of, those of its labels included."""
        return info.key, info.etag, None if self._delayed is None else self._delayed.etag(info)

    def why(self) -> tuple[Reason, ...]:
        """Why to train on what was listed; empty: the triggers say to wait."""
        if len(self._shards) >= LISTED_AHEAD:  # what is not listed would never count
            return ("backlog",)
        self._kept.only(map(self._identity, self._shards))
        rows = partial(count_rows, self._places.inbox, self._settings.grace_seconds)
        return tuple(self._head.trigger.fired(self._shards, rows, self._judge, datetime.now(UTC)))

    def _judge(self, info: ObjectInfo) -> Judged | None:
        """How the head does on a shard that waits; None if it would not be trained on now.

        Raises:
            ShardRejected: it can never be used, or the model fails on it: a step finds out.
        """
        head = self._head
        read = self.read(info)
        if isinstance(read, Later) or head.consumed(read.shard):
            return None
        if isinstance(read, Unusable):
            raise ShardRejected(read.reason)
        if not read.labelled:
            return Judged(0, math.nan)
        self._kept.put(self._identity(info), read)
        try:
            before = score(head.learner, read.groups)
        except Exception as error:
            if not may_be_the_shards(error):
                raise
            head.read_again(self._places.log, self._settings.device)  # it may be half used
            raise ShardRejected(described(error)) from error
        return Judged(before.rows, before.finite.get(head.learner.spec.main_metric, math.nan))

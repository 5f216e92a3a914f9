"""Labels that come row by row: which shards of features are ready, with which labels, and which labels are of no more use.

The rule (docs/learning.md, "Labels that come row by row"): a shard of labels counts for a shard of features if they were written
within `wait_seconds` of each other, by the clocks of their stores. The features are ready once each of their rows has a label,
or when that time is over; and the last label of a row counts. This process's clock tells only that a time is over.

No label goes that may still be needed: a shard of labels stays in its inbox until features that were consumed have the key of
each of its rows, which the manifests remember, or until its own time is over and no features wait for it.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from tidemill.storage.inbox import Inbox, Listing, Shard
from tidemill.storage.manifest import Consumed, DoneLabels, JoinedLabels, ObjectRef, OpenLabels, Rejected, ShardRef
from tidemill.storage.parquet import RowGroup
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.latest import Latest, keys_of, labelled
from tidemill.tasks.online.ledger import LABELS_BYTES, Ledger, Reach
from tidemill.tasks.online.matching import Match
from tidemill.tasks.online.reading import Later, Read, Readable
from tidemill.tasks.online.used import decoded, encoded
from tidemill.tasks.online.work import Work
from tidemill.tasks.settings import LabelSettings
from tidemill.tasks.training.columns import to_arrow
from tidemill.tasks.training.features import Features

LISTED: Final = 100_000
"""How many shards of labels, the oldest, are looked at together."""


class RowLabels:
    """What one look has found: labels, and the shards of features that are ready with them."""

    def __init__(
        self,
        inboxes: tuple[Inbox, Inbox],
        settings: LabelSettings,
        features: Features,
        ledger: Ledger,
        waiting: Callable[[], tuple[Listing, Reach]],
        known: Callable[[ObjectInfo], bool],
        fits: Callable[[ObjectInfo], bool],
        was_consumed: Callable[[ObjectRef], bool],
        grace_seconds: float,
    ) -> None:
        """List the labels, read what was not read before, and match.

        Args:
            inboxes: Of the features, and of the labels.
            settings: By which column, and how long they wait.
            features: The columns that training needs.
            ledger: What earlier looks have read.
            waiting: Lists the shards of features, and tells what that leaves out.
            known: Whether an object of the labels' inbox was consumed before, by its etag.
            fits: Whether it is small enough to be read.
            was_consumed: The same as `known` of an object of either inbox, by its bytes.
            grace_seconds: What is no whole Parquet file is unusable once it has not changed for this long.

        Raises:
            Unavailable, StoreNotFound: a store as a whole cannot be read.
        """
        assert settings.wait_seconds is not None, "labels come row by row"
        source, self.inbox = inboxes
        self._was_consumed = was_consumed
        self._key, self._wait = settings.key, timedelta(seconds=settings.wait_seconds)
        now = datetime.now(UTC)  # before anything is listed: all that was written until now is found
        self.features, reach = waiting()
        """The listing of the features."""
        read = settings.key, features, grace_seconds
        waits, self._features_reach = ledger.features(source, self.features.shards, reach, *read)
        left_out = list[datetime]()

        def may_be_read(info: ObjectInfo) -> bool:
            if not (small := fits(info)):
                left_out.append(info.last_modified)
            return small

        listing = self.inbox.list(LISTED, known, may_be_read)
        self.consumed = listing.known
        """Labels that were consumed before, and are still or again there."""
        beyond = listing.shards[-1].last_modified if len(listing.shards) == LISTED else None
        came, self._labels_reach = ledger.labels(self.inbox, listing.shards, Reach(tuple(left_out), beyond), *read)
        self.passed_over = listing.passed_over | ledger.denied(self.inbox)
        """Labels that cannot be read: their keys, and why."""
        self.warnings = () if self._labels_reach.beyond is None else (_too_many(self.inbox, listing.waiting),)
        self.duplicates = [each.ref for each in came if was_consumed(each.ref)]
        """Labels that were consumed before, and are here again under another etag."""
        came = [each for each in came if not was_consumed(each.ref)]
        self._labels = [each for each in came if each.rows is not None]
        self._begins = np.cumsum([0, *(len(each.rows or ()) for each in self._labels)])
        self._unusable = [Rejected(**dict(each.ref), reason=each.reason) for each in came if each.rows is None]
        gone = beyond is None and len(listing.known) < LISTED
        self._there = {info.key for info in (*listing.shards, *listing.known)} if gone else None
        """Keys of the labels that are in the inbox; None: not all of them are known."""
        at_once = [each.ref for each in waits if each.keys_N is None or was_consumed(each.ref)]
        waits = [each for each in waits if each.keys_N is not None and not was_consumed(each.ref)]
        found = ledger.matches(waits, self._labels, self._wait)
        self._matches = {(each.ref.key, each.ref.etag): match for each, match in zip(waits, found, strict=True)}
        self._needed = Counter(shard for match in found for shard in self._shards_of(match.touched))
        """For each of the labels, by its place, how many shards of features wait for it."""
        ready = [(ref.last_modified, ref.key, ref.etag) for ref in at_once]
        for each, match in zip(waits, found, strict=True):
            if (when := self._ready_at(each.ref, match, settings.corrections, now)) is not None:
                ready.append((when, each.ref.key, each.ref.etag))
        infos = {(info.key, info.etag): info for info in self.features.shards}
        self.ready = [infos[key, etag] for _, key, etag in sorted(ready)]
        """The shards of features that have their turn now. In the order in which they became ready, whenever that is seen."""
        self._over = [shard for shard, each in enumerate(self._labels) if self._is_over(each.ref, shard, now)]

    def _shards_of(self, labels: Any) -> list[int]:
        """Which shards these labels are in, each once."""
        return np.unique(np.searchsorted(self._begins, labels, "right") - 1).tolist()  # type: ignore[no-any-return]

    def _ready_at(self, ref: ShardRef, match: Match, corrections: bool, now: datetime) -> datetime | None:
        """When a shard of features became ready; None: it waits."""
        if match.complete_at is not None and not corrections:
            return match.complete_at
        limit = ref.last_modified + self._wait
        return limit if now > limit and self._labels_reach.has_all(ref.last_modified, self._wait) else None

    def _is_over(self, ref: ShardRef, shard: int, now: datetime) -> bool:
        """Whether no features need a shard of labels any more: its time is over, and none of those that wait has a key of it."""
        over = now > ref.last_modified + self._wait and not self._needed[shard]
        return over and self._features_reach.has_all(ref.last_modified, self._wait)

    # ---- the join ------------------------------------------------------------------------------------------------
    def size(self, features: ObjectInfo) -> int:
        """Bytes of labels that are read with a shard of features: none, they are in memory."""
        return 0

    def etag(self, features: ObjectInfo) -> str | None:
        """Tells the labels of a shard of features from others that it might have had."""
        if (match := self._matches.get((features.key, features.etag))) is None:
            return None
        labels = [self._labels[shard].ref.identity for shard in self._shards_of(match.touched)]
        return hashlib.sha256(repr(labels).encode(errors="surrogatepass")).hexdigest()

    def completed(self, shard: Shard, groups: Sequence[RowGroup], features: Features) -> Read:
        """A shard of features that is ready, with its labels.

        Raises:
            ShardRejected: it has a target already, or no keys.
        """
        match = self._matches.get((shard.info.key, shard.info.etag))
        if match is None:
            keys_of(groups, self._key)
            return Readable(shard, groups) if self._was_consumed(shard.ref) else Later()
        last_N = match.last_N
        rows = np.flatnonzero(last_N >= 0)
        shard_of = np.searchsorted(self._begins, last_N[rows], "right") - 1
        by_shard = np.argsort(shard_of, kind="stable")
        rows, shard_of = rows[by_shard], shard_of[by_shard]
        places = np.unique(shard_of)
        parts, joined = list[Any](), list[JoinedLabels]()
        for place, some in zip(places.tolist(), np.split(rows, np.searchsorted(shard_of, places[1:])), strict=False):
            came = self._labels[place]
            parts.append((came.rows, to_arrow(torch.from_numpy(last_N[some] - self._begins[place]))))
            joined.append(JoinedLabels(**dict(came.ref), column=self._key, rows=len(some)))
        rows_N = np.zeros(len(last_N), dtype=np.int64)
        rows_N[rows] = np.arange(len(rows))
        labels = Latest(parts, features.targets, features.types)
        found = labelled(groups, labels, _nullable(rows_N, last_N >= 0))
        any_label = any(features.labelled(group.read(features.targets)) for group in found)
        return Readable(shard, found, joined=tuple(joined), labelled=any_label)

    # ---- what becomes of the labels ------------------------------------------------------------------------------
    def __bool__(self) -> bool:
        """True while there are labels to be done with beside those that go with features."""
        return bool(self._unusable or self._over)

    def close(self, work: Work, spelled: Callable[[str], str]) -> None:
        """Add to the work of a commit what becomes of the labels. For whatever it takes of this look, once.

        Those that can never be used are rejected. So are those whose time is over, if no row of them was of any use. The others
        are done with when it is over, or when each of their rows is used and no features that wait have a key of them; until
        then they are open, and the work carries them on.

        Args:
            work: On top of the head that this look was taken for, or of one that was committed by it.
            spelled: The URL by which this run knows an inbox.
        """
        before = {
            (spelled(each.inbox), each.key, each.sha256): each for each in work.head.version.manifest.open_labels or ()
        }
        used: dict[int, Any] = {}
        for place, came in enumerate(self._labels):
            if (earlier := before.pop(came.ref.identity, None)) is not None:
                used[place] = decoded(earlier)
        for shard in (*work.consumed, *work.rejected):
            if (match := self._matches.pop((shard.key, shard.etag), None)) is None:
                continue
            self._needed.subtract(self._shards_of(match.touched))
            if isinstance(shard, Consumed):
                self._use(match.touched, used)
        still_open, done = list[OpenLabels](), list[DoneLabels]()
        for place, used_L in sorted(used.items()):
            ref, rows, left = self._labels[place].ref, len(used_L), int((~used_L).sum())
            if place in self._over or not (left or self._needed[place]):
                done.append(DoneLabels(**dict(ref), rows=rows, unmatched=left))
            else:
                still_open.append(OpenLabels(**dict(ref), rows=rows, used=encoded(used_L)))
        for each in before.values():
            if self._is_gone(each, spelled):
                left = int((~decoded(each)).sum())
                done.append(DoneLabels(**each.model_dump(exclude={"used"}), unmatched=left))
            else:
                still_open.append(each)
        work.open_labels, work.done_labels = tuple(still_open), tuple(done)
        work.rejected += self._unusable
        work.rejected += [
            _useless(self._labels[place].ref, self._wait, self._key) for place in self._over if place not in used
        ]
        self._unusable, self._over = [], []

    def _use(self, touched: Any, used: dict[int, Any]) -> None:
        """Note that features that were consumed have the keys of these labels."""
        for place in self._shards_of(touched):
            begin, end = self._begins[place : place + 2].tolist()
            used_L = used.setdefault(place, np.zeros(end - begin, dtype=bool))
            used_L[touched[(touched >= begin) & (touched < end)] - begin] = True

    def _is_gone(self, labels: OpenLabels, spelled: Callable[[str], str]) -> bool:
        """Whether somebody has removed or replaced a shard of labels that is still open."""
        if spelled(labels.inbox) != self.inbox.url or self._there is None:
            return False
        return labels.key not in self._there or any(each.ref.key == labels.key for each in self._labels)


def _nullable(values_N: Any, valid_N: Any) -> pa.Array[Any]:
    """int64 [N], null where they are not valid. By hand: `pa.array` imports pandas where that is installed."""
    buffers = [np.packbits(valid_N, bitorder="little"), values_N]
    return pa.Array.from_buffers(pa.int64(), len(values_N), [pa.py_buffer(each.data) for each in buffers])


def _useless(ref: ShardRef, wait: timedelta, key: str) -> Rejected:
    why = (
        f"{ref.key}: no features that came within {wait.total_seconds():g} seconds of these labels and were not trained on "
        f"before have their keys in column {key!r}: they are of other rows, or came too late"
    )
    return Rejected(**dict(ref), reason=why)


def _too_many(inbox: Inbox, waiting: int) -> str:
    return (
        f"{inbox.url} holds {waiting:,} shards of labels. At most {LISTED:,} of them, or {LABELS_BYTES:,} bytes, are looked at "
        "together, the oldest first: write fewer and larger shards, or wait less long"
    )

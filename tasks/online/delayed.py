"""Labels that arrive later than their features: which shards are complete.

A shard of labels has the key of its shard of features, in an inbox of its own. Both are consumed by the same version.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Final

from tidemill.storage.errors import NotReady, ShardRejected
from tidemill.storage.inbox import Inbox, Shard, original_key
from tidemill.storage.manifest import LabelShard
from tidemill.storage.parquet import RowGroup
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.labels import Labels
from tidemill.tasks.online.reading import Later, Read, Readable, Unusable, fetched, may_be_the_shards, unfinished
from tidemill.tasks.training.errors import ColumnError, described
from tidemill.tasks.training.features import Features

LISTED: Final = 10_000
"""How many label shards, the oldest, are matched with features at a time."""


class DelayedLabels:
    """The labels that one listing of their inbox found."""

    def __init__(
        self,
        inbox: Inbox,
        column: str,
        grace_seconds: float,
        known: Callable[[ObjectInfo], bool],
        fits: Callable[[ObjectInfo], bool],
        awaited: Callable[[], Collection[str]],
    ) -> None:
        """List the labels that wait.

        Where more wait than are matched at a time, those whose features are not there are left out, so that they hide no
        others. Such features never come, or were rejected, or were consumed while their labels stay (`keep`) and have new
        etags since a backup was put back.

        Args:
            inbox: Where labels arrive.
            column: By which their rows are joined with those of the features.
            grace_seconds: What is no whole Parquet file is unusable once it has not changed for this long.
            known: Whether an object was consumed before.
            fits: Whether it is small enough to be read.
            awaited: Lists the original keys of the features that wait; asked only then.
        """
        self.inbox, self._column, self._grace_seconds = inbox, column, grace_seconds
        self.warnings: tuple[str, ...] = ()
        listing = inbox.list(LISTED, known, fits)
        if len(listing.shards) == LISTED:
            keys, most = awaited(), listing.waiting
            listing = inbox.list(LISTED, known, lambda info: original_key(info.key) in keys and fits(info))
            if len(listing.shards) < LISTED:
                self.warnings = (
                    f"{inbox.url} holds {most:,} shards of labels, and most of their features do not wait: they never came, or "
                    "were rejected or consumed. Move such labels away, since each look lists them twice.",
                )
        self.consumed = listing.known
        """What was consumed before, and is still or again there."""
        self.passed_over = listing.passed_over
        """Entries that can be no shards: their keys, and why."""
        self._waiting: dict[str, ObjectInfo] = {}
        for info in listing.shards:
            self._waiting.setdefault(original_key(info.key), info)

    def have(self, features: ObjectInfo) -> bool:
        """Whether the labels of a shard of features have arrived."""
        return original_key(features.key) in self._waiting

    def size(self, features: ObjectInfo) -> int:
        """Bytes of the labels of a shard of features; 0 while they have not arrived."""
        return found.size if (found := self._waiting.get(original_key(features.key))) is not None else 0

    def etag(self, features: ObjectInfo) -> str | None:
        """Etag of the labels of a shard of features; None while they have not arrived."""
        return found.etag if (found := self._waiting.get(original_key(features.key))) is not None else None

    def completed(self, shard: Shard, groups: Sequence[RowGroup], features: Features) -> Read:
        """A shard of features with its labels; the labels alone are unusable if the fault is theirs.

        Raises:
            ShardRejected: the features cannot be joined with them.
        """
        info = self._waiting.get(original_key(shard.info.key))
        if info is None:
            return Later()
        found = fetched(self.inbox, info)
        if isinstance(found, Later):
            return found
        try:
            labels = Labels(found.row_groups(features.types), self._column, features.targets)
        except NotReady as unready:
            return unfinished(self.inbox, found, unready, self._grace_seconds)
        except ShardRejected as bad:
            return Unusable(found, str(bad))
        except Exception as error:
            if not may_be_the_shards(error):
                raise
            return Unusable(found, described(error), unforeseen=True)
        joined = labels.join(groups)
        try:
            features.check_targets(joined.groups[0].schema, f"{found.inbox}/{info.key}")
            tables = [group.read(features.targets) for group in joined.groups]
            for table in tables:
                features.target(table, f"{found.inbox}/{info.key}")
        except ColumnError as bad:
            return Unusable(found, str(bad))
        if not any(map(features.labelled, tables)):
            return Unusable(
                found,
                f"{info.key} has no label for any row of {shard.info.key}: compare column {self._column!r} of both",
            )
        record = LabelShard(**dict(found.ref), column=self._column, unmatched=joined.unmatched)
        return Readable(shard, joined.groups, record)

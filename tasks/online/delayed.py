"""Labels that arrive later than their features: which shards are complete, and who would have predicted them.

A shard of labels has the key of its shard of features, in an inbox of its own. Both are consumed by the same version.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Final

from tidemill.storage.aliases import find_alias
from tidemill.storage.errors import CorruptObject, NotReady, ShardRejected, UnknownVersion
from tidemill.storage.inbox import Inbox, Shard, original_key
from tidemill.storage.log import Version, VersionLog
from tidemill.storage.manifest import LabelShard, Predicted
from tidemill.storage.parquet import RowGroup
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.labels import Labels
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.errors import ColumnError, TrainingError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup as AnyRowGroup
from tidemill.tasks.training.learner import Predictor
from tidemill.tasks.training.loop import score
from tidemill.tasks.versions import load_learner

logger = logging.getLogger("tidemill.online")

LISTED: Final = 10_000
"""How many label shards, the oldest, are matched with features at a time."""
UNDECIDED: Final = 1000
"""How many versions in a row, about none of which the gate has decided, are passed over in the search for one that served."""


class BadLabels(Exception):
    """A shard of labels that can never be used; its features wait for another."""

    def __init__(self, shard: Shard, reason: str) -> None:
        super().__init__(reason)
        self.shard = shard


@dataclass(frozen=True)
class Complete:
    """Row groups that have their targets, and where those came from if not from the same shard."""

    groups: Sequence[AnyRowGroup]
    labels: LabelShard | None


class DelayedLabels:
    """The inbox of labels, and the versions that served when the features arrived."""

    def __init__(
        self, log: VersionLog, inbox: Inbox, column: str, settings: OnlineSettings, warn: Callable[[str], None]
    ) -> None:
        self.log, self.inbox, self.column, self._settings, self._warn = log, inbox, column, settings, warn
        self._waiting: dict[str, ObjectInfo] = {}
        self._then: tuple[int, Predictor | None] | None = None
        self._version = lru_cache(maxsize=64)(log.version)
        """Manifests never change; bisections for neighbouring moments ask for the same ones."""

    # ---- matching ----------------------------------------------------------------------------------------------------
    def look(self, known: Callable[[ObjectInfo], bool], fits: Callable[[ObjectInfo], bool]) -> list[ObjectInfo]:
        """List the labels that wait and fit. Returns those that were consumed before."""
        listing = self.inbox.list(LISTED, known, fits)
        self._waiting = {}
        for info in listing.shards:
            self._waiting.setdefault(original_key(info.key), info)
        if len(listing.shards) == LISTED:
            self._warn(
                f"{self.inbox.url} holds {listing.waiting:,} shards of labels, of which the oldest {LISTED:,} are matched with "
                "features. Those whose features never came, or were rejected, hold up the others: move them away."
            )
        return listing.known

    def have(self, features: ObjectInfo) -> bool:
        """Whether the labels of a shard of features have arrived."""
        return original_key(features.key) in self._waiting

    def size(self, features: ObjectInfo) -> int:
        """Bytes of the labels of a shard of features; 0 while they have not arrived."""
        return found.size if (found := self._waiting.get(original_key(features.key))) is not None else 0

    def completed(self, shard: Shard, groups: Sequence[RowGroup], features: Features) -> Complete | None:
        """A shard of features with its labels; None if these went since they were listed, or are not whole yet.

        Raises:
            BadLabels: the labels can never be used.
            ShardRejected: the features cannot be joined with them.
        """
        info = self._waiting.get(original_key(shard.info.key))
        if info is None or (found := self.inbox.read(info)) is None:
            return None
        try:
            labels = Labels(found.row_groups(), self.column, features.targets)
        except NotReady as unready:
            if self.inbox.is_stable(info, self._settings.grace_seconds):
                raise BadLabels(found, str(unready)) from unready
            return None
        except ShardRejected as bad:
            raise BadLabels(found, str(bad)) from bad
        joined = labels.join(groups)
        try:
            tables = [group.read(features.targets) for group in joined.groups]
            for table in tables:
                features.target(table, f"{found.inbox}/{info.key}")
        except ColumnError as bad:
            raise BadLabels(found, str(bad)) from bad
        if not any(map(features.labelled, tables)):
            raise BadLabels(
                found,
                f"{info.key} has no label for any row of {shard.info.key}: compare column {self.column!r} of both",
            )
        return Complete(
            joined.groups,
            LabelShard(
                inbox=found.inbox,
                key=info.key,
                sha256=found.sha256,
                etag=info.etag,
                size=info.size,
                last_modified=info.last_modified,
                column=self.column,
                unmatched=joined.unmatched,
            ),
        )

    # ---- who would have predicted ------------------------------------------------------------------------------------
    def predicted(self, head: Version, arrived: datetime, groups: Sequence[AnyRowGroup]) -> Predicted | None:
        """The score, on these rows, of the version that served when they arrived; None if retention has removed it."""
        version = self._serving(head, arrived)
        if self._then is None or self._then[0] != version.number:
            try:
                network = load_learner(self.log, version, self._settings.device).predictor()
            except (UnknownVersion, CorruptObject, TrainingError) as error:
                logger.warning("version %d cannot be scored any more: %s", version.number, error)
                network = None
            self._then = version.number, network
        if (network := self._then[1]) is None:
            return None
        try:
            return Predicted(version=version.number, score=score(network, groups).finite)
        except TrainingError:  # it was made for other columns
            return None

    def _serving(self, head: Version, moment: datetime) -> Version:
        """The version that served at a moment. Where no gate moves the alias, the one that it names, if that existed."""
        if self._settings.gate.champion != "move":
            alias = find_alias(self.log, self._settings.gate.alias)
            newest = newest_at(self._version, head, moment)
            return newest if alias is None or alias.version > newest.number else self._version(alias.version)
        return served_at(self.log, self._version, head, moment)


def served_at(log: VersionLog, version_at: Callable[[int], Version], head: Version, moment: datetime) -> Version:
    """The version that served at a moment, as far as the gate moved the alias; version 0 before there was any.

    That is what the last decision before it left as champion, or what a batch training or a rollback has made since.
    """
    newest = newest_at(version_at, head, moment)
    for version in islice(log.history(newest), UNDECIDED):
        if (gate := version.manifest.gate) is not None:
            return version if gate.decision == "promoted" else version_at(gate.champion)
        if version.manifest.kind != "online":
            return version
    return newest


def newest_at(version_at: Callable[[int], Version], head: Version, moment: datetime) -> Version:
    """The newest version at a moment; version 0 before there was any.

    Found by bisection: the log is ordered by time as far as the clocks of its writers agree.
    """
    low, high = 0, head.number
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if version_at(middle).manifest.created <= moment else (low, middle - 1)
    return version_at(low)

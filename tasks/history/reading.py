"""The history of a model as its manifests tell it: read once each, kept as the few numbers that are shown."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Final

from tidemill.storage.aliases import all_aliases
from tidemill.storage.chain import Version
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Gate, Manifest, Parent
from tidemill.storage.parallel import concurrently
from tidemill.storage.runs import newest_registered
from tidemill.tasks.training.spec import Spec

LAST: Final = 1000
"""How many of the newest versions a history has, unless it is asked for others."""
_AT_ONCE: Final = 256
"""So many manifests are in memory as a whole."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that was trained on."""

    key: str
    rows: int
    score: dict[str, float]
    """Of the model as it was before it trained on the shard."""
    champion: dict[str, float]
    """Of the champion, on the same rows."""


@dataclass(frozen=True, slots=True)
class Made:
    """One version."""

    number: int
    sha256: str
    """Of its manifest."""
    parent: Parent | None
    kind: str
    created: datetime
    shards: tuple[Shard, ...]
    rejected: tuple[tuple[str, str], ...]
    """(key, reason) of each shard that it rejected."""
    gate: Gate | None
    rolled_back_to: int | None

    @classmethod
    def of(cls, version: Version) -> "Made":
        """What is kept of a version."""
        manifest = version.manifest
        return cls(
            number=version.number,
            sha256=version.sha256,
            parent=manifest.parent,
            kind=manifest.kind,
            created=manifest.created,
            shards=tuple(Shard(shard.key, shard.rows, shard.score, shard.champion) for shard in manifest.consumed),
            rejected=tuple((shard.key, shard.reason) for shard in manifest.rejected),
            gate=manifest.gate,
            rolled_back_to=manifest.rolled_back_to,
        )

    @property
    def rows(self) -> int:
        """Of its shards, with a label."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class History:
    """The newest versions of a model, oldest first, with what they were made of."""

    registry: str
    """URL."""
    model: str
    head: Manifest
    versions: tuple[Made, ...]
    batch: Manifest | None
    """The last batch training. It may lie before the versions; None: it lies there, and cannot be found."""
    aliases: dict[str, int]
    """Name -> number of the version."""

    @cached_property
    def metric(self) -> str:
        """The score by which models are compared, lower is better: what the gate goes by, or would."""
        for version in reversed(self.versions):
            if version.gate is not None:
                return version.gate.metric
        spec = self.spec
        return Spec.model_construct(task=spec.get("task") or "regression", loss=spec.get("loss")).main_metric

    @property
    def spec(self) -> dict[str, object]:
        """With everything filled in that was left open, where the head has that."""
        return self.head.resolved_spec or self.head.spec

    @cached_property
    def shards(self) -> list[tuple[Made, Shard]]:
        """Every shard with the version that was trained on it, in order."""
        return [(version, shard) for version in self.versions for shard in version.shards]

    @cached_property
    def rejected(self) -> list[tuple[Made, str, str]]:
        """(version, key, reason) of every shard that was rejected, in order."""
        return [(version, key, reason) for version in self.versions for key, reason in version.rejected]


class HistoryReader:
    """Reads the manifests of a model. Each is read once, however often it is asked for the history."""

    def __init__(self, log: VersionLog, last: int = LAST) -> None:
        """`last`: how many of the newest versions to read."""
        self.log, self._known = log, deque[Made](maxlen=last)
        self._batch: Manifest | None = None

    def read(self) -> History:
        """The history as it is now.

        Raises:
            UnknownModel: there is no such model.
            CorruptObject: a manifest was altered, or is missing.
        """
        head = self.log.head()
        if not self._goes_on_to(head):
            self._known.clear()
        self._read_up_to(head)
        return History(
            registry=self.log.store.url,
            model=self.log.model,
            head=head.manifest,
            versions=tuple(self._known),
            batch=self._last_batch(head),
            aliases=all_aliases(self.log),
        )

    def _goes_on_to(self, head: Version) -> bool:
        """Whether what is known is still part of this history: a registry may have been restored, or begun anew."""
        if not self._known or (newest := self._known[-1]).number > head.number:
            return False
        return self.log.older(newest.number).sha256 == newest.sha256

    def _read_up_to(self, head: Version) -> None:
        assert self._known.maxlen is not None
        first = max(0, head.number - self._known.maxlen + 1)
        first = max(first, self._known[-1].number + 1 if self._known else 0)
        for begin in range(first, head.number, _AT_ONCE):
            numbers = range(begin, min(begin + _AT_ONCE, head.number))
            for version in concurrently(self.log.older, numbers, self.log.store.concurrency):
                self._append(version)
        if first <= head.number:
            self._append(head)

    def _append(self, version: Version) -> None:
        made, before = Made.of(version), self._known[-1] if self._known else None
        if before is not None and before.number == made.number - 1:
            if made.parent != Parent(version=before.number, sha256=before.sha256):
                self.log.check_link(self.log.older(before.number), version)
        elif before is not None:  # too long ago to be of this history
            self._known.clear()
        if version.manifest.kind == "batch":
            self._batch = version.manifest
        self._known.append(made)

    def _last_batch(self, head: Version) -> Manifest | None:
        if self._batch is not None and self._batch.version > head.number:  # of a history that is gone
            self._batch = None
        if self._batch is None and (found := newest_registered(self.log, self._known[0].number)) is not None:
            self._batch = found.manifest
        return self._batch


def gates(history: History) -> Iterator[tuple[Made, Gate]]:
    """Every version on which the gate decided, with the decision."""
    return ((version, version.gate) for version in history.versions if version.gate is not None)

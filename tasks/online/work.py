"""The head in memory, and what was done on top of it that is not committed yet."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tidemill import progress
from tidemill.storage.chain import Version
from tidemill.storage.errors import HeadMoved, UnknownVersion
from tidemill.storage.inbox import Shard
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import (
    Consumed,
    DoneLabels,
    Gate,
    LabelShard,
    ObjectRef,
    OpenLabels,
    Owed,
    Predicted,
    Rejected,
    Served,
    consumed_objects,
)
from tidemill.storage.tombstones import Tombstones
from tidemill.tasks.online.ledger import Ledger
from tidemill.tasks.online.points import KeptLearner
from tidemill.tasks.online.reading import Kept, Readable
from tidemill.tasks.online.triggers import Judged, Trigger
from tidemill.tasks.ranks.leader import steps_of
from tidemill.tasks.scores import Means, Summary, add_served
from tidemill.tasks.settings import OnlineSettings, Triggers
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.versions import load_learner

Identity = tuple[str, str, str]
"""Inbox, key and etag of an object as it was listed."""


@dataclass
class Head:
    """A committed version in memory. Dropped whenever a step does not end in the commit of exactly this memory."""

    version: Version
    steps: Steps
    """Of the learner; they live as long as it, since to compile them takes a while."""
    tombstones: Tombstones
    owed: tuple[Owed, ...]
    disposed_at: float
    """When it was last tried to pay the debts, by `time.monotonic`."""
    recent: deque[Consumed]
    """The last shards that this learner has scored and trained on."""
    cumulative: Summary
    """Of all shards that this learner has seen since the last batch training."""
    gate: Gate | None
    """The last decision about one of the recent shards."""
    trigger: Trigger
    """When to train on what waits: what was found out about it."""
    kept: Kept = field(default_factory=Kept)
    """What was read to be judged by the trigger."""
    ledger: Ledger = field(default_factory=Ledger)
    """What was read of labels that come row by row, and of the features that wait for them."""

    @property
    def learner(self) -> Learner:
        """As it was committed, until the next shard is trained on."""
        return self.steps.learner

    def read_again(self, log: VersionLog, device: str) -> None:
        """Go back to the learner as it was committed. Raises what `read_learner` raises; then there is no learner."""
        del self.steps  # before the other learner takes memory
        self.steps = steps_of(read_learner(log, self.version, device))

    def go_back(self, kept: KeptLearner, log: VersionLog) -> None:
        """Go back to a learner that was kept. Raises what `KeptLearner.load` raises; then there is no learner."""
        del self.steps
        self.steps = steps_of(kept.load(log))

    def consumed(self, shard: Shard) -> bool:
        """Whether a shard was consumed before: the same key and the same bytes, whatever its etag is now."""
        return self.has(shard.ref)

    def has(self, ref: ObjectRef) -> bool:
        """Whether this object was consumed before."""
        return self.tombstones.has(*ref.identity)


def trigger_on(settings: Triggers, spec: Spec, recent: Sequence[Consumed]) -> Trigger:
    """The trigger on top of a version whose last shards are these."""
    metric = spec.main_metric
    past = [Judged(shard.rows, shard.score[metric]) for shard in recent if metric in shard.score]
    return Trigger(settings, past)


def read_learner(log: VersionLog, version: Version, device: str) -> Learner:
    """The learner exactly as it was committed.

    Raises:
        HeadMoved: others went on from the version, and retention removed it.
        UnknownVersion, CorruptObject, TrainingError: see `load_learner`.
    """
    try:
        learner = load_learner(log, version, device)
        learner.committed()
        return learner
    except UnknownVersion as error:
        if log.head().number == version.number:
            raise
        raise HeadMoved(f"{log.url}: retention has removed version {version.number}, the head before.") from error


def removal(consumed: ObjectRef, settings: OnlineSettings) -> Owed:
    """The removal of a shard, or of its labels, that was consumed now or before.

    One that was consumed before is archived like others, since it may have been kept until now. An archive does not get twice
    what it holds.
    """
    return Owed.of(consumed, "delete" if settings.archive_to is None else "archive", settings.archive_to)


@dataclass
class Scored:
    """Scores of one shard before it is trained on."""

    learner: dict[str, float]
    champion: dict[str, float]
    predicted: Predicted | None = None
    served: tuple[Served, ...] | None = None


@dataclass
class Work:
    """What was done on top of a head, and is not committed yet."""

    head: Head
    consumed: list[Consumed] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    duplicates: list[Owed] = field(default_factory=list)
    """To be removed: shards that were consumed before, and have come again under another etag."""
    unreadable: dict[Identity, str] = field(default_factory=dict)
    """Shards that cannot be read -> why."""
    open_labels: tuple[OpenLabels, ...] | None = None
    """Shards of labels that come row by row, used in part from now on; None: those of the head."""
    done_labels: tuple[DoneLabels, ...] = ()
    """Such shards that are of no more use."""
    new_columns: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    """That were trained on."""

    def __bool__(self) -> bool:
        """True if there is something to commit."""
        return bool(self.consumed or self.rejected or self.done_labels)

    def add(self, found: Readable, ordinal: int, scored: Scored, result: PassResult, passes: int) -> None:
        """Count a shard that was trained on."""
        self.rows += result.rows
        self.consumed.append(
            Consumed(
                **dict(found.shard.ref),
                ordinal=ordinal,
                rows=result.rows,
                unlabelled=result.unlabelled,
                score=scored.learner,
                champion=scored.champion,
                predicted=scored.predicted,
                served=scored.served,
                labels=() if found.labels is None else (found.labels,),
                joined=found.joined,
                loss=result.loss if result.rows else None,
                passes=passes,
            )
        )
        progress.current().advance(1, rows=result.rows, newest=found.shard.info.last_modified)

    def __str__(self) -> str:
        parts = [f"shards {len(self.consumed)}", f"rows {self.rows:,}"]
        if unlabelled := sum(shard.unlabelled for shard in self.consumed):
            parts.append(f"rows without a label {unlabelled:,}")
        if self.rejected:
            parts.append(f"rejected {len(self.rejected)}")
        if (loss := self.metrics().get("loss")) is not None:
            parts.append(f"loss before training {loss:.4g}")
        return ", ".join(parts)

    @property
    def consumed_objects(self) -> list[Consumed | LabelShard | DoneLabels]:
        """The shards, and those of labels that are of no more use."""
        return list(consumed_objects(self.consumed, self.done_labels))

    def metrics(self) -> dict[str, Any]:
        """Prequential metrics of this commit's shards, the champion's on the same rows, and those of what was answered."""
        summary = Summary.of(self.consumed)
        champion = {"champion": summary.champion.mean} if summary.champion.mean else {}
        served = add_served(Means(), self.consumed).mean
        labels = self._labels()
        return (
            summary.score.mean
            | champion
            | ({"served": served} if served else {})
            | ({"labels": labels} if labels else {})
        )

    def _labels(self) -> dict[str, int]:
        """How many labels came in time, where they come row by row."""
        joined = [shard for shard in self.consumed if shard.joined is not None]
        if not (joined or self.done_labels):
            return {}
        return {
            "rows": sum(shard.rows for shard in joined),
            "unlabelled": sum(shard.unlabelled for shard in joined),
            "unmatched": sum(labels.unmatched for labels in self.done_labels),
        }

"""What a step holds in memory: the version that it starts from, and the work on top of it that is not committed yet."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tidemill.storage.inbox import Shard
from tidemill.storage.log import Version
from tidemill.storage.manifest import Consumed, Gate, LabelShard, Owed, Predicted, Rejected, consumed_objects
from tidemill.storage.tombstones import Tombstones
from tidemill.tasks.scores import Summary
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult
from tidemill.tasks.training.steps import Steps


@dataclass
class Loaded:
    """A committed version in memory. Dropped whenever a step does not end in the commit of exactly this memory."""

    version: Version
    steps: Steps
    """Of the learner; they live as long as it, since to compile them takes a while."""
    tombstones: Tombstones
    owed: tuple[Owed, ...]
    disposed_at: float
    window: deque[Consumed]
    """The last shards that this learner has scored and trained on."""
    cumulative: Summary
    """Of all shards that this learner has seen since the last batch training."""
    gate: Gate | None
    """The last decision in the window."""

    @property
    def learner(self) -> Learner:
        """As it was committed, until the next shard is trained on."""
        return self.steps.learner


@dataclass
class Scored:
    """Scores of one shard before it is trained on."""

    learner: dict[str, float]
    champion: dict[str, float]
    predicted: Predicted | None = None


@dataclass
class Trained:
    """Work on top of a loaded version that is not committed yet."""

    loaded: Loaded
    consumed: list[Consumed] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    new_columns: dict[str, str] = field(default_factory=dict)
    rows: int = 0

    def add(
        self,
        shard: Shard,
        labels: LabelShard | None,
        ordinal: int,
        scored: Scored,
        result: PassResult,
        passes: int,
    ) -> None:
        self.rows += result.rows
        self.consumed.append(
            Consumed(
                inbox=shard.inbox,
                key=shard.info.key,
                sha256=shard.sha256,
                etag=shard.info.etag,
                size=shard.info.size,
                last_modified=shard.info.last_modified,
                ordinal=ordinal,
                rows=result.rows,
                unlabelled=result.unlabelled,
                score=scored.learner,
                champion=scored.champion,
                predicted=scored.predicted,
                labels=labels,
                loss=result.loss,
                passes=passes,
            )
        )

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
    def consumed_objects(self) -> list[Consumed | LabelShard]:
        """The shards, and those of their labels."""
        return list(consumed_objects(self.consumed))

    def metrics(self) -> dict[str, Any]:
        """Prequential metrics of this commit's shards, and the champion's on the same rows."""
        summary = Summary.of(self.consumed)
        champion = {"champion": summary.champion.mean} if summary.champion.mean else {}
        return summary.score.mean | champion

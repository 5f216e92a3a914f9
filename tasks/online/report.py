"""What an online run tells of itself when it ends."""

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from pydantic import BaseModel, PrivateAttr

from tidemill.storage.manifest import Manifest
from tidemill.tasks.scores import Summary

NAMED: Final = 20
"""How many shards a report names with the reason."""


class OnlineReport(BaseModel):
    """What an online run did, and what it left."""

    model: str
    first_version: int | None = None
    head: int
    versions: int = 0
    shards: int = 0
    rows: int = 0
    unlabelled: int = 0
    score: dict[str, float] = {}
    """Prequential: of each shard before training on it, weighted by rows."""
    champion: dict[str, float] = {}
    """Of the champion, on the same shards."""
    recent: dict[str, float] = {}
    """As `score`, of the last `recent_shards` shards, those of earlier runs included."""
    recent_champion: dict[str, float] = {}
    """Of the champion, on the same shards."""
    promoted: int = 0
    """Versions to which the champion's alias has moved."""
    refused: int = 0
    """Versions that the gate found worse than the champion."""
    rejected: int = 0
    last_rejected: dict[str, str] = {}
    """Key -> reason of the last few."""
    duplicates: int = 0
    """Shards that were sent again and removed without training."""
    lost_races: int = 0
    owed: int = 0
    """Consumed shards that could not be deleted yet."""
    waiting: int = 0
    """Shards in the inbox at the last look that were not trained on."""
    oldest_waiting: datetime | None = None
    passed_over: int = 0
    """Those of the waiting shards that stay until a person acts: too large, or not to be read."""
    last_passed_over: dict[str, str] = {}
    """URL -> reason of the last few."""
    _scored: Summary = PrivateAttr(default_factory=Summary)

    def pass_over(self, shards: Mapping[str, str]) -> None:
        """Count shards, URL -> reason, that are passed over since the last look."""
        self.passed_over += len(shards)
        self.last_passed_over = _last({**self.last_passed_over, **shards})

    def add(self, version: Manifest) -> None:
        """Count one committed version."""
        self.versions += 1
        self.first_version = version.version if self.first_version is None else self.first_version
        self._scored.add(version.consumed)
        self.score, self.champion = self._scored.score.mean, self._scored.champion.mean
        recent = Summary.model_validate(version.metrics["recent"])
        self.recent, self.recent_champion = recent.score.mean, recent.champion.mean
        for shard in version.consumed:
            self.shards, self.rows = self.shards + 1, self.rows + shard.rows
            self.unlabelled += shard.unlabelled
        if version.gate is not None:
            self.promoted += version.gate.decision == "promoted"
            self.refused += version.gate.decision == "refused"
        self.rejected += len(version.rejected)
        self.last_rejected = _last(self.last_rejected | {shard.key: shard.reason for shard in version.rejected})


def _last(named: Mapping[str, str]) -> dict[str, str]:
    return dict(list(named.items())[-NAMED:])

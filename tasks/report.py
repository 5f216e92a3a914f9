"""What an online run tells of itself when it ends."""

from datetime import datetime

from pydantic import BaseModel

from storage.manifest import Consumed, Rejected


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

    def add(self, manifest_consumed: tuple[Consumed, ...], rejected: tuple[Rejected, ...], version: int) -> None:
        """Count one committed version."""
        self.versions += 1
        self.first_version = version if self.first_version is None else self.first_version
        for shard in manifest_consumed:
            if scored := shard.rows:
                for name, value in shard.score.items():
                    mean = self.score.get(name, 0.0)
                    self.score[name] = mean + (value - mean) * scored / (self.rows + scored)
            self.shards, self.rows = self.shards + 1, self.rows + shard.rows
            self.unlabelled += shard.unlabelled
        for refused in rejected:
            self.rejected += 1
            self.last_rejected[refused.key] = refused.reason
            while len(self.last_rejected) > 20:
                del self.last_rejected[next(iter(self.last_rejected))]

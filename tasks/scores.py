"""Means of scores over shards, weighted by rows."""

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict

from tidemill.storage.manifest import Consumed


class Means(BaseModel):
    """Each score's mean over the rows of the shards that have it: the area under a curve, say, is missing from some."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mean: dict[str, float] = {}
    rows: dict[str, int] = {}

    def add(self, score: dict[str, float], rows: int) -> None:
        """Count one shard."""
        for name, value in score.items() if rows else ():
            total = self.rows.get(name, 0) + rows
            before = self.mean.get(name, 0.0)
            self.rows[name], self.mean[name] = total, before + (value - before) * rows / total


class Summary(BaseModel):
    """Scores of several shards, each before it was trained on: of the learner, and of the champion on the same rows."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    shards: int = 0
    rows: int = 0
    score: Means = Means()
    champion: Means = Means()

    @classmethod
    def of(cls, shards: Iterable[Consumed]) -> Self:
        """The summary of these shards."""
        summary = cls()
        summary.add(shards)
        return summary

    def add(self, shards: Iterable[Consumed]) -> None:
        """Count more shards."""
        for shard in shards:
            self.shards, self.rows = self.shards + 1, self.rows + shard.rows
            self.score.add(shard.score, shard.rows)
            self.champion.add(shard.champion, shard.rows)


def add_served(means: Means, shards: Iterable[Consumed]) -> Means:
    """Count the scores of the answers that were given, of whichever version, as they stand in shards."""
    for shard in shards:
        for served in shard.served or ():
            means.add(served.score, served.rows)
    return means

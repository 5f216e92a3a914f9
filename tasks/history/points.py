"""Shards as the points of a chart: at most so many, each the mean of several shards in a row where there are more."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tidemill.tasks.history.drawing import Point
from tidemill.tasks.history.reading import History, Made, Shard

POINTS: Final = 240
"""The most points of a chart."""


@dataclass(frozen=True)
class Mean:
    """Consecutive shards, and their scores weighted by rows."""

    first: int
    """The number of its first shard, from 1 on in the history as it was read."""
    shards: tuple[tuple[Made, Shard], ...]
    online: float | None
    """None, here and below: no shard of it has that score."""
    champion: float | None
    frozen: float | None
    low: float | None
    """The lowest of the online scores."""
    high: float | None
    versions: tuple[Made, ...]
    """Those that its shards belong to, and those without a shard that come just before; after the last shard, those too."""

    @property
    def x(self) -> float:
        """Where it is drawn: the middle of its shards."""
        return self.first + (len(self.shards) - 1) / 2

    @property
    def rows(self) -> int:
        """Of all its shards."""
        return sum(shard.rows for _, shard in self.shards)


def means(history: History, frozen: Mapping[int, float], most: int = POINTS) -> list[Mean]:
    """All shards of a history, as at most `most` points.

    Args:
        history: What was read.
        frozen: Scores of the batch model, by the number of the shard: 1 is the first of the history.
        most: How many points there may be.
    """
    size = max(1, math.ceil(len(history.shards) / most))
    metric, found, seen = history.metric, list[Mean](), -1
    for begin in range(0, len(history.shards), size):
        shards = tuple(history.shards[begin : begin + size])
        is_last = begin + size >= len(history.shards)
        newest = history.head.version if is_last else shards[-1][0].number
        numbered = list(enumerate((shard for _, shard in shards), start=begin + 1))
        online = [shard.score.get(metric) for _, shard in numbered]
        there = [score for score in online if score is not None]
        found.append(
            Mean(
                first=begin + 1,
                shards=shards,
                online=_mean(online, numbered),
                champion=_mean([shard.champion.get(metric) for _, shard in numbered], numbered),
                frozen=_mean([frozen.get(number) for number, _ in numbered], numbered),
                low=min(there, default=None),
                high=max(there, default=None),
                versions=tuple(version for version in history.versions if seen < version.number <= newest),
            )
        )
        seen = newest
    return found


def _mean(scores: Sequence[float | None], shards: Sequence[tuple[int, Shard]]) -> float | None:
    """Weighted by rows, over the shards that have a score."""
    weighted = [(score, shard.rows) for score, (_, shard) in zip(scores, shards, strict=True) if score is not None]
    rows = sum(rows for _, rows in weighted)
    return sum(score * rows for score, rows in weighted) / rows if rows else None


def trailing(points: Sequence[Mean], values: Sequence[float | None], width: int) -> list[Point]:
    """At each point the mean of the last `width` values up to it, weighted by rows; a gap where the value is missing."""
    smoothed: list[Point] = []
    for i, point in enumerate(points):
        near = range(max(0, i - width + 1), i + 1)
        weighted = [(value, points[j].rows) for j in near if (value := values[j]) is not None]
        rows = sum(rows for _, rows in weighted)
        there = values[i] is not None and rows
        smoothed.append((point.x, sum(value * rows for value, rows in weighted) / rows if there else None))
    return smoothed


def difference(points: Sequence[Mean], metric: str, other: Callable[[int, Shard], float | None]) -> list[Point]:
    """By how many percent the online error differs from another one, over the rows of all shards up to there.

    Args:
        points: The points to find it at.
        metric: The score.
        other: From the number of a shard, and the shard, to the other score on it. A shard without both scores does not count.
    """
    mine = theirs = 0.0
    found: list[Point] = []
    for point in points:
        for number, (_, shard) in enumerate(point.shards, start=point.first):
            online, compared = shard.score.get(metric), other(number, shard)
            if online is not None and compared is not None:
                mine, theirs = mine + online * shard.rows, theirs + compared * shard.rows
        found.append((point.x, (mine / theirs - 1) * 100 if theirs > 0 else None))
    return found

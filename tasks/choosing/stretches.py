"""The scores of two histories of the same shards, side by side: what a backtest tells."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tidemill.tasks.choosing.results import Stretch
from tidemill.tasks.history.reading import History
from tidemill.tasks.scores import Means

STRETCHES: Final = 10
"""How many rows a table has at most, beside the total."""


@dataclass(frozen=True)
class Pair:
    """One shard."""

    version: int
    """Of the log."""
    rows: int
    spec: dict[str, float]
    learner: dict[str, float]
    champion: dict[str, float]


def paired(history: History, scores: Sequence[tuple[str, dict[str, float]]]) -> list[Pair]:
    """The shards of a log, each with the scores that the backtest has for it: (key, scores), in order."""
    pairs = []
    for (version, shard), (key, found) in zip(history.shards, scores, strict=True):
        assert shard.key == key, "both go through the same shards"
        pairs.append(Pair(version.number, shard.rows, found, shard.score, shard.champion))
    return pairs


def cut(pairs: Sequence[Pair], metric: str, most: int = STRETCHES) -> list[Stretch]:
    """All shards, as at most `most` stretches of about as many shards each."""
    count = min(most, len(pairs))
    edges = [round(i * len(pairs) / count) for i in range(count + 1)] if count else []
    return [_stretch(pairs, metric, begin, end) for begin, end in pairwise(edges)]


def whole(pairs: Sequence[Pair], metric: str) -> Stretch:
    """All shards as one stretch."""
    if not pairs:
        return Stretch(first=0, last=0, begin=0, shards=0, rows=0, spec=None, learner=None, champion=None)
    return _stretch(pairs, metric, 0, len(pairs))


def _stretch(pairs: Sequence[Pair], metric: str, begin: int, end: int) -> Stretch:
    there = pairs[begin:end]

    def mean(scores: Callable[[Pair], dict[str, float]]) -> float | None:
        means = Means()
        for pair in there:
            if metric in (found := scores(pair)):
                means.add({metric: found[metric]}, pair.rows)
        return means.mean.get(metric)

    return Stretch(
        first=there[0].version,
        last=there[-1].version,
        begin=begin,
        shards=len(there),
        rows=sum(pair.rows for pair in there),
        spec=mean(lambda pair: pair.spec),
        learner=mean(lambda pair: pair.learner),
        champion=mean(lambda pair: pair.champion),
    )


def difference(pairs: Iterable[Pair], metric: str) -> tuple[float, float | None] | None:
    """(mean of spec minus learner, its standard error), over the shards that have both; None: no shard has.

    The mean is weighted by rows. Its standard error is that of a ratio of sums over shards taken as independent
    (Cochran, Sampling Techniques, 1977, section 6.3); None: there is one shard.
    """
    both = [
        (pair.rows, pair.spec[metric] - pair.learner[metric])
        for pair in pairs
        if metric in pair.spec and metric in pair.learner
    ]
    rows = sum(count for count, _ in both)
    if not rows:
        return None
    mean = math.fsum(count * between for count, between in both) / rows
    if len(both) < 2:
        return mean, None
    squares = math.fsum((count * (between - mean)) ** 2 for count, between in both)
    return mean, math.sqrt(squares * len(both) / (len(both) - 1)) / rows


def same(pairs: Iterable[Pair]) -> int:
    """Shards on which all scores are the same, exactly."""
    return sum(pair.spec == pair.learner for pair in pairs)

"""Test, then train: every learner predicts a whole shard before it learns from it, and its settings are chosen before.

Settings are chosen by the same protocol on the batch part alone: trained on its first 70%, scored on the rest, and averaged
over the seeds, since one seed is mostly luck. The learning rate is chosen with few epochs; then the best one and its
neighbours are tried with many.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from benchmarks.learning.streams import Stream, Y
from tidemill.tasks.training.errors import TrainingError

RATES: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS: Final = (2, 10)
METRICS: Final = {"regression": ("mae", "rmse"), "binary": ("error", "log_loss")}


@dataclass(frozen=True)
class Settings:
    """What is chosen for each learner, from the same grid for all."""

    rate: float  # learning rate
    epochs: int  # passes over the batch part


class Learner(Protocol):
    """Predictions are values (regression) or probabilities of class 1 (binary), float64 [rows]."""

    def fit(self, table: pa.Table) -> None:
        """Batch training."""
        ...

    def predict(self, table: pa.Table) -> np.ndarray: ...

    def learn(self, table: pa.Table) -> None:
        """One shard of the stream."""
        ...


Make = Callable[[Stream, Settings, int], Learner]  # the int is the seed


@dataclass
class Trace:
    """Predictions for each shard, made before it was learned; and those of the probe before the first shard and after each."""

    shards: list[np.ndarray] = field(default_factory=list)
    probe: list[np.ndarray] = field(default_factory=list)


def run(learner: Learner, stream: Stream) -> Trace | None:
    """Batch training, then the stream. None: the learner diverged and stopped with an error."""
    try:
        learner.fit(stream.batch)
        return _prequential(learner, stream)
    except (TrainingError, ArithmeticError, ValueError):  # non-finite in ours; overflow, or refused by scikit-learn
        return None


def _prequential(learner: Learner, stream: Stream) -> Trace:
    trace = Trace()
    if stream.probe is not None:
        trace.probe.append(learner.predict(stream.probe))
    for shard in stream.shards:
        trace.shards.append(learner.predict(shard))
        learner.learn(shard)
        if stream.probe is not None:
            trace.probe.append(learner.predict(stream.probe))
    return trace


def errors(stream: Stream, predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """mae and rmse, or error rate and log loss (natural, probabilities kept 1e-6 away from 0 and 1)."""
    with np.errstate(all="ignore"):  # a diverged learner has an infinite error
        if stream.task == "regression":
            off = predicted - actual
            found = {"mae": np.abs(off).mean(), "rmse": np.sqrt(np.square(off).mean())}
        else:
            p = np.clip(predicted, 1e-6, 1 - 1e-6)
            found = {
                "error": ((predicted > 0.5) != (actual > 0.5)).mean() if np.isfinite(predicted).all() else math.inf,
                "log_loss": -np.where(actual > 0.5, np.log(p), np.log1p(-p)).mean(),
            }
    return {name: float(value) if np.isfinite(value) else math.inf for name, value in found.items()}


def targets(tables: Iterable[pa.Table]) -> np.ndarray:
    return np.concatenate([table[Y].to_numpy() for table in tables])


def choose(make: Make, streams: Sequence[Stream]) -> Settings:
    """The settings with the lowest training loss on the last 30% of the batch part, in the mean over the streams of all seeds."""
    heads = [stream.head() for stream in streams]
    metric = {"mse": "rmse", "l1": "mae", "bce": "log_loss"}[streams[0].loss]

    def loss(settings: Settings) -> float:
        total = 0.0
        for seed, head in enumerate(heads):
            trace = run(make(head, settings, seed), head)
            if trace is None:
                return math.inf
            total += errors(head, np.concatenate(trace.shards), targets(head.shards))[metric]
        return total / len(heads)

    few, many = EPOCHS
    found = {Settings(rate, few): loss(Settings(rate, few)) for rate in RATES}
    best = RATES.index(min(found, key=found.__getitem__).rate)
    for rate in RATES[max(0, best - 1) : best + 2]:
        found[Settings(rate, many)] = loss(Settings(rate, many))
    return min(found, key=found.__getitem__)


def summary(stream: Stream, trace: Trace | None) -> dict[str, Any]:
    """Errors over the whole stream, by shard, and, where a concept returns, what was forgotten of it.

    Infinite for a learner that diverged.
    """
    if trace is None:
        return dict.fromkeys(METRICS[stream.task], math.inf)
    found: dict[str, Any] = dict(errors(stream, np.concatenate(trace.shards), targets(stream.shards)))
    metric = METRICS[stream.task][stream.loss == "mse"]
    by_shard = [
        errors(stream, predicted, targets([shard]))[metric]
        for predicted, shard in zip(trace.shards, stream.shards, strict=True)
    ]
    found["by_shard"] = by_shard
    if stream.probe is not None:
        probes = [errors(stream, predicted, targets([stream.probe]))[metric] for predicted in trace.probe]
        returns = [i for i in range(1, len(by_shard)) if stream.concepts[i - 1 : i + 1] == ("B", "A")]
        found["probe_before"] = probes[0]
        found["probe_after"] = float(np.mean([probes[i] for i in returns]))
        found["at_return"] = float(np.mean([by_shard[i] for i in returns]))
    return found

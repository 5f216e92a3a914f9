"""Scores in bounded memory.

Shape legend: B rows of a batch.
"""

import math
from collections.abc import Callable
from typing import Final, Protocol

import torch
from torch import Tensor

from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.imports import imported
from tidemill.tasks.training.spec import Spec

# Even in logits, so that probabilities near 0 and 1, where rare classes live, get their share of the bins.
AUROC_EDGES: Final = torch.linspace(-16.0, 16.0, 1025, dtype=torch.float32)


class Metric(Protocol):
    """Adds up over batches; what torchmetrics calls a metric is one. Ours need not its imports, 1.8 s of CPU time."""

    def reset(self) -> None:
        """Forget all batches."""
        ...

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        """Take in a batch: values and targets in units of the target for regression, else probabilities and int64 labels."""
        ...

    def compute(self) -> Tensor | float:
        """The value over all batches since `reset`."""
        ...


class Mean:
    """Mean of a measure of each value, over all values of all batches; sums in float64."""

    def __init__(
        self, measure: Callable[[Tensor, Tensor], Tensor], of_mean: Callable[[float], float] = lambda mean: mean
    ) -> None:
        """`measure`: (predicted, actual) to one number for each value; `of_mean`: what becomes of their mean."""
        self._measure, self._of_mean = measure, of_mean
        self.reset()

    def reset(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        found = self._measure(predicted, actual)
        self._sum += found.sum(dtype=torch.float64).item()
        self._count += found.numel()

    def compute(self) -> float:
        """NaN if there were no values."""
        return self._of_mean(self._sum / self._count) if self._count else math.nan


def _absolute_error(predicted: Tensor, actual: Tensor) -> Tensor:
    return (predicted - actual).abs_()


def _squared_error(predicted: Tensor, actual: Tensor) -> Tensor:
    difference = predicted - actual
    return difference.mul_(difference)


def _is_right_of_two(probability: Tensor, label: Tensor) -> Tensor:
    return (probability > 0.5) == label


def _is_right(probability_BO: Tensor, label_B: Tensor) -> Tensor:
    return probability_BO.argmax(1) == label_B


class BinnedAUROC:
    """Area under the ROC curve, from counts of each class in bins of the logit: rows of one bin count as tied.

    The area is the probability that a row of class 1 is ranked above one of class 0, half for ties (Hanley and McNeil
    1982, https://doi.org/10.1148/radiology.143.1.7063747). BinaryAUROC(thresholds=n) compares every row with every
    threshold: measured at a tenth of this speed.
    """

    counts: Tensor  # int64 [2, bins]: rows of class 0 and of class 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(2, len(AUROC_EDGES) + 1, dtype=torch.int64)

    def update(self, probability_B: Tensor, label_B: Tensor) -> None:
        """float probabilities of class 1, int64 labels; of several targets, those of all count alike."""
        bin_B = torch.bucketize(probability_B.flatten().logit(), AUROC_EDGES)
        bins = self.counts.shape[1]
        self.counts += torch.bincount(label_B.flatten() * bins + bin_B, minlength=2 * bins).view(2, bins)

    def compute(self) -> Tensor:
        """The area, float64; NaN while only one class has occurred."""
        negatives, positives = self.counts.double()
        lower = negatives.cumsum(0) - negatives
        area: Tensor = (positives * (lower + negatives / 2)).sum() / (positives.sum() * negatives.sum())
        return area


def metrics_of(spec: Spec) -> dict[str, Metric]:
    """Fresh metrics of the spec's task and of its own choice, by name (of a class: its name in lower case).

    Raises:
        FactoryError: one of the spec's own is no torchmetrics class that needs no arguments.
    """
    return _of_the_task(spec) | dict(_users(name) for name in spec.metrics)


def number_of(metric: Metric) -> float:
    """What a metric gives, as one number.

    Raises:
        FactoryError: it gives something else.
    """
    value = metric.compute()
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.item())
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise FactoryError(f"it gives {shape}, not one number: name a metric that gives one, or average it")


def _of_the_task(spec: Spec) -> dict[str, Metric]:
    if spec.task == "regression":
        return {"mae": Mean(_absolute_error), "rmse": Mean(_squared_error, math.sqrt)}
    if spec.task == "binary":
        return {"accuracy": Mean(_is_right_of_two), "auroc": BinnedAUROC()}
    return {"accuracy": Mean(_is_right)}


def _never() -> bool:
    return False


def _users(name: str) -> tuple[str, Metric]:
    make = imported(name, "metrics")
    try:
        metric = make()
    except Exception as error:  # the user's code may raise anything
        raise FactoryError(
            f"metrics {name!r} raised {type(error).__name__}: {error}: it is called without arguments"
        ) from error
    from torchmetrics import (
        Metric as TorchMetric,
    )  # which the import of the user's class has brought along, if it is one

    if not isinstance(metric, TorchMetric):
        raise FactoryError(f"metrics {name!r} returned {type(metric).__name__}: name a class of torchmetrics.Metric")
    for part in metric.modules():  # one metric may hold others
        if isinstance(part, TorchMetric):  # one of several ranks scores: it would wait for the others to add theirs
            part.distributed_available_fn = _never
    return name.rpartition(":")[2].rpartition(".")[2].lower(), metric

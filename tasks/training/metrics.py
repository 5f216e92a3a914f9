"""Scores in bounded memory.

Shape legend: B rows of a batch.
"""

from typing import Final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.imports import imported
from tidemill.tasks.training.spec import Spec

# Even in logits, so that probabilities near 0 and 1, where rare classes live, get their share of the bins.
AUROC_EDGES: Final = torch.linspace(-16.0, 16.0, 1025, dtype=torch.float32)


class BinnedAUROC(Metric):
    """Area under the ROC curve, from counts of each class in bins of the logit: rows of one bin count as tied.

    The area is the probability that a row of class 1 is ranked above one of class 0, half for ties (Hanley and McNeil
    1982, https://doi.org/10.1148/radiology.143.1.7063747). BinaryAUROC(thresholds=n) compares every row with every
    threshold: measured at a tenth of this speed.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor  # int64 [2, bins]: rows of class 0 and of class 1

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, len(AUROC_EDGES) + 1, dtype=torch.int64), dist_reduce_fx="sum")

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

    They are updated with (values, targets) in units of the target for regression, else (probabilities, int64 labels).
    Raises FactoryError: one of the spec's own is no torchmetrics class that needs no arguments.
    """
    return _of_the_task(spec) | dict(_users(name) for name in spec.metrics)


def number_of(metric: Metric) -> float:
    """What a metric gives, as one number. Raises FactoryError: it gives something else."""
    value = metric.compute()
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.item())
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise FactoryError(f"it gives {shape}, not one number: name a metric that gives one, or average it")


def _of_the_task(spec: Spec) -> dict[str, Metric]:
    if spec.task == "regression":
        found: dict[str, Metric] = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
        return {name: metric.set_dtype(torch.float64) for name, metric in found.items()}
    if spec.task == "binary":
        return {"accuracy": BinaryAccuracy(), "auroc": BinnedAUROC()}
    assert spec.classes is not None, "the spec's validator asks for it"
    return {"accuracy": MulticlassAccuracy(spec.classes, average="micro")}


def _users(name: str) -> tuple[str, Metric]:
    make = imported(name, "metrics")
    try:
        metric = make()
    except Exception as error:  # the user's code may raise anything
        raise FactoryError(
            f"metrics {name!r} raised {type(error).__name__}: {error}: it is called without arguments"
        ) from error
    if not isinstance(metric, Metric):
        raise FactoryError(f"metrics {name!r} returned {type(metric).__name__}: name a class of torchmetrics.Metric")
    return name.rpartition(":")[2].rpartition(".")[2].lower(), metric

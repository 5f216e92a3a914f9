"""Errors row by row, so that two models are compared on the same rows.

Shape legend: N held-out rows, B rows of a batch, O classes.
"""

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

Measure = Literal["rmse", "mae", "log_loss"]
"""By what specs are compared; lower is better."""

CLIP: Final = torch.finfo(torch.float32).eps
"""Probabilities are taken as no nearer to 0 and 1 than this: a float32 cannot tell them from certainty."""


def _squared(predicted: Tensor, actual: Tensor) -> Tensor:
    return (predicted.double() - actual.double()).square()


def _absolute(predicted: Tensor, actual: Tensor) -> Tensor:
    return (predicted.double() - actual.double()).abs()


def _surprise(predicted: Tensor, actual: Tensor) -> Tensor:
    """-log of the probability that was given to what came: of one of two labels, or of O classes (`predicted` [B, O])."""
    if predicted.ndim > actual.ndim:
        probability = predicted.double().gather(1, actual.long().unsqueeze(1)).squeeze(1)
    else:
        probability = torch.where(actual == 1, predicted.double(), 1 - predicted.double())
    return -probability.clamp(CLIP, 1 - CLIP).log()


_ERRORS: Final[dict[Measure, Callable[[Tensor, Tensor], Tensor]]] = {
    "rmse": _squared,
    "mae": _absolute,
    "log_loss": _surprise,
}


class RowErrors:
    """A metric (`tidemill.tasks.training.metrics.Metric`) that keeps the error of every row: 8 bytes a row.

    No weight of classes or rows counts, nor which loss a spec trains with: so it is the same measure for all of them.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure: Measure = measure
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._parts: list[Tensor] = []

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        """Take in a batch: values, or probabilities and labels. Of several targets the mean counts."""
        errors = _ERRORS[self.measure](predicted, actual)
        self._parts.append(errors.reshape(len(errors), -1).mean(1))

    @property
    def errors_N(self) -> Tensor:
        """float64 [N]: squared, absolute or logarithmic, in the order of the rows."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0, dtype=torch.float64)

    def compute(self) -> float:
        """The measure over all rows; NaN if there were none."""
        return _value(self.errors_N, self.measure)


def _value(errors_N: Tensor, measure: Measure) -> float:
    mean = errors_N.mean().item()
    return math.sqrt(mean) if measure == "rmse" else mean


def difference(one_N: Tensor, other_N: Tensor, measure: Measure) -> tuple[float, float]:
    """By how much the measure of the first is higher than the other's on the same rows, and the standard error of that.

    The standard error is that of a mean of N paired differences, the rows taken as independent. For the root of a mean square it
    follows by a - b = (a^2 - b^2) / (a + b), the divisor taken as known (the delta method).

    Args:
        one_N: float64 [N], errors of the rows as `RowErrors` keeps them.
        other_N: The same of the other, in the same order.
        measure: What they are errors of.

    Returns:
        (difference, standard error); the latter is NaN for a single row.
    """
    between_N = one_N - other_N
    mean, error = between_N.mean().item(), between_N.std().item() / math.sqrt(len(between_N))
    if measure != "rmse":
        return mean, error
    both = _value(one_N, measure) + _value(other_N, measure)
    return (mean / both, error / both) if both else (0.0, 0.0)

"""Loss and metrics of outputs beside their targets, added up over batches.

Shape legend: B rows of a batch, O outputs.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tidemill.tasks.training.calling import told
from tidemill.tasks.training.errors import described, of_the_machine
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.losses import loss_of
from tidemill.tasks.training.metrics import number_of

logger = logging.getLogger("tidemill.training")


class Scoring:
    """The scores of one network. Its metrics are reset, and so there is one at a time."""

    def __init__(self, learner: Learner | Network, total: Tensor) -> None:
        """`total`: a zero on the device, to which losses are added."""
        self._learner, self._total, self.rows = learner, total, 0
        self._loss, self._metrics = loss_of(learner.spec, learner.features), learner.metrics
        self.left_out: dict[str, str] = {}
        """Metrics that could not be computed, with the reason."""
        for metric in self._metrics.values():
            metric.reset()

    def add(self, output: Tensor, y: Tensor, w_B: Tensor | None, predicted: Tensor, actual: Tensor) -> None:
        """Take in a batch.

        Args:
            output: What a model returns, on the device, [B] or [B, O].
            y: Targets on the device, as the loss takes them.
            w_B: Sample weights.
            predicted: Values in units of the target, or probabilities.
            actual: The targets as they were encoded, on the CPU.
        """
        task = self._learner.spec.task
        with told(f"loss {self._learner.spec.loss_name!r}", output, y):
            self._total.add_(self._loss(output, y, w_B), alpha=len(y))
        self.rows += len(y)
        if task == "regression":
            actual = unscaled(self._learner, actual)
        elif task == "binary":
            actual = actual.long()
        for name, metric in self._metrics.items():
            if name not in self.left_out:
                with _leaving_out(name, self.left_out):
                    metric.update(predicted, actual)

    def result(self, where: str) -> tuple[float, dict[str, float]]:
        """(mean of the loss over the rows, the metrics); what is left out is warned of, `where` names the rows."""
        numbers: dict[str, float] = {}
        for name, metric in self._metrics.items():
            if name not in self.left_out:
                with _leaving_out(name, self.left_out):
                    numbers[name] = number_of(metric)
        for name, reason in self.left_out.items():
            logger.warning("metric %s of %s (%d rows) is left out: %s", name, where, self.rows, reason)
        if math.isnan(numbers.get("auroc", 0.0)):  # the area under the curve needs both classes
            del numbers["auroc"]
        return self._total.item() / self.rows, numbers


@contextmanager
def _leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Notes why a metric fails: the code of a metric may raise anything, and it only tells of the model."""
    try:
        yield
    except Exception as error:
        if of_the_machine(error):
            raise
        left_out[name] = described(error)


def unscaled(learner: Learner | Network, values: Tensor) -> Tensor:
    """Values of the target (float64) of what a network for regression is trained on or returns."""
    features, values = learner.features, values.cpu().double()
    if not features.standardize_target or features.statistics is None:
        return values
    return values * features.statistics.target_std + features.statistics.target_mean


def scaled(learner: Learner | Network, values: Tensor) -> Tensor:
    """The way back: what a network for regression would return (float32)."""
    features = learner.features
    if not features.standardize_target or features.statistics is None:
        return values.float()
    return ((values.double() - features.statistics.target_mean) / features.statistics.target_std).float()


def as_output(learner: Learner | Network, predicted: Tensor) -> Tensor:
    """What a network would return for these predictions: values in units of the target, or probabilities, [B] or [B, O]."""
    if learner.spec.task == "regression":
        return scaled(learner, predicted)
    tiny = torch.finfo(torch.float32).tiny
    if learner.spec.task == "binary":
        return predicted.double().clamp(tiny, 1 - torch.finfo(torch.float32).eps).logit().float()
    return predicted.clamp(min=tiny).log()

"""The predictor that any model must beat: it gives the same outputs for every row, as the training rows have them on average.

Shape legend: N rows, B rows of a batch, F numbers of one row, O outputs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.spec import Spec


class Constant(nn.Module):
    """Gives the same outputs for every row."""

    def __init__(self, outputs_O: Tensor) -> None:
        super().__init__()
        self.outputs_O = nn.Parameter(outputs_O, requires_grad=False)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, O]."""
        return self.outputs_O.expand(len(x_BF), -1)


def baseline(spec: Spec, features: Features, class_counts: Sequence[int] | None) -> Network:
    """The mean of each target for regression; for classification the base rates, and so the majority class.

    It reads no input column, and is scored as any other predictor is: `score(baseline(...), groups, split)`.

    Args:
        spec: The resolved spec.
        features: With the statistics of the training rows.
        class_counts: Training rows of each class; None: the means of the targets say it, which are 0 and 1 if not numbers.
    """
    seen = features.statistics
    assert seen is not None, "fit() comes before baseline()"
    if spec.task == "regression":
        outputs_O = torch.zeros(len(spec.targets)) if features.standardize_target else seen.target_mean.float()
    else:
        outputs_O = _logits(spec, seen.target_mean, seen.labelled or seen.rows, class_counts)
    none = torch.empty(0, dtype=torch.float64)
    blind = replace(
        features,
        columns=(),
        standardize_features=False,
        running_statistics=False,
        statistics=replace(seen, nulls=(), mean_F=none, std_F=none, moments=None),
    )
    return Network(spec, blind, Constant(outputs_O))


def _logits(spec: Spec, mean_T: Tensor, rows: int, class_counts: Sequence[int] | None) -> Tensor:
    """float32 [O]: those whose probabilities are the base rates, each class counted half a row more: none is impossible."""
    if spec.task == "binary":
        ones_T = mean_T * rows if class_counts is None else torch.tensor([float(class_counts[1])], dtype=torch.float64)
        total = rows if class_counts is None else sum(class_counts)
        return ((ones_T + 0.5) / (total - ones_T + 0.5)).log().float()
    assert class_counts is not None, "the pass counts the classes of one target"
    count_O = torch.tensor(class_counts, dtype=torch.float64) + 0.5
    return (count_O / count_O.sum()).log().float()

"""Our own metrics are those of torchmetrics, without its import."""

import math
import subprocess
import sys

import pytest
import torch
import torchmetrics
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from tests.training.rows import plain_spec
from tidemill.tasks.training.metrics import Metric, metrics_of, number_of

SIZES = (8192, 1, 300)


def over(metric: Metric | torchmetrics.Metric, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    metric.reset()
    for predicted, actual in batches:
        metric.update(predicted, actual)
    return number_of(metric)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("targets", [(), (3,)])
@pytest.mark.parametrize("scale", [1.0, 1e9, 1e-200])
def test_errors_have_the_bits_of_torchmetrics_in_float64(targets: tuple[int, ...], scale: float) -> None:
    batches = [(scale * normal(n, *targets, seed=n), scale * normal(n, *targets, seed=n + 1)) for n in SIZES]
    ours = metrics_of(plain_spec(task="regression"))
    theirs = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
    for name, metric in theirs.items():
        expected = over(metric.set_dtype(torch.float64), batches)
        for _ in range(2):  # after a reset too
            assert over(ours[name], batches) == expected


def test_one_value_far_out_is_not_lost_among_many() -> None:
    """In float32 the sum of 2**24 and a one is 2**24."""
    mae = metrics_of(plain_spec(task="regression"))["mae"]
    zero = torch.zeros(1, dtype=torch.float64)
    assert over(mae, [(zero + 2.0**24, zero), *[(zero + 1, zero)] * 3]) == (2**24 + 3) / 4


@pytest.mark.parametrize("targets", [(), (2,)])
def test_the_accuracy_of_two_classes(targets: tuple[int, ...]) -> None:
    batches = [(normal(n, *targets, seed=n).float().sigmoid(), (normal(n, *targets) > 0).long()) for n in SIZES]
    found = over(metrics_of(plain_spec(task="binary"))["accuracy"], batches)
    assert found == pytest.approx(over(BinaryAccuracy(), batches), rel=1e-6)
    right = sum(int(((p > 0.5).long() == y).sum()) for p, y in batches)
    assert found == right / sum(y.numel() for _, y in batches)


def test_the_accuracy_of_several_classes() -> None:
    batches = [(normal(n, 4, seed=n).float().softmax(1), torch.arange(n) % 4) for n in SIZES]
    found = over(metrics_of(plain_spec(task="multiclass", classes=4))["accuracy"], batches)
    assert found == pytest.approx(over(MulticlassAccuracy(4, average="micro"), batches), rel=1e-6)


def test_the_area_under_the_curve() -> None:
    logits = [normal(n, seed=n).float() for n in SIZES]
    batches = [(z.sigmoid(), (z + normal(len(z), seed=1) > 0).long()) for z in logits]
    found = over(metrics_of(plain_spec(task="binary"))["auroc"], batches)
    assert found == pytest.approx(over(BinaryAUROC(), batches), abs=1e-3)


def test_values_that_are_not_finite_stay_so() -> None:
    nan = torch.tensor([math.nan], dtype=torch.float64)
    for metric in metrics_of(plain_spec(task="regression")).values():
        assert math.isnan(over(metric, [(nan, nan)]))
    assert over(metrics_of(plain_spec(task="binary"))["accuracy"], [(nan.float(), nan.long())]) in (0.0, 1.0)


@pytest.mark.slow
def test_torchmetrics_is_imported_only_for_what_a_spec_names() -> None:
    code = """
import sys
from tests.training.rows import plain_spec
from tidemill.tasks.training import loop
from tidemill.tasks.training.metrics import metrics_of
for task in ({"task": "regression"}, {"task": "binary"}, {"task": "multiclass", "classes": 3}):
    metrics_of(plain_spec(**task))
assert "torchmetrics" not in sys.modules
assert list(metrics_of(plain_spec(task="regression", metrics=["torchmetrics.regression:R2Score"]))) == ["mae", "rmse", "r2score"]
assert "torchmetrics" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)

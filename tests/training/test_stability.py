"""What keeps training stable: schedules, clipping, averaged weights, weights of rows and classes, mixed precision, devices."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

from tests.training.rows import WHERE, TableGroup, begin, cut, numbers_table, plain_spec, same_bits
from tidemill.tasks.training.errors import FactoryError, OutputShapeError, SpecError
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, score, train_pass
from tidemill.tasks.training.steps import Steps

TABLE = numbers_table(96, 3)
GROUPS = cut(TABLE)


def trained(epochs: int = 3, **settings) -> Learner:
    learner = begin(plain_spec(3, batch_size=8, learning_rate=0.1, **settings), GROUPS)
    for epoch in range(epochs):
        train_pass(Steps(learner), GROUPS, key=("epoch", epoch))
    return learner


def by_hand(steps: int, make=None, clip: float | None = None) -> nn.Module:
    """A plain loop over the same rows; `make` gives a torch scheduler."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = make(optimizer) if make else None
    x_NF = torch.tensor([TABLE.column(f"x{i}").to_pylist() for i in range(3)]).T.contiguous()
    y_N = torch.tensor(TABLE.column("y").to_pylist())
    for step in range(steps):
        rows = slice(step * 8 % 96, step * 8 % 96 + 8)
        optimizer.zero_grad()
        functional.mse_loss(model(x_NF[rows]), y_N[rows].unsqueeze(1)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model


def warmed(optimizer):
    rise = lr_scheduler.LinearLR(optimizer, 1 / 6, total_iters=5)
    main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    return lr_scheduler.SequentialLR(optimizer, [rise, main], [5])


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ({"name": "exponential", "arguments": {"gamma": 0.9}}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        ({"name": "multistep", "arguments": {"milestones": [5, 20]}}, lambda o: lr_scheduler.MultiStepLR(o, [5, 20])),
        (
            {"name": "cosine_restarts", "arguments": {"T_0": 7}},
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
        ),
        ({"name": "cosine", "arguments": {"T_max": 30}, "warmup_steps": 5}, warmed),
    ],
)
def test_a_schedule_is_torchs(schedule, make):
    assert same_bits(trained(schedule=schedule).model.weight, by_hand(36, make).weight)


SCHEDULES = [
    {"name": "constant"},
    {"name": "linear", "arguments": {"total_iters": 30}},
    {"name": "step", "arguments": {"step_size": 9}},
    {"name": "multistep", "arguments": {"milestones": [10, 25]}},
    {"name": "exponential", "arguments": {"gamma": 0.97}},
    {"name": "cosine", "arguments": {"T_max": 40}},
    {"name": "cosine_restarts", "arguments": {"T_0": 10, "T_mult": 2}},
    {"name": "polynomial", "arguments": {"total_iters": 30}},
]


@pytest.mark.slow
@pytest.mark.parametrize("warmup_steps", [0, 20])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["name"])
def test_a_learner_stored_and_loaded_goes_on_with_the_same_rates(schedule, warmup_steps):
    settings = {"schedule": {**schedule, "warmup_steps": warmup_steps}, "ema_decay": 0.9, "optimizer": {"name": "adam"}}
    straight, stored = trained(0, **settings), trained(0, **settings)
    for epoch in range(3):
        for learner in (straight, stored):
            train_pass(Steps(learner), GROUPS, key=("epoch", epoch))
        stored = Learner.load(stored.spec, *stored.dump())
    assert stored.dump() == straight.dump()
    assert stored.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


def test_warming_up_rises_to_the_full_rate():
    learner = trained(0, schedule={"warmup_steps": 4})
    rates = []
    for _ in range(6):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        learner.optimizer.step()
        learner.schedule.step()
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_what_a_schedule_does_not_take_is_named():
    with pytest.raises(SpecError, match=r"schedule.arguments: cosine refuses .*T_min"):
        trained(0, schedule={"name": "cosine", "arguments": {"T_min": 1}})


def test_clipping_is_torchs():
    clipped = trained(clip_norm=0.1).model.weight
    assert same_bits(clipped, by_hand(36, clip=0.1).weight)
    assert not same_bits(clipped, by_hand(36).weight)


# ---- averaged weights ------------------------------------------------------------------------------------------------
def test_averaged_weights_follow_the_formula_and_are_what_is_scored_stored_and_served():
    """ema = decay * ema + (1 - decay) * weight, from the first step's weight on."""
    learner = begin(plain_spec(3, batch_size=8, learning_rate=0.1, ema_decay=0.9), GROUPS)
    plain = begin(plain_spec(3, batch_size=96, learning_rate=0.1), GROUPS)
    expected = None
    for step in range(12):  # one batch a pass, so that each step's weights can be seen
        part = cut(TABLE.slice(step * 8, 8))
        train_pass(Steps(learner), part, key=("epoch", step))
        train_pass(Steps(plain), part, key=("epoch", step))
        weight = plain.model.weight.detach().clone()
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
    assert same_bits(learner.model.weight, plain.model.weight)
    assert torch.allclose(learner.served.weight, expected)
    weights, state = learner.dump()
    loaded = Learner.load(learner.spec, weights, state)
    assert score(loaded, GROUPS) == score(learner, GROUPS) != score(plain, GROUPS)
    assert torch.equal(next(predict(loaded, GROUPS)), next(predict(learner, GROUPS)))
    plain.model.load_state_dict(loaded.served.state_dict())
    assert score(plain, GROUPS) == score(learner, GROUPS)


def test_a_frozen_copy_does_not_move():
    learner = trained(1)
    frozen, before = learner.network(), score(learner, GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 1))
    assert score(frozen, GROUPS) == before != score(learner, GROUPS)


# ---- weights in the loss ---------------------------------------------------------------------------------------------
def weighted_table(weights):
    return TABLE.append_column("w", [weights])


def test_a_weight_of_two_counts_as_two_rows_would():
    """Gradients of one full batch: the mean over samples of weight * loss."""
    weights = [float(i % 3) for i in range(96)]
    spec = plain_spec(3, batch_size=1000, learning_rate=0.1, sample_weight="w")
    learner = begin(spec, cut(weighted_table(weights)))
    reference = copy.deepcopy(learner.model)
    train_pass(Steps(learner), cut(weighted_table(weights)), key=("epoch", 0))
    x_NF = torch.tensor([TABLE.column(f"x{i}").to_pylist() for i in range(3)]).T
    error_N = reference(x_NF).squeeze(1) - torch.tensor(TABLE.column("y").to_pylist())
    (torch.tensor(weights) * error_N**2).mean().backward()
    expected = reference.weight - 0.1 * reference.weight.grad
    assert torch.allclose(learner.model.weight, expected)


def class_table(positive: int):
    return TABLE.set_column(3, "y", [[int(i < positive) for i in range(96)]])


@pytest.mark.parametrize("task", [{"task": "binary"}, {"task": "multiclass", "classes": 2}])
def test_class_weights_weigh_the_rows_of_a_class(task):
    groups = cut(class_table(24))
    spec = plain_spec(3, batch_size=1000, class_weights=[0.5, 4], **task)
    learner = begin(spec, groups)
    nothing = torch.zeros((), dtype=torch.float32)
    for parameter in learner.model.parameters():
        parameter.data.copy_(nothing)  # every row's loss is log 2
    assert score(learner, groups).loss == pytest.approx(math.log(2) * (72 * 0.5 + 24 * 4) / 96)


def test_balanced_classes_weigh_alike():
    groups = cut(class_table(24))
    spec = plain_spec(3, batch_size=1000, class_weights="balanced", task="binary")
    weights = begin(spec, groups).features.class_weights
    assert weights.tolist() == pytest.approx([96 / (2 * 72), 96 / (2 * 24)])


def test_weights_of_classes_and_rows_survive_storage():
    table = class_table(24).append_column("w", [[1.0 + i % 2 for i in range(96)]])
    spec = plain_spec(
        3, batch_size=16, class_weights="balanced", sample_weight="w", task="binary", shuffle=True, replay={"rows": 30}
    )
    straight = begin(spec, cut(table, 40))
    stored = begin(spec, cut(table, 40))
    for epoch in range(3):
        for learner in (straight, stored):
            train_pass(Steps(learner), cut(table, 40), key=("epoch", epoch), replay=True, remember=True)
        stored = Learner.load(spec, *stored.dump())
    assert stored.dump() == straight.dump()


# ---- losses and metrics of the user's own ----------------------------------------------------------------------------
def squared(output, target):
    return (output - target) ** 2


def reduced(output, target):
    return ((output - target) ** 2).mean()


def test_a_loss_by_import_path_is_the_mean_over_rows():
    own = trained(loss="tests.training.test_stability:squared")
    assert torch.allclose(own.model.weight, trained().model.weight)


def test_a_loss_that_reduces_is_refused():
    with pytest.raises(OutputShapeError, match=r"returned \(\) for 8 rows: return one number for each"):
        trained(loss="tests.training.test_stability:reduced")


def test_metrics_by_import_path_stand_beside_the_tasks_own():
    found = score(trained(metrics=["torchmetrics.regression:R2Score"]), GROUPS).metrics
    assert set(found) == {"mae", "rmse", "r2score"}
    assert found["r2score"] == pytest.approx(1, abs=0.2)


def test_a_metric_that_needs_more_rows_is_left_out(caplog):
    one = [TableGroup(WHERE, GROUPS[0].table.slice(0, 1))]
    found = score(trained(metrics=["torchmetrics.regression:R2Score"]), one).metrics
    assert set(found) == {"mae", "rmse"}
    assert f"metric r2score of {WHERE} (1 rows) is left out" in caplog.text


@pytest.mark.parametrize("name", ["tests.training.test_stability:squared", "torchmetrics.regression:MinkowskiDistance"])
def test_what_is_no_metric_is_refused(name):
    with pytest.raises(FactoryError, match="metrics"):
        score(trained(1, metrics=[name]), GROUPS)


# ---- precision and devices -------------------------------------------------------------------------------------------
def test_mixed_precision_learns_and_keeps_float32_weights():
    learner = trained(20, precision="bfloat16")
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}
    assert not same_bits(learner.model.weight, trained(20).model.weight)
    assert score(learner, GROUPS).metrics["mae"] < 0.05


def test_a_device_that_is_not_there_is_named():
    if torch.accelerator.is_available():
        assert Learner.create(trained(0).spec, trained(0).features, "auto").device.type != "cpu"
    else:
        assert Learner.create(trained(0).spec, trained(0).features, "auto").device.type == "cpu"
        with pytest.raises(SpecError, match="device 'cuda' is not available here"):
            Learner.create(trained(0).spec, trained(0).features, "cuda")

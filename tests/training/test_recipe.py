"""The recipe of defaults, and its parts: each can be asked for alone."""

import math
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.training.rows import (
    WHERE,
    begin,
    cut,
    encode,
    encoded,
    numbers_table,
    plain_spec,
    same_bits,
    spec_of,
    table_of,
)
from tidemill.tasks.training import recipe
from tidemill.tasks.training.errors import StateMismatch
from tidemill.tasks.training.features import Features, SequenceInput
from tidemill.tasks.training.groups import TableGroup
from tidemill.tasks.training.kept import Kept
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, score, train_pass, train_shard
from tidemill.tasks.training.models import Inputs, build, mlp
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

HOLED = pa.table(
    {"a": [1.0, None, 3.0, None], "b": [1.0, 2.0, 3.0, 4.0], "v": [[1.0, 2], None, [3, 4], [5, 6]], "y": [0.0] * 4}
)
HOLED = HOLED.set_column(2, "v", HOLED["v"].cast(pa.list_(pa.float32(), 2)))


# ---- null indicators -------------------------------------------------------------------------------------------------
def test_a_column_with_nulls_has_one_more_number_that_says_where() -> None:
    x_NF = encode(spec_of("v", "a", "b", null_indicators=True, standardize_features=True), HOLED).x_NF
    assert x_NF.shape == (4, 2 + 1 + 1 + 2)
    assert x_NF[:, 4:].tolist() == [[0, 0], [1, 1], [0, 0], [0, 1]]
    plain = encode(spec_of("v", "a", "b", standardize_features=True), HOLED).x_NF
    assert same_bits(x_NF[:, :4].contiguous(), plain)


def test_which_columns_have_one_is_decided_by_the_dataset_alone() -> None:
    spec = spec_of("a", "b", null_indicators=True)
    features = Features.resolve(spec, HOLED.schema).fit([TableGroup(WHERE, HOLED)])
    again = Features.from_state(*features.state())
    assert again.indicated == ("a",)
    later = pa.table({"a": [None, 1.0], "b": [None, 1.0], "y": [0.0, 0.0]})
    for known in (features, again):
        assert encoded(known, later).x_NF.tolist() == [[0, 0, 1], [1, 1, 0]]


# ---- soft limit ------------------------------------------------------------------------------------------------------
def test_a_soft_limit_bends_what_is_far_out_and_leaves_null_indicators_alone() -> None:
    column = pa.array([-1e38, -3.0, 0.0, None, 3.0, 1e38])
    settings: dict[str, Any] = {"soft_limit": 3.0, "null_indicators": True, "standardize_features": True}
    features = Features.resolve(spec_of("a", **settings), table_of(column).schema)
    features = features.fit([TableGroup(WHERE, table_of(pa.array([-1.0, 1.0, None])))])  # mean 0, deviation 1
    x_NF = encoded(features, table_of(column)).x_NF
    bent = 3 / math.sqrt(2)
    torch.testing.assert_close(x_NF[:, 0], torch.tensor([-3, -bent, 0, 0, bent, 3]))
    assert x_NF[:, 1].tolist() == [0, 0, 0, 1, 0, 0]


# ---- limits of predictions -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scaled", [False, True])
def test_predictions_stay_within_the_targets_that_were_trained_on(scaled: bool) -> None:
    groups = cut(numbers_table(64, columns=2))
    spec = plain_spec(columns=2, limit_predictions=True, standardize_target=scaled, learning_rate=0.1)
    learner = begin(spec, groups)
    train_pass(Steps(learner), groups, key=("epoch", 0))
    lowest, highest = (f(groups[0].table["y"].to_pylist()) for f in (min, max))
    far = pa.table(
        {"x0": pa.array([-1e4, 1e4], pa.float32()), "x1": pa.array([-1e4, 1e4], pa.float32()), "y": [0.0, 0.0]}
    )
    for served in (learner, Learner.load(spec, *learner.dump()), learner.network()):
        [values] = predict(served, [TableGroup(WHERE, far)])
        assert sorted(values.tolist()) == [lowest, highest]
        assert score(served, [TableGroup(WHERE, far)]).metrics["mae"] == pytest.approx((highest - lowest) / 2)


def test_online_they_reach_as_far_as_the_shards_targets() -> None:
    groups = cut(numbers_table(64, columns=2))
    learner = begin(plain_spec(columns=2, limit_predictions=True), groups)
    train_shard(Steps(learner), cut(pa.table({"x0": [0.0], "x1": [0.0], "y": [9.0]})), 1)
    limits = Learner.load(learner.spec, *learner.dump()).features.statistics.target_range
    assert limits.tolist() == [[min(groups[0].table["y"].to_pylist())], [9.0]]


# ---- base rates and one-hot columns ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("task", "labels"), [("binary", [0, 0, 0, 1]), ("multiclass", [0, 0, 2, None])])
def test_a_model_may_begin_with_the_base_rates(task: str, labels: list[int | None]) -> None:
    classes = 3 if task == "multiclass" else None
    model = {"factory": "mlp", "arguments": {"base_rates": True, "hidden": [4]}}
    spec = spec_of("a", task=task, classes=classes, model=model, null_indicators=True)
    table = pa.table({"a": [1.0] * 4, "y": labels})
    features = Features.resolve(spec, table.schema).fit([TableGroup(WHERE, table)])
    bias = build(spec, features)[-1].bias
    expected = [math.log(1.5 / 3.5)] if classes is None else [math.log(n / 4.5) for n in (2.5, 0.5, 1.5)]
    torch.testing.assert_close(bias.detach(), torch.tensor(expected))


INPUTS = Inputs(2, (5, 3), 1, (SequenceInput(3, 4),))


def test_without_embeddings_categories_are_one_hot_columns_of_the_first_layer() -> None:
    model = mlp(INPUTS, hidden=[7], embedding=None)
    first = model[0]
    x_BF, ids_BC = torch.randn(2, 2), torch.tensor([[5, 0, 4, 4, 1], [1, 3, 0, 0, 0]])
    one_hot = torch.zeros(2, 6 + 4 + 5)
    one_hot[0, 5] = one_hot[0, 6] = one_hot[1, 1] = one_hot[1, 6 + 3] = 1
    one_hot[0, 10 + 4], one_hot[0, 10 + 1] = 2 / 3, 1 / 3
    weights = torch.cat([first.values.weight, first.items[0].weight])
    expected = x_BF @ first.numbers.weight.T + one_hot @ weights + first.bias
    torch.testing.assert_close(first(x_BF, ids_BC), expected)
    torch.testing.assert_close(model(x_BF, ids_BC), model[2](expected.relu()))
    bound = 5**-0.5
    assert 0.9 * bound < max(float(p.detach().abs().max()) for p in first.parameters()) <= bound


@pytest.mark.parametrize("numbers", [0, 2])
@pytest.mark.parametrize("hidden", [(), (4,)])
def test_one_hot_columns_do_for_any_inputs(numbers: int, hidden: tuple[int, ...]) -> None:
    model = mlp(Inputs(numbers, (5,), 3), hidden=hidden, embedding=None, dropout=0.5)
    assert model(torch.randn(4, numbers), torch.tensor([[0], [5], [1], [2]])).shape == (4, 3)


# ---- decay of matrices only, and an average that warms up ------------------------------------------------------------
def test_weight_decay_may_leave_biases_alone() -> None:
    groups = cut(numbers_table(96))
    optimizer = {"name": "adamw", "arguments": {"weight_decay": 0.5}, "decay_biases": False}
    learner = begin(
        plain_spec(optimizer=optimizer, model={"factory": "mlp", "arguments": {"hidden": [3]}}, batch_size=32), groups
    )
    theirs = build(learner.spec, learner.features)
    vectors, matrices = ([p for p in theirs.parameters() if (p.ndim > 1) == large] for large in (False, True))
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, weight_decay=0.5
    )
    train_pass(Steps(learner), groups, key=("epoch", 0))
    learner = Learner.load(learner.spec, *learner.dump())
    train_pass(Steps(learner), groups, key=("epoch", 1))
    rows = encoded(learner.features, groups[0].table)
    for x_BF, y_B in [*zip(rows.x_NF.split(32), rows.y_N.split(32), strict=True)] * 2:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(theirs(x_BF).squeeze(1), y_B).backward()
        optimizer.step()
    for ours, other in zip(learner.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-7)


def test_an_average_may_forget_faster_at_first() -> None:
    groups = cut(numbers_table(20 * 4))
    learner = begin(plain_spec(ema_decay=0.9, ema_warmup=True, batch_size=4), groups)
    weights: list[torch.Tensor] = []
    learner.optimizer.register_step_post_hook(lambda *_: weights.append(learner.model.weight.detach().clone()))
    steps = Steps(learner)
    steps.learner.optimizer.param_groups[0]["foreach"] = True  # torch's own step, which calls hooks
    train_pass(steps, groups, key=("epoch", 0))
    average = weights[0]
    for step, weight in enumerate(weights[1:], 2):
        average = torch.lerp(average, weight, 1 - min(0.9, (1 + step) / (10 + step)))
    assert len(weights) == 20
    torch.testing.assert_close(learner.served.weight.detach(), average)


# ---- kept rows -------------------------------------------------------------------------------------------------------
def test_kept_rows_give_the_bits_of_the_stream_that_they_come_from() -> None:
    groups = cut(numbers_table(100))
    found = []
    for kept in (False, True):
        learner = begin(plain_spec(shuffle=True, batch_size=16), groups)
        rows = Kept(groups, learner.features, learner.spec.window_bytes, None) if kept else groups
        for epoch in range(2):
            train_pass(Steps(learner), rows, key=("epoch", epoch))
        found.append((learner.model.weight.detach(), score(learner, rows).loss))
    assert same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# ---- all together ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "size"), [(10, 32), (1024, 32), (1025, 64), (60_000, 256), (10**9, 512)])
def test_batches_are_as_large_as_the_root_of_the_rows(rows: int, size: int) -> None:
    assert recipe.batch_size(rows) == size


def test_the_recipe_fills_in_what_was_left_open_and_nothing_else() -> None:
    asked = Spec(features=["a"], target="y", recipe=1, loss="huber", seed=3)
    found = recipe.filled(asked, 50_000)
    assert (found.recipe, found.epochs, found.batch_size, found.loss, found.seed) == (None, "auto", 256, "huber", 3)
    assert (found.standardize_target, found.limit_predictions, found.soft_limit) == (True, True, None)
    assert found.model.arguments == {"hidden": [64, 32], "embedding": None, "dropout": 0.0}
    binary = recipe.filled(asked.model_copy(update={"task": "binary", "loss": None}), 100)
    assert (binary.standardize_target, binary.limit_predictions, binary.soft_limit) == (False, False, 3.0)
    assert binary.model.arguments["dropout"] == 0.1
    assert recipe.filled(found, 3) is found


def test_features_of_another_kind_do_not_pass_for_those_of_the_spec() -> None:
    learner = begin(spec_of("b", soft_limit=3.0, standardize_features=True), [TableGroup(WHERE, HOLED)])
    with pytest.raises(StateMismatch, match="soft_limit"):
        Learner.load(learner.spec.model_copy(update={"soft_limit": None}), *learner.dump())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"soft_limit": 3, "standardize_features": False}, "standardize_features"),
        ({"limit_predictions": True, "task": "binary"}, "limit_predictions is for task 'regression'"),
        ({"ema_warmup": True}, "set ema_decay"),
        ({"recipe": 1, "learning_rate": 0.1}, "remove learning_rate, or recipe"),
        ({"soft_limit": 3, "running_statistics": True, "replay": {}}, "replay"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Spec.model_validate({"features": ["a"], "target": "y"} | settings)

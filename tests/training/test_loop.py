"""Training gives exactly what plain PyTorch gives, and nothing depends on what ran before."""

import math

import pyarrow as pa
import pytest
import torch
from torch import nn

from tests.training.rows import Net, Noted, begin, cut, numbers_table, plain_spec, same_bits
from tidemill.tasks.training.errors import ColumnError, NonFiniteLoss, OutputShapeError
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, score, train_pass
from tidemill.tasks.training.optimizers import OPTIMIZERS
from tidemill.tasks.training.steps import Steps

NET = {"factory": "tests.training.rows:Net"}
ROWS = 1000  # neither a multiple of the batch size nor of a row group


def by_hand(table: pa.Table, seed: int, batch: int, lr: float) -> tuple[nn.Module, float]:
    """One epoch of the loop that everybody writes, over batches that differ by at most one row, as `numpy.array_split` cuts."""
    x_NF = torch.stack([torch.tensor(table.column(f"x{i}").to_pylist()) for i in range(10)], 1)
    y_N = torch.tensor(table.column("y").to_pylist())
    torch.manual_seed(seed)
    model, loss_function = Net(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total = 0.0
    count = -(-len(y_N) // batch)
    for x_BF, y_B in zip(x_NF.tensor_split(count), y_N.tensor_split(count), strict=True):
        optimizer.zero_grad()
        loss = loss_function(model(x_BF), y_B.unsqueeze(1))
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y_B)
    return model, total / len(y_N)


@pytest.mark.parametrize("batch", [1, 64, 2000])
def test_one_epoch_equals_the_loop_written_by_hand(batch):
    table = numbers_table(ROWS)
    learner = begin(plain_spec(model=NET, batch_size=batch, seed=7), cut(table, 300, 299, 1, 0, 200))
    result = train_pass(Steps(learner), cut(table, 300, 299, 1, 0, 200), key=("epoch", 0))
    model, loss = by_hand(table, seed=7, batch=batch, lr=0.01)
    assert all(same_bits(a.data, b.data) for a, b in zip(learner.model.parameters(), model.parameters(), strict=True))
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert (result.rows, result.steps, result.unlabelled) == (ROWS, -(-ROWS // batch), 0)
    assert (learner.counters.rows, learner.counters.steps) == (result.rows, result.steps)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(), (1, 2, 3), (500,), (64, 64, 64), (0, 999)])
@pytest.mark.parametrize("shuffle_bytes", [1, 15_000, 2**20])
def test_the_cut_into_row_groups_and_windows_does_not_matter_unshuffled(sizes, shuffle_bytes):
    spec = plain_spec(model=NET, standardize_features=True, standardize_target=True)
    table = numbers_table(ROWS)
    whole = begin(spec, cut(table))
    train_pass(Steps(whole), cut(table), key=("epoch", 0))
    other = begin(spec.model_copy(update={"shuffle_bytes": shuffle_bytes}), cut(table))
    train_pass(Steps(other), cut(table, *sizes), key=("epoch", 0))
    assert other.dump()[0] == whole.dump()[0]


def test_a_pass_depends_on_its_key_and_learner_only():
    table = numbers_table(ROWS)
    groups = cut(table, 300, 300)
    spec = plain_spec(model={"factory": "tests.training.rows:DropoutNet"}, shuffle=True, shuffle_bytes=24_000)

    def trained(key, disturb):
        learner = begin(spec, groups)
        if disturb:
            torch.rand(5)
            score(learner, groups)
        train_pass(Steps(learner), groups, key=key)
        return learner.dump()

    assert trained(("epoch", 3), False) == trained(("epoch", 3), True)
    assert trained(("epoch", 3), False) != trained(("epoch", 4), False)


def test_the_global_random_state_is_left_alone():
    groups = cut(numbers_table(100))
    before = torch.get_rng_state()
    train_pass(Steps(begin(plain_spec(shuffle=True), groups)), groups, key=("epoch", 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("factory", ["tests.training.rows:FlatNet", "linear"])
def test_outputs_of_shape_b_and_b_1_train_alike(factory):
    groups = cut(numbers_table(ROWS))
    learner = begin(plain_spec(model={"factory": factory}), groups)
    results = [train_pass(Steps(learner), groups, key=("epoch", e)) for e in range(10)]
    assert results[-1].loss < 0.5 * results[0].loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"factory": "tests.training.rows:WideNet"}}, r"\(50, 2\) for 50 rows.*return \[50, 1\]"),
        ({"model": NET, "task": "multiclass", "classes": 3}, r"3 classes: return \[50, 3\]"),
    ],
)
def test_a_wrong_output_shape_is_named(settings, message):
    table = numbers_table(100).set_column(10, "y", pa.array([0] * 100))
    learner = begin(plain_spec(**settings), cut(table))
    with pytest.raises(OutputShapeError, match=message):
        train_pass(Steps(learner), cut(table), key=("epoch", 0))


def test_a_diverging_loss_is_an_error_that_says_what_to_do():
    groups = cut(numbers_table(ROWS))
    with pytest.raises(NonFiniteLoss, match=r"part-0.*lower learning_rate"):
        train_pass(Steps(begin(plain_spec(learning_rate=1e6), groups)), groups, key=("epoch", 0))


def test_another_implementation_of_the_optimizer_makes_every_step(monkeypatch):
    """Not the first one of a pass only."""
    calls = []
    sgd = OPTIMIZERS["sgd"].make
    plain = sgd.step
    monkeypatch.setattr(sgd, "step", lambda self: calls.append(self) or plain(self))
    groups = cut(numbers_table(ROWS))
    spec = plain_spec(optimizer={"arguments": {"fused": True}})
    assert train_pass(Steps(begin(spec, groups)), groups, key=("epoch", 0)).steps == len(calls) > 1


def normalised(inputs):
    return nn.Sequential(nn.BatchNorm1d(inputs.numbers), nn.Linear(inputs.numbers, 1))


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, 1e12),  # the loss before the only step is finite, and so is the weight after it
        ({"optimizer": {"name": "adam"}}, 1e15),  # its squared gradient is not: that weight would never move again
        ({"model": {"factory": "tests.training.test_loop:normalised"}}, 1e20),  # nor is the running variance
    ],
    ids=["weights", "optimizer", "buffers"],
)
def test_what_the_last_step_breaks_is_seen_at_once(settings, value):
    """Else a version would hold it, and all good shards after it would be refused."""
    table = numbers_table(64)
    x0 = table.column("x0").to_pylist()
    broken = cut(table.set_column(0, "x0", pa.array([*x0[:-1], value], pa.float32())))
    with pytest.raises(NonFiniteLoss, match=r"part-0.*non-finite"):
        train_pass(Steps(begin(plain_spec(**settings), cut(table))), broken, key=("shard", 0))


def test_rows_without_a_target_are_left_out_and_counted():
    table = numbers_table(ROWS)
    y = table.column("y").to_pylist()
    holes = table.set_column(10, "y", pa.array([None if i % 7 == 0 else v for i, v in enumerate(y)], pa.float32()))
    kept = table.filter(pa.array([i % 7 != 0 for i in range(ROWS)]))
    spec = plain_spec(model=NET)
    a, b = begin(spec, cut(kept)), begin(spec, cut(kept))
    result = train_pass(Steps(a), cut(holes, 100, 333), key=("epoch", 0))
    train_pass(Steps(b), cut(kept), key=("epoch", 0))
    assert (result.rows, result.unlabelled) == (kept.num_rows, ROWS - kept.num_rows)
    assert a.dump()[0] == b.dump()[0]


def test_a_shard_with_no_target_or_an_emptied_column_is_refused_when_it_is_scored():
    table = numbers_table(100)
    learner = begin(plain_spec(), cut(table))
    for name, message in [("y", "null in all 100 rows: write labels"), ("x3", "'x3' is null in all 100 rows")]:
        empty = table.set_column(table.schema.get_field_index(name), name, pa.nulls(100, pa.float32()))
        with pytest.raises(ColumnError, match=message):
            score(learner, cut(empty, 50))
        with pytest.raises(ColumnError, match=message):
            train_pass(Steps(learner), cut(empty, 50), key=("shard", 0))


def test_a_column_that_is_seldom_filled_may_be_empty_in_a_small_shard():
    table = numbers_table(200)
    sparse = pa.array([1.0 if i % 50 == 0 else None for i in range(200)], pa.float32())
    table = table.set_column(3, "x3", sparse)
    learner = begin(plain_spec(), cut(table))
    assert train_pass(Steps(learner), cut(table.slice(1, 40)), key=("shard", 0)).rows == 40


def test_only_the_rows_of_the_split_are_trained_on_and_scored():
    groups = cut(numbers_table(ROWS), 400)
    learner = begin(plain_spec(), groups)
    held_out = score(learner, groups, Split(0.3, side="holdout")).rows
    trained = train_pass(Steps(learner), groups, key=("epoch", 0), split=Split(0.3, side="train")).rows
    assert 200 < held_out < 400
    assert held_out + trained == ROWS


def test_a_score_over_no_rows():
    learner = begin(plain_spec(), cut(numbers_table(10)))
    empty = score(learner, [])
    assert (empty.rows, empty.metrics, math.isnan(empty.loss)) == (0, {}, True)
    assert train_pass(Steps(learner), [], key=("epoch", 0)).rows == 0


def test_regression_scores_and_predictions_are_in_units_of_the_target():
    table = numbers_table(ROWS)
    y_N = 1e4 * torch.tensor(table.column("y").to_pylist()).double() + 1e6
    groups = cut(table.set_column(10, "y", pa.array(y_N.numpy())), 300, 1)
    spec = plain_spec(standardize_features=True, standardize_target=True, shuffle=True, learning_rate=0.05)
    learner = begin(spec, groups)
    for epoch in range(5):
        train_pass(Steps(learner), groups, key=("epoch", epoch))
    predictions = list(predict(learner, groups))
    assert [len(p) for p in predictions] == [300, 1, 699]
    assert all(p.dtype == torch.float32 and p.ndim == 1 for p in predictions)
    errors_N = torch.cat(predictions).double() - y_N
    result = score(learner, groups)
    assert result.metrics["mae"] == pytest.approx(errors_N.abs().mean().item(), rel=1e-3, abs=0.1)
    assert result.metrics["rmse"] == pytest.approx(errors_N.square().mean().sqrt().item(), rel=1e-3, abs=0.1)
    assert result.metrics["rmse"] < 1000
    assert result.loss < 1e-2  # in standardised units


def labelled(task):
    table = numbers_table(2000)
    y_N = torch.tensor(table.column("y").to_pylist())
    labels_N = (y_N > 0.5).long() if task == "binary" else (y_N > -0.5).long() + (y_N > 1.0).long()
    return table.set_column(10, "y", pa.array(labels_N.numpy())), labels_N


def test_binary_scores_and_probabilities():
    table, labels_N = labelled("binary")
    learner = begin(plain_spec(task="binary", shuffle=True, learning_rate=0.5), cut(table))
    for epoch in range(3):
        train_pass(Steps(learner), cut(table, 900), key=("epoch", epoch))
    (p_N,) = predict(learner, cut(table))
    assert ((p_N >= 0) & (p_N <= 1)).all()
    result = score(learner, cut(table, 900))
    assert result.metrics["accuracy"] == pytest.approx(((p_N > 0.5) == labels_N.bool()).double().mean().item())
    above_PN = p_N[labels_N == 1].unsqueeze(1) > p_N[labels_N == 0]  # the definition of the area under the ROC curve
    assert result.metrics["auroc"] == pytest.approx(above_PN.double().mean().item(), abs=1e-4)


def test_the_area_under_the_curve_is_left_out_when_one_class_is_missing():
    table = numbers_table(50).set_column(10, "y", pa.array([1] * 50))
    learner = begin(plain_spec(task="binary"), cut(table))
    assert set(score(learner, cut(table)).metrics) == {"accuracy"}


def test_multiclass_scores_and_probabilities():
    table, labels_N = labelled("multiclass")
    learner = begin(plain_spec(task="multiclass", classes=3, shuffle=True, learning_rate=0.5), cut(table))
    for epoch in range(3):
        train_pass(Steps(learner), cut(table), key=("epoch", epoch))
    (p_NO,) = predict(learner, cut(table))
    assert p_NO.shape == (2000, 3)
    torch.testing.assert_close(p_NO.sum(1), torch.ones(2000))
    accuracy = (p_NO.argmax(1) == labels_N).double().mean().item()
    assert score(learner, cut(table)).metrics == {"accuracy": pytest.approx(accuracy)}
    assert accuracy > 0.8


def test_predictions_need_no_target_and_survive_nulls():
    table = numbers_table(100)
    learner = begin(plain_spec(), cut(table))
    unlabelled = table.drop_columns(["y"]).set_column(0, "x0", pa.nulls(100, pa.float32()))
    group = Noted("new.parquet row group 0", unlabelled)
    (values_N,) = predict(learner, [group])
    assert torch.isfinite(values_N).all()
    assert group.reads == [[f"x{i}" for i in range(10)]]


def test_scoring_and_predicting_change_nothing():
    groups = cut(numbers_table(ROWS))
    learner = begin(plain_spec(model={"factory": "tests.training.rows:DropoutNet"}), groups)
    before = learner.dump()
    first = score(learner, groups)
    list(predict(learner, groups))
    assert learner.dump() == before
    assert score(Learner.load(learner.spec, *before), groups) == first

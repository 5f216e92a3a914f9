"""The gradient of a batch is the sum of those of its parts, in one process too; what cannot be cut is refused before training."""

import logging
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from tests.training.rows import begin, cut, numbers_table, plain_spec, same_bits
from tests.training.test_steps import furthest
from tidemill.tasks.ranks.group import ALONE, Group
from tidemill.tasks.training.errors import ModelError, ModelFails, NonFiniteLoss, SpecError
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import train_pass, train_shard
from tidemill.tasks.training.parts import parts_of, tree_sum
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

HERE = "tests.training.test_parts"
ROWS = 101
"""Of batches of 16 these make seven, four of 14 rows and three of 15."""


def trained(parts: int | None, rows: int = ROWS, backend: str = "aot_eager", **settings: Any) -> Learner:
    """Two passes over a few shards."""
    spec = plain_spec(**({"parts": parts, "batch_size": 16, "shuffle": True} | settings))
    groups = cut(numbers_table(rows), rows // 3)
    learner = begin(spec, groups)
    steps = Steps(learner, backend=backend)
    for shard in groups:
        train_shard(steps, [shard], passes=2)
    return learner


class Sized:
    """A group of so many ranks, of which nothing is asked but that."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def sum_(self, flat: Tensor) -> None:
        raise AssertionError

    def sum_pair_(self, flat: Tensor, distance: int) -> None:
        raise AssertionError

    def broadcast_(self, tensor: Tensor) -> None:
        raise AssertionError


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fewer rows than parts": {"batch_size": 3},
    "clipping, average, schedule": {
        "clip_norm": 0.1,
        "ema_decay": 0.9,
        "schedule": {"name": "exponential", "arguments": {"gamma": 0.99}},
    },
    "adam": {"optimizer": {"name": "adam"}},
    "old rows": {"replay": {"rows": 40, "ratio": 0.5}},
    "a parameter that is never used": {"model": {"factory": f"{HERE}:Unused"}, "optimizer": {"name": "adamw"}},
    "a parameter that some rows use": {"model": {"factory": f"{HERE}:Sometimes"}, "optimizer": {"name": "adamw"}},
    "float64": {"model": {"factory": f"{HERE}:Double"}},
    "frozen": {"model": {"factory": f"{HERE}:Frozen"}},
}


# ---- what comes of it ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_parts_give_what_whole_batches_give_up_to_the_order_of_sums(name: str) -> None:
    whole = trained(None, **SETTINGS[name])
    for parts in (1, 4):
        learner = trained(parts, **SETTINGS[name])
        assert furthest(whole, learner) < 1e-6
        assert learner.counters == whole.counters


def test_a_single_part_has_the_bits_of_whole_batches() -> None:
    whole, one = trained(None, optimizer={"name": "adam"}), trained(1, optimizer={"name": "adam"})
    for name, weights in whole.model.state_dict().items():
        assert same_bits(one.model.state_dict()[name], weights), name


def test_weights_of_rows_and_classes_count_as_in_whole_batches() -> None:
    """A part of heavy rows weighs as much as its rows do, since the loss is divided by rows and not by weights."""
    table = numbers_table(ROWS).drop_columns("y").append_column("y", [[int(i % 3 == 0) for i in range(ROWS)]])
    table = table.append_column("w", pa.array([0.1 if i % 5 else 9.0 for i in range(ROWS)], pa.float32()))
    found = []
    for parts in (None, 4):
        settings: dict[str, Any] = {"sample_weight": "w", "class_weights": [1.0, 3.0], "task": "binary"}
        learner = begin(plain_spec(parts=parts, batch_size=16, **settings), cut(table))
        train_pass(Steps(learner), cut(table), key=("epoch", 0))
        found.append(learner)
    assert furthest(*found) < 1e-6


def test_dropout_is_drawn_anew_for_each_part_step_and_pass_and_the_same_in_each_run() -> None:
    Drawn.seen.clear()
    spec = plain_spec(parts=2, batch_size=8, model={"factory": f"{HERE}:Drawn"})
    groups = cut(numbers_table(16))
    dumps = []
    for _ in range(2):
        learner = begin(spec, groups)
        steps = Steps(learner)
        for epoch in range(2):
            torch.rand(3)  # whatever the process has drawn before
            train_pass(steps, groups, key=("epoch", epoch))
        dumps.append(learner.dump())
    first, again = Drawn.seen[:8], Drawn.seen[8:]
    assert len(set(first)) == 8, "two passes of two steps of two parts"
    assert first == again
    assert dumps[0] == dumps[1]


def test_a_learner_that_was_stored_in_the_middle_goes_on_with_the_same_bits() -> None:
    settings: dict[str, Any] = {"model": {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.5}}}
    groups = cut(numbers_table(ROWS), 40)
    straight = begin(plain_spec(parts=4, batch_size=16, **settings), groups)
    train_shard(Steps(straight), groups[:1], passes=2)
    resumed = Learner.load(straight.spec, *straight.dump())
    for learner in (straight, resumed):
        train_shard(Steps(learner), groups[1:], passes=2)
    assert resumed.dump() == straight.dump()


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.raises(NonFiniteLoss, match="lower learning_rate"):
        trained(4, learning_rate=1e30)


# ---- compiled --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "clipping, average, schedule", "old rows", "a parameter that is never used"])
def test_a_compiled_part_is_what_it_is_in_the_eager_loop(name: str) -> None:
    eager, compiled = trained(4, **SETTINGS[name]), trained(4, compile="on", **SETTINGS[name])
    assert (eager.counters.compiled_steps, compiled.counters.compiled_steps) == (0, compiled.counters.steps)
    assert furthest(eager, compiled) < 1e-5


def test_batches_with_parts_of_a_single_row_are_not_compiled() -> None:
    compiled = trained(4, compile="on", batch_size=6)
    assert compiled.counters.steps > 0
    assert compiled.counters.compiled_steps == 0


@pytest.mark.slow
def test_what_does_not_compile_is_said_once_and_trained_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"model": {"factory": f"{HERE}:Sometimes"}}
    with caplog.at_level(logging.WARNING, logger="tidemill.training"):
        compiled = trained(4, compile="on", **settings)
    assert len([record for record in caplog.records if "without compilation" in record.message]) == 1
    eager = trained(4, **settings)
    for name, weights in eager.model.state_dict().items():
        assert same_bits(compiled.model.state_dict()[name], weights), name


# ---- the tree --------------------------------------------------------------------------------------------------------
def test_neighbours_are_added_first_and_then_their_sums() -> None:
    """So two ranks that each add up half of the parts, and then their two sums, come to the same bits."""
    draw = torch.Generator().manual_seed(0)
    flats = [torch.randn(50, generator=draw) * 10.0 ** (i % 5) for i in range(8)]
    a, b, c, d, e, f, g, h = flats
    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert not same_bits(expected, sum(flats[1:], a)), "or the order would be no matter, and this no test"
    halves = [tree_sum(flat.clone() for flat in half) for half in (flats[:4], flats[4:])]
    assert same_bits(halves[1] + halves[0], expected)
    assert same_bits(tree_sum(flat.clone() for flat in flats), expected)


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_parts_that_the_ranks_cannot_share_out_equally_are_refused() -> None:
    assert [parts_of(plain_spec(parts=4), Sized(size)) for size in (1, 2, 4)] == [4, 4, 4]
    assert parts_of(plain_spec(), Sized(3)) == 3
    for size in (3, 8):
        with pytest.raises(SpecError, match=f"among {size} ranks: start 1, 2 or 4 of them"):
            parts_of(plain_spec(parts=4), Sized(size))


@pytest.mark.parametrize("parts", [3, 6, 12])
def test_parts_are_a_power_of_two(parts: int) -> None:
    with pytest.raises(ValueError, match="choose a power of two"):
        plain_spec(parts=parts)


@pytest.mark.parametrize(("parts", "group"), [(2, ALONE), (None, Sized(2))], ids=["parts", "ranks"])
def test_layers_that_look_at_a_whole_batch_are_refused_before_training(parts: int | None, group: Group) -> None:
    spec = plain_spec(parts=parts, model={"factory": "tests.training.rows:DropoutNet"})
    learner = begin(spec, cut(numbers_table(ROWS)))
    with pytest.raises(SpecError, match=r"BatchNorm1d \(layers.1\).*use nn.LayerNorm or nn.GroupNorm"):
        Steps(learner, group=group)
    Steps(begin(spec.model_copy(update={"parts": 1}), cut(numbers_table(ROWS))))


def test_such_a_layer_that_its_factory_has_put_to_rest_is_let_be() -> None:
    assert trained(4, model={"factory": f"{HERE}:resting"}).counters.steps > 0


def test_a_model_that_changes_its_own_state_is_refused_at_its_first_step() -> None:
    groups = cut(numbers_table(ROWS))
    learner = begin(plain_spec(parts=2, model={"factory": f"{HERE}:Counting"}), groups)
    with pytest.raises(ModelFails, match="changes calls by itself"):
        train_pass(Steps(learner), groups, key=("epoch", 0))
    before = begin(learner.spec, groups)
    assert all(same_bits(a, b) for a, b in zip(learner.model.parameters(), before.model.parameters(), strict=True))


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(ModelError, match="use sparse=False"):
        trained(2, model={"factory": f"{HERE}:Sparse"})


def test_an_error_of_the_model_is_told_with_the_shape_of_the_part() -> None:
    with pytest.raises(ModelError, match=r"RuntimeError: no.*float32\[4, 10\]"):
        trained(4, rows=48, model={"factory": f"{HERE}:Failing"})


def test_the_spec_says_parts_and_a_spec_without_them_is_what_it_was() -> None:
    assert Spec.model_validate(plain_spec(parts=8).model_dump()).parts == 8
    assert plain_spec().parts is None


# ---- models ----------------------------------------------------------------------------------------------------------
class Unused(nn.Linear):
    def __init__(self) -> None:
        super().__init__(10, 1)
        self.never = nn.Parameter(torch.ones(3))


class Sometimes(nn.Linear):
    """Some rows of a batch, and so some of its parts, use a parameter that others do not."""

    def __init__(self) -> None:
        super().__init__(10, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BF: Tensor) -> Tensor:
        output = super().forward(x_BF)
        positive_B = x_BF[:, 0] > 0.8
        return output + positive_B.unsqueeze(1) * self.scale if bool(positive_B.any()) else output


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(10, 1, dtype=torch.float64)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.net(x_BF.double())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 4), nn.Linear(4, 1)
        self.first.requires_grad_(False)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(self.first(x_BF))


class Drawn(nn.Linear):
    seen: ClassVar[list[float]] = []

    def __init__(self) -> None:
        super().__init__(10, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.training:
            Drawn.seen.append(float(torch.rand(())))
            x_BF = nn.functional.dropout(x_BF)
        return super().forward(x_BF)


def resting() -> nn.Module:
    net = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[1].eval()
    return net


class Counting(nn.Linear):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__(10, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x_BF)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 1, sparse=True)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.table((x_BF[:, 0] > 0).long())


class Failing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(10, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("no")
        return super().forward(x_BF)

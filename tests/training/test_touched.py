"""What a learner says of the rows that have changed: all that have, and of what it does not know, nothing.

Shape legend: R rows of a table, U rows that have changed.
"""

import gc
import random
import weakref
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from tests.training.rows import begin, cut, plain_spec
from tidemill.tasks.training import touched
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import score, train_pass
from tidemill.tasks.training.optimizers import OPTIMIZERS
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.training.touched import Touched

BY_ROWS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "adagrad", "arguments": {"lr_decay": 0.1, "initial_accumulator_value": 0.1}},
    {"name": "sparse_adam"},
]
KNOWN = ("plain", "padded", "sum", "mean")
"""Kinds of tables that only sparse gradients write to."""
OTHERS = ("shared", "sometimes", "dense", "max_norm", "tied")

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def table_of(rows: int, columns: int, values: int, seed: int) -> pa.Table:
    """Two numbers, and columns of few of many possible categories, each value several times."""
    chance = random.Random(seed)
    numbers = {f"x{i}": pa.array([chance.gauss(0, 1) for _ in range(rows)], pa.float32()) for i in range(2)}
    ids = {f"c{i}": [f"v{chance.randrange(values)}" for _ in range(rows)] for i in range(columns)}
    return pa.table({**numbers, **ids, "y": pa.array([chance.gauss(0, 1) for _ in range(rows)], pa.float32())})


def spec_of(*kinds: str, buckets: int = 60, **settings: Any) -> Spec:
    categories = [{"name": f"c{i}", "kind": "category", "buckets": buckets} for i in range(len(kinds))]
    model = {"factory": "tests.training.sparse_models:Tables", "arguments": {"kinds": list(kinds)}}
    chosen: dict[str, Any] = {"features": ["x0", "x1", *categories], "model": model, "batch_size": 7}
    return plain_spec(2, **(chosen | settings))


def stored(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, state) by their names in the files."""
    weights, state = learner.dump()
    return load(weights), load(state)


def changed_rows(before: Tensor, after: Tensor) -> set[int]:
    """Rows whose bytes differ."""
    bits = [tensor.contiguous().view(torch.int32).view(len(tensor), -1) for tensor in (before, after)]
    return set((bits[0] != bits[1]).any(1).nonzero().squeeze(1).tolist())


def check(learner: Learner, before: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple[set[str], set[str]]:
    """All that has changed since is told. Returns of which tensors of the weights and of the state something is."""
    now, told = stored(learner), learner.touched()
    for was, is_now, rows_of in zip(before, now, told, strict=True):
        for name, rows_U in rows_of.items():
            assert rows_U.dtype == torch.int64
            assert rows_U.device.type == "cpu"
            rows = rows_U.tolist()
            assert rows == sorted(set(rows))
            assert changed_rows(was[name], is_now[name]) <= set(rows), name
    return set(told[0]), set(told[1])


@pytest.mark.parametrize("optimizer", BY_ROWS, ids=lambda o: o["name"])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_has_changed_is_told_of_any_model(optimizer: dict[str, Any], seed: int) -> None:
    """Several tables of random kinds, random numbers of steps on random rows, commits, restarts, scores between the steps."""
    chance = random.Random(seed)
    kinds = ["plain", OTHERS[seed % len(OTHERS)], "writes", *chance.sample(KNOWN, 2)]
    average = {"ema_decay": 0.9} if seed % 3 == 2 else {}
    spec = spec_of(*kinds, optimizer=optimizer, learning_rate=0.002, **average)
    learner = begin(spec, cut(table_of(30, len(kinds), 200, seed)))
    steps = Steps(learner)
    for number in range(8):
        learner.committed()
        before = stored(learner)
        for part in range(chance.randrange(3)):
            rows = chance.choice([1, 8, 29])
            groups = cut(table_of(rows, len(kinds), chance.choice([1, 4, 100]), 100 * number + part))
            if chance.random() < 0.5:
                score(learner, groups)
            train_pass(steps, groups, key=("shard", number, part))
        weights, state = check(learner, before)
        if learner.counters.steps and number and not average:
            known = {f"tables.{i}.weight" for i, kind in enumerate(kinds) if kind in KNOWN and "shared" not in kinds}
            assert known <= weights or not learner.changes.by_rows
            assert not weights & {f"tables.{i}.weight" for i, kind in enumerate(kinds) if kind in ("dense", "tied")}
        if average:
            assert not weights, "the average moves towards all of the weights"
            assert learner.counters.steps == 0 or "model.tables.0.weight" in state or not learner.changes.by_rows
        if chance.random() < 0.3:
            learner = Learner.load(spec, *learner.dump())
            steps = Steps(learner)
            assert learner.touched() == ({}, {}), "a learner that was loaded may be of no version"


@pytest.mark.parametrize("optimizer", BY_ROWS, ids=lambda o: o["name"])
def test_only_the_rows_of_the_ids_are_told_from_the_first_step_after_a_restart(optimizer: dict[str, Any]) -> None:
    spec = spec_of("plain", "sum", optimizer=optimizer)
    groups = cut(table_of(40, 2, 200, 0))
    learner = begin(spec, groups)
    train_pass(Steps(learner), groups, key=("epoch", 0))
    learner = Learner.load(spec, *learner.dump())
    learner.committed()
    before = stored(learner)
    few = table_of(20, 2, 5, 1)
    train_pass(Steps(learner), cut(few), key=("shard", 0))
    weights, state = check(learner, before)
    assert weights == {"tables.0.weight", "tables.1.weight"}
    assert len(state) == {"sgd": 0, "adagrad": 2, "sparse_adam": 4}[optimizer["name"]]
    ids_NC = learner.features.encode(few, "rows").ids_NC
    assert ids_NC is not None
    told = learner.touched()
    for column, name in enumerate(sorted(weights)):
        assert told[0][name].tolist() == sorted(set(ids_NC[:, column].tolist()))
    learner.committed()
    assert [rows.tolist() for files in learner.touched() for rows in files.values()] == [[]] * (
        len(weights) + len(state)
    )


def test_before_anything_is_a_version_nothing_is_told() -> None:
    learner = begin(spec_of("plain", optimizer={"name": "sparse_adam"}), cut(table_of(20, 1, 9, 0)))
    train_pass(Steps(learner), cut(table_of(20, 1, 9, 0)), key=("epoch", 0))
    assert learner.touched() == ({}, {})


def test_state_that_the_first_step_makes_is_not_told() -> None:
    learner = begin(spec_of("plain", optimizer={"name": "sparse_adam"}), cut(table_of(20, 1, 9, 0)))
    learner.committed()
    train_pass(Steps(learner), cut(table_of(20, 1, 9, 0)), key=("epoch", 0))
    weights, state = learner.touched()
    assert weights.keys() == {"tables.0.weight"}
    assert not state


@pytest.mark.parametrize("how", ["in place", "another tensor", "a dense gradient", "an optimizer of one's own"])
def test_what_something_else_has_written_is_not_told(how: str) -> None:
    groups = cut(table_of(20, 2, 9, 0))
    learner = begin(spec_of("plain", "plain", optimizer={"name": "sgd"}), groups)
    steps = Steps(learner)
    train_pass(steps, groups, key=("epoch", 0))
    learner.committed()
    weight = dict(learner.model.named_parameters())["tables.0.weight"]
    with torch.no_grad():
        if how == "in place":
            weight[3] += 1
        elif how == "another tensor":
            weight.data = weight.clone()
        else:
            learner.optimizer.zero_grad()  # or it would take another step of the last gradients
            weight.grad = torch.ones_like(weight)
            (learner.optimizer if how == "a dense gradient" else OPTIMIZERS["sgd"].make([weight], lr=0.1)).step()  # type: ignore[call-arg]
    assert learner.touched()[0].keys() == {"tables.1.weight"}
    train_pass(steps, groups, key=("epoch", 1))
    assert learner.touched()[0].keys() == {"tables.1.weight"}
    learner.committed()
    assert learner.touched()[0].keys() == {"tables.0.weight", "tables.1.weight"}


@pytest.mark.parametrize("writes", ["in each step", "in the last step"])
def test_a_table_that_is_written_to_where_torch_does_not_count_it_is_found(
    writes: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(touched, "LARGE", 100)
    monkeypatch.setattr(touched, "SAMPLED", 16)
    groups = cut(table_of(20, 2, 9, 0))
    learner = begin(spec_of("plain", "plain", optimizer={"name": "sparse_adam"}), groups)
    weight = dict(learner.model.named_parameters())["tables.0.weight"]
    if writes == "in each step":
        learner.model.register_forward_hook(lambda *_: (weight.data.mul_(0.99), None)[1])
    steps = Steps(learner)
    for number in range(3):
        learner.committed()
        before = stored(learner)
        train_pass(steps, groups, key=("shard", number))
        if number == 2:
            weight.data[60] += 1  # the last row is always kept
        weights, _ = check(learner, before)
        found = writes == "in each step" or number == 2
        assert weights == ({"tables.1.weight"} if found else {"tables.0.weight", "tables.1.weight"})
    learner.committed()
    assert learner.touched()[0].keys() == {"tables.1.weight"}, "for good"
    assert caplog.text.count("changes where no gradient has named a row") == 1


def test_the_rows_that_are_kept_are_others_each_time_and_those_at_the_ends() -> None:
    weight = nn.Parameter(torch.zeros(touched.LARGE // 4, 4))
    changes = Touched([weight, nn.Parameter(torch.zeros(4, 4))], torch.optim.SGD([weight], lr=0.1))
    seen = []
    for _ in range(3):
        mark = changes.mark()
        changes.keep_rows(mark)
        ((rows_S, bits_S16),) = mark.kept.values()
        assert touched.SAMPLED <= len(rows_S) == len(bits_S16) <= touched.SAMPLED + 2
        seen.append(set(rows_S.tolist()))
    assert seen[0] & seen[1] & seen[2] == {0, len(weight) - 1}


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "arguments": {"momentum": 0.9}}, {"name": "adam"}], ids=str)
def test_of_an_optimizer_that_changes_other_rows_too_nothing_is_told(optimizer: dict[str, Any]) -> None:
    learner = begin(spec_of("dense", optimizer=optimizer), cut(table_of(20, 1, 9, 0)))
    learner.committed()
    train_pass(Steps(learner), cut(table_of(20, 1, 9, 0)), key=("epoch", 0))
    assert learner.touched() == ({}, {})
    assert not learner.changes.tables


def test_row_numbers_take_no_more_memory_than_there_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that repeat are dropped time and again, and of a table that has changed as a whole none are kept."""
    monkeypatch.setattr(touched, "MANY", 64)
    weight = nn.Parameter(torch.zeros(1000, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    changes = Touched([weight], optimizer)
    mark = changes.mark()

    def step(rows: range) -> None:
        numbers = torch.tensor([[*rows, *rows]])
        weight.grad = torch.sparse_coo_tensor(numbers, torch.ones(2 * len(rows), 2), weight.shape)
        with changes.step([weight]):
            optimizer.step()
        numbers.zero_()  # as the memory of a batch, which is used again

    for _ in range(100):
        step(range(10, 30))
    found = mark.rows(weight)
    assert found is not None
    assert found.tolist() == [*range(10, 30)]
    kept = mark._rows[id(weight)]
    for _ in range(100):
        step(range(10, 30))
    assert sum(len(part) for part in kept._parts) <= 200
    for at in range(0, 1000, 20):
        step(range(at, at + 20))
    assert mark.rows(weight) is None
    assert changes.mark().rows(weight) is not None


def test_a_mark_keeps_no_learner_in_memory() -> None:
    groups = cut(table_of(20, 1, 9, 0))
    learner = begin(spec_of("plain", optimizer={"name": "sgd"}), groups)
    train_pass(Steps(learner), groups, key=("epoch", 0))
    network = learner.network()
    weight = weakref.ref(learner.model.tables[0].weight)  # type: ignore[union-attr,index]
    gc.disable()
    try:
        del learner
        assert weight() is None, "no circle: the next learner may need its memory"
    finally:
        gc.enable()
    assert network.since is not None
    assert network.since.rows(torch.zeros(3)) is None


# ---- who goes by it --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", BY_ROWS, ids=lambda o: o["name"])
def test_a_copy_of_the_network_is_renewed_by_the_rows_that_have_changed(optimizer: dict[str, Any]) -> None:
    kinds = ("plain", "sum", "shared", "max_norm", "dense")
    learner = begin(spec_of(*kinds, optimizer=optimizer, learning_rate=0.05), cut(table_of(30, 5, 200, 0)))
    steps, network = Steps(learner), learner.network()
    reused = []
    for number in range(4):
        for part in range(2):
            train_pass(steps, cut(table_of(20, 5, 6, 10 * number + part)), key=("shard", number, part))
        before = {id(parameter) for parameter in network.served.parameters()}
        tables = network.renewed(learner)
        network = learner.network(tables)
        reused.append({name for name, p in network.served.named_parameters() if id(p) in before})
        theirs = network.served.state_dict()
        for name, value in learner.model.state_dict().items():
            assert torch.equal(theirs[name], value), name
            assert theirs[name].data_ptr() != value.data_ptr()
        assert network.served.tables[0].weight is network.served.tables[2].weight  # type: ignore[union-attr,index]
    assert reused == [{"tables.0.weight", "tables.1.weight"}] * 4


def test_of_a_learner_that_was_loaded_again_the_copy_is_made_anew() -> None:
    groups = cut(table_of(30, 1, 20, 0))
    learner = begin(spec_of("plain", optimizer={"name": "sgd"}), groups)
    train_pass(Steps(learner), groups, key=("epoch", 0))
    network = learner.network()
    again = Learner.load(learner.spec, *learner.dump())
    train_pass(Steps(again), groups, key=("epoch", 1))
    assert network.renewed(again) == {}


def test_whether_all_is_finite_is_asked_of_the_rows_that_have_changed() -> None:
    groups = cut(table_of(30, 1, 5, 0))
    learner = begin(spec_of("plain", optimizer={"name": "sparse_adam"}), groups)
    steps = Steps(learner)
    train_pass(steps, groups, key=("epoch", 0))
    weight = dict(learner.model.named_parameters())["tables.0.weight"]
    used = learner.features.encode(groups[0].table, "rows").ids_NC
    assert used is not None
    row = int(used[0, 0])
    assert steps.is_finite()
    weight.data[(row + 1) % len(weight) if (row + 1) % len(weight) not in used else 0] = torch.nan
    assert steps.is_finite(), "the row has not changed, as far as torch counts: it is not looked at"
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[row]]), torch.full((1, 3), torch.nan), weight.shape)
    with learner.changes.step([weight]):
        learner.optimizer.step()
    assert not steps.is_finite()

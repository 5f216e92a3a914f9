"""SparseAdam for sparse gradients and Adam for dense ones, as one optimizer with torch's bits."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.rows import begin, cut, plain_spec, same_bits
from tests.training.test_touched import spec_of, table_of
from tidemill.tasks.training.errors import ModelError, SpecError
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import train_pass
from tidemill.tasks.training.optimizers import OPTIMIZERS, Update
from tidemill.tasks.training.steps import Steps

SETTINGS: list[dict[str, Any]] = [{}, {"betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True}]

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "table": nn.Embedding(50, 4, sparse=True, padding_idx=0),
            "bag": nn.EmbeddingBag(50, 4, mode="mean", sparse=True),
            "out": nn.Linear(4, 1),
        }
    )


def loss_of(model: nn.ModuleDict, ids_B: Tensor) -> Tensor:
    embedded_BE = model["table"](ids_B) + model["bag"](torch.stack([ids_B, ids_B.roll(1)], 1))
    loss: Tensor = model["out"](embedded_BE).square().mean()
    return loss


def make(name: str, parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name].make(parameters, **settings)  # type: ignore[index,call-arg]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bits_are_those_of_torchs_sparse_adam_beside_torchs_adam(settings: dict[str, Any]) -> None:
    ours, theirs = net(), net()
    optimizer = make("sparse_adam", ours.parameters(), lr=0.1, **settings)
    tables = [*theirs["table"].parameters(), *theirs["bag"].parameters()]
    torchs = [
        torch.optim.SparseAdam(tables, lr=0.1, **settings),
        torch.optim.Adam(theirs["out"].parameters(), lr=0.1, **settings),
    ]
    chance = torch.Generator().manual_seed(1)
    for step in range(30):
        ids_B = torch.randint(0, 50, (16,), generator=chance)
        for each in (optimizer, *torchs):
            each.param_groups[0]["lr"] = 0.1 / (step + 1)
            each.zero_grad()
        loss_of(ours, ids_B).backward()
        loss_of(theirs, ids_B).backward()
        for each in (optimizer, *torchs):
            each.step()
        if step == 10:  # as of a run that goes on from a stored version
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    mine = [optimizer.state[parameter] for parameter in ours.parameters()]
    for own, each in zip(mine, [state for one in torchs for state in one.state.values()], strict=True):
        assert own["step"] == each["step"] == 30
        assert all(same_bits(own[name], each[name]) for name in ("exp_avg", "exp_avg_sq"))


def test_a_model_without_sparse_gradients_is_trained_as_by_adam() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(4, 1)
    theirs = copy.deepcopy(ours)
    optimizer, adam = make("sparse_adam", ours.parameters(), lr=0.1), torch.optim.Adam(theirs.parameters(), lr=0.1)
    update: Update | None = None
    for _ in range(5):
        x = torch.randn(8, 4)
        for each, model in ((optimizer, ours), (adam, theirs)):
            each.zero_grad()
            model(x).square().mean().backward()
        adam.step()
        if update is None:
            optimizer.step()
            update = Update(optimizer, "sparse_adam", list(ours.parameters()))
        else:
            update.step()
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_table_that_has_a_dense_gradient_in_some_steps_goes_on() -> None:
    """As one that the output uses too, in some batches: its gradient is dense then."""
    weight = nn.Parameter(torch.ones(6, 2))
    optimizer = make("sparse_adam", [weight], lr=0.1)
    for step in range(4):
        weight.grad = torch.ones(6, 2)
        if step % 2:
            weight.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), weight.shape)
        optimizer.step()
    assert optimizer.state[weight]["step"] == 4
    assert torch.equal(weight[0], weight[2])
    assert weight[1, 0] < weight[0, 0] < 1


def test_what_torchs_sparse_adam_does_not_take_is_refused() -> None:
    groups = cut(table_of(20, 1, 9, 0))
    for arguments in ({"weight_decay": 0.1}, {"amsgrad": True}):
        with pytest.raises(SpecError, match="which sparse_adam does not take: it takes"):
            begin(spec_of("plain", optimizer={"name": "sparse_adam", "arguments": arguments}), groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_takes_no_sparse_gradients_is_refused_and_others_are_named(name: str) -> None:
    groups = cut(table_of(20, 1, 9, 0))
    steps = Steps(begin(spec_of("plain", optimizer={"name": name}), groups))
    if name in ("adagrad", "sgd", "sparse_adam"):
        assert train_pass(steps, groups, key=("epoch", 0)).rows == 20
        return
    with pytest.raises(
        ModelError, match=f"{name} takes no sparse gradients: use sparse_adam or adagrad or sgd, or sparse=F"
    ):
        train_pass(steps, groups, key=("epoch", 0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": {"name": "cosine", "arguments": {"T_max": 9}, "warmup_steps": 2}},
        {"ema_decay": 0.9},
        {"optimizer": {"name": "sparse_adam", "decay_biases": False}},
        {"replay": {"rows": 20}},
    ],
    ids=str,
)
def test_going_on_from_stored_bytes_gives_the_same_bits(settings: dict[str, Any]) -> None:
    kinds = ("plain", "padded", "sum", "mean", "shared", "sometimes", "dense")
    spec = spec_of(*kinds, **({"optimizer": {"name": "sparse_adam"}} | settings))
    groups = [cut(table_of(33, len(kinds), 20, seed)) for seed in range(4)]
    straight = begin(spec, groups[0])
    stored = [straight.dump()]
    for number, rows in enumerate(groups):
        train_pass(Steps(straight), rows, key=("shard", number), replay=True, remember=True)
        stored.append(straight.dump())
    for begun in range(5):
        resumed = Learner.load(spec, *stored[begun])
        assert resumed.dump() == stored[begun]
        steps = Steps(resumed)
        for number, rows in enumerate(groups[begun:], begun):
            train_pass(steps, rows, key=("shard", number), replay=True, remember=True)
        assert resumed.dump() == stored[4]


@pytest.mark.parametrize(
    "model",
    [
        {"factory": "linear", "arguments": {}},
        {"factory": "mlp", "arguments": {"embedding": 4}},
        {"factory": "mlp", "arguments": {"embedding": None}},
    ],
    ids=str,
)
def test_a_built_in_model_has_sparse_gradients_where_it_is_told_so(model: dict[str, Any]) -> None:
    """By SGD and Adagrad the weights are those of the dense model, but for the order of sums; by one more setting."""
    table = table_of(40, 2, 9, 0).append_column("words", [[[f"w{i % 5}", f"w{i % 7}"] for i in range(40)]])
    features = ["x0", "x1", *({"name": f"c{i}", "kind": "category", "buckets": 30} for i in range(2)), "words"]
    weights = []
    for sparse in (False, True):
        chosen = {**model, "arguments": {**model["arguments"], "sparse": sparse}}
        spec = plain_spec(2, features=features, model=chosen, optimizer={"name": "adagrad"}, batch_size=8)
        learner = begin(spec, cut(table))
        learner.committed()
        train_pass(Steps(learner), cut(table), key=("epoch", 0))
        weights.append(learner.model.state_dict())
        tables = {name for name, p in learner.model.named_parameters() if "embeddings" in name or "values" in name}
        tables |= {name for name, p in learner.model.named_parameters() if "items" in name}
        assert learner.touched()[0].keys() == (tables if sparse else set())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_with_sparse_gradients_steps_are_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    groups = cut(table_of(40, 1, 9, 0))
    plain = begin(spec_of("plain", optimizer={"name": "sparse_adam"}), groups)
    compiled = begin(spec_of("plain", optimizer={"name": "sparse_adam"}, compile="on"), groups)
    train_pass(Steps(plain), groups, key=("epoch", 0))
    with caplog.at_level(logging.WARNING):
        train_pass(Steps(compiled, expected=6, per_call=2, backend="eager"), groups, key=("epoch", 0))
    assert compiled.dump()[0] == plain.dump()[0]
    assert compiled.counters.compiled_steps == 0
    assert caplog.text.count("compile: trained without compilation") == 1

"""Our backward pass and functional step have the bits of torch's own, for every optimizer and its main settings."""

import copy
from typing import Any, ClassVar, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.training.rows import same_bits
from tidemill.tasks.training import optimizers
from tidemill.tasks.training.optimizers import OPTIMIZERS, Update, backward
from tidemill.tasks.training.spec import OptimizerName

CASES: list[tuple[OptimizerName, dict[str, Any]]] = [
    *(
        (name, {}) for name in OPTIMIZERS if name != "sparse_adam"
    ),  # torch's takes no dense gradients: test_sparse_adam.py
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"weight_decay": 0.01}),
    ("sgd", {"maximize": True}),
    ("adam", {"amsgrad": True, "betas": (0.8, 0.95)}),
    ("adamw", {"weight_decay": 0.1}),
    ("rmsprop", {"centered": True, "momentum": 0.5}),
    ("nadam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]


def test_every_optimizer_of_a_spec_is_in_the_table() -> None:
    assert OPTIMIZERS.keys() == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", ["foreach", "fused", "differentiable"])
def test_another_implementation_that_was_asked_for_is_left_to_torch(name: str) -> None:
    weights = [nn.Parameter(torch.ones(2))]
    assert Update.serves(torch.optim.SGD(weights))
    assert not Update.serves(torch.optim.SGD(weights, **{name: True}))


def test_an_accelerator_takes_all_parameters_at_once_as_torch_does() -> None:
    assert not Update.serves(torch.optim.SGD([nn.Parameter(torch.ones(2, device="meta"))]))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_same_bits_as_torchs_step(name: OptimizerName, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    theirs = copy.deepcopy(ours)
    nets = (ours, theirs)
    make = OPTIMIZERS[name].make
    torchs_own = getattr(torch.optim, make.__name__)
    assert torchs_own is not make
    both = [kind(net.parameters(), lr=0.1, **settings) for kind, net in zip((make, torchs_own), nets, strict=True)]
    update: Update | None = None
    for step in range(8):
        x, rate = torch.randn(16, 4), 0.1 / (step + 1)
        for net, optimizer in zip(nets, both, strict=True):
            optimizer.param_groups[0]["lr"] = rate  # as a schedule does
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if step == 5:
                net[2].bias.grad = None  # a parameter that one step does not use
        both[1].step()
        if update is None:
            both[0].step()
            update = Update(both[0], name, list(ours.parameters()))
        else:
            update.step()
        if step == 3:  # as a run does that goes on from a stored version
            for optimizer in both:
                optimizer.load_state_dict(optimizer.state_dict())
            update = None
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    mine, torchs = (optimizer.state_dict()["state"] for optimizer in both)
    assert mine.keys() == torchs.keys()
    for index, values in torchs.items():
        for key, value in values.items():
            assert same_bits(mine[index][key], value) if isinstance(value, torch.Tensor) else mine[index][key] == value


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 37])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"weight_decay": 0.3}),
        ("adam", {}),
        ("adam", {"weight_decay": 0.1}),  # moves all rows
        ("adamw", {"amsgrad": True}),
        ("adamw", {"maximize": True}),
    ],
    ids=str,
)
def test_a_table_of_which_few_rows_are_in_use_has_the_bits_of_torchs_step(
    name: OptimizerName, settings: dict[str, Any], width: int
) -> None:
    """More and more rows come into use, one step passes a parameter over, and the training goes on from stored state."""
    torch.manual_seed(0)
    ours = nn.ModuleDict({"table": nn.EmbeddingBag(1001, width, mode="sum"), "out": nn.Linear(width, 1)})
    theirs = copy.deepcopy(ours)
    nets = (ours, theirs)
    make = OPTIMIZERS[name].make
    both = [
        kind(net.parameters(), lr=0.01, **settings)
        for kind, net in zip((make, getattr(torch.optim, make.__name__)), nets, strict=True)
    ]
    update: Update | None = None
    for step in range(60):
        rows = torch.randint(0, 3 + step * step // 2, (16, 2)).clamp(max=1000)
        target = torch.randn(16, 1)
        for net, optimizer in zip(nets, both, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.zero_grad()
            (net["out"](net["table"](rows)) - target).square().mean().backward()
            if step == 7:
                net["out"].bias.grad = None
        both[1].step()
        if update is None:
            both[0].step()
        else:
            update.step()
        if step in (0, 20, 50):  # begun anew, as by a run that goes on
            update = Update(both[0], name, list(ours.parameters()))
        assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)), step
    mine, torchs = (optimizer.state_dict()["state"] for optimizer in both)
    for index, values in torchs.items():
        assert all(same_bits(mine[index][key], value) for key, value in values.items())


def test_of_a_table_only_the_rows_in_use_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.EmbeddingBag(1001, 64, mode="sum")
    optimizer = torch.optim.AdamW(table.parameters())
    seen: list[int] = []
    adam = optimizers._adam
    monkeypatch.setattr(
        optimizers, "_adam", lambda *lists, **given: (seen.append(len(lists[0][0])), adam(*lists, **given))
    )
    for rows in ([[3, 4]], [[3, 5]], [[900, 4]]):
        optimizer.zero_grad()
        table(torch.tensor(rows)).sum().backward()
        if not seen and not optimizer.state:
            optimizer.step()
            update = Update(optimizer, "adamw", list(table.parameters()))
        else:
            update.step()
    assert seen == [3, 4]


def test_backward_adds_the_gradients_that_torch_adds() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.BatchNorm1d(5), nn.Linear(5, 1))
    theirs = copy.deepcopy(ours)
    x = torch.randn(16, 4)
    for net, run in ((ours, backward), (theirs, Tensor.backward)):
        torch.manual_seed(1)
        for _ in range(2):  # the second adds to the first
            run(net(x).square().mean())
    gradients = [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all(a is not None and b is not None and same_bits(a, b) for a, b in gradients)
    assert all(a is not None and a.abs().sum() for a, _ in gradients[:1])


class _Overriding(Tensor):
    """Counts the functions of torch that are called with it."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch leaves it so


def test_a_loss_that_overrides_torchs_functions_is_left_to_torch() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = (weight * torch.ones(2).as_subclass(_Overriding)).sum()
    assert isinstance(loss, _Overriding)
    backward(loss)
    assert "backward" in _Overriding.calls
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["no gradient", "two losses", "complex"])
def test_what_has_no_gradients_is_the_error_of_torch(kind: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = {"no gradient": weight.sum().detach(), "two losses": weight * 2, "complex": weight.sum() * 1j}[kind]
    with pytest.raises(RuntimeError) as theirs:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with pytest.raises(RuntimeError) as ours:
        backward(loss)
    assert str(ours.value) == str(theirs.value)
    assert weight.grad is None

"""The functional step has the bits of torch's own, for every optimizer and its main settings."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tasks.training.learner import OPTIMIZERS
from tasks.training.updates import FUNCTIONAL, Update
from tests.training.rows import same_bits

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OPTIMIZERS),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("adam", {"amsgrad": True, "betas": (0.8, 0.95)}),
    ("adamw", {"weight_decay": 0.1}),
    ("rmsprop", {"centered": True, "momentum": 0.5}),
    ("nadam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]


def test_every_optimizer_has_one() -> None:
    assert FUNCTIONAL.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", ["foreach", "fused", "differentiable"])
def test_another_implementation_that_was_asked_for_is_left_to_torch(name: str) -> None:
    weights = [nn.Parameter(torch.ones(2))]
    assert Update.serves(torch.optim.SGD(weights))
    assert not Update.serves(torch.optim.SGD(weights, **{name: True}))


def test_an_accelerator_takes_all_parameters_at_once_as_torch_does() -> None:
    assert not Update.serves(torch.optim.SGD([nn.Parameter(torch.ones(2, device="meta"))]))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_same_bits_as_torchs_step(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    theirs = copy.deepcopy(ours)
    nets = (ours, theirs)
    optimizers = [OPTIMIZERS[name](net.parameters(), lr=0.1, **settings) for net in nets]  # type: ignore[call-arg]
    update: Update | None = None
    for step in range(8):
        x, rate = torch.randn(16, 4), 0.1 / (step + 1)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = rate  # as a schedule does
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if step == 5:
                net[2].bias.grad = None  # a parameter that one step does not use
        optimizers[1].step()
        if update is None:
            optimizers[0].step()
            update = Update(optimizers[0], name, list(ours.parameters()))
        else:
            update.step()
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    mine, torchs = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert mine.keys() == torchs.keys()
    for index, values in torchs.items():
        for key, value in values.items():
            assert same_bits(mine[index][key], value) if isinstance(value, torch.Tensor) else mine[index][key] == value

"""Large tensors are gone through block by block, with the bits of doing it at once."""

import copy

import pytest
import torch
from torch import nn

from tidemill.tasks.training.finite import is_finite
from tidemill.tasks.training.large import BLOCK, LARGE, blocks, is_large, step_in_blocks, take_step
from tidemill.tasks.training.optimizers import OPTIMIZERS
from tidemill.tasks.training.spec import OptimizerName

ROWS = 2 * BLOCK + 37
CASES: list[tuple[OptimizerName, dict[str, object]]] = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("adam", {}),
    ("adam", {"amsgrad": True, "weight_decay": 0.01}),
    ("adamw", {"weight_decay": 0.1}),
    ("adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
    ("adadelta", {}),
    ("adamax", {}),
    ("nadam", {}),
    ("radam", {}),
]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_step_in_blocks_has_the_bits_of_a_step_of_the_whole(
    name: OptimizerName, arguments: dict[str, object]
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(ROWS, generator=generator))
    in_blocks = copy.deepcopy(whole)
    optimizers = [OPTIMIZERS[name].make([p], lr=0.01, **arguments) for p in (whole, in_blocks)]  # type: ignore[call-arg]
    held: dict[str, object] = {}
    for step in range(7):  # RAdam's arithmetic is another one from the sixth step on
        whole.grad = torch.randn(ROWS, generator=generator)
        in_blocks.grad = whole.grad.clone()
        optimizers[0].step()
        with torch.no_grad():
            step_in_blocks(optimizers[1], optimizers[1].param_groups[0], in_blocks)
        assert torch.equal(whole, in_blocks)
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].get(0, {}).items():
            other = states[1][0][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        if step == 0:
            held = dict(optimizers[1].state.get(in_blocks, {}))
    assert all(optimizers[1].state[in_blocks][key] is value for key, value in held.items()), "others may hold them"


def test_only_large_parameters_take_their_step_apart() -> None:
    small, large, unused = (nn.Parameter(torch.ones(n)) for n in (3, LARGE, LARGE))
    optimizer = OPTIMIZERS["adam"].make([small, large, unused], lr=0.1)  # type: ignore[call-arg]
    small.grad, large.grad = torch.ones(3), torch.ones(LARGE)
    gradients = small.grad, large.grad
    take_step(optimizer)
    assert torch.equal(small, large[:3])
    assert torch.equal(unused, torch.ones(LARGE))
    assert small.grad is gradients[0]
    assert large.grad is gradients[1]
    assert [id(parameter) for parameter in optimizer.state] == [id(small), id(large)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_of_a_large_tensor_that_is_not_finite_is_found(value: float) -> None:
    tensor = torch.zeros(LARGE + 5)
    assert is_large(tensor)
    assert is_finite(tensor)
    tensor[-2] = value
    assert not is_finite(tensor)


def test_blocks_are_views_of_all_numbers() -> None:
    tensor = torch.zeros(3, BLOCK)
    for block in blocks(tensor):
        block += 1
    assert torch.equal(tensor, torch.ones(3, BLOCK))

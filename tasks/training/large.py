"""What is done to every number of a large tensor is done block by block, so that what it needs beside stays small.

An optimizer's arithmetic makes up to two tensors of the size of the parameter on its way. Each of its numbers follows from those
at the same place, so that the bits of a step in blocks are those of a step of the whole.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

LARGE: Final = 2**24
"""Numbers of a tensor from which on it is large: 64 MiB in float32."""
BLOCK: Final = 2**20
"""Numbers of a block."""


def is_large(tensor: Tensor) -> bool:
    """Whether it is worth going through a tensor block by block, and possible."""
    return tensor.numel() >= LARGE and tensor.layout == torch.strided and tensor.is_contiguous()


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """All numbers of a contiguous tensor, as flat views of its memory."""
    yield from torch.split(tensor.detach().view(-1), BLOCK)


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """As `optimizer.step()`, with the bits of that; large parameters on a CPU one after the other, in blocks."""
    apart = [
        (group, parameter, parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and serves(parameter, parameter.grad)
    ]
    for _, parameter, _ in apart:
        parameter.grad = None
    optimizer.step()
    for group, parameter, gradient in apart:
        parameter.grad = gradient
        step_in_blocks(optimizer, group, parameter)


def serves(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether `step_in_blocks` can take a step of this parameter, and saves memory by it."""
    on_cpu = parameter.device.type == "cpu" and not parameter.is_complex()
    return on_cpu and is_large(parameter) and is_large(gradient)


def step_in_blocks(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """A step of one parameter of the optimizer's, by its gradient; its state is made in the first one."""
    settings = {name: value for name, value in group.items() if name != "params"}
    gradient, state = parameter.grad, optimizer.state.get(parameter, {})
    assert gradient is not None, "asked before"
    made: dict[str, Any] = {}
    at = 0
    for numbers, by in zip(blocks(parameter), blocks(gradient), strict=True):
        numbers.grad, place = by, slice(at, at + numbers.numel())
        alone = type(optimizer)([{**settings, "params": [numbers]}], lr=group["lr"])  # type: ignore[call-arg]  # not in the base
        if state:
            alone.state[numbers] = {name: _block(value, place) for name, value in state.items()}
        alone.step()
        for name, value in alone.state.get(numbers, {}).items():
            if not isinstance(value, Tensor) or not value.ndim:
                made[name] = value
            elif state.get(name) is None:
                if name not in made:
                    made[name] = torch.empty(parameter.shape, dtype=value.dtype)
                made[name].view(-1)[place] = value
        at = place.stop
    for name, value in made.items():
        if isinstance(state.get(name), Tensor):  # others may hold it
            state[name].copy_(value)
        else:
            optimizer.state[parameter][name] = value


def _block(value: Any, place: slice) -> Any:
    """Of a state its part, and of a count, which each block would move on, a copy."""
    if not isinstance(value, Tensor):
        return value
    return value.view(-1)[place] if value.ndim else value.clone()

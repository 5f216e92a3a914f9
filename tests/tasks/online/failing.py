"""A model and a loss that do what a test wants before they compute anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Deed = Callable[["Failing", Tensor, Tensor], Tensor | None]
"""Is given the model, its input [B, F] and its output; raises what the test wants to see, or returns another output."""

_deeds: list[Deed] = []
_losses: list[Callable[[Tensor], None]] = []


class Failing(nn.Module):
    """A linear model."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(numbers, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        output = self.linear(x_BF)
        for deed in _deeds:
            if (other := deed(self, x_BF, output)) is not None:
                output = other
        return output


def model(numbers: int) -> nn.Module:
    return Failing(numbers)


def pairs(numbers: int) -> nn.Module:
    """Needs two rows at least, as every batch norm does."""
    return nn.Sequential(nn.Linear(numbers, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def loss(output: Tensor, target: Tensor) -> Tensor:
    for deed in _losses:
        deed(target)
    return (output.flatten() - target.flatten()) ** 2


@contextmanager
def failing(deed: Deed) -> Iterator[None]:
    """In this context the model does this first."""
    _deeds.append(deed)
    try:
        yield
    finally:
        _deeds.remove(deed)


@contextmanager
def losing(deed: Callable[[Tensor], None]) -> Iterator[None]:
    """In this context the loss does this first, with its targets."""
    _losses.append(deed)
    try:
        yield
    finally:
        _losses.remove(deed)


class Backward(torch.autograd.Function):
    """Passes through, and fails on the way back."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise ValueError("no gradient today")

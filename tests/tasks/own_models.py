"""Models and metrics as users write them, with faults that only a restart or the end of a run shows."""

import random

import numpy
import torch
from torch import Tensor, nn
from torchmetrics import Metric


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("mask", torch.tensor([float("-inf"), 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.dropout(self.noisy(x)))
        return output

    def noisy(self, x: Tensor) -> Tensor:
        return x


class Counter(Plain):
    """Counts its calls in Python."""

    calls = 0

    def noisy(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x * (1 + 0.01 * self.calls)


class Unkept(Plain):
    """A buffer that moves and is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2), persistent=False)

    def noisy(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Numpy(Plain):
    def noisy(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(numpy.random.rand(*x.shape)).float() if self.training else x


class Python(Plain):
    def noisy(self, x: Tensor) -> Tensor:
        return x * random.random() if self.training else x


class OwnGenerator(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(1)

    def noisy(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=self.draw) if self.training else x


class Grows(Plain):
    """Has a buffer that becomes longer with each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def noisy(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().flatten()[:1]])
        return x


class Hides(Plain):
    """Stores less than it is made of."""

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        return {"only": self.layer.weight}


class Slope(Plain):
    """Adds the slope of its own output, and keeps a tensor of a call for the next one."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(2)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            output = super().forward(at * self.kept)
            (slope,) = torch.autograd.grad(output.sum(), at, create_graph=True)
        return output + slope.sum(1, keepdim=True)


class Many(Metric):
    """Gives more than one number."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(3), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        self.total += (predicted - actual).abs().sum()

    def compute(self) -> Tensor:
        return self.total


class Mapped(Many):
    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {"total": self.total}


class Single(Many):
    def compute(self) -> Tensor:
        return self.total[:1]


class Refuses(Single):
    def update(self, predicted: Tensor, actual: Tensor) -> None:
        raise RuntimeError("only for images")


class OfPrices(Single):
    """Takes for granted that all targets are positive."""

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        if (actual <= 0).any():
            raise ValueError("no price is negative")
        super().update(predicted, actual)


class OfBothSigns(Single):
    """Needs targets of both signs, as an area under a curve needs both classes."""

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        if (actual > 0).all():
            raise ValueError("only one sign is present")
        super().update(predicted, actual)

"""The networks that are trained, and the plain PyTorch step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.work import LEARNING_RATE, Work

Step = Callable[[Tensor, Tensor], Any]  # x [B, F], y [B]


def network(work: Work) -> nn.Module:
    """The net of the work, with the same weights in every case."""
    torch.manual_seed(0)
    inputs = len(work.features)
    if work.net == "net":
        return nn.Sequential(nn.Linear(inputs, 20), nn.Linear(20, 1))
    if work.net == "linear":
        return nn.Linear(inputs, 1)
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))


def eager(model: nn.Module, *, fused: bool | None = None) -> Step:
    """One step as the PyTorch tutorials write it."""
    loss_function = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=fused)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_function(model(x), y.unsqueeze(1)).backward()
        optimizer.step()

    return step

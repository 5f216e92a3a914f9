"""The smallest model of one's own: any importable callable that returns an `nn.Module` can stand in a spec.

    {"features": ["x0", ..., "x9"], "target": "y", "model": {"factory": "examples.net:Net"}, "standardize_features": false}

The defaults of a spec are its training: mean squared error, SGD with learning rate 0.01, batches of 64, 10 epochs, shuffled.
"""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Linear(10, 20) -> Linear(20, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 1))

    def forward(self, x_BF: Tensor) -> Tensor:
        """float32 [B, 10] -> float32 [B, 1]."""
        out_B1: torch.Tensor = self.layers(x_BF)
        return out_B1

"""Networks as users write them: some can be traced by torch, some not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from tidemill.tasks.training.models import Inputs


class Own(nn.Module):
    """Embeddings, batch norm, attention over the columns, dropout: nothing that cannot be traced."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs.buckets[0] + 1, 4)
        self.norm = nn.BatchNorm1d(inputs.numbers)
        self.up = nn.Linear(1, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.down = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, inputs.outputs))

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        h = self.up(self.norm(x_BF).unsqueeze(2))
        h = self.attention(h, h, h, need_weights=False)[0].mean(1)
        return self.down(torch.cat([h, self.embed(ids_BC[:, 0])], 1))


class Careful(nn.Module):
    """Looks at what it is given, as defensive code does: a branch that depends on the data."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs.numbers, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        if (x_BF.abs() > 1e9).any():
            raise ValueError("an input is out of range")
        return self.layer(x_BF)


class Otherwise(Careful):
    """Does something else where it is traced, which nobody but the comparison can see."""

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layer(x_BF) + (0.01 if torch.compiler.is_exporting() else 0.0)


class Fixed(Careful):
    """Works for one size of batches when it is traced: it takes that for a constant."""

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layer(x_BF) + torch.zeros(int(x_BF.shape[0]), 1)


def scripted(inputs: Inputs) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 deprecates what users still have
        module: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(inputs.numbers, 1)))
    return module

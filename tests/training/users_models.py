"""Small networks as users write them, each with one habit that a training loop has to bear or refuse."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tidemill.tasks.training.models import Inputs


class CausalMask(nn.Module):
    """The columns are tokens, under the usual additive mask of -inf."""

    def __init__(self, inputs: Inputs, persistent: bool = True) -> None:
        super().__init__()
        n = inputs.numbers
        self.register_buffer("mask", torch.triu(torch.full((n, n), -torch.inf), diagonal=1), persistent=persistent)
        self.up, self.attention = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.down = nn.Linear(8, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        h = self.up(x_BF.unsqueeze(2))
        return self.down(self.attention(h, h, h, attn_mask=self.mask, need_weights=False)[0][:, -1])


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layers(x_BF)


class Cached(nn.Module):
    """Makes a table when it is first called, and keeps it and its last activations."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1, 8), nn.Linear(8, 1)
        self.table: Tensor | None = None
        self.last: Tensor | None = None

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.table is None:
            self.table = (torch.arange(x_BF.shape[1]).unsqueeze(1) / 10 ** torch.arange(8)).cos()
        self.last = (self.up(x_BF.unsqueeze(2)) * self.table).sum(1)
        return self.down(self.last)


class Sparse(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs.buckets[0] + 1, 4, sparse=True)
        self.out = nn.Linear(inputs.numbers + 4, 1)

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        return self.out(torch.cat([x_BF, self.embed(ids_BC[:, 0])], 1))


class OfType(nn.Module):
    """Computes in another type than float32."""

    def __init__(self, inputs: Inputs, dtype: str, cast: bool = True) -> None:
        super().__init__()
        self.dtype, self.cast = getattr(torch, dtype), cast
        self.layer = nn.Linear(inputs.numbers, 1).to(self.dtype)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layer(x_BF.to(self.dtype) if self.cast else x_BF)


class FrozenPart(nn.Module):
    """Its batch norm was left in evaluation mode."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(inputs.numbers), nn.Linear(inputs.numbers, 1)
        self.norm.eval()

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.out(self.norm(x_BF))


class Complex(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs.numbers, dtype=torch.complex64))

    def forward(self, x_BF: Tensor) -> Tensor:
        return (x_BF * self.weight).sum(1, keepdim=True).abs()


class Unused(nn.Module):
    """A parameter that is never used, one without elements, a hook, and a lock that cannot be copied."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.layer, self.never, self.none = (
            nn.Linear(inputs.numbers, 1),
            nn.Linear(3, 3),
            nn.Parameter(torch.zeros(0, 4)),
        )
        self.calls = iter(range(10**9))
        self.layer.register_forward_hook(lambda *_: None)
        self.generator = (i for i in range(3))  # no copy.deepcopy of it

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layer(x_BF)


class Careful(nn.Module):
    """Checks what it is given, as defensive code does."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs.numbers, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        if (x_BF.abs() > 50).any():
            raise ValueError("an input is out of range")
        return self.layer(x_BF)


class Outside(nn.Module):
    """Holds state that its state_dict does not: of the kind that is asked for."""

    def __init__(self, inputs: Inputs, kind: str) -> None:
        super().__init__()
        self.kind, self.count = kind, 0
        self.layer = nn.Linear(inputs.numbers, 1)
        self.own = torch.Generator().manual_seed(1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x_BF: Tensor) -> Tensor:
        if not self.training:
            return self.layer(x_BF)
        if self.kind == "counter":
            self.count += 1
            return self.layer(x_BF) * (1 + 0.01 * self.count)
        if self.kind == "buffer":
            self.seen += len(x_BF)
            return self.layer(x_BF) * (1 + 0.001 * self.seen)
        if self.kind == "generator":
            return self.layer(x_BF + torch.rand(x_BF.shape, generator=self.own))
        if self.kind == "numpy":
            import numpy as np

            return self.layer(x_BF + torch.from_numpy(np.random.standard_normal(x_BF.shape).astype("f4")))
        return self.layer(x_BF + torch.rand(x_BF.shape))  # torch's own generator, which a pass seeds


def linear(inputs: Inputs) -> nn.Module:
    return nn.Linear(inputs.numbers, 1)


def normed(inputs: Inputs) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(inputs.numbers, 4)), nn.Tanh(), nn.Linear(4, 1))


def orthogonal(inputs: Inputs) -> nn.Module:
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(inputs.numbers, inputs.numbers)), nn.Linear(inputs.numbers, 1)
    )


def shared(inputs: Inputs) -> nn.Module:
    layer = nn.Linear(inputs.numbers, inputs.numbers)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(inputs.numbers, 1))


def partly_frozen(inputs: Inputs) -> nn.Module:
    model = nn.Sequential(nn.Linear(inputs.numbers, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    return model


def scripted(inputs: Inputs) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 says that it is deprecated; users have such models
        return torch.jit.script(nn.Sequential(nn.Linear(inputs.numbers, 4), nn.ReLU(), nn.Linear(4, 1)))


def in_evaluation_mode(inputs: Inputs) -> nn.Module:
    """As `from_pretrained` of some libraries returns a model."""
    return nn.Sequential(nn.Linear(inputs.numbers, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()


def nothing_to_train(inputs: Inputs) -> nn.Module:
    return nn.Linear(inputs.numbers, 1).requires_grad_(False)

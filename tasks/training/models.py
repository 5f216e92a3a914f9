"""Networks: the built-in ones, and those of the user's own factory.

Every model is called `model(x_BF)`, or `model(x_BF, ids_BC)` when there are category columns, and returns [B, outputs]
(for one output [B] will do): numbers for regression, logits for binary and multiclass.

Shape legend: B rows of a batch, F numbers and C categories of one row, E size of an embedding.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tasks.training.errors import FactoryError
from tasks.training.features import Features
from tasks.training.imports import imported
from tasks.training.spec import Spec


@dataclass(frozen=True)
class Inputs:
    """What a model is fed and must return; given to a factory that has a parameter `inputs`."""

    numbers: int  # F, the width of x_BF
    buckets: tuple[int, ...]  # for each of the C categories: ids run from 0 to this number, inclusive
    outputs: int  # width of the output: number of classes, or 1


class _WithCategories(nn.Module):
    """A network on x_BF and the embeddings of ids_BC, side by side."""

    def __init__(self, buckets: Sequence[int], embedding: int, network: nn.Module) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count + 1, embedding) for count in buckets)
        self.network = network

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        embedded = [embed(ids_B) for embed, ids_B in zip(self.embeddings, ids_BC.unbind(1), strict=True)]
        output: Tensor = self.network(torch.cat([x_BF, *embedded], 1))
        return output


class _LinearWithCategories(nn.Module):
    """A linear model on x_BF and one-hot ids_BC: an embedding row is the weights of one category value."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(_zero_embedding(count + 1, inputs.outputs) for count in inputs.buckets)
        self.bias = nn.Parameter(torch.zeros(inputs.outputs))
        self.numbers = nn.Linear(inputs.numbers, inputs.outputs, bias=False) if inputs.numbers else None

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        output = self.bias if self.numbers is None else self.numbers(x_BF) + self.bias
        for embed, ids_B in zip(self.embeddings, ids_BC.unbind(1), strict=True):
            output = output + embed(ids_B)
        return output


def _zero_embedding(rows: int, size: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, size)
    nn.init.zeros_(embedding.weight)  # a value that was never seen must not move the output
    return embedding


def linear(inputs: Inputs) -> nn.Module:
    """Linear, logistic or softmax regression. Categories count as one-hot columns."""
    return _LinearWithCategories(inputs) if inputs.buckets else nn.Linear(inputs.numbers, inputs.outputs)


def mlp(inputs: Inputs, hidden: Sequence[int] = (64, 32), embedding: int = 8, dropout: float = 0.0) -> nn.Module:
    """Fully connected layers with ReLU and dropout between them; each category becomes `embedding` numbers."""
    layers: list[nn.Module] = []
    width = inputs.numbers + embedding * len(inputs.buckets)
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        width = size
    network = nn.Sequential(*layers, nn.Linear(width, inputs.outputs))
    return _WithCategories(inputs.buckets, embedding, network) if inputs.buckets else network


def build(spec: Spec, features: Features) -> nn.Module:
    """The model of the spec, its weights drawn right after `torch.manual_seed(spec.seed)`, as in a plain script.

    The global random state is left as it was. Raises FactoryError.
    """
    name = spec.model.factory
    factory = {"linear": linear, "mlp": mlp}.get(name) or imported(name, "model.factory")
    arguments: dict[str, Any] = dict(spec.model.arguments)
    if "inputs" in _parameters(factory, name):
        arguments["inputs"] = Inputs(features.numbers, features.buckets, spec.outputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            model = factory(**arguments)
        except Exception as error:  # the user's code may raise anything
            given = ", ".join(spec.model.arguments) or "none"
            raise FactoryError(
                f"model.factory {name!r} raised {type(error).__name__}: {_first_line(error)} (arguments given: {given})"
            ) from error
    if not isinstance(model, nn.Module):
        raise FactoryError(f"model.factory {name!r} returned {type(model).__name__}: return a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FactoryError(f"model.factory {name!r} returned a model without trainable parameters")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise FactoryError(f"model.factory {name!r}: {key!r} of its state_dict is no tensor and cannot be stored")
    return model


def _first_line(error: Exception) -> str:
    """torch appends the stack of its C++ code."""
    return next(iter(str(error).splitlines()), "")


def _parameters(factory: Callable[..., object], name: str) -> Sequence[str]:
    try:
        return tuple(inspect.signature(factory).parameters)
    except ValueError as error:  # some C callables have no signature
        raise FactoryError(f"model.factory {name!r} has no signature: wrap it in a Python function") from error

"""The weights of a built-in model by what they belong to: a column, a layer, an output.

Where a weight stands in its tensor follows from all columns and classes together: one more column moves the others. What it
belongs to does not change.

Shape legend: F numbers of one row, U units of a layer, R values of a category, E size of an embedding.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from tidemill.tasks.training.features import Features

Kind = Literal["column", "nulls", "embedding", "layer", "output"]


class Belonging(NamedTuple):
    """What some weights of a model belong to."""

    kind: Kind
    name: str
    """Of the column or the output, or the number of the layer, from 1."""
    part: str
    """Which of its tensors."""
    output: str = ""
    """The output that they lead to, where the first layer is the last one too; else empty."""

    @property
    def is_input(self) -> bool:
        """Whether they are added up with those of other inputs in the first layer: with weights of 0 an input has no say."""
        return self.kind in ("column", "nulls")

    @property
    def told(self) -> str:
        """In words, without the tensor."""
        name = f"of {self.name!r}" if self.kind in ("nulls", "embedding") else self.name
        return f"column {self.name!r}" if self.kind == "column" else f"{self.kind} {name}"


def output_names(features: Features) -> list[str]:
    """A name for each output of a model. Of another task, of other two labels or in another unit it is another output."""
    target, *more = features.targets
    if features.task == "regression" or more:
        unit = ", scaled" if features.standardize_target else ""
        return [f"{name!r} ({features.task}{unit})" for name in features.targets]
    labels = [*map(repr, features.labels or range(features.classes or 2))]
    if features.task == "binary":
        return [f"{target!r} = {labels[1]} rather than {labels[0]}"]
    return [f"{target!r} = {label}" for label in labels]


def belongings(factory: str, features: Features, state: Mapping[str, Tensor]) -> dict[Belonging, Tensor]:
    """All weights of a built-in model, as views into the tensors of its `state_dict`.

    The model must be that of `factory` for these features.
    """
    found: dict[Belonging, Tensor] = {}
    outputs = output_names(features)
    first, *others = _layers(factory, state)
    for kind, name, part, tensor, units in _first_layer(first, features, state):
        if units is None or others:
            found[Belonging(kind, name, part)] = tensor
            continue
        for i, output in enumerate(outputs):
            place = Belonging("output", output, part) if kind == "layer" else Belonging(kind, name, part, output)
            found[place] = tensor.select(units, i)
    for number, layer in enumerate(others, 2):
        for part in ("weight", "bias"):
            tensor = state[f"{layer}{part}"]
            if layer != others[-1]:
                found[Belonging("layer", str(number), part)] = tensor
                continue
            for i, output in enumerate(outputs):
                found[Belonging("output", output, part)] = tensor[i]
    return found


def _layers(factory: str, state: Mapping[str, Tensor]) -> list[str]:
    """What the names of the tensors of each layer begin with, in order. Dropout and ReLU are numbered too, and have none."""
    if factory == "linear":
        return [""]
    found = [(int(match[2]), match[0].removesuffix("bias")) for name in state if (match := _BIAS.fullmatch(name))]
    return [prefix for _, prefix in sorted(found)]


_BIAS = re.compile(r"(network\.)?(\d+)\.bias")


def _first_layer(
    prefix: str, features: Features, state: Mapping[str, Tensor]
) -> Iterator[tuple[Kind, str, str, Tensor, int | None]]:
    """(kind, name, part, tensor, which of its dimensions is that of the layer's units) of all inputs, and of the bias.

    The dimension is None of an embedding: its numbers go into the layer.
    """
    yield "layer", "1", "bias", state[f"{prefix}bias"], 0
    numbers_UF = _either(state, f"{prefix}numbers.weight", f"{prefix}weight")
    at = 0

    def next_numbers(count: int) -> Tensor:
        nonlocal at
        assert numbers_UF is not None, "what has numbers has weights for them"
        at += count
        return numbers_UF[:, at - count : at]

    for column in features.columns:
        if column.numbers:
            yield "column", column.name, "weight", next_numbers(column.numbers), 0
    for name in features.indicated:
        yield "nulls", name, "weight", next_numbers(1), 0
    of_values = state.get(f"{prefix}values.weight")  # of all categories together
    row = 0
    categories = [column for column in features.columns if column.buckets and not column.length]
    sequences = [column for column in features.columns if column.length]
    for kind, columns in (("embeddings", categories), ("items", sequences)):
        for i, column in enumerate(columns):
            if kind == "embeddings" and of_values is not None:
                table = of_values[row : row + column.buckets + 1]
                row += column.buckets + 1
            else:
                found = _either(state, f"{prefix}{kind}.{i}.weight", f"{kind}.{i}.weight")
                assert found is not None, "each category and sequence has a table"
                table = found
            if prefix.startswith("network."):
                yield "embedding", column.name, "values", table, None
                yield "column", column.name, "weight", next_numbers(table.shape[1]), 0
            else:
                yield "column", column.name, "values", table, 1


def _either(state: Mapping[str, Tensor], *names: str) -> Tensor | None:
    """The first of these tensors that is there."""
    return next((state[name] for name in names if name in state), None)

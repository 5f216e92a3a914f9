"""Networks: the built-in ones, and those of the user's own factory.

Every model is called `model(x_BF)`, or `model(x_BF, ids_BC)` when there are categories or sequences, and returns
[B, outputs] (for one output [B] will do): numbers for regression, logits for binary and multiclass.

x_BF holds the number columns in spec order, then the null indicators; a vector column, such as an image, is its numbers in
row-major order. ids_BC
holds first one id of each category, then `length` ids of each sequence, both in spec order. Id 0 is a null, and the
padding behind the last item of a sequence.

Shape legend: B rows of a batch, F numbers and C ids of one row, L length of a sequence, I items in all sequences of a
batch, E size of an embedding.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from tidemill.tasks.training.calling import (
    first_line,
    frames_of,
    importing,
    random_numbers_kept,
    seed_all_random_numbers,
    told,
)
from tidemill.tasks.training.errors import FactoryError, ModelError
from tidemill.tasks.training.features import Features, SequenceInput
from tidemill.tasks.training.imports import imported
from tidemill.tasks.training.keras_models import KerasModule, is_keras
from tidemill.tasks.training.spec import Spec

FEW_IDS: Final = 512
"""Ids of which torch leaves out the padding itself, one after the other, sooner than they are gathered without it."""


@dataclass(frozen=True)
class Inputs:
    """What a model is fed and must return; given to a factory that has a parameter `inputs`."""

    numbers: int  # F, the width of x_BF
    buckets: tuple[int, ...]  # for each category: ids run from 0 to this number, inclusive
    outputs: int  # width of the output: number of classes, or of targets
    sequences: tuple[SequenceInput, ...] = ()  # (length, buckets) of each sequence
    base_logits: Tensor | None = field(default=None, compare=False)
    """float32 [outputs]: what a model returns that knows nothing but how often each class occurs. None: regression."""

    def split(self, ids_BC: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Views of ids_BC: ids_B of each category, and ids_BL of each sequence."""
        if not self.sequences:
            return ids_BC.unbind(1), ()
        lengths = [sequence.length for sequence in self.sequences]
        categories_BC, *sequences = ids_BC.split_with_sizes([len(self.buckets), *lengths], 1)
        if not self.buckets:  # torch cannot load a program that unbinds nothing
            return (), sequences
        return categories_BC.unbind(1), sequences


class _Items(nn.Embedding):
    """[B, E]: mean or sum of the embeddings of the items of each row's sequence; 0 without items."""

    def __init__(self, buckets: int, size: int, mode: Literal["mean", "sum"], sparse: bool = False) -> None:
        super().__init__(buckets + 1, size, padding_idx=0, sparse=sparse)
        self.mode = mode

    def forward(self, ids_BL: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # what depends on how many items there are would become a loop over the rows
            present_BL1 = (ids_BL != 0).to(self.weight.dtype).unsqueeze(2)
            sum_BE = (functional.embedding(ids_BL, self.weight) * present_BL1).sum(1)
            return sum_BE if self.mode == "sum" else sum_BE / present_BL1.sum(1).clamp(min=1)
        if not torch.is_grad_enabled() and ids_BL.is_cpu and ids_BL.numel() <= FEW_IDS:  # the same sums, in fewer calls
            return functional.embedding_bag(ids_BL, self.weight, mode=self.mode, padding_idx=0)
        # Without the padding: less work, and no [B, L, E] in memory.
        item_BL = ids_BL != 0
        count_B = item_BL.sum(1)
        ids_I = ids_BL.masked_select(item_BL)  # sooner than by an index
        return functional.embedding_bag(
            ids_I, self.weight, count_B.cumsum(0) - count_B, mode=self.mode, sparse=self.sparse
        )


class _WithIds(nn.Module):
    """A network on x_BF, the embeddings of categories and the mean embeddings of sequences, side by side."""

    def __init__(self, inputs: Inputs, embedding: int, network: nn.Module, sparse: bool) -> None:
        super().__init__()
        self.inputs = inputs
        self.embeddings = nn.ModuleList(nn.Embedding(count + 1, embedding, sparse=sparse) for count in inputs.buckets)
        self.items = nn.ModuleList(_Items(sequence.buckets, embedding, "mean", sparse) for sequence in inputs.sequences)
        self.network = network

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        categories, sequences = self.inputs.split(ids_BC)
        embedded = [embed(ids_B) for embed, ids_B in zip(self.embeddings, categories, strict=True)]
        embedded += [embed(ids_BL) for embed, ids_BL in zip(self.items, sequences, strict=True)]
        output: Tensor = self.network(torch.cat([x_BF, *embedded], 1))
        return output


class _LinearWithIds(nn.Module):
    """A linear model on x_BF, one-hot categories and the item counts of sequences (bags of words).

    An embedding row is the weights of one value.
    """

    def __init__(self, inputs: Inputs, sparse: bool) -> None:
        super().__init__()
        self.inputs = inputs
        self.embeddings = nn.ModuleList(
            _zeroed(nn.Embedding(count + 1, inputs.outputs, sparse=sparse)) for count in inputs.buckets
        )
        self.items = nn.ModuleList(_zeroed(_Items(s.buckets, inputs.outputs, "sum", sparse)) for s in inputs.sequences)
        self.bias = nn.Parameter(torch.zeros(inputs.outputs))
        self.numbers = nn.Linear(inputs.numbers, inputs.outputs, bias=False) if inputs.numbers else None

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        output = self.bias if self.numbers is None else self.numbers(x_BF) + self.bias
        categories, sequences = self.inputs.split(ids_BC)
        for embed, ids_B in zip(self.embeddings, categories, strict=True):
            output = output + embed(ids_B)
        for embed, ids_BL in zip(self.items, sequences, strict=True):
            output = output + embed(ids_BL)
        return output


class _FirstLayer(nn.Module):
    """[B, width]: a linear layer on x_BF, one-hot categories, and the mean of the one-hot items of each sequence.

    It begins as torch's linear layers do, U(-b, b) with b = 1 / sqrt(inputs), where each number, category and sequence is one
    input. The weights of all values of all categories are rows of one table, and those of a row are added up.
    """

    first_row_C: Tensor

    def __init__(self, inputs: Inputs, width: int, sparse: bool) -> None:
        super().__init__()
        self.inputs = inputs
        bound = (inputs.numbers + len(inputs.buckets) + len(inputs.sequences)) ** -0.5
        self.numbers = nn.Linear(inputs.numbers, width, bias=False) if inputs.numbers else None
        self.bias = nn.Parameter(torch.empty(width))
        values = sum(count + 1 for count in inputs.buckets)
        self.values = nn.Embedding(values, width, sparse=sparse) if inputs.buckets else None
        self.items = nn.ModuleList(_Items(sequence.buckets, width, "mean", sparse) for sequence in inputs.sequences)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        rows = [0, *(count + 1 for count in inputs.buckets[:-1])]
        self.register_buffer("first_row_C", torch.tensor(list(accumulate(rows))), persistent=False)

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        output = self.bias if self.numbers is None else self.numbers(x_BF) + self.bias
        if self.values is not None:
            rows_BC = ids_BC[:, : len(self.inputs.buckets)] + self.first_row_C
            if torch.compiler.is_exporting():  # as in _Items
                output = output + functional.embedding(rows_BC, self.values.weight).sum(1)
            else:
                weight, sparse = self.values.weight, self.values.sparse
                output = output + functional.embedding_bag(rows_BC, weight, mode="sum", sparse=sparse)
        if self.items:
            _, sequences = self.inputs.split(ids_BC)
            for embed, ids_BL in zip(self.items, sequences, strict=True):
                output = output + embed(ids_BL)
        return output


class _OneHot(nn.Sequential):
    """Layers of which the first one takes the numbers and the ids."""

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        first, *rest = self
        output: Tensor = first(x_BF, ids_BC)
        for layer in rest:
            output = layer(output)
        return output


def _zeroed(embedding: nn.Embedding) -> nn.Embedding:
    nn.init.zeros_(embedding.weight)  # a value that was never seen must not move the output
    return embedding


def linear(inputs: Inputs, sparse: bool = False) -> nn.Module:
    """Linear, logistic or softmax regression. Categories count as one-hot columns, sequences as counts of their items.

    `sparse`: the weights of ids have sparse gradients, so that a step costs what its ids cost, however many buckets there are.
    """
    if inputs.buckets or inputs.sequences:
        return _LinearWithIds(inputs, sparse)
    return nn.Linear(inputs.numbers, inputs.outputs)


def mlp(
    inputs: Inputs,
    hidden: Sequence[int] = (64, 32),
    embedding: int | None = 8,
    dropout: float = 0.0,
    base_rates: bool = False,
    sparse: bool = False,
) -> nn.Module:
    """Fully connected layers with ReLU and dropout between them.

    Each category becomes `embedding` numbers, and so does each sequence: the mean over its items. With `embedding` None (null
    in JSON) they go into the first layer as one-hot columns. With `base_rates` the biases of the output begin at the logits
    of how often each class occurs in the dataset (classes only). `sparse`: as of `linear`.
    """
    ids = bool(inputs.buckets or inputs.sequences)
    one_hot = embedding is None and ids
    width = inputs.numbers + (embedding or 0) * (len(inputs.buckets) + len(inputs.sequences))
    layers: list[nn.Module] = []
    for size in (*hidden, inputs.outputs):
        layers.append(_FirstLayer(inputs, size, sparse) if one_hot and not layers else nn.Linear(width, size))
        layers += [nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        width = size
    layers = layers[: -2 if dropout else -1]  # nothing follows the output
    if base_rates and inputs.base_logits is not None:
        with torch.no_grad():
            _bias(layers[-1]).copy_(inputs.base_logits)
    if one_hot:
        return _OneHot(*layers)
    network = nn.Sequential(*layers)
    return _WithIds(inputs, embedding, network, sparse) if ids and embedding is not None else network


def _bias(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear | _FirstLayer), "what the output comes from"
    return layer.bias


def build(spec: Spec, features: Features) -> nn.Module:
    """The model of the spec, its weights drawn right after `torch.manual_seed(spec.seed)`, as in a plain script.

    The global random state is left as it was. Raises FactoryError.
    """
    name = spec.model.factory
    built_in: dict[str, Callable[..., nn.Module]] = {"linear": linear, "mlp": mlp}
    factory = built_in.get(name) or imported(name, "model.factory")
    arguments: dict[str, Any] = dict(spec.model.arguments)
    if "inputs" in _parameters(factory, name):
        arguments["inputs"] = Inputs(
            features.numbers, features.buckets, spec.outputs, features.sequences, features.base_logits
        )
    with random_numbers_kept(), importing():
        seed_all_random_numbers(spec.seed)
        try:
            model = factory(**arguments)
        except Exception as error:  # the user's code may raise anything
            given = ", ".join(spec.model.arguments) or "none"
            where = "; ".join(frames_of(error))
            raise FactoryError(
                f"model.factory {name!r} raised {type(error).__name__}: {first_line(error)} (arguments given: {given}"
                f"{f'; {where}' if where else ''})"
            ) from error
        if is_keras(model):
            model = _of_keras(spec, lambda: factory(**arguments), features)
        if not isinstance(model, nn.Module):
            raise FactoryError(
                f"model.factory {name!r} returned {type(model).__name__}: return a torch.nn.Module, or a keras.Model"
            )
        if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
            _give_shapes(model, name, features)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FactoryError(f"model.factory {name!r} returned a model without trainable parameters")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise FactoryError(f"model.factory {name!r}: {key!r} of its state_dict is no tensor and cannot be stored")
        if value.layout != torch.strided or value.is_quantized:
            raise FactoryError(
                f"model.factory {name!r}: {key!r} of its state_dict is {value.layout}, which cannot be stored: register it "
                "dense, or with persistent=False"
            )
    return model


def _of_keras(spec: Spec, make: Callable[[], Any], features: Features) -> KerasModule:
    """Keras draws from other random numbers than torch: the model is made again, from the spec's seed. Raises FactoryError."""
    name = spec.model.factory
    if spec.compile == "on":
        raise FactoryError(
            f"compile: on: a Keras model, as model.factory {name!r} returns, cannot be compiled: leave compile out, or set it to "
            "off"
        )
    x_BF, ids_BC, *_ = features.allocate(2)
    return KerasModule(name, make, spec.seed, (x_BF.zero_(), None if ids_BC is None else ids_BC.zero_()))


def _give_shapes(model: nn.Module, name: str, features: Features) -> None:
    """Lazy modules learn their shapes of the first rows that they see: two made-up ones. Raises FactoryError."""
    rows = features.allocate(2)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), told(f"model.factory {name!r}: its lazy modules", *rows):
            model(*(tensor.zero_() for tensor in rows if tensor is not None))
    except ModelError as error:
        raise FactoryError(str(error)) from error
    for module in training:
        module.training = True
    if left := [key for key, value in model.state_dict().items() if is_lazy(value)]:
        raise FactoryError(
            f"model.factory {name!r}: {left[0]!r} has no shape after a first call, and cannot be trained or stored"
        )


def _parameters(factory: Callable[..., object], name: str) -> Sequence[str]:
    try:
        return tuple(inspect.signature(factory).parameters)
    except ValueError as error:  # some C callables have no signature
        raise FactoryError(f"model.factory {name!r} has no signature: wrap it in a Python function") from error

"""What an exported graph is fed: which column fills which places, and a table as its inputs.

Text is hashed outside of the graph: ONNX has no operator for it. All else that Tidemill does to a column is inside.

Shape legend: N rows, S numbers of one row without null indicators, C ids of one row, V vectors with null indicators.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.serving.values import StoredType
from tidemill.tasks.training.columns import as_tensor, from_arrow, one_array
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.inputs import Input

NUMBERS: Final = "numbers"
"""Input of a graph, float64 [N, S]: the number columns in spec order, NaN for null. Absent if there are none."""
IDS: Final = "ids"
"""Input of a graph, int64 [N, C]: one id of each category, then `length` ids of each sequence. Absent if there are none."""
NULLS: Final = "nulls"
"""Input of a graph, bool [N, V]: whether a vector is null, of each vector column with a null indicator. That all its numbers are
null is another thing. Absent if there are none."""
PREDICTION: Final = "prediction"
"""Output of a graph, float32 [N] or [N, O]: what `tidemill.tasks.training.loop.predict` gives."""


def in_float32(column: Input, types: Mapping[str, str]) -> bool:
    """Whether the numbers of a column are scaled in float32, as they are where their type is exact in it (`packing.pack`).

    Args:
        column: A resolved one.
        types: Arrow's name of the type of each column of the dataset of the last batch training, as manifests have them. A column
            that is missing there, as all are from manifests of format 1, counts as float64.
    """
    return StoredType(types.get(column.name, "")).exact_in_float32


def indicated_vectors(features: Features) -> list[Input]:
    """The vector columns that have a null indicator, in spec order."""
    return [column for column in features.columns if column.width is not None and column.name in features.indicated]


def layout_of(features: Features) -> dict[str, Any]:
    """The inputs and the output of a graph, for whoever makes the one and reads the other: JSON.

    `numbers`, `ids` and `nulls` name their columns in the order of their places, each with its first place `at`. `family` is what
    the column holds: number, time (seconds since 1970-01-01T00:00Z), duration (seconds), text, list of integers, list of text. A
    column with a `width` is a list of that many numbers, one with a `length` is a list of which the last `length` items are
    used. An id is 1 + the hash of the value modulo `buckets`, and 0 for a null and behind the last item.
    """
    found: dict[str, list[dict[str, Any]]] = {NUMBERS: [], IDS: []}
    at = {NUMBERS: 0, IDS: 0}
    for column in sorted(features.columns, key=lambda column: column.length > 0):  # stable, and numbers have no length
        where = IDS if column.buckets else NUMBERS
        one: dict[str, Any] = {"column": column.name, "family": column.family, "at": at[where]}
        if column.width is not None:
            one["width"] = column.width
        if column.buckets:
            one["buckets"] = column.buckets
        if column.length:
            one["length"] = column.length
        found[where].append(one)
        at[where] += column.length or column.numbers or 1
    found[NULLS] = [{"column": column.name, "at": i} for i, column in enumerate(indicated_vectors(features))]
    output: dict[str, Any] = {"name": PREDICTION, "task": features.task, "targets": list(features.targets)}
    if features.classes is not None:
        output["classes"] = features.classes
    if features.labels is not None:
        output["labels"] = list(features.labels)
    return {**found, "output": output}


def as_trained(features: Features, types: Mapping[str, str], table: pa.Table) -> pa.Table:
    """The table with its numbers in types that are scaled as those of the training were: see `in_float32`, which has `types`.

    An int16 and a float64 that hold the same number may differ by the last bits of a float32 once they are scaled. A graph takes
    all numbers as float64, so it is told once which way each column goes.
    """
    for column in features.columns:
        if column.buckets:
            continue
        array = one_array(table.column(column.name))
        single = as_tensor(array.slice(0, 0), column.width)[0].dtype == torch.float32
        if single != in_float32(column, types):
            values = _numbers(array, column.width).flatten()
            kind = pa.float64() if single else pa.float32()
            plain = pa.array(values.numpy(), mask=values.isnan().numpy()).cast(kind)
            if column.width is not None:
                plain = pa.FixedSizeListArray.from_arrays(plain, column.width, mask=array.is_null())
            table = table.set_column(table.column_names.index(column.name), column.name, plain)
    return table


def inputs_of(features: Features, table: pa.Table, where: str) -> dict[str, Tensor]:
    """The inputs of a graph for the rows of a table, by their names. `where` names the table in messages.

    Raises:
        ColumnError: NaN, infinity, or a value that is no category.
    """
    encoded = features.encode(table, where)  # which refuses what cannot be an input
    inputs: dict[str, Tensor] = {}
    if features.scaled:
        columns = [(one_array(table.column(c.name)), c.width) for c in features.columns if not c.buckets]
        inputs[NUMBERS] = torch.cat([_numbers(array, width) for array, width in columns], 1)
    if encoded.ids_NC is not None:
        inputs[IDS] = encoded.ids_NC
    if vectors := indicated_vectors(features):
        nulls = [from_arrow(one_array(table.column(c.name)).is_null().cast(pa.uint8())).bool() for c in vectors]
        inputs[NULLS] = torch.stack(nulls, 1)
    return inputs


def _numbers(array: pa.Array[Any], width: int | None) -> Tensor:
    values_NK, present_NK = as_tensor(array, width)
    return values_NK.double() if present_NK is None else torch.where(present_NK, values_NK.double(), torch.nan)

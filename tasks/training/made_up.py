"""Rows that nobody has measured, of the columns that a model is trained on: to try whether it can take a step at all."""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from typing import Any, Final, cast

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.classes import label_array
from tidemill.tasks.training.columns import to_arrow
from tidemill.tasks.training.families import Family
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import TableGroup, generator
from tidemill.tasks.training.inputs import Input

CATEGORIES: Final = 10
"""How many values a made-up category has."""
ITEMS: Final = 3
"""How many items a made-up list has."""


def made_up(features: Features, rows: int) -> TableGroup:
    """`rows` labelled rows, the same each time.

    Numbers are normal, with the mean and the deviation of the dataset where these are known, else with 0 and 1. Classes and
    categories take turns. Weights are positive.
    """
    draw = generator("made up", rows)
    columns: dict[str, pa.Array[Any]] = {}
    seen, at = features.statistics, 0
    for column in features.columns:
        x_NK = torch.randn(rows, column.numbers or 1, generator=draw, dtype=torch.float64)
        if seen is not None and column.numbers:
            x_NK = seen.mean_F[at : at + column.numbers] + x_NK * seen.std_F[at : at + column.numbers]
        at += column.numbers
        if column.name == features.sample_weight:
            x_NK = x_NK.abs()
        columns[column.name] = _input(column, x_NK)
    for i, (name, family) in enumerate(zip(features.targets, features.target_families, strict=True)):
        if features.task == "regression":
            y_N = torch.randn(rows, generator=draw, dtype=torch.float64)
            if seen is not None:
                y_N = seen.target_mean[i] + y_N * seen.target_std[i]
        else:
            y_N = (torch.arange(rows) % (features.classes or 2)).double()
        columns[name] = _number(family, y_N) if features.labels is None else label_array(y_N.long(), features.labels)
    if features.sample_weight is not None and features.sample_weight not in columns:
        columns[features.sample_weight] = to_arrow(torch.ones(rows, dtype=torch.float64))
    return TableGroup("made-up rows", pa.table(columns))


def _input(column: Input, x_NK: Tensor) -> pa.Array[Any]:
    turns_N = torch.arange(len(x_NK)) % CATEGORIES
    if column.family == "text":
        return to_arrow(turns_N).cast(pa.string())
    if column.family in ("list of integers", "list of text"):
        items: pa.Array[Any] = to_arrow((turns_N.unsqueeze(1) + torch.arange(ITEMS)).flatten())
        ends = cast("pa.Int32Array", to_arrow(torch.arange(len(x_NK) + 1) * ITEMS).cast(pa.int32()))
        if column.family == "list of text":
            items = items.cast(pa.string())
        return pa.ListArray.from_arrays(ends, items)
    if column.buckets:
        return to_arrow(turns_N)
    if column.width is not None:
        return pa.FixedSizeListArray.from_arrays(to_arrow(x_NK.flatten()), column.width)
    return _number(column.family, x_NK.squeeze(1))


def _number(family: Family, values_N: Tensor) -> pa.Array[Any]:
    """Numbers as they are; times and durations, which are given in seconds, as what they are."""
    if family == "number":
        return to_arrow(values_N)
    ticks = to_arrow((values_N * 1e6).round().long())
    return ticks.cast(pa.timestamp("us", "UTC") if family == "time" else pa.duration("us"))

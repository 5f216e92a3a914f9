"""A table with a column of each kind that a model can be fed with, and models that take them."""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from decimal import Decimal
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tests.data import put
from tidemill.tasks import batch
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.spec import Spec

WORDS: Final = ["", "Berlin", "Zürich", "Zu\u0308rich", "東京", "👩‍🚀", "a\0b", " ", "x" * 300]

TARGETS: Final[dict[str, dict[str, Any]]] = {
    "regression": {
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [16, 8], "embedding": None}},
        "standardize_target": True,
        "limit_predictions": True,
        "null_indicators": True,
    },
    "binary": {"target": "answer", "model": {"factory": "linear"}, "soft_limit": 3.0, "null_indicators": True},
    "multiclass": {"target": "kind", "model": {"factory": "mlp", "arguments": {"hidden": [16], "embedding": 4}}},
}
"""By task: settings that together take every way through the preprocessing and the built-in models."""

FEATURES: Final[dict[str, Any]] = {
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "int16": "int16",
    "int64": "int64",
    "boolean": "boolean",
    "decimal": "decimal",
    "timestamp": "timestamp",
    "date": "date",
    "time": "time",
    "duration": "duration",
    "vector": "vector",
    "image": "image",
    "text": {"name": "text", "buckets": 64},
    "dictionary": {"name": "dictionary", "buckets": 16},
    "whole": {"name": "whole", "kind": "category", "buckets": 100},
    "fraction": {"name": "fraction", "kind": "category", "buckets": 7},
    "tags": {"name": "tags", "buckets": 50, "length": 3},
    "items": {"name": "items", "buckets": 1000, "length": 5},
}
"""The columns of `table` that are features."""


def table(rows: int, seed: int = 0) -> pa.Table:
    """Each column but the whole image is null in some rows; vectors have null items too. The mean of
    int16 lies far from 0 for its deviation: scaled in float64 it is another number than scaled in float32."""
    draw = np.random.default_rng(seed)

    def holed(array: pa.Array[Any]) -> pa.Array[Any]:
        return array.take(pa.array(np.arange(rows), mask=draw.random(rows) < 0.1))

    def words(count: int) -> list[str]:
        return [WORDS[i] for i in draw.integers(0, len(WORDS), count)]

    def lists(kind: pa.DataType, values: list[Any], longest: int) -> pa.Array[Any]:
        lengths = draw.integers(0, longest, rows)
        chosen = iter(draw.integers(0, len(values), int(lengths.sum())).tolist())
        return pa.array([[values[next(chosen)] for _ in range(length)] for length in lengths], kind)

    x = draw.standard_normal((rows, 8))
    columns = {
        "float16": pa.array(x[:, 0].astype(np.float16)),
        "float32": pa.array((3 + 2 * x[:, 1]).astype(np.float32)),
        "float64": pa.array(-1e6 + 1e-3 * x[:, 2]),
        "int16": pa.array((2013 + draw.integers(0, 2, rows)).astype(np.int16)),
        "int64": pa.array(10**12 + draw.integers(0, 1000, rows)),
        "boolean": pa.array(draw.random(rows) < 0.3),
        "decimal": pa.array([Decimal(int(v)) / 100 for v in draw.integers(-9999, 9999, rows)], pa.decimal128(9, 2)),
        "timestamp": pa.array(1_700_000_000_000_000 + draw.integers(0, 10**12, rows), pa.timestamp("us", "UTC")),
        "date": pa.array(draw.integers(15_000, 20_000, rows).astype(np.int32), pa.date32()),
        "time": pa.array(draw.integers(0, 86_400, rows).astype(np.int32), pa.time32("s")),
        "duration": pa.array(draw.integers(0, 10**6, rows), pa.duration("ms")),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(draw.standard_normal(3 * rows).astype(np.float32), mask=draw.random(3 * rows) < 0.3), 3
        ),
        "image": pa.FixedSizeListArray.from_arrays(
            pa.FixedSizeListArray.from_arrays(pa.array(draw.integers(0, 256, 4 * rows).astype(np.uint8)), 2), 2
        ),
        "text": pa.array(words(rows)),
        "dictionary": pa.array(words(rows)).dictionary_encode(),
        "whole": pa.array(draw.integers(-5, 5, rows).astype(np.int8)),
        "fraction": pa.array(draw.integers(-5, 5, rows) / 8 + 1e-9),
        "tags": lists(pa.list_(pa.string()), [*WORDS, None], 6),
        "items": lists(pa.large_list(pa.int64()), [*range(40), None], 9),
    }
    columns = {name: column if name == "image" else holed(column) for name, column in columns.items()}
    y = x[:, 0] + np.nan_to_num(x[:, 1]) + draw.standard_normal(rows) / 10
    columns["y"] = pa.array(10 + 5 * y)
    columns["answer"] = pa.array(["yes" if value > 0 else "no" for value in y])
    columns["kind"] = pa.array(draw.integers(0, 4, rows))
    return pa.table(columns)


def spec(task: str, features: list[str] | None = None, **settings: Any) -> Spec:
    """Of the columns with these names, or of all."""
    names = list(FEATURES) if features is None else features
    asked = {
        "features": [FEATURES[name] for name in names],
        "task": task,
        "epochs": 1,
        "batch_size": 32,
        **TARGETS[task],
    }
    return Spec.model_validate(asked | settings)


def trained(place: str, asked: Spec, rows: pa.Table, model: str = "model") -> str:
    """The registry below `place` in which `model` is a version trained on the rows, which lie in a dataset beside it."""
    put(f"{place}/dataset", {"a.parquet": rows})
    batch.train(f"{place}/dataset", f"{place}/registry", model, asked, BatchSettings(holdout=0))
    return f"{place}/registry"

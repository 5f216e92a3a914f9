"""What a model that `tidemill export --format onnx` wrote is fed, made from rows. Needs numpy, and neither Tidemill nor torch.

    session = onnxruntime.InferenceSession("delays.onnx")
    layout = layout_of(session.get_modelmeta().custom_metadata_map)
    (predictions,) = session.run(["prediction"], inputs_of(layout, [{"distance": 1100, "carrier": "AA"}]))

`inputs.mjs` beside it is the same in JavaScript. The tests compare both with Tidemill.
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from hashlib import blake2b
from typing import Any

import numpy as np

Layout = Mapping[str, Any]


def layout_of(metadata: Mapping[str, str]) -> Layout:
    """The layout of the inputs and the output, from the model's metadata."""
    found: Layout = json.loads(metadata["tidemill.layout"])
    return found


def inputs_of(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The inputs of the model for rows, dicts by column.

    A number is a number or a boolean; a time a datetime, a date, ISO 8601 text (without a zone it is UTC) or seconds since 1970;
    a duration or a time of day a timedelta or seconds. None stands for no value.

    Raises:
        ValueError: a value cannot be an input; its column is named.
        KeyError: a column is missing.
    """
    inputs = {}
    if columns := layout["numbers"]:
        numbers = np.full((len(rows), sum(column.get("width", 1) for column in columns)), np.nan)
        for i, row in enumerate(rows):
            for column in columns:
                _fill_numbers(numbers[i, column["at"] :], column, row[column["column"]])
        inputs["numbers"] = numbers
    if columns := layout["ids"]:
        ids = np.zeros((len(rows), sum(column.get("length", 1) for column in columns)), np.int64)
        for i, row in enumerate(rows):
            for column in columns:
                _fill_ids(ids[i, column["at"] :], column, row[column["column"]])
        inputs["ids"] = ids
    if columns := layout["nulls"]:
        inputs["nulls"] = np.array([[row[column["column"]] is None for column in columns] for row in rows], np.bool_)
    return inputs


def _fill_numbers(places: np.ndarray, column: Layout, value: Any) -> None:
    if value is None:
        return
    items = value if "width" in column else [value]
    if len(items) != column.get("width", 1):
        raise ValueError(f"column {column['column']} needs a list of {column['width']} numbers")
    for i, item in enumerate(items):
        if item is not None:
            places[i] = number_of(item, column)


def _fill_ids(places: np.ndarray, column: Layout, value: Any) -> None:
    if value is None:
        return
    if "length" in column and isinstance(value, str):
        raise ValueError(f"column {column['column']} needs a list, not a text")
    items = value[-column["length"] :] if "length" in column else [value]
    for i, item in enumerate(items):
        if item is not None:
            family = column["family"]
            whole = isinstance(item, int | np.integer) and not isinstance(item, bool)
            if isinstance(item, str) != family.endswith("text") or (family == "list of integers" and not whole):
                raise ValueError(f"column {column['column']} holds {item!r}, and takes {family}")
            places[i] = 1 + bucket_of(canonical(item), column["buckets"])


def number_of(value: Any, column: Layout) -> float:
    """One number: itself, or the seconds of a time or a duration."""
    if column["family"] == "time":
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            value = (value.replace(tzinfo=value.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(
                seconds=1
            )
    elif isinstance(value, timedelta):
        value = value / timedelta(seconds=1)
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(
            f"column {column['column']} holds {value}, which is no {column['family']}: give None for no value"
        )
    return float(value)


def canonical(value: str | bool | float) -> bytes:
    """The bytes that stand for a category: text as UTF-8, a whole number (or a boolean) as its digits, a fraction as the shortest
    digits that name its nearest float32.
    """
    if isinstance(value, str):
        return value.encode()
    if not math.isfinite(value) or (isinstance(value, float) and abs(value) > 2**53):
        raise ValueError(f"{value} is no category: give an int, text, or None for no value")
    if value != int(value):
        value = float(str(np.float32(value)))
    return (str(int(value)) if value == int(value) else repr(value)).encode()


def bucket_of(data: bytes, buckets: int) -> int:
    """BLAKE2b with an 8-byte digest, read big-endian, modulo `buckets`."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") % buckets

"""Labels that are no class numbers: text, booleans, whole numbers that start anywhere.

The distinct labels of the dataset, sorted, are numbered from 0. A target is read as these numbers, and predictions give the
labels back.

Shape legend: N rows, V distinct labels.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import accumulate
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tidemill.tasks.training.columns import to_arrow
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.families import family_of

Label = bool | int | str

PREDICTED: Final = ("prediction", "probabilities")
"""Names of the columns of predictions."""
MOST: Final = 1000
"""More labels than these are no classes."""
LONGEST: Final = 256
"""Longer text, in characters, is no label."""
_INT64: Final = 2**63
_EXACT: Final = 2**53
"""Larger whole numbers may have been rounded in a float64."""
_NAMED: Final = 10
"""Labels that a message names."""


# ---- learned in the pass ---------------------------------------------------------------------------------------------
@dataclass
class Values:
    """The distinct values of a target, and in how many rows each occurs, in bounded memory: with too many, none is kept."""

    counts: dict[int | str, int] = field(default_factory=dict)
    """Value -> rows of the training side. One that only held-out rows have is here with 0. Booleans are 0 and 1."""
    rows: int = 0
    """Rows with a value, on both sides."""
    boolean: bool = True
    """All of them were booleans."""
    text: bool = False
    """They are text."""
    most: int = MOST
    """More distinct values than these are not kept."""
    none: str | None = None
    """Why the values are no labels. Nothing is counted from there on."""

    def add(self, array: pa.Array[Any], rows_N: Tensor | None) -> None:
        """Count the values of an array; of these, `rows_N` (int64 row numbers; None: all) are on the training side."""
        if self.none is not None:
            return
        array = plain(array)
        self.boolean = self.boolean and pa.types.is_boolean(array.type)
        self.text = self.text or pa.types.is_large_binary(array.type)
        self.rows += len(array) - array.null_count
        seen = array.drop_null()
        trained = seen if rows_N is None else array.take(to_arrow(rows_N)).drop_null()
        distinct = pc.unique(seen)
        if len(distinct) > self.most:
            self._stop(f"has more than {self.most:,} distinct values")
            return
        for value in distinct.to_pylist():
            label = _label(value)
            if label is None:
                self._stop(
                    f"holds {_shown(value)}, which is no label: labels are booleans, whole numbers, or text of at most "
                    f"{LONGEST} characters"
                )
                return
            self.counts.setdefault(label, 0)
        if len(self.counts) > self.most:
            self._stop(f"has more than {self.most:,} distinct values")
            return
        counted = pc.value_counts(trained)
        for value, count in zip(*(counted.field(name).to_pylist() for name in ("values", "counts")), strict=True):
            label = _label(value)
            assert label is not None, "each of them was looked at"
            self.counts[label] += count

    def _stop(self, why: str) -> None:
        self.none = why
        self.counts.clear()

    @property
    def sorted(self) -> list[int | str]:
        """The values in order: numbers by size, text by its code points."""
        return sorted(self.counts)


def _label(value: Any) -> int | str | None:
    """What stands for a value; None if it can be no label. Whole numbers are the same in every type."""
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return None
        return text if len(text) <= LONGEST else None
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else None
    if isinstance(value, float | Decimal):
        return int(value) if abs(float(value)) <= _EXACT and value == int(value) else None
    return None


def plain(array: pa.Array[Any]) -> pa.Array[Any]:
    """Text as bytes, other values without a dictionary, in types that Arrow can count."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if family_of(array.type) == ("text", None):
        return array.cast(pa.large_binary())
    if pa.types.is_float16(array.type):
        return array.cast(pa.float32())
    if pa.types.is_decimal32(array.type) or pa.types.is_decimal64(array.type):
        return array.cast(pa.decimal128(18, array.type.scale))
    return array


# ---- labels and class numbers ----------------------------------------------------------------------------------------
def class_numbers(array: pa.Array[Any], labels: Sequence[Label], name: str, where: str) -> pa.Array[Any]:
    """int32 [N]: the place of each label in `labels`; null where the target is.

    Raises:
        ColumnError: a label that is none of them. It is named.
    """
    if array.null_count == len(array):
        return pa.nulls(len(array), pa.int32())
    array = plain(array)
    wanted: pa.Array[Any]
    if isinstance(labels[0], str):
        wanted = _of_text(labels)
    elif pa.types.is_floating(array.type) or pa.types.is_decimal(array.type) or pa.types.is_uint64(array.type):
        array, wanted = array.cast(pa.float64(), safe=False), _of_numbers(labels, torch.float64)
    else:
        array, wanted = array.cast(pa.int64()), _of_numbers(labels, torch.int64)
    found = pc.index_in(array, value_set=wanted, skip_nulls=True)
    if found.null_count > array.null_count:
        row = pc.index(pc.and_(found.is_null(), array.is_valid()), True).as_py()
        raise ColumnError(
            f"target {name!r} of {where} holds {_shown(array[row].as_py())}, which is none of the model's "
            f"{len(labels)} labels ({named(labels)}): correct it, or train a new model on a dataset that has it"
        )
    return found


def label_type(labels: Sequence[Label]) -> pa.DataType:
    """The Arrow type of labels as they are given back."""
    if isinstance(labels[0], bool):
        return pa.bool_()
    return pa.string() if isinstance(labels[0], str) else pa.int64()


def label_array(numbers_N: Tensor, labels: Sequence[Label]) -> pa.Array[Any]:
    """The labels [N] of class numbers, int64 [N]."""
    every = _of_text(labels) if isinstance(labels[0], str) else _of_numbers(labels, torch.int64)
    return every.cast(label_type(labels)).take(to_arrow(numbers_N))


def _of_text(labels: Sequence[Label]) -> pa.Array[Any]:
    """The labels' bytes. By hand, as `_of_numbers`: `pa.array` imports pandas where that is installed (0.4 s)."""
    values = [str(label).encode() for label in labels]
    offsets = torch.tensor([0, *accumulate(len(value) for value in values)])
    buffers = [None, pa.py_buffer(offsets.numpy().data), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def _of_numbers(labels: Sequence[Label], dtype: torch.dtype) -> pa.Array[Any]:
    return to_arrow(torch.tensor([int(label) for label in labels], dtype=torch.int64).to(dtype))


def predicted_columns(outputs: Tensor, labels: Sequence[Label] | None) -> list[tuple[pa.Field[Any], pa.Array[Any]]]:
    """The columns of a file of predictions.

    Without labels, `prediction` is the value, the probability of class 1, or the probabilities of all classes. With labels,
    `prediction` is the most probable one, in its own type, and `probabilities` has those of all labels, in their order, which
    stands in the metadata of the column.

    Args:
        outputs: float32 [N], or [N, O]: what `loop.predict` gives.
        labels: Of the classes; None: classes are numbers from 0, or the task is regression.
    """
    if labels is None:
        values = _lists(outputs)
        return [(pa.field(PREDICTED[0], values.type), values)]
    # Of two labels the second one if its probability exceeds a half, as accuracy counts.
    numbers_N = outputs.argmax(1) if outputs.ndim == 2 else (outputs > 0.5).long()
    predicted = label_array(numbers_N, labels)
    values = _lists(outputs if outputs.ndim == 2 else torch.stack([1 - outputs, outputs], 1))
    order = {b"labels": json.dumps(list(labels), ensure_ascii=False).encode()}
    return [
        (pa.field(PREDICTED[0], predicted.type), predicted),
        (pa.field(PREDICTED[1], values.type, metadata=order), values),
    ]


def _lists(outputs: Tensor) -> pa.Array[Any]:
    values = to_arrow(outputs.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, outputs.shape[1]) if outputs.ndim == 2 else values


# ---- words -----------------------------------------------------------------------------------------------------------
def named(labels: Sequence[Label]) -> str:
    """The first labels, for a message."""
    more = ", ..." if len(labels) > _NAMED else ""
    return f"{', '.join(_shown(label) for label in labels[:_NAMED])}{more}"


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return reprlib.repr(value.decode(errors="replace"))
    return f"{value:g}" if isinstance(value, float) else reprlib.repr(value) if isinstance(value, str) else str(value)

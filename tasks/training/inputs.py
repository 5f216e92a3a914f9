"""One column of a spec against an Arrow schema: how it is read, or why it cannot be. Without torch."""

from __future__ import annotations  # pa.Field[Any] takes its type parameter in the stubs only

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.families import Family, family_of, is_untyped, told
from tidemill.tasks.training.patterns import did_you_mean
from tidemill.tasks.training.spec import Column


@dataclass(frozen=True)
class Input:
    """One input column as it was resolved against the schema."""

    name: str
    family: Family
    width: int | None = None  # numbers in a vector; None: a plain column
    buckets: int = 0  # more than 0: a category, or a sequence of them
    length: int = 0  # more than 0: a sequence, padded or cut to this many items

    @property
    def numbers(self) -> int:
        """How many of the F numbers of a row come from this column."""
        return 0 if self.buckets else self.width or 1


def check_families(
    expected: Iterable[tuple[str, Family, int | None]], schema: pa.Schema, where: str, *, begun: bool = True
) -> None:
    """Raises ColumnError if a column, as (name, family, width), is missing, or means something else.

    `begun` says that a model has what is expected; else it is other files of a dataset.
    """
    for name, family, width in expected:
        found = field_of(schema, name, where).type
        if not is_untyped(found) and family_of(found) != (family, width):
            vector = "" if width is None else f" vector of {width}"
            other = f"the model was begun with a {family}{vector}: write the old type, or begin a new model"
            if not begun:
                other = f"another file of the dataset has a {family}{vector}: write one type in all files"
            raise ColumnError(f"column {name!r} of {where} has type {told(found)}, but {other}")


def field_of(schema: pa.Schema, name: str, where: str) -> pa.Field[Any]:
    """The one column of this name. Raises ColumnError: there is none, or there are several."""
    places = schema.get_all_field_indices(name)
    if len(places) == 1:
        return schema.field(places[0])
    if places:
        raise ColumnError(f"column {name!r} occurs {len(places)} times in {where}: write each name once")
    raise ColumnError(
        f"column {name!r} is missing from {where}: {did_you_mean(name, schema.names)}; or write it, with nulls where there is no "
        "value"
    )


def input_of(column: Column, schema: pa.Schema) -> Input:
    """How a column of a spec is read. Raises ColumnError: it cannot be."""
    kind = field_of(schema, column.name, "the dataset").type
    usable = family_of(kind)
    if is_untyped(kind):
        raise ColumnError(f"column {column.name!r} is null in all rows of the dataset: remove it from features")
    if usable is None:
        raise ColumnError(
            f"column {column.name!r} has type {told(kind)}, which cannot be an input: write numbers, booleans, dates, times, "
            f"text, fixed-size lists of numbers, or lists of integers or text"
        )
    family, width = usable
    kinds: tuple[str, ...] = ("number",)
    if family in ("list of integers", "list of text"):
        kinds = ("sequence",)
    elif family == "text":
        kinds = ("category",)
    elif usable == ("number", None):
        kinds = ("number", "category")
    if column.kind not in ("auto", *kinds):
        raise ColumnError(
            f"column {column.name!r} has type {told(kind)}, which cannot be a {column.kind}: use kind {kinds[0]!r}"
        )
    read_as = kinds[0] if column.kind == "auto" else column.kind
    return Input(
        column.name,
        family,
        width,
        buckets=0 if read_as == "number" else column.buckets,
        length=column.length if read_as == "sequence" else 0,
    )


def target_family(name: str, schema: pa.Schema, where: str, *, text: bool) -> Family:
    """What a target holds; `text` says whether it may hold labels that are text. Raises ColumnError: no target is that."""
    kind = field_of(schema, name, where).type
    usable = family_of(kind)
    if is_untyped(kind):
        raise ColumnError(f"target {name!r} is null in all rows of {where}: nothing can be learned")
    if usable == ("text", None) and text:
        return "text"
    if usable not in (("number", None), ("duration", None)):
        others = "; labels are one target, of another task" if usable == ("text", None) else ""
        raise ColumnError(f"target {name!r} of {where} has type {told(kind)}: write a number{others}")
    return usable[0]


def check_weight(name: str, schema: pa.Schema, where: str) -> None:
    """Raises ColumnError if the column of sample weights is missing, or holds no numbers."""
    kind = field_of(schema, name, where).type
    if not is_untyped(kind) and family_of(kind) != ("number", None):
        raise ColumnError(f"sample_weight {name!r} of {where} has type {told(kind)}: write a number")

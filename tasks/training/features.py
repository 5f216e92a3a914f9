"""Which columns become the model's inputs, and the statistics that scale them: the preprocessing state.

Shape legend: N rows, F numbers of one row (a vector column counts for several), C category columns.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, NamedTuple, Self, cast

import pyarrow as pa
import torch
from pydantic import JsonValue
from torch import Tensor

from tasks.training.columns import Family, as_tensor, bucket_ids, family_of, one_array
from tasks.training.errors import ColumnError
from tasks.training.groups import RowGroup, Split
from tasks.training.moments import Moments
from tasks.training.packing import pack
from tasks.training.spec import Column, Spec, Task

NULLS_BY_CHANCE: Final = 1e-6  # a wholly null column that is less probable than this is taken for a mistake


@dataclass(frozen=True)
class Input:
    """One input column as it was resolved against the schema."""

    name: str
    family: Family
    width: int | None = None  # numbers in a vector; None: a plain column
    buckets: int = 0  # more than 0: a category

    @property
    def numbers(self) -> int:
        """How many of the F numbers of a row come from this column."""
        return 0 if self.buckets else self.width or 1


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `Features.fit` learned. Standard deviations are of the population; a constant column's is 1."""

    rows: int
    nulls: tuple[int, ...]  # of each input column
    mean_F: Tensor  # float64, over the values that are not null
    std_F: Tensor  # float64
    target_mean: float
    target_std: float


class Encoded(NamedTuple):
    """Rows as tensors. Read only: they may be views of Arrow's memory."""

    x_NF: Tensor  # float32, row-major
    ids_NC: Tensor | None  # int64, row-major; None: there are no category columns
    y_N: Tensor | None  # float32, or int64 class numbers for multiclass; None: encoded without the target
    labelled_N: Tensor | None  # bool; None: every row has a target


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """The resolved input columns and target, and the statistics of the dataset that the model was begun with.

    The statistics are learned once and never move afterwards: shifting the inputs under trained weights would change
    the function that the model computes without any gradient step, and the optimizer's moments would be about inputs
    that no longer exist. Data that drifts is met by training, or by a new model.
    """

    columns: tuple[Input, ...]
    target: str
    target_family: Family
    task: Task
    classes: int | None
    standardize_features: bool
    standardize_target: bool
    statistics: Statistics | None = None

    # ---- resolving ---------------------------------------------------------------------------------------------------
    @classmethod
    def resolve(cls, spec: Spec, schema: pa.Schema) -> Self:
        """Decides from Arrow's types how each column is read. Raises ColumnError."""
        return cls(
            columns=tuple(_resolve(column, schema) for column in spec.features),
            target=spec.target,
            target_family=_target_family(spec.target, schema, "the dataset"),
            task=spec.task,
            classes=spec.classes,
            standardize_features=spec.standardize_features,
            standardize_target=spec.standardize_target,
        )

    @property
    def numbers(self) -> int:
        """F, the width of x_NF."""
        return sum(column.numbers for column in self.columns)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Hash buckets of each of the C category columns; ids run from 0 (null) to this number, inclusive."""
        return tuple(column.buckets for column in self.columns if column.buckets)

    @property
    def row_bytes(self) -> int:
        """Bytes of one encoded row, target included."""
        return 4 * self.numbers + 8 * len(self.buckets) + (8 if self.task == "multiclass" else 4)

    @property
    def fitted(self) -> bool:
        """Whether rows can be encoded: `fit` has run, or nothing is standardised."""
        return self.statistics is not None or not (self.standardize_features or self.standardize_target)

    def names(self, *, labelled: bool) -> list[str]:
        """Columns to read, the target last if `labelled`."""
        return [column.name for column in self.columns] + ([self.target] if labelled else [])

    def check(self, schema: pa.Schema, where: str, *, labelled: bool = True) -> None:
        """Raises ColumnError if a column is missing from `schema`, or means something else than at the start."""
        expected = [(column.name, column.family, column.width) for column in self.columns]
        if labelled:
            expected.append((self.target, self.target_family, None))
        for name, family, width in expected:
            found = _field(schema, name, where).type
            if family_of(found) != (family, width):
                vector = "" if width is None else f" vector of {width}"
                raise ColumnError(
                    f"column {name!r} of {where} has type {found}, but the model was begun with a {family}{vector}: "
                    f"write the old type, or begin a new model"
                )

    # ---- learning the statistics -------------------------------------------------------------------------------------
    def fit(self, groups: Iterable[RowGroup], split: Split | None = None) -> Self:
        """A copy with the statistics of the rows of `split` (None: all rows), from one streaming pass.

        Raises ColumnError: a bad schema, NaN or infinity, or a column with no value at all.
        """
        inputs = [Moments.zero(column.numbers) for column in self.columns]
        target = Moments.zero(1)
        nulls = [0] * len(self.columns)
        rows = 0
        for group in groups:
            self.check(group.schema, group.name)
            table = group.read(self.names(labelled=True))
            rows_N = None if split is None else split.rows(group).nonzero().squeeze(1)
            rows += group.num_rows if rows_N is None else len(rows_N)
            for i, column in enumerate(self.columns):
                array = one_array(table.column(column.name))
                nulls[i] += _null_count(array, rows_N)
                if not column.buckets:
                    inputs[i] = inputs[i].merged(array, column.width, rows_N)
                    _refuse_non_finite(inputs[i].mean_K, column.name, group.name)
            target = target.merged(one_array(table.column(self.target)), None, rows_N)
            _refuse_non_finite(target.mean_K, self.target, group.name)
        for column, moments, null in zip(self.columns, inputs, nulls, strict=True):
            if null == rows or not bool(moments.count_K.all()):
                raise ColumnError(
                    f"column {column.name!r} is null in all {rows} rows of the dataset: remove it from features"
                )
        if not target.count_K.all():
            raise ColumnError(
                f"target {self.target!r} is null in all {rows} rows of the dataset: nothing can be learned"
            )
        return replace(
            self,
            statistics=Statistics(
                rows=rows,
                nulls=tuple(nulls),
                mean_F=torch.cat([moments.mean_K for moments in inputs]),
                std_F=torch.cat([moments.std_K for moments in inputs]),
                target_mean=target.mean_K.item(),
                target_std=target.std_K.item(),
            ),
        )

    def improbably_null(self, nulls: Sequence[int], rows: int) -> str | None:
        """Name of a column that is null in all of `rows` rows though the dataset makes that improbable, or None.

        `nulls` counts the nulls of each input column. With p the share of nulls seen by `fit` (by Laplace's rule of
        succession, so never 0), a seldom filled column passes in a small shard and a renamed one does not.
        """
        seen_rows, seen_nulls = 0, (0,) * len(self.columns)
        if self.statistics is not None:
            seen_rows, seen_nulls = self.statistics.rows, self.statistics.nulls
        for column, null, seen_null in zip(self.columns, nulls, seen_nulls, strict=True):
            if null == rows and ((seen_null + 1) / (seen_rows + 2)) ** rows < NULLS_BY_CHANCE:
                return column.name
        return None

    # ---- encoding ----------------------------------------------------------------------------------------------------
    def encode(self, table: pa.Table, where: str, *, labelled: bool = True, out_NF: Tensor | None = None) -> Encoded:
        """Columns of a table as tensors; `where` names the table in messages.

        A null number becomes the mean (0 once standardised; 0 too if not standardising), a null category id 0.
        `out_NF`, if given, is contiguous float32 and becomes x_NF. Without `labelled` the target is not looked at.
        Raises ColumnError: NaN, infinity, or a label that the task does not have.
        """
        assert self.fitted, "fit() comes before encode()"
        x_NF = torch.empty(table.num_rows, self.numbers) if out_NF is None else out_NF
        columns = [(one_array(table.column(column.name)), column) for column in self.columns]
        if self.standardize_features and self.statistics is not None:
            center_F, scale_F = self.statistics.mean_F, self.statistics.std_F
        else:
            center_F, scale_F = torch.zeros(self.numbers).double(), torch.ones(self.numbers).double()
        if not pack([(array, c.width) for array, c in columns if not c.buckets], center_F, scale_F, x_NF):
            raise self._non_finite(x_NF, where)
        ids = [_ids(array, column, where) for array, column in columns if column.buckets]
        y_N, labelled_N = self._target(one_array(table.column(self.target)), where) if labelled else (None, None)
        return Encoded(x_NF, torch.stack(ids, 1) if ids else None, y_N, labelled_N)

    def _non_finite(self, x_NF: Tensor, where: str) -> ColumnError:
        names = [column.name for column in self.columns for _ in range(column.numbers)]
        bad_NF = ~torch.isfinite(x_NF)
        first = int(bad_NF.any(0).nonzero()[0])
        count = int(bad_NF[:, first].sum())
        return ColumnError(
            f"column {names[first]!r} of {where} has NaN, infinity or a value beyond float32 in {count} rows: "
            f"write nulls for missing values"
        )

    def _target(self, array: pa.Array[Any], where: str) -> tuple[Tensor, Tensor | None]:
        """(y_N, labelled_N) as in Encoded; y is 0 where it is null."""
        values_NK, present_NK = as_tensor(array, None)
        values_N, labelled_N = values_NK.squeeze(1), None if present_NK is None else present_NK.squeeze(1)
        if self.task == "regression":
            if self.standardize_target and self.statistics is not None:
                values_N = (values_N.double() - self.statistics.target_mean) / self.statistics.target_std
            values_N = values_N.float()
            _refuse_non_finite(values_N.sum(), self.target, where, exact=values_N)
            return values_N, labelled_N
        last = 1 if self.classes is None else self.classes - 1
        bad_N = ~((values_N >= 0) & (values_N <= last) & (values_N == values_N.floor()))  # ~(...): NaN is bad too
        if bad_N.any():
            found = values_N[bad_N][0].item()
            allowed = "0 or 1" if self.task == "binary" else f"whole numbers from 0 to {last}"
            raise ColumnError(
                f"target {self.target!r} of {where} holds {found:g}, but {self.task} labels are {allowed}"
            )
        return (values_N.float() if self.task == "binary" else values_N.long()), labelled_N

    # ---- state -------------------------------------------------------------------------------------------------------
    def state(self) -> tuple[dict[str, Tensor], JsonValue]:
        """(float64 tensors, JSON) from which `from_state` rebuilds this object exactly."""
        config: dict[str, Any] = {
            "columns": [asdict(column) for column in self.columns],
            "target": self.target,
            "target_family": self.target_family,
            "task": self.task,
            "classes": self.classes,
            "standardize_features": self.standardize_features,
            "standardize_target": self.standardize_target,
        }
        if self.statistics is None:
            return {}, config
        seen = self.statistics
        config |= {"rows": seen.rows, "nulls": list(seen.nulls)}
        target = torch.tensor([seen.target_mean, seen.target_std], dtype=torch.float64)
        return {"mean": seen.mean_F, "std": seen.std_F, "target": target}, config

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: JsonValue) -> Self:
        """The inverse of `state`."""
        known = dict(cast(dict[str, Any], config))
        statistics = None
        if tensors:
            target_mean, target_std = tensors["target"].tolist()
            statistics = Statistics(
                rows=known.pop("rows"),
                nulls=tuple(known.pop("nulls")),
                mean_F=tensors["mean"],
                std_F=tensors["std"],
                target_mean=target_mean,
                target_std=target_std,
            )
        columns = tuple(Input(**column) for column in known.pop("columns"))
        return cls(columns=columns, statistics=statistics, **known)


def _field(schema: pa.Schema, name: str, where: str) -> pa.Field[Any]:
    places = schema.get_all_field_indices(name)
    if len(places) == 1:
        return schema.field(places[0])
    if places:
        raise ColumnError(f"column {name!r} occurs {len(places)} times in {where}: write each name once")
    near = difflib.get_close_matches(name, schema.names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, schema.names[:20]))}"
    raise ColumnError(f"column {name!r} is missing from {where}: {hint}")


def _resolve(column: Column, schema: pa.Schema) -> Input:
    kind = _field(schema, column.name, "the dataset").type
    usable = family_of(kind)
    if usable is None:
        raise ColumnError(
            f"column {column.name!r} has type {kind}, which cannot be an input: write numbers, booleans, dates, times, "
            f"text, or fixed-size lists of numbers"
        )
    family, width = usable
    if column.kind == "number" and family == "text":
        raise ColumnError(f"column {column.name!r} has type {kind}, not a number: use kind 'category'")
    if column.kind == "category" and (family not in ("text", "number") or width is not None):
        raise ColumnError(f"column {column.name!r} has type {kind}, which cannot be a category: use kind 'number'")
    category = column.kind == "category" or family == "text"
    return Input(column.name, family, width, column.buckets if category else 0)


def _target_family(name: str, schema: pa.Schema, where: str) -> Family:
    kind = _field(schema, name, where).type
    usable = family_of(kind)
    if usable not in (("number", None), ("duration", None)):
        raise ColumnError(f"target {name!r} of {where} has type {kind}: write a number (classes as 0, 1, 2, ...)")
    return usable[0]


def _null_count(array: pa.Array[Any], rows_N: Tensor | None) -> int:
    if not array.null_count or rows_N is None:
        return array.null_count
    present_N = as_tensor(array.is_valid(), None)[0].squeeze(1)
    return len(rows_N) - int(present_N.index_select(0, rows_N).sum())


def _refuse_non_finite(summary: Tensor, name: str, where: str, exact: Tensor | None = None) -> None:
    """Raises ColumnError if a sum or mean is not finite; a sum may overflow by itself, so `exact` has the last word."""
    if not torch.isfinite(summary).all() and (exact is None or not torch.isfinite(exact).all()):
        raise ColumnError(
            f"column {name!r} of {where} has NaN, infinity or a value beyond float32: write nulls for missing values"
        )


def _ids(array: pa.Array[Any], column: Input, where: str) -> Tensor:
    try:
        return bucket_ids(array, column.buckets)
    except ValueError as error:
        raise ColumnError(f"column {column.name!r} of {where}: {error}: write nulls for missing values") from error

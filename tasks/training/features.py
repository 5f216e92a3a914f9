"""Which columns become the model's inputs, and the statistics that scale them: the preprocessing state.

Shape legend: N rows, F numbers of one row (a vector column counts for several; null indicators come last), C ids of one row (a
category has one, a sequence several), T targets.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, Self, cast

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import JsonValue
from torch import Tensor

from tidemill.progress import NOBODY, Activity, under_way
from tidemill.tasks.training.classes import Label, class_numbers
from tidemill.tasks.training.columns import Ids, as_tensor, bucket_ids, one_array, sequence_ids
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.families import Family, stored, type_name, type_of
from tidemill.tasks.training.groups import RowGroup, Subset, read_ahead
from tidemill.tasks.training.inputs import Input, check_families, check_weight, input_of, target_family
from tidemill.tasks.training.packing import blocks, pack
from tidemill.tasks.training.pool import Empty
from tidemill.tasks.training.request_log import is_reserved
from tidemill.tasks.training.spec import Spec, Task
from tidemill.tasks.training.statistics import Moments, Statistics, range_of
from tidemill.tasks.training.survey import Survey

NULLS_BY_CHANCE: Final = 1e-6  # a wholly null column that is less probable than this is taken for a mistake


class SequenceInput(NamedTuple):
    """One input column of lists, as ids."""

    length: int  # ids of one row; lists that are shorter are followed by 0
    buckets: int  # ids run from 0 (no item, or a null) to this number, inclusive


class Encoded(NamedTuple):
    """The inputs of rows as tensors."""

    x_NF: Tensor  # float32, row-major
    ids_NC: Tensor | None  # int64, row-major, laid out as `Features.ids` says; None: no categories and no sequences


@dataclass(frozen=True, eq=False)
class Counted:
    """What a pass over rows has counted."""

    rows: int
    labelled: int
    """Those that have all targets."""
    nulls: Sequence[int]
    """Of each input column."""
    inputs: Sequence[Moments]
    """Of each input column; of no numbers for categories and sequences."""
    targets: Sequence[Moments]
    """Of each target; of no values where that is text whose labels are not known yet."""
    class_counts: Tensor | None
    """int64 [classes]: rows of each; None: they were not asked for."""
    range_2T: Tensor
    """float64 [2, T]: the lowest and the highest of each target; infinity and -infinity of text."""

    def of(self, columns: Sequence[int]) -> Self:
        """The same of some of the input columns only."""
        return replace(self, nulls=[self.nulls[i] for i in columns], inputs=[self.inputs[i] for i in columns])


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """The resolved input columns and targets, and the statistics that scale them.

    By default the statistics are learned once and never move: shifting the inputs under trained weights changes the function
    that the model computes without any gradient step, and the optimizer's moments are then about inputs that no longer exist.
    With `running_statistics` they follow the shards (`updated`), for data that leaves the range of the dataset.
    """

    columns: tuple[Input, ...]
    targets: tuple[str, ...]
    target_families: tuple[Family, ...]
    sample_weight: str | None
    task: Task
    classes: int | None
    labels: tuple[Label, ...] | None = None
    """Of the classes, in the order of their numbers. None: the target holds the numbers."""
    class_weighting: Literal["balanced"] | tuple[float, ...] | None
    standardize_features: bool
    standardize_target: bool
    running_statistics: bool = False
    soft_limit: float | None = None
    null_indicators: bool = False
    limit_predictions: bool = False
    dataset_columns: tuple[str, ...]  # of the schema that was resolved, used or not
    indicated: tuple[str, ...] = ()
    """The number columns that had nulls where `fit` looked, if `null_indicators` asks for them."""
    statistics: Statistics | None = None

    # ---- resolving ---------------------------------------------------------------------------------------------------
    @classmethod
    def resolve(cls, spec: Spec, schema: pa.Schema, labels: tuple[Label, ...] | None = None) -> Self:
        """Decides from Arrow's types how each column is read. Raises ColumnError.

        `labels` are those of the classes, if these are no numbers from 0; () while they are to be learned (`count`). A spec that
        leaves its task to the target is taken for one of regression.
        """
        if spec.sample_weight is not None:
            check_weight(spec.sample_weight, schema, "the dataset")
        return cls(
            columns=tuple(input_of(column, schema) for column in spec.features),
            targets=spec.targets,
            target_families=tuple(
                target_family(name, schema, "the dataset", text=labels is not None) for name in spec.targets
            ),
            sample_weight=spec.sample_weight,
            task=spec.stated_task or "regression",
            classes=spec.classes,
            labels=labels,
            class_weighting=spec.class_weights,
            standardize_features=spec.standardize_features,
            standardize_target=spec.standardize_target,
            running_statistics=spec.running_statistics,
            soft_limit=spec.soft_limit,
            null_indicators=spec.null_indicators,
            limit_predictions=spec.limit_predictions,
            dataset_columns=tuple(schema.names),
        )

    @cached_property
    def numbers(self) -> int:
        """F, the width of x_NF: the number columns in spec order, then the null indicators."""
        return self.scaled + len(self.indicated)

    @cached_property
    def scaled(self) -> int:
        """How many of the F numbers come from columns, and have statistics: the first ones."""
        return sum(column.numbers for column in self.columns)

    @cached_property
    def buckets(self) -> tuple[int, ...]:
        """Hash buckets of each category column; ids run from 0 (null) to this number, inclusive."""
        return tuple(column.buckets for column in self.columns if column.buckets and not column.length)

    @cached_property
    def sequences(self) -> tuple[SequenceInput, ...]:
        """Length and hash buckets of each sequence column."""
        return tuple(SequenceInput(column.length, column.buckets) for column in self.columns if column.length)

    @cached_property
    def ids(self) -> int:
        """C, the width of ids_NC: first one id of each category, then `length` ids of each sequence, in spec order."""
        return len(self.buckets) + sum(sequence.length for sequence in self.sequences)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one encoded row, targets and weight included."""
        target = 8 if self.task == "multiclass" else 4 * len(self.targets)
        return 4 * self.numbers + 8 * self.ids + target + (0 if self.sample_weight is None else 4)

    @cached_property
    def fitted(self) -> bool:
        """Whether rows can be encoded: `fit` has run, or nothing is learned from the dataset."""
        learned = self.standardize_features or self.standardize_target or self.class_weighting == "balanced"
        learned = learned or self.null_indicators or self.limit_predictions
        return self.statistics is not None or not learned

    @property
    def class_weights(self) -> Tensor | None:
        """float32 [classes], 2 for binary: weight of each class in the loss. None: all the same.

        Balanced weights are rows / (classes * rows of the class), so that a row weighs 1 on average (King and Zeng 2001,
        https://doi.org/10.1093/oxfordjournals.pan.a004868, with equal shares for the population's).
        """
        if self.class_weighting is None:
            return None
        if self.class_weighting != "balanced":
            return torch.tensor(self.class_weighting, dtype=torch.float32)
        assert self.statistics is not None, "fit() comes before class_weights"
        counts = self.statistics.class_counts
        assert counts is not None, "fit() counts the classes"
        return (counts.sum() / (len(counts) * counts.double())).float()

    @property
    def base_logits(self) -> Tensor | None:
        """float32, one for each output: what a model returns that knows nothing but how often each class occurs.

        Of the rows that `fit` has counted, and half a row more of each class. None for regression, and if nothing was counted.
        """
        seen = self.statistics
        if self.task == "regression" or seen is None or seen.labelled is None:
            return None
        if self.classes is None:
            ones_T = seen.target_mean * seen.labelled
            return ((ones_T + 0.5) / (seen.labelled - ones_T + 0.5)).log().float()
        if seen.class_counts is None:
            return None
        counts = seen.class_counts.double() + 0.5
        return (counts / counts.sum()).log().float()

    def names(self, *, labelled: bool) -> list[str]:
        """Columns to read, each once: the features, then if `labelled` the targets and the sample weight."""
        names = [column.name for column in self.columns]
        if labelled:
            names += self.targets
            if self.sample_weight is not None and self.sample_weight not in names:  # it may be a feature too
                names.append(self.sample_weight)
        return names

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """An Arrow type for each column of `names`: what a column without a type of its own stands for."""
        read_as = [(column.name, column.family, column.width) for column in self.columns]
        read_as += [(name, family, None) for name, family in zip(self.targets, self.target_families, strict=True)]
        types = {name: type_of(family, width) for name, family, width in read_as}
        return types if self.sample_weight is None else {self.sample_weight: pa.float64(), **types}

    @cached_property
    def digest(self) -> bytes:
        """Of what `state` holds, but for the limits of predictions: two with the same one encode rows alike."""
        tensors, config = self.state()
        found = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
        for name in sorted(tensors.keys() - {"target_range"}):
            found.update(name.encode())
            found.update(tensors[name].contiguous().numpy().tobytes())
        return found.digest()

    def new_columns(self, schema: pa.Schema) -> dict[str, str]:
        """Columns that the first dataset did not have, used or not: their names and Arrow types. None of a log of requests."""
        known = set(self.dataset_columns)
        new = (field for field in schema if field.name not in known and not is_reserved(field.name))
        return {field.name: type_name(field.type) for field in new}

    def check(self, schema: pa.Schema, where: str, *, labelled: bool = True, begun: bool = True) -> None:
        """Raises ColumnError if a column is missing from `schema`, or means something else than at the start.

        `family_of` has the rule of types that may take each other's place. A column without a type (`is_untyped`) has no value
        that could mean something else.
        """
        if (sound := self._sound.get(labelled)) is not None and sound.equals(schema):
            return
        inputs = [(column.name, column.family, column.width) for column in self.columns]
        check_families(inputs, schema, where, begun=begun)
        if labelled:
            self.check_targets(schema, where, begun=begun)
            if self.sample_weight is not None:
                check_weight(self.sample_weight, schema, where)
        self._sound[labelled] = schema

    @cached_property
    def _sound(self) -> dict[bool, pa.Schema]:
        """The last schema that `check` found nothing wrong with, with (True) and without the targets: shards are alike."""
        return {}

    def check_targets(self, schema: pa.Schema, where: str, *, begun: bool = True) -> None:
        """The same of the targets alone."""
        targets = [(name, family, None) for name, family in zip(self.targets, self.target_families, strict=True)]
        check_families(targets, schema, where, begun=begun)

    def tables(self, groups: Iterable[RowGroup], *, labelled: bool = True) -> Generator[pa.Table]:
        """The columns to read (`names`) of each group, in order, read ahead (`read_ahead`: to be closed).

        Raises ColumnError when a group has its turn whose schema is bad (`check`).
        """
        names = self.names(labelled=labelled)

        def read(group: RowGroup) -> pa.Table:
            self.check(group.schema, group.name, labelled=labelled)
            table = group.read(names)
            assert table.num_rows == group.num_rows, f"{group.name} announced another number of rows than it read"
            return self._stored(table)

        return read_ahead(groups, read)

    def _stored(self, table: pa.Table) -> pa.Table:
        """The table with its columns as Tidemill computes with them (`families.stored`)."""
        types = self.types
        for i, name in enumerate(table.column_names):
            column = table.column(i)
            if name in types and (as_stored := stored(column, types[name])) is not column:
                table = table.set_column(i, name, as_stored)
        return table

    def labelled_rows(self, groups: Sequence[RowGroup], split: Subset | None = None) -> int:
        """How many rows of the groups (of `split`) have all targets. Only the targets are read, and those of no row group twice.

        Raises ColumnError: a bad schema.
        """
        rows, groups = 0, [group for group in groups if group.num_rows]
        with closing(self.target_tables(groups)) as tables:
            for group, table in zip(groups, tables, strict=True):
                rows += self.labelled(table, None if split is None else split.rows(group).nonzero().squeeze(1))
        return rows

    def target_tables(self, groups: Iterable[RowGroup]) -> Generator[pa.Table]:
        """As `tables`, but of the targets alone."""

        def read(group: RowGroup) -> pa.Table:
            self.check_targets(group.schema, group.name)
            return self._stored(group.read(list(self.targets)))

        return read_ahead(groups, read)

    def labelled(self, table: pa.Table, rows_N: Tensor | None = None) -> int:
        """How many rows of a table, or of its `rows_N`, have all targets."""
        nulls = [column for column in table.select(list(self.targets)).columns if column.null_count]
        if not nulls:
            return table.num_rows if rows_N is None else len(rows_N)
        present = [as_tensor(one_array(column).is_valid(), None)[0].squeeze(1) for column in nulls]
        labelled_N = torch.stack(present).bool().all(0)
        return int((labelled_N if rows_N is None else labelled_N.index_select(0, rows_N)).sum())

    # ---- learning the statistics -------------------------------------------------------------------------------------
    def fit(self, groups: Iterable[RowGroup], split: Subset | None = None) -> Self:
        """A copy with the statistics of the rows of `split` (None: all rows), from one streaming pass.

        Raises ColumnError: a bad schema, NaN or infinity, a bad sample weight, a column with no value at all, or a class
        without rows where class weights are balanced.
        """
        groups = list(groups)
        with learning(groups) as activity:
            return self.with_statistics(self.count(groups, split, activity=activity))

    def with_statistics(self, counted: Counted) -> Self:
        """A copy with the statistics of what `count` has counted. Raises what `fit` raises, but for single values."""
        rows, class_counts = counted.rows, counted.class_counts
        if not rows:
            raise ColumnError("no row is left to train on: the dataset is too small for this holdout; set holdout to 0")
        for column, moments, null in zip(self.columns, counted.inputs, counted.nulls, strict=True):
            if null == rows or not bool(moments.count_K.all()):
                raise ColumnError(
                    f"column {column.name!r} is null in all {rows} rows of the dataset: remove it from features"
                )
        for name, moments in zip(self.targets, counted.targets, strict=True):
            if not moments.count_K.all():
                raise ColumnError(f"target {name!r} is null in all {rows} rows of the dataset: nothing can be learned")
        if class_counts is not None and self.class_weighting == "balanced" and not class_counts.all():
            raise ColumnError(
                f"target {self.targets[0]!r} is {self._label(int(class_counts.argmin()))} in no labelled row of the dataset, so "
                f"class_weights 'balanced' has no weight for that class: add rows of it, or name the weights"
            )
        found = Moments.of_columns(counted.inputs), Moments.of_columns(counted.targets)
        for name, m2 in zip(self._number_names(), torch.cat([found[0].m2_K, found[1].m2_K]).tolist(), strict=True):
            if not math.isfinite(m2):
                raise ColumnError(
                    f"column {name!r} has values so far out that it has no finite standard deviation: mend them, or write nulls"
                )
        nulls, labelled = counted.nulls, counted.labelled
        holed = [c.name for c, null in zip(self.columns, nulls, strict=True) if null and not c.buckets]
        statistics = Statistics.of(
            rows, nulls, *found, class_counts, running=self.running_statistics, labelled=labelled
        )
        return replace(
            self,
            indicated=tuple(holed) if self.null_indicators else (),
            statistics=replace(statistics, target_range=counted.range_2T) if self.limit_predictions else statistics,
        )

    def updated(self, groups: Iterable[RowGroup]) -> Self:
        """A copy whose statistics are of the rows of `groups` too; class weights stay.

        Raises ColumnError: as `fit` does, or values so far out that the statistics would be of them alone.
        """
        assert self.statistics is not None, "fit() comes before updated()"
        counted = self.count(groups, None)
        found = Moments.of_columns(counted.inputs), Moments.of_columns(counted.targets)
        statistics = self.statistics.with_rows(counted.rows, counted.nulls, *found, self._number_names())
        return replace(self, statistics=statistics)

    def widened(self, groups: Iterable[RowGroup]) -> Self:
        """A copy that predicts as far as the targets of `groups` reach too (`limit_predictions`). Raises ColumnError."""
        assert self.statistics is not None, "fit() comes before widened()"
        range_2T = self.statistics.target_range
        assert range_2T is not None, "limits were asked for"
        groups = [group for group in groups if group.num_rows]
        with closing(self.target_tables(groups)) as tables:
            for table in tables:
                range_2T = self._range(table, None, range_2T)
        if not torch.isfinite(range_2T).all():
            raise ColumnError(f"target {self.targets[0]!r} has NaN or infinity: write nulls for missing values")
        return replace(self, statistics=replace(self.statistics, target_range=range_2T))

    def _range(self, table: pa.Table, rows_N: Tensor | None, seen_2T: Tensor) -> Tensor:
        """float64 [2, T]: the lowest and the highest of each target in a table, or in its `rows_N`, and in what was seen."""
        found = [range_of(one_array(table.column(name)), rows_N) for name in self.targets]
        low_T, high_T = torch.stack(found, 1)
        return torch.stack([torch.minimum(seen_2T[0], low_T), torch.maximum(seen_2T[1], high_T)])

    def _number_names(self) -> list[str]:
        """The column of each of the scaled numbers and the T targets."""
        return [*(column.name for column in self.columns for _ in range(column.numbers)), *self.targets]

    def count(
        self,
        groups: Iterable[RowGroup],
        split: Subset | None,
        survey: Survey | None = None,
        activity: Activity = NOBODY,
    ) -> Counted:
        """One streaming pass over the rows of `split` (None: all rows). `survey` sees each table too.

        Raises ColumnError: a bad schema, NaN or infinity, a bad sample weight, or a label that the task does not have.
        """
        inputs = [Moments.zero(column.numbers) for column in self.columns]
        targets = [Moments.zero(1) for _ in self.targets]
        surveyed = survey is not None and survey.target is not None  # it counts the classes
        class_counts = None
        if (self.class_weighting == "balanced" or self.classes is not None) and not surveyed:
            class_counts = torch.zeros(self.classes or 2, dtype=torch.int64)
        range_2T = torch.tensor([math.inf, -math.inf], dtype=torch.float64).unsqueeze(1).repeat(1, len(self.targets))
        nulls = [0] * len(self.columns)
        rows, labelled, groups = 0, 0, list(groups)
        with closing(self.tables(groups)) as tables:
            for group, table in zip(groups, tables, strict=True):
                rows_N = None if split is None else split.rows(group).nonzero().squeeze(1)
                rows += group.num_rows if rows_N is None else len(rows_N)
                labelled += self.labelled(table, rows_N)
                for i, column in enumerate(self.columns):
                    array = one_array(table.column(column.name))
                    nulls[i] += _null_count(array, rows_N)
                    if not column.buckets:
                        inputs[i] = inputs[i].merged(array, column.width, rows_N)
                        _refuse_non_finite(inputs[i].mean_K, column.name, group.name)
                for i, name in enumerate(self.targets):
                    if self.target_families[i] != "text" or self.labels:
                        targets[i] = targets[i].merged(self._numbers_of(i, table, group.name), None, rows_N)
                        _refuse_non_finite(targets[i].mean_K, name, group.name)
                self.weights(table, group.name)  # only to refuse bad ones before training begins
                if class_counts is not None:
                    class_counts += self._class_counts(table, group.name, rows_N)
                if survey is not None:
                    survey.see(table, rows_N)
                if "text" not in self.target_families:
                    range_2T = self._range(table, rows_N, range_2T)
                activity.advance(group.num_rows)
        return Counted(rows, labelled, nulls, inputs, targets, class_counts, range_2T)

    def _numbers_of(self, i: int, table: pa.Table, where: str) -> pa.Array[Any]:
        """A target as numbers, or as what `as_tensor` makes numbers of."""
        array = one_array(table.column(self.targets[i]))
        return class_numbers(array, self.labels, self.targets[i], where) if self.labels else array

    def _label(self, number: int) -> object:
        return number if self.labels is None else repr(self.labels[number])

    def improbably_null(self, nulls: Sequence[int], rows: int) -> str | None:
        """Name of a column that is null in all of `rows` rows though the dataset makes that improbable, or None.

        `nulls` counts the nulls of each input column. With p the share of nulls seen so far (by Laplace's rule of
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
    @property
    def scaling(self) -> tuple[Tensor, Tensor]:
        """(center_F, scale_F), float64: a number becomes (number - center) / scale; null indicators stay as they are."""
        center_F, scale_F = (
            torch.zeros(self.numbers, dtype=torch.float64),
            torch.ones(self.numbers, dtype=torch.float64),
        )
        if self.standardize_features and self.statistics is not None:
            center_F[: self.scaled], scale_F[: self.scaled] = self.statistics.mean_F, self.statistics.std_F
        return center_F, scale_F

    def encode(self, table: pa.Table, where: str) -> Encoded:
        """The inputs of a table, as `encode_into` makes them; `where` names it in messages. Raises ColumnError: NaN, infinity."""
        inputs = self.allocate(table.num_rows)
        self.encode_into(self._stored(table), where, *inputs)
        return inputs

    def allocate(self, n: int, empty: Empty = torch.empty) -> Encoded:
        """For n rows, not filled."""
        ids_NC = empty((n, self.ids), dtype=torch.int64) if self.ids else None
        return Encoded(empty((n, self.numbers), dtype=torch.float32), ids_NC)

    def encode_into(
        self, table: pa.Table, where: str, x_NF: Tensor, ids_NC: Tensor | None, places_N: Tensor | None = None
    ) -> None:
        """Writes the inputs of a table into what `allocate` made.

        With `places_N` (int32 or int64, one for each row of the table) each row goes there, or nowhere if that is negative.

        A null number becomes the mean (0 once standardised; 0 too if not standardising), a null category id 0, a null
        list no items. Raises ColumnError: NaN, infinity.
        """
        assert self.fitted, "fit() comes before encode_into()"
        columns = [(one_array(table.column(column.name)), column) for column in self.columns]
        center_F, scale_F = self.scaling
        numbers = [(array, c.width) for array, c in columns if not c.buckets]
        numbers += [(pc.is_null(array).cast(pa.float32()), None) for array, c in columns if c.name in self.indicated]
        if not pack(numbers, center_F, scale_F, x_NF, places_N, soft_limit=self.soft_limit, limited=self.scaled):
            if places_N is not None:  # a window is shared with other tables
                x_NF = torch.empty(table.num_rows, self.numbers, dtype=torch.float32)
                pack(numbers, center_F, scale_F, x_NF)
            raise self._non_finite(x_NF, where)
        if ids_NC is not None:
            _fill_ids([(array, c) for array, c in columns if c.buckets], where, ids_NC, places_N)

    def _non_finite(self, x_NF: Tensor, where: str) -> ColumnError:
        names = self._number_names()
        bad_NF = ~torch.isfinite(x_NF)
        first = int(bad_NF.any(0).nonzero()[0])
        count = int(bad_NF[:, first].sum())
        return ColumnError(
            f"column {names[first]!r} of {where} has NaN, infinity or a value beyond float32 in {count} rows: "
            f"write nulls for missing values"
        )

    def target(self, table: pa.Table, where: str) -> tuple[Tensor, Tensor | None]:
        """(y_N, labelled_N), read only: they may be views of Arrow's memory. `where` names the table in messages.

        y_N: float32 ([N, T] of several targets), int64 class numbers for multiclass; 0 where it is null. labelled_N: bool; None:
        every row has all targets. Raises ColumnError: NaN, infinity, or a label that the task does not have.
        """
        found = [self._one_target(i, table, where) for i in range(len(self.targets))]
        if len(found) == 1:
            return found[0]
        missing = [labelled_N for _, labelled_N in found if labelled_N is not None]
        return torch.stack([y_N for y_N, _ in found], 1), torch.stack(missing).all(0) if missing else None

    def _one_target(self, i: int, table: pa.Table, where: str) -> tuple[Tensor, Tensor | None]:
        values_NK, present_NK = as_tensor(self._numbers_of(i, table, where), None)
        values_N, labelled_N = values_NK.squeeze(1), None if present_NK is None else present_NK.squeeze(1)
        name = self.targets[i]
        if self.task == "regression":
            if self.standardize_target and self.statistics is not None:
                values_N = (values_N.double() - self.statistics.target_mean[i]) / self.statistics.target_std[i]
            values_N = values_N.float()
            _refuse_non_finite(values_N.sum(), name, where, exact=values_N)
            return values_N, labelled_N
        last = 1 if self.classes is None else self.classes - 1
        bad_N = ~((values_N >= 0) & (values_N <= last) & (values_N == values_N.floor()))  # ~(...): NaN is bad too
        if bad_N.any():
            found = values_N[bad_N][0].item()
            allowed = "0 or 1" if self.task == "binary" else f"whole numbers from 0 to {last}"
            raise ColumnError(f"target {name!r} of {where} holds {found:g}, but {self.task} labels are {allowed}")
        return (values_N.float() if self.task == "binary" else values_N.long()), labelled_N

    def _class_counts(self, table: pa.Table, where: str, rows_N: Tensor | None) -> Tensor:
        """int64 [classes]: labelled rows of each class in a table, or in its `rows_N`."""
        y_N, labelled_N = self.target(table, where)
        classes_N = y_N.long() if labelled_N is None else torch.where(labelled_N, y_N.long(), self.classes or 2)
        if rows_N is not None:
            classes_N = classes_N.index_select(0, rows_N)
        return classes_N.bincount(minlength=(self.classes or 2) + 1)[:-1]  # the last: no label

    def weights(self, table: pa.Table, where: str) -> Tensor | None:
        """float32 [N], sample weights, read only; None: the spec has none. Raises ColumnError: a bad weight."""
        if self.sample_weight is None:
            return None
        values_NK, present_NK = as_tensor(one_array(table.column(self.sample_weight)), None)
        name = f"sample_weight {self.sample_weight!r} of {where}"
        if present_NK is not None:
            raise ColumnError(f"{name} is null in {int((~present_NK).sum())} rows: write a weight for every row")
        w_N = values_NK.squeeze(1).float()
        bad_N = ~((w_N >= 0) & (w_N < torch.inf))  # ~(...): NaN is bad too
        if bad_N.any():
            raise ColumnError(f"{name} holds {w_N[bad_N][0]:g}, but weights are finite and not negative: mend the rows")
        return w_N

    # ---- state -------------------------------------------------------------------------------------------------------
    def state(self) -> tuple[dict[str, Tensor], JsonValue]:
        """(tensors, JSON) from which `from_state` rebuilds this object exactly."""
        config: dict[str, Any] = {
            "columns": [asdict(column) for column in self.columns],
            "targets": list(self.targets),
            "target_families": list(self.target_families),
            "sample_weight": self.sample_weight,
            "task": self.task,
            "classes": self.classes,
            "class_weighting": self.class_weighting,
            "standardize_features": self.standardize_features,
            "standardize_target": self.standardize_target,
            "dataset_columns": list(self.dataset_columns),
        }
        if self.labels is not None:  # absent from states that are older than it
            config["labels"] = list(self.labels)
        for name in ("running_statistics", "soft_limit", "null_indicators", "limit_predictions"):
            if getattr(self, name):  # absent from states that are older than it
                config[name] = getattr(self, name)
        if self.indicated:
            config["indicated"] = list(self.indicated)
        if self.statistics is None:
            return {}, config
        seen = self.statistics
        config |= {"rows": seen.rows, "nulls": list(seen.nulls)}
        tensors = {"mean": seen.mean_F, "std": seen.std_F, "target": torch.stack([seen.target_mean, seen.target_std])}
        if seen.labelled is not None:  # absent from states that are older than it
            config["labelled"] = seen.labelled
        if seen.class_counts is not None:
            tensors["class_counts"] = seen.class_counts
        if seen.target_range is not None:
            tensors["target_range"] = seen.target_range
        if seen.moments is not None:
            for name, moments in zip(("moments", "target_moments"), seen.moments, strict=True):
                tensors |= {f"{name}.count": moments.count_K, f"{name}.m2": moments.m2_K}
        return tensors, config

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: JsonValue) -> Self:
        """The inverse of `state`. Raises ValueError, TypeError and others for what `state` does not write."""
        known = dict(cast(dict[str, Any], config))
        if not isinstance(known["dataset_columns"], list) or not all(
            isinstance(n, str) for n in known["dataset_columns"]
        ):
            raise TypeError("dataset_columns is no list of names")
        statistics = None
        if tensors:
            target_mean, target_std = tensors["target"].unbind()
            moments = None
            if known.get("running_statistics"):
                moments = (
                    Moments(tensors["moments.count"], tensors["mean"], tensors["moments.m2"]),
                    Moments(tensors["target_moments.count"], target_mean, tensors["target_moments.m2"]),
                )
            statistics = Statistics(
                rows=known.pop("rows"),
                labelled=known.pop("labelled", None),
                nulls=tuple(known.pop("nulls")),
                mean_F=tensors["mean"],
                std_F=tensors["std"],
                target_mean=target_mean,
                target_std=target_std,
                class_counts=tensors.get("class_counts"),
                moments=moments,
                target_range=tensors.get("target_range"),
            )
        labels, classes = known.get("labels"), known.get("classes") or 2
        if labels is not None and not (
            len(labels) == classes and all(isinstance(label, bool | int | str) for label in labels)
        ):
            raise TypeError(f"labels are no {classes} labels")
        columns = tuple(Input(**column) for column in known.pop("columns"))
        if statistics is not None:
            statistics.check(len(columns), sum(column.numbers for column in columns), len(known["targets"]))
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}  # JSON has no tuples
        return cls(columns=columns, statistics=statistics, **(known | lists))


def learning(groups: Sequence[RowGroup]) -> AbstractContextManager[Activity]:
    """Tells whoever listens how far the pass over these row groups is that learns their statistics."""
    return under_way("statistics of the columns", total=sum(group.num_rows for group in groups))


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


def _fill_ids(
    columns: Sequence[tuple[pa.Array[Any], Input]], where: str, ids_NC: Tensor, places_N: Tensor | None
) -> None:
    """Fills ids_NC as `Features.ids` lays it out, from categories and sequences in spec order."""
    found: list[tuple[int | slice, Ids]] = []  # (place in a row, ids)
    at = 0
    for array, column in sorted(columns, key=lambda pair: pair[1].length > 0):  # stable: the order of the spec is kept
        try:
            if column.length:
                found.append((slice(at, at + column.length), sequence_ids(array, column.buckets, column.length)))
            else:
                found.append((at, bucket_ids(array, column.buckets)))
        except ValueError as error:
            raise ColumnError(f"column {column.name!r} of {where}: {error}") from error
        at += column.length or 1
    for rows, ids_BC in blocks(len(columns[0][0]), ids_NC, places_N, columns=len(columns)):
        for here, ids in found:
            ids_BC[:, here] = ids(rows)

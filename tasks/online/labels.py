"""Labels that arrive after their features, in shards of their own, joined by a key column.

    labels = Labels(label_shard.row_groups(), key="order_id", targets=("delay",))
    joined = labels.join(feature_shard.row_groups())

`joined.groups` is then read, scored and trained on as if the targets had stood in the feature shard. An error of the first
call is the fault of the label shard, one of the second that of the feature shard, or of their not fitting together.

Shape legend: N rows of a feature row group, L rows of the label shard, V values in the dictionary of a key column.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import pyarrow as pa
import pyarrow.compute as pc

from tidemill.storage.errors import ShardRejected
from tidemill.storage.parquet import MAX_DECODED_BYTES, RowGroup
from tidemill.tasks.training.classes import plain
from tidemill.tasks.training.columns import numbers, one_array
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.families import family_of, is_untyped, stored, told


class _Keys(NamedTuple):
    """A key column as a dictionary: each value is looked at once, and a long string is never repeated in memory."""

    values_V: pa.Array[Any]
    indices_N: pa.Array[Any]  # null: the key is null

    @classmethod
    def of(cls, column: pa.ChunkedArray[Any]) -> _Keys:
        array = one_array(stored(column, pa.string()).unify_dictionaries())
        encoded = cast("pa.DictionaryArray[Any, Any]", array)
        if not pa.types.is_dictionary(array.type):
            encoded = array.dictionary_encode()
        return cls(encoded.dictionary, encoded.indices)


@dataclass(frozen=True)
class Joined:
    """Feature row groups with their labels, and what was left over."""

    groups: list[LabelledGroup]
    unmatched: int
    """Rows of the label shard whose key is null, or that of no feature row. They are ignored."""


class Labels:
    """One label shard in memory: its key column and its targets."""

    def __init__(self, groups: Sequence[RowGroup], key: str, targets: Sequence[str]) -> None:
        """Read the label shard. Other columns are ignored. Its row groups share one schema, as those of a file do.

        A key may occur more than once if its labels are the same each time.

        Raises:
            ShardRejected: a column is missing or of a type that cannot be used, a key has different labels, or the columns
                would take more than `MAX_DECODED_BYTES`.
            SpecError: the key is among the targets.
        """
        if key in targets:
            raise SpecError(f"{key!r} is both the key of the labels and a target: join by another column")
        schema, self.file, self.key, self.targets = groups[0].schema, groups[0].file, key, tuple(targets)
        self.key_type = key_type(schema, key, self.file)
        self.fields = [target_field(schema, target, self.file) for target in targets]
        tables, size = [], 0
        for group in groups:
            tables.append(group.read([key, *targets]))
            size += tables[-1].nbytes
            if size > MAX_DECODED_BYTES:
                raise ShardRejected(
                    f"{group.name}: the labels up to here take more than {MAX_DECODED_BYTES:,} bytes; write smaller shards"
                )
        table = pa.concat_tables(tables)
        self._values_L = {field.name: values_of(table.column(field.name), field.type) for field in self.fields}
        keys = _Keys.of(table.column(key))
        self._keys_V = keys.values_V
        # Not the index itself: a file's dictionary may hold a value twice.
        same_V = pc.index_in(keys.values_V, value_set=keys.values_V, skip_nulls=True)
        self._key_L = same_V.take(keys.indices_N)
        self._row_V = pc.index_in(same_V, value_set=self._key_L, skip_nulls=True)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        first_L = self._row_V.take(self._key_L)  # null where the key is
        for target, values_L in self._values_L.items():
            ours_L = values_L if family_of(values_L.type) == ("text", None) else numbers(values_L)
            theirs_L = ours_L.take(first_L)
            one_null_L = pc.xor(ours_L.is_null(), theirs_L.is_null())
            differ_L = pc.and_(pc.coalesce(pc.not_equal(ours_L, theirs_L), one_null_L), first_L.is_valid())
            row = pc.index(differ_L, True).as_py()
            if row >= 0:
                raise ShardRejected(
                    f"{self.file}: column {self.key!r} has {_shown(self._keys_V, self._key_L[row].as_py())} more than once, "
                    f"with different labels in {target!r}; write each key once, or the same label each time"
                )

    def join(self, features: Sequence[RowGroup]) -> Joined:
        """The feature rows in their order, with the targets of their keys.

        Null where no label has the key, or the key is null; rows of equal keys all get the label. The key column of each row
        group is read now. What stays in memory is the label shard and 4 bytes for each feature row.

        Raises:
            ShardRejected: the feature shard lacks the key column, has it in a type that cannot be compared with that of the
                labels, has a target already, or has more rows than `MAX_DECODED_BYTES` allow for.
        """
        if 4 * sum(group.num_rows for group in features) > MAX_DECODED_BYTES:
            raise ShardRejected(f"{features[0].file} has too many rows to join; write smaller shards")
        groups = []
        for group in features:
            for target in self.targets:
                if target in group.schema.names:  # which of the two labels would be right?
                    raise ShardRejected(
                        f"{group.file} has a column {target!r}, which is to come from the labels' inbox; "
                        "leave it out, or send the shard to an inbox without delayed labels"
                    )
            groups.append(LabelledGroup(group, self, self._rows_of(group)))
        found = pa.chunked_array([pc.unique(group.rows_N) for group in groups], pa.int32())
        first_L = self._row_V.take(self._key_L)  # stands for all rows of its key
        unmatched_L = pc.invert(pc.is_in(first_L, value_set=found.drop_null()))
        return Joined(groups, unmatched_L.true_count)

    def _rows_of(self, group: RowGroup) -> pa.Array[Any]:
        """int32 [N]: the row of the label shard for each row of a feature group, or null."""
        theirs = key_type(group.schema, self.key, group.file)
        if (kind := _common_type(theirs, self.key_type)) is None:
            raise ShardRejected(
                f"{group.file}: column {self.key!r} is {told(theirs)}, but {told(self.key_type)} in {self.file}; "
                "write both as integers, both as text or both as timestamps"
            )
        keys = _Keys.of(group.read([self.key]).column(self.key))
        try:
            theirs_V, ours_V = keys.values_V.cast(kind), self._keys_V.cast(kind)
        except pa.ArrowInvalid as error:  # a timestamp that does not exist in the finer unit
            raise ShardRejected(
                f"{group.file}: column {self.key!r} is {told(theirs)}, but {told(self.key_type)} in {self.file}: {error}"
            ) from error
        row_V = self._row_V.take(pc.index_in(theirs_V, value_set=ours_V, skip_nulls=True))
        return row_V.take(keys.indices_N)

    def values_at(self, target: str, rows_N: pa.Array[Any]) -> pa.Array[Any]:
        """Labels [N] of these rows of the label shard; null for null."""
        return self._values_L[target].take(rows_N)


class Targets(Protocol):
    """Where the targets of a feature row group are found."""

    targets: tuple[str, ...]
    fields: list[pa.Field[Any]]

    def values_at(self, target: str, rows_N: pa.Array[Any]) -> pa.Array[Any]: ...


@dataclass(frozen=True, eq=False)
class LabelledGroup:
    """A feature row group that has the targets as well (`tidemill.tasks.training.groups.RowGroup`)."""

    features: RowGroup
    labels: Targets
    rows_N: pa.Array[Any]
    """int32: the label of each row."""

    @property
    def name(self) -> str:
        return self.features.name

    @property
    def num_rows(self) -> int:
        return self.features.num_rows

    @property
    def schema(self) -> pa.Schema:
        """The features' schema, the targets after it."""
        schema = self.features.schema
        for field in self.labels.fields:
            schema = schema.append(field)
        return schema

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns, in this order; `num_rows` rows.

        Raises:
            ShardRejected: the bytes of the feature shard do not decode.
        """
        own = [column for column in dict.fromkeys(columns) if column not in self.labels.targets]
        table = self.features.read(own) if own else None
        fields: list[pa.Field[Any]] = []
        arrays: list[Any] = []
        for column in columns:
            if column in self.labels.targets:
                fields.append(self.labels.fields[self.labels.targets.index(column)])
                arrays.append(self.labels.values_at(column, self.rows_N))
            elif table is not None:
                fields.append(table.schema.field(column))
                arrays.append(table.column(column))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def only_field(schema: pa.Schema, name: str, where: str) -> pa.Field[Any]:
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        have = "no column" if not found else f"{len(found)} columns"
        raise ShardRejected(f"{where} has {have} {name!r}; the join of features and labels needs exactly one")
    return schema.field(found[0])


def values_of(column: pa.ChunkedArray[Any], kind: Any) -> pa.Array[Any]:
    """A target [L] as its field says; text is compared as bytes."""
    array = one_array(stored(column, kind))
    return plain(array) if kind == pa.large_binary() else array


def target_field(schema: pa.Schema, target: str, where: str) -> pa.Field[Any]:
    kind: Any = only_field(schema, target, where).type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    elif is_untyped(kind):
        kind = pa.float64()
    if family_of(kind) == ("text", None):
        kind = pa.large_binary()
    elif family_of(kind) not in (("number", None), ("duration", None)):  # what training takes as a target
        raise ShardRejected(f"target {target!r} of {where} has type {told(kind)}: write a number or a label")
    return pa.field(target, kind)  # nullable, whatever the file says


def key_type(schema: pa.Schema, key: str, where: str) -> Any:
    """The type of the key's values; ShardRejected if it is none that can be a key."""
    kind: Any = only_field(schema, key, where).type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_untyped(kind):
        kind = pa.null()
    if _common_type(kind, kind) is None:
        raise ShardRejected(f"key column {key!r} of {where} has type {told(kind)}; write integers, text or timestamps")
    return kind


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """A type in which keys of both can be compared exactly, or None. Timestamps without a zone count as UTC.

    A key that is null in every row, and so has no type, can be compared with any.
    """
    if pa.types.is_null(a) or pa.types.is_null(b):
        return pa.int64() if a == b else _common_type(*(2 * [b if pa.types.is_null(a) else a]))
    if family_of(a) == family_of(b) == ("text", None):
        return pa.large_binary()
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        if pa.types.is_unsigned_integer(a) and pa.types.is_unsigned_integer(b):
            return pa.uint64()
        return pa.decimal128(20, 0) if pa.uint64() in (a, b) else pa.int64()
    if pa.types.is_timestamp(a) and pa.types.is_timestamp(b):
        return pa.timestamp(max(a.unit, b.unit, key=["s", "ms", "us", "ns"].index), "UTC")
    return None


def _shown(values_V: pa.Array[Any], index: int) -> str:
    """One key for a message: short, on one line, and no failure if it is not UTF-8."""
    if family_of(values_V.type) == ("text", None):
        return reprlib.repr(values_V.slice(index, 1).cast(pa.large_binary())[0].as_py().decode(errors="replace"))
    return str(values_V.slice(index, 1).cast(pa.string())[0])

"""Labels that come row by row, in several shards: for each row of the features the last one of its key counts.

Which shards count for which features `rowwise.py` decides. Here are their rows in memory, and the join: of a run, which has found
the last label of each row already, and of a history that is made again from the shards that a manifest names.

Shape legend: N rows of a shard of features, L rows of a shard of labels, G rows of several shards of labels, one after the other.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from tidemill.storage.errors import ShardRejected
from tidemill.storage.parquet import MAX_DECODED_BYTES, RowGroup
from tidemill.tasks.online.labels import LabelledGroup, key_type, target_field, values_of
from tidemill.tasks.training.columns import one_array, to_arrow
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.families import family_of, stored


def keys_of(groups: Sequence[RowGroup], key: str) -> pa.Array[Any]:
    """The keys of all rows as bytes, null for null. Whole numbers and the text that writes them are the same key.

    Timestamps are compared to the nanosecond; those without a zone count as UTC.

    Raises:
        ShardRejected: the column is missing, of a type that cannot be a key, or takes more than `MAX_DECODED_BYTES`.
    """
    file = groups[0].file
    kind = key_type(groups[0].schema, key, file)
    found, size = list[Any](), 0
    for group in groups:
        keys = _as_bytes(one_array(stored(group.read([key]).column(key), pa.string()).unify_dictionaries()), kind, file)
        found.append(keys)
        size += keys.nbytes
        if size > MAX_DECODED_BYTES:
            raise ShardRejected(
                f"{file}: the keys of its rows take more than {MAX_DECODED_BYTES:,} bytes; write smaller shards"
            )
    return pa.concat_arrays(found)


def _as_bytes(array: pa.Array[Any], kind: Any, where: str) -> pa.Array[Any]:
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.large_binary())
    if pa.types.is_timestamp(kind):
        try:
            array = array.cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ShardRejected(f"{where}: a key is no time that nanoseconds can tell: {error}") from error
    if family_of(array.type) != ("text", None):
        array = array.cast(pa.large_string())
    return array.cast(pa.large_binary())


class LabelRows:
    """The rows of one shard of labels in memory."""

    def __init__(self, groups: Sequence[RowGroup], key: str, targets: Sequence[str]) -> None:
        """Read the key and the targets of each row. Other columns are ignored.

        Raises:
            ShardRejected: a column is missing or of a type that cannot be used, or the columns take too much memory.
            SpecError: the key is among the targets.
        """
        if key in targets:
            raise SpecError(f"{key!r} is both the key of the labels and a target: join by another column")
        schema, file = groups[0].schema, groups[0].file
        fields = [target_field(schema, target, file) for target in targets]
        self.keys_L = keys_of(groups, key)
        tables, size = list[pa.Table](), self.keys_L.nbytes
        for group in groups:
            tables.append(group.read(list(targets)))
            size += tables[-1].nbytes
            if size > MAX_DECODED_BYTES:
                raise ShardRejected(f"{group.name}: the labels up to here take more than {MAX_DECODED_BYTES:,} bytes")
        table = pa.concat_tables(tables)
        self.values_L = {field.name: _plain(values_of(table.column(field.name), field.type)) for field in fields}
        self.nbytes = self.keys_L.nbytes + sum(values.nbytes for values in self.values_L.values())

    def __len__(self) -> int:
        return len(self.keys_L)

    @property
    def table(self) -> pa.Table:
        """The targets [L]."""
        return pa.table(self.values_L)


def _plain(array: pa.Array[Any]) -> pa.Array[Any]:
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


class Latest:
    """Labels of several shards, one after the other (`tidemill.tasks.online.labels.Targets`)."""

    def __init__(
        self,
        parts: Sequence[tuple[LabelRows, pa.Array[Any] | None]],
        targets: Sequence[str],
        types: Mapping[str, pa.DataType],
    ) -> None:
        """Put labels together.

        Args:
            parts: Shards of labels, and which of their rows (int64; None: all).
            targets: Their columns.
            types: The type of a target where there are no labels.
        """
        self.targets = tuple(targets)
        self._values_G = {target: _together(parts, target, types[target]) for target in targets}
        self.fields = [pa.field(name, values.type) for name, values in self._values_G.items()]

    def values_at(self, target: str, rows_N: pa.Array[Any]) -> pa.Array[Any]:
        """Labels [N] of these rows; null for null."""
        return self._values_G[target].take(rows_N)


def _together(parts: Sequence[tuple[LabelRows, pa.Array[Any] | None]], target: str, kind: pa.DataType) -> pa.Array[Any]:
    """A target [G] of all parts. Numbers of different types become float64."""
    arrays = [rows.values_L[target] if some is None else rows.values_L[target].take(some) for rows, some in parts]
    types = {rows.values_L[target].type for rows, _ in parts if rows.values_L[target].null_count < len(rows)} or {kind}
    common = types.pop()
    if types:
        common = pa.duration("ns") if pa.types.is_duration(common) else pa.float64()
    # What is null in every row may have any type.
    arrays = [
        pa.nulls(len(array), common) if array.null_count == len(array) else array.cast(common, safe=False)
        for array in arrays
    ]
    return pa.concat_arrays(arrays) if arrays else pa.nulls(0, common)


def labelled(groups: Sequence[RowGroup], labels: Latest, rows_N: pa.Array[Any]) -> list[LabelledGroup]:
    """Row groups of features with their labels; `rows_N` (whole numbers): the row of the labels for each row, or null.

    Raises:
        ShardRejected: the features have a target already.
    """
    found, at = list[LabelledGroup](), 0
    for group in groups:
        for target in labels.targets:
            if target in group.schema.names:  # which of the two labels would be right?
                raise ShardRejected(
                    f"{group.file} has a column {target!r}, which is to come from the labels' inbox; "
                    "leave it out, or send the shard to an inbox without delayed labels"
                )
        found.append(LabelledGroup(group, labels, rows_N.slice(at, group.num_rows)))
        at += group.num_rows
    return found


def join_again(
    groups: Sequence[RowGroup],
    shards: Sequence[LabelRows],
    key: str,
    targets: Sequence[str],
    types: Mapping[str, pa.DataType],
) -> list[LabelledGroup]:
    """The rows of features with the last label of their key in these shards, as a manifest names them.

    Raises ShardRejected: they do not fit together any more.
    """
    labels = Latest([(shard, None) for shard in shards], targets, types)
    if not shards:
        return labelled(groups, labels, pa.nulls(sum(group.num_rows for group in groups), pa.int32()))
    keys_G = pa.concat_arrays([shard.keys_L for shard in shards])
    backwards = to_arrow(torch.arange(len(keys_G) - 1, -1, -1))
    backwards_G = keys_G.take(backwards)
    from_end_N = pc.index_in(keys_of(groups, key), value_set=backwards_G, skip_nulls=True)
    return labelled(groups, labels, backwards.take(from_end_N))

"""A table of a data lake: which of its files count, and what they hold as the table sees it, stand in a log of its own.

Its files are read by row groups, as any. A row group of one is seen through the table: columns by the table's names, those that
are the same in all rows of a file added, and rows that the log has deleted left out.
"""

from __future__ import annotations  # pa.Scalar[Any] takes its type parameter in the stubs only

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from tidemill.storage.conditions import Bounds
from tidemill.storage.partitions import MARK
from tidemill.storage.records import TableRef

if TYPE_CHECKING:
    from tidemill.storage.parquet import ParquetFile, RowGroup

Values: TypeAlias = "Mapping[str, pa.Scalar[Any]]"


@dataclass(frozen=True)
class LiveFile:
    """A file that is part of a version of a table."""

    key: str
    """Below the folder of the table."""
    size: int
    """In bytes, as the log says."""
    values: Values = field(default_factory=dict)
    """Of columns that are the same in all rows: those of its partition, of the types that the table has."""
    kept: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    """A bit for each row that is not deleted, the first row first (`np.packbits`); rows beyond them are kept. None: all are."""

    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    """Of its other columns, as far as the log tells."""

    @property
    def identity(self) -> list[Any]:
        """What the log adds to the bytes of the file, as JSON can hold it."""
        values = [[name, str(value.type), str(value)] for name, value in sorted(self.values.items())]
        return [values, None if self.kept is None else hashlib.sha256(self.kept.tobytes()).hexdigest()]


@dataclass(frozen=True)
class Table:
    """One version of a table."""

    ref: TableRef
    schema: pa.Schema
    """Its columns."""
    files: tuple[LiveFile, ...]
    """In order of their keys."""
    names: Callable[[pa.Schema], dict[str, str]]
    """Schema of a file -> name of a column in the table -> its name in the file, of the columns that the file has."""

    @property
    def columns(self) -> list[list[str]]:
        """Name and type of each, as JSON can hold them."""
        return [[column.name, str(column.type)] for column in self.schema]

    def seen(self, live: LiveFile, file: ParquetFile, groups: Sequence[RowGroup]) -> list[TableGroup]:
        """Row groups of one of its files as the table sees them, without those of which all rows are deleted."""
        names = {name: own for name, own in self.names(file.schema).items() if name not in live.values}
        values = dict[str, Any]()
        fields: list[pa.Field[Any]] = []
        widened = set[str]()
        for column in self.schema:
            if column.name in names:
                own = file.schema.field(names[column.name]).with_name(column.name).remove_metadata()
                if _is_widened(own.type, column.type):
                    own = own.with_type(column.type)
                    widened.add(column.name)
                fields.append(own)
            else:  # a column that was added after the file was written is null in it
                values[column.name] = live.values.get(column.name, pa.scalar(None, column.type))
                fields.append(pa.field(column.name, values[column.name].type, metadata=MARK))
        schema, found, wide = pa.schema(fields), list[TableGroup](), frozenset(widened)
        for group in groups:
            kept = None
            if live.kept is not None:
                start = group.start(file)
                rows = np.unpackbits(live.kept)[start : start + group.num_rows].astype(bool)
                rows = np.concatenate([rows, np.ones(group.num_rows - len(rows), dtype=bool)])
                kept = None if rows.all() else np.packbits(rows)
                if not rows.any():
                    continue
            count = group.num_rows if kept is None else int(rows.sum())
            found.append(TableGroup(group, schema, names, wide, values, count, kept))
        return found


def _is_widened(own: Any, kind: Any) -> bool:
    """Whether a table has changed the type of a column since a file was written, by the rules of Delta Lake and Iceberg: what the
    file holds is a value of the new type, whatever the row groups are that a run begins with."""
    types = pa.types
    if types.is_integer(own):
        wider = types.is_integer(kind) and kind.bit_width > own.bit_width
        return wider or types.is_decimal(kind) or (kind == pa.float64() and own.bit_width <= 32)
    if types.is_decimal(own) and types.is_decimal(kind):
        return own != kind and kind.scale >= own.scale and kind.precision - kind.scale >= own.precision - own.scale
    return (own, kind) == (pa.float32(), pa.float64()) or (types.is_date(own) and types.is_timestamp(kind))


@dataclass(frozen=True, slots=True)
class TableGroup:
    """A row group as a table sees it."""

    group: RowGroup
    schema: pa.Schema
    """Of its file, by the names of the table."""
    names: Mapping[str, str]
    """Of a column in the table -> in the file."""
    widened: frozenset[str]
    """Columns that had a narrower type when the file was written."""
    values: Values
    """Of columns that are the same in all rows."""
    num_rows: int
    """That are not deleted."""
    kept: np.ndarray[Any, np.dtype[np.uint8]] | None
    """As of `LiveFile`, of its own rows."""

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def file(self) -> str:
        return self.group.file

    @property
    def readers(self) -> int:
        return self.group.readers

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns of the rows that are not deleted, in the order of the file."""
        stored = dict.fromkeys(self.names[name] for name in columns if name in self.names)
        read = self.group.read(list(stored))
        several: Any = pa.repeat  # its stubs know each type by name
        arrays = [
            read.column(self.names[name]) if name in self.names else several(self.values[name], read.num_rows)
            for name in columns
        ]
        for at, name in enumerate(columns):
            if name in self.widened:
                arrays[at] = arrays[at].cast(self.schema.field(name).type)
        table = pa.Table.from_arrays(arrays, names=list(columns))
        if self.kept is None:
            return table
        return table.filter(pa.array(np.unpackbits(self.kept)[: read.num_rows].astype(bool)))

    def bounds(self, file: ParquetFile, column: str) -> Bounds:
        """What is known of the values of a column by the log and the footer of its file, which is open."""
        if column in self.names:
            known = self.group.bounds(file, self.names[column])
            return known if column not in self.widened else Bounds(nulls=known.nulls, values=known.values)
        missing = not self.values[column].is_valid
        return Bounds(nulls=missing, values=not missing)

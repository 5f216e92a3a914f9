"""A table in memory as a dataset."""

import hashlib
import io
from typing import Any, Final

import pyarrow as pa

from tidemill.storage.choice import Choice, Picks
from tidemill.storage.conditions import Bounds
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import DatasetError
from tidemill.storage.records import IN_MEMORY, DatasetRef
from tidemill.tasks.training.groups import TableGroup

GROUP_ROWS: Final = 65_536
"""Rows of one row group."""


def table_snapshot(table: pa.Table, choice: Choice | None = None) -> Snapshot:
    """The table as row groups of up to `GROUP_ROWS`, without a copy; or those of its rows that are asked for.

    Its fingerprint is the sha256 of the table as an Arrow IPC stream, one record batch for each row group: however the table is
    cut in chunks, the same values of the same types have the same one.

    Raises:
        DatasetError: it has no rows, none that is chosen, or a column whose type Arrow cannot copy; or it lacks what is asked of
            its rows.
    """
    if not table.num_rows:
        raise DatasetError("the table holds no rows: give one with rows to train on.")
    table, sink = _nulls_as_in_files(table), _Sha256()
    groups = []
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), _own(table.slice(0, 0)).schema) as stream:
        for number, at in enumerate(range(0, table.num_rows, GROUP_ROWS)):
            rows = table.slice(at, GROUP_ROWS)
            groups.append(TableGroup(f"table row group {number}", rows, "table"))
            for batch in _own(rows).to_batches():
                stream.write_batch(batch)
    fingerprint = sink.digest.hexdigest()
    ref = DatasetRef(url=IN_MEMORY, fingerprint=fingerprint, files=1, rows=table.num_rows)
    if choice is not None:
        picks = Picks(choice, {}, lambda message: DatasetError(f"the {message}"))
        for group in groups:
            picks.look_at(group, choice.condition, lambda _: Bounds())
        ref, chosen, standing = picks.taken(ref, [["table", fingerprint]])
        return Snapshot(ref, chosen, folder=IN_MEMORY, standing=standing)
    return Snapshot(ref, groups, folder=IN_MEMORY)


def _nulls_as_in_files(table: pa.Table) -> pa.Table:
    """The table without dictionaries that hold a null among their values, which no file does: there, a value is missing."""
    for i, field in enumerate(table.schema):
        kind: Any = field.type
        if pa.types.is_dictionary(kind):
            chunks: list[Any] = table.column(i).chunks
            if any(chunk.dictionary.null_count for chunk in chunks):
                table = table.set_column(i, field.name, table.column(i).cast(kind.value_type))
    return table


def _own(rows: pa.Table) -> pa.Table:
    """A copy in which buffers hold these values alone, and begin with them. Views of text become text: Arrow cannot take rows of
    views."""
    for i, field in enumerate(rows.schema):
        if pa.types.is_string_view(field.type) or pa.types.is_binary_view(field.type):
            plain = pa.string() if pa.types.is_string_view(field.type) else pa.binary()
            rows = rows.set_column(i, field.name, rows.column(i).cast(plain))
    try:
        return rows.combine_chunks().take(pa.array(range(rows.num_rows), pa.int32()))
    except pa.ArrowNotImplementedError as error:
        raise DatasetError(
            f"the table has a column that Arrow cannot copy: {error}. Cast it, or leave it out."
        ) from error


class _Sha256(io.RawIOBase):
    """A file that keeps only the sha256 of what is written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

"""A row group of a dataset, and those of its rows for which a condition is true."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from tidemill.storage.comparing import comparison
from tidemill.storage.conditions import And, Condition, Known, Not, Or, columns


class Group(Protocol):
    """A row group of a dataset: of a file, or of a table in memory. See `tidemill.storage.parquet.RowGroup`."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def schema(self) -> pa.Schema: ...
    @property
    def readers(self) -> int: ...
    def read(self, columns: Sequence[str]) -> pa.Table: ...


@dataclass(frozen=True, slots=True)
class ChosenGroup:
    """Those rows of a row group for which a condition is true: found anew each time, by the columns that it is about."""

    group: Group
    condition: Condition
    num_rows: int
    """That are chosen."""

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def file(self) -> str:
        return self.group.file

    @property
    def schema(self) -> pa.Schema:
        return self.group.schema

    @property
    def readers(self) -> int:
        return self.group.readers

    def read(self, names: Sequence[str]) -> pa.Table:
        """Exactly these columns of the chosen rows, in the order of the file."""
        asked = columns(self.condition)
        table = self.group.read(list(dict.fromkeys([*names, *asked])))
        rows = truth(self.condition, table.select(asked))
        return table.select(list(names)).filter(rows)


def chosen(group: Group, condition: Condition) -> Group | None:
    """The rows of a group for which a condition is true: the group itself if all are, None if none is. Reads what it is about.

    Raises:
        BadCondition: text is no time.
    """
    if isinstance(condition, Known):
        return group if condition.truth else None
    count = pc.sum(truth(condition, group.read(columns(condition)))).as_py() or 0
    return None if not count else group if count == group.num_rows else ChosenGroup(group, condition, count)


def truth(condition: Condition, table: pa.Table) -> Any:
    """bool [N]: whether a condition is true for each row; null where it is neither true nor false."""
    match condition:
        case Not(part):
            return pc.invert(truth(part, table))
        case And(parts):
            return functools.reduce(pc.and_kleene, (truth(part, table) for part in parts))
        case Or(parts):
            return functools.reduce(pc.or_kleene, (truth(part, table) for part in parts))
        case Known(known):  # neither true nor false, as of a folder that stands for a null
            several: Any = pa.repeat  # its stubs know each type by name
            return pa.chunked_array([several(pa.scalar(known, pa.bool_()), table.num_rows)])
        case _:
            column = table.column(condition.column)
            return comparison(condition, column.type).of_rows(column)

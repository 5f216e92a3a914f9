"""Which rows of a dataset are chosen: by the folders of its files, then by the statistics of row groups, then one by one."""

from __future__ import annotations  # pa.Scalar[Any] takes its type parameter in the stubs only

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import pyarrow as pa

from tidemill.storage.comparing import comparison, of_value
from tidemill.storage.conditions import And, BadCondition, Bounds, Compare, Condition, Known, columns, given, truths
from tidemill.storage.errors import DatasetError, StorageError
from tidemill.storage.groups import Group, chosen
from tidemill.storage.parquet import ParquetFile
from tidemill.storage.partitions import partitions
from tidemill.storage.records import ChosenRows, DatasetRef
from tidemill.storage.sql import instant, parse
from tidemill.storage.tables import LiveFile, Table, Values


@dataclass(frozen=True)
class Window:
    """The last rows by a column of times, pinned to two instants."""

    last: str
    """As it was asked for, such as `90d`."""
    column: str
    since: datetime
    """Included."""
    until: datetime
    """Not included."""

    @property
    def condition(self) -> Condition:
        return And((Compare(self.column, ">=", instant(self.since)), Compare(self.column, "<", instant(self.until))))


@dataclass(frozen=True)
class Choice:
    """What is asked of each row: a condition as SQL says it (`tidemill.storage.sql`), a window, or both."""

    where: str | None = None
    window: Window | None = None

    @classmethod
    def of(cls, stored: ChosenRows | None) -> Choice | None:
        """What a manifest says was asked."""
        match stored:
            case None:
                return None
            case ChosenRows(
                last=str(last), time_column=str(column), since=datetime() as since, until=datetime() as until
            ):
                return cls(stored.where, Window(last, column, since, until))
        return cls(stored.where)

    @functools.cached_property
    def condition(self) -> Condition:
        """A row is chosen where it is true.

        Raises:
            BadCondition: `where` cannot be read.
        """
        asked = [] if self.where is None else [parse(self.where)]
        return And((*asked, *([] if self.window is None else [self.window.condition])))

    @property
    def standing(self) -> list[str | None]:
        """What was asked, as it stands whenever a run begins."""
        window = self.window
        return [self.where, *((None, None) if window is None else (window.last, window.column))]

    @property
    def pinned(self) -> list[str]:
        """What it came to when the run began: the ends of the window."""
        return [] if self.window is None else [self.window.since.isoformat(), self.window.until.isoformat()]

    def record(self, of_files: int, read_files: int, of_rows: int) -> ChosenRows:
        """As manifests have it."""
        window = self.window
        return ChosenRows(
            where=self.where,
            last=None if window is None else window.last,
            time_column=None if window is None else window.column,
            since=None if window is None else window.since,
            until=None if window is None else window.until,
            of_files=of_files,
            read_files=read_files,
            of_rows=of_rows,
        )

    def __str__(self) -> str:
        window = self.window
        last = (
            "" if window is None else f"{window.column} from {window.since.isoformat()} to {window.until.isoformat()}"
        )
        return " and ".join(part for part in (self.where, last) if part)


class OfFile(Group, Protocol):
    """A row group of a file."""

    def bounds(self, file: ParquetFile, column: str) -> Bounds: ...


class Picks:
    """The rows of a dataset that are chosen, found as its snapshot is taken: file by file, row group by row group."""

    def __init__(
        self,
        choice: Choice,
        types: Mapping[str, pa.DataType],
        error: Callable[[str], StorageError],
        table: Table | None = None,
    ) -> None:
        """`types` are those of partition columns; `error` makes an error of a message that begins with the key of a file.

        Of a `table`, each file has values of its own; of plain files, all of a folder have the same.
        """
        self._choice, self._types, self._error, self._table = choice, types, error, table
        self._left: dict[str, Condition] = {}
        """Of each file, or of each folder whose files have the same values."""
        self._open: list[tuple[Group, Condition]] = []
        self.files = 0
        """That were opened."""
        self.rows = 0
        """In these."""

    def may_hold(self, key: str, live: LiveFile | None = None) -> bool:
        """Whether a file, by the values of its folders or by the log of its table, may hold rows that are chosen.

        Those values decide even where the file has a column of that name too: what is left out, nobody has opened.
        """
        place = self._place(key)
        if place not in self._left:
            try:
                left = by_values(self._choice.condition, partitions(key, self._types) if live is None else live.values)
                if live is not None and self._table is not None and live.bounds.keys() & columns(left):
                    left = by_bounds(left, self._table.schema, lambda name: live.bounds.get(name, Bounds()))
            except (ValueError, pa.ArrowException) as bad:
                raise self._error(f"{key}: {bad}") from bad
            self._left[place] = left
        left = self._left[place]
        return not isinstance(left, Known) or left.truth is True

    def _place(self, key: str) -> str:
        return key.rpartition("/")[0] if self._table is None else key

    def add(self, file: ParquetFile, groups: Sequence[OfFile]) -> None:
        """Look at the row groups of a file by its footer."""
        condition = self._left[self._place(file.name)]
        self.files += 1
        for group in groups:
            self.look_at(group, condition, functools.partial(group.bounds, file))

    def look_at(self, group: Group, condition: Condition, bounds: Callable[[str], Bounds]) -> None:
        """Look at a row group, of whose columns `bounds` are known; the condition is what is left to ask."""
        self.rows += group.num_rows
        try:
            left = by_bounds(condition, group.schema, bounds)
        except (BadCondition, pa.ArrowException) as bad:
            raise self._error(f"{group.file}: {bad}") from bad
        if left != Known(False):
            self._open.append((group, left))

    def taken(self, of: DatasetRef, identity: Sequence[Sequence[Any]]) -> tuple[DatasetRef, list[Group], str]:
        """What was chosen, once all is looked at: its record, its row groups in order, and its standing fingerprint.

        Row groups of which bounds do not tell are read, for the columns that are asked about.

        Args:
            of: The dataset as a whole: its URL, number of files, and version.
            identity: Of each opened file: its key, and what says that it is the same.

        Raises:
            DatasetError: no row is chosen.
        """
        groups = all_chosen(self._open, self._error)
        if not groups:
            unread = of.files - self.files
            ruled_out = f" (the folders of {unread:,} other files rule them out)" if unread else ""
            raise DatasetError(
                f"{of.url}: none of {self.rows:,} rows in {self.files:,} files is chosen by {self._choice}{ruled_out}."
            )
        names = {group.file for group in groups}
        # On files without chosen rows nothing depends that is trained; on the folders of all files, the types of their columns.
        kinds = sorted((name, str(kind)) for name, kind in self._types.items())
        standing = [[file for file in identity if file[0] in names], kinds, self._choice.standing]
        standing += [] if self._table is None else [self._table.columns]
        told = {
            "fingerprint": digest([*standing, self._choice.pinned, *([] if of.table is None else [of.table.version])]),
            "files": len(names),
            "rows": sum(group.num_rows for group in groups),
            "chosen": self._choice.record(of.files, self.files, self.rows),
        }
        return of.model_copy(update=told), groups, digest(standing)


def digest(identity: Any) -> str:
    """The sha256 of something as JSON."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def by_values(condition: Condition, values: Values) -> Condition:
    """What is left of a condition for rows of which the values of some columns are known.

    Raises:
        BadCondition: such a value is not compared with what it is compared with.
    """
    return given(condition, lambda leaf: of_value(leaf, values[leaf.column]) if leaf.column in values else leaf)


def by_bounds(condition: Condition, schema: pa.Schema, bounds: Callable[[str], Bounds]) -> Condition:
    """What is left of a condition for rows of which bounds are known: known to be true, known not to be, or as it is.

    Raises:
        BadCondition: the rows have no such column, or one that is not compared with such a value.
    """
    kinds = {name: _kind(schema, name) for name in columns(condition)}
    ends = {name: bounds(name) for name in kinds}
    found = truths(condition, lambda leaf: comparison(leaf, kinds[leaf.column]).within(ends[leaf.column]))
    if found == {True}:
        return Known(True)
    return condition if True in found else Known(False)


def all_chosen(groups: Sequence[tuple[Group, Condition]], error: Callable[[str], StorageError]) -> list[Group]:
    """`chosen` of each, several at once where that is faster, without those of which no row is.

    Raises:
        `error`, of a message that begins with the name of a group: a condition does not fit what it holds.
    """

    def one(both: tuple[Group, Condition]) -> Group | None:
        try:
            return chosen(*both)
        except (BadCondition, pa.ArrowException) as bad:
            raise error(f"{both[0].name}: {bad}") from bad

    with ThreadPoolExecutor(max((group.readers for group, _ in groups), default=1)) as pool:
        return [group for group in pool.map(one, groups) if group is not None]


def _kind(schema: pa.Schema, name: str) -> Any:
    found = schema.get_all_field_indices(name)
    if len(found) == 1:
        return schema.field(found[0]).type
    what = "two columns" if found else "no column"
    raise BadCondition(f"it has {what} {name!r}, by which rows are chosen; it has {schema.names}")

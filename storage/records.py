"""What records of a registry have in common, and what one says of a dataset, and of where first weights come from."""

from datetime import datetime
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """Part of a manifest: immutable, and strict about its fields, so that a typo is an error and not a loss."""

    # "constants": by default pydantic would write NaN as null, and a number that cannot be stored would vanish unseen
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


IN_MEMORY: Final = "memory:"
"""The URL of a dataset that is a table in memory."""


class ChosenRows(Record):
    """Which rows of a dataset are trained on, where not all are."""

    where: str | None = None
    """A condition, as it was asked for."""
    last: str | None = None
    """A length of time such as `90d`, as it was asked for."""
    time_column: str | None = None
    """By which it is measured."""
    since: datetime | None = None
    """What it came to when the run began: from this instant on,"""
    until: datetime | None = None
    """and before this one."""
    of_files: int
    """How many files the dataset had."""
    read_files: int
    """How many of them the values of their folders did not rule out."""
    of_rows: int
    """How many rows these had."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len({part is None for part in (self.last, self.time_column, self.since, self.until)}) > 1:
            raise ValueError("last, time_column, since and until stand together")
        return self


class TableRef(Record):
    """A version of a table of a data lake."""

    system: Literal["Delta", "Iceberg"]
    version: int
    """Of Delta Lake the version, of Iceberg the id of the snapshot."""
    metadata: str | None = None
    """Of Iceberg: key of the metadata that was read, below the folder of the table."""

    @property
    def told(self) -> str:
        """In words."""
        what = "version" if self.system == "Delta" else "snapshot"
        return f"{what} {self.version} of the {self.system} table"


class DatasetRef(Record):
    """What a batch run was trained on."""

    url: str
    fingerprint: str
    files: int
    rows: int
    chosen: ChosenRows | None = None
    """None: all rows. Else `files` and `rows` are those that were chosen. Since format 2.3."""
    table: TableRef | None = None
    """None: plain Parquet files. Since format 2.3."""

    @property
    def told(self) -> str | None:
        """Which version of a table, and which rows were chosen, in words; None: plain files, and all rows."""
        told = [] if self.table is None else [self.table.told]
        if (of := self.chosen) is not None:
            asked = [] if of.where is None else [of.where]
            if of.last is not None and of.since is not None and of.until is not None:
                ends = f"from {of.since.isoformat()} to {of.until.isoformat()}"
                asked.append(f"the last {of.last} by {of.time_column}, {ends}")
            of_files = f"{self.files:,} of {of.of_files:,} files ({of.read_files:,} were opened)"
            told.append(f"rows: {self.rows:,} of {of.of_rows:,}, in {of_files}: {' and '.join(asked)}")
        return "; ".join(told) or None


class WarmStart(Record):
    """What a batch run took the first weights of its learner from, and what fitted, in words."""

    url: str
    """Of the model, or of a file of weights."""
    version: int | None = None
    """Of the model; None: it was a file."""
    sha256: str
    """Of the weights."""
    kept_statistics: bool
    """Whether the columns are scaled by the statistics of the source, in place of those of the dataset."""
    taken: tuple[str, ...]
    missing: tuple[str, ...]
    """What the source did not have, or had otherwise: it began anew."""
    left_over: tuple[str, ...]
    """What only the source had, or had otherwise."""

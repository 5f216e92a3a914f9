"""A small row group in memory, whose rows are encoded once for all passes over it: for two scores and the training of a shard.

Shape legend: N rows of the row group, F numbers and C ids of one row, T targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
from torch import Tensor

from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup, Subset


class Rows(NamedTuple):
    """All rows of a row group, in file order. Read only."""

    x_NF: Tensor
    """float32"""
    ids_NC: Tensor | None
    """int64; None: no categories and no sequences."""
    y_N: Tensor
    """float32 ([N, T] of several targets), or int64 class numbers for multiclass; 0 where there is no label."""
    w_N: Tensor | None
    """float32, sample weights; None: the spec has none."""
    labelled_N: Tensor | None
    """bool; None: every row has all targets."""

    @property
    def labelled(self) -> int:
        """How many rows have all targets."""
        return len(self.y_N) if self.labelled_N is None else int(self.labelled_N.sum())

    @property
    def writes(self) -> list[int]:
        """How often each tensor has been written to: a model or a loss may change what it is given in place."""
        return [-1 if tensor is None else tensor._version for tensor in self]


@dataclass(eq=False)
class Decoded:
    """A row group whose columns have been decoded already, and that keeps what its rows were last encoded to."""

    group: RowGroup
    table: pa.Table
    row_bytes: int = 0
    """Of one encoded row."""
    _encoded: tuple[Features, Rows, list[int]] | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def num_rows(self) -> int:
        return self.group.num_rows

    @property
    def schema(self) -> pa.Schema:
        return self.group.schema

    @property
    def nbytes(self) -> int:
        """Of its decoded columns and of its rows once they are encoded."""
        return self.table.nbytes + self.num_rows * self.row_bytes

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns; those that nobody had expected are decoded now."""
        if set(columns) <= set(self.table.column_names):
            return self.table.select(list(columns))
        return self.group.read(columns)

    def encoded(self, features: Features) -> Rows | None:
        """The rows as these features, or others that encode alike, have encoded them last.

        None: others did, or none, or the rows were written to since.
        """
        if self._encoded is None:
            return None
        by, rows, writes = self._encoded
        alike = by is features or by.digest == features.digest
        return rows if alike and rows.writes == writes else None

    def keep(self, features: Features, rows: Rows) -> None:
        """Remember how these features encode the rows, in place of others."""
        self._encoded = features, rows, rows.writes


def labelled_rows(groups: Sequence[RowGroup], features: Features, split: Subset | None = None) -> int:
    """As `Features.labelled_rows`; where a group is encoded already, nothing is read."""
    if split is None and len(groups) == 1 and isinstance(groups[0], Decoded):
        rows = groups[0].encoded(features)
        if rows is not None:
            return rows.labelled
    return features.labelled_rows(groups, split)

"""Rows that are dicts as the tensors of `Features.encode`, bit for bit, without a table between: 100 times faster for one row.

What a row may hold for each family of columns is in `values.py`; many rows are read column by column, by `many.py`.

Shape legend: N rows, F numbers and C ids of one row, B rows of a block.
"""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from tidemill.tasks.serving.many import Part, id_part, number_part
from tidemill.tasks.serving.values import StoredType, held
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Encoded, Features
from tidemill.tasks.training.packing import TILE_NUMBERS, blocks, soften
from tidemill.tasks.training.patterns import did_you_mean

Row = Mapping[str, Any]
"""The values of one row by the names of their columns."""

BY_COLUMN: Final = 8
"""So many rows and more are read column by column; fewer are read faster one after the other."""
ROWS_AT_ONCE: Final = 1024
"""Rows whose values are Python's at one time; a number takes 32 bytes as one, and 4 as a part of a tensor."""


class RowError(ColumnError):
    """A row that cannot be encoded. It is named by its place in the request, from 0, and by the column that is at fault."""

    def __init__(self, row: int, column: str | None, message: str) -> None:
        super().__init__(message)
        self.row, self.column = row, column


class RowEncoder:
    """Rows as tensors, for the features of one version. Never changes; threads may share it."""

    def __init__(self, features: Features, types: Mapping[str, str]) -> None:
        """`types`: the names of the dataset's Arrow types by column. One that is missing is taken for float64."""
        assert features.fitted, "statistics come before encoding"
        self._features = features
        columns = features.columns
        kinds = [StoredType(types.get(column.name, "")) for column in columns]
        names = [column.name for column in columns]
        values = itemgetter(*names)
        self._values = values if len(names) > 1 else lambda row: (values(row),)
        self._by_name = [itemgetter(name) for name in names]
        center_F, scale_F = features.scaling
        self._owners: list[str] = []  # of each of the F numbers
        numbers, ids = list[Part](), list[Part]()
        for i, column in enumerate(columns):
            if not column.buckets:
                here = slice(len(self._owners), len(self._owners) + column.numbers)
                scaling = center_F[here].tolist(), scale_F[here].tolist()
                numbers.append(number_part(i, column, kinds[i], *scaling, here.start))
                if not kinds[i].exact_in_float32:  # is scaled in float64, before it is put in its place
                    center_F[here], scale_F[here] = 0.0, 1.0
                self._owners += [column.name] * column.numbers
        at = 0
        for i in sorted(range(len(columns)), key=lambda i: columns[i].length > 0):  # stable, as `Features.ids` has them
            if columns[i].buckets:
                ids.append(id_part(i, columns[i], kinds[i], at))
                at += columns[i].length or 1
        self._numbers, self._ids = tuple(numbers), tuple(ids)
        self._add_numbers = [(part.column, part.add) for part in numbers]
        self._add_ids = [(part.column, part.add) for part in ids]
        self._indicated = [names.index(name) for name in features.indicated]
        self._owners += features.indicated
        self._center_F, self._scale_F = center_F.float(), scale_F.float()
        self._scaling = bool((self._center_F != 0).any() or (self._scale_F != 1).any())

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """The inputs of rows, as `Features.encode` makes them of a table of the dataset's types that holds the same values.

        A row has a value, or None, for each feature; what else it has is not looked at.

        Raises:
            RowError: a row is no dict, lacks a column, or holds what the column cannot hold: NaN, infinity, another kind of
                value.
        """
        if len(rows) <= ROWS_AT_ONCE:
            encoded = self._placed(rows, 0)
        else:
            encoded = self._features.allocate(len(rows))
            for at in range(0, len(rows), ROWS_AT_ONCE):
                for room, some in zip(encoded, self._placed(rows[at : at + ROWS_AT_ONCE], at), strict=True):
                    if room is not None and some is not None:
                        room[at : at + len(some)] = some
        self._finish(encoded.x_NF)
        return encoded

    def _placed(self, rows: Sequence[Row], first: int) -> Encoded:
        """The inputs of some rows, some numbers of which are still to be scaled; `first` is the number of the first row."""
        if len(rows) >= BY_COLUMN and (encoded := self._by_column(rows)) is not None:
            return encoded
        numbers, ids = self._read(rows, first)
        x_BF = torch.from_numpy(np.array(numbers, np.float64)).float().view(len(rows), self._features.numbers)
        if not self._features.ids:
            return Encoded(x_BF, None)
        return Encoded(x_BF, torch.from_numpy(np.array(ids, np.int64)).view(len(rows), self._features.ids))

    def _by_column(self, rows: Sequence[Row]) -> Encoded | None:
        """The same, column by column; None: a row is at fault, and who reads row by row finds out which."""
        encoded = self._features.allocate(len(rows))
        x_BF = encoded.x_NF.numpy()
        try:
            columns = [list(map(value, rows)) for value in self._by_name]
            with np.errstate(all="ignore"):  # infinity is found later
                for part in self._numbers:
                    part.fill(columns[part.column], x_BF)
            if encoded.ids_NC is not None:
                ids_BC = encoded.ids_NC.numpy()
                for part in self._ids:
                    part.fill(columns[part.column], ids_BC)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError, ArithmeticError, pa.ArrowException):
            return None
        for at, i in enumerate(self._indicated, self._features.scaled):
            x_BF[:, at] = [value is None for value in columns[i]]
        return encoded

    def _read(self, rows: Sequence[Row], first: int) -> tuple[list[float], list[int]]:
        """(numbers, ids) of rows, row by row; `first` is the number of the first one."""
        numbers: list[float] = []
        ids: list[int] = []
        for number, row in enumerate(rows, first):
            try:
                values = self._values(row)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise self._no_row(row, number) from error
            i = 0
            try:
                for i, add in self._add_numbers:
                    add(values[i], numbers)
                for i, add in self._add_ids:
                    add(values[i], ids)
            except (ValueError, TypeError, ArithmeticError, pa.ArrowException) as error:
                column = self._features.columns[i]
                why = f"{held(values[i])}, which no {column.family} is" if isinstance(error, TypeError) else error
                raise RowError(number, column.name, f"column {column.name!r} of row {number}: {why}") from error
            numbers.extend([1.0 if values[i] is None else 0.0 for i in self._indicated])
        return numbers, ids

    def _no_row(self, row: object, number: int) -> RowError:
        if not isinstance(row, Mapping):
            return RowError(number, None, f"row {number} is a {type(row).__name__}: give a dict of values by column")
        name = next((column.name for column in self._features.columns if column.name not in row), None)
        if name is None:
            return RowError(number, None, f"row {number} cannot be read: give a dict of values by column")
        hint = did_you_mean(name, [str(key) for key in row])
        return RowError(
            number,
            name,
            f"column {name!r} is missing from row {number}: {hint}; or give it, as None where there is no value",
        )

    def _finish(self, x_NF: torch.Tensor) -> None:
        """What `packing.pack` does once the numbers are in place: the same operations on the same blocks of rows."""
        if self._scaling:
            x_NF.sub_(self._center_F).div_(self._scale_F)
        if not math.isfinite(x_NF.sum().item()) and not torch.isfinite(x_NF).all():
            number, at = (~torch.isfinite(x_NF)).nonzero()[0].tolist()
            name = self._owners[at]
            raise RowError(
                number,
                name,
                f"column {name!r} of row {number} is NaN, infinity or beyond float32: give None for a missing value",
            )
        if (soft_limit := self._features.soft_limit) is not None:
            columns = len(self._numbers) + len(self._indicated)
            tile = max(1, TILE_NUMBERS // max(1, x_NF.shape[1]))
            for _, x_BF in blocks(len(x_NF), x_NF, None, columns=columns, multiple=tile):
                soften(x_BF[:, : self._features.scaled], soft_limit)

"""What the pass over a dataset looks at beside the statistics, in bounded memory: the labels of the target, and which columns
that a pattern has chosen tell nothing.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from tidemill.tasks.training.classes import Values, plain
from tidemill.tasks.training.columns import TICKS_PER_SECOND, one_array, to_arrow
from tidemill.tasks.training.families import family_of

JUDGED_ROWS: Final = 100_000
"""Whether a column has another value in each row is judged by the first rows of the dataset."""
JUDGED_BYTES: Final = 16 * 2**20
"""More bytes of distinct values in these rows are free text."""
LEAST_ROWS: Final = 10
"""Of fewer rows with a value nothing is said."""
NEARLY_ALL: Final = 0.9
"""Text with more distinct values than this share of its rows is an id or free text."""
LEAST_NUMBERED: Final = 50
"""Fewer whole numbers may all differ, and lie close together, by chance."""

ONE_PER_ROW: Final = "another value in each row, as an id or free text has"
CONSTANT: Final = "the same in all rows"
TOO_CLOSE: Final = "the same in all rows as float64, as which numbers are read"
NULL: Final = "null in all rows"


@dataclass
class Survey:
    """Looks at each table of the pass."""

    target: str | None
    """The target whose labels are counted; None: none are."""
    columns: Sequence[str] = ()
    """Those that a pattern has chosen."""
    targets: Sequence[str] = ()
    """Those whose `ends` are looked for."""
    values: Values = field(default_factory=Values)
    ends: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Of `targets` that are no text: the least and the greatest value of training rows, not rounded, until they differ."""
    _distinct: dict[str, _Distinct] = field(default_factory=dict)

    def see(self, table: pa.Table, rows_N: Tensor | None) -> None:
        """Look at the next table; of its rows, `rows_N` (int64 row numbers; None: all) are trained on."""
        if self.target is not None:
            self.values.add(one_array(table.column(self.target)), rows_N)
        for name in self.targets:
            low, high = self.ends.get(name, (None, None))
            if low == high:
                found = _ends(one_array(table.column(name)), rows_N)
                known = [value for value in (low, *found) if value is not None]
                if known:
                    self.ends[name] = min(known), max(known)
        for name in self.columns:
            column = table.column(name)
            if name not in self._distinct:
                self._distinct[name] = _Distinct.of(column.type)
            self._distinct[name].add(column)

    def useless(self, rows: int, nulls: Mapping[str, int], constant: Mapping[str, bool]) -> dict[str, str]:
        """The columns, of those that a pattern has chosen, that tell nothing: why.

        Args:
            rows: Of the training side.
            nulls: Of each column, on the training side.
            constant: Of each column of numbers, whether all that are not null are the same.
        """
        found: dict[str, str] = {}
        for name in self.columns:
            seen = self._distinct.get(name)
            if nulls[name] == rows:
                found[name] = NULL
            elif not nulls[name] and constant.get(name, seen is not None and seen.constant):
                found[name] = TOO_CLOSE if seen is not None and seen.too_close else CONSTANT
            elif seen is not None and seen.one_per_row:
                found[name] = ONE_PER_ROW
        return found


def _ends(array: pa.Array[Any], rows_N: Tensor | None) -> tuple[Any, Any]:
    """The least and the greatest value of an array, or of its `rows_N`: not rounded. None of text, and where there is none."""
    array = plain(array)
    if pa.types.is_large_binary(array.type):
        return None, None
    nanoseconds = None
    if pa.types.is_temporal(array.type):  # the files of a dataset may have several units
        nanoseconds = 10**9 // int(TICKS_PER_SECOND[cast(Any, array.type).unit])
        array = array.cast(pa.int32() if pa.types.is_time32(array.type) else pa.int64())
    ends = pc.min_max(array if rows_N is None else array.take(to_arrow(rows_N)))
    low, high = ends["min"].as_py(), ends["max"].as_py()
    return (low, high) if nanoseconds is None or low is None else (low * nanoseconds, high * nanoseconds)


class _Distinct:
    """Whether a column has one value only, and whether it has another one in each row."""

    def __init__(self, *, text: bool, whole: bool) -> None:
        self._text, self._whole = text, whole
        self._seen: pa.Array[Any] | None = None
        """Distinct values of the first rows."""
        self._first_rows = 0
        """Those of the first rows that have a value."""
        self._free_text = False
        self._several = False
        self._rows = 0
        self._lowest, self._highest = 0, 0

    @classmethod
    def of(cls, kind: Any) -> _Distinct:
        """For a column of this Arrow type."""
        return cls(text=family_of(kind) == ("text", None), whole=pa.types.is_integer(kind))

    def add(self, column: pa.ChunkedArray[Any]) -> None:
        """Look at more rows."""
        if not (self._text or self._whole) or self._known:
            return
        array = one_array(column)
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if self._whole and not pa.types.is_integer(array.type):  # in another file they are not whole
            self._whole = False
            return
        array = (array.cast(pa.large_binary()) if self._text else array.cast(pa.int64(), safe=False)).drop_null()
        if not len(array):
            return
        if self._whole:
            ends = pc.min_max(array)
            low, high = ends["min"].as_py(), ends["max"].as_py()
            self._lowest = min(low, self._lowest) if self._rows else low
            self._highest = max(high, self._highest) if self._rows else high
        self._rows += len(array)
        if not self._several:
            both = array if self._seen is None else pa.concat_arrays([self._seen[:1], array])
            self._several = len(pc.unique(both)) > 1
        if self._first_rows < JUDGED_ROWS and not self._free_text:
            array = array.slice(0, JUDGED_ROWS - self._first_rows)
            self._first_rows += len(array)
            self._seen = pc.unique(array if self._seen is None else pa.concat_arrays([self._seen, array]))
            if self._seen.nbytes > JUDGED_BYTES:
                self._free_text, self._seen = True, self._seen[:1]

    @property
    def _known(self) -> bool:
        """Whether more rows can change nothing: most columns are known early."""
        if self._text:
            return self._several and (self._free_text or self._first_rows >= JUDGED_ROWS)
        return self._several and self._seen is not None and len(self._seen) < self._first_rows

    @property
    def constant(self) -> bool:
        return self._rows > 0 and not self._several

    @property
    def too_close(self) -> bool:
        """Whether whole numbers of more than one value are known, which are one as float64."""
        return self._whole and self._several and float(self._lowest) == float(self._highest)

    @property
    def one_per_row(self) -> bool:
        """Text that hardly ever comes twice; or whole numbers that never do and that number the rows.

        Whole numbers may be measured, and then differ in all rows too: only those between 0 and twice the rows are taken for
        numbers of rows, as of a table of which a part was left out.
        """
        distinct = 0 if self._seen is None else len(self._seen)
        if self._text:
            return self._free_text or (self._first_rows >= LEAST_ROWS and distinct > NEARLY_ALL * self._first_rows)
        within = self._lowest >= 0 and self._highest <= 2 * self._rows
        return self._whole and self._rows >= LEAST_NUMBERED and distinct == self._first_rows and within

"""What the footer of a Parquet file says of the values of a column in a row group, for conditions."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tidemill.storage.comparing import DAY, NANOSECONDS, time_unit
from tidemill.storage.conditions import Bounds, Key

_UNITS: Final = {"milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}
"""Parquet's names -> Arrow's."""


def bounds(metadata: pq.FileMetaData, groups: range, leaf: int, kind: Any) -> Bounds:
    """Of a column that is no list, in these row groups together; `kind` is its Arrow type.

    Nothing is known where the writer has left statistics out, or where they are of another order than that of the values.
    """
    low = high = None
    known, nulls, values = True, False, False
    for index in groups:
        group = metadata.row_group(index)
        if not group.num_rows:
            continue
        found: Any = group.column(leaf).statistics
        if found is None:
            return Bounds()
        missing = found.null_count if found.has_null_count else None
        nulls |= missing != 0
        if missing == group.num_rows:
            continue
        values = True
        ends = _ends(found, kind) if found.has_min_max else None
        if ends is None:
            known = False
        elif known:
            low, high = ends if low is None else (min(low, ends[0]), max(high, ends[1]))
    return Bounds(low, high, nulls, values) if known else Bounds(None, None, nulls, values)


def _ends(found: Any, kind: Any) -> tuple[Key, Key] | None:
    """The least and the greatest value as `Comparison.within` takes them; None where they cannot be told."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _ends(found, kind.storage_type)
    if types.is_dictionary(kind):
        return _ends(found, kind.value_type)
    stored, raw = str(found.logical_type.type), (found.min_raw, found.max_raw)
    if types.is_boolean(kind) and found.physical_type == "BOOLEAN":
        return raw
    if types.is_signed_integer(kind) and stored in ("INT", "NONE") and found.physical_type in ("INT32", "INT64"):
        return raw
    if types.is_floating(kind) and found.physical_type in ("FLOAT", "DOUBLE"):
        return None if any(map(math.isnan, raw)) else raw
    if (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)) and stored == "STRING":
        try:
            return raw[0].decode(), raw[1].decode()
        except UnicodeDecodeError:  # cut short within a character
            return None
    if types.is_decimal(kind) and stored == "DECIMAL":
        ends = found.min, found.max
        return (
            tuple(Fraction(end) * 10**kind.scale for end in ends) if all(isinstance(e, Decimal) for e in ends) else None
        )
    unit = time_unit(kind)
    if unit is not None and stored == "DATE":
        return Fraction(raw[0] * DAY, unit), Fraction(raw[1] * DAY, unit)
    if unit is not None and stored == "TIMESTAMP" and found.physical_type == "INT64":
        own = NANOSECONDS[_UNITS[json.loads(found.logical_type.to_json())["timeUnit"]]]
        return Fraction(raw[0] * own, unit), Fraction(raw[1] * own, unit)
    return None

"""What the key of a file says: whether it is data at all, and the values of its `name=value` folders.

One rule for datasets and inboxes, that of Hive and Spark. Nothing here needs pyarrow until a value is wanted.
"""

from __future__ import annotations  # pa.Scalar[Any] takes its type parameter in the stubs only

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    import pyarrow as pa

NULL: Final = "__HIVE_DEFAULT_PARTITION__"
"""The value by which Hive and Spark write a null."""
MARK: Final = {b"tidemill": b"partition"}
"""Metadata of a partition column's field in the schema of its row groups: training knows by it that a null is of a whole file."""
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")


def is_hidden(key: str) -> bool:
    """True if a folder of the key, or its last part, begins with `.` or `_`.

    A folder `_name=value` is not hidden: it is the partition of a column whose name begins with `_`. A folder `.name=value` is
    hidden, as for Spark.
    """
    *folders, name = key.split("/")
    return name.startswith((".", "_")) or any(
        folder.startswith(".") or (folder.startswith("_") and "=" not in folder) for folder in folders
    )


def partition_values(key: str) -> dict[str, str | None]:
    """Column -> text of each `name=value` folder in the key, percent-decoded. None: a null."""
    columns: dict[str, str | None] = {}
    for part in key.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if equals and name:
            text = unquote(value)
            columns[unquote(name)] = None if text == NULL else text
    return columns


def partition_types(keys: Iterable[str]) -> dict[str, pa.DataType]:
    """Type of each partition column of these keys: int64 if all its values are whole numbers of up to 18 digits, else string."""
    import pyarrow as pa

    integers: dict[str, bool | None] = {}
    for key in keys:
        for name, value in partition_values(key).items():
            integers.setdefault(name, None)
            if value is not None:
                integers[name] = integers[name] is not False and _INTEGER.fullmatch(value) is not None
    return {name: pa.int64() if integer else pa.string() for name, integer in integers.items()}


def partitions(key: str, types: Mapping[str, pa.DataType], stored: Collection[str] = ()) -> dict[str, pa.Scalar[Any]]:
    """The partition columns of one file, as values of the given types, but for those that the file itself has (`stored`).

    A column without a given type has that of its own value. A whole number stays int64 where float64 is given.

    Raises:
        ValueError: a value is none of its column's type, or two folders give a column different values.
    """
    if "=" not in key:
        return {}
    parts = [partition_values(f"{folder}/") for folder in key.split("/")[:-1]]
    values = {name: text for name, text in partition_values(key).items() if name not in stored}
    for name, text in values.items():
        if any(part.get(name, text) != text for part in parts):
            raise ValueError(f"its folders give column {name!r} different values")
    import pyarrow as pa

    own, found = partition_types([key]), dict[str, Any]()
    for name, text in values.items():
        kind = types.get(name, own[name])
        if kind == pa.float64() and own[name] == pa.int64() and text is not None:
            kind = pa.int64()
        try:
            found[name] = pa.scalar(text, pa.string()).cast(kind)
        except pa.ArrowException as error:
            raise ValueError(
                f"its folder {name}={text} is no {_told(kind)}, as column {name!r} is elsewhere"
            ) from error
    return found


def _told(kind: pa.DataType) -> str:
    import pyarrow as pa

    return (
        "number"
        if pa.types.is_integer(kind) or pa.types.is_floating(kind)
        else "time"
        if pa.types.is_temporal(kind)
        else str(kind)
    )

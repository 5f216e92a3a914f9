"""What an Arrow type holds, whatever the type is that its values are kept in."""

from __future__ import annotations  # pa.Field[Any] takes its type parameter in the stubs only

from typing import Any, Final, Literal, cast

import pyarrow as pa

Family = Literal["number", "time", "duration", "text", "list of integers", "list of text"]

_NUMBERS: Final = frozenset(
    kind.id
    for kind in (
        *(pa.bool_(), pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.int16(), pa.int32(), pa.int64()),
        *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    )
)
"""What most columns are, told at once: a small shard has as many columns as a large one."""


def family_of(kind: Any) -> tuple[Family, int | None] | None:
    """What a column of this Arrow type holds, and its width if it is a vector. None: not usable as an input.

    The rule of types that change between files: types of one family and width are interchangeable, others are refused,
    since they would change what the numbers mean. So bool, int32, int64, float16, float64 and decimals are all numbers;
    string, large_string, binary and dictionaries of them are all text; a list may become a large_list, and its items
    follow the same rule. From a number to text, from a date to a number or from 3 numbers to 4 there is no way but a
    new model. A category that the dataset did not have is no change of type: it is hashed like any other.

    A vector is a fixed-size list of numbers. Fixed-size lists inside each other, such as [channels][height][width], are
    one vector of all their numbers in row-major order.
    """
    if kind.id in _NUMBERS:
        return "number", None
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return family_of(kind.storage_type)
    if types.is_dictionary(kind):
        return None if types.is_nested(kind.value_type) else family_of(kind.value_type)
    if types.is_fixed_size_list(kind):
        item = family_of(kind.value_type)
        if item is None or item[0] != "number" or not kind.list_size:
            return None
        return "number", kind.list_size * (item[1] or 1)
    if _is_list(kind):
        item_kind = _plain(kind.value_type)
        if types.is_integer(item_kind):
            return "list of integers", None
        return ("list of text", None) if family_of(item_kind) == ("text", None) else None
    if types.is_decimal(kind):
        return "number", None
    if types.is_date(kind) or types.is_timestamp(kind):
        return "time", None
    if types.is_time(kind) or types.is_duration(kind):
        return "duration", None
    text = (types.is_string, types.is_large_string, types.is_string_view)
    data = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return ("text", None) if any(test(kind) for test in (*text, *data)) else None


def type_of(family: Family, width: int | None) -> pa.DataType:
    """An Arrow type of this family and width."""
    if family == "number":
        return pa.float64() if width is None else pa.list_(pa.float64(), width)
    types: dict[Family, pa.DataType] = {
        "time": pa.timestamp("us"),
        "duration": pa.duration("us"),
        "text": pa.string(),
        "list of integers": pa.list_(pa.int64()),
        "list of text": pa.list_(pa.string()),
    }
    return types[family]


def is_untyped(kind: Any) -> bool:
    """True for the type of a column that is null in every row, as pyarrow infers it, or whose lists are all empty."""
    if kind.id in _NUMBERS:
        return False
    types = pa.types
    if types.is_dictionary(kind) or _is_list(kind) or types.is_fixed_size_list(kind):
        return is_untyped(kind.value_type)
    return types.is_null(kind)


def stored(column: pa.ChunkedArray[Any], otherwise: pa.DataType) -> pa.ChunkedArray[Any]:
    """A column as Tidemill computes with it: of the type that an extension type is stored as; if untyped, of `otherwise`."""
    kind: Any = column.type
    if kind.id in _NUMBERS:
        return column
    if is_untyped(kind):
        if pa.types.is_nested(kind) and pa.types.is_nested(otherwise):  # of empty lists, or of vectors of nulls
            return column.cast(otherwise)
        return pa.chunked_array([pa.nulls(len(column), cast(Any, otherwise))])
    below = _storage(kind)
    return column if below is kind else column.cast(below)


def _storage(kind: Any) -> Any:
    """The same object if there is no extension type in it."""
    if isinstance(kind, pa.BaseExtensionType):
        return _storage(kind.storage_type)
    if not (_is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return kind
    item = kind.value_type  # another object each time
    below = _storage(item)
    return kind if below is item else _list_of(kind, kind.value_field.with_type(below))


def _list_of(kind: Any, item: pa.Field[Any]) -> Any:
    types = pa.types
    if types.is_fixed_size_list(kind):
        return pa.list_(item, kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(item)
    return pa.list_(item)


def _is_list(kind: Any) -> bool:
    types = pa.types
    return (
        types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind)
    )


def _plain(kind: Any) -> Any:
    """A type without dictionaries and extensions: how values are kept in memory says nothing of what they are."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if _is_list(kind) or types.is_fixed_size_list(kind):
        return _list_of(kind, kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def type_name(kind: pa.DataType) -> str:
    """Arrow's name of a type, without how its values are kept in memory."""
    return str(_plain(kind))


def told(kind: Any) -> str:
    """A type in the words of a message."""
    plain = _plain(kind)
    if _is_list(plain):
        return f"list of {told(plain.value_type)}"
    if pa.types.is_fixed_size_list(plain):
        return f"list of {plain.list_size} {told(plain.value_type)}"
    name = "text" if family_of(plain) == ("text", None) and "binary" not in str(plain) else str(plain)
    return f"{kind.extension_name} ({name})" if isinstance(kind, pa.BaseExtensionType) else name

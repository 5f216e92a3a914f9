"""The headers of Parquet's pages: how large a column chunk becomes, whatever the footer says.

Thrift's compact protocol, as far as page headers need it.
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_NUMBERS = (4, 5, 6)  # i16, i32, i64
_SIZE, _STORED = 2, 3  # uncompressed_page_size, compressed_page_size
_DATA, _DATA_V2 = 5, 8  # data_page_header, data_page_header_v2: their first field is num_values


def decoded_bytes(data: bytes | memoryview, values: int) -> int:
    """Uncompressed bytes of all pages of a column chunk that holds `values` values.

    Raises:
        ValueError: a header does not parse.
    """
    total = at = seen = 0
    try:
        while seen < values and at < len(data):
            header, at = _struct(data, at)
            size, stored = header[_SIZE], header[_STORED]
            if size < 0 or stored < 0:
                raise ValueError("a page of a negative size")
            total, at = total + size, at + stored
            seen += sum(header[kind].get(1, 0) for kind in (_DATA, _DATA_V2) if kind in header)
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a page header does not parse: {error!r}") from error
    return total


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 70:
            raise ValueError("a number that does not end")


def _zigzag(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _value(kind: int, data: bytes | memoryview, at: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE, _BYTE):  # of a list's items; of a field, a boolean is its type
        return data[at], at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        size, at = _varint(data, at)
        return None, at + size
    if kind in (_LIST, _SET):
        count, of, at = data[at] >> 4, data[at] & 0x0F, at + 1
        if count == 15:
            count, at = _varint(data, at)
        if count > len(data):
            raise ValueError("a list longer than its column")
        for _ in range(count):
            _, at = _value(of, data, at)
        return None, at
    return _struct(data, at) if kind == _STRUCT else _zigzag(data, at)


def _struct(data: bytes | memoryview, at: int) -> tuple[dict[int, Any], int]:
    """Most fields of a header are numbers or texts whose first byte says all: these are read here, since each call takes time."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        kind, step, at = head & 0x0F, head >> 4, at + 1
        number, at = (number + step, at) if step else _zigzag(data, at)
        if kind in (_TRUE, _FALSE):
            fields[number] = None
        elif kind in _NUMBERS and (byte := data[at]) < 0x80:
            fields[number], at = (byte >> 1) ^ -(byte & 1), at + 1
        elif kind == _BINARY and (byte := data[at]) < 0x80:
            fields[number], at = None, at + 1 + byte
        else:
            fields[number], at = _value(kind, data, at)
    return fields, at + 1

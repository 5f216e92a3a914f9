"""Seeded mutations of bytes, JSON, Thrift structures, Parquet files and safetensors."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from tidemill.storage.parquet import MAGIC
from tidemill.tasks.training.stored import METADATA_KEY

Random = random.Random


# ---- bytes ---------------------------------------------------------------------------------------------------------------
INTEGERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**33,
    2**62,
    2**63 - 1,
    -1,
    -2,
    -(2**31),
)


def mutated(rng: Random, data: bytes, other: bytes = b"\0" * 64) -> bytes:
    """One to four edits: flipped bits, integers, cuts, repetitions, and pieces of another file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        until = min(len(out), at + rng.choice((1, 2, 8, 64, 512)))
        match rng.randrange(8):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(out):
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B, rng.randrange(256)))
            case 3:
                width = rng.choice("bhiq")
                size = struct.calcsize(width)
                piece = (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
                out[at : at + size] = piece
            case 4:
                del out[at:until]
            case 5:
                out[at:at] = out[at:until]
            case 6:
                start = rng.randrange(len(other))
                out[at:until] = other[start : start + rng.choice((1, 8, 64))]
            case 7 if rng.random() < 0.2:
                del out[at:]
    return bytes(out)


# ---- JSON ----------------------------------------------------------------------------------------------------------------
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        1.5,
        2**31,
        2**63,
        10**30,
        1e308,
        float("nan"),
        "",
        "x",
        "..",
        "a\nb",
        "7",
        "\udcff",
    ),
    *("/", "2026-01-01", [], {}, [[]], [1], ["x"], {"x": 1}, "x" * 2_000, 10**300, 10**1100),
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def mutated_tree(rng: Random, tree: Any) -> Any:
    """A JSON value with one to three values replaced, nudged, removed, added, moved or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found or rng.random() < 0.01:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(found)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                holder[key] = nudged(rng, holder[key])
            case 3:
                del holder[key]
            case 4:
                value = copy.deepcopy(holder[key])
                if isinstance(holder, dict):
                    holder[rng.choice((f"{key}2", "x", *holder))] = value
                else:
                    holder.insert(key, value)
            case 5:
                other, there = rng.choice(found)
                if there in (other if isinstance(other, dict) else range(len(other))):
                    holder[key] = copy.deepcopy(other[there])
    return tree


def nudged(rng: Random, value: Any) -> Any:
    """Nearly the same value: what a checksum must notice and a range check cannot."""
    if isinstance(value, int | float):
        return value + rng.choice((1, -1))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0a9f/.") + value[at + 1 :]
    return value


def as_json(rng: Random, tree: Any) -> bytes:
    return json.dumps(tree, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.9).encode(errors="replace")


def mutated_json(rng: Random, data: bytes) -> bytes:
    """The text of a JSON document, changed as a document, as text, or buried in brackets."""
    match rng.randrange(12):
        case 0:
            depth = rng.choice((50, 5_000, 100_000))
            return b"[" * depth + data + b"]" * depth
        case 1 | 2 | 3:
            return mutated(rng, data)
    return as_json(rng, mutated_tree(rng, json.loads(data)))


# ---- Thrift's compact protocol: the footer and the page headers of Parquet -----------------------------------------------
Field = list[Any]
"""[number, type, value]; a struct is a list of them."""
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 0x80:
            return value, at


def _varint(value: int) -> bytes:
    value, out = value % 2**64, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_value(kind: int, data: bytes, at: int) -> tuple[Any, int]:
    if kind in (_BYTE, _TRUE, _FALSE):
        return data[at], at + 1
    if kind == _DOUBLE:
        return data[at : at + 8], at + 8
    if kind == _BINARY:
        size, at = _read_varint(data, at)
        return data[at : at + size], at + size
    if kind in (_LIST, _SET):
        count, of, at = data[at] >> 4, data[at] & 0x0F, at + 1
        if count == 15:
            count, at = _read_varint(data, at)
        items = []
        for _ in range(count):
            item, at = _read_value(of, data, at)
            items.append(item)
        return (of, items), at
    if kind == _STRUCT:
        return read_struct(data, at)
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def read_struct(data: bytes, at: int = 0) -> tuple[list[Field], int]:
    """A struct and the place of the first byte after it."""
    fields: list[Field] = []
    number = 0
    while data[at]:
        kind, delta, at = data[at] & 0x0F, data[at] >> 4, at + 1
        if delta:
            number += delta
        else:
            value, at = _read_varint(data, at)
            number = (value >> 1) ^ -(value & 1)
        value, at = (None, at) if kind in (_TRUE, _FALSE) else _read_value(kind, data, at)
        fields.append([number, kind, value])
    return fields, at + 1


def _value(kind: int, value: Any) -> bytes:
    if kind in (_BYTE, _TRUE, _FALSE):
        return bytes([value % 256])
    if kind == _DOUBLE:
        return bytes(value)
    if kind == _BINARY:
        return _varint(len(value)) + value
    if kind in (_LIST, _SET):
        of, items = value
        return bytes([0xF0 | of]) + _varint(len(items)) + b"".join(_value(of, item) for item in items)
    if kind == _STRUCT:
        return struct_bytes(value)
    return _varint((value << 1) ^ (value >> 63))


def struct_bytes(fields: list[Field]) -> bytes:
    """The inverse of `read_struct`, every field's number written in full."""
    out = bytearray()
    for number, kind, value in fields:
        out += bytes([kind]) + _varint((number << 1) ^ (number >> 63))
        out += b"" if kind in (_TRUE, _FALSE) else _value(kind, value)
    return bytes(out) + b"\0"


def get(fields: list[Field], number: int) -> Any:
    """The value of a field; of a list, its items."""
    value = next(field[2] for field in fields if field[0] == number)
    return value[1] if isinstance(value, tuple) else value


def put(fields: list[Field], number: int, value: Any) -> None:
    next(field for field in fields if field[0] == number)[2] = value


def footer(data: bytes) -> list[Field]:
    """The FileMetaData of a Parquet file."""
    return read_struct(data[len(data) - 8 - int.from_bytes(data[-8:-4], "little") : -8])[0]


def with_footer(data: bytes, fields: list[Field]) -> bytes:
    """The file with another footer."""
    new = struct_bytes(fields)
    return data[: len(data) - 8 - int.from_bytes(data[-8:-4], "little")] + new + len(new).to_bytes(4, "little") + MAGIC


def _structs(fields: list[Field]) -> Iterator[list[Field]]:
    yield fields
    for _, kind, value in fields:
        if kind == _STRUCT:
            yield from _structs(value)
        elif kind == _LIST and value[0] == _STRUCT:
            for item in value[1]:
                yield from _structs(item)


def mutated_struct(rng: Random, fields: list[Field]) -> None:
    """Change one to three fields, of this struct or of one inside, in place."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder = rng.choice([s for s in _structs(fields) if s] or [[[1, 5, 0]]])
        field = rng.choice(holder)
        _, kind, value = field
        if rng.random() < 0.1:
            holder.remove(field)
        elif rng.random() < 0.05:
            holder.append(copy.deepcopy(field))
        elif kind in (_LIST, _SET) and value[1]:
            items = value[1]
            match rng.randrange(3):
                case 0:
                    items.pop(rng.randrange(len(items)))
                case 1:
                    items.append(copy.deepcopy(rng.choice(items)))
                case 2:
                    items[:] = items * rng.choice((0, 2, 50))
        elif kind == _BINARY:
            field[2] = mutated(rng, value) if rng.random() < 0.8 else rng.choice((b"", b"a", b"\xff" * 300))
        elif isinstance(value, int):
            field[2] = rng.choice((*INTEGERS, value + 1, value - 1, value * 1_000, rng.randrange(8)))
        elif kind in (_TRUE, _FALSE):
            field[1] = _TRUE + _FALSE - kind


def mutated_parquet(rng: Random, samples: list[bytes]) -> bytes:
    """A sample with a changed footer, a changed page header, or changed bytes (mostly with the magic still in place)."""
    data = rng.choice(samples)
    how = rng.random()
    if how < 0.45:
        fields = footer(data)
        mutated_struct(rng, fields)
        return with_footer(data, fields)
    if how < 0.65:
        fields = footer(data)
        chunk = get(rng.choice(get(rng.choice(get(fields, 4)), 1)), 3)  # row_groups, columns, meta_data
        at = rng.choice(
            [field[2] for field in chunk if field[0] in (9, 11)]
        )  # data_page_offset, dictionary_page_offset
        page, stop = read_struct(data, at)
        mutated_struct(rng, page)
        new = struct_bytes(page)
        if rng.random() < 0.7:  # what follows stays where it was
            new = new[: stop - at].ljust(stop - at, b"\0") if len(new) > stop - at else new
        return data[:at] + new + data[stop:]
    out = mutated(rng, data, rng.choice(samples))
    if rng.random() < 0.9 and len(out) > 12:
        out = MAGIC + out[4:-4] + MAGIC
    return out


# ---- safetensors -------------------------------------------------------------------------------------------------------------
def tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def tensor_file(header: Any, body: bytes, size: int | None = None) -> bytes:
    """A safetensors file that states this length of its header, or the right one."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if size is None else size).to_bytes(8, "little") + text + body


def mutated_tensors(rng: Random, data: bytes) -> bytes:
    """Weights or state with another header, other metadata, or other bytes."""
    how, (header, body) = rng.random(), tensors(data)
    if how < 0.35 and "__metadata__" in header:
        about = json.loads(header["__metadata__"][METADATA_KEY])
        header["__metadata__"][METADATA_KEY] = as_json(rng, mutated_tree(rng, about)).decode()
        return tensor_file(header, body)
    if how < 0.7:
        return tensor_file(mutated_tree(rng, header), body)
    if how < 0.75:
        return tensor_file(header, body, rng.choice(INTEGERS) % 2**64)
    return mutated(rng, data)

"""Seeded inputs for everything that Tidemill parses, and what must hold of each. Run in child processes by `test_fuzz.py`.

An input follows from its target's name and its seed alone. This checks a single one again, with the whole traceback:

    python -m tests.guarantees.fuzz shard 17
"""

import copy
import faulthandler
import gc
import json
import mmap
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError

from tests.guarantees.audit import audit
from tests.guarantees.children import train
from tests.storage.shards import dispose, requeue
from tidemill.storage.aliases import aliased, promote
from tidemill.storage.disposal import quarantine_key, quarantined
from tidemill.storage.errors import InvalidKey, NotReady, ShardRejected, StorageError
from tidemill.storage.inbox import Inbox, Shard, is_shard
from tidemill.storage.local import LocalStore
from tidemill.storage.log import Version, VersionLog
from tidemill.storage.manifest import Blobs, Entry, Owed, decode, encode, sha256
from tidemill.storage.memory import MemoryStore
from tidemill.storage.parquet import MAGIC, RowGroup
from tidemill.storage.runs import BatchProgress, Checkpoint
from tidemill.storage.store import ObjectInfo
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store
from tidemill.tasks.online import step as online
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError, TrainingError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import METADATA_KEY, Learner
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

SECONDS = 30
"""What one input may take by the clock. The slowest ones take a fraction of a second, also on a busy machine."""
ADDRESS_SPACE = 3 * 2**30
"""What a child may map beyond what it has mapped when the first input begins."""
GROWTH = 96 * 2**20
"""How much more memory may be resident after the last input than after the first fifth of them."""

Random = random.Random
Check = Callable[[Random], str]
"""Make an input, use it, and return how it ended. Raises if that is not one of the ways in which it may end."""

SPEC = Spec.model_validate(
    {
        "features": ["a", "n", {"name": "c", "kind": "category", "buckets": 8}, "v", "t"],
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [4]}},
        "optimizer": {"name": "adam", "arguments": {"betas": [0.9, 0.99]}},
        "learning_rate": 0.01,
        "batch_size": 16,
        "epochs": 1,
        "standardize_target": True,
    }
)


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
            return rng.choice(VALUES)
        holder, key = rng.choice(found)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = rng.choice(VALUES)
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


# ---- shards --------------------------------------------------------------------------------------------------------------
def table(rows: int, seed: int) -> pa.Table:
    """Columns of the types that have a path of their own, and a target that follows from them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, generator=generator).tolist()
    return pa.table(
        {
            "a": [None if i % 7 == 3 else value for i, value in enumerate(a)],
            "n": pa.array(range(rows), pa.int32()),
            "c": [("red", "green", None, "a longer one")[i % 4] for i in range(rows)],
            "v": pa.array([[value, -value] for value in a], pa.list_(pa.float32(), 2)),
            "t": pa.array([datetime(2026, 1, 1 + i % 28, tzinfo=UTC) for i in range(rows)], pa.timestamp("us", "UTC")),
            "y": [2 * value for value in a],
        }
    )


def parquet(data: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(data, sink, **options)
    return bytes(sink.getvalue())


def samples() -> list[bytes]:
    """The same rows in every way of writing that has a decoder of its own."""
    rows = table(48, 1)
    ways: list[dict[str, Any]] = [
        {"row_group_size": 20},
        {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 16},
        {"compression": "none", "use_dictionary": False, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"c": "DELTA_BYTE_ARRAY", "n": "DELTA_BINARY_PACKED"}},
        {"use_dictionary": False, "column_encoding": {"a": "BYTE_STREAM_SPLIT", "c": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"store_schema": False, "write_page_index": True, "compression": "gzip"},
    ]
    return [parquet(rows, **way) for way in ways]


def shard(data: bytes, key: str = "a.parquet") -> Shard:
    return Shard("memory://in", ObjectInfo(key, len(data), "e", datetime.now(UTC)), data, sha256(data))


def encoded(features: Features, groups: list[RowGroup]) -> int:
    """Decode and encode every row, as training does. What comes out must be what tensors of this shape may hold."""
    features.check(groups[0].schema, "a.parquet")
    for group in groups:
        table = group.read(features.names(labelled=True))
        y_N, _ = features.target(table, group.name)
        x_NF, ids_NC = features.encode(table, group.name)
        assert ids_NC is not None
        assert x_NF.shape == (group.num_rows, features.numbers)
        assert y_N.shape == (group.num_rows,)
        assert bool(torch.isfinite(x_NF).all())
        assert 0 <= int(ids_NC.min()) <= int(ids_NC.max()) <= features.buckets[0]
    return sum(group.num_rows for group in groups)


def shard_target(_: Path) -> Check:
    """Bytes of a shard, from the footer to tensors."""
    files = samples()
    groups = shard(files[0]).row_groups()
    features = Features.resolve(SPEC, groups[0].schema).fit(groups)
    assert encoded(features, groups) == 48

    def check(rng: Random) -> str:
        try:
            encoded(features, shard(mutated_parquet(rng, files)).row_groups())
        except (NotReady, ShardRejected, ColumnError) as error:
            return named(error)
        return "accepted"

    return check


def step_target(_: Path) -> Check:
    """Whole steps: each shard is consumed or rejected in exactly one version, and the next good one is trained on."""
    files, good = samples(), parquet(table(24, 2))
    run: online.OnlineRun | None = None
    sent: list[tuple[str, bytes]] = []

    def begin() -> online.OnlineRun:
        sent.clear()
        root = f"memory://{uuid.uuid4().hex}"
        open_store(f"{root}/dataset").write("a.parquet", parquet(table(200, 0)))
        train(open_store, f"{root}/dataset", f"{root}/registry", SPEC, BatchSettings())
        settings = OnlineSettings(grace_seconds=0)
        return online.OnlineRun(f"{root}/inbox", f"{root}/registry", "model", settings)

    def check(rng: Random) -> str:
        nonlocal run
        run = run or begin()
        bad, after = f"{len(sent):04}.parquet", f"{len(sent):04}b.parquet"
        for key, data in ((bad, mutated_parquet(rng, files)), (after, good)):
            run.places.inbox.store.write(key, data)
            sent.append((key, data))
        assert online.step(run).outcome is online.Outcome.COMMITTED
        assert not list(run.places.inbox.store.list())
        manifest = run.places.log.head().manifest
        consumed, rejected = ([s.key for s in shards] for shards in (manifest.consumed, manifest.rejected))
        assert (consumed, rejected) in (([bad, after], []), ([after], [bad]))
        if len(sent) >= 50:
            audit(run.places.log, sent)
            run = None
        return "rejected" if rejected else "accepted"

    return check


# ---- weights and state ---------------------------------------------------------------------------------------------------
def registry() -> tuple[VersionLog, Version, dict[str, bytes]]:
    """A registry with versions 0 (batch) and 1 (online: one shard consumed, one rejected), and all of its objects."""
    root = f"memory://{uuid.uuid4().hex}"
    open_store(f"{root}/dataset").write("a.parquet", parquet(table(64, 0)))
    train(open_store, f"{root}/dataset", f"{root}/registry", SPEC, BatchSettings())
    run = online.OnlineRun(f"{root}/inbox", f"{root}/registry", "model", OnlineSettings(grace_seconds=0))
    run.places.inbox.store.write("a/b.parquet", parquet(table(24, 2)))
    run.places.inbox.store.write("c.parquet", b"not Parquet")
    assert online.step(run).version == 1
    store = run.places.log.store
    return run.places.log, run.places.log.head(), {info.key: store.read(info.key) for info in store.list()}


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


def learner_target(_: Path) -> Check:
    """Weights and state: refused by their sha256 before they are parsed; and parsed all the same, only TrainingErrors."""
    log, version, objects = registry()
    refs = {"weights": version.manifest.blobs.weights, "state": version.manifest.blobs.state}
    originals = {name: objects[ref.key] for name, ref in refs.items()}

    def check(rng: Random) -> str:
        name = rng.choice(("weights", "state", "state"))
        ref, data = refs[name], mutated_tensors(rng, originals[name])
        log.store.write(ref.key, data)
        if data != originals[name]:
            refused_as_corrupt(lambda: load_learner(log, version))
        log.store.write(ref.key, originals[name])
        try:
            learner = Learner.load(SPEC, **{**originals, name: data})
        except TrainingError as error:
            return named(error)
        stored = learner.dump()
        assert Learner.load(SPEC, *stored).dump() == stored
        return "accepted"

    return check


def named(error: Exception, part: str = "") -> str:
    """The class of an error, whose message holds `part` and is short enough to be read."""
    assert part in str(error), error
    assert len(str(error)) < 20_000, f"{len(str(error))} characters"
    return type(error).__name__


def refused_as_corrupt(use: Callable[[], object]) -> None:
    """Only by length and sha256: not by whoever would have parsed the bytes."""
    try:
        use()
    except StorageError as error:
        named(error, "Nothing was loaded")
        return
    raise AssertionError("altered bytes were accepted")


# ---- manifests -----------------------------------------------------------------------------------------------------------
def manifest_target(_: Path) -> Check:
    """A stored manifest: what decodes is what was stored."""
    _, version, objects = registry()
    original, where = objects["model/log/00000001.json"], "memory://registry/model/log/00000001.json"
    assert encode(version.manifest) == original

    def check(rng: Random) -> str:
        data = mutated_json(rng, original)
        try:
            found = decode(data, where)
        except StorageError as error:
            return named(error, where)
        assert found == version.manifest
        return "accepted"

    return check


def version_target(_: Path) -> Check:
    """Manifests of someone who knows how to make the checksum: whatever they say, loading raises only stated errors."""
    log, version, objects = registry()
    fields = json.loads(objects["model/log/00000001.json"])
    del fields["checksum"]

    def check(rng: Random) -> str:
        changed = mutated_tree(rng, fields)
        canonical = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        if isinstance(changed, dict):
            changed["checksum"] = sha256(canonical.encode())
        log.store.write("model/log/00000001.json", json.dumps(changed).encode())
        try:
            head = log.head()
            log.tombstones(head)
            load_learner(log, head)
        except (StorageError, TrainingError) as error:
            return named(error)
        assert (head.number, head.manifest.parent) == (1, version.manifest.parent)
        return "accepted"

    return check


def tombstones_target(_: Path) -> Check:
    """The blob of tombstones: refused by its sha256, and parsed all the same, either corrupt or lines of four strings."""
    log, parent, _ = registry()
    ref = log.write_tombstones(2, log.tombstones(parent))
    blobs = parent.manifest.blobs.model_copy(update={"tombstones": ref})
    version = log.commit(parent, Entry(kind="online", spec=parent.manifest.spec, blobs=blobs))
    known = Tombstones()
    for i in range(8):
        known.add("s3://bucket/in", f"d/{i}\n.parquet", f"{i:064x}", f"{i:032x}")
    original = log.read_blob(ref)

    def check(rng: Random) -> str:
        line = rng.randrange(8)
        lines = known.encode().splitlines(keepends=True)
        lines[line] = mutated_json(rng, lines[line].strip()) + b"\n"
        data = b"".join(lines) if rng.random() < 0.7 else mutated(rng, known.encode())
        log.store.write(ref.key, data)
        refused_as_corrupt(lambda: log.tombstones(version))
        log.store.write(ref.key, original)
        try:
            found = Tombstones.decode(data, "memory://registry/blob")
        except StorageError as error:
            return named(error, "memory://registry/blob")
        assert list(Tombstones.decode(found.encode(), "again")) == list(found)
        assert len(found) <= data.count(b"[")
        return "accepted"

    return check


# ---- the small objects ---------------------------------------------------------------------------------------------------
def runs_target(folder: Path) -> Check:
    """The hint, an alias, a reason in quarantine, and the notes of a batch run: in a folder, whose names have limits."""
    root = folder / "registry"
    log = VersionLog(LocalStore(str(root)), "model")
    progress = BatchProgress(log, "0123456789abcdef")
    inbox = Inbox(MemoryStore(uuid.uuid4().hex))

    def commit(parent: Version | None, run: str | None = None) -> Version:
        number = 0 if parent is None else parent.number + 1
        blobs = Blobs(weights=log.write_blob(number, "w", b"w"), state=log.write_blob(number, "s", b"s"))
        return log.commit(parent, Entry(kind="batch", spec={}, blobs=blobs, run=run))

    first = commit(None)
    progress.begin()
    own = commit(first, progress.key)
    head = commit(own)
    promote(log, "champion", own)
    info = inbox.store.write("d/a.parquet", b"bad")
    name = quarantine_key("model", 1, sha256(b"bad"), info.key)
    debt = {"inbox": inbox.url, "key": info.key, "sha256": sha256(b"bad")}
    dispose(
        log,
        [
            Owed.model_validate(
                {**debt, "etag": info.etag, "action": "quarantine", "destination": name, "reason": "bad"}
            )
        ],
    )
    progress.finish(own)
    runs = f"model/runs/{progress.key}"
    keys = ["model/aliases/champion.json", f"{name}.json", f"{runs}/run.json", f"{runs}/done.json"]
    objects = {key: log.store.read(key) for key in keys}
    log.store.delete(f"{runs}/done.json")
    checkpoints: dict[int, Checkpoint] = {}
    for epochs in (1, 2):
        progress.save((0.5,) * epochs, b"weights %d" % epochs, b"state %d" % epochs)
        saved = progress.latest()
        assert saved is not None
        checkpoints[epochs] = saved[0]
    objects[f"{runs}/00000002.json"] = log.store.read(f"{runs}/00000002.json")
    objects["model/head.json"] = json.dumps({"version": 2}).encode()
    log.store.write("model/head.json", objects["model/head.json"])

    def use(key: str, data: bytes) -> str:
        if key.endswith("head.json"):
            try:
                assert log.head().number == head.number
            except StorageError as error:
                raise AssertionError("a hint is only ever a place to start looking") from error
            return "ignored or followed"
        if "aliases" in key:
            version = aliased(log, "champion")
            stated = json.loads(data)["version"]
            assert version.number == stated, f"{stated!r} was taken for {version.number}"
            return "accepted"
        if "quarantine" in key:
            (reason,) = quarantined(log).values()
            assert isinstance(reason["reason"], str), "printed by `tidemill requeue`"
            assert {k: reason[k] for k in debt} == debt
            return "accepted"
        if key.endswith("00000002.json"):
            found = progress.latest()
            assert found is not None, "the checkpoint before is whole"
            checkpoint, weights, state = found
            n = checkpoint.epochs
            assert (checkpoint, weights, state) == (checkpoints[n], b"weights %d" % n, b"state %d" % n)
            return "accepted" if n == 2 else "left out"
        registered = progress.registered()
        assert registered is None or registered[0] == own, "another version is not this run's"
        return "accepted" if registered else "left out"

    def check(rng: Random) -> str:
        key = rng.choice([*objects])
        path = root / key
        data = mutated_json(rng, objects[key])
        path.write_bytes(data)
        try:
            return f"{path.parent.name}: {use(key, data)}"
        except StorageError as error:
            return f"{path.parent.name}: {type(error).__name__}"
        finally:
            path.unlink()
            if not key.endswith("done.json"):  # as long as it is there, run.json is not looked at
                path.write_bytes(objects[key])

    return check


def spec_target(_: Path) -> Check:
    """A spec as Python values and as JSON: pydantic's own error, or a spec that is stored and read back as it is."""
    original = SPEC.model_dump(mode="json")

    def check(rng: Random) -> str:
        text = mutated_json(rng, json.dumps(original).encode())
        try:
            as_text = rng.random() < 0.5
            spec = Spec.model_validate_json(text) if as_text else Spec.model_validate(mutated_tree(rng, original))
        except ValidationError as error:
            return named(error, "Spec")
        assert Spec.model_validate_json(spec.model_dump_json()) == spec
        assert Spec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json"), allow_nan=False))) == spec
        return "accepted"

    return check


# ---- keys ----------------------------------------------------------------------------------------------------------------
PIECES = (
    *(
        "a",
        "b",
        ".",
        "..",
        "",
        "/",
        "//",
        "\\",
        "?versionId=1",
        "#x",
        "%2e%2e",
        "%2F",
        "\n",
        "\r",
        "\0",
        "\x1b[31m",
        "\u202e",
    ),
    *(
        "é",
        "e\u0301",
        "\udcff",
        "\U0001f980",
        " ",
        "in2",
        "log/00000000.json",
        ".parquet",
        ".tmp",
        "_",
        "-",
        "x" * 90,
        "=",
        "'",
    ),
    *('"', "$(id)", "`id`", "~", "*", "{}", "%s", "\u2028", ".tidemill-tmp-", "CON", ":", "\ufeff"),
)


def keys_target(folder: Path) -> Check:
    """Keys that a producer may choose, on a disk: refused, or exactly that object is listed, moved, sent back and removed."""
    inbox = Inbox(LocalStore(str(folder / "parent" / "in")))
    log = VersionLog(LocalStore(str(folder / "registry")), "model")
    for other in ("parent/x", "parent/in2/x", "x"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"not yours")
    (folder / "parent" / "in").mkdir()

    def stands(root: Path) -> list[str]:
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and ".tidemill-" not in p.name)

    def check(rng: Random) -> str:
        key = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 6)))
        name = quarantine_key("model", 1, sha256(b"bad"), key)
        assert re.fullmatch(r"model/quarantine/00000001-[0-9a-f]{32}", name)
        remembered = Tombstones()
        remembered.add(inbox.url, key, "s", "e")
        assert Tombstones.decode(remembered.encode(), "blob").has(inbox.url, key, "s")
        outcome = "accepted"
        try:
            info = inbox.store.write(key, b"bad")
        except InvalidKey:
            outcome = "InvalidKey"
        else:
            listing = inbox.list(10, lambda _: False)
            assert [s.key for s in listing.shards] == ([key] if is_shard(key) else [])
            owed = Owed(
                inbox=inbox.url,
                key=key,
                sha256=sha256(b"bad"),
                etag=info.etag,
                action="quarantine",
                destination=name,
                reason="bad",
            )
            assert dispose(log, [owed]) == ()
            assert not list(inbox.store.list())
            try:
                back = requeue(log, name.removeprefix("model/quarantine/"))
            except InvalidKey:  # too long with the mark in it
                log.store.delete(name)
                log.store.delete(f"{name}.json")
            else:
                assert [i.key for i in inbox.store.list()] == [back]
                inbox.store.delete(back)
        assert stands(folder) == ["parent/in2/x", "parent/x", "x"]
        return outcome

    return check


TARGETS: dict[str, Callable[[Path], Check]] = {
    "shard": shard_target,
    "step": step_target,
    "learner": learner_target,
    "manifest": manifest_target,
    "version": version_target,
    "tombstones": tombstones_target,
    "runs": runs_target,
    "spec": spec_target,
    "keys": keys_target,
}


# ---- running them --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """What a child tells of its inputs."""

    outcomes: dict[str, int]
    slowest_seconds: float
    cpu_seconds: float
    growth_bytes: int
    """Resident at the end, less what was resident after the first fifth of the inputs."""
    failed: int | None = None
    """Seed of the input that failed."""
    reason: str = ""


def random_of(target: str, seed: int) -> Random:
    return random.Random(f"{target} {seed}")


def _pages(index: int) -> int:
    """Bytes of this process by /proc: 0 mapped, 1 resident."""
    return int(Path("/proc/self/statm").read_text().split()[index]) * resource.getpagesize()


def _resident() -> int:
    gc.collect()
    pa.default_memory_pool().release_unused()
    return _pages(1)


def run(target: str, make: Callable[[Path], Check], inputs: int, folder: Path, seconds: float) -> None:
    """Check so many inputs in this process. Writes the seed in hand to `folder/seed` and the result to `folder/result`.

    Ends the process if an input takes too long; its stack is then in `folder/stacks`, as it is if the process crashes.
    """
    torch.set_num_threads(1)
    with (folder / "stacks").open("w") as stacks, (folder / "seed").open("w+b") as seed_file:
        seed_file.write(bytes(8))
        seed_file.flush()
        seed_at = mmap.mmap(seed_file.fileno(), 8)  # survives whatever becomes of the process
        faulthandler.enable(stacks)
        (folder / "data").mkdir()
        check = make(folder / "data")
        limit = _pages(0) + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        outcomes: Counter[str] = Counter()
        slowest, before = 0.0, 0
        failed, reason = None, ""
        for seed in range(inputs):
            if seed == inputs // 5:
                before = _resident()
            seed_at[:] = seed.to_bytes(8, "little")
            faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)
            started = time.perf_counter()
            try:
                outcomes[check(random_of(target, seed))] += 1
            except BaseException:  # noqa: BLE001  # Rust's panics are no Exceptions
                failed, reason = seed, traceback.format_exc()
                break
            slowest = max(slowest, time.perf_counter() - started)
        faulthandler.cancel_dump_traceback_later()
        result = Result(dict(outcomes), slowest, time.process_time(), _resident() - before, failed, reason)
        (folder / "result").write_text(json.dumps(result.__dict__))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(1)
        print(TARGETS[sys.argv[1]](Path(name))(random_of(sys.argv[1], int(sys.argv[2]))))

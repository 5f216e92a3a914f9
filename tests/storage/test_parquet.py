"""Parquet files as row groups: read exactly what is asked for, of any type, and refuse what is broken without falling over."""

import base64
import contextlib
import datetime as dt
import gc
import io
import os
import random
import subprocess
import sys
import threading
import tracemalloc
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.storage import parquet, ranges
from tidemill.storage.errors import DatasetChanged, DatasetError, NotReady, ShardRejected, StorageError, Unavailable
from tidemill.storage.parquet import MAGIC, ParquetFile, row_groups

Range = tuple[int, int]


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


class Source:
    """Bytes behind a `fetch` that remembers what was asked of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls: list[Range] = []
        self.given: list[bytes] = []

    def __call__(self, start: int, length: int) -> bytes:
        assert length > 0
        assert 0 <= start <= start + length <= len(self.data)
        self.calls.append((start, start + length))
        self.given.append(self.data[start : start + length])
        return self.given[-1]


def opened(
    data: bytes | Source, error: type[StorageError] = ShardRejected, name: str = "f.parquet", **options: Any
) -> ParquetFile:
    source = data if isinstance(data, Source) else Source(data)
    return ParquetFile(name, len(source.data), source, error, **options)


def read_all(data: bytes) -> list[pa.Table]:
    """Everything that can be read of a file."""
    file = opened(data)
    groups = row_groups(file)
    return [
        group.read(columns) for group in groups for columns in (file.schema.names, *([n] for n in file.schema.names))
    ]


def wait_until(true: Callable[[], bool]) -> None:
    """Or fail by pytest's own time limit."""
    while not true():
        os.sched_yield()


def chunk_range(data: bytes, column: int, group: int = 0) -> Range:
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(group).column(column)
    starts = [o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o is not None]
    return min(starts), min(starts) + chunk.total_compressed_size


# ---- reading -------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_by_row_groups() -> None:
    data = written(pa.table({"a": range(25), "b": [i / 2 for i in range(25)]}), row_group_size=10)
    groups = row_groups(opened(data))
    assert [g.num_rows for g in groups] == [10, 10, 5]
    assert [g.name for g in groups] == [f"f.parquet row group {i}" for i in range(3)]
    assert groups[0].schema.names == ["a", "b"]
    assert groups[1].read(["a"]).to_pydict() == {"a": list(range(10, 20))}


def test_columns_come_in_the_order_in_which_they_were_asked_for() -> None:
    file = opened(written(pa.table({"a": [1], "b": [2], "c": [3]})))
    assert file.read(0, ["c", "a"]).column_names == ["c", "a"]
    assert file.read(0, ["a", "c", "a"]).column_names == ["a", "c", "a"]
    nothing = file.read(0, [])
    assert (nothing.column_names, nothing.num_rows) == ([], 1)


VALUES: dict[str, pa.Array] = {
    **{
        str(kind): pa.array([0, 1, None, 100], kind)
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    },
    **{str(kind): pa.array([0.5, None, -1.0], kind) for kind in (pa.float16(), pa.float32(), pa.float64())},
    "uint64 max": pa.array([2**64 - 1], pa.uint64()),
    "bool": pa.array([True, False, None]),
    "null": pa.nulls(3),
    "string": pa.array(["a", "", None, "ü\x00"]),
    "large_string": pa.array(["a", "", None], pa.large_string()),
    "string_view": pa.array(["a", "", None], pa.string_view()),
    "binary": pa.array([b"\xff", b"", None]),
    "large_binary": pa.array([b"\xff", b"", None], pa.large_binary()),
    "binary_view": pa.array([b"\xff", b"", None], pa.binary_view()),
    "fixed binary": pa.array([b"ab", None], pa.binary(2)),
    "date32": pa.array([date(2026, 2, 3), None], pa.date32()),
    "date64": pa.array([date(2026, 2, 3), None], pa.date64()),
    **{
        f"timestamp {unit} {zone}": pa.array([datetime(2026, 2, 3, 4, 5, 6), None], pa.timestamp(unit, zone))
        for unit in ("s", "ms", "us", "ns")
        for zone in (None, "Europe/Berlin")
    },
    "time32": pa.array([time(1, 2, 3), None], pa.time32("ms")),
    "time64": pa.array([time(1, 2, 3), None], pa.time64("us")),
    "duration": pa.array([timedelta(seconds=3), None], pa.duration("us")),
    "decimal128": pa.array([Decimal("1.25"), None], pa.decimal128(10, 2)),
    "decimal256": pa.array([Decimal("1.25"), None], pa.decimal256(60, 2)),
    "dictionary": pa.array(["a", "b", None, "a"]).dictionary_encode(),
    "dictionary of ints": pa.array([7, 8, None, 7]).dictionary_encode(),
    "list": pa.array([[1.0], [], None, [2.0, None]]),
    "large list": pa.array([[1.0], []], pa.large_list(pa.float64())),
    "fixed list": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
    "fixed list of fixed lists": pa.array([[[1, 2], [3, 4]]] * 3, pa.list_(pa.list_(pa.int64(), 2), 2)),
    "list of strings": pa.array([["a", None], None]),
    "struct": pa.array([{"x": 1, "y": "a"}, None, {"x": None, "y": None}]),
    "struct of fixed lists": pa.array([{"v": [1.0, 2.0]}] * 2, pa.struct({"v": pa.list_(pa.float32(), 2)})),
    "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False, "compression": "none"},
        {"data_page_version": "2.0", "compression": "zstd", "write_page_checksum": True},
        {"store_schema": False},
    ],
    ids=["default", "plain", "v2", "no arrow schema"],
)
def test_every_type_comes_back(name: str, options: dict[str, Any]) -> None:
    values = VALUES[name]
    data = written(pa.table({"before": [0] * len(values), "x": values, "x.z": [0] * len(values)}), **options)
    expected = pq.ParquetFile(io.BytesIO(data)).read(columns=["x"]).column("x")
    file = opened(data)
    found = file.read(0, ["x"])
    assert found.column("x").to_pylist() == expected.to_pylist()
    assert found.num_rows == len(values)
    assert found.schema.field("x").type == file.schema.field("x").type  # what was announced is what comes
    if "schema" not in str(options):
        assert found.column("x").to_pylist() == values.to_pylist()


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
@pytest.mark.parametrize("encoding", ["dictionary", "PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_strings_of_any_kind_and_encoding_keep_each_value_once(kind: str, encoding: str) -> None:
    values = VALUES[kind]
    options: dict[str, Any] = (
        {} if encoding == "dictionary" else {"use_dictionary": False, "column_encoding": {"x": encoding}}
    )
    data = written(pa.table({"n": range(3 * len(values)), "x": pa.chunked_array([values] * 3)}), **options)
    file = opened(data)
    for columns in (["x"], ["n", "x"], ["x", "n"]):
        table = file.read(0, columns)
        assert table.column_names == columns
        assert table.column("x").to_pylist() == values.to_pylist() * 3
        assert pa.types.is_dictionary(table.schema.field("x").type)
        assert table.schema.field("x").type == file.schema.field("x").type
        dictionary = table.column("x").unify_dictionaries().chunk(0).dictionary
        assert len(dictionary) == len(set(values.to_pylist()) - {None})


def test_a_chunk_that_left_its_dictionary_halfway_is_read() -> None:
    values = [f"{i} {'x' * 50}" for i in range(5_000)]
    data = written(pa.table({"x": values}), dictionary_pagesize_limit=10_000)
    assert "PLAIN" in pq.read_metadata(io.BytesIO(data)).row_group(0).column(0).encodings
    assert opened(data).read(0, ["x"]).column("x").to_pylist() == values


def test_names_with_dots_are_names() -> None:
    table = pa.table({"a.b": [1, 2], "a": [3, 4], "a.b.c": [5, 6], ".": [7, 8], "s": [{"x.y": 9}, {"x.y": 10}]})
    file = opened(written(table))
    for column in table.column_names:
        assert file.read(0, [column]).to_pydict() == {column: table.column(column).to_pylist()}
    assert file.read(0, table.column_names).to_pydict() == table.to_pydict()


@pytest.mark.parametrize("name", ["", " ", "ü", "\n", "a" * 5_000, "x=1", "\u202e"])
def test_any_name_is_a_name(name: str) -> None:
    assert opened(written(pa.table({name: [1]}))).read(0, [name]).to_pydict() == {name: [1]}


def test_partition_columns_are_added_unless_the_file_has_them() -> None:
    data = written(pa.table({"x": [1, 2], "day": [8, 9]}))
    file = opened(data, name="day=x/year=2026/city=__HIVE_DEFAULT_PARTITION__/f.parquet", types={"day": pa.float64()})
    assert file.schema.names == ["x", "day", "year", "city"]
    assert file.read(0, ["city", "day", "year"]).to_pydict() == {
        "city": [None] * 2,
        "day": [8, 9],
        "year": [2026] * 2,
    }
    assert file.read(0, ["year"]).to_pydict() == {"year": [2026, 2026]}
    assert file.read(0, ["year"]).schema.field("year").type == file.schema.field("year").type == pa.int64()


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY"])
def test_what_is_read_again_is_the_same(encoding: str) -> None:
    """What the first read found out about a row group is not found out again."""
    table = pa.table({"x": range(10), "s": ["a", "b"] * 5})
    data = written(table, row_group_size=4, use_dictionary=False, column_encoding={"s": encoding})
    source = Source(data)
    file = opened(source, name="day=3/f.parquet")
    for columns in (["s", "x", "day"], ["x"], ["s"]):
        for index in range(3):
            reads = [file.read(index, columns) for _ in range(3)]
            assert reads[0].equals(reads[1])
            assert reads[1].equals(reads[2])
            assert reads[0].num_rows == (4, 4, 2)[index]


def test_what_was_refused_is_refused_again(small_limit: int) -> None:
    file = opened(written(pa.table({"x": pa.array(["x" * 30_000_000])}), compression="zstd", write_statistics=False))
    for _ in range(2):
        with pytest.raises(ShardRejected, match="would decode to"):
            file.read(0, ["x"])


def test_a_file_without_rows_has_no_row_groups() -> None:
    empty = pa.table({"x": pa.array([], pa.string())})
    assert row_groups(opened(written(empty))) == []
    sink = io.BytesIO()
    pq.ParquetWriter(sink, empty.schema).close()
    file = opened(sink.getvalue())
    assert row_groups(file) == []
    assert file.schema.names == ["x"]


def test_row_groups_without_rows_are_left_out_and_the_others_keep_their_numbers() -> None:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, pa.schema({"x": pa.int64()})) as writer:
        for rows in ([1], [], [2, 3]):
            writer.write_table(pa.table({"x": pa.array(rows, pa.int64())}))
    groups = row_groups(opened(sink.getvalue()))
    assert [(g.name[-1], g.read(["x"]).to_pydict()["x"]) for g in groups] == [("0", [1]), ("2", [2, 3])]


# ---- what is fetched, and what stays -------------------------------------------------------------------------------------


def noise(rows: int) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), rows, [None, pa.py_buffer(os.urandom(8 * rows))])


@pytest.fixture(scope="module")
def wide() -> bytes:
    """Five columns of 400 kB each, that follow one another."""
    return written(pa.table({name: noise(50_000) for name in "abcde"}), use_dictionary=False, compression="none")


def test_opening_costs_two_requests_and_one_if_the_file_is_small(wide: bytes) -> None:
    source = Source(wide)
    opened(source)
    assert source.calls == [(len(wide) - 65_536, len(wide)), (0, 4)]
    source = Source(written(pa.table({"x": [1]})))
    opened(source)
    assert source.calls == [(0, len(source.data))]


def test_a_long_footer_is_fetched_too() -> None:
    names = [f"column {i} with a name that fills the footer" for i in range(800)]
    source = Source(written(pa.table({name: [i] for i, name in enumerate(names)})))
    footer = int.from_bytes(source.data[-8:-4], "little")
    assert footer > 65_536
    file = opened(source)
    assert file.schema.names == names
    assert len(source.calls) <= 4
    assert file.read(0, names[-1:]).to_pydict() == {names[-1]: [799]}


def test_only_the_asked_columns_are_fetched(wide: bytes) -> None:
    source = Source(wide)
    file = opened(source)
    for columns, expected in (("c", "c"), ("ae", "a e"), ("ea", "a e"), ("bc", "bc"), ("bcad", "abcd"), ("", "")):
        source.calls.clear()
        table = file.read(0, list(columns))
        assert table.column_names == list(columns)
        ranges = [
            (chunk_range(wide, "abcde".index(run[0]))[0], chunk_range(wide, "abcde".index(run[-1]))[1])
            for run in expected.split()
        ]
        assert source.calls == ranges


def test_neighbours_come_in_one_request_but_not_at_the_price_of_what_lies_between() -> None:
    narrow = {name: noise(100) for name in "abc"}
    small, big = (pa.array([os.urandom(size) for _ in range(100)], pa.binary(size)) for size in (2_000, 4_000))
    table = pa.table({"a": narrow["a"], "small": small, "b": narrow["b"], "big": big, "c": narrow["c"]})
    source = Source(written(table, use_dictionary=False, compression="none"))
    file = opened(source)
    source.calls.clear()
    assert file.read(0, ["c", "b", "a"]).equals(table.select(["c", "b", "a"]))
    assert source.calls == [(4, chunk_range(source.data, 2)[1]), chunk_range(source.data, 4)]


def test_distant_columns_are_fetched_at_once(wide: bytes) -> None:
    together = threading.Barrier(2)

    def fetch(start: int, length: int) -> bytes:
        if 100_000 < length < 1_000_000:
            together.wait(60)  # the other one is under way
        return wide[start : start + length]

    file = ParquetFile("f.parquet", len(wide), fetch, DatasetError, concurrency=2)
    assert file.read(0, ["a", "e"]).num_rows == 50_000


def test_a_large_row_group_comes_in_several_requests(monkeypatch: pytest.MonkeyPatch, wide: bytes) -> None:
    monkeypatch.setattr(ranges, "_COALESCED_BYTES", 1_000_000)
    monkeypatch.setattr(ranges, "_COALESCE_GAP", 600_000)
    source = Source(wide)
    file = opened(source)
    source.calls.clear()
    file.read(0, ["a", "c", "e"])  # 400 kB each, and as much between them
    a, c, e = (chunk_range(wide, i) for i in (0, 2, 4))
    assert source.calls == [a, c, e]


def test_only_the_asked_row_group_is_fetched() -> None:
    data = written(pa.table({"x": noise(200_000)}), row_group_size=50_000, use_dictionary=False, compression="none")
    source = Source(data)
    group = row_groups(opened(source))[2]
    source.calls.clear()
    assert group.read(["x"]).num_rows == 50_000
    assert source.calls == [chunk_range(data, 0, 2)]


def test_an_open_file_keeps_no_data(wide: bytes) -> None:
    source = Source(wide)
    file = opened(source)
    tables = [file.read(0, list("abcde")) for _ in range(2)]
    assert [table.num_rows for table in tables] == [50_000, 50_000]
    # Only `source.given` and the argument of the call hold the bytes, neither the file nor the tables; a thread of Arrow's
    # pool may take a moment longer to let go.
    assert len(source.given) == 4
    wait_until(lambda: [sys.getrefcount(source.given[i]) for i in (2, 3)] == [2, 2])


def test_a_footer_goes_with_its_file(wide: bytes) -> None:
    """Not later, when the garbage collector comes: of large datasets, footers are opened and dropped all the time."""
    file = opened(Source(wide))
    file.read(0, ["a"])
    footer = weakref.ref(file._metadata)
    gc.disable()
    try:
        del file
        assert footer() is None
    finally:
        gc.enable()


def test_what_is_kept_of_a_row_group_is_as_small_as_is_counted() -> None:
    kept = parquet.Findings()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for i in range(20_000):
            kept.keep(("a", "b"), "a/part.parquet", i, parquet._Checked(array("q", [i << 20, (i + 1) << 20]), {}))
        assert 0.8 < kept._bytes / (tracemalloc.get_traced_memory()[0] - before) < 1.25
    finally:
        tracemalloc.stop()


def test_threads_may_read_the_same_file(wide: bytes) -> None:
    file = opened(wide)
    expected = pq.read_table(io.BytesIO(wide))

    def read(i: int) -> bool:
        columns = random.Random(i).sample("abcde", 3)
        return file.read(0, columns).equals(expected.select(columns))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))


# ---- errors --------------------------------------------------------------------------------------------------------------


GOOD = written(pa.table({"x": [1, 2], "s": ["a", "b"]}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"a,b\n1,2\n3,4\n5,6\n",
        GOOD[:-1],
        GOOD[1:],
        b"\0" + GOOD,
        GOOD + b"\n",
        GOOD[:-4] + b"PARE",
    ],
    ids=lambda data: f"{data[:4]!r}-{len(data)}",
)
def test_what_lacks_the_magic_at_either_end_is_not_ready(data: bytes) -> None:
    with pytest.raises(NotReady, match=r"f\.parquet"):
        opened(data)


@pytest.mark.parametrize("length", [0, 1, 2**31 - 1, 2**32 - 1, len(GOOD) - 12, len(GOOD)])
def test_a_footer_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(ShardRejected, match=r"f\.parquet: its footer cannot be read"):
        opened(GOOD[:-8] + length.to_bytes(4, "little") + MAGIC)


def test_bad_bytes_raise_the_error_of_whoever_opened_the_file() -> None:
    broken = GOOD[:-8] + b"\xff\xff\xff\x7f" + MAGIC
    for error in (DatasetError, ShardRejected):
        with pytest.raises(error):
            opened(broken, error)


def test_a_file_cut_anywhere_is_not_ready_and_patched_up_it_is_refused() -> None:
    for end in range(len(GOOD)):
        with pytest.raises(NotReady):
            opened(GOOD[:end])
        if end > 4 and GOOD[:end] + MAGIC != GOOD:
            with pytest.raises((NotReady, ShardRejected)):
                read_all(GOOD[:end] + MAGIC)


@pytest.mark.parametrize("error", [DatasetChanged("changed"), Unavailable("no answer"), ShardRejected("outside")])
def test_errors_of_the_store_keep_their_type(error: StorageError) -> None:
    source = Source(GOOD)
    file = opened(source, DatasetError)

    def fails(start: int, length: int) -> bytes:
        raise error

    with pytest.raises(type(error)) as opening:
        ParquetFile("f", len(GOOD), fails, DatasetError)
    file._fetch = fails
    with pytest.raises(type(error)) as reading:
        file.read(0, ["x"])
    assert opening.value is reading.value is error


@pytest.mark.parametrize("columns", [["nope"], ["x", "nope"], ["X"], ["x.y"], [""]])
def test_a_column_that_is_not_there_is_named(columns: list[str]) -> None:
    with pytest.raises(ShardRejected, match=rf"f\.parquet: row group 0.*{columns[-1]}"):
        opened(GOOD).read(0, columns)


def test_a_name_that_occurs_twice_is_refused() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "x", "y"])
    file = opened(written(table))
    with pytest.raises(ShardRejected, match=r"row group 0.*exists 2 times"):
        file.read(0, ["x"])
    assert file.read(0, ["y"]).to_pydict() == {"y": [3]}


def flips(data: bytes, where: Range) -> list[bytes]:
    return [data[:i] + bytes([data[i] ^ (1 << (i % 8))]) + data[i + 1 :] for i in range(*where)]


def test_with_page_checksums_no_flipped_bit_of_the_data_is_believed() -> None:
    table = pa.table({"x": noise(100), "s": [f"v{i % 7}" for i in range(100)]})
    data = written(table, write_page_checksum=True)
    expected = opened(data).read(0, ["x", "s"])
    assert expected.column("x").to_pylist() == table.column("x").to_pylist()
    undetected = []
    for flipped in flips(data, (4, chunk_range(data, 1)[1])):
        try:
            found = opened(flipped).read(0, ["x", "s"])
        except ShardRejected:
            continue
        if not found.equals(expected):
            undetected.append(flipped)
    # What may slip through is the checksum's own presence: a flip in a page header can make it an unknown field.
    assert len(undetected) <= 2


def test_without_checksums_flipped_bits_are_believed_which_is_why_shards_are_known_by_their_sha256() -> None:
    data = written(pa.table({"x": noise(100)}), use_dictionary=False, compression="none")
    _, stop = chunk_range(data, 0)
    for flipped in flips(data, (stop - 100, stop)):
        assert not opened(flipped).read(0, ["x"]).equals(opened(data).read(0, ["x"]))


# ---- bombs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bound is 2 GiB; what it does is seen as well at a hundredth of that."""
    monkeypatch.setattr(parquet, "MAX_DECODED_BYTES", 20_000_000)
    return 20_000_000


def constant(kind: pa.DataType, rows: int, value: object = None) -> pa.Array:
    scalar: Any = pa.scalar(value, kind)
    return pa.repeat(scalar, rows)


@pytest.mark.parametrize(
    "column",
    [
        constant(pa.float64(), 3_000_000, 1.0),
        constant(pa.int64(), 3_000_000),
        constant(pa.int8(), 6_000_000, 1),
        constant(pa.bool_(), 30_000_000, True),
        pa.DictionaryArray.from_arrays(constant(pa.int32(), 6_000_000, 0), pa.array(["x"])),
        pa.array([[1.0] * 3_000_000], pa.list_(pa.float64())),
        pa.FixedSizeListArray.from_arrays(constant(pa.float64(), 3_000_000, 1.0), 100),
        pa.array([b"x" * 1_000] * 30_000, pa.binary(1_000)),
        pa.array(["x" * 30_000_000]),
    ],
    ids=["floats", "nulls", "bytes", "bools", "strings", "one list", "vectors", "fixed binary", "one string"],
)
def test_a_bomb_is_refused_before_it_is_fetched_or_decoded(small_limit: int, column: pa.Array) -> None:
    source = Source(
        written(
            pa.table({"x": column, "y": pa.nulls(len(column))}),
            compression="zstd",
            write_statistics=False,
            row_group_size=2**30,
        )
    )
    assert len(source.data) < 200_000
    file = opened(source)
    source.calls.clear()
    with pytest.raises(
        ShardRejected, match=r"would decode to [\d,]+ bytes, more than 20,000,000; write smaller row groups"
    ):
        file.read(0, ["x"])
    assert source.calls == []


def test_sixty_million_rows_of_one_value_are_refused_by_the_real_limit() -> None:
    column = pa.chunked_array([pa.nulls(1_000_000, pa.float64())] * 60)
    data = written(pa.table(dict.fromkeys("abcde", column)), row_group_size=60_000_000, write_statistics=False)
    assert len(data) < 1_000_000
    file = opened(data)
    assert file.group_rows == [60_000_000]
    before = pa.total_allocated_bytes()
    with pytest.raises(ShardRejected, match=r"would decode to 2,400,000,000 bytes"):
        file.read(0, list("abcde"))
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_a_partition_column_counts_as_well(small_limit: int) -> None:
    data = written(pa.table({"x": pa.nulls(3_000_000)}), row_group_size=2**30)
    with pytest.raises(ShardRejected, match="would decode"):
        opened(data, name="year=2026/f.parquet").read(0, ["year"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.large_binary()])
@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_a_long_string_in_every_row_is_kept_once(small_limit: int, kind: pa.DataType, encoding: str) -> None:
    """100 kB in 1,000 rows are 100 MB, if anyone writes them out."""
    values = pa.array(["x" * 100_000] * 1_000).cast(kind)
    options: dict[str, Any] = (
        {} if encoding == "dictionary" else {"use_dictionary": False, "column_encoding": {"x": encoding}}
    )
    data = written(pa.table({"x": values}), **options)
    assert len(data) < 500_000
    del values
    before = pa.total_allocated_bytes()
    found = opened(data).read(0, ["x"])
    assert found.num_rows == 1_000
    assert len(found.column("x")[999].as_py()) == 100_000
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_prefixes_that_never_repeat_a_string_are_refused_in_time(small_limit: int) -> None:
    values = [f"{'x' * 100_000}{i}" for i in range(1_000)]
    data = written(pa.table({"x": values}), use_dictionary=False, column_encoding={"x": "DELTA_BYTE_ARRAY"})
    assert len(data) < 500_000
    with pytest.raises(ShardRejected, match="x decodes to more than 20,000,000 bytes"):
        opened(data).read(0, ["x"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_binary()])
def test_a_long_string_in_every_list_is_kept_once(small_limit: int, kind: pa.DataType) -> None:
    values = pa.array([["x" * 100_000, None], None, [], ["y"]] * 250, pa.list_(kind))
    data = written(pa.table({"x": values}))
    assert len(data) < 500_000
    expected = values.slice(0, 4).to_pylist()
    del values
    before = pa.total_allocated_bytes()
    found = opened(data).read(0, ["x"])
    assert found.column("x").slice(996, 4).to_pylist() == expected
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_lists_of_delta_encoded_text_are_refused() -> None:
    data = written(
        pa.table({"x": [["a"]]}), use_dictionary=False, column_encoding={"x.list.element": "DELTA_BYTE_ARRAY"}
    )
    with pytest.raises(ShardRejected, match=r"x.list.element holds delta-encoded text in lists"):
        opened(data).read(0, ["x"])


# ---- anything at all -----------------------------------------------------------------------------------------------------


def sample(**options: Any) -> bytes:
    n = 24
    table = pa.table(
        {
            "i": pa.array(range(n)),
            "f": [None if i % 5 == 0 else i / 7 for i in range(n)],
            "s": [None if i % 5 == 0 else f"v{i % 3}" for i in range(n)],
            "v": pa.array([[1.0, 2.0]] * n, pa.list_(pa.float32(), 2)),
            "st": [{"x": i, "y": "a"} for i in range(n)],
            "t": pa.array([datetime(2026, 1, 1)] * n, pa.timestamp("us")),
        }
    )
    return written(table, **options)


SAMPLES: list[Callable[[], bytes]] = [
    lambda: sample(row_group_size=10),
    lambda: sample(compression="zstd", data_page_version="2.0"),
    lambda: sample(compression="none", use_dictionary=False, write_page_checksum=True),
    lambda: sample(use_dictionary=["i"], column_encoding={"f": "BYTE_STREAM_SPLIT", "s": "DELTA_BYTE_ARRAY"}),
    lambda: sample(store_schema=False, write_page_index=True),
]


@settings(max_examples=600, deadline=None, database=None)
@given(st.data())
def mutate_and_read(data: st.DataObject) -> None:
    good = bytearray(data.draw(st.sampled_from(SAMPLES))())
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    first = data.draw(st.sampled_from([0, footer, footer]))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(first, len(good) - 1))
        new = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x80\x01"])))
        good[at : at + data.draw(st.sampled_from([0, 1, len(new), 9]))] = new
    if data.draw(st.booleans()):
        good[:4] = good[-4:] = MAGIC
    with contextlib.suppress(NotReady, ShardRejected):
        read_all(bytes(good))


def run_apart(code: str) -> None:
    """In a process of its own: what is looked for may end the process.

    It ends without the interpreter's own end, in which Arrow's threads, on a busy machine, may still be at work and abort.
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", f"{code}; import os; os._exit(0)"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5_000:]


@pytest.mark.slow
def test_no_mutation_of_a_file_raises_anything_but_the_stated_errors() -> None:
    run_apart("from tests.storage.test_parquet import mutate_and_read; mutate_and_read()")


def contradiction() -> bytes:
    """A column that may be null, of which the footer says that it may not: its histogram of levels is too long then."""
    data = bytearray(written(pa.table({"x": [1, None]}), store_schema=False))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    optional = data.index(b"\x25\x02\x18\x01x", footer)  # repetition_type (1 in zigzag: OPTIONAL), then name "x"
    data[optional + 1] = 0
    return bytes(data)


def refuse_contradiction() -> None:
    with pytest.raises(ShardRejected, match="histogram size mismatch"):
        read_all(contradiction())


def test_a_footer_that_contradicts_itself_is_refused_and_does_not_end_the_process() -> None:
    """In pyarrow, `row_group(0).column(0)` calls `std::terminate` for this file."""
    run_apart("from tests.storage.test_parquet import refuse_contradiction; refuse_contradiction()")


# ---- what writers do ---------------------------------------------------------------------------------------------------


class Keys(encryption.KmsClient):
    """Keys that are no secret."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


def encrypted(*, plaintext_footer: bool) -> bytes:
    table, sink = pa.table({"secret": [1.0], "plain": [2.0]}), io.BytesIO()
    factory = encryption.CryptoFactory(lambda settings: Keys())
    how = encryption.EncryptionConfiguration("key", column_keys={"key": ["secret"]}, plaintext_footer=plaintext_footer)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    with pq.ParquetWriter(sink, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_an_encrypted_file_is_told_as_such() -> None:
    with pytest.raises(ShardRejected, match=r"f\.parquet is encrypted, and Tidemill has no keys: write it without"):
        opened(encrypted(plaintext_footer=False))


def test_encrypted_columns_are_told_as_such_and_the_others_are_read() -> None:
    file = opened(encrypted(plaintext_footer=True))
    assert file.read(0, ["plain"]).to_pydict() == {"plain": [2.0]}
    with pytest.raises(ShardRejected, match="row group 0 has encrypted columns, and Tidemill has no keys"):
        file.read(0, ["secret"])


@pytest.mark.parametrize("zone", [None, "Europe/Paris"])
@pytest.mark.parametrize("store_schema", [True, False])
def test_old_timestamps_of_96_bits_reach_from_the_year_1_to_9999(zone: str | None, store_schema: bool) -> None:
    times = [dt.datetime(2020, 1, 1), dt.datetime(9999, 12, 31), dt.datetime(1, 1, 1), None]
    table = pa.table({"x": pa.array(times, pa.timestamp("us", zone))})
    found = opened(written(table, use_deprecated_int96_timestamps=True, store_schema=store_schema)).read(0, ["x"])
    assert (
        found.column("x").cast(pa.timestamp("us")).to_pylist() == table.column("x").cast(pa.timestamp("us")).to_pylist()
    )


def test_json_is_read_as_text_that_keeps_each_value_once() -> None:
    texts = pa.array(['{"a": "' + "x" * 10_000 + '"}'] * 1_000)
    column = pa.ExtensionArray.from_storage(pa.json_(), texts)
    for store_schema in (True, False):
        table = opened(written(pa.table({"x": column}), store_schema=store_schema)).read(0, ["x"])
        assert table.column("x").type == pa.dictionary(pa.int32(), pa.string())
        assert table.nbytes < 100_000
        assert table.column("x").to_pylist() == texts.to_pylist()


# ---- many small row groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [{}, {"use_dictionary": False, "column_encoding": {"s": "DELTA_BYTE_ARRAY"}}])
def test_many_small_row_groups_are_read_as_few(encoding: dict[str, Any]) -> None:
    if encoding:
        encoding = {"use_dictionary": False, "column_encoding": {"s": "DELTA_BYTE_ARRAY", "x": "PLAIN"}}
    table = pa.table({"x": range(3_000), "s": [str(i % 7) for i in range(3_000)]})
    groups = row_groups(opened(written(table, row_group_size=1, **encoding)))
    assert [(group.name, group.num_rows) for group in groups] == [
        ("f.parquet row groups 0 to 1023", 1024),
        ("f.parquet row groups 1024 to 2047", 1024),
        ("f.parquet row groups 2048 to 2999", 952),
    ]
    for _ in range(2):  # the second time, what was found out is known
        tables = [group.read(["s", "x"]) for group in groups]
        assert pa.concat_tables(tables).to_pydict() == table.select(["s", "x"]).to_pydict()


def test_lists_of_text_with_a_dictionary_for_each_row_group_are_read_together() -> None:
    table = pa.table({"x": [[f"v{i % 9}", f"v{i % 7}"] if i % 5 else None for i in range(500)]})
    (group,) = row_groups(opened(written(table, row_group_size=3)))
    assert group.num_rows == 500
    assert group.read(["x"]).column("x").combine_chunks().to_pylist() == table.column("x").to_pylist()


def test_row_groups_that_are_few_or_large_keep_to_themselves() -> None:
    table = pa.table({"x": range(64 * 2)})
    assert len(row_groups(opened(written(table, row_group_size=2)))) == 64
    table = pa.table({"x": range(66 * 1024)})
    assert len(row_groups(opened(written(table, row_group_size=1024)))) == 66


def test_joined_row_groups_are_bounded_in_bytes_too() -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    table = pa.table({"x": [noise[i:] for i in range(66)]})
    sizes = [group.num_rows for group in row_groups(opened(written(table, row_group_size=1)))]
    assert set(sizes) <= {9, 10, 66 % 10}
    assert sum(sizes) == 66


def test_a_file_of_row_groups_without_rows_has_none() -> None:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, pa.schema([("x", pa.int64())])) as writer:
        for i in range(100):
            writer.write_table(pa.table({"x": pa.array([] if i % 50 else [i], pa.int64())}))
    groups = row_groups(opened(sink.getvalue()))
    assert [group.read(["x"]).column("x").to_pylist() for group in groups] == [[0, 50]]

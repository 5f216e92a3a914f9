"""Parquet files as row groups: the unit in which Tidemill reads, whether from a dataset or from a shard.

A row group knows its name, its rows and its schema, and reads just the column chunks that it is asked for. Every byte
comes through a `fetch` that pins the object's etag, and decoding never calls the store: a storage error keeps its own type.
"""

import contextlib
import io
import mmap
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tidemill.storage.errors import NotReady, StorageError
from tidemill.storage.pages import decoded_bytes
from tidemill.storage.parallel import concurrently

MAGIC = b"PAR1"
MAX_DECODED_BYTES = 2 * 2**30
"""The most that one row group may expand to. A file of 700 kB can claim 100 million rows; without a bound it takes all memory."""

_FOOTER_GUESS = 64 * 1024
_COALESCE_GAP = 256 * 1024  # reading this much for nothing is cheaper than another request
_COALESCED_BYTES = 32 * 2**20  # as Arrow does: then several requests at once are faster than a larger one
_KEPT_BYTES = 64 * 2**20  # of what was found out about row groups: 190,000 of them, if each is one range
_ENTRY_BYTES = 176  # of one of them besides its ranges and names, measured
_WIDTH = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
_DELTA = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}


class Fetch(Protocol):
    """Read exactly `length` bytes from `start` of one pinned object."""

    def __call__(self, start: int, length: int) -> bytes: ...


class RangesFile(io.RawIOBase):
    """A read-only file over byte ranges fetched beforehand; what lies outside of them is fetched when asked for."""

    def __init__(self, size: int, fetch: Fetch) -> None:
        self._size, self._fetch, self._at = size, fetch, 0
        self._starts: list[int] = []
        self._chunks: list[memoryview] = []

    def load(self, ranges: Sequence[tuple[int, int]], concurrency: int) -> None:
        """Fetch [start, stop) ranges, each by one request, with so many requests under way. They are in order and apart."""
        chunks = concurrently(lambda wanted: self._fetch(wanted[0], wanted[1] - wanted[0]), ranges, concurrency)
        for (start, _), chunk in zip(ranges, chunks, strict=True):
            self.hold(start, chunk)

    def hold(self, start: int, data: bytes) -> None:
        """Keep bytes that lie after all that are held already."""
        self._starts.append(start)
        self._chunks.append(memoryview(data))

    def read(self, size: int | None = -1) -> Any:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        start, self._at = self._at, max(self._at, end)
        i = bisect_right(self._starts, start) - 1
        if i >= 0 and end - self._starts[i] <= len(self._chunks[i]):
            return self._chunks[i][start - self._starts[i] : end - self._starts[i]]
        return self._fetch(start, end - start) if end > start else b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError(f"offset {at} lies before the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file. Cheap to hold: the footer and the bytes are fetched again when it is read."""

    name: str
    """`<file> row group <i>`: names it in messages, and the same data has the same name in every run."""
    file: str
    """Key of the file."""
    num_rows: int
    schema: pa.Schema
    """Of the whole file, hive partition columns included."""
    readers: int
    """How many row groups from the same store are worth reading at once."""
    _open: Callable[[], "ParquetFile"]
    _index: int

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns, in this order, strings dictionary-encoded; `num_rows` rows. Threads may read at once.

        Raises:
            The file's own error (DatasetError or ShardRejected) when its bytes do not decode.
        """
        return self._open().read(self._index, columns)


@dataclass(frozen=True, slots=True)
class _Checked:
    """What was found out about some columns of one row group when they were read for the first time."""

    bounds: "array[int]"
    """Start and stop of each range."""
    delta: dict[str, int]
    """Strings that Arrow cannot decode into dictionaries by itself, with their encoded bytes."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds[::2], self.bounds[1::2], strict=True))


class Findings:
    """What was found out about files when they were read for the first time, for when they are opened again: the bytes are
    pinned. What it keeps of row groups is bounded. Threads may share it.
    """

    def __init__(self) -> None:
        self.footers: dict[str, int] = {}
        """Bytes of the footer of each file that is whole and Parquet."""
        self._checked: dict[tuple[str, ...], dict[tuple[str, int], _Checked]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def checked(self, columns: tuple[str, ...], file: str, index: int) -> _Checked | None:
        return self._checked.get(columns, {}).get((file, index))

    def keep(self, columns: tuple[str, ...], file: str, index: int, checked: _Checked) -> None:
        """Keeps it if there is room: each pass reads all row groups, so the first are as good as the last."""
        with self._lock:
            if self._bytes < _KEPT_BYTES:
                self._bytes += _ENTRY_BYTES + sys.getsizeof(checked.bounds) + sys.getsizeof(checked.delta)
                self._checked.setdefault(columns, {})[file, index] = checked


@dataclass(frozen=True)
class _Selection:
    """Some columns of a file."""

    stored: list[str]
    added: list[str]
    """Those that the file's path adds."""
    leaves: list[int]
    strings: list[str]
    """Paths of the leaves that are text or bytes."""


class ParquetFile:
    """An open Parquet file: footer parsed, nothing decoded yet."""

    def __init__(
        self,
        name: str,
        size: int,
        fetch: Fetch,
        error: type[StorageError],
        partitions: Mapping[str, "pa.Scalar[Any]"] | None = None,
        concurrency: int = 1,
        readers: int = 1,
        findings: Findings | None = None,
    ) -> None:
        """`error` is what bad bytes raise; `partitions` are constant columns that the file's path adds; `concurrency` and
        `readers` are those of the `Store` that `fetch` calls; `findings` is what is known of a dataset's files, and learns.

        Raises:
            NotReady: the magic bytes are missing at either end: not a Parquet file, or not a whole one yet.
        """
        self.name, self._error, self._partitions = name, error, partitions or {}
        self._concurrency, self.readers = concurrency, readers
        self._selections: dict[tuple[str, ...], _Selection] = {}
        if size < 12:
            raise NotReady(f"{name} has {size} bytes; no Parquet file is that short.")
        self._findings = findings or Findings()
        known = self._findings.footers.get(name)
        held = min(size, max(_FOOTER_GUESS, known or 0))
        tail = fetch(size - held, held)
        begins = known is not None or (tail[:4] if held == size else fetch(0, 4)) == MAGIC
        if not begins or tail[-4:] != MAGIC:
            raise NotReady(f"{name} does not begin and end with {MAGIC.decode()}: not Parquet, or not fully written.")
        footer = int.from_bytes(tail[-8:-4], "little") + 8
        self._size, self._fetch = size, fetch
        with self._decoding("its footer"):
            if footer > size - 4:
                raise ValueError(f"the footer claims {footer} bytes in a file of {size}")
            self._metadata = pq.read_metadata(_stream(self._file(size - len(tail), tail)))
            # Not `metadata.schema`: the two would refer to each other, and footers wait for the garbage collector.
            self._leaves = pq.ParquetSchema(self._metadata)
            # Dictionaries keep a repeated string once; expanded it would cost its length for every row.
            self._strings = _string_leaves(self._leaves)
            self.schema: pa.Schema = self._parquet(self._file(), self._strings).schema_arrow
            self._stored = frozenset(self.schema.names)
            for column, value in self._partitions.items():
                if column not in self._stored:
                    self.schema = self.schema.append(pa.field(column, value.type))
            self.group_rows = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
            if min(self.group_rows, default=0) < 0:
                raise ValueError("it claims a negative number of rows")
        self._findings.footers[name] = footer

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Decode the named columns of one row group. Nothing of them stays in memory here."""
        with self._decoding(f"row group {index}"):
            names = tuple(columns)
            chosen, checked = self._selected(names), self._findings.checked(names, self.name, index)
            file = self._file()
            if checked is None:
                checked = self._checked(index, chosen, file)
                self._findings.keep(names, self.name, index, checked)
            else:
                file.load(checked.ranges, self._concurrency)
            parquet = self._parquet(file, [c for c in chosen.strings if c not in checked.delta])
            table = parquet.read_row_group(index, columns=[c for c in chosen.stored if c not in checked.delta])
            if table.num_rows != self.group_rows[index]:
                raise ValueError(f"{table.num_rows} rows where the footer says {self.group_rows[index]}")
            for column, size in checked.delta.items():
                table = table.append_column(self.schema.field(column), self._delta(parquet, index, column, size))
            for column in chosen.added:
                value: Any = self._partitions[column]
                table = table.append_column(self.schema.field(column), pa.repeat(value, table.num_rows))
            return table.select(list(columns))

    def _selected(self, columns: tuple[str, ...]) -> "_Selection":
        if (chosen := self._selections.get(columns)) is None:
            wanted, schema = self._stored.intersection(columns), self._leaves
            chosen = self._selections[columns] = _Selection(
                stored=sorted(wanted),
                added=[c for c in dict.fromkeys(columns) if c not in self._stored and c in self._partitions],
                leaves=[i for i in range(len(schema)) if _is_below(schema.column(i).path, wanted)],
                strings=[c for c in self._strings if _is_below(c, wanted)],
            )
        return chosen

    def _checked(self, index: int, chosen: "_Selection", file: RangesFile) -> "_Checked":
        """Fetches what `chosen` has in a row group into `file`, and makes sure that it can be decoded in bounded memory."""
        # Before any look at `row_group(index).column(i)`, which ends the whole process if the footer contradicts itself: Arrow
        # makes an ordinary exception of the same mistake when it is asked for the ranges.
        ranges = list(_coalesced(self._ranges(index, chosen.leaves))) if chosen.leaves else []
        schema, group = self._leaves, self._metadata.row_group(index)
        decoded, delta = 8 * group.num_rows * len(chosen.added), dict[str, int]()
        for i in chosen.leaves:
            chunk, leaf = group.column(i), schema.column(i)
            width = _WIDTH.get(leaf.physical_type) or int(leaf.length or 0)
            decoded += max(chunk.num_values * width, group.num_rows * width, chunk.total_uncompressed_size)
            if leaf.path in self._strings and _DELTA.intersection(chunk.encodings):
                if leaf.path not in chosen.stored:
                    raise ValueError(f"{leaf.path} holds delta-encoded text in lists; write it with dictionaries")
                delta[leaf.path] = chunk.total_uncompressed_size
        _refuse_beyond_bound(decoded)
        file.load(ranges, self._concurrency)
        decoded += sum(self._hidden(file, index, i) for i in chosen.leaves)
        _refuse_beyond_bound(decoded)
        return _Checked(array("q", chain.from_iterable(ranges)), delta)

    def _ranges(self, index: int, leaves: list[int]) -> list[tuple[int, int]]:
        """What Arrow will read to decode these columns: it opens them on a file of zeros that notes what is asked for."""
        ranges: list[tuple[int, int]] = []

        def note(start: int, length: int) -> Any:
            ranges.append((start, start + length))
            return memoryview(mmap.mmap(-1, length))  # zeros that cost no memory as long as nobody looks at them

        for _ in self._parquet(RangesFile(self._size, note), []).reader.iter_batches(0, [index], leaves, False):
            pass  # batches of no rows: nothing is decoded
        return ranges

    def _hidden(self, file: RangesFile, index: int, leaf: int) -> int:
        """How many more bytes the pages of a column have than the footer says. Arrow believes each page, not the footer."""
        chunk = self._metadata.row_group(index).column(leaf)
        offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
        file.seek(min(offset for offset in offsets if offset))
        data = file.read(chunk.total_compressed_size)
        return max(0, decoded_bytes(data, chunk.num_values) - max(0, chunk.total_uncompressed_size))

    def _delta(self, parquet: pq.ParquetFile, index: int, column: str, size: int) -> "pa.ChunkedArray[Any]":
        """A string column that Arrow cannot decode into a dictionary by itself.

        A string may be stored as "like the one before", so `size`, its encoded bytes, bounds one value, not all: it is decoded
        in pieces that fit in memory even if every value is that long.
        """
        kind = self.schema.field(column).type
        rows = min(65_536, max(1, MAX_DECODED_BYTES // max(1, size)))
        pieces, decoded = [], 0
        for batch in parquet.iter_batches(rows, row_groups=[index], columns=[column]):
            pieces.append(batch.column(column).cast(kind.value_type).dictionary_encode())
            decoded += pieces[-1].nbytes
            if decoded > MAX_DECODED_BYTES:
                raise ValueError(f"{column} decodes to more than {MAX_DECODED_BYTES:,} bytes; write smaller row groups")
        return pa.chunked_array(pieces, kind)

    def _file(self, start: int = 0, held: bytes = b"") -> RangesFile:
        file = RangesFile(self._size, self._fetch)
        file.hold(start, held)
        return file

    def _parquet(self, file: RangesFile, dictionaries: list[str]) -> pq.ParquetFile:
        return pq.ParquetFile(
            _stream(file), metadata=self._metadata, read_dictionary=dictionaries, page_checksum_verification=True
        )

    @contextlib.contextmanager
    def _decoding(self, part: str) -> Iterator[None]:
        """Whatever Arrow says about bad bytes becomes one error that names the file."""
        try:
            yield
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
            raise self._error(f"{self.name}: {part} cannot be read: {error}") from error


def row_groups(file: ParquetFile, reopen: Callable[[], ParquetFile] | None = None) -> list[RowGroup]:
    """The row groups of a file that have rows. They read through `reopen()`, or through `file` itself, which they then keep."""
    source = reopen or (lambda: file)
    return [
        RowGroup(f"{file.name} row group {i}", file.name, rows, file.schema, file.readers, source, i)
        for i, rows in enumerate(file.group_rows)
        if rows
    ]


def _stream(file: RangesFile) -> IO[bytes]:
    return cast(IO[bytes], file)  # it has all that Arrow calls of it


def _refuse_beyond_bound(decoded: int) -> None:
    if decoded > MAX_DECODED_BYTES:
        raise ValueError(
            f"it would decode to {decoded:,} bytes, more than {MAX_DECODED_BYTES:,}; write smaller row groups"
        )


def _is_below(path: str, columns: Collection[str]) -> bool:
    """True if a leaf of the schema belongs to one of the columns, whose names may have dots of their own."""
    parts = path.split(".")
    return any(".".join(parts[:i]) in columns for i in range(1, len(parts) + 1))


def _string_leaves(schema: pq.ParquetSchema) -> list[str]:
    """Paths of the columns of text and bytes, those inside of lists included."""
    plain = {field.name for field in schema.to_arrow_schema() if _is_string(field.type)}
    leaves = [schema.column(i) for i in range(len(schema))]
    return [
        leaf.path
        for leaf in leaves
        if leaf.path in plain
        or (leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL")
    ]


def _is_string(kind: pa.DataType) -> bool:
    types = pa.types
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return texts or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _coalesced(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges. Those are joined that overlap, or lie at most `_COALESCE_GAP` apart and have `_COALESCED_BYTES` together."""
    begin, end = -1, -1
    for start, stop in sorted(ranges):
        small = start <= end + _COALESCE_GAP and stop - begin <= _COALESCED_BYTES
        if begin >= 0 and (start < end or small):  # a footer that lies may have many columns share the same bytes
            end = max(end, stop)
            continue
        if begin >= 0:
            yield begin, end
        begin, end = start, stop
    if begin >= 0:
        yield begin, end

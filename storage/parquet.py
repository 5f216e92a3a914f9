"""Parquet files as row groups: the unit in which Tidemill reads, whether from a dataset or from a shard.

A row group knows its name, its rows and its schema, and reads just the column chunks that it is asked for. Every byte
comes through a `fetch` that pins the object's etag, and decoding never calls the store: a storage error keeps its own type.
"""

import contextlib
import hashlib
import mmap
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import IO, Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tidemill.storage.bounds import bounds
from tidemill.storage.conditions import Bounds
from tidemill.storage.errors import NotReady, StorageError
from tidemill.storage.leaves import is_below, string_leaves
from tidemill.storage.pages import decoded_bytes
from tidemill.storage.partitions import MARK, partitions
from tidemill.storage.ranges import Fetch, RangesFile, coalesced

MAGIC: Final = b"PAR1"
ENCRYPTED: Final = b"PARE"
"""The magic bytes of a file whose footer is encrypted."""
MAX_DECODED_BYTES: Final = 2 * 2**30
"""The most that one row group may expand to. A file of 700 kB can claim 100 million rows; without a bound it takes all memory."""

_MANY_GROUPS: Final = 64
"""A file of more row groups than this has neighbours joined, up to `_JOINED_ROWS` and `_JOINED_BYTES`. Each row group costs about
as much as a thousand rows, so that a file of one row each would cost a thousand times what its rows cost."""
_JOINED_ROWS: Final = 1024
_JOINED_BYTES: Final = 2**20  # uncompressed, as the footer says
_FOOTER_GUESS: Final = 64 * 1024
_KEPT_BYTES: Final = 64 * 2**20  # of what was found out about row groups: 190,000 of them, if each is one range
_ENTRY_BYTES: Final = 176  # of one of them besides its ranges and names, measured
_WIDTH: Final = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
_DELTA: Final = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file, or neighbours of few rows. Cheap to hold: footer and bytes are fetched again when it is read."""

    name: str
    """`<file> row group <i>`, or `<file> row groups <i> to <j>`: names it in messages, and the same data has the same name in
    every run."""
    file: str
    """Key of the file."""
    num_rows: int
    schema: pa.Schema
    """Of the whole file, hive partition columns included."""
    readers: int
    """How many row groups from the same store are worth reading at once."""
    _open: Callable[[], "ParquetFile"]
    _index: int
    _count: int

    def start(self, file: "ParquetFile") -> int:
        """How many rows of its file, which is open, come before it."""
        return sum(file.group_rows[: self._index])

    def bounds(self, file: "ParquetFile", column: str) -> Bounds:
        """What the footer of its file, which is open, says of the values of a column."""
        return file.bounds(range(self._index, self._index + self._count), column)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns, in this order, strings dictionary-encoded; `num_rows` rows. Threads may read at once.

        Raises:
            The file's own error (DatasetError or ShardRejected) when its bytes do not decode.
        """
        return self._open().read(self._index, columns, self._count)


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
        error: Callable[[str], StorageError],
        types: Mapping[str, pa.DataType] | None = None,
        concurrency: int = 1,
        readers: int = 1,
        findings: Findings | None = None,
        whole: bytes | None = None,
        folders: bool = True,
    ) -> None:
        """Fetch and parse the footer.

        Args:
            name: Key of the file, for messages.
            size: Bytes.
            fetch: Reads bytes of the file.
            error: Makes an error of a message that begins with the name; it is raised for bad bytes.
            types: Types of the partition columns that the folders of the name add, where they are known (`partitions`).
            concurrency, readers: Of the `Store` that `fetch` calls.
            findings: What is known of a dataset's files; it learns.
            folders: Whether the folders of the name add columns.
            whole: All of the file where it is in memory: Arrow then reads it there, and nothing is fetched.

        Raises:
            NotReady: the magic bytes are missing at either end: not a Parquet file, or not a whole one yet.
            `error`: the file is encrypted, or its footer does not parse.
        """
        self.name, self._error = name, error
        self._concurrency, self.readers = concurrency, readers
        self._selections: dict[tuple[str, ...], _Selection] = {}
        if size < 12:
            raise NotReady(f"{name} has {size} bytes; no Parquet file is that short.")
        self._findings = findings or Findings()
        known = self._findings.footers.get(name)
        held = min(size, max(_FOOTER_GUESS, known or 0))
        tail = fetch(size - held, held)
        head = MAGIC if known is not None else tail[:4] if held == size else fetch(0, 4)
        if head == tail[-4:] == ENCRYPTED:
            raise error(f"{name} is encrypted, and Tidemill has no keys: write it without Parquet encryption")
        if head != MAGIC or tail[-4:] != MAGIC:
            raise NotReady(f"{name} does not begin and end with {MAGIC.decode()}: not Parquet, or not fully written.")
        footer = int.from_bytes(tail[-8:-4], "little") + 8
        self._size, self._fetch, self._whole = size, fetch, whole
        with self._decoding("its footer"):
            if footer > size - 4:
                raise ValueError(f"the footer claims {footer} bytes in a file of {size}")
            if footer > len(tail):
                tail = fetch(size - footer, footer - len(tail)) + tail
            self.footer_sha256 = hashlib.sha256(tail[-footer:]).hexdigest()
            """Of what the file says of its columns: their sizes, places and, mostly, least and greatest values."""
            self._metadata = pq.read_metadata(self._stream(self._file(size - len(tail), tail)))
            # Not `metadata.schema`: the two would refer to each other, and footers wait for the garbage collector.
            self._leaves = pq.ParquetSchema(self._metadata)
            # Dictionaries keep a repeated string once; expanded it would cost its length for every row.
            self._strings = string_leaves(self._leaves)
            self.schema: pa.Schema = self._parquet(self._file(), self._strings).schema_arrow
            self._stored = frozenset(self.schema.names)
            self.group_rows = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
            if min(self.group_rows, default=0) < 0:
                raise ValueError("it claims a negative number of rows")
        try:
            self._partitions = partitions(name, types or {}, self._stored) if folders else {}
        except ValueError as bad:
            raise error(f"{name}: {bad}; move it to another folder") from bad
        for column, value in self._partitions.items():
            self.schema = self.schema.append(pa.field(column, value.type, metadata=MARK))
        self._findings.footers[name] = footer

    def read(self, index: int, columns: Sequence[str], count: int = 1) -> pa.Table:
        """Decode the named columns of `count` neighbouring row groups. Nothing of them stays in memory here."""
        indices = range(index, index + count)
        with self._decoding(_named(indices)):
            names = tuple(columns)
            chosen, checked = self._selected(names), self._findings.checked(names, self.name, indices.start)
            file = self._file()
            if checked is None:
                checked = self._check(indices, chosen, file)
                self._findings.keep(names, self.name, indices.start, checked)
            else:
                file.load(checked.ranges, self._concurrency)
            parquet = self._parquet(file, [c for c in chosen.strings if c not in checked.delta])
            columns_read = [c for c in chosen.stored if c not in checked.delta]
            if len(indices) > 1 and any(c not in self._stored for c in chosen.strings):
                # Arrow joins no lists of text that have a dictionary for each row group.
                table = pa.concat_tables([parquet.read_row_groups([i], columns=columns_read) for i in indices])
            else:
                table = parquet.read_row_groups(list(indices), columns=columns_read)
            rows = sum(self.group_rows[i] for i in indices)
            if table.num_rows != rows:
                raise ValueError(f"{table.num_rows} rows where the footer says {rows}")
            for column, size in checked.delta.items():
                table = table.append_column(self.schema.field(column), self._delta(parquet, indices, column, size))
            for column in chosen.added:
                value: Any = self._partitions[column]
                table = table.append_column(column, pa.repeat(value, table.num_rows))
            return table.select(list(columns))

    def bounds(self, indices: range, column: str) -> Bounds:
        """What the footer says of the values of a column in row groups; nothing of one that holds lists."""
        leaves = [i for i in self._selected((column,)).leaves if self._leaves.column(i).path == column]
        if len(leaves) != 1 or self._leaves.column(leaves[0]).max_repetition_level:
            return Bounds()
        with self._decoding(_named(indices)):
            self._ranges(indices, leaves)  # as in `_check`: before any look at a column
            return bounds(self._metadata, indices, leaves[0], self.schema.field(column).type)

    def neighbours(self) -> Iterator[range]:
        """The row groups, those joined that are read together."""
        many, start, rows, size = len(self.group_rows) > _MANY_GROUPS, 0, 0, 0
        for i, more in enumerate(self.group_rows):
            more_bytes = self._metadata.row_group(i).total_byte_size if many else 0
            if i > start and not (many and rows + more <= _JOINED_ROWS and size + more_bytes <= _JOINED_BYTES):
                yield range(start, i)
                start, rows, size = i, 0, 0
            rows, size = rows + more, size + more_bytes
        if self.group_rows:
            yield range(start, len(self.group_rows))

    def _selected(self, columns: tuple[str, ...]) -> "_Selection":
        if (chosen := self._selections.get(columns)) is None:
            wanted, schema = self._stored.intersection(columns), self._leaves
            chosen = self._selections[columns] = _Selection(
                stored=sorted(wanted),
                added=[c for c in dict.fromkeys(columns) if c in self._partitions],
                leaves=[i for i in range(len(schema)) if is_below(schema.column(i).path, wanted)],
                strings=[c for c in self._strings if is_below(c, wanted)],
            )
        return chosen

    def _check(self, indices: range, chosen: "_Selection", file: RangesFile) -> "_Checked":
        """Fetches what `chosen` has in row groups into `file`, and makes sure that it can be decoded in bounded memory."""
        # Before any look at `row_group(index).column(i)`, which ends the whole process if the footer contradicts itself: Arrow
        # makes an ordinary exception of the same mistake when it is asked for the ranges.
        ranges = list(coalesced(self._ranges(indices, chosen.leaves))) if chosen.leaves else []
        decoded, delta = 8 * sum(self.group_rows[i] for i in indices) * len(chosen.added), dict[str, int]()
        chunks = []
        for index, i in product(indices, chosen.leaves):
            group, leaf = self._metadata.row_group(index), self._leaves.column(i)
            chunk, width = group.column(i), _WIDTH.get(leaf.physical_type) or int(leaf.length or 0)
            chunks.append(chunk)
            decoded += max(chunk.num_values * width, group.num_rows * width, chunk.total_uncompressed_size)
            if leaf.path in self._strings and _DELTA.intersection(chunk.encodings):
                if leaf.path not in chosen.stored:
                    raise ValueError(f"{leaf.path} holds delta-encoded text in lists; write it with dictionaries")
                delta[leaf.path] = delta.get(leaf.path, 0) + chunk.total_uncompressed_size
        _refuse_beyond_bound(decoded)
        file.load(ranges, self._concurrency)
        decoded += sum(_hidden(file, chunk) for chunk in chunks)
        _refuse_beyond_bound(decoded)
        return _Checked(array("q", chain.from_iterable(ranges)), delta)

    def _ranges(self, indices: range, leaves: list[int]) -> list[tuple[int, int]]:
        """What Arrow will read to decode these columns, where it is not in memory: it opens them on a file of zeros that notes
        what is asked for."""
        ranges: list[tuple[int, int]] = []

        def note(start: int, length: int) -> Any:
            ranges.append((start, start + length))
            return memoryview(mmap.mmap(-1, length))  # zeros that cost no memory as long as nobody looks at them

        for _ in self._parquet(RangesFile(self._size, note), []).reader.iter_batches(0, list(indices), leaves, False):
            pass  # batches of no rows: nothing is decoded
        return ranges

    def _delta(self, parquet: pq.ParquetFile, indices: range, column: str, size: int) -> "pa.ChunkedArray[Any]":
        """A string column that Arrow cannot decode into a dictionary by itself.

        A string may be stored as "like the one before", so `size`, its encoded bytes, bounds one value, not all: it is decoded
        in pieces that fit in memory even if every value is that long.
        """
        kind = self.schema.field(column).type
        rows = min(65_536, max(1, MAX_DECODED_BYTES // max(1, size)))
        pieces, decoded = [], 0
        for batch in parquet.iter_batches(rows, row_groups=list(indices), columns=[column]):
            pieces.append(batch.column(column).cast(kind.value_type).dictionary_encode())
            decoded += pieces[-1].nbytes
            if decoded > MAX_DECODED_BYTES:
                raise ValueError(f"{column} decodes to more than {MAX_DECODED_BYTES:,} bytes; write smaller row groups")
        return pa.chunked_array(pieces, kind)

    def _file(self, start: int = 0, held: bytes = b"") -> RangesFile:
        file = RangesFile(self._size, self._fetch)
        if self._whole is None:
            file.hold(start, held)
        else:
            file.hold(0, self._whole)
        return file

    def _stream(self, file: RangesFile) -> IO[bytes]:
        """What Arrow reads: the file, which has all that it calls; the bytes themselves, without a call, if all are in memory."""
        return cast(IO[bytes], file if self._whole is None else pa.BufferReader(self._whole))

    def _parquet(self, file: RangesFile, dictionaries: list[str]) -> pq.ParquetFile:
        options: dict[str, Any] = {
            "arrow_extensions_enabled": False
        }  # or JSON would be no dictionary; the stubs lack it
        return pq.ParquetFile(
            self._stream(file),
            metadata=self._metadata,
            read_dictionary=dictionaries,
            page_checksum_verification=True,
            coerce_int96_timestamp_unit="us",  # nanoseconds end in 2262, and Spark's "no end" is the year 9999
            **options,
        )

    @contextlib.contextmanager
    def _decoding(self, part: str) -> Iterator[None]:
        """Whatever Arrow says about bad bytes becomes one error that names the file."""
        try:
            yield
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
            if "decrypt" in str(error):
                raise self._error(
                    f"{self.name}: {part} has encrypted columns, and Tidemill has no keys: write them without Parquet encryption"
                ) from error
            raise self._error(f"{self.name}: {part} cannot be read: {error}") from error


def row_groups(file: ParquetFile, reopen: Callable[[], ParquetFile] | None = None) -> list[RowGroup]:
    """The row groups of a file that have rows. They read through `reopen()`, or through `file` itself, which they then keep.

    Of a file with more than `_MANY_GROUPS`, small neighbours are joined.
    """
    source = reopen or (lambda: file)
    found = []
    for indices in file.neighbours():
        if rows := sum(file.group_rows[i] for i in indices):
            name = f"{file.name} {_named(indices)}"
            found.append(
                RowGroup(name, file.name, rows, file.schema, file.readers, source, indices.start, len(indices))
            )
    return found


def _named(indices: range) -> str:
    return f"row group {indices[0]}" if len(indices) == 1 else f"row groups {indices[0]} to {indices[-1]}"


def _hidden(file: RangesFile, chunk: pq.ColumnChunkMetaData) -> int:
    """How many more bytes the pages of a column have than the footer says. Arrow believes each page, not the footer."""
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    file.seek(min(offset for offset in offsets if offset))
    data = file.read(chunk.total_compressed_size)
    return max(0, decoded_bytes(data, chunk.num_values) - max(0, chunk.total_uncompressed_size))


def _refuse_beyond_bound(decoded: int) -> None:
    if decoded > MAX_DECODED_BYTES:
        raise ValueError(
            f"it would decode to {decoded:,} bytes, more than {MAX_DECODED_BYTES:,}; write smaller row groups"
        )

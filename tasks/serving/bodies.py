"""Bodies of requests: from bytes that anybody may have sent to rows."""

import struct
from collections import Counter
from typing import Any, Final

import orjson
import pyarrow as pa

from tidemill.storage.errors import DatasetError, StorageError
from tidemill.storage.parquet import ParquetFile
from tidemill.tasks.serving.errors import Refused

JSON: Final = "application/json"
ARROW: Final = "application/vnd.apache.arrow.stream"
PARQUET: Final = "application/vnd.apache.parquet"
KINDS: Final = (JSON, ARROW, PARQUET)

Row = dict[str, Any]


def rows_of(body: bytes, kind: str, columns: list[str], most: int) -> list[Row] | pa.Table:
    """The rows of a body, of a table only the columns that are asked for and there; 1 to `most`.

    Args:
        body: The bytes.
        kind: One of `KINDS`.
        columns: Names of the columns that the model takes.
        most: How many rows a request may have.

    Raises:
        Refused: 400: the bytes are not what they should be. 413: too many rows. 422: what JSON holds is no row, or there is none.
    """
    if kind == JSON:
        return _json(body, most)
    try:
        table = _arrow(body, columns, most) if kind == ARROW else _parquet(body, columns, most)
    except (pa.ArrowException, StorageError, ValueError, OSError, struct.error, IndexError) as error:
        raise Refused(400, f"the body is no {kind}: {error}") from error
    if not table.num_rows:
        raise Refused(422, "the body holds no rows")
    return table


def _json(body: bytes, most: int) -> list[Row]:
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    rows = [given] if isinstance(given, dict) else given
    if not isinstance(rows, list) or not rows:
        raise Refused(422, 'send one row as an object, {"column": value}, or a list of rows')
    _check_count(len(rows), most)
    if set(map(type, rows)) != {dict}:
        number = next(number for number, row in enumerate(rows) if not isinstance(row, dict))
        raise Refused(422, f'row {number} is no object, such as {{"column": value}}', row=number)
    return rows


def _arrow(body: bytes, columns: list[str], most: int) -> pa.Table:
    source = pa.py_buffer(body)
    for message in pa.ipc.MessageReader.open_stream(source):
        if _is_compressed(bytes(message.metadata)):
            raise Refused(400, "the Arrow stream is compressed, so that its size cannot be known: send it as it is")
    reader = pa.ipc.open_stream(source)
    wanted = _wanted(columns, reader.schema)
    batches, rows = list[pa.RecordBatch](), 0
    for batch in reader:
        rows += batch.num_rows
        _check_count(rows, most)
        batches.append(batch.select(wanted))
        batches[-1].validate(full=True)  # Arrow believes what a stream says of itself: offsets, lengths, UTF-8
    return pa.Table.from_batches(batches, pa.schema([reader.schema.field(name) for name in wanted]))


def _parquet(body: bytes, columns: list[str], most: int) -> pa.Table:
    """By the reader of shards, which bounds what a page may decode to."""

    def fetch(start: int, length: int) -> bytes:
        if start < 0 or start + length > len(body):
            raise DatasetError("its footer points outside of the file")
        return body[start : start + length]

    file = ParquetFile("the body", len(body), fetch, DatasetError)
    _check_count(sum(file.group_rows), most)
    wanted = _wanted(columns, file.schema)
    return pa.concat_tables([file.read(index, wanted) for index in range(len(file.group_rows))])


def _wanted(columns: list[str], schema: pa.Schema) -> list[str]:
    """Those that the schema has, once each."""
    counts = Counter(schema.names)
    for name in columns:
        if counts[name] > 1:
            raise Refused(422, f"column {name!r} occurs {counts[name]} times: send each name once", column=name)
    return [name for name in columns if counts[name]]


def _check_count(rows: int, most: int) -> None:
    if rows > most:
        raise Refused(413, f"the body has more than {most:,} rows: send fewer with each request")


# ---- Arrow's messages ------------------------------------------------------------------------------------------------
_DICTIONARY, _BATCH = 2, 3  # org.apache.arrow.flatbuf.MessageHeader


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message has compressed buffers. Arrow's format, Message.fbs: pyarrow does not tell."""
    message = struct.unpack_from("<I", metadata)[0]
    kind = _field(metadata, message, 1)
    header = _field(metadata, message, 2)
    if kind is None or header is None or (of := metadata[kind]) not in (_DICTIONARY, _BATCH):
        return False
    batch = _followed(metadata, header)
    if of == _DICTIONARY:
        data = _field(metadata, batch, 1)
        if data is None:
            return False
        batch = _followed(metadata, data)
    return _field(metadata, batch, 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table stands; None: it has none."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _followed(data: bytes, at: int) -> int:
    return int(at + struct.unpack_from("<I", data, at)[0])

"""A dataset: a folder of Parquet files at rest, optionally hive-partitioned, read many times and pinned by etags."""

import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from tidemill.storage.errors import DatasetChanged, DatasetError, NotFound, NotReady, PreconditionFailed, StoreNotFound
from tidemill.storage.manifest import DatasetRef
from tidemill.storage.parquet import Findings, ParquetFile, RowGroup, row_groups
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store

SUFFIXES = (".parquet", ".parq", ".pq")

_OPEN_FILES = 64
"""Footers held parsed. Row groups are shuffled across files: of more files, nearly every read opens its file again, which costs a
request for the footer, and parsing. Opened for the first time, a file also costs a request for its first bytes, and one more if
the footer is long."""
_FOOTER_READERS = 8
_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Snapshot:
    """The files of a dataset as they were at one moment. Reading any other bytes later is an error, never a mixture."""

    ref: DatasetRef
    row_groups: Sequence[RowGroup]
    """In order of (key, index)."""

    @property
    def schemas(self) -> list[tuple[str, pa.Schema]]:
        """Each distinct schema, with the name of the first row group that has it."""
        seen: list[tuple[str, pa.Schema]] = []
        for group in self.row_groups:
            if not any(group.schema is schema or group.schema.equals(schema) for _, schema in seen):
                seen.append((group.name, group.schema))
        return seen


def snapshot(url: str, stores: Callable[[str], Store] = open_store) -> Snapshot:
    """List a dataset and read all its footers.

    Files and folders whose name starts with `.` or `_` do not count, nor do names that do not end in one of `SUFFIXES`.

    Raises:
        StoreNotFound: no such folder or bucket.
        DatasetError: no Parquet file, no rows, or a file that cannot be read.
        DatasetChanged: a file changed between listing and reading.
    """
    store = stores(url)
    infos = sorted((i for i in store.list() if _is_data(i.key)), key=lambda i: i.key)
    if not infos:
        raise DatasetError(
            f"{store.url} holds no Parquet file (a name that ends in {', '.join(SUFFIXES)}). Check the URL."
        )
    opener = _Opener(store, infos)
    groups: list[RowGroup] = []
    schemas: list[pa.Schema] = []
    open_file = opener.cached if len(infos) <= _OPEN_FILES else opener.open  # all can stay open, or none would last
    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        for number, file in enumerate(pool.map(open_file, range(len(infos)))):
            # One schema object for all equal files: 100,000 row groups must not hold 100,000 schemas.
            schema = next((s for s in schemas if s.equals(file.schema)), None)
            if schema is None:
                schemas.append(schema := file.schema)
            file.schema = schema
            groups += row_groups(file, functools.partial(opener.cached, number))
    rows = sum(group.num_rows for group in groups)
    if not rows:
        raise DatasetError(f"{store.url}: its {len(infos)} Parquet files hold no rows.")
    identity = json.dumps([[i.key, i.size, i.etag] for i in infos]).encode()
    ref = DatasetRef(url=store.url, fingerprint=hashlib.sha256(identity).hexdigest(), files=len(infos), rows=rows)
    return Snapshot(ref, groups)


class _Opener:
    """Opens the files of a snapshot, each pinned to the etag that the listing gave."""

    def __init__(self, store: Store, infos: list[ObjectInfo]) -> None:
        self._store, self._infos = store, infos
        self._kinds = _partition_kinds(info.key for info in infos)
        self._findings = Findings()
        self._cached = functools.lru_cache(_OPEN_FILES)(self.open)
        self._opening = [threading.Lock() for _ in range(_OPEN_FILES)]

    def cached(self, number: int) -> ParquetFile:
        """The file, open. Several readers that need the same one open it once."""
        with self._opening[number % _OPEN_FILES]:
            return self._cached(number)

    def _partitions(self, key: str) -> dict[str, "pa.Scalar[Any]"]:
        return {
            name: pa.scalar(int(text) if text and pa.types.is_integer(kind) else text, kind)
            for name, text in _partitions(key).items()
            for kind in [self._kinds[name]]
        }

    def open(self, number: int) -> ParquetFile:
        info = self._infos[number]

        def fetch(start: int, length: int) -> bytes:
            try:
                return self._store.read(info.key, if_match=info.etag, start=start, length=length)
            except (PreconditionFailed, NotFound, StoreNotFound) as error:
                raise DatasetChanged(
                    f"{self._store.url}/{info.key} changed while the dataset was being read. Nothing was registered; run "
                    "again when its writer has finished, and let writers add files instead of replacing them."
                ) from error

        try:
            return ParquetFile(
                info.key,
                info.size,
                fetch,
                DatasetError,
                partitions=self._partitions(info.key),
                concurrency=self._store.concurrency,
                readers=self._store.readers,
                findings=self._findings,
            )
        except NotReady as error:
            raise DatasetError(
                f"{self._store.url}/{info.key} is no Parquet file: {error} Remove or repair it."
            ) from error


def _is_data(key: str) -> bool:
    return key.lower().endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in key.split("/"))


def _partitions(key: str) -> dict[str, str | None]:
    """Values from `name=value` folders, as Hive and Spark write them."""
    columns: dict[str, str | None] = {}
    for part in key.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if equals and name:
            text = unquote(value)
            columns[unquote(name)] = None if text == "__HIVE_DEFAULT_PARTITION__" else text
    return columns


def _partition_kinds(keys: Iterable[str]) -> dict[str, pa.DataType]:
    """The type of each partition column: integers if all values of the dataset are, or text. All files have the same."""
    integers: dict[str, bool | None] = {}
    for key in keys:
        for name, value in _partitions(key).items():
            integers.setdefault(name, None)
            if value is not None:
                integers[name] = integers[name] is not False and _INTEGER.fullmatch(value) is not None
    return {name: pa.int64() if integer else pa.string() for name, integer in integers.items()}

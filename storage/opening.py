"""The files of a snapshot, opened: each is pinned to the etag that the listing gave."""

from __future__ import annotations  # pa.Scalar[Any] takes its type parameter in the stubs only

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa

from tidemill.storage.errors import DatasetChanged, DatasetError, NotFound, NotReady, PreconditionFailed, StoreNotFound
from tidemill.storage.parquet import Findings, ParquetFile
from tidemill.storage.partitions import partition_types
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tables import Table

OPEN_FILES: Final = 64
"""Footers held parsed. Row groups are shuffled across files: of more files, nearly every read opens its file again, which costs a
request for the footer, and parsing. Opened for the first time, a file also costs a request for its first bytes, and one more if
the footer is long."""
FOOTER_READERS: Final = 8


class Opener:
    """Opens the files of a snapshot, each pinned to the etag that the listing gave."""

    def __init__(
        self, store: Store, infos: Sequence[ObjectInfo], types: Mapping[str, pa.DataType], table: Table | None = None
    ) -> None:
        """`types` are those of partition columns, as a model knows them; of a table, `infos` are its files."""
        self._store, self._infos, self._table = store, infos, table
        names: Sequence[str] = () if table is None else sorted({name for file in table.files for name in file.values})
        self.types = {**partition_types(info.key for info in infos), **types}
        """Of partition columns."""
        if table is not None:
            self.types = {name: table.schema.field(name).type for name in names}
        self._findings = Findings()
        self._cached = functools.lru_cache(OPEN_FILES)(self.open)
        self._opening = [threading.Lock() for _ in range(OPEN_FILES)]

    def error(self, message: str) -> DatasetError:
        """Of a message that begins with the key of a file."""
        return DatasetError(f"{self._store.url}/{message}")

    def cached(self, number: int) -> ParquetFile:
        """The file, open. Several readers that need the same one open it once."""
        with self._opening[number % OPEN_FILES]:
            return self._cached(number)

    def open(self, number: int) -> ParquetFile:
        info = self._infos[number]

        def fetch(start: int, length: int) -> bytes:
            try:
                return self._store.read(info.key, if_match=info.etag, start=start, length=length)
            except (PreconditionFailed, NotFound, StoreNotFound) as error:
                if self._table is not None:
                    raise DatasetChanged(
                        f"{self._store.url}/{info.key}, a file of {self._table.ref.told}, went or was replaced while it was "
                        "being read, as by a vacuum or an expiry. Nothing was registered; let them keep files for as long as "
                        "runs take, run again."
                    ) from error
                raise DatasetChanged(
                    f"{self._store.url}/{info.key} changed while the dataset was being read. Nothing was registered; run "
                    "again when its writer has finished, and let writers add files instead of replacing them."
                ) from error

        try:
            return ParquetFile(
                info.key,
                info.size,
                fetch,
                self.error,
                self.types,
                concurrency=self._store.concurrency,
                readers=self._store.readers,
                findings=self._findings,
                folders=self._table is None,
            )
        except NotReady as error:
            raise DatasetError(
                f"{self._store.url}/{info.key} is no Parquet file: {error} Remove or repair it."
            ) from error

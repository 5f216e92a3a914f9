"""Tables of Delta Lake, Iceberg and Hudi, known by their markers: opened by their own log, or refused.

Such a table is no folder of Parquet files: files that it has removed or rewritten still lie there, and which of them count stands
in the table's own log.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from tidemill.storage.errors import DatasetError, NotFound, StorageError, UnsupportedTable
from tidemill.storage.store import ObjectInfo, Store

if TYPE_CHECKING:
    from tidemill.storage.tables import Table

_MARKERS: Final = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata": "Iceberg"}
"""The folder beside a table's data -> whose it is."""
READ: Final = ("Delta", "Iceberg")
"""Whose tables are read."""
_METADATA: Final = re.compile(r"(?P<folder>.+)/(?P<key>metadata/[^/]+\.metadata\.json)")
_ICEBERG_ENDINGS: Final = (".metadata.json", ".metadata.json.gz", "/version-hint.text")
"""Of keys in a folder `metadata`, which may belong to anybody."""


def metadata_of(url: str) -> tuple[str, str] | None:
    """(folder of the table, key of the metadata in it) if a URL names the metadata of an Iceberg table."""
    found = _METADATA.fullmatch(url)
    return None if found is None else (found["folder"], found["key"])


def look_for_table(store: Store) -> None:
    """Look for the markers of a table whose folder is the root of a store: a request for each.

    Raises:
        UnsupportedTable: it is one.
    """
    for marker in _MARKERS:
        for _ in refuse_tables(store.url, store.list(f"{marker}/", passed_over=lambda *_: None)):
            pass


def open_table(
    store: Store, system: str, version: int | None, metadata: str | None = None
) -> "tuple[Table, list[ObjectInfo]]":
    """A version of the table whose folder is the root of a store, the newest without `version`; and its files as they lie there.

    Raises:
        UnsupportedTable: it cannot be read whole; the message says what to do.
        DatasetError: there is no such version, or it cannot be read, or a file of it is gone.
    """
    infos = {info.key: info for info in store.list(passed_over=lambda *_: None)}
    if system == "Delta":
        from tidemill.storage import delta

        table = delta.open_table(store, infos, version)
    else:
        from tidemill.storage import iceberg

        table = iceberg.open_table(store, infos, version, metadata)
    found = list[ObjectInfo]()
    for file in table.files:
        try:
            info = infos.get(file.key) or store.stat(file.key)  # written after that part of the folder was listed
        except NotFound as error:
            raise DatasetError(
                f"{store.url}/{file.key}, a file of {table.ref.told}, is gone, as after a vacuum or an expiry: choose "
                "a newer one."
            ) from error
        if info.size != file.size:
            raise DatasetError(f"{store.url}/{file.key} has {info.size} bytes where {table.ref.told} says {file.size}.")
        found.append(info)
    if not found:
        raise DatasetError(f"{store.url}: {table.ref.told} has no rows.")
    return table, found


def refuse_tables(url: str, infos: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
    """The same objects.

    Raises:
        UnsupportedTable: one of them belongs to a table. It is raised before the objects that come after.
    """
    for info in infos:
        if (found := _table_of(info.key)) is not None:
            system, folder = found
            raise _refused(system, f"{url}/{folder}" if folder else url)
        yield info


def refuse_parts_of_tables(url: str, stores: Callable[[str], Store]) -> None:
    """Look for markers beside a folder that may be a part of a table: `data`, or `name=value`.

    Raises:
        UnsupportedTable: it is a part of a table.
    """
    folder = url.rstrip("/")
    while "/" in folder:
        folder, _, name = folder.rpartition("/")
        if not folder.rpartition("/")[2] or not (name == "data" or "=" in name):
            return
        for marker in ("metadata",) if name == "data" else _MARKERS:
            try:
                for info in stores(folder).list(f"{marker}/"):
                    if (found := _table_of(info.key)) is not None:
                        raise _refused(found[0], folder)
            except UnsupportedTable:
                raise
            except StorageError:  # what lies above is not ours to see
                return


def _table_of(key: str) -> tuple[str, str] | None:
    """(whose table, its folder) if the key is that of a marker."""
    for marker, system in _MARKERS.items():
        if f"{marker}/" in key:
            folders = key.split("/")[:-1]
            if marker in folders and (system != "Iceberg" or _is_iceberg(key)):
                return system, "/".join(folders[: folders.index(marker)])
    return None


def _is_iceberg(key: str) -> bool:
    name = key.rpartition("/")[2]
    return key.endswith(_ICEBERG_ENDINGS) or (name.startswith("snap-") and name.endswith(".avro"))


def _refused(system: str, url: str) -> UnsupportedTable:
    article = "an" if system == "Iceberg" else "a"
    by_itself = "Name it by itself to train on it, or write" if system in READ else "Write"
    return UnsupportedTable(
        f"{url} is {article} {system} table: which of its files count stands in its own log, and files that it has removed or "
        f"rewritten still lie there. {by_itself} its rows as plain Parquet files to another folder (with Spark: "
        f'spark.read.format("{system.lower()}").load(...).write.parquet(...)) and name that one',
        system,
        url,
    )

"""Tables of Delta Lake, Iceberg and Hudi, known by their markers and refused.

Such a table is no folder of Parquet files: files that it has removed or rewritten still lie there, and which of them count stands
in the table's own log.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from tidemill.storage.errors import StorageError, UnsupportedTable
from tidemill.storage.store import ObjectInfo, Store

_MARKERS: Final = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata": "Iceberg"}
"""The folder beside a table's data -> whose it is."""
_ICEBERG_ENDINGS: Final = (".metadata.json", ".metadata.json.gz", "/version-hint.text")
"""Of keys in a folder `metadata`, which may belong to anybody."""


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
    return UnsupportedTable(
        f"{url} is {article} {system} table: which of its files count stands in its own log, and files that it has removed or "
        f"rewritten still lie there. Write its rows as plain Parquet files to another folder (with Spark: "
        f'spark.read.format("{system.lower()}").load(...).write.parquet(...)) and name that one'
    )

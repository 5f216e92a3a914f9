"""Tables of Delta Lake: what their log says of one version, as deltalake reads it (extra `delta`).

The log is read through our own store, with its credentials, retries and errors, into a folder that deltalake then opens.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tidemill.storage.errors import DatasetError, NotFound, UnsupportedTable
from tidemill.storage.parallel import concurrently
from tidemill.storage.records import TableRef
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tables import LiveFile, Table

LOG: Final = "_delta_log/"
_COMMIT: Final = re.compile(r"_delta_log/(\d{20})\.json")
_CHECKPOINT: Final = re.compile(
    r"_delta_log/(\d{20})\.checkpoint(?:\.(\d{10})\.(\d{10})|\.[0-9a-f-]{36})?\.(?:parquet|json)"
)
_VECTOR: Final = re.compile(r"(?:.*/)?deletion_vector_[0-9a-f-]{36}\.bin")
_UNDERSTOOD: Final = {
    *("deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "columnMapping"),
    *("typeWidening", "typeWidening-preview"),
}
"""Features of readers whose tables are read as they should be; a mode of `columnMapping` is refused by itself."""
_NOT_UNDERSTOOD: Final = re.compile("Feature '.*' is not supported|Unsupported")
"""What deltalake says of a feature that it does not know itself."""
_REWRITE: Final = "or write its rows to another table or folder"


def open_table(store: Store, infos: Mapping[str, ObjectInfo], version: int | None) -> Table:
    """One version of the table whose folder is the root of a store; the newest one without `version`.

    Args:
        store: The folder of the table.
        infos: All that it holds, by key.
        version: Which version.

    Raises:
        UnsupportedTable: deltalake is not installed, or the table has what cannot be read; the message says what to do.
        DatasetError: there is no such version, or its log cannot be read.
    """
    try:
        import deltalake
    except ImportError as error:
        raise UnsupportedTable(
            f"{store.url} is a Delta table, and deltalake is not installed: pip install 'tidemill[delta]'"
        ) from error
    keys, found = _of_version(store, infos, version)
    with tempfile.TemporaryDirectory(prefix="tidemill-") as folder:
        _copy(store, keys, Path(folder))
        try:
            table = deltalake.DeltaTable(folder, version=found)
            _refuse_what_is_not_understood(store.url, table)
            vectors = "deletionVectors" in (table.protocol().reader_features or ())
            if vectors:
                _copy(store, [key for key in infos if _VECTOR.fullmatch(key)], Path(folder))
            deleted = dict(_deleted(table, folder)) if vectors else {}
            files = tuple(sorted(_files(store.url, table, deleted), key=lambda file: file.key))
            arrow: Any = table.schema().to_arrow()
            schema = pa.schema(arrow)
        except deltalake.exceptions.DeltaError as error:
            told = str(error).replace(folder, store.url)
            if _NOT_UNDERSTOOD.search(told):
                raise _unknown(store.url, told) from error
            raise DatasetError(f"{store.url}: version {found} of this Delta table cannot be read: {told}") from error
    if len({file.key for file in files}) < len(files) or deleted.keys() - {file.key for file in files}:
        raise DatasetError(f"{store.url}: the log of version {found} of this Delta table contradicts itself.")
    columns = set(schema.names)
    return Table(
        TableRef(system="Delta", version=found),
        schema,
        files,
        lambda own: {name: name for name in own.names if name in columns},
    )


def _of_version(store: Store, infos: Mapping[str, ObjectInfo], version: int | None) -> tuple[list[str], int]:
    """The parts of the log that tell of a version, and its number: the last whole checkpoint, and the commits that follow."""
    commits = {int(match[1]): key for key in infos if (match := _COMMIT.fullmatch(key))}
    checkpoints: dict[int, list[tuple[str, int]]] = {}
    for key in infos:
        if match := _CHECKPOINT.fullmatch(key):
            checkpoints.setdefault(int(match[1]), []).append((key, int(match[3] or 1)))
    newest = max((*commits, *checkpoints), default=None)
    if newest is None:
        raise DatasetError(f"{store.url}: {LOG} of this Delta table holds no version.")
    wanted = newest if version is None else version
    if wanted > newest:
        raise DatasetError(f"{store.url}: this Delta table has versions up to {newest}, and none {wanted}.")
    whole = [
        number
        for number, parts in checkpoints.items()
        if number <= wanted and any(count >= of for of, count in Counter(of for _, of in parts).items())
    ]
    start = max(whole, default=-1)
    needed = range(start + 1, wanted + 1)
    for number in needed:
        if number not in commits:  # gone, or written after that part of the log was listed
            if not _is_there(store, key := f"{LOG}{number:020d}.json"):
                break
            commits[number] = key
    if gone := [number for number in needed if number not in commits]:
        raise DatasetError(
            f"{store.url}: version {wanted} of this Delta table is no longer in its log, which lacks commit {gone[0]}: choose a "
            "newer version."
        )
    keys = [key for key, _ in checkpoints.get(start, [])] + [commits[number] for number in needed]
    if start in commits:
        keys.append(commits[start])
    if start >= 0:
        keys += [key for key in infos if key.startswith(f"{LOG}_sidecars/")]
    return keys, wanted


def _is_there(store: Store, key: str) -> bool:
    try:
        return bool(store.stat(key))
    except NotFound:
        return False


def _copy(store: Store, keys: list[str], folder: Path) -> None:
    def one(key: str) -> None:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(store.read(key))
        except NotFound:  # cleaned up since it was listed: if it is needed, deltalake says so
            return

    concurrently(one, keys, store.concurrency)


def _refuse_what_is_not_understood(url: str, table: Any) -> None:
    protocol, settings = table.protocol(), table.metadata().configuration
    if (mode := settings.get("delta.columnMapping.mode", "none")) != "none":
        raise UnsupportedTable(
            f"{url} is a Delta table with column mapping ({mode}): its files have other names for its columns. In Spark: ALTER "
            f"TABLE ... DROP FEATURE columnMapping, {_REWRITE}"
        )
    unknown = sorted(set(protocol.reader_features or ()) - _UNDERSTOOD)
    if unknown or protocol.min_reader_version > 3:
        what = ", ".join(unknown) or f"reader version {protocol.min_reader_version}"
        raise _unknown(url, what)


def _unknown(url: str, what: str) -> UnsupportedTable:
    return UnsupportedTable(
        f"{url} is a Delta table that asks of its readers what is not known here ({what}): drop the feature, {_REWRITE}"
    )


def _files(url: str, table: Any, deleted: Mapping[str, Any]) -> Iterator[LiveFile]:
    actions: Any = pa.table(table.get_add_actions(flatten=False))
    names = table.metadata().partition_columns
    columns: dict[str, Any] = {name: pc.struct_field(actions.column("partition"), name) for name in names}
    for i, (path, size) in enumerate(
        zip(actions.column("path").to_pylist(), actions.column("size_bytes").to_pylist(), strict=True)
    ):
        key = unquote(path)
        if "://" in key or key.startswith("/"):
            raise UnsupportedTable(
                f"{url} is a Delta table with files outside of its folder, as a shallow clone has ({key}): clone it "
                f"deeply, {_REWRITE}"
            )
        yield LiveFile(key, size, {name: column[i] for name, column in columns.items()}, deleted.get(key))


def _deleted(table: Any, folder: str) -> Iterator[tuple[str, Any]]:
    """Key of a file -> its rows that are kept, of the files that have deleted rows."""
    vectors: Any = pa.table(table.deletion_vectors())
    for path, kept in zip(vectors.column("filepath").to_pylist(), vectors.column("selection_vector"), strict=True):
        key = (
            unquote(path.removeprefix("file://")).removeprefix(f"{Path(folder).resolve()}/").removeprefix(f"{folder}/")
        )
        yield key, np.packbits(np.asarray(kept.values.to_numpy(zero_copy_only=False), dtype=bool))

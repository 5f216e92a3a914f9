"""Tables of Iceberg: what their metadata say of one snapshot, as pyiceberg (extra `iceberg`) reads them through our store."""

from __future__ import annotations  # pa.Scalar[Any] takes its type parameter in the stubs only

import gzip
import io
import os
import re
import struct
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from tidemill.storage.conditions import Bounds
from tidemill.storage.errors import DatasetError, NotFound, StorageError, UnsupportedTable
from tidemill.storage.records import TableRef
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tables import LiveFile, Table

if TYPE_CHECKING:
    from pyiceberg.io import FileIO
    from pyiceberg.manifest import DataFile
    from pyiceberg.schema import Schema
    from pyiceberg.table import StaticTable

HINT: Final = "metadata/version-hint.text"
_FIELD_ID: Final = b"PARQUET:field_id"
_SAME: Final = {"s3a": "s3", "s3n": "s3", "abfs": "az", "abfss": "az", "wasb": "az", "wasbs": "az"}
"""Schemes by which others call a store."""
_REWRITE: Final = (
    "rewrite the table (in Spark: CALL system.rewrite_data_files), or write its rows to another table or folder"
)


def open_table(store: Store, infos: Mapping[str, ObjectInfo], version: int | None, metadata: str | None) -> Table:
    """One snapshot of the table whose folder is the root of a store; the current one without `version`.

    Args:
        store: The folder of the table.
        infos: All that it holds, by key.
        version: The id of a snapshot.
        metadata: Key of the metadata; None: those that `version-hint.text` names.

    Raises:
        UnsupportedTable: pyiceberg is not installed, or the table has what cannot be read; the message says what to do.
        DatasetError: there is no such snapshot, or its metadata cannot be read.
    """
    try:
        import pyiceberg.table  # noqa: F401
    except ImportError as error:
        raise UnsupportedTable(
            f"{store.url} is an Iceberg table, and pyiceberg is not installed: pip install 'tidemill[iceberg]'"
        ) from error
    key = metadata or _hinted(store, infos)
    try:
        table = _static(store, key)
        ref = _ref(store.url, table, version, key)
        current = table.current_snapshot()  # its columns are those of today; of an older one those of its time
        scan = table.scan(snapshot_id=None if current and current.snapshot_id == ref.version else ref.version)
        found, schema = list(scan.plan_files()), scan.projection()
    except StorageError:
        raise
    except Exception as error:  # pyiceberg, pydantic and Avro have no error in common
        if "equality deletes" in str(error):
            raise _deletes(store.url) from error
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DatasetError(f"{store.url}/{key}: this Iceberg table cannot be read: {told}") from error
    if any(task.delete_files for task in found):
        raise _deletes(store.url)
    if other := next(
        (str(t.file.file_format) for t in found if str(t.file.file_format).rpartition(".")[2] != "PARQUET"), None
    ):
        raise UnsupportedTable(f"{store.url} is an Iceberg table with files of {other}, which are not read: {_REWRITE}")
    arrow = schema.as_arrow()
    root = table.location()
    files = tuple(
        sorted((_live(store.url, root, table, schema, arrow, task.file) for task in found), key=lambda file: file.key)
    )
    return Table(ref, arrow, files, _names(store.url, table, schema))


def _hinted(store: Store, infos: Mapping[str, ObjectInfo]) -> str:
    """Key of the metadata that the table's own hint names."""
    try:
        hint = store.read(HINT).decode(errors="replace").strip()
    except NotFound as error:
        all_ = sorted((info.last_modified, key) for key, info in infos.items() if key.endswith(".metadata.json"))
        newest = f", such as {store.url}/{all_[-1][1]}, the newest" if all_ else ""
        raise UnsupportedTable(
            f"{store.url} is an Iceberg table whose catalog knows which of its metadata count: name their URL{newest} (a catalog "
            "tells it as metadata_location)"
        ) from error
    names = (
        [hint]
        if hint.endswith(".metadata.json")
        else [f"{v}{hint}{gz}.metadata.json" for v in ("v", "") for gz in ("", ".gz")]
    )
    found = next((key for name in names if (key := f"metadata/{name}") in infos), None)
    if found is None:
        raise DatasetError(
            f"{store.url} is an Iceberg table whose {HINT} names {hint[:40]!r}, and there are no such metadata: name their URL."
        )
    return found


def _static(store: Store, key: str) -> StaticTable:
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.table import StaticTable
    from pyiceberg.table.metadata import TableMetadataUtil

    data = store.read(key)
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    metadata = TableMetadataUtil.parse_raw(text)
    if _place(metadata.location) != _place(store.url) or _other_account(metadata.location, _in_account(store.url)):
        raise UnsupportedTable(
            f"{store.url} is an Iceberg table whose metadata say that it lies at {metadata.location}: name it there. (The paths "
            "in it are absolute: a copy refers to the files of the original.)"
        )
    return StaticTable(
        ("table",), metadata, f"{metadata.location}/{key}", _io(store, metadata.location), NoopCatalog("none")
    )


def _ref(url: str, table: StaticTable, version: int | None, key: str) -> TableRef:
    found = table.current_snapshot() if version is None else table.snapshot_by_id(version)
    if found is None:
        known = ", ".join(str(snapshot.snapshot_id) for snapshot in table.metadata.snapshots[-5:])
        what = "no snapshot" if version is None else f"no snapshot {version}"
        raise DatasetError(f"{url}/{key}: the Iceberg table has {what}; the last ones are {known or 'none'}.")
    return TableRef(system="Iceberg", version=found.snapshot_id, metadata=key)


def _deletes(url: str) -> UnsupportedTable:
    return UnsupportedTable(f"{url} is an Iceberg table with delete files, which are not applied: {_REWRITE}")


# ---- what the metadata say of a file -----------------------------------------------------------------------------------
def _live(url: str, root: str, table: StaticTable, schema: Schema, arrow: pa.Schema, file: DataFile) -> LiveFile:
    from pyiceberg.transforms import IdentityTransform

    values = dict[str, Any]()
    for at, part in enumerate(table.specs()[file.spec_id].fields):
        name = schema.find_column_name(part.source_id)
        if isinstance(part.transform, IdentityTransform) and name in arrow.names:
            try:
                values[name] = pa.scalar(file.partition[at], arrow.field(name).type)
            except (
                pa.ArrowException,
                TypeError,
                ValueError,
            ):  # of a type whose partitions are not told so: the file has it
                continue
    return LiveFile(
        _key(url, root, file.file_path), file.file_size_in_bytes, values, bounds=_bounds(schema, arrow, file)
    )


def _bounds(schema: Schema, arrow: pa.Schema, file: DataFile) -> dict[str, Bounds]:
    """Of its columns, as far as the metadata tell: of one partitioned by the day of a time, the ends of the time."""
    from pyiceberg.conversions import from_bytes
    from pyiceberg.types import PrimitiveType

    found = dict[str, Bounds]()
    for field in schema.fields:
        low, high = ((ends or {}).get(field.field_id) for ends in (file.lower_bounds, file.upper_bounds))
        nulls = (file.null_value_counts or {}).get(field.field_id)
        kind = field.field_type
        if low is None or high is None or not isinstance(kind, PrimitiveType):
            continue
        try:
            ends = [_in_units(from_bytes(kind, end), arrow.field(field.name).type) for end in (low, high)]
        except (struct.error, ValueError):  # bytes of the type that the column had when the file was written
            continue
        if None not in ends:
            found[field.name] = Bounds(ends[0], ends[1], nulls=nulls != 0)
    return found


def _in_units(value: Any, kind: Any) -> Any:
    """A value of Iceberg as `Comparison.within` takes it; None of a type that it has no order of."""
    if isinstance(value, Decimal) and pa.types.is_decimal(kind):
        return Fraction(value) * 10**kind.scale
    if isinstance(value, bool | int | str) and not pa.types.is_time(kind):
        return value
    return value if isinstance(value, float) and value == value else None


def _names(url: str, table: StaticTable, schema: Schema) -> Callable[[pa.Schema], dict[str, str]]:
    """Columns are known by their ids, whatever they were called when a file was written."""
    fields = {field.field_id: field.name for field in schema.fields}
    if odd := [field.name for field in schema.fields if getattr(field, "initial_default", None) is not None]:
        raise UnsupportedTable(
            f"{url} is an Iceberg table whose column {odd[0]!r} has a default for the files that lack it, which is not applied: "
            f"{_REWRITE}"
        )
    mapped = {} if (mapping := table.name_mapping()) is None else {n: f.field_id for f in mapping for n in f.names}

    def names(own: pa.Schema) -> dict[str, str]:
        ids = {
            column.name: int(found) for column in own if (found := (column.metadata or {}).get(_FIELD_ID)) is not None
        }
        if not ids and not mapped:
            raise UnsupportedTable(
                f"{url} is an Iceberg table with files whose columns have no ids, and without a mapping of names: {_REWRITE}"
            )
        return {fields[i]: name for name, i in (ids or mapped).items() if i in fields and name in own.names}

    return names


# ---- where things lie --------------------------------------------------------------------------------------------------
def _place(url: str) -> str:
    """A location as it can be compared: schemes of one store are one, and a local path is the real one."""
    scheme, rest = re.fullmatch(r"(?:([a-z0-9]+):/*)?(.*)", url.rstrip("/"), re.DOTALL).groups()  # type: ignore[union-attr]
    if scheme in (None, "file"):
        return os.path.realpath(f"/{rest.lstrip('/')}")
    rest = re.sub(r"^([^@/]+)@[^/]+", r"\1", rest)  # Hadoop's container@account.dfs.core.windows.net
    return f"{_SAME.get(scheme, scheme)}:{rest}"


def _other_account(one: str, other: str) -> bool:
    """Whether both locations name accounts of Azure, which `_place` leaves out, and not the same one."""
    accounts = [re.match(r"(?:abfs|wasb)s?:/*[^@/]+@([^./]+)", url) for url in (one, other)]
    return len({found[1] for found in accounts if found}) == 2


def _in_account(url: str) -> str:
    """The location of a store, in Azure with the account, which is that of the environment, if it tells the name."""
    if not url.startswith("az://"):
        return url
    from tidemill.storage.azure_account import account_name  # needs the client, which a store in Azure has

    container, slash, prefix = url.removeprefix("az://").partition("/")
    return f"abfss://{container}@{name}{slash}{prefix}" if (name := account_name()) else url


def _key(url: str, root: str, location: str) -> str:
    """Below the folder of the table."""
    place, within = _place(location), f"{_place(root)}/"
    if not place.startswith(within) or _other_account(location, root):
        raise UnsupportedTable(f"{url} is an Iceberg table with files outside of its folder ({location}): {_REWRITE}")
    return place.removeprefix(within)


def _io(store: Store, root: str) -> FileIO:
    """What pyiceberg reads metadata by."""
    from pyiceberg.io import FileIO, InputFile, InputStream, OutputFile

    class Input(InputFile):
        def __len__(self) -> int:
            return store.stat(_key(store.url, root, self.location)).size

        def exists(self) -> bool:
            try:
                return bool(len(self)) or True
            except NotFound:
                return False

        def open(self, seekable: bool = True) -> InputStream:
            return io.BytesIO(store.read(_key(store.url, root, self.location)))

    class OfStore(FileIO):
        def new_input(self, location: str) -> InputFile:
            return Input(location)

        def new_output(self, location: str) -> OutputFile:
            raise NotImplementedError("tables are only read")

        def delete(self, location: str | InputFile | OutputFile) -> None:
            raise NotImplementedError("tables are only read")

    return OfStore()

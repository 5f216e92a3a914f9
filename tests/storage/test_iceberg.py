"""Tables of Iceberg: the rows are those that pyiceberg and polars read of the same snapshot."""

import datetime
import gzip
import sys
import uuid
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import DataFile
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.transforms import DayTransform, IdentityTransform
from pyiceberg.types import (
    DecimalType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    NestedField,
    StringType,
    TimestampType,
    TimestamptzType,
)

from tests.conftest import BUCKET
from tests.s3_server import REGION, S3
from tests.storage.faults import FaultStore
from tidemill.storage.choice import Choice
from tidemill.storage.conditions import Bounds
from tidemill.storage.dataset import Snapshot, peek, pinned, snapshot
from tidemill.storage.errors import DatasetError, UnsupportedTable
from tidemill.storage.iceberg import _bounds, _key, _place, _static
from tidemill.storage.memory import MemoryStore
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # pyiceberg's own, and of its database
Rows = list[dict[str, Any]]
START = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


def rows_of(first: int, count: int = 24, **more: Any) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table(
        {
            "id": pa.array(numbers, pa.int32()),
            "at": pa.array([START + datetime.timedelta(hours=6 * n) for n in numbers], pa.timestamp("us", "UTC")),
            "name": pa.array([None if n % 5 == 0 else f"n {n % 4}" for n in numbers], pa.string()),
            "d": pa.array([Decimal(n) / 4 for n in numbers], pa.decimal128(9, 2)),
            **more,
        }
    )


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pyiceberg and of its database
        made = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/warehouse")
        made.create_namespace("n")
        yield made
        made.close()


SCHEMA = Schema(
    NestedField(1, "id", IntegerType(), required=False),
    NestedField(2, "at", TimestamptzType(), required=False),
    NestedField(3, "name", StringType(), required=False),
    NestedField(4, "d", DecimalType(9, 2), required=False),
)


def made(catalog: Catalog, *fields: PartitionField) -> Table:
    return catalog.create_table("n.t", SCHEMA, partition_spec=PartitionSpec(*fields))


def rows(found: Snapshot) -> Rows:
    names = found.row_groups[0].schema.names
    read = [row for group in found.row_groups for row in group.read(names).to_pylist()]
    assert found.ref.rows == len(read)
    return in_order(read)


def in_order(read: Rows, key: str = "id") -> Rows:
    key = key if key in read[0] else "number"
    return sorted(({name: row[name] for name in sorted(row)} for row in read), key=lambda row: row[key])


def history(catalog: Catalog) -> Table:
    """Appends, deletes, an overwrite, and columns that are added, renamed, widened, moved and dropped."""
    table = made(
        catalog, PartitionField(2, 1000, DayTransform(), "day"), PartitionField(3, 1001, IdentityTransform(), "name")
    )
    table.append(rows_of(0))
    table.append(rows_of(24))
    table.delete("id = 3 or name = 'n 2'")
    with table.update_schema() as update:
        update.add_column("extra", StringType())
        update.rename_column("d", "amount")
    table.append(rows_of(48, extra=["x"] * 24).rename_columns(["id", "at", "name", "amount", "extra"]))
    with table.update_schema() as update:
        update.update_column("id", LongType())
        update.rename_column("id", "number")
        update.move_first("extra")
    with table.update_schema() as update:
        update.delete_column("amount")
        update.add_column("d", LongType())
    newest = (
        rows_of(72)
        .drop_columns(["d"])
        .append_column("extra", pa.array(["y"] * 24))
        .append_column("d", pa.array(range(24)))
    )
    newest = newest.rename_columns(["number", "at", "name", "extra", "d"])
    newest = newest.set_column(0, "number", newest.column("number").cast(pa.int64()))
    table.append(newest)
    table.overwrite(newest.slice(0, 4), "number > 90")
    return table


@pytest.mark.slow
def test_every_snapshot_has_the_rows_that_pyiceberg_and_polars_read(catalog: Catalog) -> None:
    table = history(catalog)
    assert len(table.snapshots()) >= 6
    prints = set()
    for moment in table.snapshots():
        found = snapshot(table.metadata_location, version=moment.snapshot_id)
        assert rows(found) == in_order(table.scan(snapshot_id=moment.snapshot_id).to_arrow().to_pylist())
        assert rows(found) == in_order(pl.scan_iceberg(table, snapshot_id=moment.snapshot_id).collect().to_dicts())
        ref = found.ref.table
        assert ref is not None
        assert (ref.system, ref.version) == ("Iceberg", moment.snapshot_id)
        prints.add(found.ref.fingerprint)
    assert len(prints) == len(table.snapshots())
    newest = snapshot(table.metadata_location)
    assert newest.ref == found.ref
    assert newest.ref.url == table.location()
    assert newest.schema.names == ["extra", "number", "at", "name", "d"]


def test_a_renamed_column_is_known_by_its_id_and_a_new_one_of_the_old_name_is_another(catalog: Catalog) -> None:
    table = made(catalog)
    table.append(rows_of(0, 3))
    with table.update_schema() as update:
        update.rename_column("d", "amount")
    with table.update_schema() as update:
        update.add_column("d", LongType())
    found = snapshot(table.metadata_location)
    assert [(row["amount"], row["d"]) for row in rows(found)] == [(Decimal(n) / 4, None) for n in range(3)]
    assert snapshot(table.metadata_location, choice=Choice("amount = 0.25 AND d IS NULL")).ref.rows == 1


def test_values_of_a_column_that_was_widened_are_of_its_new_type(catalog: Catalog) -> None:
    schema = Schema(
        NestedField(1, "id", IntegerType()), NestedField(2, "f", FloatType()), NestedField(3, "d", DecimalType(9, 2))
    )
    table = catalog.create_table(
        "n.t", schema, partition_spec=PartitionSpec(PartitionField(1, 1000, IdentityTransform(), "id"))
    )
    old = pa.table({"id": [0, 1], "f": [0.1, 0.5], "d": [Decimal("1.10"), Decimal("2.20")]}).cast(schema.as_arrow())
    table.append(old)
    with table.update_schema() as update:
        for name, kind in (("id", LongType()), ("f", DoubleType()), ("d", DecimalType(18, 2))):
            update.update_column(name, kind)
    table.append(old.set_column(0, "id", pa.array([2, 2**40])).cast(table.schema().as_arrow()))
    found = snapshot(table.metadata_location)
    assert rows(found) == in_order(table.scan().to_arrow().to_pylist())
    assert {str(kind) for _, schema in found.schemas for kind in schema.types} == {
        "int64",
        "double",
        "decimal128(18, 2)",
    }
    everything = duckdb.from_arrow(table.scan().to_arrow())  # pyiceberg's own filter loses a row of the older files
    for where in (
        "f <> 0.5",
        "f <> 0.1",
        "f < 0.10000000149011613",
        "id > 4294967296",
        "id < 2 and f > 0.1",
        "d = 1.1",
    ):
        chosen = snapshot(table.metadata_location, choice=Choice(where))
        assert [row["id"] for row in rows(chosen)] == sorted(
            i for (i,) in everything.filter(where).project("id").fetchall()
        )


@pytest.mark.slow
def test_a_table_on_s3_is_read_there(s3_server: S3, tmp_path: Path) -> None:
    """Written there by pyiceberg; its metadata and files come through the store of the dataset."""
    properties = {
        "uri": f"sqlite:///{tmp_path}/c.db",
        "warehouse": f"s3://{BUCKET}/{uuid.uuid4().hex}",
        "s3.endpoint": s3_server.endpoint,
        "s3.access-key-id": s3_server.admin.access_key,
        "s3.secret-access-key": s3_server.admin.secret_key,
        "s3.region": REGION,
    }
    catalog = SqlCatalog("c", **properties)
    catalog.create_namespace("n")
    table = made(catalog, PartitionField(3, 1000, IdentityTransform(), "name"))
    table.append(rows_of(0))
    table.delete("id = 3 or name = 'n 2'")
    with table.update_schema() as update:
        update.rename_column("d", "amount")
    found = snapshot(table.metadata_location)
    assert found.ref.url == table.location()
    assert found.ref.url.startswith("s3://")
    assert rows(found) == in_order(table.scan().to_arrow().to_pylist())
    where = "amount > 2 and name <> 'n 1'"
    chosen = snapshot(table.metadata_location, choice=Choice(where))
    assert rows(chosen) == in_order(table.scan(where).to_arrow().to_pylist())
    again = pinned(chosen.ref, chosen.folder, chosen.files)
    assert rows(again) == rows(chosen)
    catalog.close()


def test_bounds_that_are_of_another_type_tell_nothing() -> None:
    schema = Schema(
        NestedField(1, "at", TimestampType()), NestedField(2, "s", StringType()), NestedField(3, "id", LongType())
    )
    ends = {1: (19_000).to_bytes(4, "little"), 2: b"\xff", 3: (7).to_bytes(4, "little")}
    file = DataFile.from_args(lower_bounds=ends, upper_bounds=ends, null_value_counts={3: 0})
    assert _bounds(schema, schema.as_arrow(), file) == {"id": Bounds(7, 7, nulls=False)}


def test_places_are_the_same_whatever_the_scheme_is_called() -> None:
    at_azure = "abfss://container@account.dfs.core.windows.net/lake/t/"
    assert _place(at_azure) == _place("az://container/lake/t")
    assert _place("s3a://bucket/t") == _place("s3://bucket/t")
    assert _place("file:/a/t") == _place("file:///a/t") == _place("/a/t")
    assert _place("s3://bucket/a@b/t") != _place("s3://bucket/b/t")


def test_a_container_of_another_account_is_another_place() -> None:
    root, file = "abfss://lake@ours.dfs.core.windows.net/t", "data/a.parquet"
    for same in (root, "az://lake/t", "wasbs://lake@ours.blob.core.windows.net/t"):
        assert _key("az://lake/t", root, f"{same}/{file}") == _key("az://lake/t", same, f"{root}/{file}") == file
    with pytest.raises(UnsupportedTable, match="files outside of its folder"):
        _key("az://lake/t", root, f"abfss://lake@theirs.dfs.core.windows.net/t/{file}")


def test_a_copy_in_another_account_is_not_read_as_the_table(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    location = "abfss://lake@ours.dfs.core.windows.net/t"
    metadata = made(catalog).metadata.model_copy(update={"location": location})
    store = MemoryStore(uuid.uuid4().hex)
    store.write("metadata/v1.metadata.json", metadata.model_dump_json().encode())
    store.url = "az://lake/t"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "ours")
    assert _static(store, "metadata/v1.metadata.json").metadata.location == location
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "theirs")
    with pytest.raises(UnsupportedTable, match="metadata say that it lies at abfss://lake@ours"):
        _static(store, "metadata/v1.metadata.json")


def test_a_condition_opens_the_files_that_the_metadata_do_not_rule_out(catalog: Catalog) -> None:
    """Of a table that is partitioned by the day of a time, a condition on the time itself."""
    table = made(catalog, PartitionField(2, 1000, DayTransform(), "day"))
    table.append(rows_of(0, 400))
    reads: list[str] = []

    def stores(url: str) -> Store:
        return FaultStore(open_store(url), lambda call: reads.append(call.key) if call.verb == "read" else None)

    where = "at >= TIMESTAMP '2024-02-01' AND at < '2024-02-02 12:00'"
    found = snapshot(table.metadata_location, stores, choice=Choice(where))
    assert [row["id"] for row in rows(found)] == list(range(124, 130))
    assert len({key for key in reads if key.endswith(".parquet")}) == 2
    of = found.ref.chosen
    assert of is not None
    assert (of.of_files, of.read_files) == (100, 2)


def test_a_folder_is_read_where_its_hint_says_which_metadata(catalog: Catalog) -> None:
    table = made(catalog, PartitionField(3, 1000, IdentityTransform(), "name"))
    table.append(rows_of(0))
    first = Path(table.metadata_location.removeprefix("file://"))
    table.append(rows_of(24))
    folder, newest = first.parent, Path(table.metadata_location.removeprefix("file://"))
    told = rf"catalog knows which of its metadata count: name their URL, such as .*{newest.name}"
    with pytest.raises(UnsupportedTable, match=told):
        snapshot(table.location())
    (folder / "version-hint.text").write_text(first.name)
    assert len(rows(snapshot(table.location()))) == 24
    (folder / "v7.metadata.json").write_bytes(newest.read_bytes())
    (folder / "version-hint.text").write_text("7\n")
    found = snapshot(table.location())
    assert rows(found) == in_order(table.scan().to_arrow().to_pylist())
    (folder / "v8.gz.metadata.json").write_bytes(gzip.compress(newest.read_bytes()))
    (folder / "version-hint.text").write_text("8")
    assert snapshot(table.location()).ref.rows == 48
    name, schema = peek(table.location())
    assert (name, schema.names) == (table.location(), ["id", "at", "name", "d"])
    (folder / "version-hint.text").write_text("9")
    with pytest.raises(DatasetError, match="names '9', and there are no such metadata"):
        snapshot(table.location())


def test_another_process_pins_the_same_snapshot(catalog: Catalog) -> None:
    table = history(catalog)
    old = table.snapshots()[2].snapshot_id
    first = snapshot(table.metadata_location, version=old, choice=Choice("id < 40 AND name <> 'n 1'"))
    found = pinned(first.ref, first.folder, first.files)
    assert found.ref == first.ref
    assert rows(found) == rows(first)


# ---- what is refused -----------------------------------------------------------------------------------------------------------
def test_delete_files_are_refused_with_the_remedy(catalog: Catalog, tmp_path: Path) -> None:
    from pyiceberg.manifest import DataFileContent, FileFormat

    table = made(catalog)
    table.append(rows_of(0))
    [task] = table.scan().plan_files()
    deletes = pa.table({"file_path": [task.file.file_path], "pos": pa.array([3], pa.int64())})
    place = f"{table.location()}/data/deletes.parquet"
    pq.write_table(deletes, place.removeprefix("file://"))
    file = DataFile.from_args(
        content=DataFileContent.POSITION_DELETES,
        file_path=place,
        file_format=FileFormat.PARQUET,
        partition=task.file.partition,
        record_count=1,
        file_size_in_bytes=Path(place.removeprefix("file://")).stat().st_size,
    )
    file.spec_id = 0
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        append.append_data_file(file)
    with pytest.raises(UnsupportedTable, match="delete files, which are not applied: rewrite the table"):
        snapshot(table.metadata_location)


def test_a_snapshot_that_is_not_there_is_told_with_those_that_are(catalog: Catalog) -> None:
    table = made(catalog)
    with pytest.raises(DatasetError, match="has no snapshot; the last ones are none"):
        snapshot(table.metadata_location)
    table.append(rows_of(0))
    with pytest.raises(
        DatasetError, match=f"has no snapshot 7; the last ones are {table.current_snapshot().snapshot_id}"
    ):
        snapshot(table.metadata_location, version=7)


def test_a_copy_of_a_table_is_refused_for_it_names_the_original(catalog: Catalog, store: Store) -> None:
    table = made(catalog)
    table.append(rows_of(0))
    folder = Path(table.location().removeprefix("file://"))
    for file in folder.rglob("*"):
        if file.is_file():
            store.write(f"copy/{file.relative_to(folder).as_posix()}", file.read_bytes())
    metadata = Path(table.metadata_location).name
    with pytest.raises(UnsupportedTable, match=f"say that it lies at {table.location()}: name it there"):
        snapshot(f"{store.url}/copy/metadata/{metadata}")


def test_damaged_metadata_are_an_error_that_names_them(catalog: Catalog) -> None:
    table = made(catalog)
    table.append(rows_of(0))
    path = Path(table.metadata_location.removeprefix("file://"))
    path.write_text("{}")
    with pytest.raises(DatasetError, match=f"{path.name}: this Iceberg table cannot be read"):
        snapshot(table.metadata_location)


def test_without_its_library_the_extra_is_named(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    table = made(catalog)
    table.append(rows_of(0))
    monkeypatch.setitem(sys.modules, "pyiceberg.table", None)
    with pytest.raises(UnsupportedTable, match=r"pyiceberg is not installed: pip install 'tidemill\[iceberg\]'"):
        snapshot(table.metadata_location)


def test_a_file_that_is_gone_is_told(catalog: Catalog) -> None:
    table = made(catalog)
    table.append(rows_of(0))
    [task] = table.scan().plan_files()
    Path(task.file.file_path.removeprefix("file://")).unlink()
    with pytest.raises(DatasetError, match=r"a file of snapshot \d+ of the Iceberg table, is gone"):
        snapshot(table.metadata_location)

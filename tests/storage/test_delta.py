"""Tables of Delta Lake: the rows are those that polars and deltalake read of the same version."""

import base64
import datetime
import json
import os
import shutil
import struct
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyroaring import BitMap

from tests.storage.faults import Call, FaultStore, hooked
from tidemill.storage.choice import Choice
from tidemill.storage.dataset import Snapshot, peek, pinned, snapshot
from tidemill.storage.errors import DatasetChanged, DatasetError, Unavailable, UnsupportedTable
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]


def table(first: int, count: int = 30, **more: Any) -> pa.Table:
    numbers = range(first, first + count)
    days = [datetime.date(2024, 1, 1 + n % 3) for n in numbers]
    return pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            "x": pa.array([n * 0.5 for n in numbers], pa.float64()),
            "day": pa.array(days, pa.date32()),
            "name": [None if n % 5 == 0 else f"n {n % 4}" for n in numbers],
            **more,
        }
    )


def rows(found: Snapshot) -> Rows:
    """All of its rows, in the order of `id`."""
    names = found.row_groups[0].schema.names
    read = [row for group in found.row_groups for row in group.read(names).to_pylist()]
    assert found.ref.rows == len(read)
    return sorted(({name: row[name] for name in sorted(row)} for row in read), key=lambda row: row["id"])


def expected(path: Path, version: int | None = None, where: pl.Expr | None = None) -> Rows:
    """The same as polars reads it."""
    frame = pl.read_delta(str(path), version=version)
    frame = frame if where is None else frame.filter(where)
    return [{name: row[name] for name in sorted(row)} for row in frame.sort("id").to_dicts()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


# ---- the same rows -------------------------------------------------------------------------------------------------------
def history(path: Path) -> None:
    """Appends, an update, a delete, a merge, added columns, an optimize, an overwrite of a partition, checkpoints."""
    write_deltalake(path, table(0), partition_by=["day"])
    write_deltalake(path, table(30), mode="append")
    DeltaTable(path).update({"x": "x + 100.0"}, predicate="id % 7 = 0")
    DeltaTable(path).delete("id < 10 AND name IS NOT NULL")
    write_deltalake(path, table(60, extra=pa.array([1.5] * 30)), mode="append", schema_mode="merge")
    DeltaTable(path).optimize.compact()
    DeltaTable(path).create_checkpoint()
    source = table(80, 20, extra=pa.array([2.5] * 20))
    DeltaTable(path).merge(
        source, "s.id = t.id", "s", "t"
    ).when_matched_update_all().when_not_matched_insert_all().execute()
    DeltaTable(path).delete("day = '2024-01-02'")
    write_deltalake(path, table(200, 3), mode="append", schema_mode="merge")
    DeltaTable(path).optimize.z_order(["id"])


def test_every_version_has_the_rows_that_polars_reads(path: Path) -> None:
    history(path)
    newest = DeltaTable(path).version()
    assert newest >= 9
    for version in range(newest + 1):
        found = snapshot(str(path), version=version)
        assert rows(found) == expected(path, version), version
        assert found.ref.table is not None
        assert (found.ref.table.system, found.ref.table.version) == ("Delta", version)
    assert snapshot(str(path)).ref == snapshot(str(path), version=newest).ref
    assert len({snapshot(str(path), version=version).ref.fingerprint for version in range(newest + 1)}) == newest + 1


def test_what_a_vacuum_and_a_clean_up_have_left_is_read_and_what_they_took_is_told(path: Path) -> None:
    history(path)
    DeltaTable(path).vacuum(0, dry_run=False, enforce_retention_duration=False)
    newest = DeltaTable(path).version()
    assert rows(snapshot(str(path))) == expected(path)
    with pytest.raises(
        DatasetError, match=r"\.parquet, a file of version 0 of the Delta table, is gone, as after a vacuum"
    ):
        snapshot(str(path), version=0)
    for number in range(3):
        (path / f"_delta_log/{number:020d}.json").unlink()
    assert rows(snapshot(str(path))) == expected(path)
    with pytest.raises(
        DatasetError, match="version 2 of this Delta table is no longer in its log, which lacks commit 0"
    ):
        snapshot(str(path), version=2)
    with pytest.raises(DatasetError, match=f"has versions up to {newest}, and none {newest + 1}"):
        snapshot(str(path), version=newest + 1)


def test_values_of_partitions_come_typed_from_the_log(path: Path) -> None:
    odd = pa.table(
        {
            "id": [1, 2, 3, 4],
            "p": ["a b/c", "ü=%", None, "x&y#?"],
            "d": pa.array([datetime.date(2026, 1, 1)] * 3 + [None], pa.date32()),
            "k": pa.array([1, 2, 3, 4], pa.int32()),
            "b": [True, False, None, True],
            "t": pa.array([datetime.datetime(2026, 1, 1, 12, n, tzinfo=datetime.UTC) for n in range(4)]),
            "digits": ["01", "1", "001", "x"],
        }
    )
    write_deltalake(path, odd, partition_by=["p", "d", "k", "b", "t", "digits"])
    found = snapshot(str(path))
    assert rows(found) == expected(path)
    assert rows(found)[1]["p"] == "ü=%"
    types = {field.name: str(field.type) for field in found.schema}
    assert (types["k"], types["d"], types["b"], types["digits"]) == ("int32", "date32[day]", "bool", "string")
    one = snapshot(str(path), choice=Choice("digits = '01' AND d = DATE '2026-01-01' AND k = 1"))
    assert [row["id"] for row in rows(one)] == [1]


def test_a_table_lies_in_any_store(store: Store, path: Path) -> None:
    write_deltalake(path, table(0), partition_by=["day"])
    DeltaTable(path).delete("id = 3")
    for file in path.rglob("*"):
        if file.is_file():
            store.write(f"lake/t/{file.relative_to(path).as_posix()}", file.read_bytes())
    found = snapshot(f"{store.url}/lake/t")
    assert rows(found) == expected(path)
    assert found.ref.url == f"{store.url}/lake/t"


def test_rows_of_a_column_that_was_added_later_are_null(path: Path) -> None:
    write_deltalake(path, table(0, 3))
    write_deltalake(path, table(3, 3, extra=["a", "b", None]), mode="append", schema_mode="merge")
    found = snapshot(str(path))
    assert [row["extra"] for row in rows(found)] == [None, None, None, "a", "b", None]
    assert [row["id"] for row in rows(snapshot(str(path), choice=Choice("extra IS NULL")))] == [0, 1, 2, 5]
    assert [row["id"] for row in rows(snapshot(str(path), choice=Choice("NOT extra = 'a'")))] == [4]


def test_values_of_a_column_that_was_widened_are_of_its_new_type(path: Path) -> None:
    """What Spark does for ALTER COLUMN ... TYPE: the schema changes, and the files stay. No other reader here knows it."""
    day = datetime.date(2024, 1, 5)
    old = {
        "id": pa.array([1], pa.int8()),
        "f": pa.array([0.1], pa.float32()),
        "k": pa.array([3], pa.int32()),
        "day": [day],
    }
    write_deltalake(path, pa.table({**old, "d": pa.array([Decimal("1.5")], pa.decimal128(5, 1))}))
    wider = {"id": "long", "f": "double", "k": "double", "day": "timestamp_ntz", "d": "decimal(10,3)"}

    def act(action: dict[str, Any]) -> None:
        if "metaData" in action:
            schema = json.loads(action["metaData"]["schemaString"])
            for column in schema["fields"]:
                column["type"] = wider[column["name"]]
            action["metaData"]["schemaString"] = json.dumps(schema)
        if "protocol" in action:
            features = ["typeWidening", "timestampNtz"]
            action["protocol"] = {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": features,
                "writerFeatures": features,
            }

    edited(path, act)
    found = snapshot(str(path))
    assert [str(kind) for kind in found.schema.types] == [
        "int64",
        "double",
        "double",
        "timestamp[us]",
        "decimal128(10, 3)",
    ]
    [row] = rows(found)
    assert row == {
        "id": 1,
        "f": 0.10000000149011612,
        "k": 3.0,
        "day": datetime.datetime(2024, 1, 5),
        "d": Decimal("1.500"),
    }
    chosen = "k = 3 AND day = TIMESTAMP '2024-01-05 00:00:00' AND d = 1.5 AND f <> 0.1"
    assert snapshot(str(path), choice=Choice(chosen)).ref.rows == 1


# ---- checkpoints of the log ---------------------------------------------------------------------------------------------
def checkpointed(path: Path) -> tuple[Path, pa.Table]:
    """A table of six commits, with the checkpoint of the last one, which is taken away and given back."""
    for number in range(6):
        write_deltalake(path, table(30 * number), mode="append")
    DeltaTable(path).delete("id % 7 = 0")
    DeltaTable(path).create_checkpoint()
    log = path / "_delta_log"
    [file] = log.glob("*.checkpoint.parquet")
    actions = pq.read_table(file)
    file.unlink()
    (log / "_last_checkpoint").unlink()
    return log / file.name.partition(".")[0], actions


def parts(place: Path, actions: pa.Table, of: int, *numbers: int) -> None:
    for number in numbers:
        part = actions.take([row for row in range(len(actions)) if row % of == number - 1])
        pq.write_table(part, f"{place}.checkpoint.{number:010d}.{of:010d}.parquet")


def test_a_checkpoint_in_parts_is_read_if_all_are_there(path: Path) -> None:
    place, actions = checkpointed(path)
    whole = expected(path)
    parts(place, actions, 3, 1, 2)
    parts(place, actions, 2, 1)
    assert rows(snapshot(str(path))) == whole, "three parts of two checkpoints are none: the commits tell"
    parts(place, actions, 3, 3)
    for commit in range(6):
        (place.parent / f"{commit:020d}.json").unlink()
    assert rows(snapshot(str(path))) == whole


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_checkpoint_of_the_second_kind_is_read_with_its_sidecars(path: Path, ending: str) -> None:
    place, actions = checkpointed(path)
    whole, log = expected(path), place.parent
    feature = ["v2Checkpoint"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": feature, "writerFeatures": feature}
    added = actions.filter(pc.is_valid(actions.column("add"))).select(["add"])
    sidecars = []
    (log / "_sidecars").mkdir()
    for number, part in enumerate((added.slice(0, 3), added.slice(3))):
        name = f"{uuid.uuid4()}.parquet"
        pq.write_table(part, log / "_sidecars" / name)
        size = (log / "_sidecars" / name).stat().st_size
        sidecars.append({"path": name, "sizeInBytes": size, "modificationTime": number})
    first = [json.loads(line) for line in (log / f"{0:020d}.json").read_text().splitlines()]
    metadata = next(action["metaData"] for action in first if "metaData" in action)
    lines = [{"checkpointMetadata": {"version": 6}}, {"protocol": protocol}, {"metaData": metadata}]
    lines += [{"sidecar": sidecar} for sidecar in sidecars]
    name = f"{place}.checkpoint.{uuid.uuid4()}.{ending}"
    if ending == "json":
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        metadata["configuration"] = pa.scalar([], pa.map_(pa.string(), pa.string())).as_py()
        metadata["format"]["options"] = []
        kinds = {field.name: field.type for field in actions.schema}
        numbers = pa.struct([("version", pa.int64())])
        file = pa.struct([("path", pa.string()), ("sizeInBytes", pa.int64()), ("modificationTime", pa.int64())])
        types = {
            "checkpointMetadata": numbers,
            "protocol": kinds["protocol"],
            "metaData": kinds["metaData"],
            "sidecar": file,
        }
        pq.write_table(
            pa.table({n: pa.array([line.get(n) for line in lines], kind) for n, kind in types.items()}), name
        )
    for commit in range(7):
        (log / f"{commit:020d}.json").unlink()
    assert rows(snapshot(str(path))) == whole


def test_a_commit_that_a_listing_has_missed_is_asked_for(path: Path) -> None:
    """A listing of a folder that is written may have a commit, and not the one before it."""
    for number in range(3):
        write_deltalake(path, table(30 * number), mode="append")

    class Partial(FaultStore):
        def list(self, *arguments: Any, **options: Any) -> Iterator[ObjectInfo]:
            return (info for info in super().list(*arguments, **options) if not info.key.endswith("1.json"))

    found = snapshot(str(path), lambda url: Partial(open_store(url), lambda _: None))
    assert rows(found) == expected(path)


# ---- deleted rows ----------------------------------------------------------------------------------------------------------
Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def z85(data: bytes) -> str:
    """https://rfc.zeromq.org/spec/32: base 85 with another alphabet than Python's."""
    python = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    return base64.b85encode(data).decode().translate(str.maketrans(python, Z85))


def delete_by_vector(path: Path, deleted: Sequence[int], *, inline: bool = False) -> str:
    """What Spark does for DELETE with deletion vectors, to the first file: https://github.com/delta-io/delta/blob/master/PROTOCOL.md."""
    log = path / "_delta_log"
    number = max(int(file.stem) for file in log.glob("*.json"))
    actions = [json.loads(line) for file in sorted(log.glob("*.json")) for line in file.read_text().splitlines()]
    add = next(action["add"] for action in actions if "add" in action)
    bits = struct.pack("<IqI", 1681511377, 1, 0) + BitMap(deleted).serialize()
    name = uuid.uuid4()
    if inline:
        vector = {"storageType": "i", "pathOrInlineDv": z85(bits + bytes(-len(bits) % 4))}
    else:
        body = b"\x01" + struct.pack(">I", len(bits)) + bits + struct.pack(">I", zlib.crc32(bits))
        (path / f"deletion_vector_{name}.bin").write_bytes(body)
        vector = {"storageType": "u", "pathOrInlineDv": z85(name.bytes), "offset": 1}  # type: ignore[dict-item]
    feature = ["deletionVectors"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": feature, "writerFeatures": feature}
    remove = {"path": add["path"], "deletionTimestamp": 1, "dataChange": True, "size": add["size"]}
    new = {**add, "deletionVector": {**vector, "sizeInBytes": len(bits), "cardinality": len(deleted)}}
    lines = [{"protocol": protocol}, {"remove": remove}, {"add": new}]
    (log / f"{number + 1:020d}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"deletion_vector_{name}.bin"


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("partition", [None, ["day"]])
def test_rows_that_deletion_vectors_delete_are_left_out(path: Path, inline: bool, partition: list[str] | None) -> None:
    write_deltalake(path, table(0, 40), partition_by=partition)
    delete_by_vector(path, [0, 2, 3], inline=inline)
    found = snapshot(str(path))
    assert len(rows(found)) == 37
    assert rows(found) == expected(path)
    assert rows(snapshot(str(path), version=0)) == expected(path, 0)
    chosen = snapshot(str(path), choice=Choice("id BETWEEN 1 AND 30"))
    assert rows(chosen) == expected(path, where=pl.col("id").is_between(1, 30))
    assert chosen.ref.chosen is not None
    assert chosen.ref.chosen.of_rows == 37


def test_deleted_rows_of_a_file_whose_path_is_encoded(path: Path) -> None:
    """polars 2.1 passes such a vector over."""
    write_deltalake(path, table(0, 40), partition_by=["name"])
    delete_by_vector(path, [0, 2, 3])
    left = rows(snapshot(str(path)))
    gone = [row for row in expected(path, 0) if row not in left]
    assert len(gone) == 3
    assert len({row["name"] for row in gone}) == 1


def test_deleted_rows_of_many_row_groups(path: Path) -> None:
    from deltalake import WriterProperties

    write_deltalake(path, table(0, 1000), writer_properties=WriterProperties(max_row_group_size=100))
    delete_by_vector(path, [*range(200, 300), 301, 999])
    found = snapshot(str(path))
    assert len(found.row_groups) == 9
    assert rows(found) == expected(path)


def test_other_deleted_rows_of_the_same_file_are_another_dataset(path: Path) -> None:
    write_deltalake(path, table(0, 40))
    prints = {snapshot(str(path)).ref.fingerprint}
    for deleted in ([1], [1, 2]):
        shutil.copytree(path, path.parent / f"copy {len(deleted)}")
        delete_by_vector(path.parent / f"copy {len(deleted)}", deleted)
        prints.add(snapshot(str(path.parent / f"copy {len(deleted)}"), choice=Choice("id >= 0")).standing)
    assert len(prints) == 3


def test_a_deletion_vector_that_is_gone_is_an_error(path: Path) -> None:
    write_deltalake(path, table(0, 40))
    (path / delete_by_vector(path, [1])).unlink()
    with pytest.raises(DatasetError, match=r"version 1 of this Delta table cannot be read: .*deletion_vector_"):
        snapshot(str(path))


# ---- what is refused --------------------------------------------------------------------------------------------------------
def edited(path: Path, act: Callable[[dict[str, Any]], None]) -> None:
    """The first commit, with each of its actions changed."""
    log = path / "_delta_log/00000000000000000000.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        act(action)
    log.write_text("".join(json.dumps(action) + "\n" for action in actions))


def test_column_mapping_is_refused_with_the_remedy(path: Path) -> None:
    write_deltalake(path, table(0, 3))

    def act(action: dict[str, Any]) -> None:
        if "metaData" in action:
            action["metaData"]["configuration"] = {
                "delta.columnMapping.mode": "name",
                "delta.columnMapping.maxColumnId": "4",
            }
            schema = json.loads(action["metaData"]["schemaString"])
            for number, column in enumerate(schema["fields"]):
                column["metadata"] = {
                    "delta.columnMapping.id": number + 1,
                    "delta.columnMapping.physicalName": column["name"],
                }
            action["metaData"]["schemaString"] = json.dumps(schema)
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}

    edited(path, act)
    with pytest.raises(UnsupportedTable, match=r"column mapping \(name\).*DROP FEATURE columnMapping"):
        snapshot(str(path))


@pytest.mark.parametrize("version", [3, 4])
def test_what_is_not_known_of_readers_is_refused_with_the_remedy(path: Path, version: int) -> None:
    write_deltalake(path, table(0, 3))

    def act(action: dict[str, Any]) -> None:
        if "protocol" in action:
            feature = ["somethingNew"]
            action["protocol"] = {
                "minReaderVersion": version,
                "minWriterVersion": 7,
                "readerFeatures": feature,
                "writerFeatures": feature,
            }

    edited(path, act)
    with pytest.raises(DatasetError, match=r"Delta table.*(somethingNew.*drop the feature|Reader features)"):
        snapshot(str(path))


def test_a_file_outside_of_the_table_is_refused(path: Path) -> None:
    write_deltalake(path, table(0, 3))

    def act(action: dict[str, Any]) -> None:
        if "add" in action:
            action["add"]["path"] = f"file:///elsewhere/{action['add']['path']}"

    edited(path, act)
    with pytest.raises(UnsupportedTable, match="files outside of its folder, as a shallow clone has"):
        snapshot(str(path))


def test_a_file_of_another_size_than_the_log_says_is_an_error(path: Path) -> None:
    write_deltalake(path, table(0, 3))
    edited(path, lambda action: action.get("add", {}).update(size=7))
    with pytest.raises(DatasetError, match="bytes where version 0 of the Delta table says 7"):
        snapshot(str(path))


def test_a_damaged_log_is_an_error_that_names_the_table(path: Path) -> None:
    write_deltalake(path, table(0, 3))
    (path / "_delta_log/00000000000000000000.json").write_text("{")
    with pytest.raises(DatasetError, match=f"{path}: version 0 of this Delta table cannot be read"):
        snapshot(str(path))


def test_without_its_library_the_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_deltalake(path, table(0, 3))
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(UnsupportedTable, match=r"deltalake is not installed: pip install 'tidemill\[delta\]'"):
        snapshot(str(path))


def test_plain_files_have_no_versions(tmp_path: Path) -> None:
    open_store(str(tmp_path)).write("a.parquet", b"")
    with pytest.raises(DatasetError, match="is no table of Delta Lake or Iceberg: it has no versions"):
        snapshot(str(tmp_path), version=3)


def test_a_folder_that_holds_a_table_and_a_folder_of_one_are_refused(path: Path) -> None:
    write_deltalake(path, table(0, 3), partition_by=["day"])
    for url in (path.parent, path / "day=2024-01-01"):
        with pytest.raises(UnsupportedTable, match=f"{path} is a Delta table: .* Name it by itself to train on it"):
            snapshot(str(url))


# ---- pinned ------------------------------------------------------------------------------------------------------------------
def test_a_table_that_is_written_meanwhile_is_read_as_its_version_says(path: Path) -> None:
    """Between any two calls of the store somebody appends, deletes, or optimizes: the rows are exactly those of one version."""
    write_deltalake(path, table(0, 12), partition_by=["day"])
    acts = [
        lambda n: write_deltalake(path, table(1000 * n, 6), mode="append"),
        lambda n: DeltaTable(path).delete(f"id = {1000 * (n - 1)}"),
        lambda n: DeltaTable(path).optimize.compact(),
    ]
    done = [0]

    def write(call: Call) -> None:
        if call.phase == "before" and done[0] < 12:
            done[0] += 1
            acts[done[0] % 3](done[0])

    found = snapshot(str(path), hooked(write))
    assert found.ref.table is not None
    assert DeltaTable(path).version() > found.ref.table.version
    assert rows(found) == expected(path, found.ref.table.version)


def test_a_file_that_is_replaced_or_vacuumed_after_the_snapshot_is_noticed(path: Path) -> None:
    write_deltalake(path, table(0, 12))
    found = snapshot(str(path))
    DeltaTable(path).delete("id < 6")
    DeltaTable(path).vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(
        DatasetChanged,
        match=r"a file of version 0 of the Delta table, went or was replaced .* as by a vacuum.*run again",
    ):
        rows(found)


def test_another_process_pins_the_same_version(path: Path) -> None:
    history(path)
    for choice in (None, Choice("id > 50 AND day <> '2024-01-01'")):
        first = snapshot(str(path), version=5, choice=choice)
        found = pinned(first.ref, first.folder, first.files)
        assert found.ref == first.ref
        assert rows(found) == rows(first)


def test_the_columns_of_a_table_are_known_without_its_files(path: Path) -> None:
    write_deltalake(path, table(0, 3), partition_by=["day"])
    reads: list[str] = []

    def stores(url: str) -> Store:
        return FaultStore(open_store(url), lambda call: reads.append(call.key) if call.verb == "read" else None)

    name, schema = peek(str(path), stores)
    assert name == f"file://{path}"
    assert sorted(schema.names) == ["day", "id", "name", "x"]
    assert {os.path.dirname(key) for key in reads} == {"_delta_log"}


def test_a_condition_on_a_partition_opens_its_files_alone(path: Path) -> None:
    write_deltalake(path, table(0, 300), partition_by=["day"])
    reads: list[str] = []

    def stores(url: str) -> Store:
        return FaultStore(open_store(url), lambda call: reads.append(call.key) if call.verb == "read" else None)

    found = snapshot(str(path), stores, choice=Choice("day = DATE '2024-01-02'"))
    assert len(rows(found)) == 100
    assert {key.partition("/")[0] for key in reads} == {"_delta_log", "day=2024-01-02"}


def test_an_error_of_the_store_stays_what_it_is(path: Path) -> None:
    write_deltalake(path, table(0, 3))

    def away(call: Call) -> None:
        if call.verb == "read" and call.key.startswith("_delta_log"):
            raise Unavailable("away")

    with pytest.raises(Unavailable):
        snapshot(str(path), hooked(away))

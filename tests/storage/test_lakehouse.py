"""Tables of Delta Lake, Iceberg and Hudi are no folders of files: refused as an inbox, and inside of another folder.

As datasets of their own, `test_delta.py` and `test_iceberg.py` have those that are read.
"""

import io
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.storage.faults import Call, FaultStore
from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import DatasetError, PermissionDenied, UnsupportedTable
from tidemill.storage.inbox import open_inbox
from tidemill.storage.memory import MemoryStore
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

SINK = io.BytesIO()
pq.write_table(pa.table({"x": [1.0]}), SINK)
ROWS = SINK.getvalue()

TABLES = {
    "Delta": ("_delta_log/00000000000000000000.json", "part-0.snappy.parquet"),
    "Hudi": (".hoodie/hoodie.properties", "f1-0_0-1-1_20240101000000.parquet"),
    "Iceberg": ("metadata/00000-5f.metadata.json", "data/00000-0.parquet"),
    "Iceberg by its hint": ("metadata/version-hint.text", "data/00000-0.parquet"),
    "Iceberg by a snapshot": ("metadata/snap-1.avro", "data/day=1/00000-0.parquet"),
    "Iceberg, compressed": ("metadata/v1.gz.metadata.json", "data/00000-0.parquet"),
}


@pytest.fixture(params=TABLES)
def system(request: pytest.FixtureRequest, store: Store) -> str:
    for folder in ("", "lake/"):
        for key in TABLES[request.param]:
            store.write(f"tables/{folder}t/{key}", ROWS)
    store.write("tables/plain.parquet", ROWS)
    return str(request.param).split()[0].removesuffix(",")


def test_what_only_looks_like_a_table_is_no_dataset(store: Store, system: str) -> None:
    with pytest.raises(DatasetError, match=rf"/t.* {system} table") as refused:
        snapshot(f"{store.url}/tables/t")
    assert isinstance(refused.value, UnsupportedTable) or system != "Hudi"


@pytest.mark.parametrize("folder", ["tables/lake", "tables"])
def test_a_folder_that_holds_a_table_is_no_dataset(store: Store, system: str, folder: str) -> None:
    with pytest.raises(UnsupportedTable, match=rf"/t is an? {system} table.*plain Parquet files to another folder"):
        snapshot(f"{store.url}/{folder}")


@pytest.mark.parametrize("folder", ["tables/t", "tables/lake", "tables"])
def test_a_table_is_no_inbox_nor_is_a_folder_that_holds_one(store: Store, system: str, folder: str) -> None:
    with pytest.raises(UnsupportedTable, match=f"/t is an? {system} table"):
        open_inbox(f"{store.url}/{folder}").list(10, lambda info: False)


@pytest.mark.parametrize(
    ("marker", "part"),
    [
        ("t/_delta_log/0.json", "t/x=1"),
        ("t/_delta_log/0.json", "t/x=1/y=2"),
        ("t/metadata/v1.metadata.json", "t/data"),
        ("t/metadata/v1.metadata.json", "t/data/x=1"),
        ("t/metadata/v1.metadata.json", "t/x=1"),
        ("t/.hoodie/hoodie.properties", "t/x=1"),
    ],
)
def test_a_folder_inside_of_a_table_is_known_by_the_markers_above_it(store: Store, marker: str, part: str) -> None:
    store.write(marker, b"{}")
    store.write(f"{part}/a.parquet", ROWS)
    with pytest.raises(UnsupportedTable, match=f"{store.url}/t is an? "):
        snapshot(f"{store.url}/{part}")
    with pytest.raises(UnsupportedTable, match=f"{store.url}/t is an? "):
        open_inbox(f"{store.url}/{part}").list(10, lambda info: False)


@pytest.mark.parametrize("key", ["metadata/notes.json", "metadata.json", "a_delta_log/x", "x/metadata/a.parquet"])
def test_a_folder_of_files_may_have_names_that_are_nearly_markers(key: str) -> None:
    store = MemoryStore(uuid.uuid4().hex, "data")
    store.write("a.parquet", ROWS)
    store.write(key, ROWS)
    assert snapshot(store.url).ref.rows >= 1


def test_what_may_not_be_seen_above_a_folder_is_no_reason_to_refuse_it() -> None:
    store = MemoryStore(uuid.uuid4().hex, "data")
    store.write("data/a.parquet", ROWS)

    def hook(call: Call) -> None:
        if call.verb == "list" and call.key:
            raise PermissionDenied("not yours")

    assert snapshot(f"{store.url}/data", lambda url: FaultStore(open_store(url), hook)).ref.rows == 1

"""A dataset: a folder of Parquet files, as it was at one moment."""

import gc
import io
import os
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.storage.faults import Call, FaultStore
from tidemill.storage import parquet
from tidemill.storage.dataset import Snapshot, snapshot
from tidemill.storage.errors import DatasetChanged, DatasetError, StoreNotFound, Unavailable, UnsupportedTable
from tidemill.storage.memory import MemoryStore
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def rows(*numbers: int, **options: Any) -> bytes:
    return written(pa.table({"x": pa.array(numbers, pa.int64())}), **options)


def xs(taken: Snapshot, column: str = "x") -> list[Any]:
    return [value for group in taken.row_groups for value in group.read([column]).column(column).to_pylist()]


@pytest.fixture
def memory() -> MemoryStore:
    """For what does not depend on the backend."""
    return MemoryStore(uuid.uuid4().hex, "dataset")


# ---- taking a snapshot ---------------------------------------------------------------------------------------------------


def test_a_folder_of_files_is_read_in_the_order_of_their_names(store: Store) -> None:
    store.write("b.parquet", rows(3, 4, 5, row_group_size=2))
    store.write("a/z.parquet", rows(1, 2))
    taken = snapshot(store.url)
    assert [g.name for g in taken.row_groups] == [
        "a/z.parquet row group 0",
        "b.parquet row group 0",
        "b.parquet row group 1",
    ]
    assert xs(taken) == [1, 2, 3, 4, 5]
    assert (taken.ref.url, taken.ref.files, taken.ref.rows) == (store.url, 2, 5)


def test_the_same_files_have_the_same_fingerprint(store: Store) -> None:
    store.write("b.parquet", rows(2))
    store.write("a.parquet", rows(1))
    first = snapshot(store.url).ref
    assert snapshot(store.url).ref == first
    store.write("_SUCCESS", b"")
    store.write("notes.txt", b"not data")
    assert snapshot(store.url).ref == first


def test_any_change_of_the_files_changes_the_fingerprint(store: Store) -> None:
    seen = set()

    def look() -> None:
        seen.add(snapshot(store.url).ref.fingerprint)

    store.write("a.parquet", rows(1))
    look()
    store.write("b.parquet", rows(1))
    look()
    store.write("b.parquet", rows(2))
    look()
    store.write("c.parquet", rows(2))
    store.delete("b.parquet")
    look()
    store.write("d.parquet", rows())
    look()
    assert len(seen) == 5


@pytest.mark.parametrize(
    "act",
    [lambda path: path.chmod(0o600), lambda path: os.link(path, path.parent.parent / "backup")],
    ids=["chmod", "link"],
)
def test_permissions_and_hard_links_leave_the_fingerprint(tmp_path: Path, act: Callable[[Path], None]) -> None:
    """As of a backup, or a volume that is mounted for a group: a run that is resumed goes on."""
    store = open_store(str(tmp_path / "dataset"))
    store.write("a.parquet", rows(1))
    first = snapshot(store.url)
    act(tmp_path / "dataset" / "a.parquet")

    assert snapshot(store.url).ref == first.ref
    with pytest.raises(DatasetChanged):  # not within a run, which reads by the etag
        first.row_groups[0].read(["x"])


def test_other_rows_in_the_same_inode_with_the_same_size_and_time_have_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(rows(1))
    first, before = snapshot(str(tmp_path)).ref.fingerprint, path.stat()
    with path.open("r+b") as file:
        file.write(rows(2))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)

    assert snapshot(str(tmp_path)).ref.fingerprint != first


def test_names_and_etags_cannot_be_mixed_up_in_the_fingerprint(memory: MemoryStore) -> None:
    memory.write('a", 1, "x.parquet', rows(1))
    first = snapshot(memory.url).ref.fingerprint
    memory.delete('a", 1, "x.parquet')
    memory.write("a.parquet", rows(1))
    assert snapshot(memory.url).ref.fingerprint != first


NO_DATA = [
    *("_SUCCESS", "_metadata.parquet", ".a.parquet", ".tmp/a.parquet", "_temporary/0/a.parquet", "a/_b/c.parquet"),
    *("a.parquet.crc", "a.csv", "parquet", "README", "a.parquet.tmp", "x.pq.bak", ".b=1/a.parquet"),
]


@pytest.mark.parametrize("name", NO_DATA)
def test_hidden_and_foreign_files_do_not_count(memory: MemoryStore, name: str) -> None:
    memory.write("good.parquet", rows(1))
    memory.write(name, b"not Parquet at all")
    assert snapshot(memory.url).ref.files == 1


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "a.parq", "a.pq", "x.parquet/part-0.parquet", "a b%20ü.pq"])
def test_files_count_by_their_ending(memory: MemoryStore, name: str) -> None:
    memory.write(name, rows(1))
    assert xs(snapshot(memory.url)) == [1]


def test_partition_folders_of_a_column_that_begins_with_an_underscore_are_data(store: Store) -> None:
    store.write("_year=2020/a.parquet", rows(1))
    store.write("_year=2021/_a=x/b.parquet", rows(2))
    store.write("plain/c.parquet", rows(3))
    taken = snapshot(store.url)
    assert (xs(taken), taken.passed_over) == ([1, 2, 3], ())
    assert taken.row_groups[1].read(["_year", "_a"]).to_pylist() == [{"_year": 2021, "_a": "x"}]


def test_what_is_passed_over_is_counted_by_its_reason_and_told_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.write("a.parquet", rows(1))
    for key in ("_SUCCESS", ".hidden/b.parquet", "_c.parquet", "part-00000", "d.csv", "x/part-00001", "x/part-00002"):
        store.write(key, rows(2))
    with caplog.at_level("INFO", "tidemill.storage"):
        taken = snapshot(store.url)
    assert (taken.ref.rows, [str(kind) for kind in taken.passed_over]) == (
        1,
        [
            "2 hidden Parquet files, whose name or folder begins with . or _ (.hidden/b.parquet, _c.parquet)",
            "4 files that do not end in .parquet, .parq, .pq (d.csv, part-00000, x/part-00001, ...)",
            "1 other hidden files (_SUCCESS)",
        ],
    )
    (line,) = [record for record in caplog.records if "passed over" in record.message]
    assert line.levelname == "WARNING"
    assert all(f"{store.url}: passed over" in line.message and str(kind) in line.message for kind in taken.passed_over)


def test_markers_of_writers_are_no_reason_for_a_warning(memory: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    for key in ("_SUCCESS", ".a.parquet.crc", "folder/"):
        memory.write(key, b"")
    memory.write("a.parquet", rows(1))
    with caplog.at_level("INFO", "tidemill.storage"):
        (kind,) = snapshot(memory.url).passed_over
    assert (kind.count, [record.levelname for record in caplog.records]) == (2, ["INFO"])


def test_a_folder_of_nothing_that_counts_says_what_was_passed_over(memory: MemoryStore) -> None:
    memory.write("part-00000", rows(1))
    with pytest.raises(DatasetError, match=r"holds no Parquet file.*1 files that do not end in .* \(part-00000\)"):
        snapshot(memory.url)


def test_a_partition_has_the_type_that_it_is_told_to_have(memory: MemoryStore) -> None:
    memory.write("n=1/_t=2.5/a.parquet", rows(1))
    table = snapshot(memory.url, types={"n": pa.string(), "_t": pa.float64()}).row_groups[0].read(["n", "_t"])
    assert (table.schema.types, table.to_pylist()) == ([pa.string(), pa.float64()], [{"n": "1", "_t": 2.5}])
    with pytest.raises(DatasetError, match=r"n=1/_t=2\.5/a\.parquet: its folder n=1 is no time.*; move it to"):
        snapshot(memory.url, types={"n": pa.timestamp("us")})


def test_the_schema_of_all_files_has_every_column_with_a_type_that_is_not_null(memory: MemoryStore) -> None:
    memory.write("a.parquet", written(pa.table({"x": pa.nulls(1), "y": [1], "l": pa.array([[]], pa.list_(pa.null()))})))
    memory.write("b.parquet", written(pa.table({"z": ["text"], "y": [1.5], "x": [1.5], "l": [[1]]})))
    memory.write("c.parquet", written(pa.table({"x": [1], "n": pa.nulls(1)})))
    schema = snapshot(memory.url).schema
    assert schema.names == ["x", "y", "l", "z", "n"]
    assert [schema.field(name).type for name in "xyn"] == [pa.float64(), pa.int64(), pa.null()]
    assert schema.field("l").type.value_type == pa.int64()


def test_a_file_without_rows_counts_but_has_no_row_groups(memory: MemoryStore) -> None:
    memory.write("a.parquet", rows())
    memory.write("b.parquet", rows(1))
    taken = snapshot(memory.url)
    assert (taken.ref.files, taken.ref.rows, len(taken.row_groups)) == (2, 1, 1)


# ---- what is no dataset --------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_no_dataset(store: Store) -> None:
    store.write("README.md", b"")
    with pytest.raises(DatasetError, match=rf"{store.url} holds no Parquet file.*Check the URL"):
        snapshot(store.url)


def test_files_without_rows_are_no_dataset(store: Store) -> None:
    store.write("a.parquet", rows())
    with pytest.raises(DatasetError, match="its 1 Parquet files hold no rows"):
        snapshot(store.url)


def test_a_folder_that_is_not_there_is_a_wrong_url(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(StoreNotFound):
        snapshot(str(tmp_path_factory.mktemp("x") / "missing"))


@pytest.mark.parametrize("bad", [b"", b"PAR1", b"text" * 10, rows(1)[:-9], rows(1)[:-8] + b"\xff\xff\xff\x7fPAR1"])
def test_a_file_that_is_no_parquet_is_named(memory: MemoryStore, bad: bytes) -> None:
    memory.write("a.parquet", rows(1))
    memory.write("bad.parquet", bad)
    with pytest.raises(DatasetError, match=r"bad\.parquet") as raised:
        snapshot(memory.url)
    assert type(raised.value) is DatasetError


def test_a_file_with_bad_data_is_named_when_it_is_read(memory: MemoryStore) -> None:
    data = bytearray(rows(1, 2, 3, write_page_checksum=True, use_dictionary=False))
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0)
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    memory.write("bad.parquet", bytes(data))
    with pytest.raises(DatasetError, match=rf"{memory.url}/bad\.parquet: row group 0"):
        xs(snapshot(memory.url))


@pytest.mark.parametrize("name", ["part 0.parquet", "part-00000", "_a.parquet"])
def test_a_single_file_is_a_dataset_whatever_its_name(store: Store, name: str) -> None:
    store.write(f"folder/{name}", rows(1, 2, row_group_size=1))
    store.write("folder/b.parquet", rows(3))
    taken = snapshot(f"{store.url}/folder/{name}")
    assert (xs(taken), taken.ref.url, taken.ref.files) == ([1, 2], f"{store.url}/folder/{name}", 1)
    assert [key for key, _ in taken.schemas] == [f"{store.url}/folder/{name} row group 0"]
    assert taken.ref == snapshot(f"{store.url}/folder/{name}").ref
    store.write(f"folder/{name}", rows(1, 3, row_group_size=1))
    assert taken.ref.fingerprint != snapshot(f"{store.url}/folder/{name}").ref.fingerprint
    with pytest.raises(DatasetChanged, match="changed while"):
        xs(taken)


def test_a_single_file_in_a_table_is_a_part_of_it(store: Store) -> None:
    store.write("t/_delta_log/0.json", b"{}")
    store.write("t/x=1/a.parquet", rows(1))
    with pytest.raises(UnsupportedTable, match="/t is a Delta table"):
        snapshot(f"{store.url}/t/x=1/a.parquet")


@pytest.mark.parametrize("pattern", ["*.parquet", "x=*/a.parquet", "part-[01].parquet"])
def test_a_pattern_is_refused_with_the_remedy(store: Store, pattern: str) -> None:
    store.write("folder/part-0.parquet", rows(1))
    with pytest.raises(
        DatasetError, match=r"is a pattern, which is not expanded\. Name the folder: all Parquet files below"
    ):
        snapshot(f"{store.url}/folder/{pattern}")


def test_a_name_that_looks_like_a_pattern_is_a_name(store: Store) -> None:
    store.write("what[0]/a*.parquet", rows(1))
    assert xs(snapshot(f"{store.url}/what[0]")) == xs(snapshot(f"{store.url}/what[0]/a*.parquet")) == [1]


# ---- what changes meanwhile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "rewritten with the same rows", "deleted"])
def test_a_file_that_changed_since_the_snapshot_is_named_and_never_mixed_in(store: Store, change: str) -> None:
    store.write("a.parquet", rows(1))
    store.write("b.parquet", rows(2))
    taken = snapshot(store.url)
    if change == "deleted":
        store.delete("b.parquet")
    else:
        store.write("b.parquet", rows(3) if change == "replaced" else rows(2, compression="none"))
    assert taken.row_groups[0].read(["x"]).num_rows == 1
    with pytest.raises(DatasetChanged, match=r"b\.parquet changed while.*Nothing was registered"):
        taken.row_groups[1].read(["x"])


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_file_that_changes_while_the_snapshot_is_taken_is_named(memory: MemoryStore, change: str) -> None:
    for name in "abc":
        memory.write(f"{name}.parquet", rows(1))

    def hook(call: Call) -> None:
        if (call.verb, call.phase) == ("list", "after"):
            memory.delete("b.parquet") if change == "deleted" else memory.write("b.parquet", rows(2))

    with pytest.raises(DatasetChanged, match=r"b\.parquet changed"):
        snapshot(memory.url, lambda url: FaultStore(open_store(url), hook))


def test_files_added_later_are_not_part_of_it(memory: MemoryStore) -> None:
    memory.write("b.parquet", rows(1))
    taken = snapshot(memory.url)
    memory.write("a.parquet", rows(2))
    assert xs(taken) == [1]


def test_an_unreachable_store_is_not_a_changed_dataset(memory: MemoryStore) -> None:
    memory.write("a.parquet", rows(1))

    def hook(call: Call) -> None:
        if call.verb == "read":
            raise Unavailable("no answer")

    with pytest.raises(Unavailable):
        snapshot(memory.url, lambda url: FaultStore(open_store(url), hook))


# ---- hive partitions -----------------------------------------------------------------------------------------------------


def test_folders_named_like_columns_become_columns(store: Store) -> None:
    store.write("year=2025/city=Bremen/a.parquet", rows(1))
    store.write("year=2026/city=K%C3%B6ln/a.parquet", rows(2, 3))
    taken = snapshot(store.url)
    assert taken.row_groups[0].schema.names == ["x", "year", "city"]
    assert (xs(taken), xs(taken, "year"), xs(taken, "city")) == (
        [1, 2, 3],
        [2025, 2026, 2026],
        ["Bremen", "Köln", "Köln"],
    )
    assert len(taken.schemas) == 1
    assert taken.row_groups[0].read(["year", "x"]).schema.types == [pa.int64(), pa.int64()]


@pytest.mark.parametrize(
    ("folders", "values"),
    [
        (["k=1", "k=__HIVE_DEFAULT_PARTITION__", "k=3"], [1, None, 3]),
        (["k=a", "k=__HIVE_DEFAULT_PARTITION__"], ["a", None]),
        (["k=-1", "k=0", "k=7"], [-1, 0, 7]),
        (["k=1", "k=b"], ["1", "b"]),
        (["k=1.5", "k=2"], ["1.5", "2"]),
        (["k=", "k=x"], ["", "x"]),
        (["k=99999999999999999999", "k=1"], ["99999999999999999999", "1"]),
        (["k=²", "k=٣"], ["²", "٣"]),
        (["k=%2F%3D", "k=%zz"], ["/=", "%zz"]),
        (["k=__HIVE_DEFAULT_PARTITION__"], [None]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_all_files_agree_on_the_type_of_a_partition(
    memory: MemoryStore, folders: list[str], values: list[object]
) -> None:
    for i, folder in enumerate(folders):
        memory.write(f"{i}/{folder}/a.parquet", rows(i))
    taken = snapshot(memory.url)
    assert xs(taken, "k") == values
    assert len(taken.schemas) == 1


def test_a_column_of_the_file_comes_before_one_of_its_path(memory: MemoryStore) -> None:
    memory.write("x=99/a.parquet", rows(1))
    taken = snapshot(memory.url)
    assert (taken.row_groups[0].schema.names, xs(taken)) == (["x"], [1])


def test_folders_without_a_name_or_a_value_are_just_folders(memory: MemoryStore) -> None:
    memory.write("=1/plain/a=b.parquet", rows(1))
    assert snapshot(memory.url).row_groups[0].schema.names == ["x"]


# ---- many files ----------------------------------------------------------------------------------------------------------


def test_different_schemas_are_told_with_the_first_place_of_each(memory: MemoryStore) -> None:
    memory.write("a.parquet", rows(1))
    memory.write("b.parquet", written(pa.table({"x": [1.5]})))
    memory.write("c.parquet", rows(2))
    memory.write("d.parquet", written(pa.table({"x": [2.5]}).replace_schema_metadata({"only": "metadata"})))
    assert [(name, str(schema.field("x").type)) for name, schema in snapshot(memory.url).schemas] == [
        (f"{memory.url}/a.parquet row group 0", "int64"),
        (f"{memory.url}/b.parquet row group 0", "double"),
    ]


def test_many_equal_files_share_one_schema(memory: MemoryStore) -> None:
    data = written(pa.table({f"column {i}": [i] for i in range(30)}))
    for i in range(200):
        memory.write(f"day={i}/a.parquet", data)
    taken = snapshot(memory.url)
    assert len({id(group.schema) for group in taken.row_groups}) == 1
    assert len(taken.schemas) == 1
    assert xs(taken, "day") == sorted(range(200), key=lambda i: f"day={i}/")


def test_the_list_of_row_groups_is_small(memory: MemoryStore) -> None:
    wide = written(pa.table({f"column {i}": range(60) for i in range(50)}), row_group_size=1)
    memory.write("a.parquet", wide)
    taken = snapshot(memory.url)
    groups = taken.row_groups
    assert len(groups) == 60
    seen = {id(groups[0].schema), id(groups[0]._open)}
    own = [o for g in groups for o in gc.get_referents(g) if id(o) not in seen and not isinstance(o, type)]
    assert sum(map(sys.getsizeof, [*groups, *own])) / len(groups) < 1_000


def test_reading_keeps_few_footers_and_fetches_each_seldom(memory: MemoryStore) -> None:
    for i in range(100):
        memory.write(f"{i:03d}.parquet", rows(i, i, row_group_size=1))
    calls: Counter[str] = Counter()

    def hook(call: Call) -> None:
        calls[f"{call.verb} {call.phase}"] += 1

    taken = snapshot(memory.url, lambda url: FaultStore(open_store(url), hook))
    assert calls == {"list before": 1, "list after": 1, "read before": 100, "read after": 100}
    calls.clear()
    assert len(xs(taken)) == 200
    assert calls["read before"] == 100 + 200  # each footer again, once, and each row group's column
    assert taken.row_groups[0]._open.func.__self__._cached.cache_info().currsize <= 64  # type: ignore[attr-defined]


def requests_of(memory: MemoryStore) -> tuple[Counter[str], Snapshot]:
    """Counts the reads from now on, by whether they are of a file's head, its footer or its row groups."""
    reads: Counter[str] = Counter()
    read = MemoryStore.read

    class Counting(MemoryStore):
        def read(self, key: str, **where: Any) -> bytes:
            start, length = where["start"], where["length"]
            at_end = start + length == memory.stat(key).size
            reads["footer" if at_end else "head" if (start, length) == (0, 4) else "row group"] += 1
            return read(self, key, **where)

    taken = snapshot(memory.url, lambda url: Counting(*url.removeprefix("memory://").split("/", 1)))
    return reads, taken


def noise(rows: int) -> bytes:
    return written(
        pa.table({"x": pa.array(np.random.default_rng(rows).integers(0, 2**60, rows))}), use_dictionary=False
    )


def test_what_was_found_out_about_many_files_is_known_when_they_are_opened_again(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(70):
        memory.write(f"{i:03d}.parquet", noise(10_000 + i))
    checks: list[int] = []
    decoded_bytes = parquet.decoded_bytes
    monkeypatch.setattr(parquet, "decoded_bytes", lambda *args: checks.append(1) or decoded_bytes(*args))  # type: ignore[func-returns-value]
    reads, taken = requests_of(memory)
    assert reads == {"head": 70, "footer": 70}
    reads.clear()
    first = xs(taken)
    assert reads == {"footer": 70, "row group": 70}
    assert len(checks) == 70
    reads.clear()
    assert xs(taken) == first
    assert reads == {"footer": 70, "row group": 70}
    assert len(checks) == 70


def test_a_long_footer_is_one_request_when_its_file_is_opened_again(memory: MemoryStore) -> None:
    long = written(pa.table({f"a column whose name is long {i:0100}": range(3) for i in range(400)}))
    for i in range(65):
        memory.write(f"{i:03d}.parquet", long)
    assert int.from_bytes(long[-8:-4], "little") > 64 * 1024
    reads, taken = requests_of(memory)
    assert reads["footer"] == 65
    assert reads["row group"] > 0  # the rest of the footers
    reads.clear()
    assert xs(taken, f"a column whose name is long {7:0100}") == [0, 1, 2] * 65
    assert reads == {"footer": 65, "row group": 65}


def test_what_is_found_out_is_kept_of_a_bounded_number_of_row_groups(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.write("a.parquet", rows(*range(60), row_group_size=1))
    checks: list[int] = []
    decoded_bytes = parquet.decoded_bytes
    monkeypatch.setattr(parquet, "decoded_bytes", lambda *args: checks.append(1) or decoded_bytes(*args))  # type: ignore[func-returns-value]
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 10_000)
    taken = snapshot(memory.url)
    for _ in range(3):
        assert xs(taken) == list(range(60))
    assert 60 + 2 * 20 < len(checks) < 60 + 2 * 40  # the first 20 to 40 are kept


def test_several_readers_open_a_file_once(memory: MemoryStore) -> None:
    for i in range(70):
        memory.write(f"{i:03d}.parquet", rows(*range(4), row_group_size=1))
    calls: Counter[str] = Counter()
    slow = threading.Event()

    def hook(call: Call) -> None:
        calls[f"{call.verb} {call.phase}"] += 1
        slow.wait(0.001)

    taken = snapshot(memory.url, lambda url: FaultStore(open_store(url), hook))
    calls.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda group: group.read(["x"])["x"].to_pylist(), taken.row_groups))
    assert found == [[0], [1], [2], [3]] * 70
    assert calls["read before"] == 70 + 280


def test_several_row_groups_are_worth_reading_at_once_if_they_come_over_a_network(store: Store) -> None:
    store.write("a.parquet", rows(1, 2, row_group_size=1))
    assert [group.readers for group in snapshot(store.url).row_groups] == [3 if store.url.startswith("s3:") else 1] * 2


def test_a_store_is_opened_by_the_given_factory(make_url: Callable[[str], str]) -> None:
    store = open_store(make_url("dataset"))
    store.write("a.parquet", rows(1))
    opened: list[str] = []

    def factory(url: str) -> Store:
        opened.append(url)
        return open_store(url)

    assert xs(snapshot(make_url("dataset"), factory)) == [1]
    assert opened == [make_url("dataset")]

"""Chosen rows of a dataset: those that DuckDB chooses, whatever folders, statistics and row groups leave to be asked."""

import datetime
import uuid
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from tests.data import parquet, put
from tests.storage.faults import Call, FaultStore
from tidemill.storage.choice import Choice, Window
from tidemill.storage.dataset import Snapshot, pinned, snapshot
from tidemill.storage.errors import DatasetError, Unavailable
from tidemill.storage.groups import truth
from tidemill.storage.memory import MemoryStore
from tidemill.storage.sql import parse
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

UTC = datetime.UTC


def taken(url: str, where: str, **options: Any) -> Snapshot:
    return snapshot(url, choice=Choice(where), **options)


def read(found: Snapshot, column: str) -> list[Any]:
    return [value for group in found.row_groups for value in group.read([column]).column(column).to_pylist()]


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(uuid.uuid4().hex, "dataset")


# ---- the same rows as DuckDB ------------------------------------------------------------------------------------------
DAYS = [datetime.date(2024, 1, day) for day in range(1, 11)]
TYPES: dict[str, tuple[pa.DataType, Sequence[Any], Sequence[str]]] = {
    "i": (pa.int64(), range(-3, 4), ["-2", "0", "1.5", "99999999999999999999", "1e1"]),
    "small": (pa.int8(), range(-128, 128, 16), ["-129", "16", "127.5", "128"]),
    "u": (pa.uint32(), [0, 1, 2**31, 2**32 - 1], ["-1", "2147483648", "0.5", "4294967295"]),
    "f": (pa.float64(), [-1.5, 0.0, 0.1, 2.0**60], ["0.1", "0", "-1.5", "1152921504606846976"]),
    "g": (pa.float32(), [-1.5, 0.0, 0.1, 16_777_216.0], ["0.1", "0", "-1.5"]),
    "d": (pa.decimal128(9, 2), [Decimal("-1.10"), Decimal("0.00"), Decimal("1234567.89")], ["-1.1", "0", "0.01", "1234567.89"]),
    "b": (pa.bool_(), [True, False], ["TRUE", "FALSE"]),
    "s": (pa.string(), ["", "a", "ab", "b", "ü", "a_b", "a\\b", "100%"], ["'a'", "'ab'", "'ü'", "''", "'zz'"]),
    "day": (pa.date32(), DAYS, ["DATE '2024-01-05'", "'2024-01-01'", "TIMESTAMP '2024-01-03 12:00:00'"]),
    "ts": (
        pa.timestamp("us"),
        [datetime.datetime(2024, 1, day, 12, 0, 0, day) for day in range(1, 11)],
        ["TIMESTAMP '2024-01-05 12:00:00.000005'", "DATE '2024-01-03'", "'2024-01-02 12:00:00'"],
    ),
    "ms": (
        pa.timestamp("ms"),
        [datetime.datetime(2024, 1, 1, 0, 0, 0, ms * 1000) for ms in range(4)],
        ["TIMESTAMP '2024-01-01 00:00:00.0015'", "TIMESTAMP '2024-01-01 00:00:00.002'"],
    ),
}  # fmt: skip
PATTERNS = ["'a%'", "'%b'", "'_b'", "'a_b'", "'%'", "''", "'a\\b'", "'100%'", "'ü'"]


@st.composite
def leaf(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from([*TYPES, "folder"]))
    if draw(st.integers(0, 7)) == 0:
        return f"{name} IS {draw(st.sampled_from(['', 'NOT ']))}NULL"
    if name == "folder":
        return f"folder {draw(st.sampled_from(['=', '<', '>=', '<>']))} {draw(st.integers(0, 3))}"
    values = st.sampled_from(TYPES[name][2])
    if name == "b":
        return draw(st.sampled_from(["b", "NOT b", f"b = {draw(values)}", f"b <> {draw(values)}"]))
    kind, negated = draw(st.sampled_from("cccnbl")), draw(st.sampled_from(["", "NOT "]))
    if kind == "n":
        return f"{name} {negated}IN ({draw(values)}, {draw(values)})"
    if kind == "b":
        return f"{name} {negated}BETWEEN {draw(values)} AND {draw(values)}"
    if kind == "l" and name == "s":
        return f"s {negated}LIKE {draw(st.sampled_from(PATTERNS))}"
    return f"{name} {draw(st.sampled_from(['=', '<>', '<', '<=', '>', '>=']))} {draw(values)}"


CONDITIONS = st.recursive(
    leaf(),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"NOT ({text})"),
    ),
    max_leaves=6,
)


def _table(seed: int, first: int, count: int) -> pa.Table:
    """Rows in runs of like values, as sorted files have them, with nulls; `row` numbers them."""
    columns: dict[str, Any] = {"row": pa.array(range(first, first + count), pa.int64())}
    for number, (name, (kind, values, _)) in enumerate(TYPES.items()):
        chosen = [list(values)[(i // 3 + seed + number) % len(values)] for i in range(count)]
        columns[name] = pa.array([None if (i * 7 + seed + number) % 5 == 0 else v for i, v in enumerate(chosen)], kind)
    return pa.table(columns)


@pytest.fixture(scope="module")
def world() -> tuple[str, pa.Table]:
    """A dataset of three folders, some with statistics and some without, and all of its rows."""
    store, tables = MemoryStore(uuid.uuid4().hex, "dataset"), list[pa.Table]()
    for number in range(4):
        table = _table(number, 24 * number, 24)
        store.write(
            f"folder={number % 3}/{number}.parquet",
            parquet(table, row_group_size=4, write_statistics=number != 3, use_dictionary=number % 2 == 0),
        )
        tables.append(table.append_column("folder", pa.array([number % 3] * 24, pa.int64())))
    return store.url, pa.concat_tables(tables)


@pytest.mark.slow
@given(where=CONDITIONS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_the_rows_are_those_of_duckdb(world: tuple[str, pa.Table], where: str) -> None:
    url, table = world
    with duckdb.connect() as db:
        db.register("t", table)
        expected = [row for (row,) in db.execute(f"SELECT row FROM t WHERE {where} ORDER BY row").fetchall()]
    if not expected:
        with pytest.raises(DatasetError, match=r"none of .* rows in .* files is chosen by"):
            taken(url, where)
        return
    found = taken(url, where)
    assert sorted(read(found, "row")) == expected
    assert found.ref.rows == len(expected)
    assert sum(group.num_rows for group in found.row_groups) == len(expected)


@pytest.mark.parametrize(
    "where",
    [
        "i IN (2, 1.5, 99999999999999999999, -3)",
        "i NOT IN (1.5, 99999999999999999999)",
        "f IN (0, 0.1)",
        "f IN (-0.0)",
        "d NOT IN (-1.1, 0.001)",
        "b IN (TRUE, FALSE)",
        "s IN ('ü', '', 'zz')",
        "day IN (DATE '2024-01-05', '2024-01-06')",
        "ts NOT IN ('2024-01-05 12:00:00.000005')",
        "folder IN (0, 2)",
        "i IN (1) OR NOT b AND s NOT IN ('a')",
    ],
)
def test_lists_of_values_choose_the_rows_of_duckdb(world: tuple[str, pa.Table], where: str) -> None:
    url, table = world
    with duckdb.connect() as db:
        db.register("t", table)
        expected = [row for (row,) in db.execute(f"SELECT row FROM t WHERE {where} ORDER BY row").fetchall()]
    assert sorted(read(taken(url, where), "row")) == expected


def test_text_is_in_a_list_of_times_and_a_column_of_nulls_in_none(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"day": ["2024-01-01", "2024-01-02", None], "x": pa.nulls(3)})))
    assert read(taken(memory.url, "day IN (DATE '2024-01-02', '2024-01-01')"), "day") == ["2024-01-01", "2024-01-02"]
    with pytest.raises(DatasetError, match="none of 3 rows in 1 files is chosen"):
        taken(memory.url, "x IN (1) OR x NOT IN (2)")


def test_true_is_no_number_whatever_was_asked_before(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"i": [0, 1], "b": [False, True]})))
    assert read(taken(memory.url, "i = 1"), "i") == [1]
    for where in ("i = TRUE", "b = 1", "i IN (TRUE)", "b IN (1)"):
        with pytest.raises(DatasetError, match="compare it with"):
            taken(memory.url, where)


# ---- what DuckDB has another rule for -----------------------------------------------------------------------------------
def test_what_is_no_number_is_unlike_every_number(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"x": [1.0, float("nan"), None, 3.0]})))
    memory.write("b.parquet", parquet(pa.table({"x": [5.0, float("nan")]})))

    def rows(where: str) -> str:
        return str(read(taken(memory.url, where), "x"))

    assert rows("x > 2") == "[3.0, 5.0]"
    assert rows("NOT x > 2") == "[1.0, nan, nan]", "statistics leave it out, and do not decide"
    assert rows("x <> 5") == "[1.0, nan, 3.0, nan]"


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("f < 1e309", [0, 1, 2, 4]),
        ("f IN (-1e309, 0.0)", [1, 2]),
        ("h <= 0.1", [0, 1, 2]),
        ("h IN (0)", [1, 2]),
        ("h <> 0.1", [1, 2, 4, 5]),
        ("d >= 1.5", [1]),
        ("d NOT IN (1.5, 0.001)", [0, 2]),
        ("e = 1", [1, 3]),
    ],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_numbers_beyond_all_floats_and_numbers_that_arrow_does_not_compare(
    memory: MemoryStore, where: str, rows: list[int], statistics: bool
) -> None:
    table = pa.table(
        {
            "row": range(6),
            "f": pa.array([1.5, 0.0, -0.0, None, -1e308, float("inf")]),
            "h": pa.array([np.float16(x) for x in (0.1, 0.0, -0.0)] + [None, np.float16(65504), np.float16("nan")]),
            "d": pa.array([Decimal("-1.25"), Decimal("1.50"), Decimal("0"), None, None, None], pa.decimal32(5, 2)),
            "e": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, None, 1, 0, 5], pa.int8())),
        }
    )
    memory.write("a.parquet", parquet(table, row_group_size=3, write_statistics=statistics))
    assert read(taken(memory.url, where), "row") == rows


def test_dictionaries_hold_nulls_and_numbers() -> None:
    """As tables in memory may."""
    floats = pa.array([0.0, -0.0, float("nan"), None]).dictionary_encode()
    nulls = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1], pa.int8()), pa.array([None, "a"]))
    table = pa.table({"x": floats, "s": nulls})
    assert truth(parse("x IN (0)"), table).to_pylist() == [True, True, False, None]
    assert truth(parse("s IS NULL"), table).to_pylist() == [True, False, True, False]
    assert truth(parse("s = 'a'"), table).to_pylist() == [None, True, None, True]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_with_a_zone_are_compared_as_instants(memory: MemoryStore, unit: str) -> None:
    hours = [datetime.datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in range(4)]
    memory.write("a.parquet", parquet(pa.table({"t": pa.array(hours, pa.timestamp(unit, "Asia/Tokyo"))})))
    assert (
        read(taken(memory.url, "t >= TIMESTAMP '2024-01-01 10:00:00+09:00' AND t < '2024-01-01 03:00'"), "t")
        == hours[1:3]
    )


def test_text_is_compared_as_a_time_where_a_time_is_named(memory: MemoryStore) -> None:
    for day in ("2024-01-01", "2024-01-02", "2024-02-01"):
        memory.write(f"day={day}/a.parquet", parquet(pa.table({"x": [day]})))
    assert read(taken(memory.url, "day < DATE '2024-02-01' AND day > TIMESTAMP '2024-01-01 12:00:00'"), "x") == [
        "2024-01-02"
    ]
    memory.write("day=2024-01-02/a.parquet", parquet(pa.table({"x": ["soon"]})))
    with pytest.raises(
        DatasetError, match=r"a\.parquet row group 0: column 'x' holds text that is no time .*'soon'"
    ) as told:
        taken(memory.url, "x > DATE '2024-01-01'")
    assert "zone" not in str(told.value)
    memory.write("day=2024-01-02/a.parquet", parquet(pa.table({"x": ["2024-01-02T00:00:00Z", "2024-01-03"]})))
    with pytest.raises(DatasetError, match=r"'2024-01-03' .*: expected a zone offset\)"):
        taken(memory.url, "x > DATE '2024-01-01'")


def test_a_window_begins_with_its_first_instant_and_ends_before_its_last(memory: MemoryStore) -> None:
    hours = [datetime.datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in range(4)]
    memory.write("a.parquet", parquet(pa.table({"t": pa.array(hours, pa.timestamp("us", "UTC"))}), row_group_size=1))
    window = Window("2h", "t", hours[1], hours[3])
    found = snapshot(memory.url, choice=Choice("t <> '2024-01-01 02:00'", window))
    assert read(found, "t") == [hours[1]]
    of = found.ref.chosen
    assert of is not None
    assert (of.last, of.time_column, of.since, of.until) == ("2h", "t", hours[1], hours[3])
    assert (of.where, of.of_rows, of.of_files, of.read_files) == ("t <> '2024-01-01 02:00'", 4, 1, 1)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("y = 1", r"it has no column 'y', by which rows are chosen; it has \['i', 's', 'b', 'v'\]"),
        ("i = 'x'", "column 'i' holds numbers: compare it with a number, not with 'x'"),
        ("i", "column 'i' holds numbers: compare it with a number, not with True"),
        ("s = 1", "column 's' holds text: compare it with text in single quotes, or with a time, not with 1"),
        (
            "s = -1e399",
            "column 's' holds text: compare it with text in single quotes, or with a time, not with -1.0*e.399",
        ),
        ("b = 1", "column 'b' holds booleans: compare it with TRUE or FALSE, by = or <>, not with 1"),
        ("v = 1", r"column 'v' is of type fixed_size_list.*, which no condition compares"),
        ("i LIKE 'x'", "column 'i' is of type int64: LIKE is for text"),
        ("p > 'x'", "column 'p' holds numbers"),
        ("i > DATE '2024-01-01'", r"with a number \(--last needs a column of dates or times\), not with 2024-01-01"),
    ],
)
def test_a_condition_that_does_not_fit_names_the_file_and_the_column(
    memory: MemoryStore, where: str, told: str
) -> None:
    table = pa.table({"i": [1], "s": ["x"], "b": [True], "v": pa.array([[1.0]], pa.list_(pa.float64(), 1))})
    memory.write("p=1/a.parquet", parquet(table))
    with pytest.raises(DatasetError, match=told.replace("'v'\\]", "'v', 'p'\\]")) as refused:
        taken(memory.url, where)
    assert f"{memory.url}/p=1/a.parquet: " in str(refused.value)


def test_a_column_of_nulls_is_neither_like_nor_unlike(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"x": pa.nulls(2), "row": [1, 2]})))
    memory.write("b.parquet", parquet(pa.table({"x": [1.0, None], "row": [3, 4]})))
    assert read(taken(memory.url, "x = 1"), "row") == [3]
    assert read(taken(memory.url, "NOT x = 2"), "row") == [3]
    assert read(taken(memory.url, "x IS NULL"), "row") == [1, 2, 4]


# ---- folders first, then statistics, then rows -------------------------------------------------------------------------
class Counted:
    """The bytes and the calls of reads."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int]] = []

    def __call__(self, url: str) -> Store:
        counted, store = self, open_store(url)

        class Counting(FaultStore):
            def read(self, key: str, **options: Any) -> bytes:
                data = super().read(key, **options)
                counted.reads.append((key, len(data)))
                return data

        return Counting(store, lambda call: None)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.reads)


def test_a_condition_on_folders_reads_those_files_alone(memory: MemoryStore) -> None:
    """1% of the rows by a folder: at most 2% of the bytes, the rows read included."""
    table = pa.table({"x": pa.array(range(50_000), pa.int64()), "y": [float(i * 7919 % 50_021) for i in range(50_000)]})
    data = parquet(table, row_group_size=25_000)
    for day in range(100):
        memory.write(f"day={day}/a.parquet", data)
    counted = Counted()
    found = taken(memory.url, "day = 42", stores=counted)
    for group in found.row_groups:
        group.read(["x", "y", "day"])
    assert (found.ref.rows, found.ref.files) == (50_000, 1)
    assert {key for key, _ in counted.reads} == {"day=42/a.parquet"}
    assert counted.bytes <= 0.02 * 100 * len(data)


def test_a_condition_on_sorted_rows_reads_the_row_groups_that_hold_some(memory: MemoryStore) -> None:
    """By statistics: no more row groups than hold a chosen row, neither to find the rows nor to read them."""
    rows, size, noise = 40_000, 100, [float(i * 7919 % 50_021) for i in range(40_000)]
    for number in range(2):
        start = number * rows
        table = pa.table({"t": pa.array(range(start, start + rows), pa.int64()), "y": noise})
        memory.write(f"{number}.parquet", parquet(table, row_group_size=rows // 50, use_dictionary=False))
    counted, where = Counted(), "t BETWEEN 39150 AND 41599"
    found = taken(memory.url, where, stores=counted)
    groups = [group.name for group in found.row_groups]
    assert [name.rpartition(" ")[2] for name in groups] == ["48", "49", "0", "1"]
    assert [group.num_rows for group in found.row_groups] == [50, 800, 800, 800]
    assert found.ref.rows == 2450
    assert read(found, "t") == list(range(39_150, 41_600))
    assert size < rows
    footers = 2 * 2 + 2  # the first bytes and the last, and a longer footer
    assert len(counted.reads) <= footers + 1 + 1.2 * len(groups), (
        "one group is read to count its rows, and four for them"
    )


def test_row_groups_of_which_all_rows_are_chosen_are_read_as_without_a_condition(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"x": list(range(100))}), row_group_size=50))
    plain, found = snapshot(memory.url), taken(memory.url, "x >= 0")
    assert [type(group) for group in found.row_groups] == [type(group) for group in plain.row_groups]


def test_a_folder_decides_even_where_the_file_has_such_a_column(memory: MemoryStore) -> None:
    memory.write("day=1/a.parquet", parquet(pa.table({"day": [7], "x": [1]})))
    memory.write("day=2/a.parquet", parquet(pa.table({"day": [1], "x": [2]})))
    found = taken(memory.url, "day = 1")
    assert read(found, "x") == [1]
    assert read(found, "day") == [7], "what is trained on is the file's own, as without a condition"


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("(p = 1 AND x > 1) OR x = 3", [2]),
        ("NOT (p = 1 OR x = 1) OR x = 2", [1]),
        ("NOT (p = 1 AND x = 1)", [1, 2, 9]),
        ("p IS NULL AND x <> 2", [0, 2]),
    ],
)
def test_a_folder_that_stands_for_a_null_is_neither_like_nor_unlike(
    memory: MemoryStore, where: str, rows: list[int]
) -> None:
    memory.write("p=__HIVE_DEFAULT_PARTITION__/a.parquet", parquet(pa.table({"x": [1, 2, 3], "row": [0, 1, 2]})))
    memory.write("p=2/b.parquet", parquet(pa.table({"x": [1], "row": [9]})))
    assert sorted(read(taken(memory.url, where), "row")) == rows


def test_files_that_folders_rule_out_may_lack_what_is_asked_for(memory: MemoryStore) -> None:
    memory.write("v=1/a.parquet", parquet(pa.table({"old": [1]})))
    memory.write("v=2/a.parquet", parquet(pa.table({"x": [1, 2]})))
    found = taken(memory.url, "v = 2 AND x = 2")
    assert found.schema.names == ["x", "v"]
    assert read(found, "x") == [2]


def test_many_small_row_groups_are_joined_and_bounded_together(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"x": list(range(3000))}), row_group_size=1))
    found = taken(memory.url, "x >= 1500 AND x < 1510")
    assert read(found, "x") == list(range(1500, 1510))
    assert len(found.row_groups) == 1


# ---- which data it is -----------------------------------------------------------------------------------------------------
def test_the_fingerprint_is_that_of_the_chosen_rows(memory: MemoryStore) -> None:
    for day in (1, 2):
        memory.write(f"day={day}/a.parquet", parquet(pa.table({"x": [day, 10 * day]})))
    first = taken(memory.url, "day = 1 AND x < 5")
    memory.write("day=3/a.parquet", parquet(pa.table({"x": [3]})))
    again = taken(memory.url, "day = 1 AND x < 5")
    assert again.ref.fingerprint == first.ref.fingerprint, "no chosen row lies in the new file"
    others = [snapshot(memory.url), taken(memory.url, "day = 1"), taken(memory.url, "day = 1 AND x < 6")]
    memory.write("day=1/b.parquet", parquet(pa.table({"x": [1]})))
    others.append(taken(memory.url, "day = 1 AND x < 5"))
    assert len({first.ref.fingerprint, *(other.ref.fingerprint for other in others)}) == 5


def test_another_process_pins_the_same_rows(memory: MemoryStore) -> None:
    for day in (1, 2):
        memory.write(f"day={day}/a.parquet", parquet(pa.table({"x": [day, 10 * day]})))
    first = taken(memory.url, "day = 2 AND x > 5")
    found = pinned(first.ref, first.folder, first.files)
    assert found.ref == first.ref
    assert read(found, "x") == [20]


def test_several_readers_find_the_same_rows(store: Store) -> None:
    put(store.url, {f"{n}.parquet": pa.table({"x": [float((i * 31 + n) % 17) for i in range(200)]}) for n in range(4)})
    found = taken(store.url, "x IN (3, 5)")
    whole = snapshot(store.url)
    expected = [x for x in read(whole, "x") if x in (3.0, 5.0)]
    assert read(found, "x") == expected
    assert [g.name for g in found.row_groups] == [g.name for g in whole.row_groups]


def test_a_footer_that_contradicts_itself_is_an_error_and_no_crash(memory: MemoryStore, tmp_path: Path) -> None:
    """As of plain reads: what the footer says of a column is looked at only where Arrow could read that column."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1, 2], "y": [1, 2]}), path)
    damaged = path.read_bytes().replace(b"\x19\x2c", b"\x19\x1c", 1)
    memory.write("a.parquet", damaged)
    with pytest.raises(DatasetError):
        taken(memory.url, "x = 1")


def test_a_call_that_fails_while_rows_are_found_keeps_its_type(memory: MemoryStore) -> None:
    memory.write("a.parquet", parquet(pa.table({"x": [i * 7919 % 1009 for i in range(20_000)]}), row_group_size=1000))

    def hook(call: Call, seen: list[str]) -> None:
        if call.verb == "read" and call.phase == "before":
            seen.append(call.key)
            if len(seen) > 3:
                raise Unavailable("away")

    with pytest.raises(Unavailable):
        taken(memory.url, "x = 5", stores=lambda url: FaultStore(open_store(url), partial(hook, seen=[])))

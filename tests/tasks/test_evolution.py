"""Columns that change between the files of a dataset, and from them to shards and to what is predicted for."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import SPEC, keys, put, rows
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun, Outcome
from tidemill.tasks.predict import predict
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]


def changed(**settings: object) -> Spec:
    return Spec.model_validate(SPEC.model_dump() | {"epochs": 1} | settings)


def train(make_url: MakeUrl, spec: Spec, **settings: object) -> VersionLog:
    batch.train(make_url("dataset"), make_url("registry"), "model", spec, BatchSettings.model_validate(settings))
    return open_log(make_url("registry"), "model")


def drain(make_url: MakeUrl, **settings: object) -> online.OnlineReport:
    run = OnlineRun(
        make_url("inbox"), make_url("registry"), "model", OnlineSettings.model_validate({"grace_seconds": 0} | settings)
    )
    while online.step(run).outcome is not Outcome.IDLE:
        pass
    return run.report


def cast(table: pa.Table, **kinds: pa.DataType) -> pa.Table:
    for name, kind in kinds.items():
        table = table.set_column(table.schema.get_field_index(name), name, table.column(name).cast(kind, safe=False))
    return table


WIDER = {
    "int32 to int64": (pa.int32(), pa.int64()),
    "float32 to float64": (pa.float32(), pa.float64()),
    "float64 to float32": (pa.float64(), pa.float32()),
    "int8 to float64": (pa.int8(), pa.float64()),
    "float64 to decimal32": (pa.float64(), pa.decimal32(9, 4)),
    "float64 to decimal64": (pa.float64(), pa.decimal64(18, 4)),
    "decimal128 to decimal256": (pa.decimal128(18, 4), pa.decimal256(50, 6)),
    "null to float64": (pa.null(), pa.float64()),
    "float64 to null": (pa.float64(), pa.null()),
}


@pytest.mark.parametrize("old_and_new", WIDER.values(), ids=WIDER.keys())
def test_a_number_may_change_its_type_between_files_and_shards(
    memory_url: MakeUrl, old_and_new: tuple[pa.DataType, pa.DataType]
) -> None:
    files = [
        cast(rows(60, i), b=kind) if not pa.types.is_null(kind) else rows(60, i).set_column(1, "b", pa.nulls(60))
        for i, kind in enumerate(old_and_new)
    ]
    put(memory_url("dataset"), {f"part-{i}.parquet": file for i, file in enumerate(files)})
    train(memory_url, changed())
    put(memory_url("inbox"), {f"{i}.parquet": file.slice(0, 3) for i, file in enumerate(files)})
    report = drain(memory_url)
    assert (report.shards, report.rows, report.rejected) == (2, 6, 0)
    assert predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), "head").rows == 120


def test_columns_that_are_not_used_may_come_and_go(memory_url: MakeUrl) -> None:
    more = rows(60, 1).append_column("more", pa.array(["x"] * 60))
    put(memory_url("dataset"), {"a.parquet": rows(60, 0).append_column("less", pa.nulls(60)), "b.parquet": more})
    columns = train(memory_url, changed()).head().manifest.columns
    assert columns == {"a": "double", "b": "double", "y": "double", "less": "null", "more": "string"}
    put(
        memory_url("inbox"),
        {"c.parquet": rows(3, 2), "d.parquet": rows(3, 3).append_column("new", pa.array([1, 2, 3]))},
    )
    assert drain(memory_url).shards == 2
    # Any file of the dataset may have had a column first.
    assert open_log(memory_url("registry"), "model").head().manifest.new_columns == {"new": "int64"}


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (
            pa.array(["x"] * 60),
            r"column 'b' of .*/b\.parquet row group 0 has type text, but another file of the dataset has a number",
        ),
        (
            None,
            r"column 'b' is missing from .*/b\.parquet row group 0: .* or write it, with nulls where there is no value",
        ),
    ],
)
def test_what_a_change_of_columns_is_refused_for_is_told(
    memory_url: MakeUrl, column: pa.Array | None, said: str
) -> None:
    other = rows(60, 1).drop_columns("b")
    put(
        memory_url("dataset"),
        {"a.parquet": rows(60, 0), "b.parquet": other if column is None else other.append_column("b", column)},
    )
    with pytest.raises(ColumnError, match=said):
        train(memory_url, changed())


# ---- partitions --------------------------------------------------------------------------------------------------------
def partitioned(url: str, tables: dict[str, pa.Table]) -> None:
    put(url, {f"{folder}/part.parquet": table for folder, table in tables.items()})


def test_partitions_of_an_inbox_are_columns_as_in_a_dataset(make_url: MakeUrl) -> None:
    spec = changed(features=["a", "b", "day", {"name": "shop", "kind": "category"}])
    partitioned(make_url("dataset"), {f"day={i}/shop={shop}": rows(30, i) for i in range(3) for shop in ("1", "x")})
    train(make_url, spec)
    # By itself, this shop would be a number.
    partitioned(make_url("inbox"), {"day=7/shop=1": rows(5, 9), "_hour=3/day=1.5/shop=y": rows(5, 10)})
    report = drain(make_url, after_commit={"archive_to": make_url("archive")})
    assert (report.shards, report.rejected) == (2, 0)
    assert reproduce(open_log(make_url("registry"), "model"), [open_store(make_url("archive"))]).findings == []

    partitioned(make_url("new"), {"day=7/shop=1": rows(5, 9)})
    predict(make_url("registry"), "model", make_url("new"), make_url("out"), "head", ["shop"])
    table = pq.read_table(pa.BufferReader(open_store(make_url("out")).read("day=7/shop=1/part.parquet")))
    assert table.column("shop").to_pylist() == ["1"] * 5


def test_a_partition_that_is_none_of_its_columns_type_is_a_reason_to_reject_the_shard(memory_url: MakeUrl) -> None:
    partitioned(memory_url("dataset"), {"day=1": rows(30, 0), "day=2": rows(30, 1)})
    log = train(memory_url, changed(features=["a", "b", "day"]))
    partitioned(memory_url("inbox"), {"day=monday": rows(5, 2), "day=3": rows(5, 3)})
    report = drain(memory_url)
    assert (report.shards, report.rejected) == (1, 1)
    (rejected,) = log.head().manifest.rejected
    said = "its folder day=monday is no number, as column 'day' is elsewhere; move it to another folder"
    assert rejected.reason == f"day=monday/part.parquet: {said}"
    assert keys(memory_url("inbox")) == []


def test_shards_of_the_partition_of_nulls_are_trained_on(memory_url: MakeUrl) -> None:
    spec = changed(features=["a", "b", {"name": "city", "kind": "category"}])
    partitioned(memory_url("dataset"), {"city=a": rows(60, 0), "city=__HIVE_DEFAULT_PARTITION__": rows(60, 1)})
    train(memory_url, spec)
    partitioned(memory_url("inbox"), {"city=a": rows(60, 2), "city=__HIVE_DEFAULT_PARTITION__": rows(60, 3)})
    report = drain(memory_url)
    assert (report.shards, report.rejected) == (2, 0)
    put(memory_url("inbox"), {"a.parquet": rows(60, 4).append_column("city", pa.nulls(60, pa.string()))})
    report = drain(memory_url)
    assert (report.shards, report.rejected) == (0, 1)  # nulls of a column of the file are still improbable


def test_partitions_of_labels_that_come_later_and_of_the_holdout_are_typed_as_well(memory_url: MakeUrl) -> None:
    spec = changed(features=["a", "b", {"name": "shop", "kind": "category"}])
    identified = {shop: rows(40, i).append_column("id", pa.array(range(40))) for i, shop in enumerate("1x")}
    partitioned(memory_url("dataset"), {f"shop={shop}": table for shop, table in identified.items()})
    partitioned(memory_url("holdout"), {"shop=1": rows(40, 7)})
    train(memory_url, spec, holdout=0, holdout_dataset=memory_url("holdout"))
    partitioned(memory_url("inbox"), {"shop=1": identified["1"].drop_columns("y")})
    partitioned(memory_url("labels"), {"shop=1": identified["1"].select(["id", "y"])})
    labels, gate = {"inbox": memory_url("labels"), "key": "id"}, {"holdout_dataset": memory_url("holdout")}
    report = drain(memory_url, labels=labels, gate=gate)
    assert (report.shards, report.rows, report.rejected) == (1, 40, 0)


def test_a_single_file_is_trained_and_predicted_from(make_url: MakeUrl) -> None:
    put(make_url("files"), {"one.parquet": rows(60, 0), "two.parquet": rows(30, 1)})

    def only(name: str) -> str:
        return f"{make_url('files')}/one.parquet" if name == "dataset" else make_url(name)

    log = train(only, changed())
    dataset = log.head().manifest.dataset
    assert dataset is not None
    assert (dataset.url, dataset.rows) == (f"{open_store(make_url('files')).url}/one.parquet", 60)
    done = predict(make_url("registry"), "model", f"{make_url('files')}/two.parquet", make_url("out"), "head")
    assert (done.files, done.rows, keys(make_url("out"))) == (1, 30, ["_SUCCESS", "two.parquet"])

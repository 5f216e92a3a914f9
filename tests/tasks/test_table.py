"""A table in memory is a dataset too."""

from collections.abc import Callable

import pyarrow as pa
import pytest

from tests.data import SPEC, put, rows
from tidemill.storage.audit import audit
from tidemill.storage.errors import DatasetError
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun, Outcome
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.table import GROUP_ROWS, table_snapshot
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]
TABLE = rows(240, 0)


def fingerprint(table: pa.Table) -> str:
    return table_snapshot(table).ref.fingerprint


def weights(registry: str) -> str:
    return open_log(registry, "model").head().manifest.blobs.weights.sha256


def test_a_null_among_the_values_of_a_dictionary_is_a_missing_value(memory_url: MakeUrl) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0] * 60), pa.array(["u", "v", None]))
    table = TABLE.set_column(2, "y", labels).append_column("c", labels)
    plain = table.set_column(2, "y", labels.cast(pa.string())).set_column(3, "c", labels.cast(pa.string()))
    spec = Spec(target="y", epochs=1)
    for name, data in (("one", table), ("other", plain)):
        done = batch.train(data, memory_url(name), "model", spec, BatchSettings(holdout=0))
        assert "60 rows are not trained on: target 'y' is null in them" in done.chosen
    assert weights(memory_url("one")) == weights(memory_url("other"))


def test_a_table_trains_the_weights_that_a_file_of_it_trains(memory_url: MakeUrl) -> None:
    in_order = Spec.model_validate(SPEC.model_dump() | {"shuffle": False})
    put(memory_url("dataset"), {"a.parquet": TABLE})
    batch.train(memory_url("dataset"), memory_url("one"), "model", in_order, BatchSettings(holdout=0))
    batch.train(TABLE, memory_url("other"), "model", in_order, BatchSettings(holdout=0))
    assert weights(memory_url("one")) == weights(memory_url("other"))


def test_a_run_on_a_table_resumes_and_is_found_when_it_is_done(make_url: MakeUrl) -> None:
    batch.train(TABLE, make_url("reference"), "model", SPEC)
    interrupted = batch.open_run(table_snapshot(TABLE), make_url("registry"), "model", SPEC, BatchSettings())
    batch.prepare(interrupted)
    batch.train_epoch(interrupted, 0)
    # The same values, as another process would have them.
    again = pa.Table.from_pylist(TABLE.to_pylist(), schema=TABLE.schema)
    assert batch.train(again, make_url("registry"), "model", SPEC).trained
    assert weights(make_url("registry")) == weights(make_url("reference"))
    assert not batch.train(TABLE, make_url("registry"), "model", SPEC).trained
    assert batch.train(TABLE.slice(1), make_url("registry"), "model", SPEC).version == 1
    dataset = open_log(make_url("registry"), "model").version(0).manifest.dataset
    assert dataset is not None
    assert (dataset.url, dataset.fingerprint, dataset.files, dataset.rows) == ("memory:", fingerprint(TABLE), 1, 240)


def test_shards_are_trained_on_after_a_table_and_a_history_says_that_it_needs_it(
    memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    batch.train(TABLE, memory_url("registry"), "model", SPEC)
    put(memory_url("inbox"), {"a.parquet": rows(40, 1)})
    settings = OnlineSettings.model_validate({"after_commit": {"archive_to": memory_url("archive")}})
    run = OnlineRun(memory_url("inbox"), memory_url("registry"), "model", settings)
    while online.step(run).outcome is not Outcome.IDLE:
        pass
    assert run.report.shards == 1
    log = open_log(memory_url("registry"), "model")
    with caplog.at_level("INFO"):
        assert reproduce(log, [open_store(memory_url("archive"))]).findings == audit(log).findings == []
    assert "version 0 was trained on a table in memory: to train it again needs that table" in caplog.messages


COLUMNS = {
    "floats": pa.array([1.0, None, 3.0] * 5),
    "booleans": pa.array([True, None, False] * 5),
    "text": pa.array(["x", None, "longer than twelve bytes"] * 5),
    "views": pa.array(["x", None, "longer than twelve bytes"] * 5, pa.string_view()),
    "dictionary": pa.array(["x", None, "y"] * 5).dictionary_encode(),
    "lists": pa.array([[1, 2], None, []] * 5),
    "vectors": pa.array([[1.0, 2.0], None, [3.0, None]] * 5, pa.list_(pa.float32(), 2)),
    "structs": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}] * 5),
    "nulls": pa.nulls(15),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS.keys())
def test_a_fingerprint_is_of_the_values_however_they_lie_in_memory(column: pa.Array) -> None:
    table = pa.table({"c": column})
    cut = pa.concat_tables([table.slice(0, 4), table.slice(4, 0), table.slice(4, 7), table.slice(11)])
    within = pa.concat_tables([table, table]).slice(3, 15)
    assert fingerprint(table) == fingerprint(cut) == fingerprint(within)
    assert fingerprint(table) != fingerprint(table.slice(1))
    assert fingerprint(table) != fingerprint(table.rename_columns(["d"]))


def test_large_tables_are_several_row_groups_without_a_copy() -> None:
    table = pa.table({"x": range(GROUP_ROWS + 1)})
    groups = table_snapshot(table).row_groups
    assert [(group.name, group.num_rows) for group in groups] == [
        ("table row group 0", GROUP_ROWS),
        ("table row group 1", 1),
    ]
    addresses = [group.read(["x"]).column("x").chunk(0).buffers()[1].address for group in groups]
    assert addresses == [table.column("x").chunk(0).buffers()[1].address] * 2


def test_a_table_without_rows_is_no_dataset() -> None:
    with pytest.raises(DatasetError, match="the table holds no rows"):
        table_snapshot(TABLE.slice(0, 0))

"""Prediction with a registered version: the same preprocessing as in training, one file for each file."""

import io
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, hooked
from tidemill.storage import retention
from tidemill.storage.errors import DatasetError, PlacesOverlap, Unavailable, UnknownAlias
from tidemill.storage.parquet import RowGroup
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun
from tidemill.tasks.predict import SUCCESS, UNFINISHED, Record, predict
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]


def train(registry: str, dataset: str, spec: Spec = SPEC) -> None:
    batch.train(dataset, registry, "model", spec, BatchSettings(holdout=0))


def read_back(url: str, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(open_store(url).read(key)))


def test_predictions_stand_beside_the_rows_in_their_order(make_url: MakeUrl) -> None:
    put(make_url("dataset"), {"a.parquet": rows(120, 0), "sub/b.parquet": rows(60, 1)})
    train(make_url("registry"), make_url("dataset"))
    done = predict(make_url("registry"), "model", make_url("dataset"), make_url("out"), columns=["y"])
    assert (done.files, done.rows, done.version) == (2, 180, 0)
    assert keys(make_url("out")) == [SUCCESS, "a.parquet", "sub/b.parquet"]
    table = read_back(make_url("out"), "a.parquet")
    assert table.schema.names == ["y", "prediction"]
    truth, predicted = (torch.tensor(table[c].to_pylist()) for c in ("y", "prediction"))
    assert float((truth - predicted).abs().mean()) < 0.1


@pytest.mark.parametrize("name", ["prediction", "probabilities"])
def test_a_copied_column_may_not_have_the_name_of_a_prediction(memory_url: MakeUrl, name: str) -> None:
    table = rows(50, 0)
    put(memory_url("dataset"), {"a.parquet": table.append_column(name, table["a"])})
    train(memory_url("registry"), memory_url("dataset"))
    with pytest.raises(DatasetError, match=f"'{name}' is the name of a column of predictions"):
        predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), columns=["y", name])
    assert keys(memory_url("out")) == []


def test_a_copied_column_is_one_column(memory_url: MakeUrl) -> None:
    table = rows(50, 0)
    put(memory_url("dataset"), {"a.parquet": table})
    train(memory_url("registry"), memory_url("dataset"))
    put(memory_url("twice"), {"a.parquet": pa.table([*table.columns, table["y"]], [*table.column_names, "y"])})
    with pytest.raises(DatasetError, match="columns to copy are 'y', 'y': name each once"):
        predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), columns=["y", "y"])
    with pytest.raises(DatasetError, match="has several columns 'y': which one to copy cannot be told"):
        predict(memory_url("registry"), "model", memory_url("twice"), memory_url("out"), columns=["y"])
    assert keys(memory_url("out")) == []


def test_features_and_copied_columns_are_read_once(memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {f"{i}.parquet": rows(100, i) for i in range(3)}
    put(memory_url("dataset"), tables)
    train(memory_url("registry"), memory_url("dataset"))
    reads: list[list[str]] = []
    read = RowGroup.read

    def counted(group: RowGroup, columns: Sequence[str]) -> pa.Table:
        reads.append(list(columns))
        return read(group, columns)

    monkeypatch.setattr(RowGroup, "read", counted)
    predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), columns=["y", "a"])
    assert reads == [["a", "b", "y"]] * 6  # two row groups a file
    for name, table in tables.items():
        written = read_back(memory_url("out"), name)
        assert written.schema.names == ["y", "a", "prediction"]
        assert written.select(["y", "a"]).to_pydict() == table.select(["y", "a"]).to_pydict()


def test_an_error_ends_the_threads_and_leaves_the_files_before_it(memory_url: MakeUrl) -> None:
    tables = {f"{i}.parquet": rows(100, i) for i in range(5)}
    put(memory_url("dataset"), tables)
    train(memory_url("registry"), memory_url("dataset"))
    bad = tables["3.parquet"].set_column(0, "a", pa.array([float("nan")] * 100))
    put(memory_url("new"), tables | {"3.parquet": bad})
    with pytest.raises(ColumnError, match=r"'a' of 3.parquet row group 0") as caught:
        predict(memory_url("registry"), "model", memory_url("new"), memory_url("out"))
    assert caught.value.__traceback__ is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidemill-ahead")]
    assert keys(memory_url("out")) == ["0.parquet", "1.parquet", "2.parquet", UNFINISHED]


# ---- whole or not ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_half_a_result_does_not_look_whole(make_url: MakeUrl) -> None:
    """Killed at any call of the store of the output, over an earlier result: whole with all files of one version, or marked."""
    put(make_url("dataset"), {f"{i}.parquet": rows(20, i) for i in range(3)})
    train(make_url("registry"), make_url("dataset"))
    train(make_url("registry"), make_url("dataset"), Spec.model_validate(SPEC.model_dump() | {"seed": 8}))
    where = make_url("registry"), "model", make_url("dataset")
    kinds = set()
    for at in itertools.count():
        predict(*where, make_url(f"out{at}"), version="0")
        calls = itertools.count()

        def dies(call: Call, calls: Iterator[int] = calls, at: int = at) -> None:
            if call.url.endswith(f"/out{at}") and next(calls) == at:
                raise Unavailable("killed")

        try:
            predict(*where, make_url(f"out{at}"), version="1", stores=hooked(dies))
        except Unavailable:
            there = keys(make_url(f"out{at}"))
            kinds.add(SUCCESS in there)
            if SUCCESS in there:
                record = Record.model_validate_json(open_store(make_url(f"out{at}")).read(SUCCESS))
                store = open_store(make_url(f"out{at}"))
                assert {key: store.stat(key).etag for key in record.files} == record.files
            predict(*where, make_url(f"out{at}"), version="1")
        else:
            break
        assert keys(make_url(f"out{at}")) == ["0.parquet", "1.parquet", "2.parquet", SUCCESS]
    assert kinds == {True, False}


@pytest.mark.parametrize("killed", [False, True])
def test_files_of_an_earlier_result_that_the_dataset_no_longer_has_are_removed(killed: bool, make_url: MakeUrl) -> None:
    put(make_url("dataset"), {f"{i}.parquet": rows(20, i) for i in range(4)})
    put(make_url("out"), {"other.parquet": rows(5, 0), "3.parquet": rows(5, 1)})
    train(make_url("registry"), make_url("dataset"))
    where = make_url("registry"), "model", make_url("dataset"), make_url("out")

    def dies(call: Call) -> None:
        if call.verb == "write" and call.key == "2.parquet" and call.phase == "after":
            raise Unavailable("killed")

    if killed:
        with pytest.raises(Unavailable):
            predict(*where, stores=hooked(dies))
    else:
        predict(*where)
        put(make_url("out"), {"2.parquet": rows(7, 7)})  # somebody else's now
    for key in ("1.parquet", "2.parquet", "3.parquet"):
        open_store(make_url("dataset")).delete(key)
    predict(*where)
    left = {"0.parquet", "other.parquet", SUCCESS} | ({"3.parquet"} if killed else {"2.parquet"})
    assert set(keys(make_url("out"))) == left


# ---- places ----------------------------------------------------------------------------------------------------------
def test_predictions_are_not_written_into_a_dataset_or_an_inbox(make_url: MakeUrl) -> None:
    put(make_url("dataset"), {"a.parquet": rows(20, 0), "data/b.parquet": rows(20, 1)})
    put(make_url("inbox"), {"s.parquet": rows(20, 2)})
    put(make_url("new"), {"a.parquet": rows(20, 0)})
    put(make_url("deep"), {"new/a.parquet": rows(20, 0), "new/new/b.parquet": rows(20, 1)})
    train(make_url("registry"), make_url("dataset"))
    online.step(OnlineRun(make_url("inbox"), make_url("registry"), "model", OnlineSettings(after_commit="keep")))
    before = [keys(make_url(name)) for name in ("dataset", "inbox", "new")]
    for output, words in (
        (make_url("new"), "is the dataset"),
        (make_url("new") + "/out", "lies inside the dataset"),
        (make_url("dataset"), "is the dataset of version 0"),
        (make_url("dataset") + "/out", "lies inside the dataset of version 0"),
        (make_url("inbox"), "is an inbox of the model"),
        (make_url("inbox") + "/out", "lies inside an inbox of the model"),
        (make_url("registry") + "/model/log", r"lies inside .*, where the registry keeps this model"),
        (make_url("registry"), r"holds .*, where the registry keeps this model"),
    ):
        with pytest.raises(PlacesOverlap, match=rf"the output of predictions, .* {words}"):
            predict(make_url("registry"), "model", make_url("new"), output)
    with pytest.raises(PlacesOverlap, match=r"new/b\.parquet, a file of predictions, would be a file of the dataset"):
        predict(make_url("registry"), "model", make_url("deep") + "/new", make_url("deep"))
    with pytest.raises(PlacesOverlap, match=r"new/a\.parquet, a file of predictions, would be a file of the dataset"):
        predict(make_url("registry"), "model", make_url("new") + "/a.parquet", make_url("new"))
    assert [keys(make_url(name)) for name in ("dataset", "inbox", "new")] == before


def test_the_target_is_not_needed(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"a.parquet": rows(100, 0)})
    train(memory_url("registry"), memory_url("dataset"))
    put(memory_url("new"), {"a.parquet": rows(10, 1).drop_columns("y")})
    predict(memory_url("registry"), "model", memory_url("new"), memory_url("out"))
    assert read_back(memory_url("out"), "a.parquet").schema.names == ["prediction"]


def test_classes_are_predicted_as_probabilities(memory_url: MakeUrl) -> None:
    table = rows(100, 0)
    labels = [int(y > 0) + int(y > 1) for y in table["y"].to_pylist()]
    put(memory_url("dataset"), {"a.parquet": table.set_column(2, "y", [labels])})
    spec = Spec.model_validate(SPEC.model_dump() | {"task": "multiclass", "classes": 3})
    train(memory_url("registry"), memory_url("dataset"), spec)
    predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"))
    probabilities = torch.tensor(read_back(memory_url("out"), "a.parquet")["prediction"].to_pylist())
    assert probabilities.shape == (100, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(100))


def test_what_cannot_be_predicted(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"a.parquet": rows(100, 0)})
    train(memory_url("registry"), memory_url("dataset"))
    with pytest.raises(UnknownAlias, match=r"no alias .best. \(there are: champion"):
        predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), version="best")
    with pytest.raises(DatasetError, match="no column 'z'"):
        predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), columns=["z"])
    put(memory_url("other"), {"a.parquet": rows(10, 1).drop_columns("b")})
    with pytest.raises(ColumnError, match="'b'"):
        predict(memory_url("registry"), "model", memory_url("other"), memory_url("out"))
    assert keys(memory_url("out")) == []


def test_garbage_collection_is_told_in_keys(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"a.parquet": rows(100, 0)})
    for seed in range(3):
        train(memory_url("registry"), memory_url("dataset"), Spec.model_validate(SPEC.model_dump() | {"seed": seed}))
    deleted = retention.maintain(memory_url("registry"), "model", keep=1)
    assert sorted(key.split("/")[-1][:8] for key in deleted) == ["00000000"] * 2 + ["00000001"] * 2

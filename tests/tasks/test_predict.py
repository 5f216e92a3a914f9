"""Prediction with a registered version: the same preprocessing as in training, one file for each file."""

import io
import threading
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.tasks.rows import SPEC, keys, put, rows
from tidemill.storage import retention
from tidemill.storage.errors import DatasetError, UnknownAlias
from tidemill.storage.parquet import RowGroup
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.predict import predict
from tidemill.tasks.settings import BatchSettings
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
    assert keys(make_url("out")) == ["a.parquet", "sub/b.parquet"]
    table = read_back(make_url("out"), "a.parquet")
    assert table.schema.names == ["y", "prediction"]
    truth, predicted = (torch.tensor(table[c].to_pylist()) for c in ("y", "prediction"))
    assert float((truth - predicted).abs().mean()) < 0.1


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
    assert keys(memory_url("out")) == ["0.parquet", "1.parquet", "2.parquet"]


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

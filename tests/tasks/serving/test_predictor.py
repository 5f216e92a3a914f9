"""`tidemill.load`: the numbers of `tidemill predict`, from memory."""

import io
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tidemill
from tests.data import SPEC, put, rows
from tests.storage.faults import Call, Counting, act_once, hooked
from tests.tasks import own_models
from tidemill.storage.aliases import promote
from tidemill.storage.errors import CorruptObject, UnknownAlias, UnknownModel, UnknownVersion
from tidemill.storage.log import open_log
from tidemill.storage.retention import collect_garbage
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.predict import predict
from tidemill.tasks.serving import predictor as room
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]
TARGETS = {
    "regression": ({}, lambda y: y),
    "several targets": ({"target": ("y", "z")}, lambda y: y),
    "binary": ({"task": "binary"}, lambda y: float(y > 0)),
    "labels": ({"task": "binary"}, lambda y: "high" if y > 0 else "low"),
    "classes": ({"task": "multiclass", "classes": 3}, lambda y: 0 if y < -1 else 1 if y < 1 else 2),
    "labels of classes": ({"task": "multiclass"}, lambda y: "low" if y < -1 else "mid" if y < 1 else "high"),
}
DROPPING = {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.5}}
"""Another model in training than in evaluation."""


def train(url: MakeUrl, seed: int = 7) -> None:
    put(url("dataset"), {"a.parquet": rows(120, 0)})
    spec = Spec.model_validate(SPEC.model_dump() | {"seed": seed})
    batch.train(url("dataset"), url("registry"), "model", spec, BatchSettings(holdout=0))


@pytest.mark.parametrize("target", TARGETS)
def test_tables_and_dicts_are_answered_with_what_predict_writes(memory_url: MakeUrl, target: str) -> None:
    about, value_of = TARGETS[target]
    table = rows(60, 0).append_column("z", rows(60, 1)["y"])
    table = table.set_column(2, "y", pa.array([value_of(y) for y in table["y"].to_pylist()]))
    put(memory_url("dataset"), {"a.parquet": pq_bytes(table)})
    asked = {name: value for name, value in SPEC.model_dump().items() if name not in ("target", "task", "classes")}
    spec = Spec.model_validate(asked | {"target": "y", "model": DROPPING} | about)
    batch.train(memory_url("dataset"), memory_url("registry"), "model", spec, BatchSettings(holdout=0))
    predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"))
    written = pq.read_table(io.BytesIO(open_store(memory_url("out")).read("a.parquet")))

    predictor = tidemill.load(memory_url("registry"), "model")
    answered = predictor.predict(table)
    assert answered.schema.equals(written.schema, check_metadata=False)
    assert answered.equals(written)
    assert predictor.predict(table.select(["a", "b"]).to_pylist()) == written.to_pylist()
    assert predictor.version.number == 0
    assert predictor.spec.features[0].name == "a"
    assert repr(predictor) == "<Predictor of 'model', version 0>"


def pq_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_of_no_rows_there_are_no_predictions(memory_url: MakeUrl) -> None:
    train(memory_url)
    predictor = tidemill.load(memory_url("registry"), "model")
    assert predictor.predict([]) == []
    assert predictor.predict(rows(0, 0)).equals(pa.table({"prediction": pa.array([], pa.float32())}))


def test_a_version_is_chosen_by_alias_number_or_head(memory_url: MakeUrl) -> None:
    train(memory_url)
    train(memory_url, seed=8)
    promote(log := open_log(memory_url("registry"), "model"), "steady", log.version(0))
    chosen = [
        tidemill.load(memory_url("registry"), "model", name).version.number for name in ("steady", "1", 1, "head")
    ]
    assert chosen == [0, 1, 1, 1]
    with pytest.raises(UnknownAlias, match="no alias 'none'"):
        tidemill.load(memory_url("registry"), "model", "none")
    with pytest.raises(UnknownModel, match="no model 'other'"):
        tidemill.load(memory_url("registry"), "other")


def test_a_version_is_read_once(make_url: MakeUrl) -> None:
    train(make_url)
    reads: list[str] = []

    def noted(call: Call) -> None:
        if call.phase == "before":
            reads.append(call.key)

    first = tidemill.load(make_url("registry"), "model", stores=hooked(noted))
    assert len([key for key in reads if "blobs" in key]) == 4  # each is measured, then read
    reads.clear()
    second = tidemill.load(make_url("registry"), "model", stores=hooked(noted))
    assert second.network is first.network
    assert reads == ["model/aliases/champion.json", "model/log/00000000.json"]


def test_threads_that_load_together_read_once(memory_url: MakeUrl) -> None:
    train(memory_url)
    counting, all_here = Counting(), threading.Barrier(4)
    found = []

    def load() -> None:
        all_here.wait()
        found.append(tidemill.load(memory_url("registry"), "model", stores=hooked(counting)).network)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert counting.calls["stat"] == 2  # of two blobs, once


def test_only_the_last_models_stay_in_memory_unused(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"a.parquet": rows(40, 0)})
    for i in range(room.MODELS + 1):
        batch.train(memory_url("dataset"), memory_url("registry"), f"model{i}", SPEC, BatchSettings(holdout=0))
    for i in range(room.MODELS + 1):
        tidemill.load(memory_url("registry"), f"model{i}")
    counting = Counting()
    tidemill.load(memory_url("registry"), "model1", stores=hooked(counting))
    assert counting.calls["stat"] == 0
    tidemill.load(memory_url("registry"), "model0", stores=hooked(counting))
    assert counting.calls["stat"] == 2


def test_a_damaged_version_is_not_loaded(memory_url: MakeUrl) -> None:
    train(memory_url)
    store = open_store(memory_url("registry"))
    weights = open_log(memory_url("registry"), "model").version(0).manifest.blobs.weights
    data = bytearray(store.read(weights.key))
    data[-1] ^= 1
    store.write(weights.key, bytes(data))
    with pytest.raises(CorruptObject, match="is not what was committed"):
        tidemill.load(memory_url("registry"), "model")


def test_an_alias_that_moves_while_its_version_is_removed_is_looked_up_again(memory_url: MakeUrl) -> None:
    train(memory_url)
    train(memory_url, seed=8)
    log = open_log(memory_url("registry"), "model")
    promote(log, "champion", log.version(0))

    def moved_and_collected() -> None:
        promote(log, "champion", log.version(1))
        collect_garbage(log, keep=1)

    hook = act_once("stat", "blobs/", "before", moved_and_collected)
    assert tidemill.load(memory_url("registry"), "model", stores=hooked(hook)).version.number == 1
    assert hook.done
    with pytest.raises(UnknownVersion, match="retention removed"):
        tidemill.load(memory_url("registry"), "model", "0")


def test_what_is_no_table_and_no_rows_is_refused(memory_url: MakeUrl) -> None:
    train(memory_url)
    predictor = tidemill.load(memory_url("registry"), "model")
    for wrong in ({"a": 1.0, "b": 2.0}, iter([])):
        with pytest.raises(TypeError, match=r"rows are a pyarrow.Table or a list of dicts, not"):
            predictor.predict(wrong)
    with pytest.raises(ColumnError, match="column 'b' is missing from the table"):
        predictor.predict(pa.table({"a": [1.0]}))
    with pytest.raises(ColumnError, match="column 'b' of the table has type text"):
        predictor.predict(pa.table({"a": [1.0], "b": ["x"]}))


def test_a_model_of_ones_own_may_ask_for_gradients(memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMILL_FACTORIES", own_models.__name__)
    put(memory_url("dataset"), {"a.parquet": rows(60, 0)})
    spec = Spec.model_validate(SPEC.model_dump() | {"model": {"factory": "tests.tasks.own_models:Slope"}})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", spec, BatchSettings(holdout=0))
    predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"))
    written = pq.read_table(io.BytesIO(open_store(memory_url("out")).read("a.parquet")))
    predictor = tidemill.load(memory_url("registry"), "model")
    assert predictor.predict(rows(60, 0)).equals(written)
    x = torch.ones(3, 2, requires_grad=True)
    predictor.network.served(x).sum().backward()  # with what it kept of the predictions


def test_outputs_may_be_changed_and_trained_with(memory_url: MakeUrl) -> None:
    train(memory_url)
    outputs = tidemill.load(memory_url("registry"), "model").outputs(rows(5, 1))
    before = outputs.clone()
    assert torch.equal(outputs.add_(1.0), before + 1.0)
    assert (torch.ones(5, requires_grad=True) * outputs).sum().requires_grad


@pytest.mark.slow
def test_loading_brings_neither_prefect_nor_an_optimizer_along(tmp_path: Path) -> None:
    put(str(tmp_path / "dataset"), {"a.parquet": rows(40, 0)})
    batch.train(str(tmp_path / "dataset"), str(tmp_path / "registry"), "model", SPEC, BatchSettings(holdout=0))
    code = (
        "import sys, tidemill; "
        f"print(len(tidemill.load({str(tmp_path / 'registry')!r}, 'model').predict([dict(a=1.0, b=None)]))); "
        "print([name for name in ('prefect', 'torch._dynamo', 's3fs', 'pandas', 'torchmetrics') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["1", "[]"]

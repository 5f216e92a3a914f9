"""`tidemill export`: one file that predicts as the version does, or none."""

import io
import json
import sys
import uuid
from collections.abc import Callable
from typing import Any

import onnx
import pyarrow as pa
import pytest
import torch

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, hooked
from tests.tasks.exporting import zoo
from tidemill.storage.aliases import resolve
from tidemill.storage.errors import DatasetError, InvalidURL, PlacesOverlap, Unavailable
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.errors import CannotExport, MissingExtra
from tidemill.tasks.exporting import checking
from tidemill.tasks.exporting.export import export
from tidemill.tasks.exporting.layout import as_trained, inputs_of, layout_of
from tidemill.tasks.training.imports import ALLOWED_MODULES
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_frozen

# One worker imports torch.onnx, which takes seconds.
pytestmark = [pytest.mark.xdist_group("export"), pytest.mark.slow]

OWN = "tests.tasks.exporting.models"


def own(factory: str, features: list[str], **settings: Any) -> Spec:
    return zoo.spec("regression", features, model={"factory": f"{OWN}:{factory}"}, null_indicators=False, **settings)


# ---- the file --------------------------------------------------------------------------------------------------------
def test_an_onnx_file_says_what_it_is_and_what_it_is_fed(place: str) -> None:
    done = export(f"{place}/registry", "model", f"{place}/out/model.onnx")
    data = open_store(f"{place}/out").read("model.onnx")
    assert done.model_dump(exclude={"difference"}) == {
        "model": "model",
        "version": 0,
        "format": "onnx",
        "output": f"{place}/out/model.onnx",
        "bytes": len(data),
        "rows": checking.MADE_UP_ROWS + 300,
        "dataset": f"{place}/dataset",
    }
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model)
    about = {entry.key: entry.value for entry in model.metadata_props}
    version = resolve(open_log(f"{place}/registry", "model", writable=False), "champion")
    assert (about["tidemill.model"], about["tidemill.version"]) == ("model", "0")
    assert about["tidemill.sha256"] == version.sha256
    assert json.loads(about["tidemill.spec"]) == version.manifest.resolved_spec
    layout = json.loads(about["tidemill.layout"])
    assert [column["column"] for column in layout["numbers"]] == [
        *("float16", "float32", "float64", "int16", "int64", "boolean", "decimal"),
        *("timestamp", "date", "time", "duration", "vector", "image"),
    ]
    assert [column["at"] for column in layout["numbers"]] == [*range(12), 14]
    assert layout["ids"] == [
        {"column": "text", "family": "text", "at": 0, "buckets": 64},
        {"column": "dictionary", "family": "text", "at": 1, "buckets": 16},
        {"column": "whole", "family": "number", "at": 2, "buckets": 100},
        {"column": "fraction", "family": "number", "at": 3, "buckets": 7},
        {"column": "tags", "family": "list of text", "at": 4, "buckets": 50, "length": 3},
        {"column": "items", "family": "list of integers", "at": 7, "buckets": 1000, "length": 5},
    ]
    assert layout["nulls"] == [{"column": "vector", "at": 0}]
    assert layout["output"] == {"name": "prediction", "task": "regression", "targets": ["y"]}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "numbers": ["batch", 18],
        "ids": ["batch", 12],
        "nulls": ["batch", 1],
        "prediction": ["batch"],
    }
    # An embedding bag as a loop over the rows takes 16 times as long for 100 of them.
    assert not {"Loop", "If", "Scan"} & {node.op_type for node in model.graph.node}


def test_a_program_of_torch_says_the_same(place: str) -> None:
    export(f"{place}/registry", "model", f"{place}/out/model.pt2", "torch")
    about: dict[str, Any] = dict.fromkeys(("tidemill.model", "tidemill.version", "tidemill.layout"))
    data = open_store(f"{place}/out").read("model.pt2")
    program = torch.export.load(io.BytesIO(data), extra_files=about).module()
    assert (about["tidemill.model"], about["tidemill.version"]) == ("model", "0")
    log = open_log(f"{place}/registry", "model", writable=False)
    version = resolve(log, "0")
    frozen = load_frozen(log, version)
    table = as_trained(frozen.features, version.manifest.columns, zoo.table(1))
    found = program(**inputs_of(frozen.features, table, "a row"))
    assert found.shape == (1,)
    assert json.loads(about["tidemill.layout"])["output"]["task"] == "regression"


def test_labels_stand_in_the_layout_in_the_order_of_their_probabilities() -> None:
    where = f"memory://{uuid.uuid4().hex}"
    log = open_log(zoo.trained(where, zoo.spec("binary", ["float64"]), zoo.table(200)), "model", writable=False)
    layout = layout_of(load_frozen(log, resolve(log, "champion")).features)
    assert layout["output"] == {"name": "prediction", "task": "binary", "targets": ["answer"], "labels": ["no", "yes"]}


def test_a_version_is_chosen_as_for_predict(memory_url: Callable[[str], str]) -> None:
    for seed in range(2):
        zoo.trained(memory_url("x"), SPEC.model_copy(update={"seed": seed}), rows(100, 0))
    registry = f"{memory_url('x')}/registry"
    assert export(registry, "model", memory_url("out/a"), "torch").version == 1
    assert export(registry, "model", memory_url("out/a"), "torch", "0").version == 0


@pytest.mark.parametrize("features", [["tags"], ["text"], ["vector"]])
def test_a_model_of_one_kind_of_inputs_is_exported(features: list[str]) -> None:
    """Sequences, categories or numbers alone."""
    where = f"memory://{uuid.uuid4().hex}"
    registry = zoo.trained(where, zoo.spec("regression", features), zoo.table(100))
    assert export(registry, "model", f"{where}/out/model.pt2", "torch").difference <= checking.TOLERANCE


# ---- users' own models -----------------------------------------------------------------------------------------------
def test_a_model_of_ones_own_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED_MODULES, OWN)
    where = f"memory://{uuid.uuid4().hex}"
    registry = zoo.trained(where, own("Own", ["float32", "int64", "vector", "text"]), zoo.table(300))
    for kind in ("onnx", "torch"):
        assert export(registry, "model", f"{where}/out/own", kind).difference <= checking.TOLERANCE


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("Careful", r"torch.export cannot trace the model: .*data-dependent.*models\.py:\d+ in forward"),
        ("scripted", r"torch.export cannot trace the model: it has a module of torch\.jit"),
        ("Fixed", r"torch.export cannot trace the model: .*batch"),
        (
            "Otherwise",
            r"the exported model gives .* for row \d+ of made-up rows, where predict gives .* apart, .* nothing was written",
        ),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_in_one_line(
    factory: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ALLOWED_MODULES, OWN)
    where = f"memory://{uuid.uuid4().hex}"
    registry = zoo.trained(where, own(factory, ["float32", "int64"]), zoo.table(200))
    put(f"{where}/out", {"model": b"the one before"})
    with pytest.raises(CannotExport, match=said) as caught:
        export(registry, "model", f"{where}/out/model", "torch")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert open_store(f"{where}/out").read("model") == b"the one before"


def test_a_missing_package_is_told_with_its_extra(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"needs the package 'onnxscript'.*pip install 'tidemill\[onnx\]'"):
        export(f"{place}/registry", "model", f"{place}/out/missing.onnx")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(MissingExtra, match=r"needs the package 'keras'.*pip install 'tidemill\[keras\]'"):
        export(f"{place}/registry", "model", f"{place}/out/missing.keras", "keras")
    assert not [key for key in keys(f"{place}/out") if key.startswith("missing")]


# ---- what it is compared on ------------------------------------------------------------------------------------------
def test_real_rows_find_what_made_up_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole number that is far from 0 for its deviation, scaled in float64 where the training scaled in float32."""
    where = f"memory://{uuid.uuid4().hex}"
    registry = zoo.trained(where, zoo.spec("regression", ["int16", "float32"]), zoo.table(400))
    log = open_log(registry, "model", writable=False)
    frozen, types = load_frozen(log, resolve(log, "0")), resolve(log, "0").manifest.columns
    table = zoo.table(400, seed=1)
    kept = as_trained(frozen.features, types, table)
    assert kept.schema.field("int16").type == pa.int16()
    as_floats = table.set_column(table.column_names.index("int16"), "int16", table.column("int16").cast(pa.float64()))
    assert as_trained(frozen.features, types, as_floats).schema.field("int16").type == pa.float32()
    x_NF = [frozen.features.encode(one, "rows").x_NF for one in (kept, as_floats)]
    assert float((x_NF[0] - x_NF[1]).abs().max()) > checking.TOLERANCE
    put(f"{where}/floats", {"a.parquet": as_floats})
    for rows_url in (None, f"{where}/floats"):
        done = export(registry, "model", f"{where}/out/model.pt2", "torch", rows=rows_url)
        assert done.dataset == (rows_url or f"{where}/dataset")
        assert done.difference <= checking.TOLERANCE


def test_where_the_dataset_is_gone_only_made_up_rows_are_tried(
    memory_url: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    registry = zoo.trained(memory_url("x"), SPEC, rows(100, 0))
    open_store(f"{memory_url('x')}/dataset").delete("a.parquet")
    done = export(registry, "model", memory_url("out/model.pt2"), "torch")
    assert (done.rows, done.dataset) == (checking.MADE_UP_ROWS, None)
    assert "only made-up rows are tried" in caplog.text
    with pytest.raises(DatasetError):
        export(registry, "model", memory_url("out/model.pt2"), "torch", rows=memory_url("nothing"))


def test_made_up_rows_have_nulls_in_all_columns(place: str) -> None:
    log = open_log(f"{place}/registry", "model", writable=False)
    (table,) = checking.made_up_rows(load_frozen(log, resolve(log, "0")).features).tables
    assert table.column_names == list(zoo.FEATURES)
    assert all(0.15 < column.null_count / table.num_rows < 0.25 for column in table.columns)
    assert not any(table.column(name)[0].is_valid for name in table.column_names)


def test_a_difference_counts_in_units_of_the_standardised_target(place: str) -> None:
    log = open_log(f"{place}/registry", "model", writable=False)
    features = load_frozen(log, resolve(log, "0")).features
    seen = features.statistics
    assert seen is not None
    b = torch.tensor([0.0, 1.0, 100.0, torch.nan, torch.inf]).double()
    a = b + torch.tensor([1e-3, 1e-3, 1e-3, 0, 0])
    in_units = [(value * seen.target_std + seen.target_mean).float() for value in (a, b)]
    apart, allowed = checking.differences(*in_units, features)
    torch.testing.assert_close(apart, torch.tensor([1e-3, 1e-3, 1e-5, 0, 0]).double(), rtol=0.02, atol=0)
    assert ((allowed[:3] >= checking.TOLERANCE) & (allowed[:3] < 1.3 * checking.TOLERANCE)).all()
    assert checking.differences(in_units[0], in_units[0].nan_to_num(nan=3.0), features)[0][3] == torch.inf


# ---- where it is written ---------------------------------------------------------------------------------------------
def test_it_is_written_whole_or_not_at_all(make_url: Callable[[str], str]) -> None:
    registry = zoo.trained(make_url("x"), SPEC, rows(100, 0))
    put(make_url("out"), {"model.pt2": b"the one before"})

    def dies(call: Call) -> None:
        if call.url.endswith("/out") and call.verb == "write" and call.phase == "before":
            raise Unavailable("killed")

    with pytest.raises(Unavailable):
        export(registry, "model", f"{make_url('out')}/model.pt2", "torch", stores=hooked(dies))
    assert open_store(make_url("out")).read("model.pt2") == b"the one before"
    done = export(registry, "model", f"{make_url('out')}/model.pt2", "torch")
    assert keys(make_url("out")) == ["model.pt2"]
    assert open_store(make_url("out")).stat("model.pt2").size == done.bytes


def test_it_lies_outside_of_what_the_model_is_made_of(memory_url: Callable[[str], str]) -> None:
    registry = zoo.trained(memory_url("x"), SPEC, rows(100, 0))
    for output, words in (
        (f"{memory_url('x')}/dataset/model.onnx", "lies inside the dataset of version 0"),
        (f"{registry}/model/model.onnx", "where the registry keeps this model"),
    ):
        with pytest.raises(PlacesOverlap, match=rf"the exported model, .* {words}"):
            export(registry, "model", output)
    for output in ("s3://bucket", f"{memory_url('out')}/"):
        with pytest.raises(InvalidURL, match="names no file"):
            export(registry, "model", output)

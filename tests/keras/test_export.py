"""An exported Keras model is loaded by TensorFlow, and predicts there what the version does."""

import json
import os
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.keras.conftest import NETWORKS
from tests.tasks.exporting import zoo
from tidemill.storage.aliases import resolve
from tidemill.storage.log import open_log
from tidemill.tasks.errors import CannotExport
from tidemill.tasks.exporting import checking, keras_file
from tidemill.tasks.exporting.export import export
from tidemill.tasks.exporting.layout import as_trained, inputs_of
from tidemill.tasks.training.groups import TableGroup
from tidemill.tasks.training.loop import predict
from tidemill.tasks.versions import load_frozen

pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("default")]  # Keras and TensorFlow warn of their own code

ROWS: Final = 4_096


def test_tensorflow_predicts_what_the_version_does(tmp_path: Path) -> None:
    """Of all tasks, with columns of every kind, nulls in them, and everything that Tidemill does to numbers and targets."""
    want: dict[str, np.ndarray] = {}
    rows = zoo.table(ROWS, seed=1)
    for task in zoo.TARGETS:
        place = f"{tmp_path}/{task}"
        registry = zoo.trained(place, zoo.spec(task, model={"factory": f"{NETWORKS}:functional"}), zoo.table(300))
        done = export(registry, "model", f"{tmp_path}/{task}.keras", "keras")
        assert done.difference <= checking.TOLERANCE
        log = open_log(registry, "model", writable=False)
        version = resolve(log, "champion")
        network = load_frozen(log, version)
        table = as_trained(network.features, version.manifest.columns, rows)
        with closing(predict(network, [TableGroup("rows", table)])) as predicted:
            want[task] = next(iter(predicted)).numpy()
        inputs = inputs_of(network.features, table, "rows")
        np.savez(tmp_path / f"{task}.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("loaded.py"), tmp_path],
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["tensorflow"]
    for task, predictions in want.items():
        found = np.load(tmp_path / f"{task}.npy")
        assert found.shape == predictions.shape
        assert found.dtype == predictions.dtype == np.float32
        np.testing.assert_allclose(found, predictions, rtol=1e-5, atol=1e-6, err_msg=task)


def test_the_file_says_what_it_is_and_what_it_is_fed(tmp_path: Path) -> None:
    spec = zoo.spec("binary", ["float32", "vector"], model={"factory": f"{NETWORKS}:sequential"})
    registry = zoo.trained(str(tmp_path), spec, zoo.table(200))
    export(registry, "model", f"{tmp_path}/out/model.keras", "keras")
    with zipfile.ZipFile(tmp_path / "out" / "model.keras") as archive:
        about = json.loads(archive.read(keras_file.ABOUT))
    assert (about["tidemill.model"], about["tidemill.version"]) == ("model", "0")
    layout = json.loads(about["tidemill.layout"])
    assert [column["column"] for column in layout["numbers"]] == ["float32", "vector"]
    import keras

    model = keras.models.load_model(tmp_path / "out" / "model.keras")
    assert {one.name: (one.dtype, one.shape) for one in model.inputs} == {
        "numbers": ("float64", (None, 4)),
        "nulls": ("bool", (None, 1)),
    }


def test_a_network_that_is_none_of_keras_is_refused(tmp_path: Path) -> None:
    registry = zoo.trained(str(tmp_path), zoo.spec("binary", ["float32"]), zoo.table(100))
    with pytest.raises(
        CannotExport, match=r"what model\.factory 'linear' makes is no Keras model: use --format onnx or torch"
    ):
        export(registry, "model", f"{tmp_path}/model.keras", "keras")
    assert not (tmp_path / "model.keras").exists()


def test_a_class_that_keras_cannot_write_down_is_refused_in_one_line(tmp_path: Path) -> None:
    spec = zoo.spec("binary", ["float32"], model={"factory": f"{NETWORKS}:Subclassed"})
    registry = zoo.trained(str(tmp_path), spec, zoo.table(100))
    with pytest.raises(CannotExport, match=r"^Keras cannot (write|load) the model: ") as caught:
        export(registry, "model", f"{tmp_path}/model.keras", "keras")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.keras").exists()

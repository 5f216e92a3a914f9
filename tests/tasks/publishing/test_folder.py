"""What MLflow keeps of a version: loaded by its flavor, it predicts what `tidemill predict` does. That needs no server."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import safetensors.torch
import yaml

from tests.data import put
from tests.tasks.exporting.zoo import spec, table, trained
from tidemill.storage.aliases import promote
from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.memory import MemoryStore
from tidemill.tasks import online
from tidemill.tasks.publishing.folder import write_folder
from tidemill.tasks.publishing.pyfunc import STATE, WEIGHTS, _load_pyfunc
from tidemill.tasks.serving.loading import load
from tidemill.tasks.serving.predictor import predictor_of
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.sources import find
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.warm_start import read

FORMATS = Path(__file__).parents[2] / "storage/formats"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> VersionLog:
    registry = trained(str(tmp_path_factory.mktemp("place")), spec("multiclass"), table(200))
    return open_log(registry, "model", writable=False)


@pytest.fixture(scope="module")
def folder(log: VersionLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    write_folder(path, log, log.head(), "r" * 32, "m-1")
    return path


@pytest.mark.slow
def test_a_frame_of_pandas_is_predicted_as_the_table_of_the_same_rows(log: VersionLog, folder: Path) -> None:
    """Of every kind of column, with nulls, which pandas has as NaN, NaT and None."""
    rows = table(60, seed=1)
    wanted = predictor_of(log, log.head()).predict(rows).to_pylist()
    given = _load_pyfunc(str(folder / "data")).predict(rows.to_pandas())
    assert given["prediction"].tolist() == [pytest.approx(row["prediction"], abs=1e-6) for row in wanted]


def test_a_frame_without_rows_has_the_column_and_one_with_a_name_twice_is_refused(folder: Path) -> None:
    published, rows = _load_pyfunc(str(folder / "data")), table(2).to_pandas()
    assert published.predict(rows.iloc[:0]).columns.tolist() == published.predict(rows).columns.tolist()
    with pytest.raises(ColumnError, match="column 'float64' occurs 2 times in the frame"):
        published.predict(pd.concat([rows, rows[["float64"]]], axis=1))


def test_the_signature_is_of_types_that_frames_and_json_have(folder: Path) -> None:
    about = yaml.safe_load((folder / "MLmodel").read_text())
    types = {column["name"]: column for column in json.loads(about["signature"]["inputs"])}
    assert {name: types[name]["type"] for name in ("boolean", "int64", "float32", "timestamp", "text", "whole")} == {
        "boolean": "any",
        "int64": "any",
        "float32": "any",
        "timestamp": "datetime",
        "text": "string",
        "whole": "any",
    }
    assert types["vector"]["items"] == types["image"]["items"] == {"type": "double"}
    assert types["tags"]["items"] == {"type": "string"}
    assert types["items"]["items"] == {"type": "long"}
    assert not any(column["required"] for column in types.values())
    assert about["flavors"]["python_function"]["loader_module"] == "tidemill.tasks.publishing.pyfunc"


@pytest.mark.slow
def test_nothing_of_a_folder_is_a_pickle_or_a_row_of_the_data(folder: Path, log: VersionLog, tmp_path: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    data = {f"data/{name}" for name in ("manifest.json", WEIGHTS, STATE)}
    assert files == {"MLmodel", "requirements.txt", "python_env.yaml", *data}

    registry = trained(str(tmp_path), spec("regression", ["float64"], replay={"rows": 50}), table(100))
    other = open_log(registry, "model", writable=False)
    with_memory = online_version(other, tmp_path)
    (tmp_path / "folder").mkdir()
    write_folder(tmp_path / "folder", other, with_memory, "r" * 32, "m-1")
    tensors = safetensors.torch.load((tmp_path / "folder" / "data" / STATE).read_bytes())
    stored = safetensors.torch.load(other.read_blob(with_memory.manifest.blobs.state))
    assert any(name.startswith("memory.") for name in stored)
    assert tensors.keys() == {name for name in stored if name.startswith("features.")}
    assert _load_pyfunc(str(tmp_path / "folder" / "data")).predict(pd.DataFrame({"float64": [1.0]})).shape == (1, 1)


def online_version(log: VersionLog, place: Path) -> Version:
    put(f"{place}/inbox", {"a.parquet": table(40, seed=2)})
    online.drain(f"{place}/inbox", log.store.url, log.model, OnlineSettings(mode="drain", grace_seconds=0))
    return log.head()


def test_weights_that_were_changed_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = bytearray((tmp_path / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(weights)
    with pytest.raises(CorruptObject, match="is not what was committed"):
        _load_pyfunc(str(tmp_path))


@pytest.mark.slow
def test_files_in_segments_are_put_to_use_as_others_are(tmp_path: Path) -> None:
    """Loaded, published, begun with, named by an alias, copied to a history of its own: the same history in either format."""
    table = pa.table({"a": [0.5, 1.0, 2.0], "b": [1.0, -1.0, 0.0]})
    found = []
    for number in ("2.3", "2.4"):
        log = open_log(str(shutil.copytree(FORMATS / number, tmp_path / number)), "model")
        version = log.version(3)
        promote(log, "three", version)
        predicted = load(log.store.url, "model", "three").predict(table).to_pylist()
        folder = tmp_path / f"folder {number}"
        folder.mkdir()
        write_folder(folder, log, version, "r" * 32, "m-1")
        published = _load_pyfunc(str(folder / "data")).predict(table.to_pandas())
        (folder / "data" / WEIGHTS).write_bytes(bytes(200))
        with pytest.raises(CorruptObject, match="publish the version again"):
            _load_pyfunc(str(folder / "data"))
        source = read(find(f"{log.store.url}/model@three"))
        copy = VersionLog(MemoryStore(f"copy of {tmp_path} {number}"), "model")
        weights, _ = copy.copy_blobs(0, version.manifest.blobs, log)
        assert all(key.startswith("model/blobs/00000000-") for key in weights.object_keys)
        found.append(
            (
                predicted,
                published["prediction"].tolist(),
                {name: tensor.tolist() for name, tensor in source.weights.items()},
                copy.read_blob(weights),
            )
        )
    assert found[0] == found[1]

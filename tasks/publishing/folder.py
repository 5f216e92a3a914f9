"""A version as MLflow's folder of a model: `MLmodel`, and what `tidemill.tasks.publishing.pyfunc` loads. No pickle.

`mlflow.pyfunc` and `mlflow.models.signature` import pandas: the signature is written by hand.
"""

import json
import platform
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Final

import yaml
from mlflow.models import Model
from mlflow.types import DataType
from mlflow.types.schema import AnyType, Array, ColSpec, Schema

from tidemill.storage.chain import Version
from tidemill.storage.log import VersionLog
from tidemill.tasks.publishing.pyfunc import MANIFEST, STATE, WEIGHTS
from tidemill.tasks.training.classes import PREDICTED
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.inputs import Input
from tidemill.tasks.training.stored import serving_state
from tidemill.tasks.versions import load_frozen

LOADER: Final = "tidemill.tasks.publishing.pyfunc"
DATA: Final = "data"
ANY: Final[Any] = AnyType()  # type: ignore[no-untyped-call]
"""What a column of numbers holds."""


def write_folder(folder: Path, log: VersionLog, version: Version, run_id: str, model_id: str) -> None:
    """Write the folder of a version. Weights are as they were committed; of the state what serving needs: no old rows.

    Raises:
        UnknownVersion, CorruptObject, FactoryError, StateMismatch: the version cannot be loaded.
    """
    network = load_frozen(log, version)
    blobs = version.manifest.blobs
    data = folder / DATA
    data.mkdir()
    (data / MANIFEST).write_bytes(log.store.read(log.manifest_key(version.number)))
    (data / WEIGHTS).write_bytes(log.read_blob(blobs.weights))
    (data / STATE).write_bytes(serving_state(log.read_blob(blobs.state)))
    (folder / "requirements.txt").write_text(f"tidemill=={version_of('tidemill')}\npandas\n")
    python_env = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(python_env))
    model = Model(run_id=run_id, model_id=model_id)
    model.add_flavor(
        "python_function",
        loader_module=LOADER,
        data=DATA,
        env={"virtualenv": "python_env.yaml"},
        python_version=platform.python_version(),
    )
    model.add_flavor("tidemill", source=log.url, version=version.number, sha256=version.sha256)
    about = model.to_dict() | {"signature": signature(network.features)}
    (folder / "MLmodel").write_text(yaml.safe_dump(about))


def signature(features: Features) -> dict[str, str | None]:
    """As `MLmodel` holds it. Numbers are of any type: `double` would refuse integers and booleans, which a model takes too."""
    inputs = Schema([ColSpec(_type(column), column.name, required=False) for column in features.columns])
    outputs: list[Any]
    if features.labels is not None:
        label = DataType.string if isinstance(features.labels[0], str) else ANY
        outputs = [ColSpec(label, PREDICTED[0]), ColSpec(Array(DataType.double), PREDICTED[1])]
    else:
        several = len(features.targets) > 1 or features.task == "multiclass"
        outputs = [ColSpec(Array(DataType.double) if several else DataType.double, PREDICTED[0])]
    return {
        "inputs": json.dumps(inputs.to_dict()),
        "outputs": json.dumps(Schema(outputs).to_dict()),
        "params": None,
    }


def _type(column: Input) -> DataType | Array | AnyType:
    if column.length:
        return Array(DataType.string if column.family == "list of text" else DataType.long)
    if column.width is not None:
        return Array(DataType.double)
    if column.family == "text":
        return DataType.string
    return DataType.datetime if column.family == "time" else ANY

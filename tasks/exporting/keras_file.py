"""A version as one `.keras` file: preprocessing, network and the target's unit as a Keras model that any backend of Keras loads.

What `graph.py` does in torch, in operations of Keras. Only a network that is a Keras model itself can be written so.

Shape legend: B rows, S numbers of one row without null indicators, C ids, I null indicators, V those of vectors.
"""

import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tidemill.tasks.errors import CannotExport
from tidemill.tasks.exporting.formats import PREFIX, Run, refused
from tidemill.tasks.exporting.layout import IDS, NULLS, NUMBERS, in_float32, indicated_vectors
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.keras_models import KerasModule
from tidemill.tasks.training.learner import Network

ABOUT: Final = "tidemill.json"
"""In the file, which is a zip archive: what the file says of itself."""


def as_keras(
    network: Network, types: Mapping[str, str], example: Mapping[str, Tensor], about: Mapping[str, str]
) -> bytes:
    """A `.keras` file of a version, with `about` in it.

    Args:
        network: Of the version, in evaluation mode.
        types: Of the columns it was trained on, by Arrow's names: see `layout.in_float32`.
        example: Inputs of a few rows: their types and shapes are those of all inputs.
        about: What `export.about_of` gives.

    Raises:
        CannotExport: the network is no Keras model, or one that Keras cannot write down.
    """
    module = network.served
    if not isinstance(module, KerasModule):
        raise CannotExport(
            f"--format keras: what model.factory {network.spec.model.factory!r} makes is no Keras model: use --format onnx or "
            "torch"
        )
    if network.spec.precision != "float32":
        raise CannotExport(
            f"--format keras: the spec says precision {network.spec.precision}, and Keras computes in float32"
        )
    keras: Any = sys.modules["keras"]
    with refused("Keras cannot write the model"), keras.device("cpu"), tempfile.TemporaryDirectory() as folder:
        inputs = {
            name: keras.Input(tensor.shape[1:], name=name, dtype=str(tensor.dtype).removeprefix("torch."))
            for name, tensor in example.items()
        }
        whole = keras.Model(inputs, _predictions(keras, module.net, network.features, types, inputs), name="tidemill")
        file = Path(folder) / "model.keras"
        whole.save(file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(
                ABOUT, json.dumps({PREFIX + name: text for name, text in about.items()}, ensure_ascii=False)
            )
        return file.read_bytes()


def run_keras(data: bytes) -> Run:
    """The model that `as_keras` has stored, on the torch backend.

    Raises:
        CannotExport: Keras cannot load it.
    """
    keras: Any = sys.modules["keras"]
    with refused("Keras cannot load the model"), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        file.write_bytes(data)
        with keras.device("cpu"):
            model = keras.models.load_model(file, compile=False)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with refused("Keras cannot run the model"), keras.device("cpu"), torch.no_grad():
            found: Tensor = model(dict(inputs), training=False)
            return found

    return run


def _predictions(keras: Any, net: Any, features: Features, types: Mapping[str, str], inputs: Mapping[str, Any]) -> Any:
    """As `Graph.forward`."""
    x_BF = _scaled(keras, features, types, inputs) if features.scaled else None
    if IDS not in inputs:
        output = net(x_BF)
    else:
        x_BF = keras.ops.zeros_like(inputs[IDS][:, :0], dtype="float32") if x_BF is None else x_BF
        output = net([x_BF, inputs[IDS]])
    if tuple(output.shape[1:]) == (1,):
        output = keras.ops.squeeze(output, 1)
    return _in_unit(keras, features, output)


def _scaled(keras: Any, features: Features, types: Mapping[str, str], inputs: Mapping[str, Any]) -> Any:
    """As `graph._Numbers`: float64 [B, S] to float32 [B, F]."""
    ops, numbers_BS = keras.ops, inputs[NUMBERS]
    center_S, scale_S = (part[: features.scaled].numpy() for part in features.scaling)
    null_BS = ops.isnan(numbers_BS)
    x_BS = ops.cast((numbers_BS - center_S) / scale_S, "float32")
    float32_S = np.array([in_float32(column, types) for column in features.columns for _ in range(column.numbers)])
    if float32_S.any():
        half_BS = (ops.cast(numbers_BS, "float32") - center_S.astype("float32")) / scale_S.astype("float32")
        x_BS = ops.where(float32_S, half_BS, x_BS)
    x_BS = ops.where(null_BS, np.float32(0), x_BS)
    if (limit := features.soft_limit) is not None:
        z_BS = ops.cast(x_BS, "float64")
        x_BS = ops.cast(z_BS / ops.sqrt(ops.square(z_BS / np.float64(limit)) + np.float64(1)), "float32")
    if not features.indicated:
        return x_BS
    places, at = dict[str, int](), 0
    for column in features.columns:
        places[column.name] = at
        at += column.numbers
    vectors = [column.name for column in indicated_vectors(features)]
    indicators = [
        inputs[NULLS][:, vectors.index(name)] if name in vectors else null_BS[:, places[name]]
        for name in features.indicated
    ]
    return ops.concatenate([x_BS, ops.cast(ops.stack(indicators, axis=1), "float32")], axis=1)


def _in_unit(keras: Any, features: Features, output: Any) -> Any:
    """As `graph._Target`."""
    ops, seen = keras.ops, features.statistics
    scales = features.standardize_target and seen is not None
    reach = None if seen is None or not features.limit_predictions else seen.target_range
    if reach is not None:
        assert seen is not None, "it has the range"
        low, high = (((reach - seen.target_mean) / seen.target_std) if scales else reach).float().numpy()
        output = ops.minimum(ops.maximum(output, low), high)
    if features.task == "binary":
        return ops.sigmoid(output)
    if features.task == "multiclass":
        return ops.softmax(output, axis=1)
    values = ops.cast(output, "float64")
    if scales:
        assert seen is not None, "its statistics scale"
        values = values * seen.target_std.double().numpy() + seen.target_mean.double().numpy()
    if reach is not None:
        values = ops.minimum(ops.maximum(values, reach[0].double().numpy()), reach[1].double().numpy())
    return ops.cast(values, "float32")

"""`tidemill export`: a version as a file that other programs run, checked before it is written."""

import json
from collections.abc import Callable, Mapping
from typing import Final

from pydantic import BaseModel
from torch import Tensor

from tidemill.storage.chain import Version
from tidemill.storage.log import VersionLog
from tidemill.storage.overlap import keep_apart
from tidemill.storage.store import Store
from tidemill.storage.urls import open_object, open_store
from tidemill.tasks.exporting import checking, formats, keras_file
from tidemill.tasks.exporting.formats import Format, Run
from tidemill.tasks.exporting.graph import Graph
from tidemill.tasks.exporting.layout import inputs_of, layout_of
from tidemill.tasks.serving.loading import load
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Network

EXAMPLE_ROWS: Final = 7
"""Made-up rows that the network is traced with. torch takes a batch of 0 or 1 for a constant."""


class Exported(BaseModel):
    """What `export` wrote."""

    model: str
    version: int
    format: str
    output: str
    """URL of the file."""
    bytes: int
    rows: int
    """On which it was compared with `predict`, made-up ones included."""
    dataset: str | None
    """Where those rows are from; None: all of them are made up."""
    difference: float
    """The largest |a - b| / max(1, |b|) of these rows, in units of the standardised target."""


def export(
    registry: str,
    model: str,
    to: str,
    format: Format = "onnx",
    version: str = "champion",
    rows: str | None = None,
    *,
    stores: Callable[[str], Store] = open_store,
) -> Exported:
    """Write a version with its preprocessing as one file, in place of what was there, whole or not at all.

    Before it is written it is run, by ONNX Runtime, torch or Keras, on rows of a dataset and on made-up ones, and compared with
    what the version predicts for them.

    Args:
        registry: URL below which models live.
        model: Name of the model.
        to: URL of a file.
        format: `onnx`; `torch`: a program that `torch.export.load` reads; or `keras`, of a Keras model: a `.keras` file.
        version: An alias, a version's number, or `head`.
        rows: URL of a dataset whose first rows are tried; None: the dataset that the version goes back to, if it can be read.
        stores: Opens the store at a URL.

    Raises:
        UnknownAlias, UnknownVersion, UnknownModel: there is no such version.
        InvalidURL: `to` names no file.
        PlacesOverlap: the file would lie in a dataset, an inbox or the registry of the model.
        CannotExport: the network cannot be translated, or predicts otherwise. Nothing was written.
        MissingExtra: the packages of the extra `onnx` or `keras` are not installed.
        DatasetError, ColumnError: `rows` cannot be read.
    """
    formats.check_packages(format)
    store, key = open_object(to, stores)
    log = VersionLog(stores(registry), model)
    place = f"{store.url.removesuffix('/')}/{key}"
    keep_apart(log, "the exported model", place)
    predictor = load(registry, model, version, stores=stores)
    chosen, network = predictor.version, predictor.network
    features = network.features
    made_up = checking.made_up_rows(features)
    real = (
        checking.rows_of_lineage(log, chosen.number, features, stores)
        if rows is None
        else checking.rows_of_dataset(rows, features, stores)
    )
    example = inputs_of(features, made_up.tables[0].slice(0, EXAMPLE_ROWS), made_up.name)
    data, run = _made(format, network, chosen.manifest.columns, example, about_of(chosen, features))
    sets = [made_up] if real is None else [made_up, real]
    difference = checking.check(run, network, chosen.manifest.columns, sets)
    store.write(key, data)
    return Exported(
        model=model,
        version=chosen.number,
        format=format,
        output=place,
        bytes=len(data),
        rows=sum(some.count for some in sets),
        dataset=None if real is None else real.name,
        difference=difference,
    )


def _made(
    format: Format,
    network: Network,
    types: Mapping[str, str],
    example: Mapping[str, Tensor],
    about: Mapping[str, str],
) -> tuple[bytes, Run]:
    """The file, and what runs it."""
    if format == "keras":
        data = keras_file.as_keras(network, types, example, about)
        return data, keras_file.run_keras(data)
    program = formats.traced(Graph(network, types, example), example)
    if format == "onnx":
        data = formats.as_onnx(program, about)
        return data, formats.run_onnx(data)
    data = formats.as_torch(program, about)
    return data, formats.run_torch(data)


def about_of(version: Version, features: Features) -> dict[str, str]:
    """What stands in the file beside the graph: which version it is, its spec, and the layout of its inputs and its output."""
    manifest = version.manifest
    return {
        "model": manifest.model,
        "version": str(manifest.version),
        "sha256": version.sha256,
        "spec": json.dumps(manifest.resolved_spec or manifest.spec, ensure_ascii=False),
        "layout": json.dumps(layout_of(features), ensure_ascii=False),
    }

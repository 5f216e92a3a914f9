"""The command that writes a version for other programs."""

from typing import Annotated, Literal

from cyclopts import Parameter

from tidemill.flows import launch, views
from tidemill.flows.commands.shared import AsJson, Name, Registry, Which, opened, tell


def export(
    registry: Registry,
    model: Name,
    /,
    *,
    to: Annotated[str, Parameter(help="URL of the file to write. An earlier one is replaced.")],
    file_format: Annotated[
        Literal["onnx", "torch", "keras"],
        Parameter(
            "--format",
            help="onnx, which needs the extra onnx; torch, a program that torch.export.load reads; or keras, a .keras file of a "
            "Keras model.",
        ),
    ] = "onnx",
    version: Which = "champion",
    rows: Annotated[
        str | None,
        Parameter(
            help="URL of a dataset whose first 10,000 rows are tried; left out: the dataset that the version goes back to."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a version with its preprocessing as one file, for ONNX Runtime, torch or Keras.

    Before it is written it is run on rows of a dataset and on made-up ones, and compared with what predict gives for them.
    Where they differ, or where the network cannot be translated, nothing is written. Text is hashed outside of the file: see
    docs/how-to/export.md for its inputs, in Python and in JavaScript.

    For example:

        tidemill export ./registry flights --to ./flights.onnx
        tidemill export ./registry flights --to s3://bucket/models/flights.pt2 --format torch --version 12
    """
    from tidemill.storage import aliases
    from tidemill.storage.urls import open_object

    open_object(to)
    aliases.resolve(opened(registry, model), version)
    if rows is not None:
        launch.datasets_exist(rows)
    launch.find_own_modules()
    from tidemill.tasks.exporting.export import export as run

    done = run(registry, model, to, file_format, version, rows)
    tried = f"made-up rows and the first rows of {done.dataset}" if done.dataset else "made-up rows"
    words = f"{done.output}: version {done.version} of {done.model} as {done.format}, {done.bytes:,} bytes"
    compared = (
        f"compared with predict on {views.count(done.rows, 'row')} ({tried}): at most {done.difference:.1g} apart"
    )
    tell((done, f"{words}\n{compared}"), as_json)

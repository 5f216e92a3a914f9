"""A graph as bytes in a format of others, and bytes as something to run: what is checked is what was written.

torch.onnx is slow to import (seconds), and an extra: nothing of it is imported before it is used.

Shape legend: B rows of a batch.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, cast

import torch
from torch import Tensor

from tidemill.tasks.errors import CannotExport, of_extra
from tidemill.tasks.exporting.graph import Graph
from tidemill.tasks.exporting.layout import PREDICTION
from tidemill.tasks.training.calling import first_line, frames_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Format = Literal["onnx", "torch", "keras"]
Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name to predictions."""

PREFIX: Final = "tidemill."
"""Of the keys in `metadata_props` of ONNX, and of the names of torch's `extra_files`."""
BATCH: Final = "batch"
"""The name of the first dimension of inputs and output, which may have any size."""
OPSET: Final = 20
"""Of ONNX. ONNX Runtime 1.17 and all newer ones run it (https://onnxruntime.ai/docs/reference/compatibility.html)."""
_NOISY: Final = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes")
_MOST_BYTES: Final = 2**31 - 1
"""Of one message of Protocol Buffers."""


def check_packages(wanted: Format) -> None:
    """Raises MissingExtra: the packages for a format are not installed."""
    if wanted == "onnx":
        with of_extra("onnx", "--format onnx"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    if wanted == "keras":
        with of_extra("keras", "--format keras"):
            import keras  # noqa: F401


def traced(graph: Graph, example: Mapping[str, Tensor]) -> "ExportedProgram":
    """The graph as torch's own program, for batches of any size.

    Raises:
        CannotExport: torch cannot trace the network.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in graph.modules()):
        raise CannotExport(
            "torch.export cannot trace the model: it has a module of torch.jit, which is no Python any more"
        )
    batch = torch.export.Dim(BATCH, min=1)
    shapes = {name: {0: batch} for name in example}
    with _quiet(), refused("torch.export cannot trace the model"):
        return torch.export.export(graph, (), dict(example), dynamic_shapes=shapes)


def as_torch(program: "ExportedProgram", about: Mapping[str, str]) -> bytes:
    """What `torch.export.load` reads, with `about` as its `extra_files`.

    Raises:
        CannotExport: torch cannot store the program.
    """
    data = io.BytesIO()
    with _quiet(), refused("torch.export cannot store the model"):
        torch.export.save(program, data, extra_files={PREFIX + name: text for name, text in about.items()})
    return data.getvalue()


def as_onnx(program: "ExportedProgram", about: Mapping[str, str]) -> bytes:
    """An ONNX model, with `about` in its `metadata_props`.

    Raises:
        CannotExport: an operator has no translation, or the model is too large for one file.
    """
    with _quiet(), refused("torch.onnx cannot translate the model"):
        made = torch.onnx.export(
            program,
            output_names=[PREDICTION],
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        assert made is not None, "as it does for dynamo=False alone"
        model = made.model_proto
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a number of torch's; there is but this one
                dim.dim_param = BATCH
    for name, text in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + name, text
    if model.ByteSize() > _MOST_BYTES:
        raise CannotExport(
            f"the model has {model.ByteSize():,} bytes, and one ONNX file holds 2 GiB: use --format torch"
        )
    return cast(bytes, model.SerializeToString())


def run_torch(data: bytes) -> Run:
    """The program that `as_torch` has stored.

    Raises:
        CannotExport: torch cannot load it.
    """
    with _quiet(), refused("torch.export cannot load the model again"):
        module = torch.export.load(io.BytesIO(data)).module()

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, module(**inputs))

    return run


def run_onnx(data: bytes) -> Run:
    """The model that `as_onnx` has stored, in ONNX Runtime on the CPU.

    Raises:
        CannotExport: ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    with refused("ONNX Runtime cannot load the model"):
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with refused("ONNX Runtime cannot run the model"):
            (found,) = session.run([PREDICTION], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(found)

    return run


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Tells an error of torch or ONNX in one line: its last cause, and the frames in the user's files."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        theirs = [frame for frame in frames_of(cause) or frames_of(error) if "site-packages" not in frame]
        where = f" ({'; '.join(theirs)})" if theirs else ""
        raise CannotExport(f"{what}: {type(cause).__name__}: {first_line(cause)}{where}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch's exporter, which are about its own code and about packages that it does not need."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _NOISY)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)

"""Everything that training refuses on purpose. Each message says what happened, where, and what to do."""

import re
import traceback
from pathlib import Path
from typing import Final

MESSAGE: Final = 500
"""Characters of a foreign error's message that are told."""


class TrainingError(Exception):
    """Base of every error that `tidemill.tasks.training` raises on purpose."""


class SpecError(TrainingError, ValueError):
    """A setting of the spec that only torch or the data could show to be wrong."""


class FactoryError(TrainingError):
    """The model factory cannot be imported, fails, or does not return a model that can be trained and stored."""


class ColumnError(TrainingError):
    """A column that cannot be used: missing, of another type, wholly null, or holding NaN, infinity or a bad label."""


class ModelError(TrainingError):
    """The model, the loss or the optimizer raised when it was called with rows. The learner must be loaded again."""


class OutputShapeError(ModelError):
    """The output of the model or the loss does not have the shape that the task needs."""


class NonFiniteLoss(TrainingError):
    """The loss or a weight became NaN or infinite. The learner must be thrown away and loaded again."""


class StateMismatch(TrainingError):
    """Stored weights or training state do not fit the model or the optimizer of the spec."""


class ModelFails(TrainingError):
    """The model fails on whatever it is trained on: its code, or the machine, is at fault, and no shard is."""


# ---- errors that nobody raised on purpose ----------------------------------------------------------------------------
_MACHINE: Final = re.compile(
    r"\b(CUDA|CUBLAS|cuDNN|NCCL|HIP|MPS|XPU)\b.*\berror|out of memory|not enough memory|can't allocate memory|start new thread",
    re.IGNORECASE,
)


def of_the_machine(error: BaseException) -> bool:
    """Whether an error is of memory, of an accelerator or of the operating system, and so says nothing of the rows.

    torch raises RuntimeError for most of these. An OSError without a number is not the operating system's: Arrow raises it
    for bytes that it cannot decode.
    """
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return True
    return isinstance(error, RuntimeError) and _MACHINE.search(str(error)) is not None


def described(error: Exception) -> str:
    """An error in one line: a TrainingError's own words; of any other its class, its message and where it was raised."""
    if isinstance(error, TrainingError):
        return str(error)
    message = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f", in {frames[-1].name} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message[:MESSAGE]}{'...' if len(message) > MESSAGE else ''}{where}"

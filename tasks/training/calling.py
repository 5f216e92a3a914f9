"""Calls of the user's own code: what it may change of torch, and how its errors are told."""

import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tidemill.tasks.training.errors import ModelError, TrainingError, of_the_machine

FRAMES: Final = 2
"""Frames of the user's own files that an error is told with: where it was raised, and what called that."""
_NOT_THEIRS: Final = tuple(
    f"{folder.resolve()}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


_drawing: Final = threading.RLock()
"""Held by whoever uses torch's global random numbers, which belong to the whole process."""


@contextmanager
def random_numbers_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """torch's global random numbers are this thread's alone for a while, and go on as before after it.

    A model may be trained in one thread, with dropout, while another loads a version, whose network begins with random weights.

    Args:
        devices: CUDA devices whose random numbers are kept too.
    """
    with _drawing, torch.random.fork_rng(devices=devices):
        yield


def numbered(device: torch.device) -> list[int]:
    """The number of a CUDA device, as `random_numbers_kept` takes it: of one without, the current one's, which is that of this
    rank. Empty for other kinds."""
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]


def seed_random_numbers(device: torch.device, seed: int) -> None:
    """Seed torch's global random numbers on the CPU and on this device."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace each time: 0.2 ms
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def seed_all_random_numbers(seed: int) -> None:
    """As `torch.manual_seed`, which formats three stack traces where there is no accelerator: as long as a small net takes."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class _UsualTypes:
    """The default type as it was, while some threads need float32. It belongs to the whole process."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_default_dtype()
            self._inside += 1
            _set_default_type(torch.float32)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _set_default_type(self._before)


def _set_default_type(wanted: torch.dtype) -> None:
    if torch.get_default_dtype() is not wanted:  # asking takes a quarter of the time of setting
        torch.set_default_dtype(wanted)


_types: Final = _UsualTypes()


def usual_types() -> AbstractContextManager[None]:
    """float32 is the default type, whatever the user's modules have set; as it was before, once no thread is in here."""
    return _types


@contextmanager
def torch_as_usual() -> Iterator[None]:
    """Gradients on and float32 the default type, whatever the user's modules or the caller have set; then as it was before.

    An imported module may call `torch.set_grad_enabled(False)` or `torch.set_default_dtype(torch.float64)`, and a flow may be
    called inside of `torch.no_grad()`: the same spec must train the same model.
    """
    with torch.inference_mode(False), torch.enable_grad(), usual_types():
        yield


@contextmanager
def importing() -> Iterator[None]:
    """As `torch_as_usual`, and what an import has changed is put back: gradients, default type, threads."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        with torch_as_usual():
            yield
    finally:
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def told(what: str, *inputs: Tensor | None) -> Iterator[None]:
    """Tells an error of the user's code as one of ours. A TrainingError passes as it is, and so does one of the machine.

    Args:
        what: What is called in this context, in words.
        inputs: Tensors that it is called with.

    Raises:
        ModelError: in place of the error, with its frames in the user's files and the shapes of the inputs.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingError) or of_the_machine(error):
            raise
        raise model_error(what, error, *inputs) from error


def model_error(what: str, error: Exception, *inputs: Tensor | None) -> ModelError:
    """The error of the user's code in one line: what was raised, where in their files, and the shapes it was called with."""
    shapes = ", ".join(shape_of(tensor) for tensor in inputs if tensor is not None)
    where = "; ".join(frames_of(error))
    called = f", called with {shapes}" if shapes else ""
    return ModelError(f"{what} raised {type(error).__name__}: {first_line(error)} ({where or 'in torch'}{called})")


def frames_of(error: BaseException) -> list[str]:
    """The last frames that lie in the user's own files, innermost first: `net.py:12 in forward`."""
    theirs = [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and not os.path.realpath(frame.filename).startswith(_NOT_THEIRS)
    ]
    return theirs[: -FRAMES - 1 : -1]


def first_line(error: BaseException) -> str:
    """torch appends the stack of its C++ code."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def shape_of(tensor: Tensor) -> str:
    """As in `float32[64, 10]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

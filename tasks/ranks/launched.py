"""Whether this process is one of several that a launcher has started, such as torchrun: asked without torch.

A process is a rank only if it was entered as one: by `tidemill train`, by `tidemill follow`, or as a run of a work pool. A
script of the user's that torchrun starts, and that calls Tidemill in each of its processes, has as many runs of their own.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tidemill.tasks.errors import RanksRefused

Backend = Literal["torch", "horovod"]
"""Who starts ranks, and carries tensors among them: torchrun and `torch.distributed`, or horovodrun and Horovod."""

BACKENDS: Final[tuple[Backend, ...]] = ("torch", "horovod")
ENTERED: Final = "TIDEMILL_RANK"
"""Set in a process that was entered as a rank, and in what it executes in its place, to the backend."""
TIMEOUT: Final = "TIDEMILL_RANK_TIMEOUT_SECONDS"
"""The variable that says how long a rank waits for another one."""
TIMEOUT_SECONDS: Final = 60.0
"""A rank that has not answered for so long has gone."""
_LEAST_SECONDS: Final = 1.0
"""In less time ranks that are well would not answer each other."""
SHARED_STORE: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""The variable of torch's launcher that must be 1, or ranks that are started again never find each other."""
_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "torch": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "horovod": ("HOROVOD_RANK", "HOROVOD_SIZE"),
}
"""What the launcher of each backend sets; the first two are the rank and how many there are."""
_SET_PDEATHSIG: Final = 1  # of prctl(2)


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is."""

    rank: int
    """From 0, who is the leader."""
    size: int
    """How many there are; at least 2."""
    backend: Backend = "torch"

    @property
    def leads(self) -> bool:
        """Whether this is the leader, whose protocol is that of a single process."""
        return self.rank == 0


def place(variables: Mapping[str, str] = os.environ) -> Place | None:
    """Which rank this process was entered as; None: it was not, or it is alone."""
    return next((_said(variables, backend) for backend in BACKENDS if variables.get(ENTERED) == backend), None)


def enter(backend: Backend = "torch") -> Place | None:
    """Be the rank that the launcher's variables say, and end when the launcher does. None: no launcher started several.

    Raises:
        RanksRefused: another launcher than the backend's did; torch's would let ranks that are started again wait for each
            other in vain; or what a launcher says makes no sense.
    """
    found = _said(os.environ, backend)
    if backend == "horovod" and any(name not in os.environ for name in _VARIABLES[backend]):
        raise RanksRefused(
            "backend horovod: horovodrun has not started this process: let it do so (`horovodrun -np 2 python -m tidemill ...`), "
            "or leave --backend out"
        )
    if found is None:
        if backend == "torch" and _said(os.environ, "horovod") is not None:
            raise RanksRefused("horovodrun has started this process: give --backend horovod, or let torchrun start it")
        return None
    timeout_seconds()
    _refuse_shared_store(os.environ)
    os.environ[ENTERED] = backend
    end_with_parent()
    return found


def _said(variables: Mapping[str, str], backend: Backend) -> Place | None:
    names = _VARIABLES[backend]
    if any(name not in variables for name in names):
        return None
    try:
        found = Place(int(variables[names[0]]), int(variables[names[1]]), backend)
    except ValueError:
        found = Place(0, 0, backend)
    if not 0 <= found.rank < found.size:
        said = " and ".join(f"{name} is {variables[name]!r}" for name in names[:2])
        raise RanksRefused(f"{said}, which no launcher says: unset {names[0]}, or let a launcher start this command")
    return found if found.size > 1 else None


def _refuse_shared_store(variables: Mapping[str, str]) -> None:
    """torch 2.13 hands the store of its agents to the workers, and hands it to restarted ones with what the dead had written
    (https://github.com/pytorch/pytorch/issues/135712)."""
    shares = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(variables.get("TORCHELASTIC_MAX_RESTARTS", 0)) or int(variables.get("TORCHELASTIC_RESTART_COUNT", 0))
    if shares and restarts:
        raise RanksRefused(
            f"torchrun was started with --max-restarts, and without {SHARED_STORE}=1: ranks that it starts again would wait "
            f"for each other until they give up. Set {SHARED_STORE}=1 in the environment of torchrun"
        )


def timeout_seconds() -> float:
    """How long a rank waits for another one.

    Raises:
        RanksRefused: the variable holds no number of seconds.
    """
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given or TIMEOUT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not _LEAST_SECONDS <= seconds < float("inf"):
        raise RanksRefused(f"{TIMEOUT} is {given!r}: give a number of seconds, 1 or more")
    return seconds


def check_devices(device: str, found: int, variables: Mapping[str, str] = os.environ) -> None:
    """Make sure that each rank of this host has a CUDA device of its own, if they compute on such: NCCL takes no two on one.

    Where `CUDA_VISIBLE_DEVICES` shows this rank one device only, it may show each rank another one, as torchrun has it with
    --virtual-local-rank: then it is left to NCCL, which refuses what two ranks share.

    Args:
        device: The kind that they compute on.
        found: How many CUDA devices there are.
        variables: `LOCAL_WORLD_SIZE` is how many ranks of this host the launcher has started.

    Raises:
        RanksRefused: there are too few.
    """
    here = variables.get("LOCAL_WORLD_SIZE", "")
    own = found == 1 and bool(variables.get("CUDA_VISIBLE_DEVICES"))
    if device == "cuda" and not own and here.isdecimal() and int(here) > found:
        raise RanksRefused(
            f"{here} ranks of this host are to compute on CUDA devices, of which it has {found}, and NCCL wants one for each: "
            f"start {found} here, or give --device cpu"
        )


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when the one that started it ends, however that ends. On Linux only."""
    if sys.platform == "linux":
        import ctypes  # here, because light commands import this module

        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, int(number))

"""What the bits of a training run depend on besides its inputs: the code, the versions, the machine."""

import functools
import os
import platform
import subprocess
from importlib.metadata import version

import pyarrow as pa
import torch

from tidemill.tasks.training.batches import ORDER

VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR")  # each picks other kernels, so other roundings


def environment() -> dict[str, str | int]:
    """Versions, CPU capability, thread count and rule of shuffling: two runs with equal ones have equal bits."""
    found: dict[str, str | int] = {
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "order": ORDER,
    }
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def differences(before: dict[str, str | int], now: dict[str, str | int]) -> list[str]:
    """What differs, in words: `threads was 2, is now 1`. Empty if nothing does."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} was {before.get(name, 'not set')}, is now {now.get(name, 'not set')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


@functools.cache
def code_revision() -> str:
    """Tidemill's version, and the git revision of the working directory where there is one."""
    own = f"tidemill {version('tidemill')}"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return own
    return f"{own}, git {done.stdout.strip()}" if done.returncode == 0 else own

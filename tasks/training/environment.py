"""What the bits of a training run depend on besides its inputs: the code, the versions, the machine."""

import functools
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pyarrow as pa
import torch

from tidemill.tasks.training.batches import ORDER

VARIABLES: Final = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
"""Environment variables that each pick other kernels, and so other roundings."""


def environment() -> dict[str, str | int]:
    """Versions, CPU, thread count and rule of shuffling: two runs with equal ones have equal bits.

    Settings of torch and environment variables are named only where they are not the default.
    """
    found: dict[str, str | int] = {
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "order": ORDER,
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # then something is computed there
        found["accelerator"] = torch.cuda.get_device_name()
    if torch.are_deterministic_algorithms_enabled():
        found["deterministic_algorithms"] = "on"
    if not torch.backends.mkldnn.enabled:
        found["onednn"] = "off"
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        found["float32_matmul_precision"] = precision
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


@functools.cache
def _cpu() -> str:
    """Vendor, family and model, by which MKL and oneDNN choose their kernels; where Linux does not tell, what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "vendor_id" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['vendor_id']} family {fields.get('cpu family')} model {fields.get('model')}"


def differences(
    before: dict[str, str | int], now: dict[str, str | int], words: tuple[str, str] = ("was", "is now")
) -> list[str]:
    """What differs, in words: `threads was 2, is now 1`. Empty if nothing does."""
    first, second = words
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} {first} {before.get(name, 'not set')}, {second} {now.get(name, 'not set')}"
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

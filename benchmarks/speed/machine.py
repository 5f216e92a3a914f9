"""What the figures of a run were measured on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.processes import ROOT


def about() -> dict[str, Any]:
    """One line for the results. `load` is that of the last minute, before the run: on an idle machine near 0."""
    return {
        "suite": "machine",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyarrow", "numpy", "s3fs", "prefect")},
        "commit": _commit(),
    }


def _cpu() -> str:
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.machine()


def _commit() -> str:
    """Of this checkout; "+" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"

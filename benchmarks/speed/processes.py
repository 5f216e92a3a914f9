"""A measurement in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.speed.work import Work

ROOT: Final = Path(__file__).parents[2]


def measured_apart(suite: str, case: str, work: Work, timeout: float) -> dict[str, Any]:
    """What `child` prints; `error` if it fails or takes longer than `timeout` seconds."""
    about = json.dumps({"suite": suite, "case": case, "work": asdict(work)})
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed.child", about],
        cwd=ROOT,
        env=environment(work.threads) | {"TORCHINDUCTOR_CACHE_DIR": f"{work.scratch}/inductor"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        return {"error": f"gave up after {timeout:.0f} s"}
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            if "error" in result:
                sys.stderr.write(err)
            return result
    return {"error": f"exit code {process.returncode}: {err.strip()[-300:]}"}


def environment(threads: int) -> dict[str, str]:
    """Of a process that measures: as many threads for OpenMP as for torch."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits: the rest is noise."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in result.items()}


def _kill(process: "subprocess.Popen[str]") -> None:
    """The process that we started, and those that it started."""
    started = psutil.Process(process.pid)
    for one in [*started.children(recursive=True), started]:
        one.kill()
    process.communicate()

"""Measurements in a process of their own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.speed.work import Work

ROOT: Final = Path(__file__).parents[2]


def measured_apart(suite: str, case: str, work: Work, timeout: float) -> dict[str, Any]:
    """What `child` prints of one case; `error` if it fails or takes longer than `timeout` seconds."""
    result = measured_by_turns(suite, [case], 1, work, timeout)[-1]
    return {key: value for key, value in result.items() if key not in ("case", "repetition")}


def measured_by_turns(
    suite: str, cases: Sequence[str], rounds: int, work: Work, timeout: float
) -> list[dict[str, Any]]:
    """What `child` prints of cases that take turns in one process: a result for each round and case.

    The last one is an `error` if the process fails or takes longer than `timeout` seconds: of the case whose turn it was.
    """
    about = json.dumps({"suite": suite, "cases": cases, "rounds": rounds, "work": asdict(work)})
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
        problem = f"exit code {process.returncode}: {err.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        out, err = _killed(process)
        problem = f"gave up after {timeout:.0f} s"
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if any("error" in result for result in results):
        sys.stderr.write(err)
    if len(results) < rounds * len(cases):
        repetition, case = divmod(len(results), len(cases))
        results.append({"case": cases[case], "repetition": repetition, "error": problem})
    return results


def environment(threads: int) -> dict[str, str]:
    """Of a process that measures: as many threads for OpenMP as for torch."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits: the rest is noise."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in result.items()}


def _killed(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Kills the process that we started, and those that it started. What it had printed: output and errors."""
    started = psutil.Process(process.pid)
    for one in [*started.children(recursive=True), started]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
            one.kill()
    return process.communicate()

"""Runs cases side by side: each repetition in a process of its own, all cases of a round before the next round."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.speed.suites import Setup, Suite
from benchmarks.speed.work import Work

ROOT: Final = Path(__file__).parents[2]


def measurements(
    suite: Suite,
    setup: Setup,
    cases: Sequence[str],
    folder: Path,
    *,
    repetitions: int,
    seconds: float,
    timeout: float,
    window_bytes: int | None,
) -> Iterator[dict[str, Any]]:
    """One line for each case and repetition. A case that fails or is skipped is not tried again."""
    given_up: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="tidemill-bench-") as scratch:
        for repetition in range(repetitions):
            for case in cases:
                if case in given_up:
                    continue
                work = Work(str(folder), setup.batch, seconds, setup.threads, scratch, setup.net or "net", window_bytes)
                result = _in_a_process(suite.name, case, work, timeout)
                if "skipped" in result or "error" in result:
                    given_up.add(case)
                about = {"suite": suite.name, "case": case, "kind": suite.cases[case].kind}
                yield about | asdict(setup) | {"data": folder.name, "repetition": repetition} | rounded(result)


def rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits: more is noise."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in result.items()}


def environment(threads: int) -> dict[str, str]:
    """Of a process that measures: as many threads of OpenMP as of torch."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _in_a_process(suite: str, case: str, work: Work, timeout: float) -> dict[str, Any]:
    about = json.dumps({"suite": suite, "case": case, "work": asdict(work)})
    command = [sys.executable, "-m", "benchmarks.speed.child", about]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(work.threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        return {"error": f"timed out after {timeout:.0f} s"}
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            if "error" in result:
                sys.stderr.write(err)
            return result
    return {"error": f"exit code {process.returncode}: {err.strip()[-300:]}"}


def _kill(process: "subprocess.Popen[str]") -> None:
    """The process that we started and those that it did."""
    started = psutil.Process(process.pid)
    for one in [*started.children(recursive=True), started]:
        one.kill()
    process.communicate()

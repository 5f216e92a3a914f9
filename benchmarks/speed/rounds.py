"""Cases side by side: all of a round before the next round, so that a disturbance of the machine meets all alike."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.processes import measured_apart, rounded
from benchmarks.speed.suites import Setup, Suite
from benchmarks.speed.work import Work


def measurements(
    suite: Suite,
    setup: Setup,
    cases: Sequence[str],
    folder: Path,
    *,
    repetitions: int,
    seconds: float,
    timeout: float,
    shuffle_bytes: int | None,
    scratch: str,
) -> Iterator[dict[str, Any]]:
    """One line for each case and repetition. A case that fails or is skipped is not tried again."""
    given_up: set[str] = set()
    work = Work(str(folder), setup.batch, seconds, setup.threads, scratch, setup.net or "net", shuffle_bytes)
    for repetition in range(repetitions):
        for case in cases:
            if case in given_up:
                continue
            result = measured_apart(suite.name, case, work, timeout)
            if "skipped" in result or "error" in result:
                given_up.add(case)
            about = {"suite": suite.name, "case": case, "kind": suite.cases[case].kind, **asdict(setup)}
            yield about | {"data": folder.name, "repetition": repetition} | rounded(result)

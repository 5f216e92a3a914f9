"""Cases side by side: all of a round before the next round, so that a disturbance of the machine meets all alike.

Each measurement has a process of its own, or all of them share one. Two processes that do the same differed by 15% on a virtual
machine; what makes them differ is the same for all that take turns in one. But then memory and the time to start are nobody's,
and what a case leaves behind the next one finds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.speed.processes import measured_apart, measured_by_turns, rounded
from benchmarks.speed.suites import Setup, Suite
from benchmarks.speed.work import Work

OF_A_PROCESS: Final = ("startup_s", "first_step_s", "peak_mb")
"""Fields that are nobody's where cases share a process."""


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
    one_process: bool,
) -> Iterator[dict[str, Any]]:
    """One line for each case and repetition. A case that fails or is skipped is not tried again, unless in `one_process`."""
    given_up: set[str] = set()
    work = Work(str(folder), setup.batch, seconds, setup.threads, scratch, setup.net or "net", shuffle_bytes)
    if one_process:
        for result in measured_by_turns(suite.name, cases, repetitions, work, timeout * repetitions * len(cases)):
            about = {"suite": suite.name, "kind": suite.cases[result["case"]].kind, **asdict(setup)}
            shared = {name: result[name] for name in result if name not in OF_A_PROCESS}
            yield about | {"data": folder.name, "one_process": True} | rounded(shared)
        return
    for repetition in range(repetitions):
        for case in cases:
            if case in given_up:
                continue
            result = measured_apart(suite.name, case, work, timeout)
            if "skipped" in result or "error" in result:
                given_up.add(case)
            about = {"suite": suite.name, "case": case, "kind": suite.cases[case].kind, **asdict(setup)}
            yield about | {"data": folder.name, "repetition": repetition} | rounded(result)

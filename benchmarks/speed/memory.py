"""The suite `memory`: peak resident memory of a training pass, by the size of the dataset and by `shuffle_bytes`.

It must not grow with the data, and must be a base plus `shuffle_bytes`. The base is what a process has with torch and
Arrow imported, the Arrow tables of the row groups being read, and the slack of the allocators.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.speed import data
from benchmarks.speed.measure import peak_mb
from benchmarks.speed.processes import measured_apart, rounded
from benchmarks.speed.work import Work

BATCH: Final = 4096  # quick steps: the sooner memory is used, the sooner it is seen
TIMES: Final = (1, 4, 16)  # the dataset: 4, 16 and 64 million rows
SHUFFLE_MB: Final = (24, 96, 192, 384)
SHUFFLE_TIMES: Final = 4  # several of the largest windows


def measure(case: str, work: Work, began: float) -> dict[str, Any]:
    """One pass as a batch run takes it by default, with rows held out: the split costs memory too."""
    from benchmarks.speed.training.ours import begun
    from tidemill.tasks.settings import HOLDOUT
    from tidemill.tasks.training.groups import Split
    from tidemill.tasks.training.loop import train_pass
    from tidemill.tasks.training.steps import Steps

    learner, groups = begun(work, compile="off")
    split = Split(HOLDOUT, side="train")
    before = peak_mb()
    result = train_pass(Steps(learner), groups, key=("epoch", 0), split=split)
    assert 0.8 * work.rows < result.rows < work.rows, f"{result.rows} of {work.rows} rows"
    return {"before_mb": before, "peak_mb": peak_mb(), "seconds": time.perf_counter() - began}


def measurements(
    folder: Path, *, repetitions: int, timeout: float, scratch: str, small: bool
) -> Iterator[dict[str, Any]]:
    """One line for each size and setting and repetition; they take turns."""
    source = data.dataset("narrow", small=small)
    setups = [("rows", times, None) for times in TIMES]
    setups += [("shuffle", SHUFFLE_TIMES, megabytes) for megabytes in SHUFFLE_MB]
    if small:
        setups = [("rows", times, 1) for times in TIMES[:2]] + [("shuffle", 1, 1)]
    for repetition in range(repetitions):
        for by, times, megabytes in setups:
            place = data.repeated(source, times, folder)
            shuffle_bytes = None if megabytes is None else megabytes * 2**20
            work = Work(str(place), BATCH, 0, 1, scratch=scratch, shuffle_bytes=shuffle_bytes)
            about = {"suite": "memory", "by": by, "rows": times * source.rows, "shuffle_mb": megabytes}
            yield about | {"repetition": repetition} | rounded(measured_apart("memory", "tidemill", work, timeout))


def newest(lines: Iterable[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """The measurements of the newest run."""
    found = [line for line in lines if line["suite"] == "memory" and line["by"] == by and "peak_mb" in line]
    return [line for line in found if line["run"] == found[-1]["run"]]


def medians(lines: Iterable[dict[str, Any]], by: str) -> dict[int, float]:
    """Peak MB by number of rows (`rows`), or by MiB of `shuffle_bytes` (`shuffle`)."""
    found: dict[int, list[float]] = {}
    for line in newest(lines, by):
        found.setdefault(line["rows" if by == "rows" else "shuffle_mb"], []).append(line["peak_mb"])
    return {key: statistics.median(values) for key, values in sorted(found.items())}


def growth(peaks: dict[int, float]) -> float | None:
    """Largest peak to smallest."""
    return max(peaks.values()) / min(peaks.values()) if len(peaks) > 1 else None


def line_of(peaks: dict[int, float]) -> tuple[float, float, float] | None:
    """(base in MiB, MiB of memory for each MiB of `shuffle_bytes`, largest distance from that line in MiB), by least squares."""
    if len(peaks) < 2:
        return None
    slope, base = statistics.linear_regression(list(peaks), list(peaks.values()))
    return base, slope, max(abs(peak - base - slope * megabytes) for megabytes, peak in peaks.items())

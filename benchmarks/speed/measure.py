"""Clocks of a measurement, inside its process."""

import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil

CHECK_EVERY = 64  # batches between two looks at the clock


def cpu_seconds() -> float:
    """CPU time so far of this process and of those that it started, ended ones too: steadier than the clock on a busy machine."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def peak_mb() -> float:
    """High-water mark of the resident memory of this process, and of those that it started and that still run."""
    me = psutil.Process()
    return sum(_high_water_mb(process.pid) for process in [me, *me.children(recursive=True)])


def _high_water_mb(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def consumed(
    passes: Callable[[int], Iterator[Any]], seconds: float, began: float, step: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Take batches (x first) for about `seconds`, pass after pass, and give each to `step`.

    `startup_s` goes from `began` to the first batch, or to the end of the first step. The steady rate is that of whole passes
    after the first one, in which what is prepared ahead counts as much as what it is prepared for. A case that has not
    ended a pass within half of the time is measured from its first batch to the end of the time.
    """
    rows = steps = 0
    whole = False
    first_step = startup = cpu = 0.0
    since = time.perf_counter()
    for number in count():
        for batch in passes(number):
            if step is not None:
                if not steps:
                    at = time.perf_counter()
                step(*batch)
                if not steps:
                    first_step = time.perf_counter() - at
            steps += 1
            if steps == 1:
                since, cpu = time.perf_counter(), cpu_seconds()
                startup = since - began
                continue
            rows += len(batch[0])
            if not whole and not steps % CHECK_EVERY and time.perf_counter() - since > seconds:
                break
        now = time.perf_counter()
        if number == 0 and now - since < seconds / 2:
            whole, rows, since, cpu = True, 0, time.perf_counter(), cpu_seconds()
        elif now - since > seconds:
            break
    return {
        "startup_s": startup,
        **({} if step is None else {"first_step_s": first_step}),
        **rates(rows, time.perf_counter() - since, cpu_seconds() - cpu),
        "whole_passes": whole,
    }


def rates(rows: int, seconds: float, cpu: float) -> dict[str, Any]:
    """The fields of a rate, and the peak of memory by now."""
    return {
        "steady_rows_s": rows / seconds,
        "rows_per_cpu_s": rows / cpu if cpu > 0 else None,
        "rows": rows,
        "peak_mb": peak_mb(),
    }

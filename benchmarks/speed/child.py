"""Measurements in a process of their own: reads what to measure from its argument, prints a line of JSON for each.

Of several cases, each has its turn in every round. `processes` starts it; by hand:
python -m benchmarks.speed.child '{"suite": "loader", "cases": ["tidemill"], "rounds": 1, "work": {...}}'
"""

import json
import os
import sys
import time
import traceback
import warnings
from typing import Any


def measured(suite: str, case: str, work: dict[str, Any]) -> dict[str, Any]:
    """What the case measures. The time to import torch, which nearly all of them need, does not count."""
    import pyarrow as pa
    import torch

    from benchmarks.speed import memory, profile
    from benchmarks.speed.suites import SUITES
    from benchmarks.speed.work import Work

    torch.set_num_threads(work["threads"])
    pa.set_cpu_count(os.cpu_count() or 1)  # else as many threads decode as OMP_NUM_THREADS gives torch
    single = {"memory": memory.measure, "profile": profile.measure}
    measure = single[suite] if suite in single else SUITES[suite].measure
    return measure(case, Work(**work), time.perf_counter())


def main() -> None:
    warnings.filterwarnings("ignore")  # of the peers; Tidemill's own tests make errors of warnings
    about = json.loads(sys.argv[1])
    for repetition in range(about["rounds"]):
        for case in about["cases"]:
            try:
                result = measured(about["suite"], case, about["work"])
            except ImportError as error:
                result = {"skipped": f"{type(error).__name__}: {error}"}
            except Exception as error:  # noqa: BLE001  # a broken case is a result too, and the others go on
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps({"case": case, "repetition": repetition} | result), flush=True)


if __name__ == "__main__":
    main()

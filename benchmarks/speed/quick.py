"""That the benchmark runs, in under a minute: no figure of it means anything.

    make bench-quick

Each suite measures ours and its reference once, on small data, and every line must have the fields that the report reads. All of
it happens in this process, since starting others would take longer than measuring.
"""

import copy
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.speed import child, claims, data, machine, summary
from benchmarks.speed.suites import SUITES, Setup
from benchmarks.speed.training.limits import hand_written
from benchmarks.speed.training.nets import eager
from benchmarks.speed.work import Work

RATE: Final = ("startup_s", "steady_rows_s", "rows_per_cpu_s", "peak_mb", "rows")
FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "loader": RATE,
    "training": (*RATE, "first_step_s"),
    "memory": ("before_mb", "peak_mb"),
    "profile": ("samples",),
}
CASES: Final = {"loader": ("tidemill", "streaming"), "training": ("tidemill", "eager_in_memory")}
SETUPS: Final = {"loader": Setup("narrow", 64), "training": Setup("narrow", 64, net="net")}


def main() -> None:
    same_arithmetic()
    with tempfile.TemporaryDirectory(prefix="tidemill-bench-") as scratch:
        lines = [{"run": "quick", **line} for line in (machine.about(), *measurements(Path(scratch)))]
    for line in lines:
        print(json.dumps(line))
        for field in FIELDS.get(line["suite"], ()):
            assert math.isfinite(line[field]), f"{field} is {line[field]} in {line}"
    print(summary.text(lines), claims.text(lines), sep="\n\n")


def same_arithmetic() -> None:
    """The steps written by hand end at the weights of the eager ones."""
    x, y = torch.randn(64, 10), torch.randn(64)
    for build in (
        lambda: [nn.Linear(10, 1)],
        lambda: [nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 1)],
    ):
        by_hand = nn.Sequential(*build())
        by_autograd = copy.deepcopy(by_hand)
        for step in (hand_written(by_hand), eager(by_autograd)):
            for _ in range(10):
                step(x, y)
        torch.testing.assert_close(dict(by_hand.named_parameters()), dict(by_autograd.named_parameters()))


def measurements(folder: Path) -> Iterator[dict[str, Any]]:
    """One line for each suite and case."""
    place = data.made(data.dataset("narrow", small=True), folder)
    work = Work(str(place), 64, 0.2, 1, scratch=str(folder), shuffle_bytes=2 * 2**18)
    for suite, setup in SETUPS.items():
        for case in CASES[suite]:
            about = {
                "suite": suite,
                "case": case,
                "kind": SUITES[suite].cases[case].kind,
                **asdict(setup),
                "data": place.name,
                "repetition": 0,
            }
            yield about | child.measured(suite, case, asdict(work))
    about = {"suite": "memory", "by": "rows", "rows": work.rows, "shuffle_mb": None}
    yield about | child.measured("memory", "tidemill", asdict(work))
    yield {"suite": "profile", "case": "tidemill"} | child.measured("profile", "tidemill", asdict(work))


if __name__ == "__main__":
    main()

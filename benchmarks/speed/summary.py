"""Medians of measurements, and ratios to the reference of the same run."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.suites import SUITES, Setup

Line = dict[str, Any]
FIELDS = ("startup_s", "first_step_s", "steady_rows_s", "rows_per_cpu_s", "peak_mb")


@dataclass
class Table:
    """The cases of one setup, all measured in one run."""

    suite: str
    setup: Setup
    run: str
    lines: dict[str, list[Line]] = field(default_factory=dict)  # by case, in the order of measurement
    notes: dict[str, str] = field(default_factory=dict)  # by case, why there is no measurement

    def median(self, case: str, name: str = "steady_rows_s") -> float | None:
        """Of a field over the repetitions; None if it was not measured."""
        found = [line[name] for line in self.lines.get(case, []) if line.get(name) is not None]
        return statistics.median(found) if found else None

    def spread(self, case: str) -> tuple[float, float] | None:
        """Lowest and highest steady rate."""
        found = [line["steady_rows_s"] for line in self.lines.get(case, [])]
        return (min(found), max(found)) if found else None

    def cases(self, kind: str) -> list[str]:
        """Names of the measured cases of a kind."""
        return [case for case, lines in self.lines.items() if lines[0]["kind"] == kind]

    @property
    def reference(self) -> str | None:
        """The fastest of the suite's references, if it was measured."""
        rates = {case: self.median(case) for case in SUITES[self.suite].references}
        known = {case: rate for case, rate in rates.items() if rate is not None}
        return max(known, key=known.__getitem__) if known else None

    def ratio(self, case: str, to: str | None) -> float | None:
        """Of two medians of the steady rate."""
        above, below = self.median(case), None if to is None else self.median(to)
        return None if above is None or below is None else above / below


def tables(lines: Iterable[Line]) -> list[Table]:
    """The newest run of each setup."""
    newest: dict[tuple[str, Setup], Table] = {}
    for line in lines:
        if line["suite"] not in SUITES:
            continue
        setup = Setup(*(line[name] for name in Setup.__dataclass_fields__))
        found = newest.get((line["suite"], setup))
        if found is None or found.run != line["run"]:
            found = newest[line["suite"], setup] = Table(line["suite"], setup, line["run"])
        if note := line.get("skipped") or line.get("error"):
            found.notes[line["case"]] = note
        else:
            found.lines.setdefault(line["case"], []).append(line)
    return list(newest.values())


def text(lines: Iterable[Line]) -> str:
    """Medians as a table for the terminal."""
    text = []
    for found in tables(lines):
        text.append(f"\n{found.suite}: {' '.join(f'{k}={v}' for k, v in vars(found.setup).items() if v is not None)}")
        text.append(
            f"{'case':26}" + "".join(f"{name:>16}" for name in FIELDS) + f"{'of reference':>16}   lowest-highest"
        )
        for case in found.lines:
            values = (found.median(case, name) for name in FIELDS)
            ratio, spread = found.ratio(case, found.reference), found.spread(case)
            numbers = "".join(f"{'' if value is None else f'{value:,.6g}':>16}" for value in (*values, ratio))
            text.append(f"{case:26}{numbers}   " + ("" if spread is None else f"{spread[0]:,.0f}-{spread[1]:,.0f}"))
        text += [f"{case:26}{note}" for case, note in found.notes.items()]
    return "\n".join(text)

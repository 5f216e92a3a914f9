"""Medians of measurements, and ratios to the reference of the same round."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.suites import SUITES, Setup

Line = dict[str, Any]
FIELDS = ("startup_s", "first_step_s", "steady_rows_s", "rows_per_cpu_s", "peak_mb")


@dataclass
class Table:
    """The cases of one setup, measured in one or more runs. Ratios are always of two cases in the same run."""

    suite: str
    setup: Setup
    runs: dict[str, dict[str, list[Line]]] = field(
        default_factory=dict
    )  # by run, then by case, in the order of measurement
    notes: dict[str, str] = field(default_factory=dict)  # by case, why there is no measurement

    def cases(self, kind: str | None = None) -> list[str]:
        """Names of the measured cases, of a kind if one is given."""
        found = {case: lines[0]["kind"] for cases in self.runs.values() for case, lines in cases.items()}
        return [case for case in SUITES[self.suite].cases if case in found and kind in (None, found[case])]

    def lines(self, case: str, *beside: str) -> list[Line]:
        """The measurements of a case in the run that has most of it and of the cases beside it; the newest of equals."""
        able = [run for run, cases in self.runs.items() if {case, *beside} <= cases.keys()]
        if not able:
            return []
        best = max(able, key=lambda run: (min(len(self.runs[run][name]) for name in (case, *beside)), run))
        return self.runs[best][case]

    def median(self, case: str, name: str = "steady_rows_s", *beside: str) -> float | None:
        """Of a field over the repetitions; None if it was not measured."""
        found = [line[name] for line in self.lines(case, *beside) if line.get(name) is not None]
        return statistics.median(found) if found else None

    def spread(self, case: str) -> tuple[float, float] | None:
        """Lowest and highest steady rate."""
        found = [line["steady_rows_s"] for line in self.lines(case)]
        return (min(found), max(found)) if found else None

    def ratio(self, case: str, to: str | None = None) -> float | None:
        """Median over the rounds of the ratio of two steady rates; to the fastest reference of the suite unless to another.

        Of the same round, because the machine may be half as fast in the next.
        """
        if to is None:
            references = [name for name in SUITES[self.suite].references if self.lines(case, name)]
            ratios = [ratio for name in references if (ratio := self.ratio(case, name)) is not None]
            return min(ratios) if ratios else None
        above, below = self._rounds(case, to), self._rounds(to, case)
        both = above.keys() & below.keys()
        return statistics.median(above[number] / below[number] for number in both) if both else None

    def _rounds(self, case: str, beside: str) -> dict[int, float]:
        """The steady rate by round."""
        return {line["repetition"]: line["steady_rows_s"] for line in self.lines(case, beside)}

    def caveat(self, case: str, *beside: str) -> str:
        """What makes a figure of this case worth less than it seems; empty if nothing does."""
        lines = self.lines(case, *beside)
        found = [f"only {len(lines)} repetitions"] if len(lines) < 5 else []
        if any(line["data"].endswith("-small") for line in lines):
            found.append("small data: means nothing")
        return ", ".join(found)


def tables(lines: Iterable[Line]) -> list[Table]:
    """One for each setup, in the order of the suites."""
    found = {(suite.name, setup): Table(suite.name, setup) for suite in SUITES.values() for setup in suite.setups}
    for line in lines:
        if line["suite"] in SUITES:
            table = found[line["suite"], Setup(*(line[name] for name in Setup.__dataclass_fields__))]
            if note := line.get("skipped") or line.get("error"):
                table.notes[line["case"]] = note
            else:
                table.runs.setdefault(line["run"], {}).setdefault(line["case"], []).append(line)
                table.notes.pop(line["case"], None)
    return [table for table in found.values() if table.runs or table.notes]


def text(lines: Iterable[Line]) -> str:
    """Medians as a table for the terminal."""
    text = []
    for found in tables(lines):
        text.append(f"\n{found.suite}: {' '.join(f'{k}={v}' for k, v in vars(found.setup).items() if v is not None)}")
        text.append(
            f"{'case':26}" + "".join(f"{name:>16}" for name in FIELDS) + f"{'of reference':>16}   lowest-highest"
        )
        for case in found.cases():
            values = (found.median(case, name) for name in FIELDS)
            ratio, spread = found.ratio(case), found.spread(case)
            numbers = "".join(f"{'' if value is None else f'{value:,.6g}':>16}" for value in (*values, ratio))
            text.append(f"{case:26}{numbers}   " + ("" if spread is None else f"{spread[0]:,.0f}-{spread[1]:,.0f}"))
        text += [f"{case:26}{note}" for case, note in found.notes.items()]
    return "\n".join(text)

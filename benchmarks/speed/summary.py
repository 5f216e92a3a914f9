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
    """The cases of one setup, all of one run: figures of different hours do not belong side by side."""

    suite: str
    setup: Setup
    run: str  # when it began
    lines: dict[str, list[Line]] = field(default_factory=dict)  # by case, in the order of measurement
    notes: dict[str, str] = field(default_factory=dict)  # by case, why there is no measurement

    def cases(self, kind: str | None = None) -> list[str]:
        """Names of the measured cases, of a kind if one is given."""
        order = SUITES[self.suite].cases
        return [case for case in order if case in self.lines and kind in (None, order[case].kind)]

    def median(self, case: str, name: str = "steady_rows_s") -> float | None:
        """Of a field over the repetitions; None if it was not measured."""
        found = [line[name] for line in self.lines[case] if line.get(name) is not None]
        return statistics.median(found) if found else None

    def spread(self, case: str) -> tuple[float, float]:
        """Lowest and highest steady rate."""
        found = self._rounds(case).values()
        return min(found), max(found)

    def ratio(self, case: str, to: str | None = None) -> float | None:
        """Median over the rounds of the ratio of two steady rates; to the fastest reference of the suite unless to another.

        Of the same round, because the machine may be half as fast in the next.
        """
        if to is None:
            ratios = [self.ratio(case, name) for name in SUITES[self.suite].references]
            return None if None in ratios else min(filter(None, ratios))
        above, below = self._rounds(case), self._rounds(to)
        both = above.keys() & below.keys()
        return statistics.median(above[number] / below[number] for number in both) if both else None

    def _rounds(self, case: str) -> dict[int, float]:
        """The steady rate by round."""
        return {line["repetition"]: line["steady_rows_s"] for line in self.lines.get(case, ())}

    def rounds(self, case: str, to: str | None = None) -> int:
        """How many there are of what `ratio` compares."""
        compared = (case, *(SUITES[self.suite].references if to is None else (to,)))
        return min(len(self.lines.get(name, ())) for name in compared)

    @property
    def is_of_one_process(self) -> bool:
        """Whether the cases took turns in one process."""
        return any(line.get("one_process") for lines in self.lines.values() for line in lines)

    @property
    def is_small(self) -> bool:
        """Whether the data is that of a try."""
        return any(line["data"].endswith("-small") for lines in self.lines.values() for line in lines)


def runs(lines: Iterable[Line]) -> dict[tuple[str, Setup], list[Table]]:
    """All runs of each setup: that with the most cases first, then with the most repetitions, then the newest."""
    found: dict[tuple[str, Setup], dict[str, Table]] = {
        (suite.name, setup): {} for suite in SUITES.values() for setup in suite.setups
    }
    for line in lines:
        if line["suite"] in SUITES:
            setup = Setup(*(line[name] for name in Setup.__dataclass_fields__))
            table = found[line["suite"], setup].setdefault(line["run"], Table(line["suite"], setup, line["run"]))
            if note := line.get("skipped") or line.get("error"):
                table.notes[line["case"]] = note
            else:
                table.lines.setdefault(line["case"], []).append(line)

    def size(table: Table) -> tuple[int, int, str]:
        return len(table.lines), sum(map(len, table.lines.values())), table.run

    return {key: sorted(of.values(), key=size, reverse=True) for key, of in found.items() if of}


def tables(lines: Iterable[Line]) -> list[Table]:
    """The one run of each setup that is shown."""
    return [found[0] for found in runs(lines).values()]


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
            low, high = found.spread(case)
            numbers = "".join(f"{'' if v is None else f'{v:,.6g}':>16}" for v in (*values, found.ratio(case)))
            text.append(f"{case:26}{numbers}   {low:,.0f}-{high:,.0f}")
        text += [f"{case:26}{note}" for case, note in found.notes.items()]
    return "\n".join(text)

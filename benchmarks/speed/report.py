"""From results to docs/performance.md: the tables between its markers, and its pictures.

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is replaced; the prose around it stays. The raw results are put
beside the page.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.speed import claims, memory, profile
from benchmarks.speed.processes import ROOT
from benchmarks.speed.suites import SUITES, Setup
from benchmarks.speed.summary import Table, tables
from benchmarks.speed.work import NETS

Line = dict[str, Any]
WHICH: Final = ("suite", "of", "columns", "reads")  # fields of a script's summary that say of what it is
PAGE: Final = ROOT / "docs" / "performance.md"


def write(results: Path, page: Path = PAGE) -> None:
    """Fill the page and draw its pictures. Raises SystemExit if the page lacks a section."""
    from benchmarks.speed import plots  # needs matplotlib

    lines = [json.loads(text) for text in results.read_text().splitlines()]
    fill(lines, page)
    plots.draw(lines, page.parent)
    raw = page.with_suffix(".jsonl")
    if raw.resolve() != results.resolve():
        shutil.copy(results, raw)


def fill(lines: Sequence[Line], page: Path) -> None:
    """The sections of the page."""
    text = page.read_text()
    for name, section in SECTIONS.items():
        text = replaced(text, name, section(lines))
    page.write_text(text)


def replaced(text: str, name: str, content: str) -> str:
    """The page with other content in one section."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"the page has no section <!-- {name} --> ... <!-- end of {name} -->")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


# ---- sections --------------------------------------------------------------------------------------------------------
def claims_section(lines: Sequence[Line]) -> str:
    answers = {True: "yes", False: "**no**", None: "not measured"}
    return rendered(
        ["claim", "bound", "measured", "holds", ""],
        [
            [c.what, f"{'≥' if c.sign == '>=' else '≤'} {c.bound:g}", number(c.measured), answers[c.holds], c.note]
            for c in claims.claims(lines)
        ],
    )


def machine_section(lines: Sequence[Line]) -> str:
    """Every machine and run that the results are from."""
    found = [line for line in lines if line["suite"] == "machine"]
    machines = dict.fromkeys(
        f"- {line['cpu']}, {line['cores']} cores, {line['memory_gb']:g} GB; Python {line['python']}, "
        + ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        for line in found
    )
    suites: dict[str, dict[str, None]] = {}
    for line in lines:
        if line["suite"] != "machine":
            suites.setdefault(line["run"], {})[line["suite"]] = None
    rows = [
        [when(line["run"]), ", ".join(suites[line["run"]]), line["commit"], f"{line['load']:g}"]
        for line in found
        if line["run"] in suites
    ]
    return "\n".join(machines) + "\n\n" + rendered(["run", "suites", "commit", "load before"], rows)


def when(run: str) -> str:
    """A run is named by the time at which it began."""
    return run[:16].replace("T", " ")


def from_runs(lines: Sequence[Line]) -> str:
    """Says which runs the lines are of."""
    names = dict.fromkeys(when(line["run"]) for line in lines)
    return f"Of the run{'' if len(names) == 1 else 's'} {', '.join(names)}.\n\n" if names else ""


def side_by_side_section(suite: str) -> Callable[[Sequence[Line]], str]:
    """A table for each setup of a suite."""

    def section(lines: Sequence[Line]) -> str:
        return "\n\n".join(_case_table(table) for table in tables(lines) if table.suite == suite)

    return section


def _case_table(table: Table) -> str:
    rows = []
    for case in table.cases():
        lines, (low, high) = table.lines[case], table.spread(case)
        rows.append(
            [
                f"**{case}**" if case.startswith("tidemill") else case,
                SUITES[table.suite].cases[case].about,
                number(table.median(case)),
                f"{number(low)}–{number(high)}",
                number(table.ratio(case)),
                number(table.median(case, "rows_per_cpu_s")),
                number(table.median(case, "startup_s")),
                number(lines[0].get("first_step_s")),
                number(table.median(case, "first_step_s")),
                number(table.median(case, "peak_mb")),
                str(len(lines)),
            ]
        )
    once = ["once s, first", "once s"] if table.suite == "training" else []
    head = ["case", "", "rows/s", "lowest–highest", "to limit", "rows/CPU s", "start-up s", *once, "peak MB", "n"]
    if not once:
        rows = [[*row[:7], *row[9:]] for row in rows]
    text = f"### {title(table.setup)}\n\nOf the run {when(table.run)}.\n\n" + rendered(head, rows)
    for case, note in table.notes.items():
        text += f"\n\n{'Given up' if case in table.lines else 'Not measured'}: {case} ({note})."
    return text


def title(setup: Setup) -> str:
    """Of a table or a picture."""
    columns = {"narrow": "11 columns", "wide": "100 columns"}[setup.width]
    net = "" if setup.net is None else f"{NETS[setup.net]}, "
    text = f"{net}{columns}, batch {setup.batch}, {setup.threads} thread{'' if setup.threads == 1 else 's'}"
    return text[0].upper() + text[1:]


def memory_section(lines: Sequence[Line]) -> str:
    by_rows, by_setting = memory.medians(lines, "rows"), memory.medians(lines, "shuffle")
    text = from_runs(memory.newest(lines, "rows") + memory.newest(lines, "shuffle"))
    text += rendered(["rows", "peak MB"], [[f"{rows:,}", number(peak)] for rows, peak in by_rows.items()])
    text += "\n\n" + rendered(
        ["shuffle_bytes, MB", "peak MB"], [[f"{w}", number(peak)] for w, peak in by_setting.items()]
    )
    if (found := memory.line_of(by_setting)) is not None:
        base, slope, distance = found
        text += f"\n\nThe line through the second table: {base:.0f} MB + {slope:.2f} x shuffle_bytes; no point is further than "
        text += f"{distance:.1f} MB from it."
    return text


def startup_section(lines: Sequence[Line]) -> str:
    """Whole commands; then the lines of a run, a table for each kind of run, in which ways to run it are columns."""
    newest = {
        line["line"]["median of"]: line
        for line in lines
        if line["suite"] == "startup" and "median of" in line.get("line", {})
    }
    found = {name: line["line"] for name, line in newest.items()}
    text = from_runs([*newest.values()]) + rendered(
        ["command", "seconds", "CPU seconds", "of the heavy packages imports"],
        [
            [name, number(line["wall"]), number(line["cpu"]), ", ".join(line.get("imports", []))]
            for name, line in found.items()
            if "lines" not in line
        ],
    )
    for kind in ("train", "follow"):
        ways = {name: line["lines"] for name, line in found.items() if "lines" in line and name.startswith(kind)}
        order = dict.fromkeys(part for way in ways.values() for part in way if part != "exit")
        rows = [[part, *(_wall_and_cpu(way.get(part)) for way in ways.values())] for part in [*order, "exit"]]
        heads = [name.removeprefix(f"{kind}, ").removesuffix(", lines") for name in ways]
        if ways:
            text += f"\n\nLine by line, `{kind}`: seconds (CPU seconds)\n\n" + rendered(["line", *heads], rows)
    return text


def _wall_and_cpu(seconds: Sequence[float] | None) -> str:
    return "" if seconds is None else f"{number(seconds[0])} ({number(seconds[1])})"


def script_section(script: str) -> Callable[[Sequence[Line]], str]:
    """The summaries that a script prints, field by field."""

    def section(lines: Sequence[Line]) -> str:
        newest = {
            tuple(line["line"].get(name) for name in WHICH): line
            for line in lines
            if line["suite"] == script and line.get("line", {}).get("case") == "summary"
        }
        rows = [
            [", ".join(str(line[name]) for name in WHICH if name in line), field, _plain(value)]
            for line in (outer["line"] for outer in newest.values())
            for field, value in line.items()
            if field not in (*WHICH, "case")
        ]
        return from_runs([*newest.values()]) + rendered(["part", "field", "value"], rows)

    return section


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return number(value) if isinstance(value, float) else str(value)


def profile_section(lines: Sequence[Line]) -> str:
    rows = [
        [f"{line['net']}, batch {line['batch']}, {line['case']}", place, _shares(line[place])]
        for line in profile.newest(lines)
        for place in ("main", "background")
    ]
    return from_runs(profile.newest(lines)) + rendered(["training", "thread", "share of the time of one core"], rows)


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share >= 0.005)


SECTIONS: Final[dict[str, Callable[[Sequence[Line]], str]]] = {
    "claims": claims_section,
    "machine": machine_section,
    "loader": side_by_side_section("loader"),
    "training": side_by_side_section("training"),
    "memory": memory_section,
    "startup": startup_section,
    "s3": script_section("s3"),
    "online": script_section("online"),
    "profile": profile_section,
}


# ---- Markdown --------------------------------------------------------------------------------------------------------
def rendered(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a sentence if it has no rows."""
    if not rows:
        return "Not measured."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Three digits, thousands apart."""
    if value is None:
        return ""
    short = float(f"{value:.3g}")
    return f"{short:,.0f}" if abs(short) >= 100 else f"{short:g}"

"""Pictures of the results, as PNG beside the page. Colours: blue ours, grey limits, sand peers."""

from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Any, Final

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.speed import memory, profile
from benchmarks.speed.summary import Table, tables

Line = dict[str, Any]
COLOURS: Final = {"ours": "#1f77b4", "limit": "#9a9a9a", "peer": "#d9b26a"}


def draw(lines: Sequence[Line], folder: Path) -> None:
    """performance-NAME.png for each suite that was measured."""
    for suite in ("loader", "training"):
        if found := [table for table in tables(lines) if table.suite == suite and table.lines]:
            _save(_side_by_side(found), folder / f"performance-{suite}.png")
    if any(line["suite"] == "memory" for line in lines):
        _save(_memory(lines), folder / "performance-memory.png")
    if found := profile.newest(lines):
        _save(_profile(found), folder / "performance-profile.png")


def _side_by_side(found: list[Table]) -> Figure:
    """Steady rows/s of each case, lowest to highest as a whisker; a panel for each setup."""
    columns = 2
    rows = -(-len(found) // columns)
    height = max(len(table.cases()) for table in found)
    figure = Figure(figsize=(13, rows * (0.9 + 0.23 * height)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for table, axes in zip(found, panels, strict=False):
        cases = sorted(table.cases(), key=lambda case: table.median(case) or 0.0)
        medians = [table.median(case) or 0.0 for case in cases]
        spreads = [table.spread(case) for case in cases]
        errors = [
            [middle - low for middle, (low, _) in zip(medians, spreads, strict=True)],
            [high - middle for middle, (_, high) in zip(medians, spreads, strict=True)],
        ]
        colours = [COLOURS[table.lines[case][0]["kind"]] for case in cases]
        axes.barh(cases, medians, color=colours, xerr=errors, error_kw={"linewidth": 0.8})
        setup = table.setup
        net = "" if setup.net is None else f"{setup.net}, "
        axes.set_title(f"{net}{setup.width}, batch {setup.batch}, {setup.threads} thread(s)", fontsize="medium")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=10 ** int(log10(min(filter(None, medians)))))
        axes.set_xlabel("rows/s, steady")
        axes.tick_params(axis="y", labelsize="small")
        axes.grid(axis="x", linewidth=0.4)
    for axes in list(panels):
        axes.set_visible(False)
    return figure


def _memory(lines: Sequence[Line]) -> Figure:
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_rows, by_setting = memory.medians(lines, "rows"), memory.medians(lines, "shuffle")
    _points(left, {rows / 2**20: peak for rows, peak in by_rows.items()}, "million (2^20) rows")
    left.set_xscale("log", base=2)
    left.set_ylabel("peak MB")
    _points(right, by_setting, "shuffle_bytes, MB")
    if (found := memory.line_of(by_setting)) is not None:
        base, slope, _ = found
        ends = [0, max(by_setting)]
        right.plot(ends, [base + slope * end for end in ends], "--", color=COLOURS["limit"], linewidth=1)
        right.set_title(f"{base:.0f} MB + {slope:.2f} x shuffle_bytes", fontsize="medium")
    left.set_ylim(bottom=0)
    return figure


def _points(axes: Axes, values: dict[Any, float], label: str) -> None:
    axes.plot(list(values), list(values.values()), "o-" if label.endswith("rows") else "o", color=COLOURS["ours"])
    axes.set_xlabel(label)
    axes.grid(linewidth=0.4)


def _profile(found: Sequence[Line]) -> Figure:
    """Stacked shares, two bars for each training: the main thread, and the background as a share of one core."""
    bars: dict[str, dict[str, float]] = {}
    for line in found:
        for place in ("main", "background"):
            bars[f"{line['net']}, batch {line['batch']}, {line['case']}: {place}"] = line[place]
    stages = list(dict.fromkeys(name for shares in bars.values() for name in shares))
    figure = Figure(figsize=(11, 1 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    left = [0.0] * len(bars)
    for number, name in enumerate(stages):
        widths = [shares.get(name, 0.0) for shares in bars.values()]
        axes.barh(list(bars), widths, left=left, label=name, color=colours[number % len(colours)])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("share of the time of one core")
    axes.legend(fontsize="small", ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=110, metadata={"Software": None})

"""The charts of a history: what is drawn, and with which words."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final

from tidemill.tasks.history.drawing import Chart, Point, beyond, limits, short
from tidemill.tasks.history.points import POINTS, Mean, difference, means, trailing
from tidemill.tasks.history.reading import History, Made, Shard

TRAILING: Final = 7
"""A line shows the mean of so many points in a row, where there are at least ten times as many."""
NAMED_RULES: Final = 8
"""So many batch trainings and rollbacks are named in a chart; more of them are only drawn."""
_X_LABELS: Final = 6


@dataclass(frozen=True)
class Frozen:
    """The batch model, scored anew on the shards that came after it, as if it had never been trained on one."""

    scores: Mapping[int, float] = field(default_factory=dict)
    """By the number of the shard: 1 is the first of the history that was read."""
    notes: Sequence[str] = ()
    """What could not be scored, and why."""


NOT_SCORED: Final = Frozen()


@dataclass(frozen=True)
class Charts:
    """All charts of one history, over the same points."""

    history: History
    frozen: Frozen = NOT_SCORED
    most: int = POINTS
    """How many points a chart has at most."""

    @cached_property
    def points(self) -> list[Mean]:
        """The shards, each as one point, or several in a row as one."""
        return means(self.history, self.frozen.scores, self.most)

    @property
    def per_point(self) -> int:
        """How many shards one point stands for."""
        return len(self.points[0].shards) if self.points else 1

    @property
    def trailing(self) -> int:
        """How many points the lines average."""
        return TRAILING if len(self.points) >= 10 * TRAILING else 1

    @cached_property
    def other(self) -> tuple[str, Callable[[int, Shard], float | None]]:
        """Who the online error is compared with: the batch model if it was scored, else the champion."""
        if self.frozen.scores:
            return "frozen", lambda number, _: self.frozen.scores.get(number)
        metric = self.history.metric
        return "champion", lambda _, shard: shard.champion.get(metric)

    # ---- the charts --------------------------------------------------------------------------------------------------
    def prequential(self, size: tuple[int, int] = (1040, 300), *, hover: bool = True) -> tuple[Chart, int]:
        """The error on each shard before it was trained on. Returns (the chart, how many values lie beyond its edges)."""
        points, width = self.points, self.trailing
        online = trailing(points, [point.online for point in points], width)
        champion = trailing(points, [point.champion for point in points], width)
        frozen = trailing(points, [point.frozen for point in points], width)
        values = [value for point in points for value in (point.online, point.champion, point.frozen)]
        edges = limits(values)
        chart = self._chart(f"{self.history.metric} on each shard before it was trained on", edges, size)
        if self.per_point > 1:
            chart.between([(point.x, point.low) for point in points], [(point.x, point.high) for point in points])
        elif self.frozen.scores:
            chart.between(online, frozen)
        if width > 1:
            chart.dots(((point.x, point.online) for point in points), "a")
        self._rules(chart)
        for line, kind in ((frozen, "c"), (champion, "b"), (online, "a")):
            chart.line(line, kind)
        self._marks(chart)
        if hover:
            chart.hovers([(point.x, list(self._told(point))) for point in points])
        return chart, beyond(values, *edges)

    def difference(self, size: tuple[int, int] = (1040, 170)) -> Chart | None:
        """By how much the online error differs so far; None where nothing was compared."""
        name, other = self.other
        line = difference(self.points, self.history.metric, other)
        if all(y is None for _, y in line):
            return None
        chart = self._chart(f"difference to {name} so far, percent", limits((y for _, y in line), with_zero=True), size)
        chart.rows(4, " %")
        chart.zero()
        chart.line(line, "a")
        return chart

    def rows(self, size: tuple[int, int] = (1040, 150)) -> Chart:
        """Rows of each shard, or of several in a row."""
        bars = [(point.x, point.rows / len(point.shards)) for point in self.points]
        chart = self._chart("rows of each shard", (0.0, max((y for _, y in bars), default=1.0) * 1.05 or 1.0), size)
        chart.bars(bars, 0.7 * self.per_point)
        return chart

    def _chart(self, label: str, y: tuple[float, float], size: tuple[int, int]) -> Chart:
        count = len(self.history.shards)
        chart = Chart(label, (0.5, count + 0.5), y, size, (12, 14, 42 if size[1] >= 200 else 24, 60))
        if not label.endswith("percent"):
            chart.rows(5 if size[1] >= 200 else 3)
        chart.columns(self._moments())
        return chart

    def _moments(self) -> Iterator[tuple[float, str]]:
        """Words below the axis: which version, committed when."""
        step = max(1, math.ceil(len(self.points) / _X_LABELS))
        shown = self.points[step // 2 :: step] if len(self.points) > _X_LABELS else self.points
        versions = [point.shards[0][0] for point in shown]
        when = _moment_format([version.created for version in versions])
        for point, version in zip(shown, versions, strict=True):
            yield point.x, f"version {version.number:,}, {when(version.created)}"

    def _rules(self, chart: Chart) -> None:
        """A vertical line where a batch training or a rollback lies between shards."""
        found, consumed = list[tuple[float, str]](), 0
        for version in self.history.versions:
            if version.kind == "rollback":
                found.append((consumed + 0.5, f"back to {version.rolled_back_to}"))
            elif version.kind == "batch" and consumed:
                found.append((consumed + 0.5, f"batch {version.number}"))
            consumed += len(version.shards)
        for at, words in found:
            chart.rule(at, words if len(found) <= NAMED_RULES else "")

    def _marks(self, chart: Chart) -> None:
        decided = {"promoted": set[float](), "refused": set[float]()}
        rejected = set[float]()
        for point in self.points:
            for version in point.versions:
                if version.gate is not None:
                    decided[version.gate.decision].add(point.x)
                if version.rejected:
                    rejected.add(point.x)
        chart.marks(sorted(decided["promoted"]), "moved")
        chart.marks(sorted(decided["refused"]), "refused")
        chart.marks(sorted(rejected), "rejected", row=1, cross=True)

    def _told(self, point: Mean) -> Iterator[str]:
        """What a point says when one looks closer."""
        first, last = point.shards[0], point.shards[-1]
        one = first[0].number == last[0].number
        yield f"version {first[0].number:,}" if one else f"versions {first[0].number:,} to {last[0].number:,}"
        named = first[1].key if len(point.shards) == 1 else f"{len(point.shards):,} shards from {first[1].key}"
        yield f"{_shortened(named)}: {point.rows:,} rows"
        spread = ""
        if len(point.shards) > 1 and point.low is not None and point.high is not None:
            spread = f" ({short(point.low)} to {short(point.high)})"
        scores = (("online", point.online, spread), ("champion", point.champion, ""), ("frozen", point.frozen, ""))
        told = [f"{name} {short(value)}{more}" for name, value, more in scores if value is not None]
        yield f"{self.history.metric}: {', '.join(told) or 'none that is finite'}"
        yield from _decisions(point.versions)


def loss_by_epoch(metrics: Mapping[str, Any], size: tuple[int, int] = (360, 190)) -> Chart | None:
    """The loss while training, and on the holdout where the best epoch was chosen by it.

    Args:
        metrics: Those of a batch version.
        size: Width and height.

    Returns:
        The chart; None if there is no loss.
    """
    losses, holdout = _losses(metrics.get("epoch_loss")), _losses(metrics.get("epoch_holdout"))
    if not losses:
        return None
    chart = Chart(
        "loss by epoch", (1.0, float(max(2, len(losses)))), limits([*losses, *holdout]), size, (12, 12, 24, 60)
    )
    chart.rows(4)
    numbers = sorted({round(1 + i * (len(losses) - 1) / 5) for i in range(6)})
    chart.columns((number, f"{number}") for number in numbers)
    lines = [("a", list(enumerate(losses, start=1))), ("b", list(enumerate(holdout, start=1)))]
    for kind, line in lines:
        points: list[Point] = [(float(epoch), loss) for epoch, loss in line]
        chart.line(points, kind)
        if len(points) <= 60:
            chart.dots(points, kind, big=True)
    step = max(1, math.ceil(len(losses) / 100))
    chart.hovers([(float(i + 1), list(_told_of_epoch(i, losses, holdout))) for i in range(0, len(losses), step)])
    return chart


def _told_of_epoch(index: int, losses: Sequence[float], holdout: Sequence[float]) -> Iterator[str]:
    yield f"epoch {index + 1}: loss {short(losses[index], 5)}"
    if index < len(holdout):
        yield f"on the holdout {short(holdout[index], 5)}"


def _losses(stored: Any) -> list[float]:
    """Manifests hold any JSON there."""
    return [float(loss) for loss in stored or () if isinstance(loss, int | float)] if isinstance(stored, list) else []


def _decisions(versions: Sequence[Made]) -> Iterator[str]:
    promoted = [version for version in versions if version.gate is not None and version.gate.decision == "promoted"]
    refused = [version for version in versions if version.gate is not None and version.gate.decision == "refused"]
    rejected = [key for version in versions for key, _ in version.rejected]
    if promoted:
        yield f"champion moved to {_numbers(promoted)}"
    if refused:
        yield f"refused {_numbers(refused)}: {refused[-1].gate.numbers if refused[-1].gate else ''}"
    if rejected:
        yield f"rejected {len(rejected):,}: {_shortened(rejected[0])}{', ...' if len(rejected) > 1 else ''}"
    for version in versions:
        if version.kind != "online":
            back = f" to version {version.rolled_back_to}" if version.kind == "rollback" else ""
            yield f"version {version.number:,}: {version.kind}{back}"


def _numbers(versions: Sequence[Made]) -> str:
    shown = ", ".join(f"{version.number:,}" for version in versions[:3])
    return f"{shown} and {len(versions) - 3:,} more" if len(versions) > 3 else shown


def _shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def _moment_format(moments: Sequence[datetime]) -> Callable[[datetime], str]:
    """How to write moments so that those of this range differ, no longer than need be."""
    span = max(moments) - min(moments) if moments else timedelta()
    pattern = "%b %Y"
    for limit, finer in (
        (timedelta(days=300), "%d %b"),
        (timedelta(days=2), "%d %b %H:%M"),
        (timedelta(hours=20), "%H:%M"),
    ):
        if span < limit:
            pattern = finer
    pattern = "%H:%M:%S" if span < timedelta(minutes=5) else pattern
    return lambda moment: moment.astimezone(UTC).strftime(pattern)

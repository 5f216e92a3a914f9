"""Line charts as SVG, by hand: for the report's page, for notebooks, and as pictures inside of Markdown.

Nothing here knows what is drawn. Text is escaped; a picture has no script, no font and no link. Colours are named by class, and
the style sheet of whoever shows the picture says what they are, light and dark; `as_picture` brings its own.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tidemill.tasks.history.style import CHART, COLOURS

Point = tuple[float, float | None]
"""x and y in units of the data; None: there is no value here, and the line has a gap."""

STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
"""A tick's distance is one of these, times a power of ten."""

FEW: Final = 0.05
"""The largest share of values that an axis leaves out."""


@dataclass(frozen=True)
class Scale:
    """From values between `low` and `high` to places between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value; one outside of the limits is shown at the nearer end."""
        span = self.high - self.low or 1.0
        share = min(1.0, max(0.0, (value - self.low) / span))
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    if not (math.isfinite(raw) and raw > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in STEPS if step * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float, digits: int = 4) -> str:
    """A number of so many digits: `1,500`, `0.0123`, `2.5e+07`."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.{max(0, digits - 4)}f}"
    return f"{value:.{digits}g}"


def told_apart(values: Sequence[float]) -> list[str]:
    """Different numbers in as few digits as show that they differ, but at least four."""
    for digits in range(4, 16):
        words = [short(value, digits) for value in values]
        if len(set(words)) == len(set(values)):
            return words
    return [repr(value) for value in values]


def limits(values: Iterable[float | None], *, with_zero: bool = False) -> tuple[float, float]:
    """Where an axis begins and ends, so that a few extreme values do not press the others flat.

    A value counts as extreme if it lies more than three times the distance of the quartiles outside of them (Tukey's "far
    out" values), and if not more than a few do. It is drawn at the edge; `beyond` says how many there are.
    """
    finite = sorted(value for value in values if value is not None and math.isfinite(value))
    if not finite:
        return 0.0, 1.0
    quarter, three = finite[len(finite) // 4], finite[(3 * len(finite)) // 4]
    reach = 3 * (three - quarter) or math.inf  # of values that are nearly all the same, none is extreme
    near = [value for value in finite if quarter - reach <= value <= three + reach]
    if len(finite) - len(near) > FEW * len(finite):
        near = finite
    low, high = near[0], near[-1]
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    ends = (low - margin if low or not with_zero else low), (high + margin if high or not with_zero else high)
    return ends if ends[0] < ends[1] else (ends[0], ends[0] + margin)


def beyond(values: Iterable[float | None], low: float, high: float) -> int:
    """How many values lie outside of the limits of an axis."""
    return sum(value is not None and (value < low or value > high) for value in values)


def escaped(text: str) -> str:
    """Text as it may stand in HTML and in XML; what cannot be seen, or turns the direction of writing, as `\\x..`."""
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


class Chart:
    """One chart: axes first, then lines and marks, in the order in which they are painted."""

    def __init__(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        size: tuple[int, int] = (1040, 270),
        margins: tuple[int, int, int, int] = (12, 14, 26, 56),
    ) -> None:
        """An empty chart.

        Args:
            label: What it shows, for whoever cannot see it.
            x: The first and the last value of the axis.
            y: The lowest and the highest value of the axis.
            size: Width and height, in the picture's own units.
            margins: Above, to the right, below and to the left of the plot, in the same units.
        """
        self.label, self.size = label, size
        top, right, bottom, left = margins
        self.x = Scale(*x, left + 4, size[0] - right - 4)
        self.y = Scale(*y, size[1] - bottom, top)
        self._left, self._right = left, size[0] - right
        self._parts: list[str] = []

    # ---- axes --------------------------------------------------------------------------------------------------------
    def rows(self, count: int = 5, unit: str = "") -> None:
        """Horizontal lines with their values."""
        values = ticks(self.y.low, self.y.high, count)
        for value, words in zip(values, told_apart(values), strict=True):
            self._parts.append(f'<path class="grid" d="M{self._left},{_number(self.y(value))}H{self._right}"/>')
            self._text(self._left - 8, self.y(value) + 4, words + unit, "end")

    def columns(self, labels: Iterable[tuple[float, str]]) -> None:
        """Words below the axis, each at its value of x."""
        middle = (self._left + self._right) / 2
        for value, words in labels:
            at = self.x(value)
            near_the_end = abs(at - middle) > 0.9 * (self._right - middle)
            self._text(at, self.size[1] - 6, words, ("start" if at < middle else "end") if near_the_end else "middle")

    def zero(self) -> None:
        """A line at y = 0."""
        self._parts.append(f'<path class="zero" d="M{self._left},{_number(self.y(0))}H{self._right}"/>')

    def rule(self, at: float, words: str) -> None:
        """A vertical line at a value of x, with words at its top."""
        place = self.x(at)
        self._parts.append(f'<path class="rule" d="M{_number(place)},{_number(self.y.start)}V{_number(self.y.end)}"/>')
        left = place > (self._left + self._right) / 2
        self._text(place + (-4 if left else 4), self.y.end + 8, words, "end" if left else "start")

    # ---- what is shown -----------------------------------------------------------------------------------------------
    def line(self, points: Sequence[Point], kind: str) -> None:
        """A line through the points; where it breaks off for a single one, a dot."""
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in points:
            if y is None or not math.isfinite(y):
                pieces.append([])
            else:
                pieces[-1].append((self.x(x), self.y(y)))
        drawn = "".join(
            "M" + "L".join(f"{_number(x)},{_number(y)}" for x, y in piece) for piece in pieces if len(piece) > 1
        )
        alone = "".join(f"M{_number(piece[0][0])},{_number(piece[0][1])}h0" for piece in pieces if len(piece) == 1)
        if drawn:
            self._parts.append(f'<path class="{kind}" d="{drawn}"/>')
        if alone:
            self._parts.append(f'<path class="{kind} dots big" d="{alone}"/>')

    def dots(self, points: Iterable[Point], kind: str, *, big: bool = False) -> None:
        """A dot for each point."""
        drawn = "".join(
            f"M{_number(self.x(x))},{_number(self.y(y))}h0" for x, y in points if y is not None and math.isfinite(y)
        )
        if drawn:
            self._parts.append(f'<path class="{kind} dots{" big" if big else ""}" d="{drawn}"/>')

    def between(self, lower: Sequence[Point], upper: Sequence[Point]) -> None:
        """The area between two lines over the same values of x, where both have one."""
        pieces: list[list[tuple[float, float, float]]] = [[]]
        for (x, low), (_, high) in zip(lower, upper, strict=True):
            if low is None or high is None:
                pieces.append([])
            else:
                pieces[-1].append((self.x(x), self.y(low), self.y(high)))
        drawn = "".join(
            "M"
            + "L".join(
                f"{_number(x)},{_number(y)}"
                for x, y in [*((x, a) for x, a, _ in piece), *((x, b) for x, _, b in piece[::-1])]
            )
            + "Z"
            for piece in pieces
            if len(piece) > 1
        )
        if drawn:
            self._parts.append(f'<path class="fill" d="{drawn}"/>')

    def bars(self, points: Iterable[tuple[float, float]], width: float) -> None:
        """A bar for each point, from y = 0; its width in values of x."""
        across = max(0.6, width / (self.x.high - self.x.low or 1.0) * (self.x.end - self.x.start))
        base = _number(self.y(0))
        drawn = "".join(f"M{_number(self.x(x))},{base}V{_number(self.y(y))}" for x, y in points)
        if drawn:
            self._parts.append(f'<path class="bars" stroke-width="{_number(min(across, 40.0))}" d="{drawn}"/>')

    def marks(self, places: Iterable[float], kind: str, *, row: int = 0, cross: bool = False) -> None:
        """Below the axis, in a row of marks, at each of these values of x, a small triangle or a cross."""
        shape, at = "m-3,1l6,6m0,-6l-6,6" if cross else "l-4,8h8z", _number(self.y.start + 2 + 10 * row)
        drawn = "".join(f"M{_number(self.x(x))},{at}{shape}" for x in places)
        if drawn:
            self._parts.append(f'<path class="{kind}" d="{drawn}"/>')

    def hovers(self, points: Sequence[tuple[float, Sequence[str]]]) -> None:
        """Lines of words that appear over a whole column, each around its value of x."""
        top, height = _number(self.y.end), _number(self.y.start - self.y.end + 20)
        edges = [self.x(x) for x, _ in points]
        for i, (_, lines) in enumerate(points):
            words = "\n".join(map(escaped, lines))
            left = self._left if i == 0 else (edges[i - 1] + edges[i]) / 2
            right = self._right if i == len(points) - 1 else (edges[i] + edges[i + 1]) / 2
            self._parts.append(
                f'<rect class="hit" x="{_number(left)}" y="{top}" width="{_number(right - left)}" height="{height}">'
                f"<title>{words}</title></rect>"
            )

    def _text(self, x: float, y: float, words: str, anchor: str) -> None:
        end = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._parts.append(f'<text x="{_number(x)}" y="{_number(y)}"{end}>{escaped(words)}</text>')

    # ---- the whole ---------------------------------------------------------------------------------------------------
    def svg(self) -> str:
        """The element, to stand in a page that has the style sheet `CHART`."""
        return (
            f'<svg class="tm" viewBox="0 0 {self.size[0]} {self.size[1]}" role="img" aria-label="{escaped(self.label)}">'
            f"{''.join(self._parts)}</svg>"
        )


def as_picture(chart: Chart) -> str:
    """A chart as a `data:` URI, to stand where no style sheet reaches: on a ground of its own, in the light colours."""
    width, height = chart.size
    ground = f'<style>svg{{{COLOURS}}}{CHART}</style><rect width="{width}" height="{height}" fill="#fff"/>'
    head, _, rest = chart.svg().partition(">")
    whole = f'{head} xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{ground}{rest}'
    return f"data:image/svg+xml;base64,{base64.b64encode(whole.encode()).decode()}"


def _number(value: float) -> str:
    """A place, to a tenth of the picture's unit."""
    return f"{value:.1f}".removesuffix(".0")

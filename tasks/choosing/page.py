"""The pages of a comparison and of a backtest, and their tables, which a terminal shows too."""

from collections.abc import Iterable, Iterator, Sequence

from tidemill.tasks.choosing.results import Backtest, Compared, Comparison, Stretch, signed
from tidemill.tasks.history.drawing import Chart, beyond, escaped, limits, short
from tidemill.tasks.history.page import cards, framed
from tidemill.tasks.history.style import PAGE

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""(header, rows)."""


class ShownComparison(Comparison):
    """A comparison that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return framed_comparison(self)


class ShownBacktest(Backtest):
    """A backtest that a notebook shows as a chart and a table."""

    def _repr_html_(self) -> str:
        return framed_backtest(self)


# ---- tables ----------------------------------------------------------------------------------------------------------
def comparison_table(result: Comparison) -> Table:
    """One row a spec, the best first, and the baseline."""
    told = [*result.specs, *([] if result.baseline is None else [result.baseline])]
    others = list(dict.fromkeys(name for row in told for name in row.scores if name != result.measure))
    names = [result.measure, *others]
    header = ("SPEC", *(name.upper() for name in names), "DIFFERENCE", "EPOCHS", "STEPS", "ROWS", "WEIGHTS", "VERSION")
    return header, [_compared(row, names) for row in told]


def _compared(row: Compared, names: Sequence[str]) -> list[str]:
    if row.failed is not None:
        return [row.name, *("-" for _ in names), "failed", *("-" for _ in range(5))]
    scores = [short(row.scores[name], 5) if name in row.scores else "-" for name in names]
    trained = ["-"] * 5
    if row.version is not None:
        trained = [f"{count:,}" for count in (row.epochs, row.steps, row.rows, row.weights)]
        trained.append(f"{row.model} {row.version}")
    return [row.name, *scores, _difference(row), *trained]


def _difference(row: Compared) -> str:
    if row.difference is None:
        return "best"
    error = "" if row.standard_error is None else f" ± {short(row.standard_error, 2)}"
    return f"{signed(row.difference, 3)}{error}"


def backtest_table(result: Backtest) -> Table:
    """One row a stretch, and the total."""
    header = ("VERSIONS", "SHARDS", "ROWS", f"{result.metric.upper()} SPEC", "LEARNER", "CHAMPION", "DIFFERENCE")
    rows = [[f"{stretch.first} to {stretch.last}", *_scored(stretch)] for stretch in result.stretches]
    return header, [*rows, ["total", *_scored(result.total)]]


def _scored(stretch: Stretch) -> list[str]:
    scores = ["-" if score is None else short(score, 5) for score in (stretch.spec, stretch.learner, stretch.champion)]
    ratio = "-"
    if stretch.spec is not None and stretch.learner:
        ratio = f"{(stretch.spec / stretch.learner - 1) * 100:+.2f} %"
    return [f"{stretch.shards:,}", f"{stretch.rows:,}", *scores, ratio]


# ---- a comparison ----------------------------------------------------------------------------------------------------
def compared(result: Comparison) -> str:
    """The page of a comparison."""
    return _page(f"{len(result.specs)} specs compared", framed_comparison(result))


def framed_comparison(result: Comparison) -> str:
    """The same, to stand in a notebook."""
    return framed(_of_comparison(result))


def _of_comparison(result: Comparison) -> Iterator[str]:
    yield f"<h1>Compared<small>{escaped(result.dataset)}</small></h1>"
    best = result.best
    facts = [
        (short(best.scores[result.measure], 5), f"{result.measure} of {best.name}", "the lowest"),
        (f"{result.held_out:,}", "held-out rows", "that no spec was trained on"),
    ]
    if result.baseline is not None:
        facts.append(
            (short(result.baseline.scores[result.measure], 5), f"{result.measure} of the baseline", "no column")
        )
    yield cards(facts)
    yield from map(_paragraph, result.verdict)
    yield f"<h2>Specs</h2>{_html(comparison_table(result))}"
    yield _paragraph("Difference: to the best, on the same rows, with its standard error.")
    for row in result.specs:
        if row.failed is not None:
            yield _paragraph(f"{row.name} failed: {row.failed}")


# ---- a backtest ------------------------------------------------------------------------------------------------------
def backtested(result: Backtest, points: Sequence[Stretch]) -> str:
    """The page of a backtest; `points` are the stretches of its chart."""
    return _page(f"{result.model}: backtest", framed_backtest(result, points))


def framed_backtest(result: Backtest, points: Sequence[Stretch] = ()) -> str:
    """The same, to stand in a notebook; without `points`, the chart has those of the table."""
    return framed(_of_backtest(result, points or result.stretches))


def _of_backtest(result: Backtest, points: Sequence[Stretch]) -> Iterator[str]:
    words = f"backtest up to version {result.head:,} in {result.registry}"
    yield f"<h1>{escaped(result.model)}<small>{escaped(words)}</small></h1>"
    scores = (("the other spec", result.total.spec), ("the learner of the log", result.total.learner))
    facts = [
        (short(score, 5), f"{result.metric} of {name}", "before training")
        for name, score in scores
        if score is not None
    ]
    yield cards([*facts, (f"{result.total.shards:,}", "shards", f"{result.total.rows:,} rows")])
    yield from map(_paragraph, [*result.verdict, *result.notes])
    if points:
        yield f"<h2>{escaped(result.metric)} on each shard before it was trained on</h2>"
        yield from _charts(result, points)
    yield f"<h2>By stretch of the stream</h2>{_html(backtest_table(result))}"


def _charts(result: Backtest, points: Sequence[Stretch]) -> Iterator[str]:
    values = [value for point in points for value in (point.spec, point.learner, point.champion)]
    edges, count = limits(values), result.total.shards
    far = beyond(values, *edges)
    better = "lower" if result.lower_is_better else "higher"
    each = (
        f"; each point is the mean of about {max(1, round(count / len(points)))} shards" if count > len(points) else ""
    )
    out = f"; {far:,} values lie beyond the edges, and are drawn there" if far else ""
    yield _paragraph(f"{better} is better{each}{out}.")
    champion = (
        '<span><u class="c"></u>champion of the time</span>' if any(p.champion is not None for p in points) else ""
    )
    yield f'<div class="legend"><span><u></u>the other spec</span><span><u class="b"></u>the log</span>{champion}</div>'
    chart = Chart(f"{result.metric} by shard", (0.5, count + 0.5), edges, (1040, 300), (12, 14, 26, 60))
    chart.rows()
    step = max(1, len(points) // 6)
    chart.columns((point.middle, f"version {point.first:,}") for point in points[step // 2 :: step])
    chart.line([(point.middle, point.champion) for point in points], "c")
    chart.line([(point.middle, point.learner) for point in points], "b")
    chart.line([(point.middle, point.spec) for point in points], "a")
    chart.hovers([(point.middle, list(_told(result, point))) for point in points])
    yield chart.svg()


def _told(result: Backtest, point: Stretch) -> Iterator[str]:
    yield f"version {point.first:,}" if point.first == point.last else f"versions {point.first:,} to {point.last:,}"
    yield f"{point.shards:,} shards, {point.rows:,} rows" if point.shards > 1 else f"{point.rows:,} rows"
    scores = (("the other spec", point.spec), ("the log", point.learner), ("champion", point.champion))
    yield f"{result.metric}: {', '.join(f'{name} {short(score)}' for name, score in scores if score is not None)}"


# ---- HTML ------------------------------------------------------------------------------------------------------------
def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{PAGE}</style>{body}</html>\n"
    )


def _paragraph(text: str) -> str:
    return f"<p>{escaped(text)}</p>"


def _html(table: Table) -> str:
    header, rows = table

    def cells(tag: str, row: Iterable[str]) -> str:
        number = ' class="n"'
        return "".join(f"<{tag}{number if i else ''}>{escaped(cell)}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", [name.lower() for name in header])}</tr>{body}</table></div>'

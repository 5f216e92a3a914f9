"""A model's history as Markdown with pictures inside, and as rows of a table: what Prefect keeps as artifacts."""

from collections.abc import Iterator
from typing import Any, Final

from tidemill.tasks.history.charts import Charts, loss_by_epoch
from tidemill.tasks.history.drawing import as_picture, short
from tidemill.tasks.history.reading import History, Made
from tidemill.tasks.scores import Means

POINTS: Final = 120
"""How many points a picture has: nobody can look closer."""
ROWS: Final = 50
"""How many of the newest shards and rejections the table has."""
_LONGEST: Final = 300


def summary(history: History, backlog: str | None) -> str:
    """What happened to a model lately.

    Args:
        history: What its manifests tell.
        backlog: What waits, in words; None: nobody has looked.
    """
    head = history.head
    aliases = "".join(f", `{name}` is version {number:,}" for name, number in history.aliases.items())
    lines = [
        f"# {_plain(history.model)}: version {head.version:,}",
        "",
        f"{head.kind}{aliases}. Registry `{_code(history.registry)}`.",
    ]
    if backlog is not None:
        lines += ["", f"**Waiting**: {_plain(backlog)}"]
    drawn = Charts(history, most=POINTS)
    if drawn.points:
        lines += ["", *_scores(drawn)]
    if history.batch is not None and (loss := loss_by_epoch(history.batch.metrics, (480, 210))) is not None:
        lines += [
            "",
            f"## Loss by epoch, version {history.batch.version:,}",
            "",
            f"![loss by epoch]({as_picture(loss)})",
        ]
    lines += ["", "## Last versions", "", *_versions(history)]
    if history.rejected:
        lines += [
            "",
            f"## Rejected shards: {len(history.rejected):,} in the last {len(history.versions):,} versions",
            "",
        ]
        lines += [
            f"- version {v.number:,}: `{_code(key)}`: {_plain(reason)}" for v, key, reason in history.rejected[:-6:-1]
        ]
    return "\n".join(lines) + "\n"


def _scores(drawn: Charts) -> Iterator[str]:
    metric = drawn.history.metric
    chart, far = drawn.prequential((960, 300), hover=False)
    several = f", {drawn.per_point} shards a point" if drawn.per_point > 1 else ""
    yield f"## {_plain(metric)} on each shard before it was trained on{several}"
    yield ""
    yield f"![{_plain(metric)}]({as_picture(chart)})"
    yield ""
    yield "Green: online. Orange: the champion of the time. ▲: it moved (green), or a version was refused (red). ✕: rejected."
    if far:
        yield f"{far:,} values lie beyond the edges of the chart, and are drawn there."


def _versions(history: History) -> Iterator[str]:
    metric = history.metric
    yield f"| version | kind | shards | rows | {_plain(metric)} | champion | gate |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | --- |"
    for version in history.versions[:-11:-1]:
        online, champion = Means(), Means()
        for shard in version.shards:
            online.add(shard.score, shard.rows)
            champion.add(shard.champion, shard.rows)
        scores = [short(means.mean[metric]) if metric in means.mean else "" for means in (online, champion)]
        decided = "" if version.gate is None else version.gate.decision
        yield (
            f"| {version.number:,} | {version.kind} | {len(version.shards):,} | {version.rows:,} | {scores[0]} | {scores[1]} | "
            f"{decided} |"
        )


def rows(history: History) -> list[dict[str, Any]]:
    """The last shards and rejections, newest first, as rows of a table."""
    found: list[dict[str, Any]] = []
    for version in reversed(history.versions):
        found += [_row(version, key, rejected=_code(reason)) for key, reason in reversed(version.rejected)]
        found += [
            _row(
                version,
                shard.key,
                rows=shard.rows,
                online=_rounded(shard.score.get(history.metric)),
                champion=_rounded(shard.champion.get(history.metric)),
            )
            for shard in reversed(version.shards)
        ]
        if len(found) >= ROWS:
            break
    return found[:ROWS]


def _row(version: Made, key: str, **facts: Any) -> dict[str, Any]:
    """Every row has the same columns."""
    blank = {"rows": None, "online": None, "champion": None, "rejected": None}
    return {"version": version.number, "shard": _code(key), **blank, **facts}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML."""
    shown = "".join(f"\\{c}" if c in r"\`*_{}[]()#+-!|<>~&" else c for c in _visible(text))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _code(text: str) -> str:
    """Text that may stand between backticks, and in a table, where `[words](address)` would be a link."""
    shown = _visible(text).replace("`", "'").replace("|", "¦").replace("](", "] (")
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

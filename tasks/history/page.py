"""The report: a model's history as one page of HTML that needs nothing else. No script, no font, no request."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from tidemill.storage.manifest import Manifest
from tidemill.tasks.history.charts import NOT_SCORED, Charts, Frozen, loss_by_epoch
from tidemill.tasks.history.drawing import Chart, escaped, short
from tidemill.tasks.history.reading import History, Made, gates
from tidemill.tasks.history.style import BLOCK, PAGE
from tidemill.tasks.scores import Means

VERSIONS: Final = 20
"""How many of the newest versions the table has."""
REJECTED: Final = 30
"""How many of the newest rejected shards are named, each with its reason."""
FEATURES: Final = 30
"""How many features are named."""
_LONGEST: Final = 400
"""Characters of a key, a reason or a setting that are shown."""


# ---- the whole -------------------------------------------------------------------------------------------------------
def page(history: History, frozen: Frozen = NOT_SCORED, refresh_seconds: int | None = None) -> str:
    """A whole page about a model.

    Args:
        history: What its manifests tell.
        frozen: The batch model, scored anew on the shards that came after it.
        refresh_seconds: The page asks for itself again after so many seconds; None: never.
    """
    title = escaped(f"{history.model}: version {history.head.version}")
    again = "" if refresh_seconds is None else f'<meta http-equiv="refresh" content="{refresh_seconds}">'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">{again}<title>{title}</title>'
        f"<style>{PAGE}</style>{framed(_sections(history, frozen))}</html>\n"
    )


def charts(history: History) -> str:
    """The charts of a model, to stand in a notebook."""
    drawn = Charts(history)
    return framed([_head(history), _cards(history), *_prequential(drawn), *_loss(history)])


def framed(sections: Iterable[str]) -> str:
    """Sections in an element of their own, with the style sheet that they need."""
    body = "\n".join(sections)
    return f'<div class="tidemill"><style>{BLOCK}</style>\n{body}\n</div>'


def _sections(history: History, frozen: Frozen) -> Iterator[str]:
    drawn = Charts(history, frozen)
    yield _head(history)
    yield _cards(history)
    yield from _prequential(drawn)
    yield '<div class="two"><div>'
    yield from _loss(history)
    yield "</div><div>"
    yield _made_of(history)
    yield "</div></div>"
    yield _versions(drawn)
    yield _rejected(history)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    read = f"{len(history.versions):,} of {history.head.version + 1:,} versions"
    yield f"<p><br>Made at {made} UTC from the manifests of {read}. All times are UTC.</p>"


# ---- the top ---------------------------------------------------------------------------------------------------------
def _head(history: History) -> str:
    words = f"version {history.head.version:,} in {history.registry}"
    return f"<h1>{escaped(history.model)}<small>{escaped(words)}</small></h1>"


def _cards(history: History) -> str:
    return cards(_facts(history))


def cards(facts: Iterable[tuple[str, str, str]]) -> str:
    """(number, what it counts, a note) of each card, side by side."""
    return f'<div class="cards">{"".join(_card(*fact) for fact in facts)}</div>'


def _card(number: str, what: str, note: str) -> str:
    return f'<div class="card"><b>{escaped(number)}</b><span>{escaped(what)}</span><i>{escaped(note)}</i></div>'


def _facts(history: History) -> Iterator[tuple[str, str, str]]:
    """(number, what it counts, a note) of each card."""
    head, metric = history.head, history.metric
    aliases = ", ".join(f"{name} is version {number:,}" for name, number in history.aliases.items())
    yield f"{head.version:,}", "head version", f"{head.kind}, {_when(head.created)}; {aliases or 'no alias'}"
    since = head.metrics.get("cumulative") if isinstance(head.metrics.get("cumulative"), dict) else None
    rows = int(since["rows"]) if since else 0
    trained = f"{rows:,} rows since the last batch training" if since else "none since the last batch training"
    yield f"{int(since['shards']) if since else 0:,}", "shards trained on", trained
    yield from _scores(history, metric, since)
    decided = list(gates(history))
    if decided:
        moved = sum(gate.decision == "promoted" for _, gate in decided)
        row = decided[-1][1].refusals
        refused = f"{len(decided) - moved:,} refused" + (f", the last {row} in a row" if row > 1 else "")
        yield f"{moved:,}", "moves of the champion", refused
    yield f"{len(history.rejected):,}", "shards rejected", "into quarantine" if history.rejected else ""


def _scores(history: History, metric: str, since: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    """What the model scores: online, against the champion on the same rows, and on held-out rows of the batch training."""
    means = Means.model_validate(since["score"]) if since else Means()
    if metric in means.mean:
        yield short(means.mean[metric]), f"{metric} online", "each shard scored before it was trained on"
        champion = Means.model_validate(since["champion"] if since else {})
        if (theirs := champion.mean.get(metric, 0.0)) > 0 and champion.rows.get(metric) == means.rows[metric]:
            yield f"{means.mean[metric] / theirs - 1:+.1%}", "against the champion", "on the same rows, so far"
    served = history.head.metrics.get("served")
    if isinstance(served, dict) and isinstance(score := served.get(metric), int | float):
        yield short(score), f"{metric} of the answers", "that were given, on the head's shards"
    batch = history.batch
    holdout = batch.metrics.get("holdout") if batch is not None else None
    if batch is not None and isinstance(holdout, dict) and isinstance(score := holdout.get(metric), int | float):
        rows = batch.metrics.get("holdout_rows", 0)
        yield short(score), f"{metric} of the batch model", f"on {rows:,} held-out rows{_beside(batch, metric)}"


def _beside(batch: Manifest, metric: str) -> str:
    """What a model that always says the same scores there, and the version that this one replaced, if the manifest has that."""
    told = ""
    baseline = batch.metrics.get("baseline")
    if isinstance(score := baseline.get(metric) if isinstance(baseline, dict) else None, int | float):
        told += f"; baseline {short(score)}"
    replaced = batch.metrics.get("replaced")
    if isinstance(replaced, dict) and isinstance(number := replaced.get("version"), int):
        scores = replaced.get("score")
        if isinstance(score := scores.get(metric) if isinstance(scores, dict) else None, int | float):
            told += f"; version {number:,}, which it replaced: {short(score)}"
        else:
            told += f"; not compared with version {number:,}, which it replaced: {_cut(str(replaced.get('reason')))}"
    return told


# ---- charts ----------------------------------------------------------------------------------------------------------
def _prequential(drawn: Charts) -> Iterator[str]:
    metric = drawn.history.metric
    yield "<h2>Error on each shard before it was trained on</h2>"
    if not drawn.points:
        yield "<p>No shard has been trained on in these versions.</p>"
        return
    chart, far = drawn.prequential()
    yield f"<p>{escaped(' '.join(_explained(drawn, far)))}</p>"
    yield _legend(drawn) + chart.svg()
    if (gain := drawn.difference()) is not None:
        yield f"<h2>Difference to {_other(drawn)} so far</h2>"
        yield f"<p>Below zero the online model is better: {escaped(metric)} over the rows of all shards up to there.</p>"
        yield gain.svg()
    several = f", the mean of {drawn.per_point} in a row" if drawn.per_point > 1 else ""
    yield f"<h2>Rows of each shard{several}</h2>{drawn.rows().svg()}"


def _explained(drawn: Charts, far: int) -> Iterator[str]:
    """How the chart of errors is to be read."""
    unit = _unit(drawn.history)
    yield f"{drawn.history.metric}{unit}; lower is better."
    if drawn.per_point > 1:
        yield (
            f"Each point is the mean of {drawn.per_point} shards in a row, weighted by rows; the pale band reaches from the "
            "lowest to the highest of them."
        )
    if drawn.trailing > 1:
        yield f"The lines show the mean of {drawn.trailing} points up to there, the dots each single one."
    if far:
        yield f"{far:,} values lie beyond the edges of the chart, and are drawn there."
    if drawn.per_point == 1 and drawn.frozen.scores:
        yield "The coloured area is the difference between online and frozen."
    yield from drawn.frozen.notes


def _unit(history: History) -> str:
    target = history.spec.get("target")
    names = [target] if isinstance(target, str) else target if isinstance(target, list) else []
    return f" of {', '.join(map(str, names))}, in its unit" if names and history.metric in ("mae", "rmse") else ""


def _other(drawn: Charts) -> str:
    return "the frozen model" if drawn.other[0] == "frozen" else "the champion of the time"


def _legend(drawn: Charts) -> str:
    said = ["<span><u></u>online</span>"]
    if any(point.champion is not None for point in drawn.points):
        said.append('<span><u class="b"></u>champion of the time</span>')
    if drawn.frozen.scores:
        said.append('<span><u class="c"></u>frozen, as the batch training left it</span>')
    decisions = {gate.decision for _, gate in gates(drawn.history)}
    if "promoted" in decisions:
        said.append("<span><em>▲</em>champion moved</span>")
    if "refused" in decisions:
        said.append('<span><em class="r">▲</em>version refused</span>')
    if drawn.history.rejected:
        said.append('<span><em class="r">✕</em>shard rejected</span>')
    return f'<div class="legend">{"".join(said)}</div>'


def _loss(history: History) -> Iterator[str]:
    if history.batch is None:
        yield "<h2>Loss by epoch</h2><p>The batch training lies before these versions.</p>"
        return
    chart: Chart | None = loss_by_epoch(history.batch.metrics)
    both = "; orange: on the holdout" if history.batch.metrics.get("epoch_holdout") else ""
    best = history.batch.metrics.get("best_epoch")
    chosen = f", of which epoch {int(best)} was registered" if isinstance(best, int) else ""
    told = f"Batch training, version {history.batch.version}{chosen}{both}."
    yield f"<h2>Loss by epoch</h2><p>{escaped(told)}</p>{'' if chart is None else chart.svg()}"


# ---- tables ----------------------------------------------------------------------------------------------------------
def _made_of(history: History) -> str:
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(_cut(value))}</dd>" for name, value in _parts(history))
    return f"<h2>What it is made of</h2><dl>{listed}</dl>"


def _parts(history: History) -> Iterator[tuple[str, str]]:
    """Spec, data, code and environment, each in words."""
    spec, head = history.spec, history.head
    for name, value in spec.items():
        if value is None or value in ([], {}, ()):
            continue
        if name == "features" and isinstance(value, list):
            yield name, _named([_feature(column) for column in value])
        else:
            yield name.replace("_", " "), value if isinstance(value, str) else _flat(value)
    batch = history.batch or (head if head.dataset is not None else None)
    if batch is not None and (data := batch.dataset) is not None:
        yield "dataset", f"{data.url}: {data.files:,} files, {data.rows:,} rows, fingerprint {data.fingerprint[:12]}"
        if data.told is not None:
            yield "chosen rows", data.told
    if head.new_columns:
        yield "new columns", ", ".join(f"{name} ({kind})" for name, kind in head.new_columns.items())
    yield "counted", ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in head.counters.items())
    yield "code", head.code or "unknown"
    yield "environment", ", ".join(f"{name} {value}" for name, value in head.environment.items())
    yield "weights", f"{head.blobs.weights.bytes:,} bytes, sha256 {head.blobs.weights.sha256}"


def _feature(column: Any) -> str:
    if not isinstance(column, dict):
        return str(column)
    kind = column.get("kind", "number")
    return str(column.get("name")) if kind == "number" else f"{column.get('name')} ({kind})"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEATURES:,} more" if len(names) > FEATURES else ""
    return ", ".join(names[:FEATURES]) + more


def _flat(value: Any) -> str:
    """`{"name": "adam", "arguments": {}}` as `name adam`; what is no object as JSON."""
    if isinstance(value, dict):
        there = {name: part for name, part in value.items() if part not in (None, {}, [])}
        return ", ".join(
            f"{name} {part if isinstance(part, str) else json.dumps(part)}" for name, part in there.items()
        )
    return json.dumps(value)


def _versions(drawn: Charts) -> str:
    history, metric = drawn.history, drawn.history.metric
    before = len(history.shards)
    rows = []
    for version in reversed(history.versions[-VERSIONS:]):
        before -= len(version.shards)
        rows.append(_version(history, version, drawn.frozen, before))
    frozen = '<th class="n">frozen</th>' if drawn.frozen.scores else ""
    head = (
        '<th class="n">version</th><th>created</th><th>kind</th><th class="n">shards</th><th class="n">rows</th>'
        f'<th class="n">{escaped(metric)} online</th><th class="n">champion</th>{frozen}<th>gate</th><th>sha256</th>'
    )
    return f'<h2>Last versions</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _version(history: History, version: Made, frozen: Frozen, before: int) -> str:
    """One row. `before`: how many shards of the history come before it."""
    metric = history.metric
    online, champion, again = Means(), Means(), Means()
    for number, shard in enumerate(version.shards, start=before + 1):
        online.add(shard.score, shard.rows)
        champion.add(shard.champion, shard.rows)
        again.add({metric: frozen.scores[number]} if number in frozen.scores else {}, shard.rows)
    scored = [online, champion, *([again] if frozen.scores else [])]
    cells = [
        f'<td class="n">{version.number:,}</td><td class="t">{_when(version.created)}</td><td class="t">{_kind(version)}</td>',
        f'<td class="n">{len(version.shards):,}</td><td class="n">{version.rows:,}</td>',
        *(f'<td class="n">{short(means.mean[metric]) if metric in means.mean else ""}</td>' for means in scored),
        f'<td>{_tags(history, version)}</td><td class="mono">{version.sha256[:12]}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _kind(version: Made) -> str:
    return f"rollback to {version.rolled_back_to}" if version.kind == "rollback" else escaped(version.kind)


def _tags(history: History, version: Made) -> str:
    names = [name for name, number in history.aliases.items() if number == version.number]
    tags = [f'<span class="tag">{escaped(name)}</span>' for name in names]
    if version.gate is not None:
        refused = version.gate.decision == "refused"
        tags.append(f'<span class="tag{" refused" if refused else ""}">{escaped(version.gate.decision)}</span>')
    return " ".join(tags)


def _rejected(history: History) -> str:
    if not history.rejected:
        return "<h2>Rejected shards</h2><p>None.</p>"
    last = history.rejected[::-1][:REJECTED]
    listed = "".join(
        f'<tr><td class="n">{version.number:,}</td><td>{escaped(_cut(key))}</td><td>{escaped(_cut(reason))}</td></tr>'
        for version, key, reason in last
    )
    more = f"<p>The last {REJECTED} of {len(history.rejected):,}.</p>" if len(history.rejected) > REJECTED else ""
    head = '<th class="n">version</th><th>shard</th><th>reason</th>'
    return f'<h2>Rejected shards</h2>{more}<div class="wide"><table><tr>{head}</tr>{listed}</table></div>'


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _when(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")

"""What a notebook shows: of a history its charts, of the end of a run its numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from tidemill.storage.log import open_log
from tidemill.tasks.history.charts import loss_by_epoch
from tidemill.tasks.history.drawing import short
from tidemill.tasks.history.page import cards, charts, framed
from tidemill.tasks.history.reading import LAST, History, HistoryReader


class ShownHistory(History):
    """A history that a notebook shows as charts."""

    def _repr_html_(self) -> str:
        return charts(self)


def history(registry: str, model: str, last: int = LAST) -> ShownHistory:
    """The history of a model, from its manifests alone. In a notebook it shows itself as charts.

    Args:
        registry: URL below which models live.
        model: Name of the model.
        last: How many of the newest versions to read.

    Raises:
        ValueError: `last` is less than 1.
        UnknownModel: the registry holds no such model.
        CorruptObject: a manifest was altered, or is missing.
    """
    if last < 1:
        raise ValueError(f"last is {last}: ask for one version or more")
    found = HistoryReader(open_log(registry, model, writable=False), last).read()
    return ShownHistory(**{field.name: getattr(found, field.name) for field in fields(found)})


def batch_end(model: str, version: int, trained: bool, metrics: Mapping[str, Any]) -> str:
    """The end of a batch training: the version, its scores, and the loss by epoch."""
    made = "trained" if trained else "made before, from the same data, spec and code"
    facts = [(f"{version:,}", f"version of {model}", made), *_scores(metrics.get("holdout"), "on held-out rows")]
    chart = loss_by_epoch(metrics)
    drawn = "" if chart is None else f'<div class="two"><div><h2>Loss by epoch</h2>{chart.svg()}</div></div>'
    return framed([cards(facts), drawn])


def online_end(
    model: str, head: int, counted: Mapping[str, int], score: Mapping[str, float], champion: Mapping[str, float]
) -> str:
    """The end of an online run: the head, what was counted, and the scores beside the champion's on the same rows."""
    facts = [(f"{head:,}", f"head of {model}", "")]
    facts += [(f"{number:,}", name, "") for name, number in counted.items()]
    facts += _scores(score, "online, before training on each shard")
    facts += _scores(champion, "of the champion, on the same shards")
    return framed([cards(facts)])


def _scores(scores: Any, what: str) -> Iterator[tuple[str, str, str]]:
    for name, value in scores.items() if isinstance(scores, Mapping) else ():
        if isinstance(value, int | float):
            yield short(value), name, what

"""From raw results to the table, the lines of JSON and the plots."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.protocol import METRICS

NAMES = {"mae": "MAE", "rmse": "RMSE", "error": "error rate", "log_loss": "log loss"}
FORGETTING = {"probe_before": "A before B", "probe_after": "A after B", "at_return": "first shard back in A"}
Result = dict[str, Any]


def flat(results: list[Result]) -> Iterator[Result]:
    """One line for each stream, learner, seed and metric, to 6 digits; `by_shard` is a list."""
    for result in results:
        for metric, value in result["metrics"].items():
            about = {key: result[key] for key in ("stream", "learner", "seed")}
            yield (
                about
                | {"metric": metric, "value": _rounded(value), "seconds": result["seconds"]}
                | {"params": {"rate": result["rate"], "epochs": result["epochs"]}}
            )


def _rounded(value: float | list[float]) -> float | list[float]:
    return [float(f"{v:.6g}") for v in value] if isinstance(value, list) else float(f"{value:.6g}")


def markdown(results: list[Result], seeds: int) -> str:
    """Mean over seeds with the lowest and highest; then what was forgotten; then what was chosen."""
    learners = _unique(results, "learner")
    head = [*("stream", "metric"), *learners]
    table = []
    for stream in _unique(results, "stream"):
        table += [
            [stream, NAMES[metric], *(_cell(_values(results, stream, name, metric)) for name in learners)]
            for metric in _metrics(results, stream)
        ]
    text = f"Mean over {seeds} seeds (lowest to highest); without brackets one seed.\n\n" + _rendered(head, table)
    if any("probe_after" in result["metrics"] for result in results):
        rows = []
        for stream in _unique(results, "stream"):
            for metric, label in FORGETTING.items():
                cells = [_cell(_values(results, stream, name, metric)) for name in learners]
                if any(cells):
                    rows.append([stream, f"{NAMES[_metrics(results, stream)[-1]]}, {label}", *cells])
        text += "\n\nWhat is forgotten of concept A, on held-out rows and on the first shards of its return:\n\n"
        text += _rendered(head, rows)
    rows = []
    for stream in _unique(results, "stream"):
        settings = [_chosen(results, stream, name) for name in learners]
        rows.append([stream, "rate, epochs", *settings])
    return text + "\n\nChosen on the batch part:\n\n" + _rendered(head, rows) + "\n"


def _rendered(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unique(results: list[Result], key: str) -> list[str]:
    return list(dict.fromkeys(result[key] for result in results))


def _metrics(results: list[Result], stream: str) -> tuple[str, ...]:
    found = next(result["metrics"] for result in results if result["stream"] == stream)
    return next(names for names in METRICS.values() if names[0] in found)


def _values(results: list[Result], stream: str, learner: str, metric: str) -> list[Any]:
    found = [r["metrics"] for r in results if (r["stream"], r["learner"]) == (stream, learner)]
    return [metrics[metric] for metrics in found if metric in metrics]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g}–{max(values):.4g})"


def _chosen(results: list[Result], stream: str, learner: str) -> str:
    found = [r for r in results if (r["stream"], r["learner"]) == (stream, learner)]
    return f"{found[0]['rate']:g}, {found[0]['epochs']}" if found and found[0]["rate"] else ""


def plot(results: list[Result], out: Path) -> None:
    """The error by shard, mean over seeds and over a window of 3 shards, one picture for each stream."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    for stream in _unique(results, "stream"):
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        axes = figure.subplots()
        for learner in ("frozen", "online", "replay", "linear online", "river"):
            found = _values(results, stream, learner, "by_shard")
            shards = min(map(len, found), default=0)  # the seed may draw another number of full shards
            if shards > 2:
                mean = np.mean([errors[:shards] for errors in found], axis=0)
                axes.plot(
                    np.arange(2, shards), np.convolve(mean, np.ones(3) / 3, "valid"), label=learner, linewidth=1.2
                )
        axes.set(title=stream, xlabel="shard", ylabel="prequential error, 3 shards")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", ncols=5)
        figure.savefig(out.with_name(f"{out.stem}-{stream}.png"), dpi=110, metadata={"Software": None})

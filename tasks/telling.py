"""What a batch run says of a version: what was decided for it, how it is beside others, which alias it takes. In words."""

from collections.abc import Sequence
from typing import Any, Final

from tidemill.storage.chain import Version
from tidemill.storage.errors import on_one_line
from tidemill.storage.records import WarmStart
from tidemill.tasks.training.classes import Label, named
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import LABELS, resolved_of

NAMED: Final = 10
"""Columns that a sentence names."""
SETTLED: Final = 0.01
"""A loss that fell by more than this share in the last epoch has not settled."""
SAME: Final = 0.0005
"""Scores that differ by less than this share are the same, in words."""


def unlabelled_rows(features: Features) -> int:
    """Rows of the training side that are not trained on, since a target is null."""
    seen = features.statistics
    return 0 if seen is None or seen.labelled is None else seen.rows - seen.labelled


# ---- what was decided ------------------------------------------------------------------------------------------------
def chosen(version: Version) -> list[str]:
    """Which rows a batch version was trained on, if not on all; what its spec had left open, and what was decided."""
    manifest = version.manifest
    rows = None if manifest.dataset is None else manifest.dataset.told
    asked, spec = Spec.model_validate(manifest.spec), resolved_of(version)
    labels = (manifest.resolved_spec or {}).get(LABELS)
    found = decided(asked, spec, labels, manifest.unused_columns, int(manifest.metrics.get("unlabelled_rows", 0)))
    start = [] if manifest.init_from is None else [began(manifest.init_from)]
    return [*([] if rows is None else [on_one_line(rows)]), *found, *start]


def began(start: WarmStart) -> str:
    """What the learner began with."""
    version = "" if start.version is None else f"version {start.version} of "
    parts = [f"began with weights of {version}{start.url}: {_some(start.taken)}"]
    if start.missing:
        parts.append(f"new: {_some(start.missing)}")
    if start.left_over:
        parts.append(f"left over: {_some(start.left_over)}")
    parts.append(f"columns are scaled by {'its' if start.kept_statistics else 'new'} statistics")
    return on_one_line("; ".join(parts))


def decided(
    asked: Spec, spec: Spec, labels: Sequence[Label] | None, unused: dict[str, str], unlabelled: int
) -> list[str]:
    """The same, of its parts: the spec as it was asked for and as it was resolved; `unlabelled` rows are not trained on."""
    found = []
    names = [column.name for column in spec.features]
    if names != [column.name for column in asked.features]:
        found.append(f"features: {len(names)} {'column' if len(names) == 1 else 'columns'}, {_some(names)}")
    if unused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in unused.items():
            by_reason.setdefault(reason, []).append(name)
        found.append("not used: " + "; ".join(f"{_some(names)} ({reason})" for reason, names in by_reason.items()))
    target = ", ".join(map(repr, spec.targets))
    if asked.stated_task is None:
        classes = "" if spec.task != "multiclass" or labels else f" of {spec.classes} classes"
        found.append(f"task: {spec.task}{classes}, as target {target} tells (--task decides otherwise)")
    if labels:
        found.append(f"{len(labels)} labels of {target}, numbered from 0 in this order: {named(labels)}")
    if unlabelled:
        found.append(f"{unlabelled:,} rows are not trained on: target {target} is null in them")
    return [on_one_line(told) for told in found]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


# ---- how it is beside others -----------------------------------------------------------------------------------------
def notes(version: Version, alias: str) -> list[str]:
    """The score of a batch version beside others, whether it has settled, and from where the alias moves to it."""
    metrics, spec = version.manifest.metrics, resolved_of(version)
    own, found = metrics.get("holdout") or {}, []
    if own and (other := metrics.get("baseline")):
        name = "the mean of the target" if spec.task == "regression" else "the base rates of the labels"
        found.append(f"{name} alone: {_numbers(other)}; this version: {_compared(own, other, spec.main_metric)}")
    if (told := unsettled(metrics)) is not None:
        found.append(told)
    found.append(_moved(metrics, version.number, alias, spec.main_metric))
    return [on_one_line(told) for told in found]


def _moved(metrics: dict[str, Any], number: int, alias: str, metric: str) -> str:
    replaced = metrics.get("replaced")
    if replaced is None or replaced.get("alias") != alias or replaced["version"] == number:
        return f"alias {alias} names version {number}"
    told = f"alias {alias} moves from version {replaced['version']} to version {number}"
    if "score" not in replaced:
        return f"{told}; the two were not compared: {replaced.get('reason')}"
    scores = _numbers(replaced["score"])
    how = _compared(metrics.get("holdout") or {}, replaced["score"], metric)
    return f"{told}: {scores} before, on the same rows; this version: {how}"


def _compared(own: dict[str, float], other: dict[str, float], metric: str) -> str:
    """How a score is beside another one, by the metric that decides."""
    if metric not in own or metric not in other:
        return f"no {metric} to compare"
    if other[metric] <= 0:  # of a target that is always the same; or of a loss that may be negative: no share of it
        difference = own[metric] - other[metric]
        return (
            f"{metric} {abs(difference):.4g} {'worse' if difference > 0 else 'better'}"
            if difference
            else f"the same {metric}"
        )
    change = own[metric] / other[metric] - 1
    if abs(change) < SAME:
        return f"the same {metric}"
    return f"{metric} {abs(change):.1%} {'worse' if change > 0 else 'better'}"


def _numbers(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def unsettled(metrics: dict[str, Any]) -> str | None:
    """What says that more epochs would help, by the metrics of a batch version; None: nothing does."""
    if (search := metrics.get("search")) is not None:  # held-out rows have decided, not the loss of the last epoch
        if search["best_epochs"] < search["epochs"][-1]:
            return None
        return f"the search ended at its limit, {search['best_epochs']} epochs, with its best score: more may help (--epochs)"
    if (fell := still_fell(metrics.get("epoch_loss", ()), metrics.get("best_epoch"))) is None:
        return None
    return f"the loss still fell by {fell:.1%} in the last epoch: more epochs would help (--epochs)"


def still_fell(losses: Sequence[float], best_epoch: int | None = None) -> float | None:
    """The share by which the loss fell in the last epoch; None if it has settled, or if an earlier epoch was the best."""
    if len(losses) < 2 or (best_epoch or len(losses)) < len(losses) or losses[-2] <= 0:
        return None
    fell = 1 - losses[-1] / losses[-2]
    return fell if fell > SETTLED else None

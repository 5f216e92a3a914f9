"""Several specs, trained on the same rows and scored on the same held-out ones.

Each is an ordinary batch training into a registry of its own: killed and started again, it goes on after its last checkpoint,
and one that is done is found. What is told at the end is scored anew, from what is stored.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from torch import Tensor

from tidemill.progress import each
from tidemill.storage.dataset import Snapshot, snapshot
from tidemill.storage.log import VersionLog
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.batch import PLAIN, train_by
from tidemill.tasks.beside import Rows
from tidemill.tasks.choosing.names import kept_as, own_modules
from tidemill.tasks.choosing.page import ShownComparison, compared
from tidemill.tasks.choosing.paired import Measure, RowErrors, difference
from tidemill.tasks.choosing.results import COMPARED_IN, Compared, Comparison
from tidemill.tasks.settings import HOLDOUT, BatchSettings, Device, RowSettings
from tidemill.tasks.snapshots import run_snapshot
from tidemill.tasks.training.baseline import baseline
from tidemill.tasks.training.errors import SpecError, TrainingError, described
from tidemill.tasks.training.fitting import fit
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_frozen

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("tidemill.compare")

PAGE: Final = "compare.html"
"""The report, below the registry of the comparison."""


@dataclass(frozen=True)
class _Trained:
    """One spec, trained and scored; its own `row` lacks how it is to the best."""

    row: Compared
    network: Network
    errors_N: Tensor


def compare(
    dataset: "str | pa.Table",
    specs: Mapping[str, Spec],
    to: str = COMPARED_IN,
    *,
    holdout: float = HOLDOUT,
    holdout_dataset: str | None = None,
    device: Device = "auto",
    rows: RowSettings = RowSettings(),
    stores: Callable[[str], Store] = open_store,
) -> Comparison:
    """Train several specs on the same rows, and score them on the same others.

    Killed and called again with the same arguments, it goes on after the last checkpoint and gives the same result. A spec that
    cannot be trained is told with the reason; the others go on.

    Args:
        dataset: URL of a folder of Parquet files, or of a single one; or a table in memory.
        specs: The specs by the names that they are told by. All of one target and task.
        to: URL of the registry that keeps a model of each spec, and the report; made if it is new.
        holdout: Share of the rows that none of them is trained on; a hash decides which.
        holdout_dataset: URL of a dataset to score on in place of held-out rows.
        device: Where tensors are computed.
        rows: Which rows of the dataset are trained on, and held out; by default all.
        stores: Opens the store at a URL.

    Raises:
        SpecError: the specs cannot be compared.
        StorageError: a place cannot be used.
        TrainingError: no spec could be trained; that of the first.
    """
    _check_targets(specs)
    separate = holdout_dataset is not None
    settings = BatchSettings(
        holdout_dataset=holdout_dataset, holdout=None if separate else holdout, device=device, **rows.model_dump()
    )
    first, spec = next(iter(specs.items()))
    data = run_snapshot(dataset, to, kept_as(first, spec.model_dump(mode="json")), spec, settings, stores)
    _check_tasks(specs, data, settings)
    found: dict[str, _Trained | TrainingError] = {}
    held_out: Rows | None = None
    measure: Measure = "rmse"
    for name in each("compare", list(specs), unit="specs"):
        try:
            network, row = _trained(name, specs[name], data, to, settings, stores)
            measure = _measure(specs, network)
            held_out = held_out or _held_out(data, network, settings, stores)
            found[name] = _scored(network, row, held_out, measure)
        except TrainingError as error:
            logger.warning("%s cannot be compared: %s", name, error)
            found[name] = error
    if held_out is None or not any(isinstance(one, _Trained) for one in found.values()):
        raise next(error for error in found.values() if isinstance(error, TrainingError))
    result = _ranked(data, found, held_out, measure, stores(to).url)
    stores(to).write(PAGE, compared(result).encode())
    return result


# ---- may they be compared? -------------------------------------------------------------------------------------------
def _check_targets(specs: Mapping[str, Spec]) -> None:
    """Raises SpecError: they say themselves that they predict different things."""
    if not specs:
        raise SpecError("there is no spec to compare: name one or more")
    (first, spec), *others = specs.items()
    for name, other in others:
        if other.targets != spec.targets:
            raise SpecError(
                f"{first} predicts {_listed(spec.targets)} and {name} predicts {_listed(other.targets)}: errors of different "
                "targets cannot be compared. Compare specs of one target."
            )


def _check_tasks(specs: Mapping[str, Spec], data: Snapshot, settings: BatchSettings) -> None:
    """Raises SpecError: their tasks differ, those left open as the dataset decides them, which takes a pass over it."""
    tasks = {name: spec.stated_task for name, spec in specs.items()}
    left_open = next((name for name, task in tasks.items() if task is None), None)
    if left_open is not None and any(tasks.values()):
        split = Split(settings.holdout, "train") if settings.holdout else None
        resolved, _ = fit(specs[left_open], data.schemas, data.schema, data.row_groups, split)
        tasks = {name: task or resolved.spec.task for name, task in tasks.items()}
    (first, task), *others = tasks.items()
    for name, other in others:
        if other != task:
            raise SpecError(
                f"{first} is for task {task!r} and {name} for {other!r}: their errors cannot be compared. Give all one task."
            )


def _listed(targets: tuple[str, ...]) -> str:
    return ", ".join(map(repr, targets))


def _measure(specs: Mapping[str, Spec], network: Network) -> Measure:
    """By what they are compared: one measure for all, whatever the loss that each trains with."""
    if network.spec.task != "regression":
        return "log_loss"
    return "mae" if all(spec.loss_name == "l1" for spec in specs.values()) else "rmse"


# ---- training and scoring --------------------------------------------------------------------------------------------
def _trained(
    name: str, spec: Spec, data: Snapshot, to: str, settings: BatchSettings, stores: Callable[[str], Store]
) -> tuple[Network, Compared]:
    """The model of a spec, trained now or before."""
    model, began = kept_as(name, spec.model_dump(mode="json")), time.monotonic()
    steps = replace(PLAIN, take_snapshot=lambda *_: data)  # all are trained on the dataset as it was when this began
    info = train_by(steps, data.ref.url, to, model, spec, settings, stores)
    if info.trained:
        logger.info("%s: trained in %.1f s", name, time.monotonic() - began)
    log = VersionLog(stores(to), model)
    version = log.version(info.version)
    network = load_frozen(log, version, settings.device, allowed=own_modules(spec))
    counted = version.manifest.counters
    return network, Compared(
        name=name,
        model=model,
        version=version.number,
        epochs=counted.get("epochs", 0),
        rows=counted.get("rows", 0),
        steps=counted.get("steps", 0),
        weights=sum(weight.numel() for weight in network.served.parameters() if weight.requires_grad),
    )


def _held_out(data: Snapshot, network: Network, settings: BatchSettings, stores: Callable[[str], Store]) -> Rows:
    if settings.holdout_dataset is not None:
        other = snapshot(settings.holdout_dataset, stores, network.features.types)
        return Rows(other.row_groups, None, other.schemas)
    assert settings.holdout is not None, "a share of the rows is held out"
    return Rows(data.row_groups, Split(settings.holdout, "holdout"), data.schemas)


def _scored(network: Network, row: Compared, rows: Rows, measure: Measure) -> _Trained:
    """Raises SpecError: no row was held out, or the score is not finite."""
    errors = RowErrors(measure)
    metrics = network.metrics
    metrics[measure] = errors
    found = rows.score(network)
    if not found.rows:
        raise SpecError("no row with a label was held out: hold out a larger share, or name a holdout_dataset")
    scores = {name: value for name, value in found.finite.items() if name != "loss"}
    if measure not in scores:
        raise SpecError(f"its {measure} on the held-out rows is {found.metrics.get(measure, found.left_out)}")
    return _Trained(row.model_copy(update={"scores": scores}), network, errors.errors_N)


def _ranked(
    data: Snapshot, found: Mapping[str, _Trained | TrainingError], rows: Rows, measure: Measure, registry: str
) -> Comparison:
    """The best first, and those that failed last; each with how it is to the best, on the same rows."""
    done = sorted((one for one in found.values() if isinstance(one, _Trained)), key=lambda one: one.row.scores[measure])
    best = done[0]
    failed = [Compared(name=name, failed=described(e)) for name, e in found.items() if isinstance(e, TrainingError)]
    constant = _baseline(best.network, rows, measure)
    return ShownComparison(
        dataset=data.ref.url,
        held_out=len(best.errors_N),
        measure=measure,
        specs=(best.row, *(_beside(one, best, measure) for one in done[1:]), *failed),
        baseline=None if constant is None else _beside(constant, best, measure),
        registry=registry,
        page=f"{registry}/{PAGE}",
    )


def _beside(one: _Trained, best: _Trained, measure: Measure) -> Compared:
    more, error = difference(one.errors_N, best.errors_N, measure)
    return one.row.model_copy(update={"difference": more, "standard_error": error if math.isfinite(error) else None})


def _baseline(network: Network, rows: Rows, measure: Measure) -> _Trained | None:
    """The mean of the target, or the base rates; None if a loss or metric of the user's cannot take it."""
    seen = network.features.statistics
    counts = None if seen is None or seen.class_counts is None else [int(count) for count in seen.class_counts]
    try:
        constant = baseline(network.spec, network.features, counts)
        return _scored(constant, Compared(name="baseline"), rows, measure)
    except TrainingError as error:
        logger.warning("the baseline could not be scored: %s", described(error))
        return None

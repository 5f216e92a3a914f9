"""Batch training, one unit at a time: snapshot a dataset, train epoch by epoch with a checkpoint after each, and inside of long
ones, register.

A run is known by its key: the dataset's fingerprint, the spec, the split, the model's source and the rule of shuffling.
Killed and started again, the same run goes on from its last checkpoint, and one that had finished finds its version instead
of training again.
"""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
from pydantic import BaseModel

from tidemill.progress import IN_RESULT, under_way
from tidemill.storage.aliases import promote
from tidemill.storage.chain import Version
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import HeadMoved, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Entry
from tidemill.storage.records import IN_MEMORY
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.batch_run import BatchRun
from tidemill.tasks.beside import Rows, of_baseline, of_replaced
from tidemill.tasks.ranks.leader import environment_of, leading
from tidemill.tasks.ranks.passes import train_pass
from tidemill.tasks.retrying import retried
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.snapshots import check_places, run_snapshot
from tidemill.tasks.snapshots import take_snapshot as take_snapshot  # tests and benchmarks call it here
from tidemill.tasks.telling import chosen, decided, notes, unlabelled_rows
from tidemill.tasks.training.environment import code_revision
from tidemill.tasks.training.families import type_name
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import Score
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.trial import warn_of_hidden_state
from tidemill.tasks.versions import resolved_spec

logger = logging.getLogger("tidemill.batch")


class VersionInfo(BaseModel):
    """The version that a batch run ends with."""

    registry: str
    model: str
    version: int
    trained: bool
    """False if an earlier run over the same data, with the same spec, had made it."""
    metrics: dict[str, object]
    passed_over: list[str] = []
    """What lies in the dataset's folder and was not read: how many objects, why, and the first names."""
    chosen: list[str] = []
    """What the spec had left open and was decided, and what was left out: one sentence each."""
    notes: list[str] = []
    """How the score is beside others, and which alias the version took: one sentence each."""

    def _repr_html_(self) -> str:
        from tidemill.tasks.history.notebook import batch_end

        return batch_end(self.model, self.version, self.trained, self.metrics)


# ---- the steps -------------------------------------------------------------------------------------------------------
def open_run(
    dataset: Snapshot,
    registry: str,
    model: str,
    spec: Spec,
    settings: BatchSettings,
    stores: Callable[[str], Store] = open_store,
) -> BatchRun:
    """Find what an earlier attempt of this run left, or begin it.

    Raises:
        PlacesOverlap: registry, dataset, holdout or an inbox of the model lie inside each other. Nothing was written.
        UnsupportedStore: the registry's store cannot keep versions safe.
    """
    log = VersionLog(stores(registry), model)
    check_places(log, None if dataset.ref.url == IN_MEMORY else dataset.ref.url, settings, stores)
    run = BatchRun(dataset, log, spec, settings, stores)
    if run.registered is not None:
        version, finished = run.registered
        logger.info(
            "version %d of %s, committed at %s, was made from this dataset, spec and code%s",
            version.number,
            log.url,
            version.manifest.created.isoformat(timespec="seconds"),
            "; nothing is trained. To train all the same, set again (--again)"
            if finished
            else "; it is not finished yet",
        )
    return run


def prepare(run: BatchRun) -> None:
    """Load the last checkpoint, or learn the statistics of the features: one pass over the dataset."""
    features, resolved = run.load_or_fit().features, run.resolved
    run.gradient_steps()  # refuses a model that cannot be trained in parts
    for told in decided(run.asked, resolved.spec, resolved.labels, resolved.unused, unlabelled_rows(features)):
        logger.info("%s", told)


def train_epoch(run: BatchRun, epoch: int) -> float:
    """Train one epoch, then store a checkpoint. Returns the mean loss over samples. Of a search: a stretch of it.

    Called again after an error, it finds out whether its checkpoint was stored: no epoch is trained twice. The first epoch
    fills the replay buffer, if the spec has one.

    Raises:
        NonFiniteLoss: training diverged; the checkpoint before it stands.
    """
    try:
        learner = run.load_or_fit()
        if run.search is not None:
            return run.train_stretch(epoch)
        if learner.counters.epochs > epoch:
            return run.losses[epoch]
        key = ("epoch", epoch)
        groups, epochs = run.dataset.row_groups, run.last_epoch
        counted = learner.features.statistics.labelled if learner.features.statistics is not None else None
        rows = counted or run.dataset.ref.rows
        with under_way(f"epoch {epoch + 1} of {epochs}", total=rows, ahead=(epochs - epoch - 1) * rows) as activity:
            result = train_pass(
                run.read_by_all,
                run.gradient_steps(),
                groups,
                key=key,
                split=run.split,
                remember=epoch == 0,
                labelled=counted,
                activity=activity,
                start=run.begun_pass(),
                keeper=run.midways,
            )
        learner.counters.epochs = epoch + 1
        if run.settings.patience is not None:
            held_out = _held_out(run)
            assert held_out is not None, "patience needs held-out rows"
            loss = held_out.score(learner).loss
            run.holdout_losses = (*run.holdout_losses, loss if math.isfinite(loss) else sys.float_info.max)
            logger.info("epoch %d of %d: loss %.6g on the holdout", epoch + 1, epochs, loss)
        run.losses = (*run.losses, result.loss)
        run.save(learner)
    except BaseException:
        run.forget()
        raise
    logger.info("epoch %d of %d: loss %.6g over %d rows", epoch + 1, epochs, result.loss, result.rows)
    return result.loss


@dataclass(frozen=True)
class Evaluation:
    """How good the learner of a run is, and what that stands beside."""

    score: Score
    """Of 0 rows if none were held out."""
    baseline: dict[str, float]
    """Of the mean, or of the base rates, on the same rows."""
    replaced: dict[str, Any] | None
    """Of the version that the alias names until now, on the same rows, or why there is none."""

    @property
    def metrics(self) -> dict[str, Any]:
        """As the manifest has them."""
        return (
            {"holdout_rows": self.score.rows, "holdout": self.score.finite if self.score.rows else {}}
            | ({"baseline": self.baseline} if self.baseline else {})
            | ({"replaced": self.replaced} if self.replaced else {})
        )


def evaluate(run: BatchRun) -> Evaluation:
    """Score the learner, of the best epoch, on the held-out rows or the separate dataset, beside what it must beat."""
    learner, rows = run.load_best(), _held_out(run)
    found = Score(0, math.nan)
    if run.searched_rows is not None and run.search is not None:
        found = run.search.result  # of learners that were not trained on them, as this one may be
    elif rows is not None:
        found = rows.score(learner)
    scored = rows if found.rows else None
    return Evaluation(
        found,
        {} if scored is None else of_baseline(learner, scored, run.resolved.class_counts),
        of_replaced(learner, scored, run.log, run.settings.alias),
    )


def _held_out(run: BatchRun) -> Rows | None:
    """The rows to score on; None: all are trained on."""
    if run.settings.holdout_dataset is not None:
        other = run.holdout()
        return Rows(other.row_groups, None, other.schemas)
    split = Split(run.holdout_share, side="holdout") if run.holdout_share else run.searched_rows
    return None if split is None else Rows(run.dataset.row_groups, split, run.dataset.schemas)


def register(run: BatchRun, result: Evaluation) -> Version:
    """Commit the learner as the new head; owed shards and tombstones of the head before are carried on.

    Called again after an error, it finds out whether its version was committed.
    """
    if (registered := run.progress.registered()) is not None:
        return registered[0]
    learner = run.load_best()
    version = _committed(run, result, learner)
    if warn_of_hidden_state(learner, run.dataset.row_groups):
        run.forget()
    return version


def _committed(run: BatchRun, result: Evaluation, learner: Learner) -> Version:
    """The learner as a version: this one, or that of an overlapping attempt of this run which was faster."""
    pieces = learner.pieces()
    counters, spec, losses = asdict(learner.counters), resolved_spec(learner), list(run.losses)
    epochs: dict[str, object] = {}
    if run.search is not None:
        epochs, spec["epochs"] = {"search": run.search.facts()}, learner.counters.epochs
    elif run.holdout_losses:
        epochs = {"epoch_holdout": list(run.holdout_losses), "best_epoch": run.best_epoch}
    left_out = unlabelled_rows(learner.features)
    unlabelled = {"unlabelled_rows": left_out} if left_out else {}
    while True:
        parent = run.log.head() if run.log.exists() else None
        number = 0 if parent is None else parent.number + 1
        try:
            # Written anew for each number: blobs of a number that another run has taken are garbage, and may be collected.
            refs = run.log.write_learner(number, pieces, None if parent is None else parent.manifest.blobs)
            entry = Entry(
                kind="batch",
                spec=run.asked.model_dump(mode="json"),
                resolved_spec=spec,
                unused_columns=run.resolved.unused,
                columns={field.name: type_name(field.type) for field in run.dataset.schema},
                blobs=Blobs(
                    weights=refs[0],
                    state=refs[1],
                    tombstones=run.log.carried_tombstones(parent),
                ),
                owed=() if parent is None else parent.manifest.owed,
                open_labels=None if parent is None else parent.manifest.open_labels,
                metrics={
                    "epoch_loss": losses,
                    **epochs,
                    **unlabelled,
                    **result.metrics,
                },
                counters=counters,
                dataset=run.dataset.ref,
                init_from=run.init_from,
                run=run.progress.key,
                code=code_revision(),
                environment=environment_of(learner.spec),
            )
            return run.log.commit(parent, entry)
        except HeadMoved as moved:
            logger.info("%s Registering on top of it.", moved)
            if (registered := run.progress.registered()) is not None:  # by an overlapping attempt of this run
                return registered[0]


def finish(run: BatchRun, version: Version) -> None:
    """Move the alias to the version, then record that the run is done.

    A run that was killed between its commit and this, and started again long after, may find the version out of retention:
    then the alias stays where it is.
    """
    for told in notes(version, run.settings.alias):
        logger.info("%s", told, extra={IN_RESULT: True})
    try:
        promote(run.log, run.settings.alias, version)
    except UnknownVersion as error:
        logger.warning("alias %r stays where it is: %s", run.settings.alias, error)
    run.progress.finish(version)


# ---- all of them -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BatchSteps:
    """The steps of a batch run, as `train_by` takes them: plain functions that try again, or Prefect's tasks."""

    take_snapshot: Callable[[str | pa.Table, str, str, Spec, BatchSettings, Callable[[str], Store]], Snapshot]
    open_run: Callable[[Snapshot, str, str, Spec, BatchSettings, Callable[[str], Store]], BatchRun]
    prepare: Callable[[BatchRun], None]
    train_epoch: Callable[[BatchRun, int], float]
    evaluate: Callable[[BatchRun], Evaluation]
    register: Callable[[BatchRun, Evaluation], Version]
    finish: Callable[[BatchRun, Version], None]

    @classmethod
    def of(cls, called: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "BatchSteps":
        """The functions of this module, each as `called` makes it."""
        steps = (run_snapshot, open_run, prepare, train_epoch, evaluate, register, finish)
        return cls(*(called(step) for step in steps))


PLAIN: Final = BatchSteps.of(retried)


def train(
    dataset: str | pa.Table,
    registry: str,
    model: str,
    spec: Spec,
    settings: BatchSettings = BatchSettings(),
    *,
    stores: Callable[[str], Store] = open_store,
) -> VersionInfo:
    """Train a model from a Parquet dataset, register it as the new head, and move the alias to it. Needs no Prefect.

    Killed and called again with the same arguments, it continues after its last checkpoint and ends with the same bits. A
    step that finds a store away is tried again for about a minute.

    Args:
        dataset: URL of a folder of Parquet files, or of a single one: a local path, `file://` or `s3://bucket/prefix`. Or a
            table in memory: it is known by its contents, and whoever trains the version again needs the same table.
        registry: URL below which models live.
        model: Name of the model in the registry; made if it is new.
        spec: What to train: columns, model, loss, optimizer, batch size, epochs, seed.
        settings: How to evaluate, and which alias to move.
        stores: Opens the store at a URL.

    Raises:
        StorageError: the dataset or the registry cannot be used; the classes below it say why.
        TrainingError: the spec does not fit the dataset, the model cannot be built, or training diverged.
    """
    return train_by(PLAIN, dataset, registry, model, spec, settings, stores)


@leading()
def train_by(
    steps: BatchSteps,
    dataset: str | pa.Table,
    registry: str,
    model: str,
    spec: Spec,
    settings: BatchSettings,
    stores: Callable[[str], Store] = open_store,
) -> VersionInfo:
    """One body for `train` and for the flow: whoever runs the steps, their order is this."""
    taken = steps.take_snapshot(dataset, registry, model, spec, settings, stores)
    run = steps.open_run(taken, registry, model, spec, settings, stores)
    if run.registered is None:
        steps.prepare(run)
        while (epoch := run.next_epoch()) is not None:
            steps.train_epoch(run, epoch)
        version = steps.register(run, steps.evaluate(run))
        steps.finish(run, version)
        return _described(run, version, trained=True, moved=True)
    version, finished = run.registered
    if not finished:
        steps.finish(run, version)
    return _described(run, version, trained=False, moved=not finished)


def _described(run: BatchRun, version: Version, *, trained: bool, moved: bool) -> VersionInfo:
    """What the run ends with; `moved`: it is this call that has moved the alias."""
    return VersionInfo(
        registry=run.log.store.url,
        model=run.log.model,
        version=version.number,
        trained=trained,
        metrics=version.manifest.metrics,
        passed_over=[str(kind) for kind in run.dataset.passed_over],
        chosen=chosen(version),
        notes=notes(version, run.settings.alias) if moved else [],
    )

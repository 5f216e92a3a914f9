"""Batch training, one unit at a time: snapshot a dataset, train epoch by epoch with a checkpoint after each, register.

A run is known by its key: the dataset's fingerprint, the spec, the split, the model's source and the rule of shuffling.
Killed and started again, the same run goes on from its last checkpoint, and one that had finished finds its version instead
of training again.
"""

import hashlib
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel

from tidemill.storage.aliases import promote
from tidemill.storage.dataset import Snapshot, snapshot
from tidemill.storage.errors import HeadMoved, UnknownVersion
from tidemill.storage.log import Version, VersionLog, open_log
from tidemill.storage.manifest import Blobs, Entry
from tidemill.storage.parquet import RowGroup
from tidemill.storage.runs import BatchProgress
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.batches import ORDER
from tidemill.tasks.training.environment import code_revision, environment
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import Score, score, train_pass
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

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


class BatchRun:
    """A batch run on its way: the learner in memory, and what is stored of it."""

    def __init__(self, dataset: Snapshot, log: VersionLog, spec: Spec, settings: BatchSettings) -> None:
        """Continue from the newest checkpoint, or learn the statistics of the features and start.

        Raises:
            ColumnError, FactoryError: the spec does not fit the dataset, or the model cannot be built.
        """
        self.dataset, self.log, self.spec, self.settings = dataset, log, spec, settings
        self.progress = BatchProgress(log, run_key(dataset, spec, settings))
        self.losses: tuple[float, ...] = ()
        self.held_out: tuple[float, ...] = ()
        self._learner: Learner | None = None
        self._steps: Steps | None = None
        self.split = Split(settings.holdout_share, held_out=False) if settings.holdout_share else None
        self.progress.begin()
        self.registered = self.progress.registered()
        """(version, True if nothing is left to do) if an earlier attempt had committed it."""

    @property
    def epochs_left(self) -> Iterator[int]:
        """The epochs still to train, from 0; each is to be trained before the next is asked for."""
        for epoch in range(self.learner.counters.epochs, self.spec.epochs):
            if self._given_up:
                return
            yield epoch

    @property
    def best_epoch(self) -> int:
        """How many epochs the registered model has been trained for: all, or with `patience` those up to the best one."""
        if self.settings.patience is None or not self.held_out:
            return len(self.losses)
        return 1 + min(range(len(self.held_out)), key=self.held_out.__getitem__)

    @property
    def _given_up(self) -> bool:
        return self.settings.patience is not None and len(self.losses) - self.best_epoch >= self.settings.patience

    @property
    def learner(self) -> Learner:
        """As it was after the last finished epoch. Loaded, or fitted, when first asked for."""
        if self._learner is None:
            self._learner = self._restored() or self._fresh()
        return self._learner

    @property
    def steps(self) -> Steps:
        """The gradient steps of the learner, made once: to compile them takes a while."""
        if self._steps is None or self._steps.learner is not self.learner:
            rows = sum(group.num_rows for group in self.dataset.row_groups)
            self._steps = Steps(self.learner, rows * self.spec.epochs // self.spec.batch_size)
        return self._steps

    def forget(self) -> None:
        """Drop a learner that may be half trained: the next use reloads the checkpoint."""
        self._learner = None

    def choose_best(self) -> None:
        """Let the learner be that of the best epoch."""
        if self.learner.counters.epochs != self.best_epoch:
            _, weights, state = self.progress.after(self.best_epoch)
            self._learner = Learner.load(self.spec, weights, state, self.settings.device)
            logger.info("the best of %d epochs was %d", len(self.losses), self.best_epoch)

    def _restored(self) -> Learner | None:
        if (found := self.progress.latest()) is None:
            return None
        checkpoint, weights, state = found
        logger.info("going on from the checkpoint after epoch %d of %d", checkpoint.epochs, self.spec.epochs)
        self.losses, self.held_out = checkpoint.losses, checkpoint.held_out
        return Learner.load(self.spec, weights, state, self.settings.device)

    def _fresh(self) -> Learner:
        self.losses, self.held_out = (), ()
        features = Features.resolve(self.spec, self.dataset.row_groups[0].schema)
        for name, schema in self.dataset.schemas:
            features.check(schema, f"{self.dataset.ref.url}/{name}")
        return Learner.create(self.spec, features.fit(self.dataset.row_groups, self.split), self.settings.device)


def take_snapshot(dataset: str) -> Snapshot:
    """The dataset as it is now; see `tidemill.storage.dataset.snapshot`."""
    taken = snapshot(dataset)
    logger.info("%s: %d files, %d rows", taken.ref.url, taken.ref.files, taken.ref.rows)
    return taken


def open_run(dataset: Snapshot, registry: str, model: str, spec: Spec, settings: BatchSettings) -> BatchRun:
    """Find what an earlier attempt of this run left, or begin it."""
    return BatchRun(dataset, open_log(registry, model), spec, settings)


def prepare(run: BatchRun) -> None:
    """Load the last checkpoint, or learn the statistics of the features: one pass over the dataset."""
    _ = run.learner


def train_epoch(run: BatchRun, epoch: int) -> float:
    """Train one epoch, then store a checkpoint. Returns the mean loss over samples.

    Called again after an error, it finds out whether its checkpoint was stored: no epoch is trained twice. The first epoch
    fills the replay memory, if the spec has one.

    Raises:
        NonFiniteLoss: training diverged; the checkpoint before it stands.
    """
    try:
        if run.learner.counters.epochs > epoch:
            return run.losses[epoch]
        key = ("epoch", epoch)
        result = train_pass(run.steps, run.dataset.row_groups, key=key, split=run.split, remember=epoch == 0)
        run.learner.counters.epochs = epoch + 1
        if run.settings.patience is not None:
            held_out = _held_out(run).loss
            run.held_out = (*run.held_out, held_out if math.isfinite(held_out) else sys.float_info.max)
            logger.info("epoch %d of %d: loss %.6g on the held-out rows", epoch + 1, run.spec.epochs, held_out)
        run.losses = (*run.losses, result.loss)
        run.progress.save(run.losses, *run.learner.dump(), run.held_out, run.best_epoch)
    except BaseException:
        run.forget()
        raise
    logger.info("epoch %d of %d: loss %.6g over %d rows", epoch + 1, run.spec.epochs, result.loss, result.rows)
    return result.loss


def evaluate(run: BatchRun) -> Score:
    """Score the learner, of the best epoch, on the held-out rows or the separate dataset. None held out: a score of 0 rows."""
    run.choose_best()
    return _held_out(run)


def _held_out(run: BatchRun) -> Score:
    if run.settings.holdout_dataset is None:
        groups: Sequence[RowGroup] = run.dataset.row_groups if run.settings.holdout_share else []
        return score(run.learner, groups, Split(run.settings.holdout_share, held_out=True) if groups else None)
    other = take_snapshot(run.settings.holdout_dataset)
    for name, schema in other.schemas:
        run.learner.features.check(schema, f"{other.ref.url}/{name}")
    return score(run.learner, other.row_groups)


def register(run: BatchRun, result: Score) -> Version:
    """Commit the learner as the new head; owed shards and tombstones of the head before are carried on.

    Called again after an error, it finds out whether its version was committed.
    """
    while True:
        if (registered := run.progress.registered()) is not None:
            return registered[0]
        parent = run.log.head() if run.log.exists() else None
        number = 0 if parent is None else parent.number + 1
        try:
            # Written anew for each number: blobs of a number that another run has taken are garbage, and may be collected.
            weights, state = run.learner.dump()
            entry = Entry(
                kind="batch",
                spec=run.spec.model_dump(mode="json"),
                blobs=Blobs(
                    weights=run.log.write_blob(number, "safetensors", weights),
                    state=run.log.write_blob(number, "state.safetensors", state),
                    tombstones=run.log.carried_tombstones(parent),
                ),
                owed=() if parent is None else parent.manifest.owed,
                metrics={
                    "epoch_loss": list(run.losses),
                    **({"epoch_held_out": list(run.held_out), "best_epoch": run.best_epoch} if run.held_out else {}),
                    "holdout_rows": result.rows,
                    "holdout": result.finite if result.rows else {},
                },
                counters=asdict(run.learner.counters),
                dataset=run.dataset.ref,
                run=run.progress.key,
                code=code_revision(),
                environment=environment(),
            )
            return run.log.commit(parent, entry)
        except HeadMoved as moved:
            logger.info("%s Registering on top of it.", moved)


def finish(run: BatchRun, version: Version) -> None:
    """Move the alias to the version, then record that the run is done.

    A run that was killed between its commit and this, and started again long after, may find the version out of retention:
    then the alias stays where it is.
    """
    try:
        promote(run.log, run.settings.alias, version)
    except UnknownVersion as error:
        logger.warning("alias %r stays where it is: %s", run.settings.alias, error)
    run.progress.finish(version)


def describe(run: BatchRun, version: Version, *, trained: bool) -> VersionInfo:
    """What a flow returns of a version."""
    return VersionInfo(
        registry=run.log.store.url,
        model=run.log.model,
        version=version.number,
        trained=trained,
        metrics=version.manifest.metrics,
        passed_over=[str(kind) for kind in run.dataset.passed_over],
    )


def run_key(dataset: Snapshot, spec: Spec, settings: BatchSettings) -> str:
    """What makes two batch runs the same run: same files, spec, split, model source and order of rows give the same bits."""
    identity = [
        ORDER if spec.shuffle else None,
        dataset.ref.url,
        dataset.ref.fingerprint,
        spec.model_dump(mode="json"),
        settings.model_dump(mode="json"),
        _source(spec.model.factory),
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _source(factory: str) -> str:
    """sha256 of the module that a factory is imported from, so that an edited model is another run."""
    if ":" not in factory:
        return ""
    try:
        found = importlib.util.find_spec(factory.partition(":")[0])
    except (ImportError, ValueError):
        return ""  # building the model will say what is wrong
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return ""
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()

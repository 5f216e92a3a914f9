"""A batch run on its way: which run it is, the learner in memory, and what is stored of it."""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Final, cast

from tidemill.storage.dataset import Snapshot, snapshot
from tidemill.storage.log import VersionLog
from tidemill.storage.records import WarmStart
from tidemill.storage.runs import BatchProgress, Checkpoint
from tidemill.storage.runs import Source as Blob
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.code import Code, code_of
from tidemill.tasks.midways import ASIDE_BYTES, Copied, Midways
from tidemill.tasks.ranks.leader import environment_of, steps_of
from tidemill.tasks.ranks.passes import ReadByAll
from tidemill.tasks.search import Clock, Search
from tidemill.tasks.search import Progress as SearchProgress
from tidemill.tasks.settings import BatchSettings, RowSettings
from tidemill.tasks.sources import SourceRef, key_with, source_of_run
from tidemill.tasks.telling import began
from tidemill.tasks.training.batches import ORDER
from tidemill.tasks.training.environment import differences
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.fitting import fit
from tidemill.tasks.training.groups import Split, Subset
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.midway import Midway
from tidemill.tasks.training.resolving import Resolved
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.training.tensors import copied
from tidemill.tasks.training.warm import Source, keeping
from tidemill.tasks.trial import tried
from tidemill.tasks.warm_start import read, started

NO_PART_OF_THE_KEY: Final = ("again", "init_from", "keep_statistics", "checkpoint_seconds", "checkpoint_rows")
"""Settings by which no run is told from another one. Of a source, what it holds counts, and not how it is named."""

logger = logging.getLogger("tidemill.batch")


class BatchRun:
    """A batch run on its way: the learner in memory, and what is stored of it."""

    def __init__(
        self,
        dataset: Snapshot,
        log: VersionLog,
        spec: Spec,
        settings: BatchSettings,
        stores: Callable[[str], Store] = open_store,
    ) -> None:
        """Find what an earlier attempt has stored, or note that this run begins. Nothing is loaded or trained yet."""
        self.dataset, self.log, self.settings, self.stores = dataset, log, settings, stores
        self.asked = spec
        """What makes the run this one, whatever it resolves to."""
        self.code = code_of(spec)
        self.source, key = _source(log, run_key(dataset, spec, settings, self.code), settings, stores)
        """What the learner begins with; None: with new weights."""
        self.progress = _attempt(log, key, again=settings.again)
        self.losses: tuple[float, ...] = ()
        """Mean loss over samples of each finished epoch."""
        self.holdout_losses: tuple[float, ...] = ()
        """Loss on the holdout after each finished epoch, where `patience` asks for it."""
        if spec.searches and settings.patience is not None:
            raise SpecError("patience is for epochs that are given: with epochs auto or a recipe, leave it out")
        self.holdout_share = settings.holdout_share(searches=spec.searches)
        self.split = Split(self.holdout_share, side="train") if self.holdout_share else None
        self.read_by_all = ReadByAll(dataset, self.holdout_share)
        self.clock = Clock()
        """Says when a search stores its next checkpoint at the end of an epoch."""
        self.midways = Midways(self._copied, settings.checkpoint_seconds, settings.checkpoint_rows)
        """Stores checkpoints inside of epochs."""
        self._midway: Midway | None = None
        self._resolved: Resolved | None = None
        self._search: Search | None = None
        self._learner: Learner | None = None
        self._steps: Steps | None = None
        self._holdout: Snapshot | None = None
        self.init_from: WarmStart | None = None
        """What the learner has taken of the source, once it has been loaded or made."""
        self.progress.begin()
        self.registered = self.progress.registered()
        """(version, True if nothing is left to do) if an earlier attempt had committed it."""

    @property
    def resolved(self) -> Resolved:
        """What the spec that was asked for comes to. The learner has been loaded or made."""
        assert self._resolved is not None, "load_or_fit() comes before resolved"
        return self._resolved

    @property
    def spec(self) -> Spec:
        """What is trained: nothing is left open in it."""
        return self.resolved.spec

    @property
    def search(self) -> Search | None:
        """Finds out how long to train, where the spec says `epochs: auto`."""
        if self.spec.epochs == "auto" and self._search is None:
            self._search = _searching(self, self.load_or_fit().features)
        return self._search

    @property
    def searched_rows(self) -> Subset | None:
        """The rows that the searches hold out, if no others are scored. The learner has been loaded or made."""
        if self.search is None or self.holdout_share or self.settings.holdout_dataset is not None:
            return None
        return self.search.holdout()

    def load_or_fit(self) -> Learner:
        """The learner after the last finished epoch: kept, loaded, or new, after a pass over the dataset for statistics.

        Raises:
            ColumnError: the spec does not fit the dataset.
            FactoryError: the model cannot be built.
            StaleCode: the user's code in this process is not what this run is recorded under.
        """
        if self._learner is None:
            self.code.load()
            self._learner = self._restored() or self._fresh()
        return self._learner

    def gradient_steps(self) -> Steps:
        """The gradient steps of the learner, made once: to compile them takes a while."""
        learner = self.load_or_fit()
        if self._steps is None or self._steps.learner is not learner:
            rows = sum(group.num_rows for group in self.dataset.row_groups)
            self._steps = steps_of(learner, rows * self.last_epoch // self.spec.batch_size)
        return self._steps

    @property
    def last_epoch(self) -> int:
        """Epochs to train for, at most. The learner has been loaded or made."""
        return self.search.plan.points[-1] if self.search is not None else cast(int, self.spec.epochs)

    def forget(self) -> None:
        """Drop a learner that may be half trained: the next use reloads the checkpoint."""
        self.midways.wait()
        self._learner = self._steps = self._search = self._midway = None

    def begun_pass(self) -> Midway | None:
        """Where the pass stands that the learner is in the middle of, if that was loaded so; to be asked once, by who goes on."""
        midway, self._midway = self._midway, None
        self.midways.begin(0 if midway is None else midway.place.rows)
        return midway

    def next_epoch(self) -> int | None:
        """The epoch to train now, from 0; None if all are done, or `patience` has given up. Loads or fits the learner.

        Of a search: the stretch to train now, which may be of several epochs.
        """
        epoch = self.load_or_fit().counters.epochs
        if self.search is not None:
            return None if self.search.ended(epoch) else self.search.done(epoch)
        patience = self.settings.patience
        given_up = patience is not None and len(self.losses) - self.best_epoch >= patience
        return None if given_up or epoch >= self.last_epoch else epoch

    def train_stretch(self, number: int) -> float:
        """Train on until so many stretches of a search, and one more, are done. Returns the mean loss of the last epoch.

        A checkpoint is stored now and then; of a search whose own learner is registered, at each new best score too.
        """
        learner, search, loss = self.load_or_fit(), self.search, math.nan
        assert search is not None, "the spec asks for it"
        while search.done(learner.counters.epochs) <= number:
            steps, phase = self.gradient_steps(), search.progress.points

            def epoch_done(loss: float, learner: Learner = learner, search: Search = search) -> None:
                self.losses = (*self.losses, loss)
                # Not where a score comes next: a run that goes on from there would leave it out.
                if not search.scores_after(learner.counters.epochs) and self.clock.due():
                    self.save(learner)

            new = search.advance(learner, steps, epoch_done, self.begun_pass(), self.midways)
            loss = self.losses[-1]
            if new:
                features = learner.features
                self._learner = self._steps = None
                del learner, steps, epoch_done  # before the next one takes memory
                self._learner, self.losses = (learner := self.new(features)), ()
            best = not search.plan.refit and search.progress.points != phase and search.is_best(learner.counters.epochs)
            if self.clock.due() or best:
                self.save(learner)
        return loss

    @property
    def best_epoch(self) -> int:
        """How many epochs the registered model has been trained for: all, or with `patience` those up to the best one."""
        if self.search is not None:
            return self.search.best_epochs
        if self.settings.patience is None or not self.holdout_losses:
            return len(self.losses)
        return 1 + min(range(len(self.holdout_losses)), key=self.holdout_losses.__getitem__)

    def load_best(self) -> Learner:
        """The learner after the best epoch."""
        self.midways.wait()  # what is stored later would stay, once the run has dropped its checkpoints
        if self.load_or_fit().counters.epochs != self.best_epoch:
            self._learner = self._steps = None  # before the other one takes memory
            spec, device = self.spec, self.settings.device
            self._learner = self.progress.after(self.best_epoch, lambda _, w, s: Learner.load(spec, w, s, device))
            logger.info("the best of %d epochs was %d", len(self.losses), self.best_epoch)
        return self.load_or_fit()

    def save(self, learner: Learner) -> None:
        """Store a checkpoint after the epochs so far."""
        self.midways.wait()
        self._copied(None, learner).store()
        self.midways.stored(0)

    def _copied(self, midway: Midway | None, learner: Learner | None = None) -> Copied:
        """A checkpoint after the epochs so far, or in the middle of the next one, of the learner as it is now."""
        learner = learner or self.load_or_fit()
        search = self._search
        before = 0 if search is None else search.epochs_before()
        chooses = self.settings.patience is not None if search is None else not search.plan.refit
        weights, state = learner.pieces()
        size = sum(buffer.nbytes for buffer in (*weights, *state))
        if midway is not None and size <= ASIDE_BYTES:
            weights, state = copied(weights), copied(state)
        store = partial(
            self.progress.save,
            self.losses,
            weights,
            state,
            self.holdout_losses,
            self.best_epoch if chooses else None,
            environment_of(self.spec),
            self.resolved.model_dump(mode="json"),
            None if search is None else search.progress.model_dump(mode="json"),
            before + learner.counters.epochs,
            self.init_from,
            None if midway is None else midway.model_dump(mode="json"),
            0 if midway is None else midway.place.rows,
        )
        return Copied(size, store)

    def holdout(self) -> Snapshot:
        """The separate dataset of the settings, as it was when it was first asked for."""
        assert self.settings.holdout_dataset is not None, "the settings ask for a dataset"
        if self._holdout is None:
            types = self.load_or_fit().features.types
            self._holdout = snapshot(self.settings.holdout_dataset, self.stores, types)
        return self._holdout

    def _restored(self) -> Learner | None:
        return self.progress.latest(self._go_on)

    def _go_on(self, checkpoint: Checkpoint, weights: Blob, state: Blob) -> Learner:
        self._resolved = Resolved.model_validate(checkpoint.resolved or {"spec": self.asked})
        self._midway = Midway.model_validate(checkpoint.midway) if checkpoint.midway else None
        inside = "" if self._midway is None else f" and {self._midway.place.rows:,} rows of the next"
        logger.info("going on from the checkpoint after epoch %d of %s%s", checkpoint.epochs, self.spec.epochs, inside)
        if checkpoint.environment and (changed := differences(checkpoint.environment, environment_of(self.spec))):
            logger.warning("bits may differ from those of an uninterrupted run: %s", "; ".join(changed))
        self.losses, self.holdout_losses = checkpoint.losses, checkpoint.holdout_losses
        self.init_from = checkpoint.init_from
        learner = Learner.load(self.spec, weights, state, self.settings.device)
        if checkpoint.search:
            self._search = _searching(self, learner.features, SearchProgress.model_validate(checkpoint.search))
        return learner

    def new(self, features: Features, source: Source | None = None) -> Learner:
        """A learner that is not trained yet. `source` is what it begins with, if that has been read already."""
        learner = Learner.create(self.spec, features, self.settings.device)
        if self.source is None:
            return learner
        first, source = self.init_from is None, source or read(self.source, self.stores)
        self.init_from = started(learner, self.source, source, kept_statistics=self.settings.keep_statistics)
        if first:
            logger.info("%s", began(self.init_from))
        return learner

    def _fresh(self) -> Learner:
        self.losses, self.holdout_losses = (), ()
        data = self.dataset
        self._resolved, features = fit(self.asked, data.schemas, data.schema, data.row_groups, self.split)
        source = None if self.source is None else read(self.source, self.stores)
        if source is not None and self.settings.keep_statistics:
            features = keeping(features, source)
        if self.settings.holdout_dataset is not None:
            self._holdout = snapshot(self.settings.holdout_dataset, self.stores, features.types)
            _check_holdout(self._holdout, features)
        return tried(lambda: self.new(features, source), self.dataset.row_groups)


def _searching(run: BatchRun, features: Features, progress: SearchProgress | None = None) -> Search:
    """The search of a run, from its beginning or from where a checkpoint has left it."""
    groups, split = run.dataset.row_groups, run.split
    return Search(groups, split, run.spec, features, progress, run.read_by_all)


def _check_holdout(holdout: Snapshot, features: Features) -> None:
    """Look at the columns of a separate holdout, and at its labels, before the first epoch and not after the last.

    Raises:
        ColumnError: it cannot be scored.
    """
    for name, schema in holdout.schemas:
        features.check(schema, name)
    if features.task != "regression":
        for group in holdout.row_groups:
            features.target(group.read(features.targets), group.name)


def _attempt(log: VersionLog, key: str, *, again: bool) -> BatchProgress:
    """The last finished attempt at the run with this key, or the first that is not; with `again` always the latter."""
    finished: BatchProgress | None = None
    for number in itertools.count():
        own_key = key if number == 0 else hashlib.sha256(f"{key} {number}".encode()).hexdigest()[:32]
        progress = BatchProgress(log, own_key)
        if not progress.finished():
            return progress if again or finished is None else finished
        finished = progress
    raise AssertionError("counting never ends")


def _source(
    log: VersionLog, key: str, settings: BatchSettings, stores: Callable[[str], Store]
) -> tuple[SourceRef | None, str]:
    """(what a run begins with, its key); `key` is what it would have without a source.

    Raises:
        InvalidURL, StorageError: `init_from` names nothing that is there.
    """
    if settings.init_from is None:
        return None, key
    keep = settings.keep_statistics
    source = source_of_run(
        settings.init_from,
        log,
        key,
        lambda key: _attempt(log, key, again=settings.again),
        stores,
        keep_statistics=keep,
    )
    return source, key_with(key, source, keep_statistics=keep)


def run_key(dataset: Snapshot, spec: Spec, settings: BatchSettings, code: Code | None = None) -> str:
    """What makes two batch runs the same run: same files, spec, split, user's code and order of rows give the same bits, if they
    begin with the same weights (`sources.key_with`)."""
    return _key(spec, dataset.ref.url, dataset.ref.fingerprint, settings, code)


def asked_key(url: str, spec: Spec, settings: BatchSettings, code: Code | None = None) -> str:
    """The same of what is asked for alone, whatever the dataset holds."""
    return _key(spec, url, settings.init_from or "", settings, code)


def _key(spec: Spec, url: str, fingerprint: str, settings: BatchSettings, code: Code | None) -> str:
    # What rows are asked for is not said where all are, as it was before it could be: such runs go on.
    unsaid = {name for name in RowSettings.model_fields if getattr(settings, name) is None}
    identity = [
        ORDER if spec.shuffle else None,
        url,
        fingerprint,
        spec.model_dump(mode="json"),
        settings.model_dump(mode="json", exclude={*NO_PART_OF_THE_KEY, *unsaid}),
        (code or code_of(spec)).identity or "",
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

"""A batch run on its way: which run it is, the learner in memory, and what is stored of it."""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable
from typing import cast

from tidemill.storage.dataset import Snapshot, snapshot
from tidemill.storage.log import VersionLog
from tidemill.storage.runs import BatchProgress
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.code import Code, code_of
from tidemill.tasks.search import Clock, Search
from tidemill.tasks.search import Progress as SearchProgress
from tidemill.tasks.settings import BatchSettings, RowSettings
from tidemill.tasks.training.batches import ORDER
from tidemill.tasks.training.environment import differences, environment
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.fitting import fit
from tidemill.tasks.training.groups import Split, Subset
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.resolving import Resolved
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.trial import try_out

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
        self.progress = _attempt(log, run_key(dataset, spec, settings, self.code), again=settings.again)
        self.losses: tuple[float, ...] = ()
        """Mean loss over samples of each finished epoch."""
        self.holdout_losses: tuple[float, ...] = ()
        """Loss on the holdout after each finished epoch, where `patience` asks for it."""
        if spec.searches and settings.patience is not None:
            raise SpecError("patience is for epochs that are given: with epochs auto or a recipe, leave it out")
        self.holdout_share = settings.holdout_share(searches=spec.searches)
        self.split = Split(self.holdout_share, side="train") if self.holdout_share else None
        self.clock = Clock()
        """Says when a search stores its next checkpoint."""
        self._resolved: Resolved | None = None
        self._search: Search | None = None
        self._learner: Learner | None = None
        self._steps: Steps | None = None
        self._holdout: Snapshot | None = None
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
            learner = self.load_or_fit()
            groups, split = self.dataset.row_groups, self.split
            self._search = Search(groups, split, self.spec, learner.features, lambda: self._new(learner.features))
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
            self._steps = Steps(learner, rows * self.last_epoch // self.spec.batch_size)
        return self._steps

    @property
    def last_epoch(self) -> int:
        """Epochs to train for, at most. The learner has been loaded or made."""
        return self.search.plan.points[-1] if self.search is not None else cast(int, self.spec.epochs)

    def forget(self) -> None:
        """Drop a learner that may be half trained: the next use reloads the checkpoint."""
        self._learner = self._search = None

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

            self._learner = search.advance(learner, steps, epoch_done)
            new = self._learner is not learner
            learner, loss = self._learner, self.losses[-1]
            self.losses = () if new else self.losses
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
        learner = self.load_or_fit()
        if learner.counters.epochs != self.best_epoch:
            _, weights, state = self.progress.after(self.best_epoch)
            learner = self._learner = Learner.load(self.spec, weights, state, self.settings.device)
            logger.info("the best of %d epochs was %d", len(self.losses), self.best_epoch)
        return learner

    def save(self, learner: Learner) -> None:
        """Store a checkpoint after the epochs so far."""
        search = self._search
        before = 0 if search is None else search.epochs_before()
        self.progress.save(
            self.losses,
            *learner.dump(),
            self.holdout_losses,
            self.best_epoch if search is None or not search.plan.refit else None,
            environment(),
            self.resolved.model_dump(mode="json"),
            None if search is None else search.progress.model_dump(mode="json"),
            before + learner.counters.epochs,
        )

    def holdout(self) -> Snapshot:
        """The separate dataset of the settings, as it was when it was first asked for."""
        assert self.settings.holdout_dataset is not None, "the settings ask for a dataset"
        if self._holdout is None:
            types = self.load_or_fit().features.types
            self._holdout = snapshot(self.settings.holdout_dataset, self.stores, types)
        return self._holdout

    def _restored(self) -> Learner | None:
        if (stored := self.progress.latest()) is None:
            return None
        checkpoint, weights, state = stored
        self._resolved = Resolved.model_validate(checkpoint.resolved or {"spec": self.asked})
        logger.info("going on from the checkpoint after epoch %d of %s", checkpoint.epochs, self.spec.epochs)
        if checkpoint.environment and (changed := differences(checkpoint.environment, environment())):
            logger.warning("bits may differ from those of an uninterrupted run: %s", "; ".join(changed))
        self.losses, self.holdout_losses = checkpoint.losses, checkpoint.holdout_losses
        learner = Learner.load(self.spec, weights, state, self.settings.device)
        if checkpoint.search:
            progress, features = SearchProgress.model_validate(checkpoint.search), learner.features
            groups, split = self.dataset.row_groups, self.split
            self._search = Search(groups, split, self.spec, features, lambda: self._new(features), progress)
        return learner

    def _new(self, features: Features) -> Learner:
        return Learner.create(self.spec, features, self.settings.device)

    def _fresh(self) -> Learner:
        self.losses, self.holdout_losses = (), ()
        data = self.dataset
        self._resolved, features = fit(self.asked, data.schemas, data.schema, data.row_groups, self.split)
        if self.settings.holdout_dataset is not None:
            self._holdout = snapshot(self.settings.holdout_dataset, self.stores, features.types)
            _check_holdout(self._holdout, features)
        learner = self._new(features)
        try_out(learner, self.dataset.row_groups)
        return learner


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


def run_key(dataset: Snapshot, spec: Spec, settings: BatchSettings, code: Code | None = None) -> str:
    """What makes two batch runs the same run: same files, spec, split, user's code and order of rows give the same bits."""
    return _key(spec, dataset.ref.url, dataset.ref.fingerprint, settings, code)


def asked_key(url: str, spec: Spec, settings: BatchSettings, code: Code | None = None) -> str:
    """The same of what is asked for alone, whatever the dataset holds."""
    return _key(spec, url, "", settings, code)


def _key(spec: Spec, url: str, fingerprint: str, settings: BatchSettings, code: Code | None) -> str:
    # What rows are asked for is not said where all are, as it was before it could be: such runs go on.
    unsaid = {name for name in RowSettings.model_fields if getattr(settings, name) is None}
    identity = [
        ORDER if spec.shuffle else None,
        url,
        fingerprint,
        spec.model_dump(mode="json"),
        settings.model_dump(mode="json", exclude={"again", *unsaid}),
        (code or code_of(spec)).identity or "",
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

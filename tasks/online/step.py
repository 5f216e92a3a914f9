"""Online training, one protocol step at a time: find shards, score and train on them, commit, then dispose of them.

`step` is the protocol of `docs/guarantees.md`, top to bottom; each of its lines has a room of its own in this folder. Killed
anywhere, it is simply run again: what is not in a committed version has not happened, and what is committed is not done twice.
"""

import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tidemill.storage.aliases import Alias, find_alias
from tidemill.storage.chain import Version
from tidemill.storage.errors import HeadMoved, Unavailable, UnknownVersion, on_one_line
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Consumed, Gate, Owed
from tidemill.storage.overlap import Relation, relation
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.batch import VersionInfo
from tidemill.tasks.errors import GateClosed
from tidemill.tasks.online.commit import commit
from tidemill.tasks.online.gate import Champion, OwnCode
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.selection import Selection, select
from tidemill.tasks.online.turns import train_on
from tidemill.tasks.online.work import Head, Identity, Work, read_learner, trigger_on
from tidemill.tasks.ranks.leader import environment_of, steps_of
from tidemill.tasks.scores import Summary
from tidemill.tasks.settings import BatchSettings, GateSettings, OnlineSettings
from tidemill.tasks.training.environment import differences
from tidemill.tasks.training.made_up import made_up
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.trial import try_metrics, warn_of_hidden_state
from tidemill.tasks.versions import asked_of, spec_of

logger = logging.getLogger("tidemill.online")

PASSED_OVER: Final = 1000
"""After this many versions that only rejected shards, those before them are not looked for when a run is opened."""
DISPOSE_AGAIN_SECONDS: Final = 60.0
"""How often what was denied, a deletion or a read, is tried again."""


class Outcome(enum.Enum):
    """How a step ended."""

    COMMITTED = "committed"
    IDLE = "idle"
    """Nothing in the inbox can be trained on now."""
    LOST = "lost"
    """Another run committed first. The work was discarded; the next step starts from the new head."""
    RETRAIN = "retrain"
    """`gate.refusals` versions in a row were refused, and the settings ask for a batch training then."""


@dataclass(frozen=True)
class Step:
    """What one step did."""

    outcome: Outcome
    version: int | None = None
    """The version that was committed."""


class OnlineRun:
    """An open registry and inbox, and what the steps keep in memory between them. It is handed to no other room."""

    def __init__(
        self,
        inbox: str,
        registry: str,
        model: str,
        settings: OnlineSettings,
        stores: Callable[[str], Store] = open_store,
    ) -> None:
        """Open both ends and make sure that the model exists.

        Raises:
            UnknownModel: the registry holds no such model.
            PlacesOverlap: a place is, holds or lies in the inbox, or in another way in which they may not lie.
            UnsupportedStore, PermissionDenied: the registry cannot be committed to.
        """
        self.settings = settings
        self.places = Places(inbox, registry, model, settings, stores)
        assert self.places.head is not None, "it was read a moment ago"
        self.report = OnlineReport(model=model, head=self.places.head.number)
        self.champion = Champion(self.places.log, settings.gate, settings.device, self.places.store)
        self._head: Head | None = None
        self._selection: Selection | None = None
        """The last listing. Shards of it may be left."""
        self._unreadable: dict[Identity, str] = {}
        """Shards that could not be read lately -> why."""
        self._read_again_at = 0.0
        """When they are tried again."""
        self._told: set[str] = set()
        self._has_tried_metrics = self._has_tried_restart = False

    def head(self) -> Head:
        """The head, verified, and the learner as it was committed; its debts paid, now that it has been read back.

        Raises:
            HeadMoved: while it was read, others went on and retention removed it.
        """
        if (head := self._head) is None:
            head = self._head = self._read_head(self.places.newest())
        elif head.owed and time.monotonic() - head.disposed_at > DISPOSE_AGAIN_SECONDS:
            self.places.log.check(head.version)
            head.owed, head.disposed_at = self.places.dispose(head.owed), time.monotonic()
        self.report.head, self.report.owed = head.version.number, len(head.owed)
        return head

    def _read_head(self, version: Version, own_code: bool = True) -> Head:
        """Raises OwnCode as `Champion.refresh`."""
        log, settings = self.places.log, self.settings
        manifest, learner = version.manifest, read_learner(log, version, settings.device)
        try:
            tombstones = log.tombstones(version)
        except UnknownVersion as error:
            if log.head().number == version.number:
                raise
            raise HeadMoved(f"{log.url}: retention has removed version {version.number}, the head before.") from error
        if not self._has_tried_metrics:
            try_metrics(learner)
            self._has_tried_metrics = True
        if changed := differences(manifest.environment, environment_of(learner.spec)):
            self._tell(f"bits may differ from those of the run before: {'; '.join(changed)}")
        tombstones.respell(self.places.spelled)
        log.make_durable(version)  # before its debts are paid
        owed = self.places.dispose(manifest.owed)
        self.champion.refresh(version, learner, own_code=own_code)
        recent, gate = _recent(log, version, settings)
        return Head(
            version,
            steps_of(learner),
            tombstones,
            owed,
            time.monotonic(),
            recent,
            Summary.model_validate(manifest.metrics.get("cumulative", {})),
            gate,
            trigger_on(settings.train_when, learner.spec, recent),
        )

    def selections(self, head: Head) -> Iterator[Selection]:
        """What is left of the last listing, then a new one, and further ones while all that they find is of no use.

        The same selection comes again as long as shards are left in it.
        """
        while self._selection:
            yield self._selection
        tried: set[Identity] = set()
        while True:
            selection = self._look(head, tried)
            while selection:
                yield selection
            if not selection.full:
                return
            tried |= selection.listed  # what came to nothing must not hide what is younger

    def _look(self, head: Head, without: set[Identity]) -> Selection:
        """List the inbox; remove what was consumed before and has been sent again."""
        if time.monotonic() >= self._read_again_at:
            self._unreadable, self._read_again_at = {}, time.monotonic() + DISPOSE_AGAIN_SECONDS
        selection = self._selection = select(head, self.places, self.settings, without | self._unreadable.keys())
        self.report.look(selection.waiting, selection.oldest)
        self._pass_over(selection.passed_over | self._unreadable)
        self.report.tell_looked()
        for warning in selection.warnings:
            self._tell(warning)
        self._remove(head, selection.duplicates)
        return selection

    def poll(self) -> bool:
        """Look into the inbox. True if a step may find something to train on."""
        try:
            return bool(self._look(self.head(), set()))
        except (HeadMoved, Unavailable):
            return True  # the step finds out for itself, with its retries

    def take_in(self, work: Work) -> None:
        """What became of the shards that are neither trained on nor rejected."""
        self._remove(work.head, work.duplicates)
        self.report.waiting = max(
            0, self.report.waiting - sum(d.inbox == self.places.inbox.url for d in work.duplicates)
        )
        self._pass_over(work.unreadable)
        self._unreadable |= work.unreadable

    def _remove(self, head: Head, duplicates: Collection[Owed]) -> None:
        """Remove shards that were consumed before. What is denied is owed like any other, and remembered."""
        for debt in duplicates:
            logger.info("%s/%s was consumed before: removed, not trained on again", debt.inbox, on_one_line(debt.key))
        if duplicates:
            self.places.log.check(head.version)  # on whose memory they are removed
        head.owed += self.places.dispose(duplicates)
        self.report.duplicates += len(duplicates)

    def _pass_over(self, shards: Mapping[Identity, str]) -> None:
        """Count shards that stay in the inbox until a person acts, and name each once."""
        named = {f"{inbox}/{key}": reason for (inbox, key, _), reason in shards.items()}
        self.report.pass_over(named)
        for url, reason in named.items():
            self._tell(f"{url} is passed over: {reason}")

    def committed(self, head: Head, work: Work) -> None:
        """Take in a version that this run has committed: dispose of what it is done with, move the alias if it says so."""
        self._head = head
        self.report.add(head.version.manifest)
        self.report.head = head.version.number
        self.report.waiting = max(0, self.report.waiting - len(work.consumed) - len(work.rejected))
        carried = len(work.head.owed)  # what was denied is tried again now and then, not at each commit
        head.owed = (*head.owed[:carried], *self.places.dispose(head.owed[carried:]))
        self.champion.move_alias(head.version, head.learner)
        self.report.tell_committed(head.version.manifest, len(head.owed), self.champion.alias)
        logger.info("version %d: %s", head.version.number, work)
        if not self._has_tried_restart:
            self._has_tried_restart = True
            self._try_restart(head)

    def _try_restart(self, head: Head) -> None:
        """Warn if a model of the user's would go on with other bits after a restart: by the first commit of this process.

        The learner is used up by that, and read again.
        """
        learner = head.learner
        if learner.spec.import_paths:
            rows = made_up(learner.features, learner.spec.batch_size)
            if warn_of_hidden_state(learner, [rows]):
                head.read_again(self.places.log, self.settings.device)

    def lost(self, moved: HeadMoved) -> Step:
        """Another run was faster."""
        logger.info(str(moved))
        self.forget()
        self.report.lost_races += 1
        return Step(Outcome.LOST)

    def forget(self) -> None:
        """Drop the memory: the next step starts from what is stored."""
        self._head = None
        if self._selection is not None:
            self._selection.reader.close()
            self._selection = None

    def _tell(self, message: str) -> None:
        """Warn, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(on_one_line(message))


def _recent(log: VersionLog, head: Version, settings: OnlineSettings) -> tuple[deque[Consumed], Gate | None]:
    """(the shards that were scored last on the way to this head, the last decision about one of them).

    Versions that only rejected are passed over, but not without end: a history may hold any number of them.
    """
    by_score = settings.train_when.recent_shards if settings.train_when.by_score else 0
    size = max(settings.gate.recent_shards, by_score)
    recent: deque[Consumed] = deque(maxlen=size)
    gate: Gate | None = None
    passed_over = 0
    for version in log.history(head):
        if version.manifest.kind != "online" or len(recent) == size or passed_over == PASSED_OVER:
            break
        passed_over += not version.manifest.consumed
        gate = gate or version.manifest.gate
        for shard in version.manifest.consumed[::-1][: size - len(recent)]:
            recent.appendleft(shard)
    return recent, gate


# ---- the protocol ----------------------------------------------------------------------------------------------------
def open_run(
    inbox: str, registry: str, model: str, settings: OnlineSettings, stores: Callable[[str], Store] = open_store
) -> OnlineRun:
    """Open the registry and the inbox; see `OnlineRun`."""
    return OnlineRun(inbox, registry, model, settings, stores)


def prepare(run: OnlineRun) -> None:
    """Read the head, list the inbox, and begin to read what waits: the next step goes on from there. Raises as `step`.

    As when a step reads the head, its debts are paid, the alias moves if it says so, and what was sent again is removed.
    In any thread, if nothing else is done with this run meanwhile. Where the head or the champion is of the user's own code,
    reading them is left to the step: that code may change what belongs to the whole process, and runs where steps are taken.
    """
    places = run.places
    try:
        if run._head is None:
            version = places.newest()
            if spec_of(places.log, version).import_paths:
                places.remember(version)
                return
            try:
                run._head = run._read_head(version, own_code=False)
            except OwnCode:
                places.remember(version)
                return
        if not run.settings.train_when.by_score:  # which computes: to be done where steps are taken
            run._look(run.head(), set()).reader.begin()
    except BaseException as error:
        run.forget()
        if not isinstance(error, HeadMoved):  # the step finds the new one
            raise


def step(run: OnlineRun) -> Step:
    """One step of the protocol. Whatever it raises, nothing half done stays in memory: the next call reads the head again."""
    try:
        head = run.head()  # 1 head, 2 verified blobs, 3 debts of the head
        if (resolved := _resolve(run.places.log, head, run.settings.gate)) is not None:
            run.forget()
            return resolved
        for selection in run.selections(head):  # 4 the inbox, oldest first
            # 5 read and validate, 6 score, then train
            work = train_on(selection.reader, head, run.champion, run.places, run.settings)
            run.take_in(work)
            selection.close(work, run.places)
            if work:
                head = commit(work, selection, run.champion, run.places, run.settings)  # 7 blobs, 8 the manifest
                run.committed(head, work)  # 9 dispose
                return Step(Outcome.COMMITTED, head.version.number)
        return Step(Outcome.IDLE)
    except HeadMoved as moved:
        return run.lost(moved)
    except BaseException:
        run.forget()
        raise


# ---- after many refusals ---------------------------------------------------------------------------------------------
def _resolve(log: VersionLog, head: Head, settings: GateSettings) -> Step | None:
    """What the settings ask for when the head is one of too many versions refused in a row, or None.

    Raises:
        GateClosed: a person must decide.
        HeadMoved: another run was faster.
    """
    version, gate = head.version, head.version.manifest.gate
    if gate is None or gate.refusals < settings.refusals or settings.after_refusals == "continue":
        return None
    if find_alias(log, settings.alias) != Alias(gate.champion, gate.moves):  # somebody has decided otherwise
        return None
    if settings.retrain_on is not None:
        return Step(Outcome.RETRAIN)
    if settings.after_refusals == "rollback":
        made = log.rollback(log.version(gate.champion), version)
        logger.warning("version %d: back to version %d, %d refusals", made.number, gate.champion, gate.refusals)
        return Step(Outcome.COMMITTED, made.number)
    raise GateClosed(
        f"{log.url}: {gate.refusals} versions in a row, up to {version.number}, were worse than champion {gate.champion} "
        f"({gate.numbers}). Nothing more is trained on. `tidemill promote` accepts version {version.number}, `tidemill "
        f"rollback {gate.champion}` gives it up, `tidemill train` begins anew; the shards stay in the inbox."
    )


def retraining(run: OnlineRun) -> tuple[str, str, str, Spec, BatchSettings]:
    """Arguments of the batch training that `Outcome.RETRAIN` asks for: what was asked of the head, on the settings' dataset.

    A holdout of the gate that lies inside of that dataset is left out of it, and scored.
    """
    settings, log = run.settings, run.places.log
    retrain, holdout = settings.gate.retrain, settings.gate.holdout_dataset
    assert retrain is not None, "the settings ask for it"
    dataset, rows = retrain.retrain_on, retrain.model_dump(exclude={"retrain_on"})
    batch_settings = BatchSettings(alias=settings.gate.alias, device=settings.device, **rows)
    if holdout is not None:
        lies = relation(run.places.store(holdout).url, run.places.store(dataset).url)
        if lies is Relation.INSIDE:
            batch_settings = batch_settings.model_copy(update={"holdout_dataset": holdout})
    asked = asked_of(log, head := log.head())
    if asked.task is None:  # a target with more labels by now is no other task
        asked = asked.model_copy(update={"task": spec_of(log, head).task})
    return dataset, log.store.url, log.model, asked, batch_settings


def retrained(run: OnlineRun, made: VersionInfo) -> None:
    """Go on from the batch training that `retraining` asked for.

    Raises:
        GateClosed: the dataset had not changed since it was trained on before, so that no new version was made.
    """
    run.forget()
    log = run.places.log
    if made.version < log.head().number and not made.trained:
        raise GateClosed(
            f"{log.url}: {run.settings.gate.retrain_on} was trained on before, as version {made.version}, with this spec: "
            "retraining changes nothing. Archive consumed shards below it (after_commit.archive_to), or decide by hand: "
            "`tidemill promote`, `tidemill rollback`, or `tidemill train` with another spec."
        )

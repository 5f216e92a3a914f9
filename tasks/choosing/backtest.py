"""Another spec on what a model was trained on online: the archived shards in the order of the log, each scored before it is
trained on, beside what really ran.

It is the reproduction of a history (`tidemill.tasks.reproduce`) with another spec: where the log has a batch training, there is
one with that spec; where it goes back to an older version, so does the backtest. What comes of it is a model in a registry of
its own, with a version every few seconds. Killed and started again, it goes on after the last of them. The log is only read.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tidemill.progress import under_way
from tidemill.storage.aliases import promote
from tidemill.storage.chain import Version
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import CorruptObject, DatasetChanged, DatasetError, StoreNotFound, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Consumed, ShardRef
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.batch import PLAIN, train_by
from tidemill.tasks.choosing.kept import Kept, followed_by
from tidemill.tasks.choosing.names import kept_as, own_modules
from tidemill.tasks.choosing.page import ShownBacktest, backtested
from tidemill.tasks.choosing.places import check_archived, check_place, dataset_of
from tidemill.tasks.choosing.results import BACKTESTED_IN, Backtest, Stretch
from tidemill.tasks.choosing.stretches import cut, difference, paired, same, whole
from tidemill.tasks.code import code_of
from tidemill.tasks.history.points import POINTS
from tidemill.tasks.history.reading import History, HistoryReader
from tidemill.tasks.reproduce import train_again
from tidemill.tasks.retrying import retried
from tidemill.tasks.search import Clock
from tidemill.tasks.settings import BatchSettings, Device
from tidemill.tasks.snapshots import take_snapshot
from tidemill.tasks.table import table_snapshot
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.versions import asked_of, load_learner, spec_of

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("tidemill.backtest")

_ALL: Final = 2**31
"""More versions than there are."""
_AT_ONCE: Final = 64
"""So many manifests of the log are in memory as a whole."""


def backtest(
    registry: str,
    model: str,
    spec: Spec,
    archives: Sequence[str],
    to: str = BACKTESTED_IN,
    *,
    dataset: "str | pa.Table | None" = None,
    device: Device = "auto",
    stores: Callable[[str], Store] = open_store,
) -> Backtest:
    """Go through the shards of a model's history with another spec, each scored before it is trained on.

    It starts where the log does: from the log's own batch version if that was made by this spec, else from a batch training with
    this spec on the dataset that the log names. With the log's own spec, the scores are those of the log. Killed and called again
    with the same arguments, it goes on, and gives the same result.

    Args:
        registry: URL below which the model lives. It is only read.
        model: Name of the model.
        spec: The other spec, of the same target and task.
        archives: URLs where the shards are now: where they were archived, or kept.
        to: URL of the registry that keeps the model of the backtest, and the report; made if it is new.
        dataset: URL of the dataset to train the start on, or a table in memory; None: the one that the log names.
        device: Where tensors are computed.
        stores: Opens the store at a URL.

    Raises:
        SpecError: the spec cannot be compared with the log's.
        NotFound: an archive lacks shards, or holds other bytes under their names.
        DatasetChanged: the dataset of the start is no longer what the log was trained on.
        StorageError: a place cannot be used, or the history is damaged.
        TrainingError: the spec does not fit the shards, or training diverged.
    """
    run = open_run(registry, model, spec, archives, to, dataset=dataset, device=device, stores=stores)
    retried(run.go_through)()
    return told(run)


def open_run(
    registry: str,
    model: str,
    spec: Spec,
    archives: Sequence[str],
    to: str,
    *,
    dataset: "str | pa.Table | None" = None,
    device: Device = "auto",
    stores: Callable[[str], Store] = open_store,
) -> "BacktestRun":
    """Find what an earlier attempt has left, or begin; the arguments and errors are those of `backtest`. Nothing is trained."""
    log = VersionLog(stores(registry), model)
    history = HistoryReader(log, _ALL).read()
    start = dataset if dataset is None or isinstance(dataset, str) else table_snapshot(dataset)
    named = start.ref.fingerprint if isinstance(start, Snapshot) else start
    code = code_of(spec)
    code.load()  # what goes on must be what began
    identity = log.store.url, history.versions[0].sha256, spec.model_dump(mode="json"), named, code.identity
    name = kept_as(model, *identity)
    targets = {made.rolled_back_to for made in history.versions if made.rolled_back_to is not None}
    kept = Kept(VersionLog(stores(to), name), targets)
    run = BacktestRun(log, history, spec, [stores(url) for url in archives], kept, start, device, stores)
    run.check()
    return run


def told(run: "BacktestRun") -> Backtest:
    """What has come of a run that has gone through; the page is written, and the alias that other commands go by is set."""
    result, points = _result(run)
    log = run.kept.log
    promote(log, BatchSettings().alias, log.head())
    log.store.write(f"{log.model}.html", backtested(result, points).encode())
    return result


class BacktestRun:
    """A backtest on its way."""

    def __init__(
        self,
        log: VersionLog,
        history: History,
        spec: Spec,
        archives: Sequence[Store],
        kept: Kept,
        start: Snapshot | str | None,
        device: Device,
        stores: Callable[[str], Store],
    ) -> None:
        """`start`: what the start is trained on, where the caller says it. `kept` has not been read yet."""
        self.log, self.history, self.spec, self.archives = log, history, spec, archives
        self.kept, self.start, self.device, self.stores = kept, start, device, stores
        self.clock = Clock()
        """Says when the next version is stored."""
        self.steps: Steps | None = None
        self.pending: list[Consumed] = []
        """Trained on since the last version that is stored."""

    # ---- before ------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises what `backtest` raises of places, archives and specs, before anything is trained."""
        check_place(self.kept.log.store, self.log, self.archives)
        for made in self.history.versions:
            if made.kind == "batch":
                self._check_spec(made.number, self.spec.stated_task)
        self.kept.read()
        self._check_kept()
        versions = self._versions(self.kept.at + 1)
        check_archived((ref for version in versions for ref in _read_again(version.manifest.consumed)), self.archives)

    def _check_spec(self, number: int, task: str | None) -> None:
        theirs = spec_of(self.log, self.log.older(number))
        wanted, given = (", ".join(map(repr, spec.targets)) for spec in (theirs, self.spec))
        if wanted != given or task not in (None, theirs.task):
            asked = f"target {given}" if task is None else f"task {task!r} of target {given}"
            raise SpecError(
                f"version {number} of {self.log.url} is for task {theirs.task!r} of target {wanted}, the other spec for "
                f"{asked}: their errors cannot be compared. Give a spec of the same target and task."
            )

    def _check_kept(self) -> None:
        """Raises CorruptObject: what is kept has followed another history than the one that is there now."""
        for number, version in self.kept.reached.items():
            followed = followed_by(version)
            if number >= len(self.history.versions) or followed not in (None, self.history.versions[number].sha256):
                raise CorruptObject(
                    f"{self.kept.log.url} has followed {self.log.url} to a version {number} that is not the one there now, as "
                    f"after a restore. Remove {self.kept.log.url} and start the backtest again."
                )

    def _versions(self, first: int) -> Iterator[Version]:
        """Of the log, oldest first, up to the newest when this began."""
        last = self.history.head.version
        for begin in range(first, last + 1, _AT_ONCE):
            numbers = range(begin, min(begin + _AT_ONCE, last + 1))
            yield from concurrently(self.log.older, numbers, self.log.store.concurrency)

    # ---- the stream --------------------------------------------------------------------------------------------------
    def go_through(self) -> None:
        """Train from where the backtest stands up to the end of the log, and store it. Called again, it goes on from there."""
        self.kept.read()
        self.pending, self.steps = [], self._loaded()
        done = sum(len(version.manifest.consumed) for version in self.kept.reached.values())
        with under_way("backtest", unit="shards", total=len(self.history.shards) - done) as activity:
            for version in self._versions(self.kept.at + 1):
                number, manifest = version.number, version.manifest
                if manifest.kind == "batch":
                    self._store(number - 1)
                    self._begin(version)
                elif manifest.kind == "rollback":
                    self._store(number - 1)
                    self._go_back(version)
                for consumed in manifest.consumed:
                    self._train(consumed)
                    activity.advance(1, rows=self.pending[-1].rows)
                if number in self.kept.needed or self.clock.due():
                    self._store(number)
        self._store(self.history.head.version)

    def _train(self, consumed: Consumed) -> None:
        assert self.steps is not None, "a log begins with a batch training"
        ordinal = self.steps.learner.counters.shards
        before, result = train_again(self.steps, consumed, self.archives, scored=True)
        assert before is not None, "it was asked for"
        self.pending.append(
            consumed.model_copy(
                update={
                    "ordinal": ordinal,
                    "rows": result.rows,
                    "unlabelled": result.unlabelled,
                    "score": before.finite,
                    "champion": {},
                    "predicted": None,
                    "loss": result.loss if result.rows else None,
                }
            )
        )

    def _store(self, number: int) -> None:
        """Store that the backtest has come to a version of the log, unless it is stored."""
        if number > self.kept.at and self.steps is not None:
            self.kept.commit(number, self.history.versions[number].sha256, self.steps.learner, self.pending)
            self.pending = []

    def _loaded(self) -> Steps | None:
        """The learner as it is stored."""
        if (head := self.kept.head) is None:
            return None
        return Steps(load_learner(self.kept.log, head, self.device, allowed=own_modules(self.spec)))

    # ---- batch trainings and rollbacks -------------------------------------------------------------------------------
    def _begin(self, version: Version) -> None:
        """Where the log has a batch training: the same version, if this spec made it; else a training with this spec.

        A later one whose dataset is no longer there is passed over, and the notes say so.
        """
        if self._copied(version) or self._made_before(version) or self._trained(version):
            self.steps = self._loaded()
        if version.number == 0 and self.steps is not None:
            self._check_spec(0, self.steps.learner.spec.task)

    def _copied(self, version: Version) -> bool:
        """Whether it is the log's own version: this spec made it, and its blobs are still there."""
        if (version.number == 0 and self.start is not None) or asked_of(self.log, version) != self.spec:
            return False
        try:
            self.kept.copy(self.log, version)
        except UnknownVersion:
            return False
        return True

    def _made_before(self, version: Version) -> bool:
        """Whether this spec was trained on the same dataset before, which gives the same bits."""
        dataset = version.manifest.dataset
        if dataset is None or (earlier := self.kept.trained_on(dataset.fingerprint)) is None:
            return False
        self.kept.go_back(version.number, earlier)
        return True

    def _trained(self, version: Version) -> bool:
        """Whether a batch training with this spec has been made; not if its dataset is gone and this is not the start."""
        try:
            data = self._dataset(version)
        except (DatasetChanged, DatasetError, StoreNotFound) as error:
            if version.number == 0:
                raise
            logger.warning("the backtest goes on without a batch training: %s", error)
            return False
        log, steps = self.kept.log, replace(PLAIN, take_snapshot=lambda *_: data)
        settings = BatchSettings(device=self.device)
        info = train_by(steps, data.ref.url, log.store.url, log.model, self.spec, settings, self.stores)
        self.kept.add(version.number, log.version(info.version))
        return True

    def _dataset(self, version: Version) -> Snapshot:
        if version.number == 0 and self.start is not None:
            return self.start if isinstance(self.start, Snapshot) else take_snapshot(self.start, None, self.stores)
        return dataset_of(self.log, version, self.archives, self.stores)

    def _go_back(self, version: Version) -> None:
        """Where the log goes back to an older version."""
        target = version.manifest.rolled_back_to
        found = None if target is None else self.kept.reached.get(target)
        if found is None:
            raise UnknownVersion(
                f"version {version.number} of {self.log.url} goes back to version {target}, which this backtest had passed by "
                f"before. Remove {self.kept.log.url} and start it again."
            )
        self.kept.go_back(version.number, found)
        self.steps = self._loaded()


def _read_again(consumed: Iterable[Consumed]) -> Iterator[ShardRef]:
    """What must be in an archive, so that these can be trained on again."""
    for shard in consumed:
        if shard.rows:  # else no label came in time, and it was only counted
            yield from (shard, *shard.labels, *(shard.joined or ()))


# ---- what comes of it ------------------------------------------------------------------------------------------------
def _result(run: BacktestRun) -> tuple[Backtest, list[Stretch]]:
    """The result, and the points of its chart: from the two histories as they are stored."""
    log, kept, history = run.log, run.kept, run.history
    mine = HistoryReader(kept.log, _ALL).read()
    pairs = paired(history, [(shard.key, shard.score) for _, shard in mine.shards])
    metric = _metric(history, spec_of(log, log.version(history.head.version)), spec_of(kept.log, kept.log.head()))
    between = difference(pairs, metric)
    result = ShownBacktest(
        registry=log.store.url,
        model=log.model,
        head=history.head.version,
        metric=metric,
        lower_is_better=metric != "accuracy",
        stretches=tuple(cut(pairs, metric)),
        total=whole(pairs, metric),
        difference=None if between is None else between[0],
        standard_error=None if between is None else between[1],
        same=same(pairs),
        notes=tuple(_notes(run)),
        kept_in=kept.log.store.url,
        kept_as=kept.log.model,
        page=f"{kept.log.store.url}/{kept.log.model}.html",
    )
    return result, cut(pairs, metric, POINTS)


def _metric(history: History, theirs: Spec, mine: Spec) -> str:
    """By what they are compared: what the gate goes by; of classes the accuracy where the losses are not the same measure."""
    parts = ("loss_name", "class_weights", "sample_weight")
    if mine.task == "regression" or all(getattr(mine, part) == getattr(theirs, part) for part in parts):
        return history.metric
    return "accuracy"


def _notes(run: BacktestRun) -> Iterator[str]:
    """How it came about, one sentence each: what a reader of the numbers must know."""
    kept = run.kept
    for made in run.history.versions:
        if made.kind != "batch":
            continue
        found = kept.reached.get(made.number)
        if found is None or found.manifest.kind == "online":
            yield (
                f"Version {made.number:,} of the log is a batch training whose dataset is no longer what it was: the backtest "
                "went on without it."
            )
        elif found.manifest.kind == "batch":
            ref = found.manifest.dataset
            where = "" if ref is None else f" on {ref.url}, {ref.rows:,} rows"
            how = "the log's own" if found.manifest.run is None else f"trained anew with the other spec{where}"
            yield f"Version {made.number:,} of the log is a batch training: {how}."
    if run.history.rejected:
        yield f"The log rejected {len(run.history.rejected):,} shards: they are no part of the backtest."
    yield "The other spec is shown as a learner that is never held back: no gate decides which of its versions serves."

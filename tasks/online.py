"""Online training, one protocol step at a time: find shards, score and train on them, commit, then dispose of them.

`step` is the protocol of `docs/guarantees.md`, top to bottom. Killed anywhere, it is simply run again: what is not in a
committed version has not happened, and what is committed is not done twice.
"""

import enum
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from storage.errors import (
    HeadMoved,
    NotReady,
    PermissionDenied,
    ShardRejected,
    UnknownVersion,
    UnsupportedStore,
    on_one_line,
)
from storage.inbox import Inbox, Shard, quarantine_key, settle
from storage.log import Version, VersionLog
from storage.manifest import Blobs, Consumed, Entry, Owed, Rejected
from storage.probe import check_preconditions
from storage.store import ObjectInfo, Store
from storage.tombstones import Tombstones
from storage.urls import open_store
from tasks.provenance import code_revision
from tasks.report import OnlineReport
from tasks.settings import OnlineSettings
from tasks.training.environment import differences, environment
from tasks.training.errors import ColumnError, NonFiniteLoss
from tasks.training.learner import Learner
from tasks.training.loop import PassResult, score, train_shard
from tasks.versions import load_learner

logger = logging.getLogger("tidemill.online")

LISTED_AHEAD = 10_000
"""How many shards one listing of the inbox hands to the following steps: listing again for each would cost O(inbox) a step."""
SETTLE_AGAIN_SECONDS = 60.0
"""How often a deletion that was denied is tried again."""


class Outcome(enum.Enum):
    """How a step ended."""

    COMMITTED = "committed"
    IDLE = "idle"
    """Nothing in the inbox can be trained on now."""
    LOST = "lost"
    """Another run committed first. The work was discarded; the next step starts from the new head."""


@dataclass(frozen=True)
class Step:
    """What one step did."""

    outcome: Outcome
    version: int | None = None
    """The version that was committed."""


@dataclass
class _Loaded:
    """A committed version in memory. Dropped whenever a step does not end in the commit of exactly this memory."""

    version: Version
    learner: Learner
    tombstones: Tombstones
    owed: tuple[Owed, ...]
    settled_at: float


class OnlineRun:
    """An open registry and inbox, and what the steps keep in memory between them."""

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
            UnknownModel, StoreNotFound, UnsupportedStore: see there.
        """
        self.settings, self._open_store = settings, stores
        self._opened: dict[str, Store] = {}
        self.log = VersionLog(self.stores(registry), model)
        self.inbox = Inbox(self.stores(inbox))
        if settings.archive_to is not None:
            archive = self.stores(settings.archive_to).url
            if f"{archive}/".startswith(f"{self.inbox.url}/"):
                raise UnsupportedStore(
                    f"archive_to={archive} lies inside the inbox {self.inbox.url}; choose one outside."
                )
        check_preconditions(self.log.store)
        try:
            check_preconditions(self.inbox.store)
        except PermissionDenied:  # a consumer need not be allowed to write there: then each delete compares for itself
            self.inbox.store.conditional_delete = False
        self.report = OnlineReport(model=model, head=self.log.head().number)
        self._loaded: _Loaded | None = None
        self._ahead: deque[ObjectInfo] = deque()
        self._warned: set[str] = set()

    def stores(self, url: str) -> Store:
        """The store at this URL, opened once: what was found out about it is kept."""
        if (store := self._opened.get(url)) is None:
            store = self._open_store(url)
            store = self._opened[url] = self._opened.setdefault(store.url, store)
        return store

    def forget(self) -> None:
        """Drop the memory: the next step starts from what is stored."""
        self._loaded = None
        self._ahead.clear()

    # ---- the parts of a step -----------------------------------------------------------------------------------------
    def load(self) -> _Loaded:
        """The head, verified, and the learner as it was committed; its debts settled, now that it has been read back.

        Raises:
            HeadMoved: while it was read, others went on and retention removed it.
        """
        if (loaded := self._loaded) is None:
            version = self.log.head()
            try:
                learner, tombstones = load_learner(self.log, version), self.log.tombstones(version)
            except UnknownVersion as error:
                if self.log.head().number == version.number:
                    raise
                raise HeadMoved(
                    f"{self.log.url}: retention has removed version {version.number}, the head before."
                ) from error
            manifest = version.manifest
            if changed := differences(manifest.environment, environment()):
                self._warn(f"bits may differ from those of the run before: {'; '.join(changed)}")
            owed = settle(self.log, manifest.owed, self.stores)
            loaded = self._loaded = _Loaded(version, learner, tombstones, owed, time.monotonic())
        elif loaded.owed and time.monotonic() - loaded.settled_at > SETTLE_AGAIN_SECONDS:
            loaded.owed, loaded.settled_at = settle(self.log, loaded.owed, self.stores), time.monotonic()
        self.report.head, self.report.owed = loaded.version.number, len(loaded.owed)
        return loaded

    def select(self) -> list[ObjectInfo]:
        """The next of the listed shards, in the order of training: at most `max_shards`, and of `max_bytes` together (or one)."""
        chosen: list[ObjectInfo] = []
        size = 0
        while self._ahead and len(chosen) < self.settings.max_shards:
            size += self._ahead[0].size
            if chosen and size > self.settings.max_bytes:
                break
            chosen.append(self._ahead.popleft())
        return chosen

    def look(self, loaded: _Loaded) -> None:
        """List the inbox for the coming steps; remove what was consumed before and has been sent again."""
        owed = {(debt.inbox, debt.key, debt.etag) for debt in loaded.owed}

        def consumed_as(info: ObjectInfo) -> str | None:
            return loaded.tombstones.sha256_of(self.inbox.url, info.key, info.etag)

        def known(info: ObjectInfo) -> bool:
            return (self.inbox.url, info.key, info.etag) in owed or consumed_as(info) is not None

        listing = self.inbox.list(LISTED_AHEAD, known)
        if self.settings.after_commit != "keep":
            for info in listing.known:
                digest = consumed_as(info)
                if digest is not None and (self.inbox.url, info.key, info.etag) not in owed:
                    self._remove_duplicate(loaded, info, digest)
        for info in listing.shards:
            if info.size <= self.settings.max_shard_bytes:
                self._ahead.append(info)
                continue
            self._warn(
                f"{self.inbox.url}/{info.key} has {info.size:,} bytes, more than max_shard_bytes="
                f"{self.settings.max_shard_bytes:,}; it stays in the inbox. Split it, or raise the limit."
            )
        self.report.waiting, self.report.oldest_waiting = listing.waiting, listing.oldest

    @property
    def listed(self) -> bool:
        """True while shards of the last listing are left."""
        return bool(self._ahead)

    def _remove_duplicate(self, loaded: _Loaded, info: ObjectInfo, digest: str) -> None:
        """Remove a shard that was consumed before; if that is denied, it is owed like any other, and so remembered."""
        debt = Owed(inbox=self.inbox.url, key=info.key, sha256=digest, etag=info.etag, then="delete")
        logger.info(
            "%s/%s was consumed before and sent again: removed, not trained on", self.inbox.url, on_one_line(info.key)
        )
        loaded.owed += settle(self.log, [debt], self.stores)
        self.report.duplicates += 1

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(on_one_line(message))

    # ---- reading, scoring, training ----------------------------------------------------------------------------------
    def train(self, loaded: _Loaded, candidates: list[ObjectInfo]) -> "Trained":
        """Read, validate, score and train on the candidates, shard by shard, in order. Changes `loaded.learner`.

        A shard that cannot be used is rejected before the model is touched. One whose training gives a loss that is not
        finite is rejected too, and the others are trained again from the head as if it had not been there.

        Raises:
            HeadMoved: another run committed before that.
        """
        refused: dict[str, str] = {}
        while (work := self._train_all(loaded, candidates, refused)) is None:
            before, self._loaded = loaded.version, None
            loaded = self.load()
            if loaded.version != before:  # which may have consumed or rejected the candidates
                raise HeadMoved(
                    f"{self.log.url}: another run committed while a shard was refused; this attempt is discarded."
                )
        return work

    def _train_all(self, loaded: _Loaded, candidates: list[ObjectInfo], refused: dict[str, str]) -> "Trained | None":
        """The work, or None if a shard broke the learner; that one is then among the refused."""
        work = Trained(loaded)
        for i, info in enumerate(candidates):
            if work.rows >= self.settings.max_rows:
                self._ahead.extendleft(reversed(candidates[i:]))
                break
            if (reason := self._train_one(work, info, refused)) is not None:
                refused[info.key] = reason
                return None
        return work

    def _train_one(self, work: "Trained", info: ObjectInfo, refused: dict[str, str]) -> str | None:
        """Add one shard to the work; the reason if training on it broke the learner."""
        shard = self.inbox.read(info)
        if shard is None:
            return None
        if work.loaded.tombstones.has(self.inbox.url, info.key, shard.sha256):
            if self.settings.after_commit != "keep":
                self._remove_duplicate(work.loaded, info, shard.sha256)
            return None
        learner = work.loaded.learner
        try:
            if info.key in refused:
                raise ShardRejected(refused[info.key])
            groups = shard.row_groups()
            learner.features.check(groups[0].schema, info.key)
            before = score(learner, groups)
        except NotReady as unready:
            if self.inbox.is_stable(info, self.settings.grace_seconds):
                work.rejected.append(shard.rejected(str(unready)))
            return None
        except (ShardRejected, ColumnError) as unusable:
            work.rejected.append(shard.rejected(str(unusable)))
            return None
        ordinal = learner.counters.shards
        try:
            result = train_shard(learner, groups, self.settings.passes)
        except NonFiniteLoss as broken:
            return str(broken)
        scored = {n: v for n, v in {"loss": before.loss, **before.metrics}.items() if math.isfinite(v)}
        work.add(shard, ordinal, scored, result, self.settings.passes)
        return None

    # ---- committing --------------------------------------------------------------------------------------------------
    def commit(self, work: "Trained") -> Version:
        """Write the blobs, then create the manifest.

        Raises:
            HeadMoved: another run was faster; nothing of this work counts.
        """
        loaded, number = work.loaded, work.loaded.version.number + 1
        owed = (*loaded.owed, *self._debts(work, number))
        tombstones = loaded.tombstones.copy()
        for shard in work.consumed:
            tombstones.add(shard.inbox, shard.key, shard.sha256, shard.etag)
        if self.settings.after_commit != "keep":  # what is kept in the inbox must be remembered for as long
            tombstones.prune(keep=((debt.inbox, debt.key, debt.sha256) for debt in owed))
        weights, state = loaded.learner.dump()
        blobs = Blobs(
            weights=self.log.write_blob(number, "safetensors", weights),
            state=self.log.write_blob(number, "state.safetensors", state),
            tombstones=self.log.write_blob(number, "tombstones.jsonl", tombstones.encode()),
        )
        entry = Entry(
            kind="online",
            spec=loaded.version.manifest.spec,
            blobs=blobs,
            consumed=tuple(work.consumed),
            rejected=tuple(work.rejected),
            owed=owed,
            metrics=work.metrics(),
            counters=asdict(loaded.learner.counters),
            code=code_revision(),
            environment=environment(),
        )
        version = self.log.commit(loaded.version, entry)
        self._loaded = _Loaded(version, loaded.learner, tombstones, owed, time.monotonic())
        self.report.add(version.manifest.consumed, version.manifest.rejected, number)
        self.report.head = number
        self.report.waiting = max(0, self.report.waiting - len(work.consumed) - len(work.rejected))
        return version

    def _debts(self, work: "Trained", number: int) -> list[Owed]:
        then, to = self.settings.after_commit, self.settings.archive_to
        debts = [
            Owed(inbox=s.inbox, key=s.key, sha256=s.sha256, etag=s.etag, then=then, to=to)
            for s in work.consumed
            if then != "keep"
        ]
        return debts + [
            Owed(
                inbox=s.inbox,
                key=s.key,
                sha256=s.sha256,
                etag=s.etag,
                then="quarantine",
                to=quarantine_key(self.log.model, number, s.sha256, s.key),
                reason=s.reason,
            )
            for s in work.rejected
        ]

    def settle(self) -> None:
        """Dispose of what the version just committed is done with."""
        if (loaded := self._loaded) is not None:
            loaded.owed, loaded.settled_at = settle(self.log, loaded.owed, self.stores), time.monotonic()
            self.report.owed = len(loaded.owed)


@dataclass
class Trained:
    """Work on top of a loaded version that is not committed yet."""

    loaded: _Loaded
    consumed: list[Consumed] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    rows: int = 0

    def add(self, shard: Shard, ordinal: int, before: dict[str, float], result: PassResult, passes: int) -> None:
        self.rows += result.rows
        self.consumed.append(
            Consumed(
                inbox=shard.inbox,
                key=shard.info.key,
                sha256=shard.sha256,
                etag=shard.info.etag,
                size=shard.info.size,
                last_modified=shard.info.last_modified,
                ordinal=ordinal,
                rows=result.rows,
                unlabelled=result.unlabelled,
                score=before,
                loss=result.loss if result.rows else None,
                passes=passes,
            )
        )

    def __str__(self) -> str:
        parts = [f"shards {len(self.consumed)}", f"rows {self.rows:,}"]
        if unlabelled := sum(shard.unlabelled for shard in self.consumed):
            parts.append(f"rows without a label {unlabelled:,}")
        if self.rejected:
            parts.append(f"rejected {len(self.rejected)}")
        if (loss := self.metrics().get("loss")) is not None:
            parts.append(f"loss before training {loss:.4g}")
        return ", ".join(parts)

    def metrics(self) -> dict[str, float]:
        """Prequential metrics of this commit's shards, weighted by rows."""
        names = {name for shard in self.consumed for name in shard.score}
        return {
            name: sum(s.score[name] * s.rows for s in scored) / sum(s.rows for s in scored)
            for name in sorted(names)
            if (scored := [s for s in self.consumed if name in s.score])
        }


def open_run(inbox: str, registry: str, model: str, settings: OnlineSettings) -> OnlineRun:
    """Open the registry and the inbox; see `OnlineRun`."""
    return OnlineRun(inbox, registry, model, settings)


def step(run: OnlineRun) -> Step:
    """One step of the protocol. Whatever it raises, nothing half done stays in memory: the next call reloads the head."""
    try:
        loaded = run.load()  # 1 head, 2 verified blobs, 3 debts of the head
        looked = False
        while True:
            if not run.listed:
                if looked:
                    return Step(Outcome.IDLE)
                run.look(loaded)  # 4 the inbox, oldest first
                looked = True
            work = run.train(loaded, run.select())  # 5 read and validate, 6 score, then train
            if work.consumed or work.rejected:
                break
        version = run.commit(work)  # 7 blobs, 8 the manifest
        run.settle()  # 9
    except HeadMoved as moved:
        logger.info(str(moved))
        run.forget()
        run.report.lost_races += 1
        return Step(Outcome.LOST)
    except BaseException:
        run.forget()
        raise
    logger.info("version %d: %s", version.number, work)
    return Step(Outcome.COMMITTED, version.number)

"""Online training, one protocol step at a time: find shards, score and train on them, commit, then dispose of them.

`step` is the protocol of `docs/guarantees.md`, top to bottom. Killed anywhere, it is simply run again: what is not in a
committed version has not happened, and what is committed is not done twice.
"""

import enum
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar

import pyarrow as pa

from tidemill.storage.aliases import Alias, find_alias
from tidemill.storage.disposal import dispose, quarantine_key
from tidemill.storage.errors import (
    HeadMoved,
    NotFound,
    NotReady,
    PreconditionFailed,
    ShardRejected,
    UnknownVersion,
    on_one_line,
)
from tidemill.storage.inbox import Inbox
from tidemill.storage.log import Version, VersionLog
from tidemill.storage.manifest import Blobs, Consumed, Entry, Gate, Owed, TombstonesRef
from tidemill.storage.overlap import (
    Relation,
    keep_out_of_dataset,
    keep_out_of_inbox,
    keep_out_of_registry,
    named_datasets,
    relation,
)
from tidemill.storage.parallel import concurrently
from tidemill.storage.probe import check_inbox, check_preconditions
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store
from tidemill.tasks.batch import VersionInfo
from tidemill.tasks.online.delayed import BadLabels, DelayedLabels
from tidemill.tasks.online.gate import Champion, GateClosed, decide
from tidemill.tasks.online.reading import Reader, Ready, read_shard
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.triggers import Reason, Seen, Trigger
from tidemill.tasks.online.work import Loaded, Scored, Trained
from tidemill.tasks.scores import Summary
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.environment import code_revision, differences, environment
from tidemill.tasks.training.errors import ColumnError, NonFiniteLoss
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import score, train_shard
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.versions import load_learner, spec_of

logger = logging.getLogger("tidemill.online")

_RETRAIN_ON = "gate.after_refusals.retrain_on"

LISTED_AHEAD = 10_000
"""How many shards one listing of the inbox hands to the following steps: listing again for each would cost O(inbox) a step."""
PASSED_OVER = 1000
"""After so many versions that only rejected shards, those before them are not looked for when a run is opened."""
DISPOSE_AGAIN_SECONDS = 60.0
"""How often a deletion that was denied is tried again."""


T = TypeVar("T")


class Outcome(enum.Enum):
    """How a step ended."""

    COMMITTED = "committed"
    IDLE = "idle"
    """Nothing in the inbox can be trained on now."""
    LOST = "lost"
    """Another run committed first. The work was discarded; the next step starts from the new head."""
    RETRAIN = "retrain"
    """So many versions in a row were refused that the settings ask for a batch training."""


@dataclass(frozen=True)
class Step:
    """What one step did."""

    outcome: Outcome
    version: int | None = None
    """The version that was committed."""


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
            UnknownModel, StoreNotFound, UnsupportedStore, PlacesOverlap.
        """
        self.settings, self._open_store = settings, stores
        self._opened: dict[str, Store] = {}
        self._spellings: dict[str, str] = {}
        self.log = VersionLog(self.stores(registry), model)
        self.inbox = Inbox(self.stores(inbox))
        labels = None if settings.labels is None else Inbox(self.stores(settings.labels.inbox))
        self._inboxes = [self.inbox] if labels is None else [self.inbox, labels]
        self._check_places(self._inboxes)
        check_preconditions(self.log.store)
        self._certify(self.inbox)
        self.report = OnlineReport(model=model, head=self.log.head().number)
        self.champion = Champion(self.log, settings)
        self.delayed: DelayedLabels | None = None
        if labels is not None and settings.labels is not None:
            self._certify(labels)
            self.delayed = DelayedLabels(self.log, labels, settings.labels.key, settings, self._warn)
        self._loaded: Loaded | None = None
        self._reader: Reader | None = None
        """Of the last listing."""
        self._listed_all_known = False
        """Whether the last listing had all shards that the inbox holds and that were consumed before."""
        self._fired: list[Reason] = []
        """Why the shards of the last listing are trained on."""
        self._trigger: tuple[Version, Trigger] | None = None
        self._warned: set[str] = set()

    def _certify(self, inbox: Inbox) -> None:
        check_inbox(inbox.store)

    def _check_places(self, inboxes: Sequence[Inbox]) -> None:
        """Every object below an inbox is a shard, to be consumed and removed: no other place may be, hold or lie in one.

        Raises:
            PlacesOverlap: before anything is written.
        """
        settings = self.settings
        given = {
            "after_commit.archive_to": settings.archive_to,
            "gate.holdout_dataset": settings.gate.holdout_dataset,
            _RETRAIN_ON: settings.gate.retrain_on,
        }
        places = {name: self.stores(url).url for name, url in given.items() if url is not None}
        trained_on = {f"the dataset of version {number}": url for url, number in named_datasets(self.log).items()}
        others = [("the registry", self.log.store.url), *places.items(), *trained_on.items()]
        for inbox, name in zip(inboxes, ("the inbox", "the labels inbox"), strict=False):
            keep_out_of_inbox(inbox.url, others, name)
            others.append((name, inbox.url))
        if (archive := places.get("after_commit.archive_to")) is not None:
            keep_out_of_registry(self.log.url, "after_commit.archive_to", archive)
            if len(inboxes) > 1:  # features and labels lie there apart, under one name each
                datasets = trained_on | {name: url for name, url in places.items() if name == _RETRAIN_ON}
                for name, url in datasets.items():
                    lies_apart = ("after_commit.archive_to, where features and labels lie apart", archive)
                    keep_out_of_dataset(url, [lies_apart], name)
        if (retrain_on := places.get(_RETRAIN_ON)) is not None:
            keep_out_of_dataset(retrain_on, [("the registry", self.log.url)], _RETRAIN_ON)

    def _spelled(self, url: str) -> str:
        """The URL by which this run knows an inbox, however an earlier run spelled it."""
        if (spelled := self._spellings.get(url)) is None:
            mine = (one.url for one in self._inboxes if relation(url, one.url) is Relation.SAME)
            spelled = self._spellings[url] = next(mine, url)
        return spelled

    def stores(self, url: str) -> Store:
        """The store at this URL, opened once: what was found out about it is kept."""
        if (store := self._opened.get(url)) is None:
            store = self._open_store(url)
            store = self._opened[url] = self._opened.setdefault(store.url, store)
        return store

    def _disposed(self, owed: Sequence[Owed]) -> tuple[Owed, ...]:
        """What is left of these debts, which may be of other inboxes than this run's."""
        for url in {debt.inbox for debt in owed}:
            self._certify(Inbox(self.stores(url)))
        return dispose(self.log, owed, self.stores)

    def forget(self) -> None:
        """Drop the memory: the next step starts from what is stored."""
        self._loaded = None
        if self._reader is not None:
            self._reader.close()

    # ---- the parts of a step -----------------------------------------------------------------------------------------
    def load(self) -> Loaded:
        """The head, verified, and the learner as it was committed; its debts settled, now that it has been read back.

        Raises:
            HeadMoved: while it was read, others went on and retention removed it.
        """
        if (loaded := self._loaded) is None:
            version = self.log.head()
            try:
                learner = load_learner(self.log, version, self.settings.device)
                tombstones = self.log.tombstones(version)
            except UnknownVersion as error:
                if self.log.head().number == version.number:
                    raise
                raise HeadMoved(
                    f"{self.log.url}: retention has removed version {version.number}, the head before."
                ) from error
            manifest = version.manifest
            if changed := differences(manifest.environment, environment()):
                self._warn(f"bits may differ from those of the run before: {'; '.join(changed)}")
            inboxes = {inbox for inbox, _, _ in tombstones}
            if others := {url: spelled for url in inboxes if (spelled := self._spelled(url)) != url}:
                tombstones.respell(others)
            self.log.make_durable(version)  # before its debts are paid
            owed = self._disposed(manifest.owed)
            self.champion.follow(version, learner)
            loaded = self._loaded = Loaded(
                version, Steps(learner), tombstones, owed, time.monotonic(), *self._past(version)
            )
        elif loaded.owed and time.monotonic() - loaded.disposed_at > DISPOSE_AGAIN_SECONDS:
            self.log.check(loaded.version)
            loaded.owed, loaded.disposed_at = self._disposed(loaded.owed), time.monotonic()
        self.report.head, self.report.owed = loaded.version.number, len(loaded.owed)
        return loaded

    def _past(self, head: Version) -> tuple[deque[Consumed], Summary, Gate | None]:
        """What was scored lately on the way to this head: the window, the summary of all, the last decision.

        Versions that only rejected are passed over, but not without end: a history may hold any number of them.
        """
        settings = self.settings
        size = max(
            settings.gate.recent_shards, settings.train_when.recent_shards if settings.train_when.by_score else 0
        )
        window: deque[Consumed] = deque(maxlen=size)
        gate: Gate | None = None
        passed_over = 0
        for version in self.log.history(head):
            if version.manifest.kind != "online" or len(window) == size or passed_over == PASSED_OVER:
                break
            passed_over += not version.manifest.consumed
            gate = gate or version.manifest.gate
            for shard in version.manifest.consumed[::-1][: size - len(window)]:
                window.appendleft(shard)
        return window, Summary.model_validate(head.manifest.metrics.get("cumulative", {})), gate

    def look(self, loaded: Loaded) -> None:
        """List the inbox for the coming steps; remove what was consumed before and has been sent again."""
        labels: list[ObjectInfo] = []
        if self.delayed is not None:
            theirs = self.delayed.inbox
            labels = self.delayed.look(self._known(loaded, theirs), partial(self._fits, theirs))
            self._remove_duplicates(loaded, self.delayed.inbox, labels)
        listing = self.inbox.list(LISTED_AHEAD, self._known(loaded, self.inbox), self._can_be_used)
        self._remove_duplicates(loaded, self.inbox, listing.known)
        self._listed_all_known = max(len(labels), len(listing.known)) < LISTED_AHEAD
        shards = listing.shards
        self.report.waiting, self.report.oldest_waiting = listing.waiting, listing.oldest
        self._fired = self._why(loaded, shards, backlog=len(shards) == LISTED_AHEAD)
        read = partial(read_shard, self.inbox, self.delayed, loaded.learner.features)
        self._reader = Reader(shards if self._fired else [], read, self._size, self.inbox.store.concurrency)

    def _size(self, info: ObjectInfo) -> int:
        """Bytes that are read for a shard: its labels come with it."""
        return info.size + (0 if self.delayed is None else self.delayed.size(info))

    def _can_be_used(self, info: ObjectInfo) -> bool:
        """Whether a shard in the inbox is small enough, and its labels have come."""
        return self._fits(self.inbox, info) and (self.delayed is None or self.delayed.have(info))

    def _fits(self, inbox: Inbox, info: ObjectInfo) -> bool:
        """Whether an object is small enough to be read whole; says so once if not."""
        if info.size <= (limit := self.settings.limits.max_shard_bytes):
            return True
        self._warn(
            f"{inbox.url}/{info.key} has {info.size:,} bytes, more than limits.max_shard_bytes={limit:,}; "
            "it stays in the inbox. Split it, or raise the limit."
        )
        return False

    def _why(self, loaded: Loaded, shards: list[ObjectInfo], *, backlog: bool) -> list[Reason]:
        """Why to train on what was listed; empty: the triggers say to wait."""
        if backlog:  # what is not listed would never count
            return ["backlog"]
        if self._trigger is None or self._trigger[0] != loaded.version:
            metric = loaded.learner.spec.main_metric
            past = [Seen(shard.rows, shard.score[metric]) for shard in loaded.window if metric in shard.score]
            self._trigger = loaded.version, Trigger(self.settings.train_when, past)

        def rows(info: ObjectInfo) -> int | None:
            return self._unless_gone(info, lambda: self.inbox.count_rows(info))

        def error(info: ObjectInfo) -> Seen | None:
            return self._unless_gone(info, lambda: self._waiting_error(loaded, info))

        return self._trigger[1].fired(shards, rows, error, datetime.now(UTC))

    def _unless_gone(self, info: ObjectInfo, ask: Callable[[], T | None]) -> T | None:
        """The answer, or None about a shard that has gone or is not whole yet. Raises ShardRejected if it never will be."""
        try:
            return ask()
        except (NotFound, PreconditionFailed):
            return None
        except NotReady as unready:
            if self.inbox.is_stable(info, self.settings.grace_seconds):
                raise ShardRejected(str(unready)) from unready
            return None
        except BadLabels as bad:
            raise ShardRejected(str(bad)) from bad

    def _waiting_error(self, loaded: Loaded, info: ObjectInfo) -> Seen | None:
        """How the head does on a shard that waits; None if it would not be trained on."""
        ready = read_shard(self.inbox, self.delayed, loaded.learner.features, info)
        if ready is None or loaded.tombstones.has(self.inbox.url, info.key, ready.shard.sha256):
            return None
        if (found := ready.complete()) is None:
            return None
        before = score(loaded.learner, found.groups)
        return Seen(before.rows, before.finite.get(loaded.learner.spec.main_metric, math.nan))

    @property
    def listed(self) -> bool:
        """True while shards of the last listing are left."""
        return bool(self._reader)

    def _known(self, loaded: Loaded, inbox: Inbox) -> Callable[[ObjectInfo], bool]:
        """Whether an object of an inbox was consumed before."""
        owed = {(self._spelled(debt.inbox), debt.key, debt.etag) for debt in loaded.owed}

        def known(info: ObjectInfo) -> bool:
            shard = (inbox.url, info.key, info.etag)
            return shard in owed or loaded.tombstones.sha256_of(*shard) is not None

        return known

    def _remove_duplicates(self, loaded: Loaded, inbox: Inbox, known: list[ObjectInfo]) -> None:
        """Remove what was consumed before and sent again, or kept; what is owed is being removed anyway."""
        if self.settings.after_commit == "keep":
            return
        owed = {(self._spelled(debt.inbox), debt.key, debt.etag) for debt in loaded.owed}
        duplicates = []
        for info in known:
            digest = loaded.tombstones.sha256_of(inbox.url, info.key, info.etag)
            if digest is not None and (inbox.url, info.key, info.etag) not in owed:
                duplicates.append((info, digest))
        self._remove(loaded, inbox, duplicates)

    def _remove(self, loaded: Loaded, inbox: Inbox, duplicates: list[tuple[ObjectInfo, str]]) -> None:
        """Remove shards (with their sha256) that were consumed before; what is denied is owed like any other, and remembered."""
        # Archived like others, since they may have been kept until now; an archive does not get twice what it holds.
        to = self.settings.archive_to
        then: Literal["delete", "archive"] = "delete" if to is None else "archive"
        debts = [
            Owed(inbox=inbox.url, key=info.key, sha256=digest, etag=info.etag, then=then, to=to)
            for info, digest in duplicates
        ]
        for debt in debts:
            logger.info("%s/%s was consumed before: removed, not trained on again", inbox.url, on_one_line(debt.key))
        if debts:
            self.log.check(loaded.version)  # whose memory they are removed on
        loaded.owed += self._disposed(debts)
        self.report.duplicates += len(debts)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(on_one_line(message))

    # ---- reading, scoring, training ----------------------------------------------------------------------------------
    def train(self, loaded: Loaded) -> Trained:
        """Validate, score and train on the next of the listed shards, one by one, in order. Changes `loaded.learner`.

        At most `max_shards`, of `max_bytes` together (or one), and none after `max_rows`. A shard that cannot be used is rejected
        before the model is touched. One whose training gives a loss that is not finite is rejected too, and the others are
        trained again from the head as if it had not been there.

        Raises:
            HeadMoved: another run committed before that.
        """
        assert self._reader is not None, "look() comes first"
        refused: dict[str, str] = {}
        while True:
            work, taken, size = Trained(loaded), list[ObjectInfo](), 0
            while self._reader and self._takes(len(taken), size + self._reader.upcoming.size, work.rows):
                info, ready = self._reader.take()
                taken.append(info)
                size += info.size
                reason = None if ready is None else self._train_one(work, ready, refused)
                if reason is not None:
                    refused[info.key] = reason
                    break
            else:
                return work
            before, self._loaded = loaded.version, None
            loaded = self.load()
            if loaded.version != before:  # which may have consumed or rejected the same shards
                raise HeadMoved(
                    f"{self.log.url}: another run committed while a shard was refused; this attempt is discarded."
                )
            self._reader.put_back(taken)

    def _takes(self, shards: int, size: int, rows: int) -> bool:
        """Whether a commit that has so many shards and rows takes one more, with which it has so many bytes."""
        limits = self.settings.limits
        return shards < limits.max_shards and rows < limits.max_rows and (not shards or size <= limits.max_bytes)

    def _train_one(self, work: Trained, ready: Ready, refused: dict[str, str]) -> str | None:
        """Add one shard to the work; the reason if training on it broke the learner."""
        shard, info, learner = ready.shard, ready.shard.info, work.loaded.learner
        if work.loaded.tombstones.has(self.inbox.url, info.key, shard.sha256):
            if self.settings.after_commit != "keep":
                self._remove(work.loaded, self.inbox, [(info, shard.sha256)])
            return None
        try:
            if info.key in refused:
                raise ShardRejected(refused[info.key])
            if (found := ready.complete()) is None:
                return None
            new_columns = self._new_columns(learner, found.groups[0].schema, info.key)
            before = score(learner, found.groups).finite
        except BadLabels as bad:
            work.rejected.append(bad.shard.rejected(str(bad)))  # the features wait for better ones
            return None
        except NotReady as unready:
            if self.inbox.is_stable(info, self.settings.grace_seconds):
                work.rejected.append(shard.rejected(str(unready)))
            return None
        except (ShardRejected, ColumnError) as unusable:
            work.rejected.append(shard.rejected(str(unusable)))
            return None
        ordinal = learner.counters.shards
        # The same weights give the same scores.
        same = not work.consumed and self.champion.is_version(work.loaded.version.number)
        scored = Scored(before, before if same else self.champion.score(found.groups))
        if self.delayed is not None:
            scored.predicted = self.delayed.predicted(work.loaded.version, info.last_modified, found.groups)
        try:
            result = train_shard(work.loaded.steps, found.groups, self.settings.passes)
        except (ColumnError, NonFiniteLoss) as broken:
            return str(broken)
        work.add(shard, found.labels, ordinal, scored, result, self.settings.passes)
        work.new_columns |= new_columns
        return None

    def _new_columns(self, learner: Learner, schema: pa.Schema, key: str) -> dict[str, str]:
        """Columns to record. Raises ShardRejected: the settings refuse them."""
        if self.settings.new_columns == "ignore" or not (found := learner.features.new_columns(schema)):
            return {}
        if self.settings.new_columns == "fail":
            raise ShardRejected(
                f"{key} has columns that the dataset of the batch training had not: {', '.join(found)}: drop them, set "
                "new_columns to add or ignore, or train a new model on a dataset that has them."
            )
        return found

    # ---- committing --------------------------------------------------------------------------------------------------
    def commit(self, work: Trained) -> Version:
        """Write the blobs, then create the manifest.

        Raises:
            HeadMoved: another run was faster; nothing of this work counts.
        """
        loaded, number = work.loaded, work.loaded.version.number + 1
        owed = (*loaded.owed, *self._debts(work, number))
        for shard in work.consumed_objects:
            loaded.tombstones.add(shard.inbox, shard.key, shard.sha256, shard.etag)
        weights, state = loaded.learner.dump()
        window = loaded.window.copy()
        window.extend(work.consumed)
        cumulative = loaded.cumulative.model_copy(deep=True)
        cumulative.add(work.consumed)
        recent = list(window)[-self.settings.gate.recent_shards :]
        gate, holdout = self._decide(work, recent)
        parts = [("safetensors", weights), ("state.safetensors", state)]
        refs = concurrently(lambda part: self.log.write_blob(number, *part), parts, self.log.store.concurrency)
        blobs = Blobs(weights=refs[0], state=refs[1], tombstones=self._remember(loaded, number, owed))
        entry = Entry(
            kind="online",
            spec=loaded.version.manifest.spec,
            blobs=blobs,
            consumed=tuple(work.consumed),
            rejected=tuple(work.rejected),
            owed=owed,
            fired=tuple(self._fired) if self.settings.train_when.given else (),
            gate=gate,
            new_columns=loaded.version.manifest.new_columns | work.new_columns,
            metrics=work.metrics()
            | {"window": Summary.of(recent).model_dump(), "cumulative": cumulative.model_dump()}
            | ({"holdout": holdout} if holdout else {}),
            counters=asdict(loaded.learner.counters),
            code=code_revision(),
            environment=environment(),
        )
        version = self.log.commit(loaded.version, entry)
        self._loaded = replace(
            loaded,
            version=version,
            owed=owed,
            disposed_at=time.monotonic(),
            window=window,
            cumulative=cumulative,
            gate=gate or loaded.gate,
        )
        self.report.add(version.manifest)
        self.report.head = number
        self.report.waiting = max(0, self.report.waiting - len(work.consumed) - len(work.rejected))
        return version

    def _remember(self, loaded: Loaded, number: int, owed: Sequence[Owed]) -> TombstonesRef | None:
        """Where version `number` finds its tombstones; they are stored, and old ones forgotten, when that is due."""
        if not self.log.tombstones_due(loaded.version, loaded.tombstones.loose):
            return self.log.named_tombstones(loaded.version)
        # What is in the inbox must be remembered: all that is kept, and what an earlier run has kept and is not removed yet.
        if self.settings.after_commit != "keep" and self._listed_all_known:
            mine = {self.inbox.url} | ({self.delayed.inbox.url} if self.delayed is not None else set())
            loaded.tombstones.prune(mine, keep=((debt.inbox, debt.key, debt.sha256) for debt in owed))
        return self.log.write_tombstones(number, loaded.tombstones)

    def _debts(self, work: Trained, number: int) -> list[Owed]:
        to = self.settings.archive_to
        then: Literal["delete", "archive"] = "delete" if to is None else "archive"
        debts = [
            Owed(inbox=s.inbox, key=s.key, sha256=s.sha256, etag=s.etag, then=then, to=to)
            for s in work.consumed_objects
            if self.settings.after_commit != "keep"
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

    def _decide(self, work: Trained, window: Iterable[Consumed]) -> tuple[Gate | None, dict[str, Any]]:
        """(whether the champion moves to the new version, the new version's scores on the holdout)."""
        settings, learner = self.settings, work.loaded.learner
        scored = self.champion.holdout(learner)
        on_holdout = {} if scored is None else {"rows": scored[0].rows, **scored[0].finite}
        if settings.gate.champion != "move" or self.champion.alias is None or not work.consumed:
            return None, on_holdout
        return decide(
            settings.gate, self.champion.alias, learner.spec.main_metric, window, scored, work.loaded.gate
        ), on_holdout

    def dispose(self) -> None:
        """Dispose of what the version just committed is done with; move the alias if it says so."""
        if (loaded := self._loaded) is not None:
            loaded.owed, loaded.disposed_at = self._disposed(loaded.owed), time.monotonic()
            self.champion.move_alias(loaded.version, loaded.learner)
            self.report.owed = len(loaded.owed)

    # ---- after many refusals -----------------------------------------------------------------------------------------
    def resolve(self, loaded: Loaded) -> "Step | None":
        """What the settings ask for when the head is one of too many versions refused in a row, or None.

        Raises:
            GateClosed: a person must decide.
            HeadMoved: another run was faster.
        """
        gate, settings, head = loaded.version.manifest.gate, self.settings.gate, loaded.version
        if gate is None or gate.refusals < settings.refusals or settings.after_refusals == "continue":
            return None
        if find_alias(self.log, settings.alias) != Alias(gate.champion, gate.moves):  # somebody has decided otherwise
            return None
        if settings.retrain_on is not None:
            return Step(Outcome.RETRAIN)
        if settings.after_refusals == "rollback":
            version = self.log.rollback(self.log.version(gate.champion), head)
            logger.warning("version %d: back to version %d, %d refusals", version.number, gate.champion, gate.refusals)
            self.forget()
            return Step(Outcome.COMMITTED, version.number)
        raise GateClosed(
            f"{self.log.url}: {gate.refusals} versions in a row, up to {head.number}, were worse than champion {gate.champion} "
            f"({gate.numbers}). Nothing more is trained on. `tidemill promote` accepts version {head.number}, `tidemill "
            f"rollback {gate.champion}` gives it up, `tidemill train` begins anew; the shards stay in the inbox."
        )


def open_run(inbox: str, registry: str, model: str, settings: OnlineSettings) -> OnlineRun:
    """Open the registry and the inbox; see `OnlineRun`."""
    return OnlineRun(inbox, registry, model, settings)


def retraining(run: OnlineRun) -> tuple[str, str, str, Spec, BatchSettings]:
    """Arguments of the batch training that `Outcome.RETRAIN` asks for: the head's spec, on the dataset of the settings."""
    settings, log = run.settings, run.log
    assert settings.gate.retrain_on is not None, "the settings ask for a dataset"
    batch_settings = BatchSettings(alias=settings.gate.alias, device=settings.device)
    return settings.gate.retrain_on, log.store.url, log.model, spec_of(log, log.head()), batch_settings


def retrained(run: OnlineRun, made: VersionInfo) -> None:
    """Go on from the batch training that `retraining` asked for.

    Raises:
        GateClosed: the dataset had not changed since it was trained on before, so that no new version was made.
    """
    run.forget()
    if made.version < run.log.head().number and not made.trained:
        raise GateClosed(
            f"{run.log.url}: {run.settings.gate.retrain_on} was trained on before, as version {made.version}, with this spec: "
            "retraining changes nothing. Archive consumed shards below it (after_commit.archive_to), or decide by hand: "
            "`tidemill promote`, `tidemill rollback`, or `tidemill train` with another spec."
        )


def step(run: OnlineRun) -> Step:
    """One step of the protocol. Whatever it raises, nothing half done stays in memory: the next call reloads the head."""
    try:
        loaded = run.load()  # 1 head, 2 verified blobs, 3 debts of the head
        if (resolved := run.resolve(loaded)) is not None:
            return resolved
        looked = False
        while True:
            if not run.listed:
                if looked:
                    return Step(Outcome.IDLE)
                run.look(loaded)  # 4 the inbox, oldest first
                looked = True
            work = run.train(loaded)  # 5 read and validate, 6 score, then train
            loaded = work.loaded  # read anew if a shard was refused
            if work.consumed or work.rejected:
                break
        version = run.commit(work)  # 7 blobs, 8 the manifest
        run.dispose()  # 9
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

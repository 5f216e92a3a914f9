"""Random histories: producers, trainers, retraining, rollback, requeue and garbage collection, interleaved, killed at any call.

`World` is one registry and one inbox in one process, everybody who works on them, and a model of what must follow: which
(key, bytes) were put, and which of them the log must hold once. `Machine` lets Hypothesis choose what they do.

A failure is printed as a short program of `state.rule(...)` lines, a line `@reproduce_failure(...)` and a seed. To play it
again, put that line above `class Machine` and run `tests/guarantees/test_machine.py`; or run it with `--hypothesis-seed=N`, and
with `--full` if it was, which draws the same examples as then. CI draws those of seed 0, `--full` those of a new seed.
"""

import os
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar, Literal
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.data import parquet, rows
from tests.guarantees.audit import audit
from tests.storage.faults import MEETS_ITSELF, Call, FaultStore
from tidemill.storage import disposal, retention
from tidemill.storage.aliases import all_aliases, promote
from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import (
    CorruptObject,
    HeadMoved,
    NotFound,
    PermissionDenied,
    StorageError,
    StoreNotFound,
    Unavailable,
    UnknownVersion,
)
from tidemill.storage.inbox import is_shard
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Manifest, decode, sha256
from tidemill.storage.memory import MemoryStore
from tidemill.storage.overlap import PLACES
from tidemill.storage.probe import check_preconditions
from tidemill.storage.refs import FileRef
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch, batch_run
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun, Outcome
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.spec import Spec

Pair = tuple[str, str]
"""What a shard is to the protocol: its key, and the sha256 of its bytes."""

SPEC = Spec.model_validate(
    {
        "features": ["a", "b"],
        "target": "y",
        "optimizer": {"name": "sgd", "arguments": {"momentum": 0.9}},
        "batch_size": 8,
        "epochs": 1,
    }
)

# ---- what producers put ----------------------------------------------------------------------------------------------
GOOD = [parquet(rows(5 + 3 * seed, 100 + seed, slope=3.0), row_group_size=8) for seed in range(5)]
BAD = [
    b"PAR1" + b"not a parquet file" * 10 + b"PAR1",
    parquet(rows(6, 1).drop_columns(["b"])),
    parquet(rows(6, 1).set_column(2, "y", [[1e38] * 6])),  # only training itself finds out
    parquet(rows(6, 1).slice(0, 0)),
]
HALF = GOOD[4][:200]
"""A shard that its producer is still writing."""
CONTENTS = {f"good-{i}": data for i, data in enumerate(GOOD)} | {
    "corrupt": BAD[0],
    "no column b": BAD[1],
    "breaks training": BAD[2],
    "no rows": BAD[3],
    "half written": HALF,
}
KEYS = ["m.parquet", "00-low.parquet", "a/b/1.parquet", "ünï code?versionId=1.parquet", "zz.parquet"]
HIDDEN = [".hidden.parquet", "m.parquet.tmp"]

SETTINGS = [
    OnlineSettings(limits={"max_shards": 2}, grace_seconds=3600, gate={"champion": "score"}),
    OnlineSettings(limits={"max_rows": 12}, passes=2, grace_seconds=0, gate={"champion": "score"}),
    OnlineSettings(limits={"max_shards": 1}, grace_seconds=3600, after_commit="keep", gate={"champion": "score"}),
]
"""One online run each. `World` adds a fourth, which archives. Only rules move aliases, so that the model knows where they are."""


# ---- what happens to an operation ------------------------------------------------------------------------------------
class Killed(BaseException):
    """The process dies here: no `except Exception` may live on."""


@dataclass(frozen=True)
class Fault:
    """At the storage call with this number, counted from the operation's start."""

    at: int
    kind: Literal["kill", "before", "after", "retried"]
    """before, after: Unavailable, the call applied or not. retried: the backend repeated a call that had been applied."""


@dataclass(frozen=True)
class Meanwhile:
    """Before the storage call with this number, somebody else does this: a method of `World` and its arguments."""

    at: int
    what: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """All that befalls one operation."""

    fault: Fault | None = None
    meanwhile: tuple[Meanwhile, ...] = ()
    denied: bool = False
    """It may not delete in the inbox."""


QUIET = Plan()


class Process:
    """One process: the stores that it opens carry out the plan of the operation that it is in."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._plan = QUIET
        self.calls = 0
        """Storage calls of the operation in hand, or of the last one."""
        self.busy = False
        self.read: set[Pair] = set()
        """What the operation in hand has read from the inbox."""
        self.online: OnlineRun | None = None

    @contextmanager
    def operation(self, plan: Plan) -> Iterator[None]:
        """One operation; ends early and quietly where the plan says so."""
        self._plan, self.calls, self.busy = plan, 0, True
        try:
            yield
        except Killed:
            self.online = None
        except Unavailable:
            if plan.fault is None:
                raise
        finally:
            self._plan, self.busy = QUIET, False
            self.read.clear()

    def stores(self, url: str) -> Store:
        hook = partial(self._hook, open_store(url).url)
        return FaultStore(self._world.protocol.wrap(open_store(url)), hook, concurrency=1)  # examples must replay

    def _hook(self, url: str, call: Call) -> None:
        inbox = url == self._world.inbox.url
        if call.phase == "before":
            self.calls += 1
            for other in self._plan.meanwhile:
                if other.at == self.calls:
                    getattr(self._world, other.what)(*other.arguments)
            if self._plan.denied and inbox and call.verb == "delete":
                raise PermissionDenied("the plan denies deletes")
            self._fail("kill", Killed())
            self._fail("before", Unavailable("not applied"))
            if call.verb == "delete" and "/blobs/" in call.key:
                self._world.keep_blob(call.key)
            return
        if inbox and call.verb == "read" and (digest := self._world.present(call.key)) is not None:
            self.read.add((call.key, digest))
        self._fail("after", Unavailable("applied, but the answer was lost"))
        if call.verb in MEETS_ITSELF:
            self._fail("retried", MEETS_ITSELF[call.verb]("this call itself, the first time"))

    def _fail(self, kind: str, error: BaseException) -> None:
        fault = self._plan.fault
        if fault is not None and (fault.at, fault.kind) == (self.calls, kind):
            raise error


# ---- the protocol, whole or broken -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Protocol:
    """What a world runs on: the product, or a variant that is broken on purpose (`test_controls.py`)."""

    rooms: Mapping[str, Any] = field(default_factory=dict)
    """What stands in place of one room's function, by its name in `tidemill.tasks.online.step`."""
    log: type[VersionLog] = VersionLog
    collect_garbage: Callable[[VersionLog, int], list[str]] = retention.collect_garbage
    wrap: Callable[[Store], Store] = lambda store: store

    @contextmanager
    def followed(self) -> Iterator[None]:
        """In this context, runs are opened and steps are taken by this protocol."""
        with ExitStack() as stack:
            for name, instead in self.rooms.items():
                stack.enter_context(patch.object(online, name, instead))
            yield


@cache
def begun() -> dict[str, bytes]:
    """A registry with version 0."""
    name = uuid.uuid4().hex
    MemoryStore(name, "dataset").write("part.parquet", parquet(rows(40, 0), row_group_size=20))
    batch.train(f"memory://{name}/dataset", f"memory://{name}/registry", "model", SPEC, BatchSettings(holdout=0))
    registry = MemoryStore(name, "registry")
    return {info.key: registry.read(info.key) for info in registry.list("model/")}


class World:
    """One registry and one inbox, everybody who works on them, and what must follow."""

    def __init__(self, base: str, protocol: Protocol = Protocol()) -> None:
        self.protocol = protocol
        self.registry, self.inbox, self.archive = (open_store(f"{base}/{n}") for n in ("registry", "inbox", "archive"))
        for key, data in begun().items():
            self.registry.write(key, data)
        # Whoever does not archive pays the debts of those who do; see the fixture in conftest.py, which ends this.
        os.environ[PLACES] = self.archive.url
        self.log = VersionLog(self.registry, "model")
        self.dataset = open_store(f"{base}/dataset")
        self.dataset.write("part.parquet", parquet(rows(30, 9), row_group_size=20))
        self.inbox.write(HIDDEN[0], GOOD[0])  # a local folder exists once something is in it
        for store in (self.registry, self.inbox):
            check_preconditions(store)  # once for this URL, so that it costs no trainer any calls

        self.settings = [
            *SETTINGS,
            OnlineSettings(after_commit={"archive_to": self.archive.url}, gate={"champion": "score"}),
        ]
        self.trainers = [Process(self) for _ in self.settings]

        self.bytes: dict[str, bytes] = {}
        """By sha256: all that was ever put into the inbox."""
        self.arrivals: Counter[Pair] = Counter()
        """How often."""
        self.replaced: set[Pair] = set()
        """What a producer once overwrote."""
        self.void: set[Pair] = set()
        """What was overwritten before anybody read it: nobody may consume it."""
        self.optional: set[Pair] = set()
        """What was overwritten while a trainer that had read it was in its step: that step may or may not commit."""
        self.hidden: dict[str, bytes] = {HIDDEN[0]: GOOD[0]}
        self.requeued: set[str] = set()

        self.manifests: list[bytes] = []
        self.versions: list[Manifest] = []
        self.retained: set[int] = set()
        """Versions whose blobs no garbage collection may have touched."""
        self.collections = 0
        self.collecting = False
        self.removed_blobs: dict[str, bytes] = {}
        self.look()

    # ---- what is there now -------------------------------------------------------------------------------------------
    def present(self, key: str) -> str | None:
        """sha256 of what is in the inbox at this key."""
        try:
            return sha256(self.inbox.read(key))
        except NotFound:
            return None

    def keep_blob(self, key: str) -> None:
        """Remember a blob that is about to be removed: the audit at the end trains all of history again."""
        with suppress(NotFound):
            self.removed_blobs[key] = self.registry.read(key)

    def look(self) -> None:
        """Take in the versions that were committed since the last look. Manifests are written once."""
        for number, data in enumerate(self.manifests):
            assert self._manifest(number) == data, f"version {number} was overwritten"
        while (data := self._manifest(number := len(self.manifests))) is not None:
            self.manifests.append(data)
            self.versions.append(decode(data, str(number)))
            self.retained.add(number)

    def _manifest(self, number: int) -> bytes | None:
        try:
            return self.registry.read(f"model/log/{number:08d}.json")
        except NotFound:
            return None

    @property
    def head(self) -> int:
        return len(self.versions) - 1

    def consumed(self) -> Counter[Pair]:
        return Counter((shard.key, shard.sha256) for version in self.versions for shard in version.consumed)

    def rejected(self) -> Counter[Pair]:
        return Counter((shard.key, shard.sha256) for version in self.versions for shard in version.rejected)

    # ---- producers ---------------------------------------------------------------------------------------------------
    def upload(self, key: str, data: bytes) -> None:
        """Put a shard, perhaps over another, perhaps once more; or what no trainer may touch, under a hidden name."""
        self.look()
        if not is_shard(key):
            self.inbox.write(key, data)
            self.hidden[key] = data
            return
        new, there = (key, sha256(data)), self.present(key)
        if there not in (None, new[1]):
            old = (key, there)
            self.replaced.add(old)
            if not self.consumed()[old] and not self.rejected()[old]:
                read = any(old in trainer.read for trainer in self.trainers)
                (self.optional if read else self.void).add(old)
        self.inbox.write(key, data)
        self._arrived(new, data)

    def produce(self, key: str, content: str) -> None:
        """`upload` by the name of the bytes, which is what a failure prints."""
        self.upload(key, CONTENTS[content])

    def _arrived(self, pair: Pair, data: bytes) -> None:
        self.bytes[pair[1]] = data
        self.arrivals[pair] += 1
        self.void.discard(pair)
        self.optional.discard(pair)

    def upload_again(self, choice: int) -> None:
        """Put a shard once more that was put at any time before."""
        if pairs := list(self.arrivals):
            key, digest = pairs[choice % len(pairs)]
            self.upload(key, self.bytes[digest])

    # ---- trainers ----------------------------------------------------------------------------------------------------
    def train(self, number: int, plan: Plan = QUIET) -> None:
        """One step of one online run, which is opened anew after a kill."""
        trainer = self.trainers[number]
        if trainer.busy:
            return
        with trainer.operation(plan), self.protocol.followed():
            if trainer.online is None:
                trainer.online = self._open(trainer.stores, self.settings[number])
            try:
                online.step(trainer.online)
            except UnknownVersion as error:  # were it only that others went on meanwhile, the race would be lost
                raise AssertionError(f"the head cannot be read: {error}") from error

    def _open(self, stores: Callable[[str], Store], settings: OnlineSettings) -> OnlineRun:
        return OnlineRun(self.inbox.url, self.registry.url, "model", settings, stores)

    def drain(self) -> None:
        """A new online run without faults, until it finds nothing more."""
        with self.protocol.followed():
            run = self._open(
                lambda url: self.protocol.wrap(open_store(url)),
                OnlineSettings(grace_seconds=0, gate={"champion": "score"}),
            )
            try:
                while (outcome := online.step(run).outcome) is not Outcome.IDLE:
                    assert outcome is Outcome.COMMITTED, "lost a race against nobody"
            except StorageError as error:
                raise AssertionError(f"a new run cannot go on: {error}") from error

    # ---- everybody else ----------------------------------------------------------------------------------------------
    def retrain(self, seed: int, plan: Plan = QUIET) -> None:
        """A batch run; the same seed is the same run."""
        self.look()
        before, process = self.collections, Process(self)
        spec, settings = SPEC.model_copy(update={"seed": seed}), BatchSettings(holdout=0)
        taken = snapshot(self.dataset.url)
        earlier = [v for v in self.versions if v.run == batch_run.run_key(taken, spec, settings)]
        with process.operation(plan):
            run = batch_run.BatchRun(
                taken, self.protocol.log(process.stores(self.registry.url), "model"), spec, settings
            )
            assert (run.registered is None) == (not earlier), "a run that had registered its version did not find it"
            if run.registered is None:
                while (epoch := run.next_epoch()) is not None:
                    batch.train_epoch(run, epoch)
                version = batch.register(run, batch.evaluate(run))
            else:
                version = run.registered[0]
                assert version.number == earlier[0].version, "a batch run found another version than its own"
            try:
                batch.finish(run, version)
            except UnknownVersion:  # it was killed before it moved the alias, and retention passed by
                kept = version.number in self.retained and self.collections == before
                assert not kept, f"version {version.number} cannot be promoted"

    def rollback(self, back: int, plan: Plan = QUIET) -> None:
        """Go back to an older version."""
        self.look()
        before, target = self.collections, max(0, self.head - back)
        process = Process(self)
        with process.operation(plan):
            log = self.protocol.log(process.stores(self.registry.url), "model")
            try:
                version = log.rollback(log.version(target)).manifest
            except HeadMoved:
                assert plan.meanwhile, "lost a race against nobody"
            except UnknownVersion:
                kept = target in self.retained and not self.collecting and self.collections == before
                assert not kept, f"version {target} cannot be gone back to"
            else:
                self.look()
                parent, then = self.versions[version.version - 1], self.versions[target]
                assert version.blobs.weights.sha256 == then.blobs.weights.sha256, "a rollback has other weights"
                assert version.owed == parent.owed, "a rollback dropped what was owed"
                remembered = {(key, digest) for _, key, digest in log.tombstones(log.version(version.version))}
                consumed = {(s.key, s.sha256) for v in self.versions[: version.version] for s in v.consumed}
                assert consumed <= remembered, "a rollback dropped the tombstones"

    def promote(self, alias: str, back: int, plan: Plan = QUIET) -> None:
        """Let an alias name an older version."""
        self.look()
        target, process = max(0, self.head - back), Process(self)
        with process.operation(plan):
            log = self.protocol.log(process.stores(self.registry.url), "model")
            try:
                promote(log, alias, self.log.version(target))
            except UnknownVersion:
                assert target not in self.retained, f"version {target} cannot be promoted"
            else:
                assert all_aliases(self.log)[alias] == target, f"{alias} was not moved"

    def requeue(self, choice: int, plan: Plan = QUIET) -> None:
        """Send a rejected shard back."""
        names = list(disposal.quarantined(self.log))
        if not names:
            return
        name, there = names[choice % len(names)], set(self._shards())
        self.requeued.add(name)
        process = Process(self)
        with process.operation(plan):
            disposal.requeue(
                self.protocol.log(process.stores(self.registry.url), "model"), name, lambda url: True, process.stores
            )
        for pair in set(self._shards()) - there:
            self._arrived(pair, self.inbox.read(pair[0]))

    def collect(self, keep: int, plan: Plan = QUIET) -> None:
        """Garbage collection."""
        aliased, process = set(all_aliases(self.log).values()), Process(self)
        self.collections += 1
        self.collecting = True
        with process.operation(plan):
            log = self.protocol.log(process.stores(self.registry.url), "model")
            self.protocol.collect_garbage(log, keep)
            if plan == QUIET:
                self._only_retained(keep, aliased)
        self.collecting = False
        self.look()
        self.retained &= {number for number in self.retained if number > self.head - keep} | aliased

    def _only_retained(self, keep: int, aliased: set[int]) -> None:
        """Nothing is left but the blobs of versions in retention, and of attempts that may still commit."""
        self.look()
        kept = {number for number in range(self.head + 1) if number > self.head - keep or number in aliased}
        named = {key for number in kept for key in self.versions[number].blobs.object_keys}
        left = {info.key for info in self.registry.list("model/blobs/")}
        old = {key for key in left if int(key.rpartition("/")[2][:8]) <= self.head}
        assert old <= named, "garbage was left"

    # ---- what must hold ----------------------------------------------------------------------------------------------
    def _shards(self) -> dict[Pair, str]:
        """Etags of the shards in the inbox."""
        return {
            (info.key, digest): info.etag
            for info in self.inbox.list()
            if is_shard(info.key) and (digest := self.present(info.key)) is not None
        }

    def check(self) -> None:
        """What must hold at every moment."""
        self.look()
        assert self.log.head().number == self.head, "the head is not the newest version"
        consumed, rejected = self.consumed(), self.rejected()
        for pair, count in (consumed + rejected).items():
            assert self.arrivals[pair], f"{pair} was never put"
            assert pair not in self.void, f"{pair} was consumed, though it was overwritten before anybody read it"
            assert consumed[pair] <= 1, f"{pair} was consumed twice"
            assert count <= self.arrivals[pair], (
                f"{pair} was put {self.arrivals[pair]} times and stands {count} times in the log"
            )
        for number in self.retained:
            for ref in self.versions[number].blobs.refs:
                assert self._is_whole(ref), f"a blob of version {number} is gone or altered"
        runs = Counter(version.run for version in self.versions if version.run)
        assert max(runs.values()) == 1, "a batch run registered two versions"
        remembered = {(key, digest) for _, key, digest in self.log.tombstones(self.log.head())}
        assert remembered == set(consumed), "the tombstones are not what was consumed"
        there = self._shards()
        owed = {(debt.key, debt.sha256, debt.etag) for debt in self.versions[-1].owed}
        for pair, etag in there.items():
            assert self.arrivals[pair], f"{pair} is in the inbox, and nobody put it there"
            if rejected[pair] and self.arrivals[pair] == 1:
                assert (*pair, etag) in owed, f"{pair} was rejected, is still there, and nobody owes its removal"
        for pair in set(self.arrivals) - self.void - self.optional - set(consumed) - set(rejected):
            assert pair in there, f"{pair} is lost"
        for key, data in self.hidden.items():
            assert self.inbox.read(key) == data, f"{key} is hidden and was touched"

    def forget(self) -> None:
        """Remove everything: stores in memory live as long as the process."""
        for store in (self.registry, self.inbox, self.archive, self.dataset):
            with suppress(StoreNotFound):
                for info in list(store.list()):
                    store.delete(info.key)

    def _is_whole(self, ref: FileRef) -> bool:
        try:
            self.log.verify_blob(ref)
        except (CorruptObject, UnknownVersion):
            return False
        return True

    def end(self) -> None:
        """Drain, then what must hold in the end. Every world ends here."""
        self.drain()
        self.check()
        with self.protocol.followed():
            run = self._open(open_store, OnlineSettings(gate={"champion": "score"}))
            assert run.head().owed == (), "something is still owed"
        assert list(self._shards()) == [], "the inbox still holds shards"
        in_log = self.consumed() + self.rejected()
        # Once, but as often as the log has it where it was put again after it was rejected: `check` has bounded that.
        wanted = {p: max(1, in_log[p]) for p in self.arrivals if in_log[p] or p not in self.void | self.optional}
        audit(self._with_all_blobs(), [(key, self.bytes[digest]) for key, digest in Counter(wanted).elements()])
        self._kept_what_left()

    def _with_all_blobs(self) -> VersionLog:
        """A copy of the registry as if there had been no garbage collection."""
        copy = MemoryStore(uuid.uuid4().hex)
        for info in self.registry.list():
            copy.write(info.key, self.registry.read(info.key))
        for key, data in self.removed_blobs.items():
            copy.write(key, data)
        return VersionLog(copy, "model")

    def _kept_what_left(self) -> None:
        """The archive and the quarantine hold what they were owed, unless a producer was faster."""
        for version in self.versions:
            for debt in version.owed:
                pair = (debt.key, debt.sha256)
                if debt.action == "delete" or pair in self.replaced or self.arrivals[pair] > 1:
                    continue
                if debt.action == "archive":
                    keys = disposal.archive_keys(*pair)
                    held = any(_holds(self.archive, key, debt.sha256) for key in keys)
                    assert held, f"{pair} is not in the archive"
                elif debt.destination is not None and debt.destination.rpartition("/")[2] not in self.requeued:
                    assert _holds(self.registry, debt.destination, debt.sha256), f"{pair} is not in quarantine"


def _holds(store: Store, key: str, digest: str) -> bool:
    try:
        return sha256(store.read(key)) == digest
    except NotFound:
        return False


# ---- what Hypothesis may choose --------------------------------------------------------------------------------------
CALLS = st.integers(1, 24)  # of a step; a later one than there are does not happen
TRAINERS = st.integers(0, len(SETTINGS))
BACK = st.integers(0, 4)
CHOICE = st.integers(0, 30)
KEY, CONTENT = st.sampled_from(KEYS + HIDDEN), st.sampled_from(sorted(CONTENTS))
FAULTS = st.builds(Fault, CALLS, st.sampled_from(["kill", "before", "after", "retried"]))


def others(**arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Meanwhile, ...]]:
    """One to three things that others do during an operation; by the name of a method, its arguments."""
    one = [st.builds(Meanwhile, CALLS, st.just(what), drawn) for what, drawn in arguments.items()]
    return st.lists(st.one_of(one), min_size=1, max_size=3).map(tuple)


DURING_COLLECTION = {
    "train": st.tuples(TRAINERS, st.sampled_from([QUIET, Plan(denied=True)])),
    "produce": st.tuples(KEY, CONTENT),
    "upload_again": st.tuples(CHOICE),
    "rollback": st.tuples(BACK),
}
ANY_TIME = DURING_COLLECTION | {
    "collect": st.tuples(st.integers(1, 3)),
    "requeue": st.tuples(CHOICE),
    "promote": st.tuples(st.just("best"), BACK),
}
FAILING = st.builds(Plan, FAULTS)
INTERLEAVED = st.builds(Plan, st.none() | FAULTS, others(**ANY_TIME), st.booleans())


class Machine(RuleBasedStateMachine):
    """Everything that can happen, in any order, over a store in memory."""

    protocol: ClassVar[Protocol] = Protocol()
    executed: ClassVar[Counter[str]] = Counter()
    """Examples and steps of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.place(), self.protocol)
        self.executed["examples"] += 1
        self.executed["steps"] -= 1  # the invariant is checked once before the first step

    def place(self) -> str:
        return f"memory://{uuid.uuid4().hex}"

    @rule(shards=st.lists(st.tuples(KEY, CONTENT), min_size=1, max_size=5))
    def produce(self, shards: list[tuple[str, str]]) -> None:
        for key, content in shards:
            self.world.produce(key, content)

    @rule(choice=CHOICE)
    def upload_again(self, choice: int) -> None:
        self.world.upload_again(choice)

    @rule(number=TRAINERS)
    def train(self, number: int) -> None:
        self.world.train(number)

    @rule(number=TRAINERS, plan=FAILING)
    def train_failing(self, number: int, plan: Plan) -> None:
        self.world.train(number, plan)

    @rule(number=TRAINERS, plan=INTERLEAVED)
    def train_interleaved(self, number: int, plan: Plan) -> None:
        self.world.train(number, plan)

    @rule(seed=st.integers(1, 3), plan=INTERLEAVED)
    def retrain(self, seed: int, plan: Plan) -> None:
        self.world.retrain(seed, plan)

    @rule(back=BACK, plan=INTERLEAVED)
    def rollback(self, back: int, plan: Plan) -> None:
        self.world.rollback(back, plan)

    @rule(alias=st.sampled_from(["champion", "best"]), back=BACK, plan=FAILING)
    def promote(self, alias: str, back: int, plan: Plan) -> None:
        self.world.promote(alias, back, plan)

    @rule(choice=CHOICE, plan=FAILING)
    def requeue(self, choice: int, plan: Plan) -> None:
        self.world.requeue(choice, plan)

    @rule(keep=st.integers(1, 3), plan=st.builds(Plan, st.none() | FAULTS, others(**DURING_COLLECTION)))
    def collect(self, keep: int, plan: Plan) -> None:
        self.world.collect(keep, plan)

    @invariant()
    def check(self) -> None:
        self.executed["steps"] += 1
        self.world.check()

    def teardown(self) -> None:
        if sys.exception() is None:  # otherwise a rule or an invariant has failed, and says more
            self.world.end()
            self.executed["versions"] += len(self.world.versions)
        self.world.forget()


class LocalMachine(Machine):
    """The same over local folders, whose etags differ for every write."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        super().__init__()

    def place(self) -> str:
        return self._folder.name

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self._folder.cleanup()

"""Negative controls: protocols that are broken on purpose, each of which the tests of the guarantees must catch.

A test that cannot fail shows nothing. `defects` puts a protocol through scenarios (killed, unanswered, overtaken, overwritten) at
storage calls of a step that end as every history of `machine.py` does. The product passes all of them; each control
fails one for the reason that it was made for.
"""

import re
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from unittest.mock import patch
from weakref import WeakKeyDictionary

import pytest

from tests.guarantees.machine import BAD, GOOD, Fault, Meanwhile, Plan, Protocol, World, begun
from tests.storage.faults import Call, FaultStore
from tests.storage.segmented import InRows, InSegments
from tidemill.storage.aliases import aliased, all_aliases
from tidemill.storage.blobs import BlobChain
from tidemill.storage.chain import Version
from tidemill.storage.errors import AlreadyExists, CorruptObject, HeadMoved, StorageError
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Entry, Owed, decode, encode
from tidemill.storage.refs import BlobRef, FileRef
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store
from tidemill.tasks.online import step as online
from tidemill.tasks.online import turns as turns_room
from tidemill.tasks.online.commit import commit, debts
from tidemill.tasks.online.gate import Champion
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.reading import Reader
from tidemill.tasks.online.selection import Selection, select
from tidemill.tasks.online.step import OnlineRun
from tidemill.tasks.online.turns import train_on
from tidemill.tasks.online.work import Head, Identity, Work
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.errors import ModelFails
from tidemill.tasks.training.steps import Steps

Shards = tuple[tuple[str, bytes], ...]

SHARDS: Shards = (("m.parquet", GOOD[0]), ("n.parquet", BAD[0]), ("o.parquet", GOOD[1]), ("p.parquet", GOOD[2]))
LATER: Shards = (("a-late-low-key.parquet", GOOD[3]),)
FIRST, ARCHIVES = 0, 3
"""Two trainers of `World` that train each shard once, so that their bits are the same."""


# ---- the detector ----------------------------------------------------------------------------------------------------
def world_of(protocol: Protocol) -> World:
    """A world with `SHARDS` in its inbox."""
    world = World(f"memory://{uuid.uuid4().hex}", protocol)
    for key, data in SHARDS:
        world.upload(key, data)
    return world


def bits(world: World) -> tuple[str, str]:
    blobs = world.versions[-1].blobs
    return blobs.weights.sha256, blobs.state.sha256


@cache
def undisturbed() -> tuple[str, str]:
    """The bits of the product after `SHARDS` and `LATER`, when nothing happens."""
    world = world_of(Protocol())
    world.drain()
    for key, data in LATER:
        world.upload(key, data)
    world.end()
    return bits(world)


def at_calls(protocol: Protocol, stride: int, trainer: int, befalls: Callable[[int], Plan]) -> Iterator[World]:
    """Worlds where this befalls the first step of a trainer, at its first storage call and at each `stride`th from there."""
    for at in count(1, stride):
        world = world_of(protocol)
        world.train(trainer, befalls(at))
        over = world.trainers[trainer].calls < at
        yield world
        if over:
            return


def go_on(world: World, trainer: int) -> None:
    """More shards, and a trainer in whose memory is what befell it."""
    world.train(trainer)
    for key, data in LATER:
        world.upload(key, data)
    world.train(trainer)


def failed(protocol: Protocol, stride: int) -> Iterator[World]:
    """Killed before any call, or an answer that is lost: the same bits as undisturbed."""
    for kind in ("kill", "before", "after", "retried"):
        for world in at_calls(protocol, stride, FIRST, lambda at, kind=kind: Plan(Fault(at, kind))):
            go_on(world, FIRST)
            world.end()
            assert bits(world) == undisturbed(), f"{kind}: other bits than an undisturbed run"
            yield world


def overtaken(protocol: Protocol, stride: int) -> Iterator[World]:
    """Another trainer takes a whole step before any call: the same bits as undisturbed."""
    for trainer, other in ((FIRST, ARCHIVES), (ARCHIVES, FIRST)):
        for world in at_calls(
            protocol, stride, trainer, lambda at, o=other: Plan(None, (Meanwhile(at, "train", (o,)),))
        ):
            go_on(world, trainer)
            world.end()
            assert bits(world) == undisturbed(), "other bits than an undisturbed run"
            yield world


def overwritten(protocol: Protocol, stride: int) -> Iterator[World]:
    """A producer puts other bytes at the key of a shard before any call: good ones and bad ones."""
    stride = min(stride, 3)  # from the listing to the read of "o.parquet" it is three calls
    as_long = b"PAR1" + bytes(len(GOOD[1]) - 8) + b"PAR1"  # another length would be noticed
    for key, data in (("o.parquet", as_long), ("m.parquet", GOOD[4])):
        meanwhile = ("upload", (key, data))
        for world in at_calls(protocol, stride, FIRST, lambda at, m=meanwhile: Plan(None, (Meanwhile(at, *m),))):
            go_on(world, FIRST)
            world.end()
            yield world


def collected(protocol: Protocol, stride: int) -> Iterator[World]:
    """Garbage collection before any call of a trainer that slept there."""
    stride = min(stride, 2)  # between the first of two blobs and the commit there are two calls before which it harms
    for world in at_calls(protocol, stride, FIRST, lambda at: Plan(None, (Meanwhile(at, "collect", (1,)),))):
        world.end()
        yield world


def sent_again(protocol: Protocol, stride: int) -> Iterator[World]:
    """All shards again, the same bytes, when the head owes other ones: at once, after retraining, after a rollback."""
    for change in (lambda w: None, lambda w: w.retrain(1), lambda w: w.rollback(1)):
        world = world_of(protocol)
        go_on(world, ARCHIVES)
        change(world)
        for key, data in SHARDS:
            world.upload(key, data)
        world.end()
        yield world


def denied(protocol: Protocol, stride: int) -> Iterator[World]:
    """Deletes are denied for some steps, in which new shards come and the model is retrained."""
    for change in (lambda w: None, lambda w: w.retrain(1), lambda w: w.rollback(1)):
        world = world_of(protocol)
        world.train(ARCHIVES, Plan(denied=True))
        for key, data in LATER:
            world.upload(key, data)
        change(world)
        world.train(FIRST, Plan(denied=True))
        world.train(ARCHIVES, Plan(denied=True))
        world.check()
        world.end()
        yield world


def altered(protocol: Protocol, stride: int) -> Iterator[World]:
    """The manifest below the head is replaced by another valid one: nobody may go on from there."""
    world = world_of(protocol)
    world.train(FIRST)
    world.train(ARCHIVES)
    world.trainers[ARCHIVES].online.forget()
    key = f"model/log/{world.log.head().number - 1:08d}.json"
    manifest = decode(world.registry.read(key), key)
    world.registry.write(key, encode(manifest.model_copy(update={"metrics": {}})))
    try:
        world.train(ARCHIVES)
    except CorruptObject:
        yield world
        return
    raise AssertionError("a run went on from altered history")


def gone_back(protocol: Protocol, stride: int) -> Iterator[World]:
    """Garbage collection before any call of a rollback to a version that is not in retention."""
    for at in count(1, min(stride, 3)):  # between the look at the version and the commit there are more
        world = world_of(protocol)
        go_on(world, FIRST)
        world.rollback(1, Plan(None, (Meanwhile(at, "collect", (1,)),)))
        over = not world.collections
        world.check()
        world.end()
        yield world
        if over:
            return


def begun_anew(protocol: Protocol, stride: int) -> Iterator[World]:
    """The history is removed and begun anew while a trainer has the old head in memory: it removes nothing on top of that."""
    world = world_of(protocol)
    with protocol.followed():
        run = opened(world)
        while online.step(run).outcome is online.Outcome.COMMITTED:
            pass
        for key, data in LATER:
            world.upload(key, data)
        for info in [*world.registry.list("model/")]:
            world.registry.delete(info.key)
        for key, data in begun().items():
            world.registry.write(key, data)
        with suppress(StorageError):
            online.step(run)
    for key, _ in LATER:
        assert world.present(key), f"{key} is lost: the version that consumed it stands on nothing"
    yield world


def deployed_badly(protocol: Protocol, stride: int) -> Iterator[World]:
    """From now on the model fails on all rows: no shard is at fault, and all of them stay."""
    world = world_of(protocol)
    with protocol.followed(), patch.object(Steps, "take", _fails), suppress(ModelFails):
        online.step(opened(world))
    for key, data in SHARDS:
        assert data in BAD or world.present(key), f"{key} was rejected, though the model is at fault"
    yield world


def opened(world: World) -> OnlineRun:
    """The first trainer, without faults."""
    stores = lambda url: world.protocol.wrap(open_store(url))  # noqa: E731
    return online.OnlineRun(world.inbox.url, world.registry.url, "model", world.settings[FIRST], stores)


def _fails(*_: object) -> None:
    raise ValueError("the model of the new deployment fails")


Scenario = Callable[[Protocol, int], Iterator[World]]
SCENARIOS: Sequence[Scenario] = (
    *(failed, overtaken, overwritten, collected, sent_again, denied, altered),
    *(gone_back, begun_anew, deployed_badly),
)


def defects(protocol: Protocol, stride: int, scenarios: Sequence[Scenario] = SCENARIOS) -> list[str]:
    """For each scenario that goes wrong: its name, and what it saw first. Errors of the harness are raised."""
    found = []
    for scenario in scenarios:
        try:
            for world in scenario(protocol, stride):
                world.forget()
        except AssertionError as defect:
            found.append(f"{scenario.__name__}: {defect}")
    return found


# ---- broken protocols ------------------------------------------------------------------------------------------------
def deletes_first(
    work: Work, selection: Selection, champion: Champion, places: Places, settings: OnlineSettings
) -> Head:
    """Disposes of the shards, then commits."""
    places.dispose(debts(work, work.head.version.number + 1, places.log.model, settings))
    return commit(work, selection, champion, places, settings)


def loser_deletes(
    work: Work, selection: Selection, champion: Champion, places: Places, settings: OnlineSettings
) -> Head:
    """Disposes of the shards whether or not it won."""
    try:
        return commit(work, selection, champion, places, settings)
    except HeadMoved:
        places.dispose(debts(work, work.head.version.number + 1, places.log.model, settings))
        raise


def drops_optimizer(
    work: Work, selection: Selection, champion: Champion, places: Places, settings: OnlineSettings
) -> Head:
    """Stores a state without the optimizer's, which it keeps in memory."""
    state = work.head.learner.optimizer.state
    kept = dict(state)
    state.clear()
    try:
        return commit(work, selection, champion, places, settings)
    finally:
        state.update(kept)


def drops_debts(work: Work, selection: Selection, champion: Champion, places: Places, settings: OnlineSettings) -> Head:
    """Does not carry what could not be removed to the next version."""
    work.head.owed = ()
    return commit(work, selection, champion, places, settings)


def keeps_learner(reader: Reader, head: Head, champion: Champion, places: Places, settings: OnlineSettings) -> Work:
    """Goes on with the learner that it trained for a version that another run committed first."""
    if (kept := _kept.get(places)) is not None:
        kept.learner.counters = head.learner.counters
        head.steps = kept
    work = train_on(reader, head, champion, places, settings)
    _kept[places] = work.head.steps
    return work


_kept = WeakKeyDictionary[Places, Steps]()


def forgets_what_it_owes(
    head: Head, places: Places, settings: OnlineSettings, without: Collection[Identity] = ()
) -> Selection:
    """Selects shards whose removal it owes, as if they were new."""
    owed, head.owed = head.owed, ()
    try:
        return select(head, places, settings, without)
    finally:
        head.owed = owed


def lists_from_cursor(
    head: Head, places: Places, settings: OnlineSettings, without: Collection[Identity] = ()
) -> Selection:
    """Looks only at keys above the last one that it consumed."""
    selection = select(head, places, settings, without)
    last = max((shard.key for shard in head.version.manifest.consumed), default="")
    selection.reader._waiting = deque(info for info in selection.reader._waiting if info.key > last)
    return selection


def rejects_whatever_fails(
    reader: Reader, head: Head, champion: Champion, places: Places, settings: OnlineSettings
) -> Work:
    """Takes a shard for bad because the model fails on it, and asks no further."""
    with patch.object(turns_room, "prove", lambda *_: None):
        return train_on(reader, head, champion, places, settings)


class DeletesThenCopies(Places):
    """Removes a shard before it is in the archive or in quarantine."""

    def dispose(self, owed: Collection[Owed]) -> tuple[Owed, ...]:
        for debt in owed:
            with suppress(StorageError):
                self.inbox.store.delete(debt.key, if_match=debt.etag)
        return super().dispose(owed)


class NoParentCheck(VersionLog):
    """Believes that the version stored before another is the one that it was made from."""

    def _parent(self, child: Version) -> Version | None:
        return self.version(child.number - 1) if child.number else None


class NoGroundCheck(VersionLog):
    """Does not look whether the version below is still there, neither before nor after the commit."""

    def check(self, version: Version) -> None:
        pass


class NoTombstones(VersionLog):
    """Stores no tombstones."""

    def write_blob(self, number: int, suffix: str, data: bytes) -> BlobRef:
        return super().write_blob(number, suffix, b"" if suffix.startswith("tombstones") else data)


class BlobAlone(VersionLog):
    """Takes the blob for all tombstones, and has none yet: what stands in manifests is not remembered."""

    def tombstones_due(self, parent: Version, unstored: int = 0) -> bool:
        return False

    def tombstones(self, version: Version | None) -> Tombstones:
        if version is None or (ref := version.manifest.blobs.tombstones) is None:
            return Tombstones()
        return Tombstones.decode(self.read_blob(ref), ref.key)


class BatchForgets(VersionLog):
    """A batch run begins anew: nothing is remembered, nothing is owed."""

    def commit(self, parent: Version | None, entry: Entry) -> Version:
        if entry.kind == "batch" and parent is not None:
            nothing = self.write_tombstones(parent.number + 1, Tombstones())
            entry = entry.model_copy(
                update={"blobs": entry.blobs.model_copy(update={"tombstones": nothing}), "owed": ()}
            )
        return super().commit(parent, entry)


class RollbackForgets(VersionLog):
    """A rollback takes tombstones and debts, too, from the version that it goes back to."""

    def commit(self, parent: Version | None, entry: Entry) -> Version:
        if entry.kind == "rollback":
            target = self.version(entry.rolled_back_to)
            then = self.write_tombstones(parent.number + 1, self.tombstones(target))
            blobs = entry.blobs.model_copy(update={"tombstones": then})
            entry = entry.model_copy(update={"blobs": blobs, "owed": target.manifest.owed})
        return super().commit(parent, entry)


class NamesItsTarget(InSegments):
    """A rollback names the blobs of the version that it goes back to, and nobody looks whose they are."""

    def copy_blobs(
        self, number: int, blobs: Blobs, source: BlobChain | None = None, parent: Blobs | None = None
    ) -> tuple[FileRef, FileRef]:
        return blobs.weights, blobs.state

    def _check_blobs(self, parent: Version | None, blobs: Blobs, number: int) -> None:
        pass


def with_log(log: type[VersionLog]) -> Protocol:
    """Everybody uses this log."""

    class WithLog(Places):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.log = log(self.log.store, self.log.model)

    return Protocol(rooms={"Places": WithLog}, log=log)


class Broken(FaultStore):
    """A store that may ignore a precondition."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, _nothing)


def _nothing(call: Call) -> None:
    """A hook that injects no fault."""


class CommitsOverwrite(Broken):
    """Creates a manifest over another one."""

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        return self.write(key, data) if "/log/" in key else super().create(key, data)


class CommitsAlwaysWin(Broken):
    """Takes "it exists already" for its own write whose answer was lost."""

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        try:
            return super().create(key, data)
        except AlreadyExists:
            if "/log/" in key:
                return self.stat(key)
            raise


class DeletesAnything(Broken):
    """Removes what is at the key now."""

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        super().delete(key)


class ReadsAnything(Broken):
    """Reads what is at the key now, for what was listed."""

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return super().read(key, start=start, length=length)


def collects_above_the_head(log: VersionLog, keep: int) -> list[str]:
    """Takes every blob that no version in retention names for garbage."""
    retained = [*log.history(log.head(), keep), *(aliased(log, name) for name in all_aliases(log))]
    named = {ref.key for version in retained for ref in version.manifest.blobs.refs}
    garbage = [info.key for info in log.store.list(f"{log.model}/blobs/") if info.key not in named]
    for key in garbage:
        log.store.delete(key)
    return garbage


def collects_aliased(log: VersionLog, keep: int) -> list[str]:
    """Keeps the last versions only."""
    named = {ref.key for version in log.history(log.head(), keep) for ref in version.manifest.blobs.refs}
    number = log.head().number
    listed = [info.key for info in log.store.list(f"{log.model}/blobs/")]
    garbage = [key for key in listed if key not in named and int(key.rpartition("/")[2][:8]) <= number]
    for key in garbage:
        log.store.delete(key)
    return garbage


def collects_what_others_stored(log: VersionLog, keep: int) -> list[str]:
    """Keeps of a version in retention only what that version has stored itself."""
    retained = [*log.history(log.head(), keep), *(aliased(log, name) for name in all_aliases(log))]
    own = {(f"{version.number:08d}", key) for version in retained for key in version.manifest.blobs.learner_keys}
    named = {key for number, key in own if key.rpartition("/")[2].startswith(number)}
    named |= {ref.key for version in retained if (ref := version.manifest.blobs.tombstones) is not None}
    number = log.head().number
    listed = [info.key for info in log.store.list(f"{log.model}/blobs/")]
    garbage = [key for key in listed if key not in named and int(key.rpartition("/")[2][:8]) <= number]
    for key in garbage:
        log.store.delete(key)
    return garbage


@dataclass(frozen=True)
class Control:
    protocol: Protocol
    scenario: str
    reason: str


CONTROLS = {
    "delete before commit": Control(Protocol(rooms={"commit": deletes_first}), "failed", "is lost"),
    "the loser deletes": Control(Protocol(rooms={"commit": loser_deletes}), "overtaken", "is lost"),
    "optimizer state dropped": Control(
        Protocol(rooms={"commit": drops_optimizer}), "failed", "other weights or another state"
    ),
    "learner kept after a lost race": Control(
        Protocol(rooms={"train_on": keeps_learner}), "overtaken", "other weights or another"
    ),
    "owed shards trained on": Control(
        Protocol(rooms={"select": forgets_what_it_owes}), "denied", "was put 1 times and stands 2"
    ),
    "debts dropped": Control(Protocol(rooms={"commit": drops_debts}), "denied", "stands 2 times|nobody owes"),
    "delete before copy": Control(
        Protocol(rooms={"Places": DeletesThenCopies}), "overtaken", "not in (the archive|quarantine)"
    ),
    "listing from a cursor": Control(Protocol(rooms={"select": lists_from_cursor}), "failed", "inbox still holds"),
    "no parent check": Control(with_log(NoParentCheck), "altered", "went on from altered history"),
    "no look at the parent": Control(with_log(NoGroundCheck), "begun_anew", "stands on nothing"),
    "whatever fails is rejected": Control(
        Protocol(rooms={"train_on": rejects_whatever_fails}), "deployed_badly", "though the model is at fault"
    ),
    "no tombstones": Control(with_log(NoTombstones), "sent_again", "was consumed twice"),
    "blob alone": Control(with_log(BlobAlone), "sent_again", "was consumed twice"),
    "batch forgets": Control(with_log(BatchForgets), "sent_again", "was consumed twice"),
    "rollback forgets": Control(with_log(RollbackForgets), "sent_again", "a rollback dropped"),
    "overwritable commit": Control(Protocol(wrap=CommitsOverwrite), "overtaken", "was overwritten"),
    "commit not read back": Control(Protocol(wrap=CommitsAlwaysWin), "overtaken", "is lost"),
    "delete without if-match": Control(Protocol(wrap=DeletesAnything), "overwritten", "is lost"),
    "read without if-match": Control(Protocol(wrap=ReadsAnything), "overwritten", "stands 2 times"),
    "collection above the head": Control(
        Protocol(collect_garbage=collects_above_the_head), "collected", "is gone: retention removed"
    ),
    "collection of aliased versions": Control(
        Protocol(collect_garbage=collects_aliased), "collected", "a blob of version 0 is gone"
    ),
    "blobs of the version gone back to": Control(with_log(NamesItsTarget), "gone_back", "is gone"),
    "collection of segments that an older version stored": Control(
        replace(with_log(InSegments), collect_garbage=collects_what_others_stored), "gone_back", "is gone"
    ),
}


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def stride(full: bool) -> int:
    """CI disturbs every seventh call of a step (every third where a wider step could miss), the full figures every one."""
    return 1 if full else 7


@pytest.mark.timeout(1200)
def test_the_product_has_no_defects(stride: int, record_property: Callable[[str, object], None]) -> None:
    for scenario in SCENARIOS:
        histories = 0
        for world in scenario(Protocol(), stride):
            world.forget()
            histories += 1
        record_property(scenario.__name__, histories)
        print(f"{scenario.__name__}: {histories} histories, no defect")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("log", [InSegments, InRows])
def test_the_product_has_no_defects_where_files_are_in_segments(log: type[VersionLog], stride: int) -> None:
    for scenario in (collected, gone_back):
        for world in scenario(with_log(log), stride):
            world.forget()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_protocol_is_caught(
    name: str, stride: int, full: bool, record_property: Callable[[str, object], None]
) -> None:
    """By the scenario that it was made for, and for its reason. Full: says which others catch it, too."""
    control = CONTROLS[name]
    scenarios = SCENARIOS if full else [s for s in SCENARIOS if s.__name__ == control.scenario]
    found = defects(control.protocol, stride, scenarios)
    record_property("caught by", [defect.partition(":")[0] for defect in found])
    print(f"{name}: {found}")
    assert any(re.search(rf"^{control.scenario}: .*({control.reason})", defect, re.DOTALL) for defect in found), found

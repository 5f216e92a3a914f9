"""The version log: how a version comes to exist, is found again, and is never lost or written twice."""

import json
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from threading import Barrier

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.storage.faults import Call, Counting, Fails, FaultStore, act_once, together
from tests.storage.histories import append, fabricate, grow, keys, manifest_key
from tidemill.storage import tombstones as tombstones_module
from tidemill.storage.aliases import aliased, all_aliases, promote, resolve
from tidemill.storage.chain import Version
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    HeadMoved,
    PermissionDenied,
    StoreNotFound,
    Unavailable,
    UnknownModel,
    UnknownVersion,
    UnsupportedFormat,
    UnsupportedStore,
)
from tidemill.storage.log import HINT_EVERY, VersionLog, list_models, open_log
from tidemill.storage.manifest import (
    Blobs,
    Consumed,
    Entry,
    Owed,
    Parent,
    checked,
    consumed_objects,
    decode,
    encode,
)
from tidemill.storage.memory import MemoryStore
from tidemill.storage.refs import BlobRef
from tidemill.storage.retention import collect_garbage
from tidemill.storage.runs import BatchProgress
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store

DEBT = Owed(inbox="s3://in", key="k.parquet", sha256="s", etag="e", action="delete")


@pytest.fixture
def log(store: Store) -> VersionLog:
    return VersionLog(store, "taxi")


@pytest.fixture
def memory() -> MemoryStore:
    """For what does not depend on the backend."""
    return MemoryStore(uuid.uuid4().hex)


# ---- the life of a model -------------------------------------------------------------------------------------------------


def test_a_model_begins_with_version_0(log: VersionLog) -> None:
    assert not log.exists()
    first = append(log, None)
    assert log.exists()
    assert (first.number, first.manifest.parent) == (0, None)
    assert log.head() == first


def test_each_version_names_its_parent(log: VersionLog) -> None:
    first = append(log, None)
    second = append(log, first, metrics={"mae": 0.1})
    assert log.head() == second
    assert second.manifest.parent == Parent(version=0, sha256=first.sha256)
    assert second.manifest.metrics == {"mae": 0.1}
    assert log.version(0) == first
    assert [v.number for v in log.history(second)] == [1, 0]


def test_a_version_holds_the_bytes_that_were_written_for_it(log: VersionLog) -> None:
    head = grow(log, 2)
    blobs = log.head().manifest.blobs
    assert log.read_blob(blobs.weights) == b"weights 1"
    assert log.read_blob(blobs.state) == b"state 1"
    assert list(log.tombstones(head)) == [("s3://in", "1.parquet", "sha-1")]
    assert len(log.tombstones(None)) == 0


def test_what_is_stored_is_what_the_format_says(log: VersionLog) -> None:
    head = append(log, None)
    blobs = head.manifest.blobs
    assert blobs.tombstones is not None
    assert keys(log.store) == {
        "taxi/log/00000000.json",
        "taxi/head.json",
        blobs.weights.key,
        blobs.state.key,
        blobs.tombstones.key,
    }
    assert blobs.weights.key.startswith("taxi/blobs/00000000-")
    assert decode(log.store.read("taxi/log/00000000.json"), "") == head.manifest


def test_models_in_one_registry_do_not_touch_each_other(store: Store) -> None:
    taxi, bus = VersionLog(store, "taxi"), VersionLog(store, "taxi2")
    grow(taxi, 2)
    append(bus, None)
    assert list_models(store.url) == ["taxi", "taxi2"]
    assert (taxi.head().number, bus.head().number) == (1, 0)
    assert all_aliases(bus) == {}


def test_two_attempts_never_write_the_same_blob(log: VersionLog) -> None:
    refs = [log.write_blob(1, "safetensors", b"same") for _ in range(3)]
    assert len({ref.key for ref in refs}) == 3
    assert {log.read_blob(ref) for ref in refs} == {b"same"}


def test_blobs_alone_are_no_version(log: VersionLog) -> None:
    head = append(log, None)
    log.write_blob(1, "safetensors", b"never committed")
    assert log.head() == head


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "-x", "ü", "a" * 101, "a\n", "log/.."])
def test_some_names_cannot_be_a_models(name: str) -> None:
    with pytest.raises(UnknownModel, match="cannot name a model"):
        VersionLog(MemoryStore("names"), name)


# ---- a wrong URL is never a fresh start ----------------------------------------------------------------------------------


def test_an_unknown_model_is_told_from_its_neighbours(log: VersionLog) -> None:
    with pytest.raises(UnknownModel, match=r"holds no model 'taxi'\. It holds: none"):
        log.head()
    append(VersionLog(log.store, "taxi-fares"), None)
    append(VersionLog(log.store, "weather"), None)
    with pytest.raises(UnknownModel, match=r"Did you mean 'taxi-fares'.*taxi-fares, weather"):
        VersionLog(log.store, "taxi-fare").head()
    with pytest.raises(UnknownModel, match="It holds: taxi-fares, weather"):
        resolve(VersionLog(log.store, "zzz"), "champion")


def test_blobs_without_a_manifest_are_no_model(log: VersionLog) -> None:
    log.write_blob(0, "safetensors", b"")
    with pytest.raises(UnknownModel):
        log.head()


def test_a_registry_that_is_not_there_is_not_an_empty_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    log = VersionLog(open_store(str(tmp_path_factory.mktemp("x") / "missing")), "taxi")
    assert not log.exists()
    with pytest.raises(StoreNotFound):
        log.head()


def test_opening_for_writing_asks_the_store_for_its_guarantees(
    make_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_log(make_url("registry"), "taxi").url == open_store(make_url("registry")).url + "/taxi"

    class Overwrites(MemoryStore):
        def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
            return self.write(key, data)

    monkeypatch.setattr("tidemill.storage.log.open_store", lambda url: Overwrites(url))
    with pytest.raises(UnsupportedStore, match="put-if-absent"):
        open_log("overwrites", "taxi")
    assert not open_log("overwrites", "taxi", writable=False).exists()


# ---- finding the head ----------------------------------------------------------------------------------------------------


def requests_for_head(log: VersionLog, versions: int) -> Counter[str]:
    count = Counting()
    assert VersionLog(FaultStore(log.store, count), log.model).head().number == versions - 1
    return count.calls


def test_finding_the_head_costs_the_same_however_long_the_history(memory: MemoryStore) -> None:
    costs = []
    for versions in (26, 106, 2_010):  # equally far from the hint
        log = VersionLog(memory, f"m{versions}")
        fabricate(log, versions)
        costs.append(requests_for_head(log, versions))
    assert costs[0] == costs[1] == costs[2]
    assert costs[0]["list"] == 1  # that nothing follows
    assert costs[0].total() <= 15


def test_every_distance_from_the_hint_is_cheap_and_right(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    fabricate(log, 2 * HINT_EVERY + 1)
    head = log.head()
    for _ in range(HINT_EVERY + 1):
        assert requests_for_head(log, head.number + 1).total() <= 15
        head = append(log, head)


@pytest.mark.parametrize("versions", [1, 2, 3, 10, 100])
def test_a_lost_hint_costs_a_few_requests_more(memory: MemoryStore, versions: int) -> None:
    log = VersionLog(memory, "taxi")
    fabricate(log, versions)
    memory.delete("taxi/head.json")
    assert requests_for_head(log, versions).total() <= 7 + 2 * versions.bit_length()


@pytest.mark.parametrize(
    "hint",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"\xff",
        b'{"version": "3"}',
        b'{"version": -1}',
        b'{"version": 1.5}',
        b"[" * 99_999,
    ]
    + [b'{"version": %d}' % n for n in (0, 1, 2, 3, 17, 18, 19, 10**8, 10**30)]
    + [b'{"version": true}', b'{"version": null}', b'{"version": 1e999}'],
    ids=lambda data: repr(data[:20]),
)
def test_a_wrong_hint_never_leads_to_a_wrong_head(memory: MemoryStore, hint: bytes) -> None:
    log = VersionLog(memory, "taxi")
    fabricate(log, 18)
    memory.write("taxi/head.json", hint)
    assert log.head().number == 17


def test_a_hint_that_cannot_be_written_does_not_undo_a_commit(
    memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = FaultStore(memory, Fails("write", "head.json", "before", PermissionDenied("no"), times=99))
    head = grow(VersionLog(faulty, "taxi"), HINT_EVERY + 1)
    assert VersionLog(memory, "taxi").head() == head
    assert "head.json could not be written" in caplog.text


def test_a_slow_run_may_set_the_hint_back(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    fabricate(log, 100)
    memory.write("taxi/head.json", b'{"version": 16}')
    assert log.head().number == 99


# ---- altered history -----------------------------------------------------------------------------------------------------


def test_an_edited_head_is_refused(log: VersionLog) -> None:
    grow(log, 2)
    key = manifest_key(1)
    log.store.write(key, log.store.read(key).replace(b'"online"', b'"batch" '))
    with pytest.raises(CorruptObject, match=r"00000001.json was edited or damaged"):
        log.head()


def test_an_altered_parent_is_refused(log: VersionLog) -> None:
    head = grow(log, 3)
    parent = log.version(1).manifest
    log.store.write(manifest_key(1), encode(parent.model_copy(update={"metrics": {"mae": 0.0}})))
    with pytest.raises(CorruptObject, match="version 2 was made from another version 1"):
        log.head()
    with pytest.raises(CorruptObject, match="version 2 was made from another version 1"):
        list(log.history(head))


def test_an_altered_ancestor_is_found_by_the_history(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    head = grow(log, 4)
    log.store.write(manifest_key(0), encode(log.version(0).manifest.model_copy(update={"nonce": "other"})))
    assert log.head() == head
    assert [v.number for v in islice(log.history(head), 3)] == [3, 2, 1]
    with pytest.raises(CorruptObject, match="version 1 was made from another version 0"):
        list(log.history(head))


def test_a_manifest_copied_to_another_number_or_model_is_refused(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    grow(log, 2)
    memory.write(manifest_key(2), memory.read(manifest_key(1)))
    with pytest.raises(CorruptObject, match=r"00000002.json holds version 1 of 'taxi': it was copied by hand"):
        log.head()
    memory.write(manifest_key(0, "bus"), memory.read(manifest_key(0)))
    with pytest.raises(CorruptObject, match="holds version 0 of 'taxi'"):
        VersionLog(memory, "bus").head()


@pytest.mark.parametrize("parent", [None, Parent(version=0, sha256="x"), Parent(version=2, sha256="x")])
def test_a_manifest_must_name_the_version_before_it(memory: MemoryStore, parent: Parent | None) -> None:
    log = VersionLog(memory, "taxi")
    head = grow(log, 3)
    memory.write(manifest_key(2), encode(head.manifest.model_copy(update={"parent": parent})))
    with pytest.raises(CorruptObject, match="does not name version 1 as its parent"):
        log.head()


def test_version_0_has_no_parent(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    first = append(log, None)
    memory.write(manifest_key(0), encode(first.manifest.model_copy(update={"parent": Parent(version=0, sha256="x")})))
    with pytest.raises(CorruptObject):
        log.head()


def test_a_deleted_manifest_is_altered_history(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    fabricate(log, 17)
    memory.delete(manifest_key(15))
    with pytest.raises(CorruptObject, match="version 15 is gone"):
        log.head()


@pytest.mark.parametrize("hint", [True, False], ids=["hint", "no hint"])
@pytest.mark.parametrize("gone", [[0], [0, 1, 2], [7], [15], [17], [16, 17, 18], [18]], ids=str)
def test_a_gap_in_the_numbers_is_no_shorter_history(memory: MemoryStore, gone: list[int], hint: bool) -> None:
    log = VersionLog(memory, "taxi")
    fabricate(log, 20)
    for number in gone:
        memory.delete(manifest_key(number))
    if not hint:
        memory.delete("taxi/head.json")

    def walk() -> None:  # a gap between versions that are there is found on the way
        head = log.head()
        assert head.number == 19
        list(log.history(head))

    with pytest.raises(CorruptObject, match=rf"version {gone[-1]} is gone|version {gone[0]} is gone.*restore their"):
        walk()


@pytest.mark.parametrize("left", ["log", "aliases", "quarantine", "head.json", "blobs", "runs"])
def test_a_model_whose_beginning_is_lost_is_not_taken_for_a_new_one(log: VersionLog, left: str) -> None:
    head = grow(log, 3)
    promote(log, "champion", head)
    log.store.write(f"taxi/quarantine/00000002-{'0' * 32}", b"a bad shard")
    log.store.write("taxi/runs/abc/done.json", checked({"version": 0}))
    gone = [key for key in keys(log.store, "taxi/") if key.split("/")[1] != left or key == manifest_key(0)]
    for key in gone:
        log.store.delete(key)
    before = keys(log.store)
    for ask in (log.exists, log.head, lambda: append(log, None), BatchProgress(log, "abc").registered):
        with pytest.raises(CorruptObject, match=r"version 0 is gone, though .*restore"):
            ask()
    assert keys(log.store) == before, "nothing is left of an attempt to begin anew"


def test_a_model_that_is_begun_while_others_ask_for_it_is_no_lost_one(store: Store) -> None:
    for phase in ("before", "after"):
        other = VersionLog(store, phase)
        log = VersionLog(FaultStore(store, act_once("list", "/log/", phase, lambda o=other: grow(o, 2))), phase)
        assert log.exists()
        assert log.head().number == 1


def test_a_head_that_others_move_on_from_meanwhile_is_no_gap(store: Store) -> None:
    log = VersionLog(store, "taxi")
    head = grow(log, 3)
    slow = VersionLog(
        FaultStore(store, act_once("list", "taxi/log/", "before", lambda: append(log, append(log, head)))), "taxi"
    )
    assert slow.head().number == 4


# ---- a history that goes while a run is under way -----------------------------------------------------------------------


def begun_anew(log: VersionLog) -> None:
    for key in keys(log.store):
        log.store.delete(key)
    append(log, None, metrics={"anew": 1.0})


def removed(log: VersionLog) -> None:
    for key in keys(log.store):
        log.store.delete(key)


def restored(log: VersionLog) -> None:
    """To what it was one version ago."""
    log.store.delete(manifest_key(2))


def replaced(log: VersionLog) -> None:
    """By another version of that number."""
    log.store.delete(manifest_key(2))
    append(log, log.version(1), metrics={"other": 1.0})


@pytest.mark.parametrize("happens", [begun_anew, removed, restored, replaced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("moment", ["before", "while blobs are written", "before the create", "after the create"])
def test_nothing_is_committed_on_top_of_a_version_that_is_gone(
    store: Store, happens: Callable[[VersionLog], None], moment: str
) -> None:
    log = VersionLog(store, "taxi")
    head = grow(log, 3)
    left: list[set[str]] = []

    def act() -> None:
        happens(log)
        left.append({key for key in keys(store) if key != manifest_key(3)})

    if moment == "before":
        act()
    verb, text, phase = {
        "before": ("none", "", "before"),
        "while blobs are written": ("write", "blobs/", "before"),
        "before the create": ("create", "log/", "before"),
        "after the create": ("create", "log/", "after"),
    }[moment]
    run = VersionLog(FaultStore(store, act_once(verb, text, phase, act)), "taxi")
    with pytest.raises(CorruptObject, match="removed, restored or begun anew"):
        append(run, head)
    assert manifest_key(3) not in keys(store), "no orphan"
    assert keys(store) <= left[0], "no blob of the attempt is left"


def test_a_manifest_that_cannot_be_taken_back_is_said_to_be_there(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    log = VersionLog(store, "taxi")
    head = grow(log, 3)
    hooks = together(
        act_once("create", "log/", "after", lambda: restored(log)),
        Fails("delete", "log/", "before", PermissionDenied("no")),
    )
    with pytest.raises(CorruptObject, match="begun anew"):
        append(VersionLog(FaultStore(store, hooks), "taxi"), head)
    assert "could not be taken back" in caplog.text
    with pytest.raises(CorruptObject, match="version 2 is gone"):
        log.head()


def test_a_commit_asks_for_its_parent_twice_and_nothing_more(memory: MemoryStore) -> None:
    head = grow(VersionLog(memory, "taxi"), 3)
    count = Counting()
    append(VersionLog(FaultStore(memory, count), "taxi"), head)
    assert count.calls == {"write": 3, "read": 2, "create": 1}


def test_a_newer_tidemills_head_is_refused_as_such(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    grow(log, 2)
    memory.write(manifest_key(1), memory.read(manifest_key(1)).replace(b'"format": "2.4"', b'"format": "2.5"'))
    with pytest.raises(UnsupportedFormat, match="Upgrade"):
        log.head()


# ---- history and names ---------------------------------------------------------------------------------------------------


def test_a_limited_history_reads_no_more_than_it_yields(memory: MemoryStore) -> None:
    head = grow(VersionLog(memory, "taxi"), 6)
    count = Counting()
    log = VersionLog(FaultStore(memory, count), "taxi")
    assert [v.number for v in log.history(head, 3)] == [5, 4, 3]
    assert count.calls == {"read": 2}
    assert list(log.history(head, 0)) == []
    assert [v.number for v in log.history(head, 99)] == [5, 4, 3, 2, 1, 0]


# ---- blobs ---------------------------------------------------------------------------------------------------------------


def test_a_blob_that_is_gone_was_removed_by_retention(log: VersionLog) -> None:
    ref = grow(log, 1).manifest.blobs.weights
    log.store.delete(ref.key)
    with pytest.raises(UnknownVersion, match="is gone: retention"):
        log.read_blob(ref)


@pytest.mark.parametrize("bad", [b"weights 1", b"weights ", b"weights 00", b"", b"Weights 0"])
def test_a_blob_of_other_bytes_is_refused(log: VersionLog, bad: bytes) -> None:
    ref = grow(log, 1).manifest.blobs.weights
    log.store.write(ref.key, bad)
    with pytest.raises(
        CorruptObject, match=r"is not what was committed: (.* bytes|sha256 .*) instead of .*Nothing was loaded"
    ):
        log.read_blob(ref)


def test_altered_tombstones_are_refused(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    head = grow(log, 1)
    assert head.manifest.blobs.tombstones is not None
    memory.write(head.manifest.blobs.tombstones.key, b"")
    with pytest.raises(CorruptObject, match="not what was committed"):
        log.tombstones(head)


def consume(log: VersionLog, parent: Version, *names: int) -> Version:
    """A version that consumed these shards and stores no tombstones of its own unless they are due."""
    number, remembered = parent.number + 1, log.tombstones(parent)
    shards = [shard(name) for name in names]
    for each in consumed_objects(shards):
        remembered.add(each.inbox, each.key, each.sha256, each.etag)
    due = log.tombstones_due(parent, remembered.unstored)
    blobs = Blobs(
        weights=log.write_blob(number, "safetensors", b"w"),
        state=log.write_blob(number, "state.safetensors", b"s"),
        tombstones=log.write_tombstones(number, remembered) if due else log.named_tombstones(parent),
    )
    return log.commit(parent, Entry(kind="online", spec={}, blobs=blobs, consumed=tuple(shards)))


def shard(name: int) -> Consumed:
    """With labels if the name is odd."""
    about = {"sha256": f"sha-{name}", "etag": f"etag-{name}", "size": 1, "last_modified": datetime.now(UTC)}
    labels = (
        ({"inbox": "labels", "key": f"{name}.parquet", **about, "column": "id", "unmatched": 0},) if name % 2 else ()
    )
    rest = {"ordinal": name, "rows": 1, "unlabelled": 0, "score": {}, "labels": labels}
    return Consumed.model_validate({"inbox": "s3://in", "key": f"{name}.parquet", **about, **rest})


def first(log: VersionLog) -> Version:
    blobs = Blobs(weights=log.write_blob(0, "safetensors", b"w"), state=log.write_blob(0, "state.safetensors", b"s"))
    return log.commit(None, Entry(kind="batch", spec={}, blobs=blobs))


def test_tombstones_are_those_of_an_older_blob_and_of_the_manifests_since(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tombstones_module, "WHOLE_VERSIONS", 3)
    log = VersionLog(memory, "taxi")
    version = first(log)
    blobs: list[str | None] = []
    for number in range(1, 10):
        version = consume(log, version, number)
        ref = version.manifest.blobs.tombstones
        blobs.append(None if ref is None else ref.key)
        expected = {("s3://in", f"{n}.parquet", f"sha-{n}") for n in range(1, number + 1)}
        expected |= {("labels", key, digest) for _, key, digest in expected if int(key[0]) % 2}
        assert set(log.tombstones(version)) == expected
    assert blobs[:2] == [None, None]
    assert len({*blobs}) == 1 + 2  # of versions 3 and 7
    assert blobs[2] == blobs[5] != blobs[6] == blobs[8]


def test_opening_tombstones_costs_the_manifests_since_the_blob_alone(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tombstones_module, "WHOLE_VERSIONS", 3)
    log = VersionLog(memory, "taxi")
    version = first(log)
    for number in range(1, 30):
        version = consume(log, version, number)
    calls: list[Call] = []
    VersionLog(FaultStore(memory, calls.append), "taxi").tombstones(version)
    read = {call.key for call in calls if call.verb == "read" and "/log/" in call.key}
    assert len(read) == version.number - 1 - 27


def test_many_shards_are_stored_at_once(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones_module, "WHOLE_SHARDS", 4)
    log = VersionLog(memory, "taxi")
    version = consume(log, first(log), 2, 4)
    assert version.manifest.blobs.tombstones is None
    version = consume(log, version, 6, 8)
    assert version.manifest.blobs.tombstones is not None
    assert version.manifest.blobs.tombstones.version == 2
    assert len(log.tombstones(version)) == 4


def test_what_consumes_nothing_carries_tombstones_on_and_stores_them_when_due(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many retrainings and rollbacks there are, no run has to read them all."""
    monkeypatch.setattr(tombstones_module, "WHOLE_VERSIONS", 3)
    log = VersionLog(memory, "taxi")
    consume(log, first(log), 2)
    for _ in range(8):
        back = log.rollback(log.version(1))
        assert list(log.tombstones(back)) == [("s3://in", "2.parquet", "sha-2")]
    ref = back.manifest.blobs.tombstones
    assert ref is not None
    assert ref.version is not None
    assert ref.version > 6


def test_tombstones_of_a_manifest_that_does_not_say_of_which_version_are_its_own(memory: MemoryStore) -> None:
    """Registries of 2026-11-26 and before."""
    log = VersionLog(memory, "taxi")
    old = Tombstones()
    old.add("s3://in", "1.parquet", "sha-1", "etag-1")
    ref = log.write_tombstones(0, old).model_copy(update={"version": None})
    blobs = Blobs(weights=log.write_blob(0, "safetensors", b"w"), state=log.write_blob(0, "s", b"s"), tombstones=ref)
    version = log.commit(None, Entry(kind="batch", spec={}, blobs=blobs))
    assert '"version": null' not in memory.read("taxi/log/00000000.json").decode()
    assert len(log.tombstones(version)) == 1
    version = consume(log, consume(log, version, 2), 4)
    assert version.manifest.blobs.tombstones == ref.model_copy(update={"version": 0})
    assert {key for _, key, _ in log.tombstones(version)} == {"1.parquet", "2.parquet", "4.parquet"}


@pytest.mark.parametrize("change", ["altered", "gone"])
def test_tombstones_are_refused_if_a_manifest_among_them_is_not_what_was_committed(
    memory: MemoryStore, change: str
) -> None:
    log = VersionLog(memory, "taxi")
    version = first(log)
    for number in range(1, 5):
        version = consume(log, version, number)
    key = "taxi/log/00000002.json"
    if change == "gone":
        memory.delete(key)
    else:
        fields = json.loads(memory.read(key))
        del fields["checksum"]
        memory.write(key, checked(fields | {"consumed": []}))
    with pytest.raises(CorruptObject, match="history was altered"):
        log.tombstones(version)


# ---- committing ----------------------------------------------------------------------------------------------------------


def test_the_slower_of_two_runs_is_told_so(log: VersionLog) -> None:
    first = append(log, None)
    winner = append(log, first, metrics={"who": "a"})
    with pytest.raises(HeadMoved, match="another run committed version 1 first"):
        append(log, first, metrics={"who": "b"})
    assert log.head() == winner


def test_a_model_is_begun_once(log: VersionLog) -> None:
    first = append(log, None)
    with pytest.raises(HeadMoved):
        append(log, None)
    assert log.head() == first


def test_a_run_that_slept_for_many_versions_cannot_commit(log: VersionLog) -> None:
    first = append(log, None)
    head = append(log, append(log, first))
    with pytest.raises(HeadMoved):
        append(log, first)
    assert log.head() == head


@pytest.mark.parametrize("number", [0, 1])
def test_of_16_racing_runs_exactly_one_wins(log: VersionLog, number: int) -> None:
    parent = grow(log, number) if number else None
    barrier = Barrier(16)

    def run(who: int) -> Version | HeadMoved:
        barrier.wait()
        try:
            return append(log, parent, metrics={"who": who})
        except HeadMoved as moved:
            return moved

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(run, range(16)))
    winners = [r for r in results if isinstance(r, Version)]
    assert len(winners) == 1
    assert log.head() == winners[0]
    assert log.read_blob(winners[0].manifest.blobs.weights) == f"weights {number}".encode()


def test_runs_that_reload_after_losing_all_get_their_turn(log: VersionLog) -> None:
    append(log, None)

    def run(who: int) -> int:
        lost = 0
        while True:
            try:
                append(log, log.head(), metrics={"who": who})
            except HeadMoved:
                lost += 1
                continue
            return lost

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(12)))
    made = [v.manifest.metrics.get("who") for v in log.history(log.head())]
    assert made[-1] is None
    assert sorted(made[:-1]) == list(range(12))  # nobody twice, nobody lost


def test_a_commit_whose_answer_was_lost_and_was_retried_inside_the_store_is_ours(store: Store) -> None:
    """s3fs and proxies send a PUT again: the second finds our own object."""
    faulty = FaultStore(store, Fails("create", "taxi/log/", "after", AlreadyExists("412"), times=9))
    log = VersionLog(faulty, "taxi")
    head = append(log, append(log, None))
    assert VersionLog(store, "taxi").head() == head
    assert head.number == 1


def test_after_a_lost_answer_nothing_is_assumed_and_the_head_tells(store: Store) -> None:
    faulty = FaultStore(store, Fails("create", "00000001.json", "after", Unavailable("no answer")))
    log = VersionLog(faulty, "taxi")
    first = append(log, None)
    with pytest.raises(Unavailable):
        append(log, first, metrics={"who": "us"})
    assert log.head().manifest.metrics == {"who": "us"}  # it had happened: a step that reloads does not repeat it
    with pytest.raises(HeadMoved):
        append(log, first, metrics={"who": "us, from memory"})


def test_a_commit_that_did_not_arrive_can_be_done_again(store: Store) -> None:
    faulty = FaultStore(store, Fails("create", "00000001.json", "before", Unavailable("no route")))
    log = VersionLog(faulty, "taxi")
    first = append(log, None)
    with pytest.raises(Unavailable):
        append(log, first)
    assert log.head() == first
    assert append(log, first).number == 1


def test_a_manifest_that_could_not_be_read_back_is_never_committed(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    blob = BlobRef(key="k", bytes=0, sha256="")
    for metrics in ({"loss": float("nan")}, {"loss": object()}):
        with pytest.raises(ValueError):
            log.commit(None, Entry(kind="batch", spec={}, blobs=Blobs(weights=blob, state=blob), metrics=metrics))
    assert not log.exists()


# ---- rollback ------------------------------------------------------------------------------------------------------------


def test_rolling_back_appends_a_copy_and_keeps_what_happened_since(log: VersionLog) -> None:
    first = append(log, None, metrics={"mae": 1.0}, environment={"torch": "2"})
    head = append(log, first, owed=(DEBT,), metrics={"mae": 9.0}, new_columns={"tip": "float"})
    back = log.rollback(log.version(0))
    assert log.head() == back
    assert (back.number, back.manifest.kind, back.manifest.rolled_back_to) == (2, "rollback", 0)
    assert log.read_blob(back.manifest.blobs.weights) == b"weights 0"
    assert log.read_blob(back.manifest.blobs.state) == b"state 0"
    assert (back.manifest.spec, back.manifest.metrics) == (first.manifest.spec, {"mae": 1.0})
    assert back.manifest.owed == (DEBT,)
    assert back.manifest.new_columns == {"tip": "float"}
    assert back.manifest.blobs.tombstones == head.manifest.blobs.tombstones
    assert list(log.tombstones(back)) == [("s3://in", "1.parquet", "sha-1")]
    assert [v.number for v in log.history(back)] == [2, 1, 0]


def test_a_rolled_back_version_has_blobs_of_its_own(log: VersionLog) -> None:
    grow(log, 2)
    back = log.rollback(log.version(0))
    for ref in (log.version(0).manifest.blobs.weights, log.version(0).manifest.blobs.state):
        log.store.delete(ref.key)
    assert log.read_blob(back.manifest.blobs.weights) == b"weights 0"


def test_rolling_back_by_alias_and_forth_again(log: VersionLog) -> None:
    grow(log, 3)
    promote(log, "champion", log.version(0))
    log.rollback(resolve(log, "champion"))
    assert log.read_blob(log.rollback(log.version(2)).manifest.blobs.weights) == b"weights 2"
    assert log.head().number == 4


def test_rolling_back_to_damaged_blobs_changes_nothing(log: VersionLog) -> None:
    head = grow(log, 2)
    log.store.write(log.version(0).manifest.blobs.weights.key, b"damaged!!")
    with pytest.raises(CorruptObject):
        log.rollback(log.version(0))
    assert log.head() == head


def test_a_rollback_that_is_overtaken_is_void(memory: MemoryStore) -> None:
    plain = VersionLog(memory, "taxi")
    head = grow(plain, 2)
    hook = act_once("create", "00000002.json", "before", lambda: append(plain, head))
    with pytest.raises(HeadMoved):
        VersionLog(FaultStore(memory, hook), "taxi").rollback(plain.version(0))
    assert plain.head().manifest.kind == "online"


def test_a_rollback_that_was_decided_about_another_head_is_void(log: VersionLog) -> None:
    decided = grow(log, 2)
    append(log, decided)
    with pytest.raises(HeadMoved):
        log.rollback(log.version(0), decided)
    assert log.head().number == 2
    assert log.rollback(log.version(0), log.head()).number == 3


# ---- anything, in any order ----------------------------------------------------------------------------------------------


class LogMachine(RuleBasedStateMachine):
    """The log against a list: commits by writers of any age, faults, rollbacks, aliases, collections, lost hints."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(uuid.uuid4().hex)
        self.log = VersionLog(self.store, "taxi")
        self.versions: list[Version] = []
        self.seen: list[Version | None] = [None]  # what some run believes to be the head
        self.aliases: dict[str, int] = {}
        self.retained = 0

    @rule(data=st.data(), fault=st.sampled_from(["none", "retried", "lost", "refused"]))
    def commit(self, data: st.DataObject, fault: str) -> None:
        parent = data.draw(st.sampled_from(self.seen))
        current = parent is (self.versions[-1] if self.versions else None)
        hook = {
            "none": Counting(),
            "retried": Fails("create", "log/", "after", AlreadyExists("412")),
            "lost": Fails("create", "log/", "after", Unavailable("lost")),
            "refused": Fails("create", "log/", "before", Unavailable("refused")),
        }[fault]
        log = VersionLog(FaultStore(self.store, hook), "taxi")
        try:
            version = append(log, parent, metrics={"made": len(self.versions)})
        except HeadMoved:
            assert not current
        except Unavailable:
            if fault == "lost":
                assert current
                self.versions.append(self.log.head())
        else:
            assert current
            assert fault in ("none", "retried")
            self.versions.append(version)

    @rule()
    def look(self) -> None:
        if self.versions:
            self.seen.append(self.log.head())
            assert self.seen[-1] == self.versions[-1]
            self.seen[-1] = self.versions[-1]

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.versions) - 1))
        try:
            self.versions.append(self.log.rollback(self.log.version(number)))
        except UnknownVersion:
            assert number < self.retained

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), alias=st.sampled_from(["champion", "candidate"]))
    def promote(self, data: st.DataObject, alias: str) -> None:
        number = data.draw(st.integers(0, len(self.versions) - 1))
        try:
            promote(self.log, alias, self.versions[number])
        except UnknownVersion:
            return
        self.aliases[alias] = number

    @precondition(lambda self: self.versions)
    @rule(keep=st.integers(1, 4))
    def collect(self, keep: int) -> None:
        collect_garbage(self.log, keep)
        self.retained = max(self.retained, len(self.versions) - keep)
        for version in self.versions[self.retained :]:
            self.log.read_blob(version.manifest.blobs.weights)

    @precondition(lambda self: self.versions)  # without any, a hint is left of a history that is gone
    @rule(hint=st.sampled_from([b"", b"{}", b'{"version": 1}', b'{"version": 99}']))
    def spoil_the_hint(self, hint: bytes) -> None:
        self.store.write("taxi/head.json", hint)

    @invariant()
    def the_log_is_the_list(self) -> None:
        if not self.versions:
            assert not self.log.exists()
            return
        head = self.log.head()
        assert list(self.log.history(head)) == self.versions[::-1]
        self.log.read_blob(head.manifest.blobs.weights)
        self.log.read_blob(head.manifest.blobs.state)
        self.log.tombstones(head)
        assert all_aliases(self.log) == self.aliases
        for alias in self.aliases:
            self.log.read_blob(aliased(self.log, alias).manifest.blobs.weights)


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)

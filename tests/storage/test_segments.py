"""Large files in segments: what a version has not changed is not stored again, of a table only changed rows; all verified."""

import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.storage.faults import Call, FaultStore
from tests.storage.histories import keys
from tests.storage.segmented import InSegments
from tidemill.storage.aliases import promote
from tidemill.storage.audit import audit
from tidemill.storage.blobs import STREAMED_ABOVE
from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject, HeadMoved, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Entry, encode
from tidemill.storage.memory import MemoryStore
from tidemill.storage.pieces import BLOCK, Buffers
from tidemill.storage.refs import FileRef, Segment, Segments
from tidemill.storage.retention import collect_garbage
from tidemill.storage.segments import CHANGED_SHARE, LEAST, MOST_CHANGES, MOST_SEGMENTS, cut, is_of
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store
from tidemill.tasks.training.tensors import buffers_of

ROWS, WIDTH = 4096, 16  # rows of 64 bytes
LARGE = 256 * 2**10


class Learner:
    """A frozen layer, a table, and little that changes with each step; of the table a moment."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.weights: dict[str, Tensor] = {
            "frozen": torch.randn(300, 300, generator=made),
            "head": torch.randn(7, generator=made),
            "table": torch.randn(ROWS, WIDTH, generator=made),
        }
        self.state = {"sum": torch.zeros(ROWS, WIDTH), "steps": torch.zeros(1)}
        self.touched: set[int] | None = None

    def step(self, *rows: int) -> None:
        for row in rows:
            self.weights["table"][row] += 0.5
            self.state["sum"][row] += 1
        self.weights["head"] += 1
        self.state["steps"] += 1
        self.touched = {*(self.touched or ()), *rows}

    def pieces(self) -> tuple[Any, Any]:
        return buffers_of(self.weights), buffers_of(self.state, {"about": str(self.state["steps"].item())})

    @property
    def files(self) -> tuple[bytes, bytes]:
        weights, state = self.pieces()
        return b"".join(weights), b"".join(state)

    def rows(self) -> tuple[Any, Any]:
        """What is known of changed rows since the last call."""
        touched, self.touched = self.touched, set()
        if touched is None:
            return {}, {}
        rows = np.array(sorted(touched), np.int64)
        return {"table": rows}, {"sum": rows}


class Log(InSegments):
    least_segment = LARGE // 2


def new_log(store: Store | None = None, kind: type[VersionLog] = Log) -> VersionLog:
    return kind(store or MemoryStore(uuid.uuid4().hex), "taxi")


def commit(log: VersionLog, parent: Version | None, learner: Learner, *, rows: bool = True) -> Version:
    """What a run does."""
    number = 0 if parent is None else parent.number + 1
    known = learner.rows()
    refs = log.write_learner(
        number, learner.pieces(), None if parent is None else parent.manifest.blobs, known if rows else ({}, {})
    )
    blobs = Blobs(weights=refs[0], state=refs[1], tombstones=log.carried_tombstones(parent))
    kind = "batch" if parent is None else "online"
    return log.commit(parent, Entry(kind=kind, spec={}, blobs=blobs, counters={"shards": 0}))


def read(log: VersionLog, version: Version) -> tuple[bytes, bytes]:
    """Both files as a stream gives them; the same as whole."""

    def taken(*sources: Any) -> list[bytes]:
        found = []
        for source in sources:
            data = bytearray(source.nbytes)
            assert source.readinto(memoryview(data)) == len(data)
            found.append(bytes(data))
        return found

    blobs = version.manifest.blobs
    weights, state = log.read_blobs((blobs.weights, blobs.state), taken)
    assert [weights, state] == [log.read_blob(blobs.weights), log.read_blob(blobs.state)]
    return weights, state


def segment(version: Version, name: str) -> Segment:
    [found] = [
        each
        for file in (version.manifest.blobs.weights, version.manifest.blobs.state)
        for each in file.units
        if isinstance(each, Segment) and each.name == name
    ]
    return found


def grown(log: VersionLog, versions: int) -> tuple[Learner, Version, list[tuple[bytes, bytes]]]:
    """A history in which each version changes a row of its own, and what each version held."""
    learner = Learner()
    head = commit(log, None, learner)
    files = [learner.files]
    for number in range(1, versions):
        learner.step(number)
        head = commit(log, head, learner)
        files.append(learner.files)
    return learner, head, files


def test_a_process_that_has_not_read_the_version_before_stores_the_whole_table() -> None:
    """It does not know what the rows would lie over: with one row forgotten, nobody could read it."""
    log = new_log()
    learner, head, _ = grown(log, 2)
    learner.step(5, 6)
    learner.touched = {5}
    version = commit(new_log(log.store), head, learner)
    assert segment(version, "table").changed is None
    assert read(new_log(log.store), version) == learner.files


# ---- what is stored ------------------------------------------------------------------------------------------------------
def test_a_small_file_is_one_blob_and_a_large_one_is_in_segments() -> None:
    log, pieces = new_log(kind=VersionLog), Learner().pieces()
    refs = log.write_learner(0, pieces)
    assert [(ref.bytes, ref.sha256) for ref in refs] == [(len(Buffers(p)), Buffers(p).sha256()) for p in pieces]
    assert len(keys(log.store)) == 2
    large = buffers_of({"a": torch.zeros(STREAMED_ABOVE // 4), "b": torch.zeros(3)})
    weights, state = log.write_learner(0, (large, pieces[1]))
    assert isinstance(weights, Segments)
    assert [each.name for each in weights.segments] == ["", "a", "b"]
    assert state.sha256 == refs[1].sha256, "a small state beside large weights"


def test_where_a_file_is_cut_follows_from_its_bytes() -> None:
    tensors = {f"{n:04}": torch.full((n % 5 + 1, LARGE // 16), n, dtype=torch.float32) for n in range(40)}
    cuts = cut(buffers_of(tensors | {"none": torch.zeros(0, 3), "one": torch.tensor(1.0)}), LARGE)
    joined = b"".join(bytes(piece) for each in cuts for piece in each.pieces)
    assert joined == b"".join(buffers_of(tensors | {"none": torch.zeros(0, 3), "one": torch.tensor(1.0)}))
    alone = {each.name: each for each in cuts if each.row_bytes}
    assert all(len(each.pieces) >= LARGE for each in alone.values())
    assert {name for name, tensor in tensors.items() if tensor.nbytes >= LARGE} == set(alone)
    assert all(each.row_bytes == LARGE // 4 for each in alone.values())
    many = buffers_of({f"{n:05}": torch.zeros(LEAST // 4) for n in range(5 * MOST_SEGMENTS)})
    assert len(cut(many)) <= MOST_SEGMENTS + 1, "of a larger file they are longer"


def test_what_a_version_has_not_changed_is_not_stored_again() -> None:
    """Whether or not it is known that it is the same."""
    for rows in (True, False):
        log, learner = new_log(), Learner()
        first = commit(log, None, learner, rows=rows)
        before = keys(log.store)
        learner.step()
        second = commit(log, first, learner, rows=rows)
        for name in ("frozen", "table", "sum"):
            assert segment(second, name) == segment(first, name)
        written = {key: len(log.store.read(key)) for key in keys(log.store, "taxi/blobs/") - before}
        assert sum(written.values()) < 1000, "the header of the state, and what is small"
        assert read(log, second) == learner.files
        assert read(new_log(log.store), second) == learner.files


@pytest.mark.slow
def test_of_a_table_only_changed_rows_are_stored_and_the_whole_one_now_and_then() -> None:
    log = new_log()
    _, head, files = grown(log, MOST_CHANGES + 3)
    chains = [len(segment(log.version(number), "table").changed or ()) for number in range(head.number + 1)]
    assert chains == [*range(MOST_CHANGES + 1), 0, 1]
    for number, file in enumerate(files):
        assert read(new_log(log.store), log.version(number)) == file
    changed = segment(log.version(5), "table").changed
    assert changed is not None
    assert [(each.rows, each.bytes) for each in changed] == [(1, 8 + 4 * WIDTH)] * 5


def test_many_rows_are_stored_as_the_whole_table() -> None:
    log, learner = new_log(), Learner()
    head, share = commit(log, None, learner), ROWS // CHANGED_SHARE
    learner.step(*range(share))  # with their numbers that is more than the share
    head = commit(log, head, learner)
    assert segment(head, "table").changed is None
    for _ in range(2):
        learner.step(*range(share // 2))
        head = commit(log, head, learner)
    assert segment(head, "table").changed is None, "so it is of several versions together"
    assert read(log, head) == learner.files


def test_the_same_bits_have_the_same_sha256_however_they_are_stored() -> None:
    log = new_log()
    learner, head, _ = grown(log, 6)
    assert segment(head, "table").changed
    whole = new_log().write_learner(0, learner.pieces())
    blobs = head.manifest.blobs
    assert [each.sha256 for each in whole] == [blobs.weights.sha256, blobs.state.sha256]
    for ref, part in zip((blobs.weights, blobs.state), learner.pieces(), strict=True):
        assert is_of(ref, Buffers(part))
    learner.weights["table"][3] += 1
    assert not is_of(blobs.weights, Buffers(learner.pieces()[0]))
    assert not is_of(blobs.weights, Buffers(learner.pieces()[0][:-1]))


def test_what_is_known_of_one_tensor_says_nothing_of_its_neighbours_in_a_segment() -> None:
    log = new_log()

    def written(head: int, parent: Blobs | None = None) -> FileRef:
        file = buffers_of(
            {"head": torch.full((7,), 1.0), "tail": torch.full((7,), float(head)), "x": torch.zeros(LARGE)}
        )
        known = {"head": np.zeros(0, np.int64), "x": np.zeros(0, np.int64)}
        return log.write_learner(head, (file, file), parent, (known, known))[0]

    first = written(0)
    second = written(1, Blobs(weights=first, state=first))
    assert isinstance(second, Segments)
    assert [each.name for each in second.segments] == ["", "head", "x"]
    assert second.segments[1].key.startswith("taxi/blobs/00000001-")
    assert second.segments[2] == first.units[2]


def test_rows_that_were_touched_and_are_the_same_are_not_stored() -> None:
    log, learner = new_log(), Learner()
    head = commit(log, None, learner)
    learner.touched = {1, 2, 3}
    assert segment(commit(log, head, learner), "table") == segment(head, "table")


@pytest.mark.parametrize("width", [1, 3, 5000, 40_000])
def test_rows_of_any_length_lie_across_blocks_and_ranges(width: int) -> None:
    count = 3_000_000 // width
    log = new_log()
    learner = Learner()
    learner.weights["table"], learner.state["sum"] = torch.randn(count, width), torch.zeros(count, width)
    head = commit(log, None, learner)
    for rows in ((0, count - 1), (1, 2, count // 2), (count // 2,), range(0, count, 40)):
        learner.step(*rows)
        head = commit(log, head, learner)
    assert segment(head, "table").changed
    assert read(log, head) == learner.files
    assert read(new_log(log.store), head) == learner.files


class Counted:
    """A tensor's bytes, as those on an accelerator are: fetched part by part. Counts them."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.taken, self.nbytes = data, 0, data.nbytes

    def __getitem__(self, part: slice, /) -> memoryview:
        found = self.data[part]
        self.taken += found.nbytes
        return found


def test_to_find_what_changed_costs_what_changed() -> None:
    log, learner = new_log(), Learner()
    head = commit(log, None, learner)

    def again(log: VersionLog, head: Version) -> tuple[Version, int]:
        learner.step(5, 6, 900)
        weights, state = learner.pieces()
        table = Counted(weights[-1])
        known = learner.rows()
        refs = log.write_learner(head.number + 1, ([*weights[:-1], table], state), head.manifest.blobs, known)
        blobs = Blobs(weights=refs[0], state=refs[1])
        return log.commit(head, Entry(kind="online", spec={}, blobs=blobs)), table.taken

    assert [each.name for each in cut(learner.pieces()[0], LARGE // 2)][-1] == "table"
    head, taken = again(log, head)
    assert taken <= 2 * BLOCK + 3 * 4 * WIDTH
    fresh = new_log(log.store)
    assert read(fresh, head) == learner.files
    head, taken = again(fresh, head)
    assert taken <= 2 * BLOCK + 3 * 4 * WIDTH, "what was read once is known"
    head, taken = again(new_log(log.store), head)
    assert LARGE <= taken <= LARGE + 3 * 4 * WIDTH, "else it is hashed once"
    assert read(log, head) == learner.files


# ---- what is verified ----------------------------------------------------------------------------------------------------
def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("which", ["the base", "changed rows", "numbers"])
@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_damage_anywhere_is_found(which: str, damage: str) -> None:
    log = new_log()
    _, head, _ = grown(log, 4)
    found = segment(head, "table")
    assert found.changed
    key = found.key if which == "the base" else found.changed[1].key
    data = log.store.read(key)
    if damage == "altered":
        log.store.write(key, flipped(data, 4 if which == "numbers" else len(data) - 1))
    elif damage == "cut":
        log.store.write(key, data[:-1])
    else:
        log.store.delete(key)
    error = UnknownVersion if damage == "gone" else CorruptObject
    for attempt in (
        lambda: read(log, head),
        lambda: log.verify_blob(head.manifest.blobs.weights),
        lambda: log.verify_blob(found),
        lambda: log.copy_blobs(head.number + 1, head.manifest.blobs),
    ):
        with pytest.raises(error, match="is gone: retention" if damage == "gone" else "is not what was committed"):
            attempt()
    findings = audit(log).findings
    assert any(key.rpartition("/")[2] in each or found.key in each for each in findings), findings


def test_a_row_beyond_the_table_is_no_row() -> None:
    """A manifest that was made by hand: nothing is read beyond what is there."""
    log = new_log()
    _, head, _ = grown(log, 2)
    found = segment(head, "table")
    assert found.changed
    ref = log.write_blob(9, "rows", (10**9).to_bytes(8, "little") + bytes(4 * WIDTH))
    wrong = found.changed[0].model_copy(update={"key": ref.key, "sha256": ref.sha256})
    with pytest.raises(CorruptObject, match="is not what was committed"):
        log.verify_blob(found.model_copy(update={"changed": (wrong,)}))
    odd = found.changed[0].model_copy(update={"key": ref.key, "sha256": ref.sha256, "rows": 7})
    with pytest.raises(CorruptObject, match=r"changed rows cannot be read: .* are not 7 rows"):
        log.verify_blob(found.model_copy(update={"changed": (odd,)}))


def test_segments_that_do_not_make_the_file_are_no_manifest() -> None:
    log = new_log()
    _, head, _ = grown(log, 1)
    weights = head.manifest.blobs.weights
    assert isinstance(weights, Segments)
    for change in ({"bytes": weights.bytes + 1}, {"sha256": "0" * 64}, {"segments": weights.segments[1:]}):
        with pytest.raises(ValueError, match="not those of its segments"):
            Segments.model_validate(weights.model_copy(update=change).model_dump())


def test_segments_are_read_at_once_and_no_more_than_the_store_can_do_with() -> None:
    log = new_log()
    learner, head, _ = grown(log, 3)
    under_way, most, lock = 0, 0, threading.Lock()

    def hook(call: Call) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1 if call.phase == "before" else -1
            most = max(most, under_way)

    assert read(new_log(FaultStore(log.store, hook, concurrency=3)), head) == learner.files
    assert most <= 3


class InParts(MemoryStore):
    """Notes how many objects are written at once, small ones and those that it would send in parts."""

    concurrency = 3
    one_call_below = LARGE // 4

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.under_way, self.most = 0, {"small": 0, "large": 0}
        self._changed = threading.Condition()

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        kind, enough, seconds = ("small", 3, 10) if len(data) <= self.one_call_below else ("large", 2, 0.1)
        with self._changed:
            self.under_way += 1
            self.most[kind] = max(self.most[kind], self.under_way)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most[kind] >= enough, seconds)  # for others, if any come
        try:
            return super().write(key, data)
        finally:
            with self._changed:
                self.under_way -= 1


def test_a_segment_that_the_store_sends_in_parts_is_sent_alone() -> None:
    store = InParts()
    small = {f"small{n}": torch.full((LARGE // 32,), float(n)) for n in range(3)}
    large = {f"large{n}": torch.full((LARGE // 8,), float(n)) for n in range(3)}
    weights, state = buffers_of({**small, **large}), buffers_of({})
    log = new_log(store)
    log.segmented_above, log.least_segment = 1000, LARGE // 8
    ref, _ = log.write_learner(0, (weights, state))
    assert log.read_blob(ref) == b"".join(weights)
    assert store.most == {"small": 3, "large": 1}


@pytest.mark.parametrize(("url", "size"), [("s3://bucket", 64), ("gs://bucket", 32), ("az://container", 8)])
def test_a_store_says_what_it_sends_by_one_call(url: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    assert open_store(url).one_call_below == size * 2**20


# ---- who keeps what is named ---------------------------------------------------------------------------------------------
def test_a_collection_keeps_what_a_version_names_whoever_has_stored_it() -> None:
    log = new_log()
    _, _, files = grown(log, 8)
    promote(log, "champion", log.version(3))
    deleted = collect_garbage(log, keep=2)
    assert deleted
    for number in (3, 6, 7):
        assert read(new_log(log.store), log.version(number)) == files[number]
    kept = {key for number in (3, 6, 7) for key in log.version(number).manifest.blobs.object_keys}
    assert keys(log.store, "taxi/blobs/") == kept
    assert audit(log).findings == []
    assert collect_garbage(log, keep=2) == []


def test_a_version_names_no_blobs_but_its_own_and_its_parents() -> None:
    """Those of an older version may be going at this moment."""
    log, learner = new_log(), Learner()
    first = commit(log, None, learner)
    learner.weights["frozen"] += 1
    second = commit(log, first, learner)
    before = keys(log.store)
    for blobs in (
        first.manifest.blobs,
        second.manifest.blobs.model_copy(update={"weights": first.manifest.blobs.weights}),
    ):
        with pytest.raises(ValueError, match=r"version 2 would name taxi/blobs/00000000-.*, which its parent does not"):
            log.commit(second, Entry(kind="online", spec={}, blobs=blobs))
    with pytest.raises(ValueError, match="version 0 would name"):
        new_log().commit(None, Entry(kind="batch", spec={}, blobs=second.manifest.blobs))
    assert keys(log.store) == before
    assert log.head().number == 1


def test_the_audit_finds_a_version_that_names_blobs_of_others() -> None:
    log, learner = new_log(), Learner()
    first = commit(log, None, learner)
    learner.weights["frozen"] += 1
    second = commit(log, first, learner)
    third = commit(log, second, learner)
    forged = third.manifest.model_copy(update={"blobs": first.manifest.blobs})
    log.store.write(log.manifest_key(2), encode(forged))
    assert any("names blobs that it has not stored" in each for each in audit(log).findings)


def calls_of(log: VersionLog, run: Callable[[VersionLog], object]) -> int:
    """How many calls of its store a run makes."""
    seen = [0]

    def hook(call: Call) -> None:
        seen[0] += call.phase == "before"

    run(type(log)(FaultStore(log.store, hook, concurrency=1), "taxi"))
    return seen[0]


def copied(store: Store) -> MemoryStore:
    copy = MemoryStore(uuid.uuid4().hex)
    for info in store.list():
        copy.write(info.key, store.read(info.key))
    return copy


def at_each_call(
    store: Store,
    run: Callable[[VersionLog], object],
    meanwhile: Callable[[VersionLog], object],
    check: Callable[[VersionLog], None],
    overtaken: tuple[type[Exception], ...] = (),
) -> None:
    """On a copy of the store each time: something happens before each call of a run, which may be overtaken by it."""
    total = calls_of(new_log(copied(store)), run)
    assert total > 3
    for at in range(total):
        own, seen = copied(store), [-1]

        def hook(call: Call, at: int = at, own: Store = own, seen: list[int] = seen) -> None:
            if call.phase == "before":
                seen[0] += 1
                if seen[0] == at:
                    meanwhile(new_log(own))

        with suppress(*overtaken):
            run(new_log(FaultStore(own, hook, concurrency=1)))
        check(new_log(own))


def is_sound(log: VersionLog) -> None:
    """The head, and every alias, can be read."""
    log.verify_blob(log.head().manifest.blobs.weights)
    log.verify_blob(log.head().manifest.blobs.state)
    assert audit(log).findings == []


def another(log: VersionLog, *rows: int) -> Version:
    """Go on from the head, as a process that has read it: with changed rows."""
    head, learner = log.head(), Learner()
    weights, state = (log.read_blob(ref) for ref in (head.manifest.blobs.weights, head.manifest.blobs.state))
    fill(learner.weights, weights)
    fill(learner.state, state)
    learner.touched = set()
    learner.step(*rows)
    return commit(log, head, learner)


def fill(tensors: dict[str, Tensor], file: bytes) -> None:
    from safetensors.torch import load

    for name, tensor in load(file).items():
        tensors[name].copy_(tensor)


@pytest.mark.slow
def test_a_commit_that_names_its_parents_blobs_is_whole_whenever_a_collection_comes() -> None:
    log = new_log()
    grown(log, 4)
    number = log.head().number

    def is_committed(log: VersionLog) -> None:
        assert log.head().number == number + 1
        is_sound(log)

    at_each_call(log.store, lambda log: another(log, 7), lambda log: collect_garbage(log, keep=1), is_committed)


@pytest.mark.slow
def test_a_collection_that_is_slow_takes_nothing_that_later_versions_name() -> None:
    """While it stands before any of its calls, three more versions come: whole tables, rows, a rollback."""

    def meanwhile(log: VersionLog) -> None:
        another(log, *range(ROWS // 2))
        another(log, 9)
        log.rollback(log.version(log.head().number - 1))
        another(log, 10)

    log = new_log()
    grown(log, 4)
    at_each_call(log.store, lambda log: collect_garbage(log, keep=1), meanwhile, is_sound)


@pytest.mark.slow
def test_a_rollback_is_whole_whenever_a_collection_comes() -> None:
    log = new_log()
    grown(log, 5)
    at_each_call(
        log.store,
        lambda log: log.rollback(log.version(1)),
        lambda log: collect_garbage(log, keep=1),
        is_sound,
        overtaken=(UnknownVersion,),  # its blobs are gone by then
    )


def test_a_rollback_stores_what_the_head_does_not_name() -> None:
    log = new_log()
    learner, head, files = grown(log, 4)
    before = keys(log.store, "taxi/blobs/")
    back = log.rollback(log.version(1))
    assert read(new_log(log.store), back) == files[1]
    assert (back.manifest.blobs.weights.sha256, segment(back, "frozen")) == (
        log.version(1).manifest.blobs.weights.sha256,
        segment(head, "frozen"),
    )
    assert segment(back, "table").changed is None
    assert not {key for key in segment(back, "table").object_keys if key in before}
    collect_garbage(log, keep=1)
    is_sound(log)
    assert commit(log, back, learner).number == back.number + 1


@pytest.mark.slow
def test_a_follower_that_slept_names_nothing_that_is_gone() -> None:
    """It has the blocks of a version in memory that others have left behind: its commit is refused."""
    log = new_log()
    learner, head, _ = grown(log, 3)
    others = new_log(log.store)
    for row in range(3):
        another(others, row)
    collect_garbage(others, keep=1)
    learner.step(5)
    with pytest.raises(HeadMoved):
        commit(log, head, learner)
    is_sound(others)
    assert another(log, 6).number == head.number + 4
    collect_garbage(others, keep=1)
    is_sound(others)

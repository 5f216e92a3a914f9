"""Retention: which blobs a collection removes, and which never, whatever others do meanwhile."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from tests.storage.faults import FaultStore, act_once
from tests.storage.histories import append, grow, keys, manifest_key
from tidemill.storage.aliases import promote
from tidemill.storage.chain import Version
from tidemill.storage.errors import (
    CorruptObject,
    HeadMoved,
    NotFound,
    PermissionDenied,
    UnknownModel,
    UnknownVersion,
)
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import (
    Blobs,
    Entry,
)
from tidemill.storage.memory import MemoryStore
from tidemill.storage.retention import STALE, collect_garbage
from tidemill.storage.store import Store, Upload


@pytest.fixture
def log(store: Store) -> VersionLog:
    return VersionLog(store, "taxi")


@pytest.fixture
def memory() -> MemoryStore:
    """For what does not depend on the backend."""
    return MemoryStore(uuid.uuid4().hex)


# ---- retention -----------------------------------------------------------------------------------------------------------


def blob_keys(*versions: Version) -> set[str]:
    return {
        ref.key
        for v in versions
        for ref in (v.manifest.blobs.weights, v.manifest.blobs.state, v.manifest.blobs.tombstones)
        if ref is not None
    }


def test_retention_keeps_the_last_versions_and_the_aliased(log: VersionLog) -> None:
    grow(log, 6)
    versions = {v.number: v for v in log.history(log.head())}
    promote(log, "champion", versions[1])
    deleted = collect_garbage(log, keep=2)
    assert set(deleted) == blob_keys(versions[0], versions[2], versions[3])
    assert keys(log.store, "taxi/blobs/") == blob_keys(versions[1], versions[4], versions[5])
    assert [v.number for v in log.history(log.head())] == [5, 4, 3, 2, 1, 0]
    assert collect_garbage(log, keep=2) == []


def test_retention_removes_what_lost_attempts_left_but_nothing_above_the_head(log: VersionLog) -> None:
    head = grow(log, 3)
    lost = [log.write_blob(number, "safetensors", b"lost").key for number in (0, 1, 2)]
    coming = [log.write_blob(number, "safetensors", b"coming").key for number in (3, 4, 10_000_000)]
    assert set(collect_garbage(log, keep=3)) == set(lost)
    assert set(coming) <= keys(log.store)
    assert log.head() == head


def test_retention_touches_only_what_looks_like_its_own(log: VersionLog) -> None:
    grow(log, 2)
    uuid = "0" * 32
    foreign = {
        "taxi/blobs/README.md",
        f"taxi/blobs/00000000-{uuid}",
        f"taxi/blobs/0-{uuid}.safetensors",
        f"taxi/blobs/x/00000000-{uuid}.safetensors",
        f"taxi2/blobs/00000000-{uuid}.safetensors",
        f"taxi/blobs2/00000000-{uuid}.safetensors",
        "taxi/quarantine/00000000-abc",
        "taxi/runs/k/00000001.json",
    }
    for key in foreign:
        log.store.write(key, b"foreign")
    collect_garbage(log, keep=1)
    assert foreign <= keys(log.store)


def test_a_tombstone_blob_shared_with_a_retained_version_stays(log: VersionLog) -> None:
    grow(log, 2)
    back = log.rollback(log.version(0))
    collect_garbage(log, keep=1)
    assert keys(log.store, "taxi/blobs/") == blob_keys(back)
    assert len(log.tombstones(log.head())) == 1


@pytest.mark.parametrize("keep", [0, -1])
def test_the_head_is_always_kept(log: VersionLog, keep: int) -> None:
    grow(log, 1)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        collect_garbage(log, keep)


def test_retention_of_an_unknown_model_deletes_nothing(log: VersionLog) -> None:
    ref = log.write_blob(0, "safetensors", b"about to begin")
    with pytest.raises(UnknownModel):
        collect_garbage(log, keep=1)
    assert log.read_blob(ref) == b"about to begin"


def test_retention_refuses_to_judge_by_damaged_records(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    grow(log, 4)
    before = keys(memory)
    memory.write(manifest_key(2), b"damaged")
    with pytest.raises(CorruptObject):
        collect_garbage(log, keep=3)
    assert keys(memory) == before
    memory.write("taxi/aliases/champion.json", b"damaged")
    with pytest.raises(CorruptObject):
        collect_garbage(log, keep=1)
    assert keys(memory) == before | {"taxi/aliases/champion.json"}


def test_an_alias_to_nowhere_does_not_stop_retention(memory: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    log = VersionLog(memory, "taxi")
    grow(log, 3)
    memory.write("taxi/aliases/stale.json", b'{"version": 99, "moves": 0}')
    assert len(collect_garbage(log, keep=1)) == 6
    assert "'stale' names version 99" in caplog.text


def test_two_collectors_at_once_do_each_others_work(log: VersionLog) -> None:
    grow(log, 8)
    with ThreadPoolExecutor(4) as pool:
        deleted = [key for keys_ in pool.map(lambda _: collect_garbage(log, keep=1), range(4)) for key in keys_]
    assert len(deleted) >= 7 * 3  # on some stores two may both see one deletion succeed
    assert keys(log.store, "taxi/blobs/") == blob_keys(log.head())


@pytest.mark.parametrize(
    ("verb", "text", "phase"),
    [
        ("list", "blobs", "after"),
        ("read", "log/", "before"),
        ("list", "aliases", "before"),
        ("delete", "blobs", "before"),
    ],
)
def test_a_rollback_in_the_middle_of_a_collection_keeps_its_blobs(
    store: Store, verb: str, text: str, phase: str
) -> None:
    plain = VersionLog(store, "taxi")
    grow(plain, 3)
    hook = act_once(verb, text, phase, lambda: plain.rollback(plain.version(0)))
    collect_garbage(VersionLog(FaultStore(store, hook), "taxi"), keep=1)
    assert hook.done
    head = plain.head()
    assert (head.number, head.manifest.rolled_back_to) == (3, 0)
    assert plain.read_blob(head.manifest.blobs.weights) == b"weights 0"
    assert plain.read_blob(head.manifest.blobs.state) == b"state 0"
    assert len(plain.tombstones(head)) == 1


@pytest.mark.parametrize(("verb", "text"), [("read", "blobs"), ("write", "blobs"), ("create", "log")])
def test_a_collection_in_the_middle_of_a_rollback_spoils_nothing(store: Store, verb: str, text: str) -> None:
    plain = VersionLog(store, "taxi")
    head = grow(plain, 3)
    hook = act_once(verb, text, "before", lambda: collect_garbage(plain, keep=1))
    log = VersionLog(FaultStore(store, hook), "taxi")
    if verb == "read":  # the old blobs went before they were read: refused, and the head is as before
        with pytest.raises(UnknownVersion, match="retention"):
            log.rollback(log.version(0))
        assert plain.head() == head
    else:
        back = log.rollback(log.version(0))
        assert plain.read_blob(back.manifest.blobs.weights) == b"weights 0"
        assert len(plain.tombstones(back)) == 1
    assert hook.done


def test_a_frozen_writer_that_wakes_after_a_collection_cannot_commit(log: VersionLog) -> None:
    first = append(log, None)
    blobs = Blobs(
        weights=log.write_blob(1, "safetensors", b"frozen"), state=log.write_blob(1, "state.safetensors", b"")
    )
    head = append(log, first)
    collect_garbage(log, keep=2)
    with pytest.raises(HeadMoved):
        log.commit(first, Entry(kind="online", spec={}, blobs=blobs))
    assert log.head() == head
    with pytest.raises(NotFound):
        log.store.stat(blobs.weights.key)


# ---- uploads that were never finished --------------------------------------------------------------------------------
class Unfinished(MemoryStore):
    """Has parts of objects as S3 has them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.uploads: list[Upload] = []

    def unfinished(self, prefix: str = "") -> Iterator[Upload]:
        yield from [upload for upload in self.uploads if upload.key.startswith(prefix)]

    def abandon(self, upload: Upload) -> None:
        self.uploads.remove(upload)


def test_a_collection_removes_uploads_that_can_count_for_nothing_any_more() -> None:
    store = Unfinished(uuid.uuid4().hex)
    log = VersionLog(store, "taxi")
    grow(log, 3)
    now, old = datetime.now(UTC), datetime.now(UTC) - STALE - timedelta(minutes=1)
    name = f"{uuid.uuid4().hex}.safetensors"
    lost = [Upload(f"taxi/blobs/{number:08d}-{name}", "1", now) for number in (0, 2)]
    lost.append(Upload(f"taxi/runs/abc/00000001-{name}", "2", old))
    kept = [
        Upload(f"taxi/blobs/{3:08d}-{name}", "3", old),  # of a run that may be about to commit, however slow it is
        Upload(f"taxi/runs/abc/00000001-{name}", "4", now),
        Upload(f"taxi/other/{0:08d}-{name}", "5", old),
        Upload(f"taxi2/blobs/{0:08d}-{name}", "6", old),
    ]
    store.uploads = [*lost, *kept]
    assert collect_garbage(log, keep=1) != []
    assert store.uploads == kept


def test_a_collection_that_may_not_list_uploads_does_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    class Denied(MemoryStore):
        def unfinished(self, prefix: str = "") -> Iterator[Upload]:
            raise PermissionDenied("list_multipart_uploads is not allowed")

    log = VersionLog(Denied(uuid.uuid4().hex), "taxi")
    grow(log, 3)
    assert len(collect_garbage(log, keep=1)) == 6
    assert "what killed processes had begun to upload stays" in caplog.text

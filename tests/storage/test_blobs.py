"""Large blobs: written in pieces, read as streams, verified all the same."""

import hashlib
import logging
import threading
import uuid
from collections.abc import Callable

import pytest

from tests.storage.faults import Call, FaultStore, act_once
from tests.storage.histories import append, grow
from tidemill.storage.blobs import STREAMED_ABOVE, WHOLE
from tidemill.storage.errors import CorruptObject, HeadMoved, NotFound, Unavailable, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs
from tidemill.storage.memory import MemoryStore
from tidemill.storage.pieces import Pieces
from tidemill.storage.refs import BlobRef
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.streams import RANGE, Stream

LARGE = hashlib.shake_128(b"large").digest(2**20) * 64 + b"and some more"
assert len(LARGE) > STREAMED_ABOVE


class Altering(FaultStore):
    """Flips a bit of what is read from a place on, as often as it is told to."""

    def __init__(self, store: Store, start: int, times: int) -> None:
        super().__init__(store, lambda call: None)
        self.start, self.times = start, times

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        data = super().read(key, if_match=if_match, start=start, length=length)
        if key.endswith(".safetensors") and start == self.start and self.times:
            self.times -= 1
            return bytes([data[0] ^ 1]) + data[1:]
        return data


@pytest.fixture
def log() -> VersionLog:
    found = VersionLog(MemoryStore(uuid.uuid4().hex), "taxi")
    grow(found, 1)
    return found


@pytest.fixture
def ref(log: VersionLog) -> BlobRef:
    return log.write_blob(1, "safetensors", [memoryview(LARGE)[:5], memoryview(LARGE)[5:]])


def taken(source: bytes | Stream) -> bytes:
    """All bytes of a source, taken in odd amounts."""
    if isinstance(source, bytes):
        return source
    data, at = bytearray(source.nbytes), 0
    for size in (1, 7, RANGE, 3, RANGE + 1, source.nbytes):
        at += source.readinto(memoryview(data)[at : at + size])
    assert (at, source.readinto(memoryview(bytearray(1)))) == (source.nbytes, 0)
    return bytes(data)


def test_a_large_blob_is_what_was_written(log: VersionLog, ref: BlobRef) -> None:
    assert (ref.bytes, ref.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    assert log.store.read(ref.key) == LARGE
    assert log.read_blob(ref) == LARGE
    assert log.read_blobs([ref], taken) == LARGE
    log.verify_blob(ref)


@pytest.mark.parametrize("size", [0, 1, WHOLE, WHOLE + 1])
def test_a_blob_of_any_size_may_come_in_pieces(log: VersionLog, size: int) -> None:
    data = LARGE[:size]
    ref = log.write_blob(1, "safetensors", [memoryview(data)[:1], memoryview(data)[1:]])
    assert (ref.bytes, ref.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert log.read_blobs([ref, ref], lambda one, other: (taken(one), taken(other))) == (data, data)


def test_ranges_are_fetched_at_once_and_no_more_than_the_store_can_do_with(log: VersionLog, ref: BlobRef) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def hook(call: Call) -> None:
        nonlocal under_way, most
        if call.verb == "read":
            with lock:
                under_way += 1 if call.phase == "before" else -1
                most = max(most, under_way)

    log.store = FaultStore(log.store, hook, concurrency=3)
    assert log.read_blobs([ref], taken) == LARGE
    assert most <= 3


@pytest.mark.parametrize("start", [0, RANGE, 4 * RANGE], ids=["the first", "the second", "the last"])
def test_a_bit_that_was_flipped_on_its_way_is_asked_for_again(
    log: VersionLog, ref: BlobRef, start: int, caplog: pytest.LogCaptureFixture
) -> None:
    log.store = Altering(log.store, start, times=1)
    with caplog.at_level(logging.WARNING, "tidemill.storage"):
        assert log.read_blobs([ref], taken) == LARGE
    assert "is not what was committed" in caplog.text
    assert "Reading it once more" in caplog.text


def altered(log: VersionLog, ref: BlobRef) -> None:
    log.store.write(ref.key, LARGE[:-1] + b"?")


def cut(log: VersionLog, ref: BlobRef) -> None:
    log.store.write(ref.key, LARGE[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [altered, cut])
def test_a_large_blob_of_other_bytes_is_refused_whatever_was_made_of_it(
    log: VersionLog, ref: BlobRef, damage: Callable[[VersionLog, BlobRef], None]
) -> None:
    damage(log, ref)

    def fails(source: bytes | Stream) -> None:
        raise ValueError("nonsense")

    for use in (taken, lambda source: None, fails):
        with pytest.raises(CorruptObject, match=r"is not what was committed: .* Nothing was loaded"):
            log.read_blobs([ref], use)
    with pytest.raises(CorruptObject, match="is not what was committed"):
        log.verify_blob(ref)
    with pytest.raises(CorruptObject, match="is not what was committed"):
        log.copy_blobs(2, Blobs(weights=ref, state=ref))


def test_what_fails_on_a_whole_blob_is_the_error_of_whoever_reads_it(log: VersionLog, ref: BlobRef) -> None:
    def fails(source: bytes | Stream) -> None:
        raise ValueError("nonsense")

    with pytest.raises(ValueError, match="nonsense"):
        log.read_blobs([ref], fails)


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_a_large_blob_that_is_gone_was_removed_by_retention(log: VersionLog, ref: BlobRef, moment: str) -> None:
    store = log.store
    if moment == "before":
        store.delete(ref.key)
    else:
        log.store = FaultStore(store, act_once("read", ref.key, "after", lambda: store.delete(ref.key)), concurrency=1)
    with pytest.raises(UnknownVersion, match="is gone: retention"):
        log.read_blobs([ref], taken)


def test_a_large_blob_that_is_replaced_while_it_is_read_is_no_mixture(log: VersionLog, ref: BlobRef) -> None:
    store, other = log.store, bytes(len(LARGE))
    log.store = FaultStore(
        store, act_once("read", ref.key, "after", lambda: store.write(ref.key, other)), concurrency=1
    )
    with pytest.raises(CorruptObject, match="is not what was committed"):
        log.read_blobs([ref], taken)


@pytest.mark.slow
def test_a_rollback_copies_large_blobs_under_other_names(log: VersionLog, ref: BlobRef) -> None:
    copy, _ = log.copy_blobs(2, Blobs(weights=ref, state=ref))
    assert copy.key.startswith("taxi/blobs/00000002-")
    assert (copy.bytes, copy.sha256) == (ref.bytes, ref.sha256)
    assert log.store.read(copy.key) == LARGE
    elsewhere = VersionLog(MemoryStore(uuid.uuid4().hex), "bus")
    theirs, _ = elsewhere.copy_blobs(0, Blobs(weights=ref, state=ref), log)
    assert theirs.key.startswith("bus/blobs/00000000-")
    assert elsewhere.read_blob(theirs) == LARGE


class GivenUp(FaultStore):
    """Somebody gives each upload up while it is under way."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        super().__init__(store, lambda call: None)
        self.meanwhile = meanwhile

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        self.meanwhile()
        raise NotFound(f"{self.url}/{key} does not exist")


def test_an_upload_that_a_collection_gave_up_was_of_an_attempt_that_lost(log: VersionLog) -> None:
    plain = VersionLog(log.store, "taxi")
    log.store = GivenUp(log.store, lambda: append(plain, plain.head()))
    with pytest.raises(HeadMoved, match="another run committed version 1 first"):
        log.write_blob(1, "safetensors", [memoryview(LARGE)])


def test_an_upload_that_is_gone_though_nobody_was_faster_is_an_error(log: VersionLog) -> None:
    log.store = GivenUp(log.store, lambda: None)
    with pytest.raises(NotFound):
        log.write_blob(1, "safetensors", [memoryview(LARGE)])


def test_no_thread_goes_on_fetching_after_an_error(log: VersionLog, ref: BlobRef) -> None:
    def hook(call: Call) -> None:
        if call.verb == "read" and call.phase == "before":
            raise Unavailable("away")

    log.store = FaultStore(log.store, hook, concurrency=4)
    with pytest.raises(Unavailable):
        log.read_blobs([ref], taken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidemill-store")]

"""Shards on their way into training: in order, bounded, decoded once."""

import threading
from collections.abc import Mapping
from datetime import UTC, datetime

import pyarrow as pa
import pytest
import torch

from tests.data import SPEC, parquet, rows
from tests.s3_server import wait_until
from tests.storage.faults import Call, FaultStore
from tidemill.storage.errors import (
    CorruptObject,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    ShardRejected,
    StoreNotFound,
    Unavailable,
)
from tidemill.storage.inbox import Inbox, Shard
from tidemill.storage.memory import MemoryStore
from tidemill.storage.parquet import RowGroup
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online import reading
from tidemill.tasks.online.reading import Kept, Later, Read, Readable, Reader, Unusable, read_shard
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.once import Decoded


def infos(count: int, size: int = 10) -> list[ObjectInfo]:
    return [ObjectInfo(f"{i:02}", size, "etag", datetime.now(UTC)) for i in range(count)]


def size(info: ObjectInfo) -> int:
    return info.size


class Reads:
    """Notes what is read, and holds every read back until it is let through."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gates = {info.key: threading.Event() for info in infos(100)}

    def __call__(self, info: ObjectInfo) -> Read:
        self.begun.append(info.key)
        assert self.gates[info.key].wait(60)
        return Later()

    def let(self, *keys: str) -> None:
        for key in keys:
            self.gates[key].set()

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.begun) == count, seconds=60, what=f"{count} reads")


# ---- the reader ------------------------------------------------------------------------------------------------------
def test_shards_come_in_order_whichever_is_read_first() -> None:
    reads, shards = Reads(), infos(4)
    reader = Reader(shards, reads, size, workers=4)
    threading.Thread(target=lambda: (reads.wait_for(4), reads.let("03", "02", "01", "00"))).start()
    assert [reader.take()[0] for _ in range(4)] == shards
    assert not reader


def test_twice_as_many_are_read_ahead_as_there_are_workers() -> None:
    reads = Reads()
    reads.let(*(info.key for info in infos(100)))
    reader = Reader(infos(100), reads, size, workers=3)
    reader.take()
    reads.wait_for(1 + 2 * 3)
    assert len(reader) == 99
    assert reader.upcoming.key == "01"
    reader.close()
    assert len(reads.begun) == 7


def test_their_bytes_are_bounded() -> None:
    reads = Reads()
    reads.let(*(info.key for info in infos(100)))
    reader = Reader(infos(100, size=reading.AHEAD_BYTES // 2), reads, size, workers=4)
    reader.take()
    reads.wait_for(3)
    reader.close()
    assert len(reads.begun) == 3


def test_labels_that_are_read_with_them_count() -> None:
    reads = Reads()
    reads.let(*(info.key for info in infos(100)))
    reader = Reader(infos(100), reads, lambda info: info.size + reading.AHEAD_BYTES // 2, workers=4)
    reader.take()
    reads.wait_for(2)
    reader.close()
    assert len(reads.begun) == 2


def test_one_that_is_larger_is_read_ahead_alone() -> None:
    reads = Reads()
    reads.let(*(info.key for info in infos(100)))
    reader = Reader(infos(100, size=2 * reading.AHEAD_BYTES), reads, size, workers=4)
    reader.take()
    reads.wait_for(2)
    reader.close()
    assert len(reads.begun) == 2


def test_with_one_worker_each_is_read_in_its_turn_by_the_caller() -> None:
    threads = []
    reader = Reader(infos(3), lambda info: threads.append(threading.current_thread()) or Later(), size, workers=1)
    reader.take()
    assert threads == [threading.current_thread()]


def test_an_error_comes_when_it_is_the_shards_turn() -> None:
    def read(info: ObjectInfo) -> Read:
        if info.key == "01":
            raise Unavailable("the store is away")
        return Later()

    reader = Reader(infos(3), read, size, workers=4)
    assert reader.take()[0].key == "00"
    with pytest.raises(Unavailable):
        reader.take()
    assert reader.take()[0].key == "02"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_put_back_comes_again_before_the_others(workers: int) -> None:
    reader = Reader(infos(6), lambda info: Later(), size, workers)
    taken = [reader.take()[0] for _ in range(3)]
    reader.put_back(taken[1:])
    assert [reader.take()[0].key for _ in range(5)] == ["01", "02", "03", "04", "05"]
    assert not reader


def test_what_was_read_ahead_is_kept_while_others_have_their_turn_again() -> None:
    reads = Reads()
    reads.let(*(info.key for info in infos(100)))
    reader = Reader(infos(9), reads, size, workers=2)
    taken = [reader.take()[0] for _ in range(2)]
    reader.put_back(taken)
    assert len(reader) == 9
    assert reader.upcoming.key == "00"
    assert [reader.take()[0].key for _ in range(9)] == [info.key for info in infos(9)]
    assert sorted(reads.begun) == sorted(["00", "01", *(info.key for info in infos(9))])


def test_closing_waits_for_what_is_being_read() -> None:
    reads = Reads()
    reader = Reader(infos(9), reads, size, workers=2)
    reads.let("00")
    reader.take()
    closing = threading.Thread(target=reader.close)
    closing.start()
    assert closing.is_alive()
    reads.let(*(info.key for info in infos(9)))
    closing.join(60)
    assert not closing.is_alive()
    assert not reader
    assert len(reads.begun) == 1 + 2 * 2


# ---- one shard -------------------------------------------------------------------------------------------------------
@pytest.fixture
def inbox() -> Inbox:
    inbox = Inbox(MemoryStore("reading"))
    inbox.store.write("a.parquet", parquet(rows(40, 1), row_group_size=16))
    return inbox


FEATURES = Features.resolve(SPEC, rows(1, 0).schema)


def read(inbox: Inbox, key: str = "a.parquet", grace_seconds: float = 0) -> Read:
    return read_shard(inbox, None, FEATURES, grace_seconds, inbox.store.stat(key))


def readable(inbox: Inbox) -> Readable:
    found = read(inbox)
    assert isinstance(found, Readable)
    return found


def test_a_small_shard_is_decoded_once(inbox: Inbox) -> None:
    found = readable(inbox)
    columns = FEATURES.names(labelled=True)
    for group, same in zip(found.groups, found.shard.row_groups(), strict=True):
        assert (group.name, group.num_rows, group.schema) == (same.name, same.num_rows, same.schema)
        assert group.read(columns).equals(same.read(columns))
        assert isinstance(group, Decoded)


def test_what_compresses_well_is_not_decoded_ahead(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of a few kilobytes, gigabytes could be."""
    constant = pa.table({"a": pa.array([0.5] * (reading.DECODED_BYTES + 1))})
    inbox.store.write("0.parquet", parquet(constant, row_group_size=len(constant)))
    shard = inbox.read(next(info for info in inbox.store.list() if info.key == "0.parquet"))
    assert shard is not None
    groups = shard.row_groups()
    assert shard.info.size < reading.DECODED_BYTES
    monkeypatch.delattr(RowGroup, "read")
    assert reading._decoded(groups, FEATURES, shard.info.size) is groups


def test_columns_that_nobody_expected_are_decoded_when_asked_for(inbox: Inbox) -> None:
    table = rows(40, 1).append_column("more", [list(range(40))])
    inbox.store.write("a.parquet", parquet(table))
    assert readable(inbox).groups[0].read(["more"]).column(0).to_pylist() == list(range(40))


def test_a_large_shard_is_left_as_it_is(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DECODED_BYTES", 100)
    assert not any(isinstance(group, Decoded) for group in readable(inbox).groups)


def test_what_can_never_be_used_is_unusable_for_its_reason(inbox: Inbox) -> None:
    inbox.store.write("a.parquet", b"PAR1" + bytes(100) + b"PAR1")
    found = read(inbox)
    assert isinstance(found, Unusable)
    assert (found.shard.info.key, found.unforeseen) == ("a.parquet", False)
    assert "footer" in found.reason


def test_what_is_not_whole_is_for_later_until_its_writer_must_have_given_up(inbox: Inbox) -> None:
    inbox.store.write("a.parquet", b"PAR1 half")
    assert read(inbox, grace_seconds=3600) == Later()
    assert isinstance(read(inbox, grace_seconds=0), Unusable)
    info = inbox.store.stat("a.parquet")
    assert reading.count_rows(inbox, 3600, info) is None
    with pytest.raises(ShardRejected):
        reading.count_rows(inbox, 0, info)


def failing(inbox: Inbox, error: Exception) -> Inbox:
    def fail(call: Call) -> None:
        if call.verb == "read":
            raise error

    return Inbox(FaultStore(inbox.store, fail))


@pytest.mark.parametrize("error", [NotFound("gone"), PreconditionFailed("changed")])
def test_a_shard_that_has_gone_or_changed_is_for_later_and_nobody_is_told(inbox: Inbox, error: Exception) -> None:
    assert read(failing(inbox, error)) == Later()
    assert reading.count_rows(failing(inbox, error), 0, inbox.store.stat("a.parquet")) is None


@pytest.mark.parametrize("error", [PermissionDenied("no"), InvalidKey("no"), CorruptObject("no")])
def test_a_shard_that_cannot_be_read_is_for_later_with_the_reason(inbox: Inbox, error: Exception) -> None:
    assert read(failing(inbox, error)) == Later("no")
    assert reading.count_rows(failing(inbox, error), 0, inbox.store.stat("a.parquet")) is None


@pytest.mark.parametrize("error", [Unavailable("away"), StoreNotFound("gone")])
def test_a_store_that_is_away_is_no_property_of_a_shard(inbox: Inbox, error: Exception) -> None:
    with pytest.raises(type(error)):
        read(failing(inbox, error))
    with pytest.raises(type(error)):
        reading.count_rows(failing(inbox, error), 0, inbox.store.stat("a.parquet"))


class Surprising(Inbox):
    """Its shards raise an error that nobody has thought of."""

    def __init__(self, store: MemoryStore, error: Exception) -> None:
        super().__init__(store)
        self.error = error

    def read(self, info: ObjectInfo) -> Shard | None:
        found, error = super().read(info), self.error

        class Surprise(Shard):
            def row_groups(self, types: Mapping[str, pa.DataType] | None = None) -> list[RowGroup]:
                raise error

        return None if found is None else Surprise(found.inbox, found.info, found.data, found.sha256)


@pytest.mark.parametrize("error", [ValueError("odd"), pa.ArrowInvalid("odd"), OSError("odd"), RuntimeError("odd")])
def test_an_unforeseen_error_may_be_the_shards_fault(inbox: Inbox, error: Exception) -> None:
    found = read(Surprising(inbox.store, error))
    assert isinstance(found, Unusable)
    assert found.unforeseen
    assert f"{type(error).__name__}: odd" in found.reason


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        pa.ArrowMemoryError("malloc failed"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        OSError(24, "Too many open files"),
        Unavailable("away"),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:20]}",
)
def test_an_error_of_memory_of_an_accelerator_or_of_a_store_never_is(inbox: Inbox, error: Exception) -> None:
    with pytest.raises(type(error)):
        read(Surprising(inbox.store, error))


# ---- what was read before its turn -----------------------------------------------------------------------------------
def test_what_is_kept_is_handed_out_once(inbox: Inbox) -> None:
    kept, found = Kept(), readable(inbox)
    kept.put("a", found)
    assert kept.pop("a") is found
    assert kept.pop("a") is None


def test_what_is_kept_is_bounded_by_the_memory_that_it_holds(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    found = readable(inbox)
    assert found.nbytes > len(found.shard.data) + 40 * 3 * 4, "the decoded columns count too"
    monkeypatch.setattr(reading, "AHEAD_BYTES", 2 * found.nbytes)
    kept = Kept()
    for name in "abc":
        kept.put(name, found)
    assert [kept.pop(name) is found for name in "abc"] == [True, True, False]
    kept.put("d", found)
    kept.only(["e"])
    assert kept.pop("d") is None

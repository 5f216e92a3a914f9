"""Shards on their way into training: in order, bounded, decoded once."""

import threading
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from tests.s3_server import wait_until
from tests.storage.faults import Call, FaultStore
from tests.tasks.rows import SPEC, parquet, rows
from tidemill.storage.errors import NotFound, ShardRejected, Unavailable
from tidemill.storage.inbox import Inbox
from tidemill.storage.memory import MemoryStore
from tidemill.storage.parquet import RowGroup
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online import reading
from tidemill.tasks.online.reading import Reader, Ready, read_shard
from tidemill.tasks.training.features import Features


def infos(count: int, size: int = 10) -> list[ObjectInfo]:
    return [ObjectInfo(f"{i:02}", size, "etag", datetime.now(UTC)) for i in range(count)]


def size(info: ObjectInfo) -> int:
    return info.size


class Reads:
    """Notes what is read, and holds every read back until it is let through."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gates = {info.key: threading.Event() for info in infos(100)}

    def __call__(self, info: ObjectInfo) -> Ready | None:
        self.begun.append(info.key)
        assert self.gates[info.key].wait(60)
        return None

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
    reader = Reader(infos(3), lambda info: threads.append(threading.current_thread()), size, workers=1)
    reader.take()
    assert threads == [threading.current_thread()]


def test_an_error_comes_when_it_is_the_shards_turn() -> None:
    def read(info: ObjectInfo) -> None:
        if info.key == "01":
            raise Unavailable("the store is away")

    reader = Reader(infos(3), read, size, workers=4)
    assert reader.take()[0].key == "00"
    with pytest.raises(Unavailable):
        reader.take()
    assert reader.take()[0].key == "02"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_put_back_comes_again_before_the_others(workers: int) -> None:
    reader = Reader(infos(6), lambda info: None, size, workers)
    taken = [reader.take()[0] for _ in range(3)]
    reader.put_back(taken[1:])
    assert [reader.take()[0].key for _ in range(5)] == ["01", "02", "03", "04", "05"]
    assert not reader


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


def test_a_small_shard_is_decoded_once(inbox: Inbox) -> None:
    ready = read_shard(inbox, None, FEATURES, inbox.store.stat("a.parquet"))
    assert ready is not None
    found = ready.complete()
    assert found is not None
    columns = FEATURES.names(labelled=True)
    again = ready.shard.row_groups()
    for group, same in zip(found.groups, again, strict=True):
        assert (group.name, group.num_rows, group.schema) == (same.name, same.num_rows, same.schema)
        assert group.read(columns).equals(same.read(columns))
        assert isinstance(group, reading.Decoded)


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
    ready = read_shard(inbox, None, FEATURES, inbox.store.stat("a.parquet"))
    assert ready is not None
    found = ready.complete()
    assert found is not None
    assert found.groups[0].read(["more"]).column(0).to_pylist() == list(range(40))


def test_a_large_shard_is_left_as_it_is(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DECODED_BYTES", 100)
    ready = read_shard(inbox, None, FEATURES, inbox.store.stat("a.parquet"))
    assert ready is not None
    found = ready.complete()
    assert found is not None
    assert not any(isinstance(group, reading.Decoded) for group in found.groups)


def test_a_problem_is_raised_when_the_shard_is_used(inbox: Inbox) -> None:
    info = inbox.store.write("a.parquet", b"PAR1" + bytes(100) + b"PAR1")
    ready = read_shard(inbox, None, FEATURES, info)
    assert ready is not None
    with pytest.raises(ShardRejected):
        ready.complete()


def test_a_shard_that_has_gone_is_no_shard(inbox: Inbox) -> None:
    info = inbox.store.stat("a.parquet")

    def gone(call: Call) -> None:
        raise NotFound("gone")

    assert read_shard(Inbox(FaultStore(inbox.store, gone)), None, FEATURES, info) is None

"""The inbox: shards are listed and read once."""

import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import CLOUDS, MINIO_LIKE, urls_of
from tests.storage.faults import FaultStore, fails
from tests.storage.shards import dispose, keys, owe, parquet, unknown
from tidemill.storage.errors import (
    InvalidKey,
    NotReady,
    PermissionDenied,
    ShardRejected,
    StoreNotFound,
    Unavailable,
)
from tidemill.storage.inbox import Inbox, Shard, is_shard, open_inbox
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import sha256
from tidemill.storage.memory import MemoryStore
from tidemill.storage.probe import check_inbox
from tidemill.storage.store import ObjectInfo, PassedOver, Store
from tidemill.storage.urls import open_store


@pytest.fixture(params=["memory", "local", "s3", MINIO_LIKE, *CLOUDS])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    return urls_of(request, tmp_path)


@pytest.fixture
def inbox(make_url: Callable[[str], str]) -> Inbox:
    """As a run opens it: what the store promises has been asked."""
    opened = open_inbox(make_url("inbox"))
    check_inbox(opened.store)
    return opened


@pytest.fixture
def log(make_url: Callable[[str], str]) -> VersionLog:
    return VersionLog(open_store(make_url("registry")), "taxi")


@pytest.fixture
def archive(make_url: Callable[[str], str]) -> Store:
    return open_store(make_url("archive"))


@pytest.fixture
def memory() -> Inbox:
    """For what does not depend on the backend."""
    return open_inbox(f"memory://{uuid.uuid4().hex}/inbox")


@pytest.fixture
def memory_log(memory: Inbox) -> VersionLog:
    return VersionLog(open_store(memory.url.replace("/inbox", "/registry")), "taxi")


@pytest.fixture
def memory_archive(memory: Inbox) -> Store:
    return open_store(memory.url.replace("/inbox", "/archive"))


class Listed(MemoryStore):
    """A store whose listing is made up, to any length and with any times."""

    def __init__(self, infos: Callable[[], Iterator[ObjectInfo]]) -> None:
        super().__init__(uuid.uuid4().hex)
        self.infos = infos

    def list(
        self, prefix: str = "", *, passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        return self.infos()


NOW = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


def info(key: str, seconds: float = 0) -> ObjectInfo:
    return ObjectInfo(key, 1, f"etag-{key}", NOW + timedelta(seconds=seconds))


# ---- listing -------------------------------------------------------------------------------------------------------------


def test_a_shard_is_listed_read_and_decoded(inbox: Inbox) -> None:
    data = parquet(1, 2, 3)
    inbox.store.write("2026/a.parquet", data)
    listing = inbox.list(10, unknown)
    assert [s.key for s in listing.shards] == ["2026/a.parquet"]
    assert (listing.known, listing.waiting, listing.oldest) == ([], 1, listing.shards[0].last_modified)
    shard = inbox.read(listing.shards[0])
    assert shard is not None
    assert (shard.inbox, shard.data, shard.sha256) == (inbox.url, data, sha256(data))
    (group,) = shard.row_groups()
    assert group.name == "2026/a.parquet row group 0"
    assert group.read(["x"]).to_pydict() == {"x": [1, 2, 3]}


def test_an_empty_inbox_is_no_error_and_a_missing_one_is(inbox: Inbox, tmp_path: Path) -> None:
    listing = inbox.list(10, unknown)
    assert (listing.shards, listing.known, listing.waiting, listing.oldest) == ([], [], 0, None)
    with pytest.raises(StoreNotFound):
        open_inbox(str(tmp_path / "missing")).list(10, unknown)


def test_the_oldest_come_first_and_of_the_same_age_by_name() -> None:
    infos = [info("c", 1), info("b", 2), info("z", 0), info("a", 1), info("B", 1), info("a/b", 1)]
    listing = Inbox(Listed(lambda: iter(infos))).list(10, unknown)
    assert [s.key for s in listing.shards] == ["z", "B", "a", "a/b", "c", "b"]


def test_a_late_shard_with_a_low_name_is_found(inbox: Inbox) -> None:
    inbox.store.write("9.parquet", b"")
    inbox.list(10, unknown)
    inbox.store.write("0.parquet", b"")
    assert {s.key for s in inbox.list(10, unknown).shards} == {"0.parquet", "9.parquet"}


def test_the_limit_takes_the_oldest_and_the_rest_is_counted() -> None:
    infos = [info(f"{i:03d}", -i) for i in range(100)]
    for limit in (0, 1, 2, 99, 100, 101):
        listing = Inbox(Listed(lambda: iter(infos))).list(limit, unknown)
        assert [s.key for s in listing.shards] == [f"{i:03d}" for i in range(99, -1, -1)][:limit]
        assert (listing.waiting, listing.oldest) == (100, NOW - timedelta(seconds=99))


@pytest.mark.slow
def test_a_limit_bounds_the_memory_however_full_the_inbox() -> None:
    inbox = Inbox(Listed(lambda: (info(f"{i:09d}", -i) for i in range(50_000))))
    for known in (unknown, lambda _: True):
        tracemalloc.start()
        listing = inbox.list(10, known)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(listing.shards) + len(listing.known) == 10
        assert peak < 2_000_000  # all 50,000 would take over 10 MB; what other threads allocate is counted too


def test_what_was_consumed_before_is_told_apart() -> None:
    infos = [info(f"{i}") for i in range(6)]
    listing = Inbox(Listed(lambda: iter(infos))).list(10, lambda i: i.key in "024")
    assert [s.key for s in listing.shards] == ["1", "3", "5"]
    assert [s.key for s in listing.known] == ["0", "2", "4"]
    assert listing.waiting == 3


@pytest.mark.parametrize(
    "key", ["a.parquet", "a", "year=2026/a.pq", "a.b.c", "tmp", "x.tmp/a", "a_b/c_", "a b?c#d\n", "temp.parquet", "ü"]
)
def test_any_other_name_is_a_shard(key: str) -> None:
    assert is_shard(key)


@pytest.mark.parametrize("ending", [".tmp", ".TEMP", ".part", ".partial", ".inprogress", ".crdownload", ".crc", "/"])
def test_unfinished_names_are_no_shards(ending: str) -> None:
    assert not is_shard(f"a/b.parquet{ending}")


@pytest.mark.parametrize("key", [".a.parquet", "_SUCCESS", "_temporary/0/a.parquet", "a/.b/c.parquet", ".x/a", "a/_b"])
def test_hidden_names_are_no_shards(key: str, memory: Inbox) -> None:
    memory.store.write(key, parquet(1))
    assert memory.list(10, unknown).waiting == 0


def test_a_shard_under_any_name_is_listed_once(inbox: Inbox) -> None:
    """Only names that the store itself takes; see the conformance of stores."""
    taken = []
    for key in ("a b", "ü", "a?versionId=1", "a#b", "a%2Fb", "a=1/b", "a+b", "a&b", "-", "a\nb", "'\"", "A", "a:b"):
        try:
            inbox.store.write(key, parquet(1))
        except InvalidKey:
            continue
        taken.append(key)
    assert len(taken) > 8
    listed = inbox.list(100, unknown).shards
    assert sorted(s.key for s in listed) == sorted(taken)
    for found in listed:
        shard = inbox.read(found)
        assert shard is not None
        dispose(VersionLog(inbox.store, "taxi"), [owe(inbox, found.key, "delete")])
    assert keys(inbox.store) == []


# ---- reading -------------------------------------------------------------------------------------------------------------


def test_a_shard_that_went_or_changed_since_it_was_listed_is_left_to_the_next_listing(inbox: Inbox) -> None:
    inbox.store.write("a", parquet(1))
    inbox.store.write("b", parquet(1))
    a, b = sorted(inbox.list(10, unknown).shards, key=lambda i: i.key)
    inbox.store.delete("a")
    inbox.store.write("b", parquet(2))
    assert inbox.read(a) is None
    assert inbox.read(b) is None
    (again,) = inbox.list(10, unknown).shards
    shard = inbox.read(again)
    assert shard is not None
    assert shard.row_groups()[0].read(["x"]).to_pydict() == {"x": [2]}


def test_an_unreachable_store_is_not_a_missing_shard(memory: Inbox) -> None:
    memory.store.write("a", parquet(1))
    (listed,) = memory.list(10, unknown).shards
    for error in (Unavailable("x"), PermissionDenied("x"), StoreNotFound("x")):
        with pytest.raises(type(error)):
            Inbox(FaultStore(memory.store, fails("read", error))).read(listed)


def shard_of(data: bytes) -> Shard:
    return Shard("s3://in", info("a.parquet"), data, sha256(data))


@pytest.mark.parametrize("data", [b"", b"PAR1", parquet(1)[:-1], b"a,b\n1,2\n3,4\n5,6\n"])
def test_half_a_file_is_not_ready(data: bytes) -> None:
    with pytest.raises(NotReady, match=r"a\.parquet"):
        shard_of(data).row_groups()


@pytest.mark.parametrize(
    "data", [parquet(), parquet(1)[:-8] + b"\xff\xff\xff\x7fPAR1", b"PAR1" + b"\0" * 100 + b"\x08\0\0\0PAR1"]
)
def test_what_no_waiting_can_mend_is_rejected(data: bytes) -> None:
    with pytest.raises(ShardRejected, match=r"a\.parquet"):
        shard_of(data).row_groups()


def test_bad_data_behind_a_good_footer_is_rejected_when_it_is_read() -> None:
    good = parquet(*range(100), write_page_checksum=True, use_dictionary=False, compression="none")
    for bad in (good[:4] + b"\xff" * 100 + good[104:], good[:400] + bytes([good[400] ^ 1]) + good[401:]):
        (group,) = shard_of(bad).row_groups()
        with pytest.raises(ShardRejected, match=r"a\.parquet: row group 0"):
            group.read(["x"])


def test_a_rejection_keeps_all_that_identifies_the_shard() -> None:
    shard = shard_of(b"bytes")
    rejected = shard.rejected("no rows")
    assert (rejected.inbox, rejected.key, rejected.sha256) == ("s3://in", "a.parquet", sha256(b"bytes"))
    assert (rejected.etag, rejected.size, rejected.last_modified) == ("etag-a.parquet", 1, NOW)
    assert rejected.reason == "no rows"


def test_a_writer_is_given_time_before_it_is_given_up(memory: Inbox) -> None:
    written = memory.store.write("a", b"half")
    assert not memory.is_stable(written, 60)
    assert memory.is_stable(written, 0)
    old = ObjectInfo("a", 1, "e", datetime.now(UTC) - timedelta(seconds=61))
    assert memory.is_stable(old, 60)
    ahead = ObjectInfo("a", 1, "e", datetime.now(UTC) + timedelta(hours=1))  # the store's clock is not ours
    assert not memory.is_stable(ahead, 0)

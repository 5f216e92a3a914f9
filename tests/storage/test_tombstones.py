"""Tombstones: a shard that is sent again is recognised, for a stated window."""

import json

import pytest

from tidemill.storage.errors import CorruptObject
from tidemill.storage.tombstones import WINDOW, Tombstones


def consumed(*numbers: int) -> Tombstones:
    tombstones = Tombstones()
    for n in numbers:
        tombstones.add("in", f"{n}.parquet", f"sha-{n}", f"etag-{n}")
    return tombstones


def identity(n: int) -> tuple[str, str, str]:
    return "in", f"{n}.parquet", f"sha-{n}"


def test_a_shard_is_known_by_its_inbox_key_and_bytes() -> None:
    tombstones = consumed(1)
    assert tombstones.has("in", "1.parquet", "sha-1")
    assert not tombstones.has("other", "1.parquet", "sha-1")
    assert not tombstones.has("in", "2.parquet", "sha-1")
    assert not tombstones.has("in", "1.parquet", "sha-2")


def test_an_equal_etag_saves_reading_the_bytes() -> None:
    tombstones = consumed(1)
    assert tombstones.sha256_of("in", "1.parquet", "etag-1")
    assert not tombstones.sha256_of("in", "2.parquet", "etag-1")
    assert not tombstones.sha256_of("other", "1.parquet", "etag-1")


def test_they_come_back_from_a_blob_in_the_order_of_consumption() -> None:
    tombstones = consumed(3, 1, 2)
    back = Tombstones.decode(tombstones.encode(), "blob")
    assert list(back) == list(tombstones) == [identity(3), identity(1), identity(2)]
    assert back.encode() == tombstones.encode()
    assert back.sha256_of("in", "1.parquet", "etag-1")
    assert len(back) == 3


def test_none_at_all_is_an_empty_blob() -> None:
    assert Tombstones().encode() == b""
    assert len(Tombstones.decode(b"", "blob")) == 0


@pytest.mark.parametrize("key", ["a\nb", "a\u2028b", "ü", '"', "\\", "\x00", "\udcff", "a\r\nb", ""])
def test_any_key_keeps_to_its_line(key: str) -> None:
    tombstones = consumed(1)
    tombstones.add("in", key, "sha", "etag")
    assert tombstones.encode().count(b"\n") == 2
    assert Tombstones.decode(tombstones.encode(), "blob").has("in", key, "sha")


def test_those_that_no_blob_has_are_counted() -> None:
    tombstones = consumed(1, 2)
    assert tombstones.unstored == 2
    back = Tombstones.decode(tombstones.encode(), "blob")
    back.add("in", "3.parquet", "sha-3", "etag-3")
    assert back.unstored == 1


def test_only_the_window_is_remembered() -> None:
    tombstones = consumed(1, 2, 3, 4)
    tombstones.prune({"in"}, window=2)
    assert list(tombstones) == [identity(3), identity(4)]
    assert not tombstones.has(*identity(2))
    assert not tombstones.sha256_of("in", "2.parquet", "etag-2")


def test_fewer_than_the_window_are_all_kept() -> None:
    tombstones = consumed(1, 2)
    tombstones.prune({"in"}, window=2)
    tombstones.prune({"in"})
    assert len(tombstones) == 2
    assert WINDOW == 10_000


def test_what_is_still_in_the_inbox_is_never_forgotten() -> None:
    tombstones = consumed(*range(10))
    tombstones.prune({"in"}, keep=[identity(0), identity(5), identity(99)], window=2)
    assert list(tombstones) == [identity(n) for n in (0, 5, 8, 9)]
    tombstones.add("in", "10.parquet", "sha-10", "etag-10")
    tombstones.prune({"in"}, keep=[identity(0)], window=2)
    assert list(tombstones) == [identity(n) for n in (0, 9, 10)]


def test_other_inboxes_have_windows_of_their_own() -> None:
    """What a run keeps in its inbox must not be forgotten by a run on another one."""
    tombstones = consumed(1, 2)
    for n in range(5):
        tombstones.add("other", f"{n}.parquet", f"sha-{n}", f"etag-{n}")
    tombstones.prune({"other"}, window=1)
    assert list(tombstones) == [identity(1), identity(2), ("other", "4.parquet", "sha-4")]


def test_a_shard_consumed_again_counts_as_recent() -> None:
    tombstones = consumed(1, 2, 3)
    tombstones.add("in", "1.parquet", "sha-1", "etag-new")
    assert len(tombstones) == 3
    tombstones.prune({"in"}, window=1)
    assert list(tombstones) == [identity(1)]
    assert tombstones.sha256_of("in", "1.parquet", "etag-new")


def test_memory_and_blob_agree_on_the_etags() -> None:
    tombstones = consumed(1)
    tombstones.add("in", "1.parquet", "sha-1", "etag-new")
    back = Tombstones.decode(tombstones.encode(), "blob")
    for etag in ("etag-1", "etag-new"):
        assert (
            bool(tombstones.sha256_of("in", "1.parquet", etag))
            == bool(back.sha256_of("in", "1.parquet", etag))
            == (etag != "etag-1")
        )


def test_a_full_window_is_a_small_blob() -> None:
    tombstones = Tombstones()
    for n in range(WINDOW + 500):
        tombstones.add("s3://bucket/inbox", f"2026/02/03/part-{n:08d}.parquet", f"{n:064x}", f'"{n:032x}"')
    tombstones.prune({"s3://bucket/inbox"})
    assert len(tombstones) == WINDOW
    assert len(tombstones.encode()) < 3_000_000


GARBAGE = [
    *(
        b"x",
        b"{}",
        b"[]",
        b'["in","key","sha"]',
        b'["in","key","sha","etag","more"]',
        b"null",
        b"1",
        b"\xff",
        b'"abcd"',
    ),
    *(b"[1,2,3,4]", b'{"a":1,"b":2,"c":3,"d":4}', b"\n", b"[" * 200_000, b'["in","key","sha",["etag"]]'),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda data: repr(data[:12]))
def test_a_blob_that_holds_something_else_is_corrupt(garbage: bytes) -> None:
    good = json.dumps(["in", "k", "s", "e"]).encode() + b"\n"
    with pytest.raises(CorruptObject, match="memory://registry/blob does not hold tombstones"):
        Tombstones.decode(good + garbage, "memory://registry/blob")

"""What `tidemill.storage.store` promises, once for every backend. `outside` looks past the store at what is really there."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, Event
from urllib.parse import urlsplit

import pytest

from tests.conftest import AZURE, CLOUDS, GCS, MINIO_LIKE, urls_of
from tests.s3_server import S3
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PreconditionFailed,
    StoreNotFound,
)
from tidemill.storage.pieces import Pieces
from tidemill.storage.probe import check_preconditions
from tidemill.storage.remote import RemoteStore
from tidemill.storage.s3 import S3Store
from tidemill.storage.store import Store, create_or_same
from tidemill.storage.urls import open_store

OTHER_ETAG = "0123456789abcdef0123456789abcdef"


@pytest.fixture(params=["memory", "local", "s3", MINIO_LIKE, *CLOUDS])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    return urls_of(request, tmp_path)


@dataclass(frozen=True)
class Outside:
    """A side channel to the objects of a store."""

    keys: Callable[[], set[str]]
    get: Callable[[str], bytes]


@pytest.fixture
def outside(store: Store, request: pytest.FixtureRequest) -> Outside:
    url = urlsplit(store.url)
    if url.scheme == "file":
        root = Path(url.path)

        def files() -> set[str]:
            found = (path for path in root.rglob("*") if path.is_file())
            return {path.relative_to(root).as_posix() for path in found}

        return Outside(files, lambda key: (root / key).read_bytes())
    if url.scheme == "s3":
        s3: S3 = request.getfixturevalue("s3_server")
        prefix = f"{url.path[1:]}/"
        client = request.getfixturevalue("s3_client")
        assert s3.endpoint == client.meta.endpoint_url

        def objects() -> set[str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=url.netloc, Prefix=prefix)
            return {entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())}

        return Outside(objects, lambda key: client.get_object(Bucket=url.netloc, Key=prefix + key)["Body"].read())
    if url.scheme == "gs":
        return outside_of_gcs(url.netloc, f"{url.path[1:]}/")
    if url.scheme == "az":
        return outside_of_azure(url.netloc, f"{url.path[1:]}/")
    again = open_store(store.url)
    return Outside(lambda: {info.key for info in again.list()}, again.read)


def outside_of_gcs(bucket: str, prefix: str) -> Outside:
    from google.cloud.storage import Client

    client = Client()
    return Outside(
        lambda: {blob.name.removeprefix(prefix) for blob in client.list_blobs(bucket, prefix=prefix)},
        lambda key: client.bucket(bucket).blob(prefix + key).download_as_bytes(),
    )


def outside_of_azure(container: str, prefix: str) -> Outside:
    from azure.storage.blob import ContainerClient

    client = ContainerClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"], container)
    return Outside(
        lambda: {name.removeprefix(prefix) for name in client.list_blob_names(name_starts_with=prefix)},
        lambda key: client.download_blob(prefix + key).readall(),
    )


# ---- one verb after the other


@pytest.mark.parametrize("size", [0, 1, 100_000, 20_000_000])
def test_what_was_written_is_what_is_read(store: Store, outside: Outside, size: int):
    data = os.urandom(size)

    info = store.write("folder/object", data)

    assert store.read("folder/object") == data
    assert store.read("folder/object", if_match=info.etag) == data
    assert outside.get("folder/object") == data
    assert info.key == "folder/object"
    assert info.size == size


@pytest.mark.parametrize("verb", ["write", "create", "replace"])
def test_every_verb_tells_of_the_same_object(store: Store, verb: str):
    if verb == "replace":
        info = store.replace("a", b"new", if_match=store.write("a", b"old").etag)
    else:
        info = getattr(store, verb)("a", b"new")

    [listed] = store.list()
    stated = store.stat("a")
    assert replace(stated, last_modified=listed.last_modified) == listed
    assert stated.last_modified in (listed.last_modified, listed.last_modified.replace(microsecond=0))
    assert (info.key, info.size, info.etag) == (listed.key, listed.size, listed.etag)
    # An S3 server tells of a write by the date of its answer, in whole seconds
    assert abs(info.last_modified - listed.last_modified) < timedelta(seconds=3)
    assert listed.last_modified.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - listed.last_modified) < timedelta(minutes=1)


def test_write_overwrites(store: Store, outside: Outside):
    old = store.write("a", b"old")
    new = store.write("a", b"new")

    assert old.etag != new.etag
    assert outside.get("a") == b"new"
    assert outside.keys() == {"a"}


@pytest.mark.slow
def test_other_bytes_always_have_another_etag(store: Store):
    etags = [store.write("a", f"{i:04}".encode()).etag for i in range(100)]

    assert len(set(etags)) == 100


def test_create_takes_only_a_free_key(store: Store, outside: Outside):
    store.create("a", b"first")

    with pytest.raises(AlreadyExists, match="a exists"):
        store.create("a", b"second")

    assert outside.get("a") == b"first"


def test_create_or_same_tells_whether_the_key_holds_these_bytes(store: Store, outside: Outside):
    assert create_or_same(store, "a", b"ours")
    assert create_or_same(store, "a", b"ours")  # the answer to the first was lost
    assert not create_or_same(store, "a", b"theirs")

    assert outside.get("a") == b"ours"


def test_a_delete_may_name_the_bytes_too(store: Store, outside: Outside):
    info = store.write("a", b"data")
    store.delete("a", if_match=info.etag, sha256=hashlib.sha256(b"data").hexdigest())

    assert outside.keys() == set()


def test_a_deleted_key_is_free_again(store: Store):
    store.create("a", b"first")
    store.delete("a")
    store.create("a", b"second")

    assert store.read("a") == b"second"


def test_replace_needs_the_object_that_was_named(store: Store, outside: Outside):
    first = store.write("a", b"first")
    second = store.replace("a", b"second", if_match=first.etag)

    with pytest.raises(PreconditionFailed, match="a "):
        store.replace("a", b"third", if_match=first.etag)

    assert outside.get("a") == b"second"
    assert store.stat("a").etag == second.etag


def test_replace_does_not_create(store: Store, outside: Outside):
    with pytest.raises(NotFound, match="folder/a does not exist"):
        store.replace("folder/a", b"data", if_match=OTHER_ETAG)

    assert outside.keys() == set()


def test_delete(store: Store, outside: Outside):
    store.write("a", b"a")
    b = store.write("b", b"b")
    store.write("c", b"c")

    store.delete("a")
    store.delete("b", if_match=b.etag)

    assert outside.keys() == {"c"}


def test_delete_spares_an_object_that_is_not_the_one_named(store: Store, outside: Outside):
    check_preconditions(store)
    old = store.write("a", b"old")
    store.write("a", b"new")

    with pytest.raises(PreconditionFailed):
        store.delete("a", if_match=old.etag)

    assert outside.get("a") == b"new"


@pytest.mark.parametrize("key", ["missing", "missing/folder/key", "there/missing"])
def test_what_is_not_there_is_not_found(store: Store, key: str):
    check_preconditions(store)
    store.write("there/object", b"data")

    for verb in (
        lambda: store.stat(key),
        lambda: store.read(key),
        lambda: store.read(key, if_match=OTHER_ETAG),
        lambda: store.read(key, length=0),
        lambda: store.replace(key, b"", if_match=OTHER_ETAG),
        lambda: store.delete(key),
        lambda: store.delete(key, if_match=OTHER_ETAG),
    ):
        with pytest.raises(NotFound, match=f"{store.url}/{key}"):
            verb()


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (0, 10, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (9, 1, b"9"),
        (0, 0, b""),
        (5, 0, b""),
        (10, 0, b""),
        (10, None, b""),
    ],
)
def test_read_a_range(store: Store, start: int, length: int | None, expected: bytes):
    info = store.write("a", b"0123456789")

    assert store.read("a", start=start, length=length) == expected
    assert store.read("a", if_match=info.etag, start=start, length=length) == expected
    with pytest.raises(PreconditionFailed):
        store.read("a", if_match=OTHER_ETAG, start=start, length=length)


@pytest.mark.parametrize(("start", "length"), [(11, None), (11, 0), (11, 1), (10, 1), (5, 6), (0, 11)])
def test_a_range_must_lie_inside(store: Store, start: int, length: int | None):
    store.write("a", b"0123456789")

    with pytest.raises(CorruptObject, match=f"{store.url}/a "):
        store.read("a", start=start, length=length)


def test_a_range_of_an_empty_object(store: Store):
    store.write("a", b"")

    assert store.read("a", start=0, length=0) == b""
    with pytest.raises(CorruptObject):
        store.read("a", start=0, length=1)


def test_a_pinned_read_refuses_newer_bytes(store: Store):
    old = store.write("a", b"old")
    new = store.write("a", b"new")

    with pytest.raises(PreconditionFailed):
        store.read("a", if_match=old.etag)
    assert store.read("a", if_match=new.etag) == b"new"


# ---- listing


def test_list_takes_any_prefix_of_a_key(store: Store):
    keys = {"a", "ab/c", "ab/cd", "ab/cd2/e/f", "abc", "b/a"}
    for key in keys:
        store.write(key, b"")

    def listed(prefix: str) -> set[str]:
        found = [info.key for info in store.list(prefix)]
        assert len(found) == len(set(found))
        return set(found)

    assert listed("") == keys
    prefixes = [
        "a",
        "ab",
        "ab/",
        "ab/c",
        "ab/cd",
        "ab/cd/",
        "ab/cd2/e/f",
        "b/",
        "c",
        "c/",
        "/",
        "..",
        "../",
        "a/",
        "//",
    ]
    for prefix in prefixes:
        try:
            assert listed(prefix) == {key for key in keys if key.startswith(prefix)}, prefix
        except InvalidKey:  # so says MinIO
            assert prefix == ".."


def test_an_empty_store_lists_nothing(store: Store):
    assert [*store.list()] == []
    assert [*store.list("some/folder/")] == []


@pytest.mark.parametrize("after", ["", "a/1", "a/2", "a/15", "b/", "z"])
def test_list_begins_after_a_key(store: Store, after: str):
    keys = ["a/1", "a/10", "a/2", "a/b/c", "b/0", "\u00fc/1"]
    for key in keys:
        store.write(key, b"")

    assert sorted(info.key for info in store.list(after=after)) == [key for key in keys if key > after]
    assert sorted(info.key for info in store.list("a/", after=after)) == [k for k in keys if k[0] == "a" and k > after]


def test_what_is_there_can_be_made_durable(store: Store, outside: Outside):
    for key in ("a", "folder/in/folder/b"):
        store.write(key, b"data")
        store.make_durable(key)

    assert outside.keys() == {"a", "folder/in/folder/b"}


def test_list_more_than_one_page(store: Store):
    keys = {f"folder{i % 3}/{i:05}" for i in range(1050)}
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda key: store.write(key, b"x"), keys):
            pass

    found = [info.key for info in store.list()]

    assert len(found) == 1050
    assert set(found) == keys


def test_list_while_its_objects_are_deleted(store: Store):
    """As an inbox does. What stays from start to end is listed."""
    for i in range(60):
        store.write(f"{i:02}", b"x")

    listed = set()
    for info in store.list():
        listed.add(info.key)
        if int(info.key) % 2:
            store.delete(info.key, if_match=info.etag)

    assert listed >= {f"{i:02}" for i in range(0, 60, 2)}
    assert {info.key for info in store.list()} == {f"{i:02}" for i in range(0, 60, 2)}


def test_a_root_is_a_folder_not_a_string_prefix(make_url: Callable[[str], str]):
    inner, sibling = open_store(make_url("root/inner")), open_store(make_url("root/inner2"))
    outer = open_store(make_url("root"))
    inner.write("key", b"inner")
    sibling.write("key", b"sibling")

    assert [info.key for info in inner.list()] == ["key"]
    assert {info.key for info in outer.list()} == {"inner/key", "inner2/key"}
    assert outer.read("inner/key") == b"inner"


def test_two_opened_stores_of_one_url_share_objects(store: Store):
    store.write("a", b"data")

    assert open_store(store.url).read("a") == b"data"
    assert open_store(f"{store.url}/").url == store.url
    assert store.url in repr(store)


# ---- keys

STRANGE_KEYS = [
    " leading space", "trailing space ", "a+b", "a%20b", "a%2Fb", "%", "%zz", "a&b=c", "a;b", "a#b",
    "a?versionId=1.parquet", "*", "~", "'\"", "<x>", "new\nline", "tab\t", "cr\r", "control\x01",
    "ünï-日本-😀", "e\u0301", "...", "..a", "a..", ".hidden", "x" * 255, "long/" * 50 + "x", "a:b", "col=1/part.parquet",
]  # fmt: skip

REFUSED_KEYS = {"gs": r"[\r\n]", "az": r"[\x00-\x1f]|\.$"}
"""Strange keys that a cloud forbids, by scheme."""

HOSTILE_KEYS = [
    "", ".", "..", "/", "/a/b", "a//b", "a/b/", "a/./b", "../a/b", "a/../a/b", "a/b/..", "nul\0", "\\a/b", "a\\b",
    "\ud800", "x" * 2000, "../" * 10 + "etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("key", STRANGE_KEYS)
def test_a_strange_key_is_kept_exactly(store: Store, outside: Outside, key: str):
    forbidden = REFUSED_KEYS.get(urlsplit(store.url).scheme)
    if forbidden is not None and re.search(forbidden, key):
        with pytest.raises(InvalidKey):
            store.create(key, b"data")
        return
    info = store.create(key, b"data")

    assert outside.keys() == {key}
    assert [info.key for info in store.list()] == [key]
    assert store.read(key, if_match=info.etag) == b"data"
    assert store.stat(key).etag == info.etag
    store.delete(key, if_match=info.etag)
    assert outside.keys() == set()


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_a_hostile_key_is_exact_or_refused(store: Store, outside: Outside, key: str):
    """Whatever a backend thinks of it: no other object is read, changed or deleted in its place."""
    store.write("a/b", b"victim")
    etag = store.stat("a/b").etag
    allowed = False
    with suppress(InvalidKey):
        store.create(key, b"hostile")
        allowed = True
        assert store.read(key) == b"hostile"
        assert outside.keys() == {"a/b", key}
        store.delete(key)

    if not allowed:
        for verb in (
            lambda: store.stat(key),
            lambda: store.read(key),
            lambda: store.write(key, b"hostile"),
            lambda: store.replace(key, b"hostile", if_match=etag),
            lambda: store.delete(key),
            lambda: store.delete(key, if_match=etag),
        ):
            with pytest.raises((InvalidKey, NotFound)):
                verb()
    assert outside.keys() == {"a/b"}
    assert outside.get("a/b") == b"victim"


# ---- many at once


def test_one_of_many_creators_wins(store: Store, outside: Outside):
    start = Barrier(16)

    def create(i: int) -> bool:
        start.wait()
        try:
            store.create("log/1", f"writer {i}".encode())
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [*pool.map(create, range(16))]

    assert sum(won) == 1
    assert outside.get("log/1") == f"writer {won.index(True)}".encode()


def test_compare_and_swap_loses_no_update(store: Store):
    store.write("counter", b"0")

    def increment(_: int) -> None:
        while True:
            etag = store.stat("counter").etag
            with suppress(PreconditionFailed):
                value = int(store.read("counter", if_match=etag))
                store.replace("counter", str(value + 1).encode(), if_match=etag)
                return

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(increment, range(20)):
            pass

    assert store.read("counter") == b"20"


def test_one_of_many_deleters_wins(store: Store):
    check_preconditions(store)
    start = Barrier(8)

    def delete(etag: str) -> bool:
        start.wait()
        try:
            store.delete("a", if_match=etag)
        except NotFound:
            return False
        return True

    for _ in range(3):
        info = store.write("a", b"data")
        with ThreadPoolExecutor(8) as pool:
            winners = sum(pool.map(delete, [info.etag] * 8))
        assert winners == 1 or (winners > 1 and not store.promises.compares_on_delete)


def test_a_read_is_never_torn(store: Store):
    versions = [bytes([i]) * 300_000 for i in range(4)]
    store.write("a", versions[0])
    done = Event()

    def read() -> int:
        count = 0
        while not done.is_set():
            assert store.read("a") in versions
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for i in range(40):
                store.write("a", versions[i % 4])
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)


# ---- a root that does not exist


@pytest.fixture(params=["local", "s3", *CLOUDS])
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(f"{tmp_path}/no/such/folder")
    request.getfixturevalue(f"{request.param}_server")
    scheme = {"s3": "s3", GCS: "gs", AZURE: "az"}[request.param]
    return open_store(f"{scheme}://no-such-bucket/prefix")


def test_a_missing_root_is_an_error_not_an_empty_store(nowhere: Store):
    for verb in (
        lambda: [*nowhere.list()],
        lambda: [*nowhere.list("prefix")],
        lambda: nowhere.stat("a"),
        lambda: nowhere.read("a"),
        lambda: nowhere.replace("a", b"", if_match=OTHER_ETAG),
        lambda: nowhere.delete("a"),
        lambda: nowhere.delete("a", if_match=OTHER_ETAG),
    ):
        with pytest.raises(StoreNotFound, match="Check the URL"):
            verb()


# ---- bytes in pieces -------------------------------------------------------------------------------------------------
SMALL_PARTS = 5 * 2**20
"""Of an upload to S3: it takes no smaller ones."""


class Given(Pieces):
    """Pieces of 1 MiB, which may end with an error."""

    def __init__(self, data: bytes, error: Exception | None = None, after: int = 0) -> None:
        self._data, self._error, self._after = data, error, after

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        for number, at in enumerate(range(0, len(self._data), 2**20)):
            if self._error is not None and number == self._after:
                raise self._error
            yield memoryview(self._data)[at : at + 2**20]


def in_small_parts(store: Store) -> Store:
    """The store; if it has parts, objects above 5 MiB go up in them."""
    if isinstance(store, S3Store):
        store.in_parts_above = SMALL_PARTS
    if isinstance(store, S3Store | RemoteStore):
        store.part_bytes = SMALL_PARTS
    return store


SIZES = [1, 2**20 + 1, SMALL_PARTS, 2 * SMALL_PARTS, 2 * SMALL_PARTS + 7]


@pytest.mark.parametrize("size", SIZES)
def test_what_was_written_in_pieces_is_what_is_read(store: Store, outside: Outside, size: int):
    data = hashlib.shake_128(b"pieces").digest(size)
    info = in_small_parts(store).write_pieces("folder/object", Given(data))
    assert info == replace(store.stat("folder/object"), last_modified=info.last_modified)
    assert (info.size, outside.get("folder/object")) == (size, data)
    assert store.read("folder/object", if_match=info.etag) == data
    assert (
        store.read("folder/object", if_match=info.etag, start=size // 2, length=size - size // 2) == data[size // 2 :]
    )


def test_pieces_overwrite_as_any_write_does(store: Store, outside: Outside):
    store.write("a", b"old")
    in_small_parts(store).write_pieces("a", Given(b"new" * SMALL_PARTS))
    assert outside.get("a") == b"new" * SMALL_PARTS


@pytest.mark.parametrize("after", [0, 1, 12])
def test_pieces_that_end_with_an_error_leave_nothing(store: Store, outside: Outside, after: int):
    store.write("a", b"old")
    with pytest.raises(CorruptObject, match="torn"):
        in_small_parts(store).write_pieces("a", Given(bytes(3 * SMALL_PARTS), CorruptObject("torn"), after))
    assert (outside.keys(), outside.get("a")) == ({"a"}, b"old")
    assert list(store.unfinished()) == []

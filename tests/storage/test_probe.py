"""A store that ignores a precondition is found out before anything depends on it."""

import logging
import os
import time
import uuid
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.storage.faults import Call, FaultStore, fails
from tidemill.storage.errors import (
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StoreFull,
    UnsupportedStore,
)
from tidemill.storage.memory import MemoryStore
from tidemill.storage.probe import check_inbox, check_preconditions
from tidemill.storage.store import ObjectInfo, Promises, Store
from tidemill.storage.urls import open_store


class Overwrites(MemoryStore):
    """MinIO before 2024-05: put-if-absent is a plain put."""

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        return self.write(key, data)


class DeletesAnyway(MemoryStore):
    """MinIO: `If-Match` on DELETE is ignored."""

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        super().delete(key)


class NeverDeletes(MemoryStore):
    """Credentials that may write but not delete."""

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        raise PermissionDenied("no")


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex


def test_every_backend_passes_and_nothing_stays(store: Store, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    check_preconditions(store)

    trusting = open_store(store.url)
    trusting.promises = Promises(compares_on_delete=True)  # taken for granted
    etag = trusting.write("a", b"old").etag
    trusting.write("a", b"new")
    with suppress(PreconditionFailed):
        trusting.delete("a", if_match=etag)
    assert store.promises.compares_on_delete == bool([*store.list()])
    with suppress(NotFound):
        store.delete("a")
    assert [*store.list()] == []
    assert not caplog.records


def test_a_store_without_put_if_absent_is_refused_with_a_remedy(name: str):
    store = Overwrites(name)
    for _ in range(2):  # a refusal is not remembered as passed
        with pytest.raises(UnsupportedStore, match=r"memory://.*If-None-Match.*MinIO RELEASE.2024-05-07"):
            check_preconditions(store)
    assert [*store.list()] == []


def test_a_store_that_deletes_anyway_is_remembered_with_one_warning_for_its_inboxes(
    name: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    for _ in range(2):
        store = DeletesAnyway(name, "registry")
        check_preconditions(store)
        assert not store.promises.compares_on_delete
    assert not caplog.records
    for inbox in ("inbox", "inbox", "labels"):
        store = DeletesAnyway(name, inbox)
        check_inbox(store)
        assert not store.promises.compares_on_delete
    assert [*store.list()] == []
    [warning] = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"memory://{name}" in warning.getMessage()


def test_nothing_is_said_of_the_deletes_of_an_inbox_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    inbox = tmp_path / "inbox"
    for _ in range(2):
        check_inbox(open_store(str(inbox)))
    assert not caplog.records
    inbox.mkdir()
    store = open_store(str(inbox))
    check_inbox(store)
    assert store.promises.compares_on_delete
    assert not caplog.records


def test_a_store_may_forbid_deletes(name: str):
    store = NeverDeletes(name)
    check_preconditions(store)
    assert store.promises.compares_on_delete


class TakesNothing(MemoryStore):
    """No room, or no permission to put anything."""

    error: StorageError = StoreFull("no room")

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        raise self.error


@pytest.mark.parametrize("error", [StoreFull("no room"), PermissionDenied("no")], ids=["full", "denied"])
def test_an_inbox_need_not_take_anything_but_a_registry_must(name: str, error: StorageError):
    for _ in range(2):
        store = TakesNothing(name)
        store.error = error
        check_inbox(store)
        assert not store.promises.compares_on_delete  # nobody knows: each delete compares for itself
        with pytest.raises(type(error)):
            check_preconditions(store)


def test_it_asks_once_per_url(name: str):
    calls: list[Call] = []
    for _ in range(2):
        check_preconditions(FaultStore(MemoryStore(name), calls.append))
    assert [call.verb for call in calls if call.phase == "before"] == [
        "list",
        "create",
        "create",
        "delete",
        "stat",
        "delete",
    ]


class OfBucket(DeletesAnyway):
    """All places of the name are kept by one, as those of a bucket are."""

    denies = False

    @property
    def keeper(self) -> Hashable:
        return "bucket", self.url.split("/")[2]

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        if self.denies:
            raise PermissionDenied("no")
        super().delete(key)


def test_an_inbox_is_not_asked_for_what_its_bucket_has_shown_at_another_place(name: str):
    check_preconditions(OfBucket(name, "registry"))
    calls: list[Call] = []
    for inbox in ("a", "b"):
        store = FaultStore(OfBucket(name, inbox), calls.append)
        store.promises = Promises(compares_on_delete=True)
        check_inbox(store)
        assert not store.promises.compares_on_delete
    assert calls == []
    with pytest.raises(StoreFull):  # whether a registry takes anything is another question
        check_preconditions(FaultStore(OfBucket(name, "full"), fails("create", StoreFull("no room"))))


def test_where_nothing_may_be_deleted_nothing_is_shown_of_an_inbox_where_it_may(name: str):
    registry = OfBucket(name, "registry")
    registry.denies = True
    check_preconditions(registry)
    assert registry.promises.compares_on_delete
    inbox = OfBucket(name, "inbox")
    check_inbox(inbox)
    assert not inbox.promises.compares_on_delete


def test_two_places_of_a_bucket_or_a_disk_have_one_keeper(make_url: Callable[[str], str]):
    one, other = open_store(make_url("one")), open_store(make_url("other"))
    one.write("a", b"")
    other.write("a", b"")
    assert one.keeper == other.keeper
    assert open_store("s3://another-bucket/one").keeper != one.keeper


@pytest.mark.parametrize(
    ("scheme", "variable", "one", "other"),
    [
        ("gs", "STORAGE_EMULATOR_HOST", "http://127.0.0.1:1", "http://127.0.0.1:2"),
        ("az", "AZURE_STORAGE_ACCOUNT", "ours", "theirs"),
    ],
)
def test_all_places_of_a_bucket_of_google_or_azure_have_one_keeper(
    scheme: str, variable: str, one: str, other: str, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_", "CLOUDSDK_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, one)
    keeper = open_store(f"{scheme}://bucket/one").keeper
    assert open_store(f"{scheme}://bucket/other/place").keeper == keeper
    assert open_store(f"{scheme}://another-bucket/one").keeper != keeper
    monkeypatch.setenv(variable, other)
    assert open_store(f"{scheme}://bucket/one").keeper != keeper


def test_a_lost_answer_is_no_refusal(name: str):
    """The first create is applied twice, as a retry would: it meets its own object."""
    store = MemoryStore(name)

    def retry(call: Call) -> None:
        if call.index == 1 and call.phase == "before":
            store.create(call.key, b"first")

    check_preconditions(FaultStore(store, retry))
    assert [*store.list()] == []


def test_a_root_that_does_not_exist_is_not_made(tmp_path: Path):
    check_preconditions(open_store(f"{tmp_path}/new"))
    assert not (tmp_path / "new").exists()


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path: Path):
    for name, age in (("old", 7200), ("new", 60)):
        left = tmp_path / f".tidemill_probe-{name}"
        left.write_bytes(b"first")
        os.utime(left, (time.time() - age,) * 2)
    check_preconditions(open_store(str(tmp_path)))
    assert [path.name for path in tmp_path.glob(".tidemill_probe-*")] == [".tidemill_probe-new"]

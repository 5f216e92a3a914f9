"""What a committed version is done with leaves the inbox, whoever else acts; quarantine, and the way back."""

import json
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from tests.conftest import CLOUDS, MINIO_LIKE, urls_of
from tests.storage.faults import Call, FaultStore, fail_at, fails
from tests.storage.shards import asked, dispose, faulty, keys, owe, parquet, requeue
from tidemill.storage import disposal
from tidemill.storage.disposal import quarantined
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    NotFound,
    PermissionDenied,
    StorageError,
    StoreNotFound,
    Unavailable,
)
from tidemill.storage.inbox import Inbox, is_shard, open_inbox, original_key
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Owed, checked, sha256
from tidemill.storage.probe import check_inbox
from tidemill.storage.store import Store
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


# ---- disposing of what a committed version owes ------------------------------------------------------------------------------


def test_a_consumed_shard_is_deleted(inbox: Inbox, log: VersionLog) -> None:
    inbox.store.write("a/b.parquet", parquet(1))
    inbox.store.write("a/c.parquet", parquet(1))
    assert dispose(log, [owe(inbox, "a/b.parquet", "delete")]) == ()
    assert keys(inbox.store) == ["a/c.parquet"]


def test_a_consumed_shard_is_archived_under_its_whole_key(inbox: Inbox, log: VersionLog, archive: Store) -> None:
    data = parquet(1)
    inbox.store.write("day=1/b.parquet", data)
    assert dispose(log, [owe(inbox, "day=1/b.parquet", "archive", archive.url)]) == ()
    assert keys(inbox.store) == []
    assert keys(archive) == ["day=1/b.parquet"]
    assert archive.read("day=1/b.parquet") == data


def test_a_rejected_shard_goes_to_quarantine_with_its_reason(inbox: Inbox, log: VersionLog) -> None:
    inbox.store.write("a/b.parquet", b"bytes")
    debt = owe(inbox, "a/b.parquet", "quarantine")
    assert dispose(log, [debt]) == ()
    assert keys(inbox.store) == []
    assert debt.destination is not None
    assert log.store.read(debt.destination) == b"bytes"
    ((name, reason),) = quarantined(log).items()
    assert debt.destination == f"taxi/quarantine/{name}"
    assert reason == {
        "inbox": inbox.url,
        "key": "a/b.parquet",
        "sha256": debt.sha256,
        "etag": debt.etag,
        "reason": "no rows",
    }


@pytest.mark.parametrize("then", ["delete", "archive", "quarantine"])
def test_settling_twice_or_at_once_is_settling_once(
    inbox: Inbox, log: VersionLog, archive: Store, then: Literal["delete", "archive", "quarantine"]
) -> None:
    debts = []
    for i in range(4):
        inbox.store.write(f"{i}.parquet", parquet(i))
        debts.append(owe(inbox, f"{i}.parquet", then, archive.url))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: dispose(log, debts), range(4))) == [()] * 4
    assert dispose(log, debts) == ()
    assert keys(inbox.store) == []
    assert len(keys(archive)) == (4 if then == "archive" else 0)
    assert len(quarantined(log)) == (4 if then == "quarantine" else 0)


@pytest.mark.parametrize("then", ["delete", "archive", "quarantine"])
def test_new_data_under_an_old_key_stays_and_is_not_copied(
    inbox: Inbox, log: VersionLog, archive: Store, then: Literal["delete", "archive", "quarantine"]
) -> None:
    inbox.store.write("a.parquet", b"old")
    debt = owe(inbox, "a.parquet", then, archive.url)
    inbox.store.write("a.parquet", b"new")
    assert dispose(log, [debt], asked) == ()
    assert inbox.store.read("a.parquet") == b"new"
    assert keys(archive) == []
    assert quarantined(log) == {}


@pytest.mark.parametrize("then", ["archive", "quarantine"])
def test_data_that_arrives_between_copy_and_delete_stays(
    inbox: Inbox, log: VersionLog, archive: Store, then: Literal["archive", "quarantine"]
) -> None:
    inbox.store.write("a.parquet", b"old")
    debt = owe(inbox, "a.parquet", then, archive.url)

    def overwrite(call: Call) -> None:
        if (call.verb, call.phase) == ("delete", "before"):
            inbox.store.write("a.parquet", b"new")

    assert dispose(log, [debt], faulty(inbox.url, overwrite)) == ()
    assert inbox.store.read("a.parquet") == b"new"
    kept = archive.read("a.parquet") if then == "archive" else log.store.read(str(debt.destination))
    assert kept == b"old"


@pytest.mark.parametrize("then", ["delete", "archive", "quarantine"])
def test_what_is_not_allowed_is_carried_until_it_is(
    inbox: Inbox,
    log: VersionLog,
    archive: Store,
    caplog: pytest.LogCaptureFixture,
    then: Literal["delete", "archive", "quarantine"],
) -> None:
    for key in ("a.parquet", "b.parquet"):
        inbox.store.write(key, parquet(1))
    debts = tuple(owe(inbox, key, then, archive.url) for key in ("a.parquet", "b.parquet"))
    left = dispose(log, debts, faulty(inbox.url, fails("delete", PermissionDenied("read-only"))))
    assert left == debts
    assert keys(inbox.store) == ["a.parquet", "b.parquet"]
    assert f"{inbox.url}/a.parquet stays in the inbox, and is remembered as consumed" in caplog.text
    assert dispose(log, left) == ()
    assert keys(inbox.store) == []
    assert len(keys(archive)) == (2 if then == "archive" else 0)
    assert len(quarantined(log)) == (2 if then == "quarantine" else 0)


def test_one_denied_debt_does_not_hold_up_the_others(memory: Inbox, memory_log: VersionLog) -> None:
    for key in "abc":
        memory.store.write(key, parquet(1))
    debts = [owe(memory, key, "delete") for key in "abc"]

    def hook(call: Call) -> None:
        if (call.verb, call.key) == ("delete", "b"):
            raise PermissionDenied("b is locked")

    assert dispose(memory_log, debts, faulty(memory.url, hook)) == (debts[1],)
    assert keys(memory.store) == ["b"]


@pytest.mark.parametrize(("then", "verb"), [("archive", "create"), ("quarantine", "write")])
def test_if_the_copy_is_denied_the_original_stays(
    memory: Inbox,
    memory_log: VersionLog,
    memory_archive: Store,
    then: Literal["archive", "quarantine"],
    verb: str,
) -> None:
    memory.store.write("a", parquet(1))
    debt = owe(memory, "a", then, memory_archive.url)
    log = VersionLog(FaultStore(memory_log.store, fails(verb, PermissionDenied("no"))), "taxi")
    assert dispose(log, [debt], faulty(memory_archive.url, fails(verb, PermissionDenied("no")))) == (debt,)
    assert keys(memory.store) == ["a"]


def test_an_inbox_that_is_gone_is_carried_and_warned_of(
    memory_log: VersionLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    debt = Owed(inbox=str(tmp_path / "gone"), key="a", sha256="s", etag="e", action="delete")
    assert dispose(memory_log, [debt]) == (debt,)
    assert "there is no such folder" in caplog.text


def test_an_archive_that_is_gone_stops_the_run(memory: Inbox, memory_log: VersionLog, memory_archive: Store) -> None:
    memory.store.write("a", parquet(1))
    debt = owe(memory, "a", "archive", memory_archive.url)
    with pytest.raises(StorageError, match="the archive cannot be written: no such bucket"):
        dispose(memory_log, [debt], faulty(memory_archive.url, fails("create", StoreNotFound("no such bucket"))))
    assert keys(memory.store) == ["a"]


@pytest.mark.parametrize("then", ["delete", "archive", "quarantine"])
@pytest.mark.parametrize("where", ["inbox", "archive", "registry"])
def test_after_a_failure_at_any_call_settling_again_ends_the_same(
    memory: Inbox,
    memory_log: VersionLog,
    memory_archive: Store,
    then: Literal["delete", "archive", "quarantine"],
    where: str,
) -> None:
    """Before and after each call: a crash, and a lost answer. Nothing is lost at any time."""
    data = parquet(1)
    for index in range(6):
        for phase in ("before", "after"):
            memory.store.write("a.parquet", data)
            debt = owe(memory, "a.parquet", then, memory_archive.url)
            hook = fail_at(index, phase, Unavailable("crash"))
            url = {"inbox": memory.url, "archive": memory_archive.url, "registry": memory_log.store.url}[where]
            log = VersionLog(FaultStore(memory_log.store, hook), "taxi") if where == "registry" else memory_log
            # One store for all the calls of a run, so that the index counts them.
            stores = {u: faulty(url, hook)(u) for u in (memory.url, memory_archive.url)}
            try:
                dispose(log, [debt], stores.__getitem__)
            except Unavailable:
                copies = [*keys(memory.store), *keys(memory_archive), *keys(memory_log.store, "taxi/quarantine/")]
                assert copies or then == "delete"
            assert dispose(memory_log, [debt]) == ()
            assert keys(memory.store) == []
            if then == "archive":
                assert memory_archive.read("a.parquet") == data
                assert len(keys(memory_archive)) == 1
            if then == "quarantine":
                assert memory_log.store.read(str(debt.destination)) == data
                assert len(quarantined(memory_log)) == 1
            for store in (memory_archive, memory_log.store):
                for key in keys(store):
                    store.delete(key)


def test_the_archive_keeps_two_shards_of_one_key_apart(inbox: Inbox, log: VersionLog, archive: Store) -> None:
    for number in (1, 2, 1):
        inbox.store.write("d/a.parquet", parquet(number))
        assert dispose(log, [owe(inbox, "d/a.parquet", "archive", archive.url)]) == ()
    second = f"d/a.{sha256(parquet(2))[:16]}.parquet"
    assert keys(archive) == sorted(["d/a.parquet", second])
    assert (archive.read("d/a.parquet"), archive.read(second)) == (parquet(1), parquet(2))
    assert keys(inbox.store) == []


def test_if_both_names_in_the_archive_are_taken_the_original_stays(
    memory: Inbox, memory_log: VersionLog, memory_archive: Store
) -> None:
    memory.store.write("a.parquet", parquet(1))
    for key in ("a.parquet", f"a.{sha256(parquet(1))[:16]}.parquet"):
        memory_archive.write(key, b"other")
    with pytest.raises(StorageError, match=r"holds other bytes under both names of a\.parquet"):
        dispose(memory_log, [owe(memory, "a.parquet", "archive", memory_archive.url)])
    assert memory.store.read("a.parquet") == parquet(1)


def test_an_archived_object_that_goes_meanwhile_does_not_settle_the_debt(
    memory: Inbox, memory_log: VersionLog, memory_archive: Store
) -> None:
    memory.store.write("a.parquet", parquet(1))
    memory_archive.write("a.parquet", b"other")

    def someone_tidies_up(call: Call) -> None:
        if (call.verb, call.phase) == ("read", "before"):
            memory_archive.delete(call.key)

    debt = owe(memory, "a.parquet", "archive", memory_archive.url)
    assert dispose(memory_log, [debt], faulty(memory_archive.url, someone_tidies_up)) == ()
    assert [memory_archive.read(key) for key in keys(memory_archive)] == [parquet(1)]
    assert keys(memory.store) == []


def test_a_name_that_the_archive_cannot_hold_is_carried(tmp_path: Path, memory: Inbox, memory_log: VersionLog) -> None:
    memory.store.write("../outside.parquet", parquet(1))
    debt = owe(memory, "../outside.parquet", "archive", str(tmp_path / "archive"))
    assert dispose(memory_log, [debt]) == (debt,)
    assert keys(memory.store) == ["../outside.parquet"]
    assert not (tmp_path / "outside.parquet").exists()


@pytest.mark.parametrize(
    "key", ["../../log/00000000.json", "a//b", "/abs", "a/./b", "a?versionId=1", "n\nl", "x" * 300]
)
def test_hostile_names_touch_nothing_else(memory: Inbox, memory_log: VersionLog, key: str) -> None:
    """In a store that allows them; quarantine names are made of numbers and hashes only."""
    memory.store.write(key, b"bad")
    debt = owe(memory, key, "quarantine")
    assert dispose(memory_log, [debt]) == ()
    assert keys(memory.store) == []
    (name,) = quarantined(memory_log)
    assert keys(memory_log.store) == [f"taxi/quarantine/{name}", f"taxi/quarantine/{name}.json"]
    back = requeue(memory_log, name)
    assert keys(memory.store) == [back]
    assert keys(memory_log.store) == []


# ---- quarantine and back -------------------------------------------------------------------------------------------------


def reject(inbox: Inbox, log: VersionLog, key: str = "d/a.parquet", data: bytes = b"bad") -> str:
    """Put a shard into quarantine and return its name there."""
    inbox.store.write(key, data)
    debt = owe(inbox, key, "quarantine")
    assert dispose(log, [debt]) == ()
    return str(debt.destination).removeprefix("taxi/quarantine/")


def test_a_rejected_shard_can_be_sent_back(inbox: Inbox, log: VersionLog) -> None:
    name = reject(inbox, log)
    back = requeue(log, name)
    assert back == f"d/a.requeued-{name}.parquet"
    assert keys(inbox.store) == [back]
    assert inbox.store.read(back) == b"bad"
    assert is_shard(back)
    assert quarantined(log) == {}
    assert keys(log.store, "taxi/quarantine/") == []


@pytest.mark.parametrize("size", [204, 205, 238, 255])
def test_a_shard_with_the_longest_name_can_be_sent_back(inbox: Inbox, log: VersionLog, size: int) -> None:
    """And back again: its name does not grow."""
    key = f"d/{'a' * (size - 8)}.parquet"
    for _ in range(2):
        name = reject(inbox, log, key)
        back = requeue(log, name)
        assert keys(inbox.store) == [back]
        assert (inbox.store.read(back), is_shard(back), original_key(back)) == (
            b"bad",
            True,
            f"d/{'a' * (size - 8)}.parquet",
        )
        inbox.store.delete(back)
        key = back


@pytest.mark.parametrize("size", [238, 239, 255])
def test_a_shard_with_the_longest_name_has_a_second_name_in_an_archive(
    inbox: Inbox, log: VersionLog, make_url: Callable[[str], str], size: int
) -> None:
    key, archive = f"{'a' * (size - 8)}.parquet", open_store(make_url("archive"))
    for data in (b"one", b"two"):
        inbox.store.write(key, data)
        assert dispose(log, [owe(inbox, key, "archive", archive.url)]) == ()
    assert keys(inbox.store) == []
    assert sorted(archive.read(key) for key in keys(archive)) == [b"one", b"two"]


def test_debts_elsewhere_are_looked_at_several_at_once(inbox: Inbox, log: VersionLog) -> None:
    """A store that is far away would else be waited for once for each, at every head."""
    debts = []
    for i in range(6):
        inbox.store.write(f"{i}.parquet", b"data")
        debts.append(owe(inbox, f"{i}.parquet", "delete"))
    inbox.store.delete("5.parquet")
    both = threading.Barrier(2, timeout=30)

    def meet(call: Call) -> None:
        if call.verb == "stat" and call.phase == "before":
            both.wait()

    def stores(url: str) -> Store:
        return FaultStore(open_store(url), meet, concurrency=2)

    assert [debt.key for debt in disposal.dispose(log, debts, lambda url: False, stores)] == [
        f"{i}.parquet" for i in range(5)
    ]


def test_two_shards_of_the_same_bytes_are_both_kept(memory: Inbox, memory_log: VersionLog) -> None:
    """Empty files, for one, are all alike."""
    names = [reject(memory, memory_log, key, b"") for key in ("a.parquet", "b.parquet")]
    assert len(set(names)) == 2
    assert sorted(reason["key"] for reason in quarantined(memory_log).values()) == ["a.parquet", "b.parquet"]
    for name in names:
        requeue(memory_log, name)
    assert len(keys(memory.store)) == 2


def test_an_unknown_name_is_told_what_there_is(inbox: Inbox, log: VersionLog) -> None:
    with pytest.raises(NotFound, match="holds no 'x'; there is: it is empty"):
        requeue(log, "x")
    name = reject(inbox, log)
    for wrong in ("x", name + ".json", name[:-1]):
        with pytest.raises(NotFound, match=f"there is: {name}"):
            requeue(log, wrong)
    assert list(quarantined(log)) == [name]


def test_altered_bytes_are_not_sent_back(inbox: Inbox, log: VersionLog) -> None:
    name = reject(inbox, log)
    log.store.write(f"taxi/quarantine/{name}", b"altered")
    with pytest.raises(CorruptObject, match="its sha256 differs"):
        requeue(log, name)
    assert keys(inbox.store) == []


@pytest.mark.parametrize(
    "garbage", [b"", b"[]", b"{}", b"null", b"\xff", b'{"inbox": 1, "key": 2, "sha256": 3}', b"[" * 99_999]
)
def test_a_damaged_reason_is_named(memory: Inbox, memory_log: VersionLog, garbage: bytes) -> None:
    name = reject(memory, memory_log)
    memory_log.store.write(f"taxi/quarantine/{name}.json", garbage)
    for use in (lambda: requeue(memory_log, name), lambda: quarantined(memory_log)):
        with pytest.raises(CorruptObject, match=rf"{name}\.json is no reason of a rejection"):
            use()


@pytest.mark.parametrize("where", ["inbox", "registry"])
def test_a_requeue_that_fails_at_any_call_can_be_done_again(memory: Inbox, memory_log: VersionLog, where: str) -> None:
    for index in range(6):
        for phase in ("before", "after"):
            name = reject(memory, memory_log)
            hook = fail_at(index, phase, Unavailable("crash"))
            log = VersionLog(FaultStore(memory_log.store, hook), "taxi") if where == "registry" else memory_log
            stores = faulty(memory.url, hook) if where == "inbox" else open_store
            again = False
            try:
                requeue(log, name, stores)
            except Unavailable:
                again = name in quarantined(memory_log)
                assert again or keys(memory.store)  # it is in one place, or in both
            if again:
                requeue(memory_log, name)
            assert [memory.store.read(key) for key in keys(memory.store)] == [b"bad"]
            assert quarantined(memory_log) == {}
            assert keys(memory_log.store, "taxi/quarantine/") == []
            memory.store.delete(keys(memory.store)[0])


def test_a_requeue_after_the_first_copy_was_consumed_sends_the_same_identity_again(
    memory: Inbox, memory_log: VersionLog
) -> None:
    """Which its tombstone then recognises: same inbox, same key, same bytes."""
    name = reject(memory, memory_log)
    crash = VersionLog(FaultStore(memory_log.store, fails("delete", Unavailable("crash"))), "taxi")
    with pytest.raises(Unavailable):
        requeue(crash, name)
    (first,) = keys(memory.store)
    memory.store.delete(first)
    assert requeue(memory_log, name) == first
    assert memory.store.read(first) == b"bad"


def test_two_operators_may_send_back_the_same_shard(inbox: Inbox, log: VersionLog) -> None:
    name = reject(inbox, log)
    with ThreadPoolExecutor(4) as pool:
        backs = []
        for future in [pool.submit(requeue, log, name) for _ in range(4)]:
            try:
                backs.append(future.result())
            except NotFound:
                continue  # too late: nothing of that name any more
    assert backs
    assert set(backs) == set(keys(inbox.store))
    assert quarantined(log) == {}


def test_a_new_key_that_is_taken_by_other_bytes_costs_nothing(memory: Inbox, memory_log: VersionLog) -> None:
    name = reject(memory, memory_log)
    memory.store.write(f"d/a.requeued-{name}.parquet", b"other")
    with pytest.raises(AlreadyExists):
        requeue(memory_log, name)
    assert list(quarantined(memory_log)) == [name]
    assert memory_log.store.read(f"taxi/quarantine/{name}") == b"bad"


@pytest.mark.parametrize("key", ["d/a.parquet", "a", "x.y/z", "a.tar.gz"])
def test_names_do_not_grow_with_each_round_through_quarantine(memory: Inbox, memory_log: VersionLog, key: str) -> None:
    seen = set()
    for _ in range(3):
        name = reject(memory, memory_log, key)
        key = requeue(memory_log, name)
        assert key.count(".requeued-") == 1
        assert is_shard(key)
        seen.add(key)
        data = memory.store.read(key)
        memory.store.delete(key)
        assert data == b"bad"
    assert len(seen) == 3  # a run that slept may still delete the key of an earlier round


def test_a_run_that_slept_since_the_rejection_does_no_harm(inbox: Inbox, log: VersionLog) -> None:
    inbox.store.write("a.parquet", b"bad")
    debt = owe(inbox, "a.parquet", "quarantine")
    dispose(log, [debt])
    (name,) = quarantined(log)
    back = requeue(log, name)
    assert dispose(log, [debt]) == ()  # it wakes
    assert keys(inbox.store) == [back]
    assert quarantined(log) == {}


def test_reasons_are_json_that_people_can_read(memory: Inbox, memory_log: VersionLog) -> None:
    name = reject(memory, memory_log, "ü\n.parquet")
    stored = memory_log.store.read(f"taxi/quarantine/{name}.json")
    assert json.loads(stored)["key"] == "ü\n.parquet"
    assert stored.count(b"\n") > 4


# ---- only in places that the run knows -----------------------------------------------------------------------------------


ELSEWHERE: dict[str, Callable[[Owed, str], Owed]] = {
    "delete elsewhere": lambda debt, url: debt.model_copy(update={"inbox": url}),
    "archive elsewhere": lambda debt, url: debt.model_copy(update={"action": "archive", "destination": url}),
    "archive from elsewhere": lambda debt, url: debt.model_copy(
        update={"action": "archive", "destination": debt.inbox, "inbox": url}
    ),
    "a URL that names no store": lambda debt, url: debt.model_copy(update={"inbox": "https://example.org/x"}),
    "no destination": lambda debt, url: debt.model_copy(update={"action": "archive"}),
    **{
        f"quarantine as {key}": lambda debt, url, key=key: debt.model_copy(
            update={"action": "quarantine", "destination": key, "reason": "r"}
        )
        for key in (
            "taxi/log/00000001.json",
            f"other/quarantine/00000001-{'0' * 32}",
            f"taxi/quarantine/../log/00000001-{'0' * 32}",
            "taxi/quarantine/x",
            "evil.pth",
        )
    },
}


@pytest.mark.parametrize("forge", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_forged_debt_neither_writes_nor_deletes_anywhere_and_is_carried_on(
    inbox: Inbox, log: VersionLog, archive: Store, forge: Callable[[Owed, str], Owed]
) -> None:
    inbox.store.write("a.parquet", b"bytes")
    archive.write("a.parquet", b"bytes")  # where nothing may be touched
    stores = (inbox.store, archive, log.store)
    debt = forge(owe(inbox, "a.parquet", "delete"), archive.url)
    holder = archive if debt.inbox == archive.url else inbox.store
    debt = debt.model_copy(update={"etag": holder.stat("a.parquet").etag})  # or it would be taken for paid
    before = [{info.key: store.read(info.key) for info in store.list()} for store in stores]
    assert disposal.dispose(log, [debt], lambda url: url == inbox.url) == (debt,)
    assert [{info.key: store.read(info.key) for info in store.list()} for store in stores] == before


def test_debts_of_other_places_are_warned_of_once_and_do_not_hold_up_the_others(
    memory: Inbox, memory_log: VersionLog, memory_archive: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for store in (memory.store, memory_archive):
        store.write("a.parquet", b"bytes")
    theirs = owe(Inbox(memory_archive), "a.parquet", "delete")
    for _ in range(3):
        assert disposal.dispose(memory_log, [theirs, owe(memory, "a.parquet", "delete")], anywhere_but(theirs)) == (
            theirs,
        )
        memory.store.write("a.parquet", b"bytes")
    assert caplog.text.count("no place of this run") == 1
    assert keys(memory_archive) == ["a.parquet"]


def test_a_debt_of_another_place_is_carried_on_only_while_its_object_is_there(
    inbox: Inbox, log: VersionLog, archive: Store
) -> None:
    for key in ("paid.parquet", "replaced.parquet", "there.parquet"):
        inbox.store.write(key, b"bytes")
    debts = [owe(inbox, key, "delete") for key in ("paid.parquet", "replaced.parquet", "there.parquet")]
    inbox.store.delete("paid.parquet")
    inbox.store.write("replaced.parquet", b"new bytes")
    assert disposal.dispose(log, debts, lambda url: url == archive.url) == (debts[2],)
    assert keys(inbox.store) == ["replaced.parquet", "there.parquet"]


def anywhere_but(debt: Owed) -> Callable[[str], bool]:
    return lambda url: url != debt.inbox


@pytest.mark.parametrize("inbox_url", ["memory://elsewhere/inbox", "file:///nowhere", "https://x", ""])
def test_a_forged_record_in_quarantine_is_not_sent_anywhere(
    memory: Inbox, memory_log: VersionLog, inbox_url: str
) -> None:
    name = f"00000001-{'a' * 32}"
    memory_log.store.write(f"taxi/quarantine/{name}", b"evil")
    reason = {"inbox": inbox_url, "key": "evil.pth", "sha256": sha256(b"evil"), "etag": "e", "reason": "r"}
    memory_log.store.write(f"taxi/quarantine/{name}.json", checked(reason))
    with pytest.raises(PermissionDenied, match="--inbox"):
        disposal.requeue(memory_log, name, lambda url: url == memory.url)
    assert list(quarantined(memory_log)) == [name]


@pytest.mark.parametrize("name", ["../../secret", "..", "", "../champion", "a/../../x", "\0", "x", "a/x", "x.parquet"])
def test_a_name_in_quarantine_leads_nowhere_else(memory: Inbox, memory_log: VersionLog, name: str) -> None:
    """Not even to what somebody has put there, with a record beside it, under a name that no version gives."""
    reason = {"inbox": memory.url, "key": "evil.pth", "sha256": sha256(b"evil"), "etag": "e", "reason": "r"}
    for key in ("secret", "taxi/quarantine/x", "taxi/quarantine/a/x", "taxi/quarantine/x.parquet"):
        memory_log.store.write(key, b"evil")
        memory_log.store.write(f"{key}.json", checked(reason))
    with pytest.raises(NotFound, match="quarantine holds no"):
        requeue(memory_log, name)
    assert keys(memory.store) == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_copies_are_readable_by_nobody_who_could_not_read_the_shard(tmp_path: Path, mode: int) -> None:
    inbox, log = open_inbox(str(tmp_path / "in")), VersionLog(open_store(str(tmp_path / "reg")), "taxi")
    for key in ("a.parquet", "b.parquet"):
        inbox.store.write(key, b"private")
        (tmp_path / "in" / key).chmod(mode)
    archived = owe(inbox, "a.parquet", "archive", str(tmp_path / "arch"))
    rejected = owe(inbox, "b.parquet", "quarantine")
    assert dispose(log, [archived, rejected]) == ()
    copies = [tmp_path / "arch/a.parquet", tmp_path / "reg" / str(rejected.destination)]
    assert [path.stat().st_mode & 0o077 & ~mode for path in copies] == [0, 0]
    (name,) = quarantined(log)
    back = requeue(log, name)
    assert (tmp_path / "in" / back).stat().st_mode & 0o077 & ~mode == 0

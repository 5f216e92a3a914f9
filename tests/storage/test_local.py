"""What only a local disk can do wrong: crashes between two system calls, programs that know no locks, links, full disks."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

import pytest

from tidemill.storage.errors import (
    CorruptObject,
    InvalidKey,
    NotFound,
    PreconditionFailed,
)
from tidemill.storage.local import LocalStore

# Runs in a process of its own: audit events come right before a system call, and a hook cannot be removed again.
PRELUDE = """
import os, sys, signal
from tidemill.storage.errors import *
from tidemill.storage.local import LocalStore
store = LocalStore(sys.argv[1])
arguments = sys.argv[2:]
"""


def run(root: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + code, str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def own_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob(".tidemill-*") if path.name != ".tidemill-lock")


# ---- crashes

KILL_AT = """
left = int(arguments[0])
def hook(event, _):
    global left
    if event == "open" or event.startswith("os.") and event != "os.kill":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.mark.parametrize("verb", ["create", "write", "replace", "delete"])
def test_killed_at_any_system_call_a_verb_has_happened_or_not(tmp_path: Path, verb: str):
    """Before each system call of the verb in turn, until one run is not killed any more."""
    data = b"new" * 100_000
    code = {
        "create": "store.create('folder/key', b'new' * 100_000)",
        "write": "store.write('key', b'new' * 100_000)",
        "replace": "store.replace('key', b'new' * 100_000, if_match=arguments[1])",
        "delete": "store.delete('key', if_match=arguments[1])",
    }[verb]
    key = "folder/key" if verb == "create" else "key"
    allowed = {"create": {None, data}, "delete": {b"old", None}}.get(verb, {b"old", data})
    seen = set()
    for calls in range(50):
        root = tmp_path / str(calls)
        root.mkdir()
        store = LocalStore(str(root))
        etag = store.write("key", b"old").etag if verb != "create" else ""

        returned = run(root, KILL_AT + code, str(calls), etag).returncode

        for _ in store.list():  # repairs
            pass
        listed = [info.key for info in store.list()]
        found = store.read(key) if key in listed else None
        assert found in allowed
        seen.add(found)
        assert not any(name.startswith(".tidemill-delete-") for name in own_files(root))
        # Nothing that the dead process left is in the way
        store.write(key, b"again")
        if returned == 0:
            assert calls > 3
            assert seen == allowed
            return
        assert returned == -9
    pytest.fail("it never came to an end")


def park(root: Path, key: str, etag: str) -> None:
    """What a delete leaves that is killed before it looks at what it has moved aside."""
    parked = root / f".tidemill-delete-{etag}-0123456789abcdef"
    parked.mkdir()
    (root / key).rename(parked / key)


def test_a_listing_finishes_a_killed_delete(store: LocalStore, tmp_path: Path):
    park(tmp_path, "key", store.write("key", b"old").etag)

    assert [*store.list()] == []
    assert own_files(tmp_path) == []


def test_a_listing_returns_what_a_killed_delete_took_by_mistake(store: LocalStore, tmp_path: Path):
    etag = store.write("key", b"old").etag
    newer = store.write("key", b"newer")
    park(tmp_path, "key", etag)

    for _ in store.list():
        pass

    assert store.stat("key") == newer
    assert store.read("key") == b"newer"
    assert own_files(tmp_path) == []


def test_a_listing_keeps_the_newest_of_all(store: LocalStore, tmp_path: Path):
    etag = store.write("key", b"old").etag
    store.write("key", b"newer")
    park(tmp_path, "key", etag)
    newest = store.write("key", b"newest")

    assert [*store.list()] == [newest]
    assert store.read("key") == b"newest"
    assert own_files(tmp_path) == []


def test_a_listing_removes_unfinished_files_that_no_writer_can_still_want(store: LocalStore, tmp_path: Path):
    old, fresh = tmp_path / ".tidemill-tmp-old", tmp_path / ".tidemill-tmp-fresh"
    old.write_bytes(b"half")
    fresh.write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))

    assert [*store.list()] == []
    assert own_files(tmp_path) == [".tidemill-tmp-fresh"]


# ---- programs that know no locks


def test_a_producer_that_replaces_during_the_delete_keeps_its_object(store: LocalStore, tmp_path: Path):
    etag = store.write("key", b"old").etag
    code = """
producer = os.path.join(os.path.dirname(store._path("key")), "producer")
with open(producer, "w") as file:
    file.write("newer")
waiting = True
def hook(event, _):
    global waiting
    if event == "os.rename" and waiting:
        waiting = False
        os.replace(producer, store._path("key"))
sys.addaudithook(hook)
try:
    store.delete("key", if_match=arguments[0])
except PreconditionFailed as error:
    print(error)
"""
    result = run(tmp_path, code, etag)

    assert "the new object stays" in result.stdout, result.stderr
    assert store.read("key") == b"newer"
    assert own_files(tmp_path) == []


@pytest.mark.parametrize(("pinned", "error"), [(True, PreconditionFailed), (False, CorruptObject)])
def test_a_file_rewritten_in_place_during_the_read_is_noticed(
    store: LocalStore, tmp_path: Path, pinned: bool, error: type[Exception]
):
    etag = store.write("key", b"a" * 1000).etag

    def rewrite(frame: FrameType, event: str, callee: Any) -> None:
        if event == "c_call" and callee.__name__ == "seek":
            with (tmp_path / "key").open("r+b") as file:
                file.write(b"b" * 500)

    sys.setprofile(rewrite)
    try:
        with pytest.raises(error):
            store.read("key", if_match=etag if pinned else None)
    finally:
        sys.setprofile(None)


def test_a_file_rewritten_in_place_has_another_etag(store: LocalStore, tmp_path: Path):
    etag = store.write("key", b"aaaa").etag
    with (tmp_path / "key").open("r+b") as file:
        file.write(b"bbbb")

    with pytest.raises(PreconditionFailed):
        store.read("key", if_match=etag)


def test_a_listing_bears_files_that_come_and_go(store: LocalStore, tmp_path: Path):
    store.write("stays", b"")
    done = Event()

    def come_and_go() -> None:
        while not done.is_set():
            (tmp_path / "folder").mkdir()
            for i in range(20):
                (tmp_path / f"folder/{i}").touch()
            for i in range(20):
                (tmp_path / f"folder/{i}").unlink()
            (tmp_path / "folder").rmdir()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(come_and_go)
        try:
            for _ in range(300):
                assert "stays" in [info.key for info in store.list()]
        finally:
            done.set()
        other.result()


# ---- many processes


def race(root: Path, code: str, processes: int) -> list[str]:
    command = [sys.executable, "-c", PRELUDE + code, str(root)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [process.communicate(timeout=60)[0] for process in running]


def test_one_of_many_processes_creates(tmp_path: Path):
    code = """
for i in range(100):
    try:
        store.create(f"log/{i}", str(os.getpid()).encode() * 1000)
        print(i)
    except AlreadyExists:
        pass
"""
    won = [int(line) for output in race(tmp_path, code, 8) for line in output.splitlines()]
    assert sorted(won) == [*range(100)]
    assert own_files(tmp_path) == []


def test_many_processes_lose_no_update(tmp_path: Path):
    LocalStore(str(tmp_path)).write("counter", b"0")
    code = """
done = 0
while done < 25:
    etag = store.stat("counter").etag
    try:
        value = int(store.read("counter", if_match=etag))
        store.replace("counter", str(value + 1).encode(), if_match=etag)
        done += 1
    except PreconditionFailed:
        pass
"""
    race(tmp_path, code, 4)
    assert LocalStore(str(tmp_path)).read("counter") == b"100"


# ---- names and links


def test_the_root_is_made_by_the_first_write(tmp_path: Path):
    store = LocalStore(str(tmp_path / "a/b"))
    store.create("c/d", b"data")
    store.delete("c/d")

    assert (tmp_path / "a/b/c").is_dir()  # a producer may be about to use it


@pytest.mark.parametrize("key", [".tidemill-x", "folder/.tidemill-lock", ".tidemill-tmp-1/x"])
def test_reserved_names(store: LocalStore, key: str):
    with pytest.raises(InvalidKey, match="reserved"):
        store.write(key, b"")


def test_an_object_and_a_folder_cannot_share_a_name(store: LocalStore):
    store.write("a/b", b"data")

    for verb in (lambda: store.write("a", b""), lambda: store.create("a", b""), lambda: store.write("a/b/c", b"")):
        with pytest.raises(InvalidKey, match="same name"):
            verb()
    for verb in (
        lambda: store.read("a"),
        lambda: store.stat("a"),
        lambda: store.delete("a"),
        lambda: store.read("a/b/c"),
    ):
        with pytest.raises(NotFound):
            verb()
    assert own_files(Path(store.url.removeprefix("file://"))) == []


def test_a_link_to_a_file_is_an_object_and_only_the_link_is_deleted(store: LocalStore, tmp_path: Path):
    inside = tmp_path / "folder"
    inside.mkdir()
    target = tmp_path.parent / "target"
    target.write_bytes(b"data")
    (inside / "link").symlink_to("../../target")

    [info] = store.list()
    assert info.key == "folder/link"
    assert store.read("folder/link", if_match=info.etag) == b"data"
    store.delete("folder/link", if_match=info.etag)

    assert [*inside.iterdir()] == [inside / ".tidemill-lock"]
    assert target.read_bytes() == b"data"


def test_no_link_to_a_folder_leads_out(store: LocalStore, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "key").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(elsewhere)

    assert [*store.list()] == []
    verbs: list[Callable[[], object]] = [
        lambda: store.read("link/key"),
        lambda: store.write("link/key", b""),
        lambda: store.create("link/new", b""),
        lambda: store.delete("link/key"),
    ]
    for verb in verbs:
        with pytest.raises(InvalidKey, match="leads out"):
            verb()
    assert [path.name for path in elsewhere.iterdir()] == ["key"]


def test_what_is_no_regular_file_is_no_object(store: LocalStore, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")

    assert [*store.list()] == []
    for key in ["pipe", "dangling"]:
        with pytest.raises(NotFound):
            store.read(key)
        with pytest.raises(NotFound):
            store.delete(key)


def test_a_name_that_is_no_unicode_is_skipped_with_one_warning(
    store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    for name in [b"latin-\xe9", b"latin-\xe8"]:
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).touch()
    store.write("good", b"")

    assert [info.key for info in store.list()] == ["good"]
    assert len(caplog.records) == 1


# ---- a disk that refuses


def test_a_full_disk_leaves_the_old_object_and_no_litter(store: LocalStore, tmp_path: Path):
    store.write("key", b"old")
    code = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    store.write("key", b"x" * 100_000)
except StoreFull as error:
    print(error)
"""
    assert "nothing was written" in run(tmp_path, code).stdout
    assert store.read("key") == b"old"
    assert own_files(tmp_path) == []


def test_no_permission(store: LocalStore, tmp_path: Path):
    store.write("key", b"old")
    tmp_path.chmod(0o500)
    code = """
if os.geteuid() == 0:
    os.setuid(65534)
for verb in (lambda: store.write("key", b""), lambda: store.create("new", b""), lambda: store.delete("key")):
    try:
        verb()
    except PermissionDenied as error:
        print(error)
"""
    denied = run(tmp_path, code).stdout.splitlines()
    tmp_path.chmod(0o700)

    assert len(denied) == 3
    assert all("check the owner and mode of" in line for line in denied)
    assert store.read("key") == b"old"

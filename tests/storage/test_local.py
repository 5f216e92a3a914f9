"""What only a local disk can do wrong: crashes between two system calls, programs that know no locks, links, full disks."""

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest

from tidemill.storage.errors import (
    CorruptObject,
    InvalidKey,
    NotFound,
    PreconditionFailed,
)
from tidemill.storage.files import moment, until_proven
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
    return sorted(path.name for path in root.rglob(".tidemill-*"))


def test_what_another_process_made_is_made_durable_up_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"visible, and not durable yet")
    shown = run(tmp_path, WATCH + "store.make_durable('a/b/c')\nprint(*folders, sep='\\n')")
    assert shown.stdout.split() == [str(tmp_path / "a/b"), str(tmp_path / "a"), str(tmp_path)], shown.stderr


WATCH = """
folders = []
sys.addaudithook(lambda event, args: event == "open" and args[2] & os.O_DIRECTORY and folders.append(args[0]))
"""


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


@pytest.mark.slow
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


def park(root: Path, key: str, etag: str, sha256: str = "") -> None:
    """What a delete leaves that is killed before it looks at what it has moved aside."""
    parked = root / f".tidemill-delete-{etag}.{sha256}.0123456789abcdef"
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

    assert store.stat("key").fingerprint_etag == newer.fingerprint_etag
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


# ---- what an etag promises


def rewrite(path: Path, data: bytes) -> None:
    """New bytes in the same inode, with the same size and modification time: as an inode that is used again by `cp -p`."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_other_bytes_in_the_same_inode_with_the_same_size_and_time_have_another_etag(store: LocalStore, tmp_path: Path):
    etag = store.write("key", b"old").etag
    assert store.read("key", if_match=etag) == b"old"

    rewrite(tmp_path / "key", b"new")

    assert store.stat("key").etag != etag
    with pytest.raises(PreconditionFailed):
        store.delete("key", if_match=etag)
    assert store.read("key") == b"new"


@pytest.mark.parametrize("verb", ["write", "create", "replace"])
def test_what_a_verb_returns_is_the_etag_that_stays(store: LocalStore, verb: str):
    if verb == "replace":
        info = store.replace("key", b"new", if_match=store.write("key", b"old").etag)
    else:
        info = getattr(store, verb)("key", b"new")

    assert store.stat("key") == info
    assert store.read("key", if_match=info.etag) == b"new"


@pytest.mark.parametrize("act", [lambda path: path.chmod(0o600), lambda path: os.link(path, path.parent / "backup")])
def test_a_change_of_permissions_or_a_hard_link_leaves_the_fingerprint(
    store: LocalStore, tmp_path: Path, act: Callable[[Path], None]
):
    before = store.write("key", b"data")
    act(tmp_path / "key")

    after = store.stat("key")
    assert after.etag != before.etag
    assert after.fingerprint_etag == before.fingerprint_etag


@pytest.mark.parametrize(
    ("changed", "seconds"),
    [
        (1_700_000_000_123_456_789, 0.01),  # a fine clock
        (1_700_000_000_123_456_700, 0.01),  # 100 ns, as on NTFS
        (1_700_000_000_000_000_000, 1.01),  # whole seconds, as on ext4 with small inodes
    ],
)
def test_a_pinned_read_waits_until_the_clock_of_the_file_system_has_ticked(
    monkeypatch: pytest.MonkeyPatch, changed: int, seconds: float
):
    found = SimpleNamespace(st_ctime_ns=changed)
    for age, wait in [(0.0, seconds), (seconds * 0.5, seconds * 0.5), (seconds + 0.001, 0.0), (-3600.0, 0.0)]:
        now = changed + round(age * 1e9)
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        assert until_proven(cast(os.stat_result, found)) == pytest.approx(wait, abs=1e-5)


def test_after_a_pinned_read_of_a_new_file_any_change_shows(store: LocalStore, tmp_path: Path):
    store.write("key", b"data")
    for mode in (0o600, 0o640):
        (tmp_path / "key").chmod(mode)  # sets the change time
        store.read("key", if_match=store.stat("key").etag)

        assert until_proven((tmp_path / "key").stat()) == 0


def test_a_delete_that_is_told_the_bytes_spares_what_a_memory_map_has_written(store: LocalStore, tmp_path: Path):
    """Such a write need not change any time. Here the time is set back, so that the test needs no luck."""
    info = store.write("key", b"old")
    digest = hashlib.sha256(b"old").hexdigest()
    code = """
rewritten = os.path.join(sys.argv[1], "key")
etag, digest = arguments
def hook(event, _):
    if event == "os.rename":  # after the etags were compared
        before = os.stat(rewritten)
        with open(rewritten, "r+b") as file:
            file.write(b"new")
        os.utime(rewritten, ns=(before.st_mtime_ns, before.st_mtime_ns))
sys.addaudithook(hook)
try:
    store.delete("key", if_match=etag, sha256=digest)
except PreconditionFailed as error:
    print(error)
"""
    result = run(tmp_path, code, info.etag, digest)

    assert "the new object stays" in result.stdout, result.stderr
    assert store.read("key") == b"new"
    assert store.stat("key").etag != info.etag  # so that it is taken for new, and read
    assert own_files(tmp_path) == []


def test_a_delete_that_is_told_the_bytes_removes_them(store: LocalStore, tmp_path: Path):
    info = store.write("key", b"data")
    with pytest.raises(PreconditionFailed):
        store.delete("key", if_match=info.etag, sha256=hashlib.sha256(b"other").hexdigest())

    store.delete("key", if_match=store.stat("key").etag, sha256=hashlib.sha256(b"data").hexdigest())

    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("said", "kept"), [(b"old", False), (b"other", True)])
def test_a_listing_compares_the_bytes_of_a_killed_delete(store: LocalStore, tmp_path: Path, said: bytes, kept: bool):
    park(tmp_path, "key", store.write("key", b"old").etag, hashlib.sha256(said).hexdigest())

    for _ in store.list():
        pass

    assert [info.key for info in store.list()] == ["key"] * kept
    assert own_files(tmp_path) == []


def test_a_symbolic_link_that_is_swapped_during_the_delete_stays(store: LocalStore, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("v1", "v2"):
        (tmp_path / "data" / name).write_bytes(name.encode())
    (tmp_path / "key").symlink_to("data/v1")
    code = """
link = os.path.join(sys.argv[1], "key")
def hook(event, what):
    if event == "os.rename" and what[0] == link:
        os.unlink(link)
        os.symlink("data/v2", link)
sys.addaudithook(hook)
try:
    store.delete("key", if_match=arguments[0])
except PreconditionFailed as error:
    print(error)
"""
    result = run(tmp_path, code, store.stat("key").etag)

    assert "the new object stays" in result.stdout, result.stderr
    assert store.read("key") == b"v2"
    assert (tmp_path / "key").is_symlink()
    assert own_files(tmp_path) == []


def test_a_symbolic_link_whose_file_holds_other_bytes_stays(store: LocalStore, tmp_path: Path):
    (tmp_path / "v1").write_bytes(b"old")
    (tmp_path / "key").symlink_to("v1")
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(PreconditionFailed):
        store.delete("key", if_match=store.stat("key").etag, sha256=wrong)
    assert (tmp_path / "key").is_symlink()

    store.delete("key", if_match=store.stat("key").etag, sha256=hashlib.sha256(b"old").hexdigest())

    assert {path.name for path in tmp_path.iterdir()} == {"v1"}


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


def test_a_file_that_may_not_be_linked_is_moved_back_too(store: LocalStore, tmp_path: Path):
    """Linux forbids hard links to files of other users (`fs.protected_hardlinks`), as those of a producer may be."""
    info = store.write("key", b"new")
    code = """
def hook(event, _):
    if event == "os.link":
        raise PermissionError(1, "Operation not permitted")
sys.addaudithook(hook)
try:
    store.delete("key", if_match=arguments[0], sha256="of other bytes")
except PreconditionFailed as error:
    print(error)
"""
    result = run(tmp_path, code, info.etag)

    assert "the new object stays" in result.stdout, result.stderr
    assert store.read("key") == b"new"
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


@pytest.mark.slow
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

    assert [*inside.iterdir()] == []
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


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "loop": (lambda path: path.symlink_to("loop"), "cannot be looked at"),
    ".hidden": (lambda path: path.symlink_to(f"{__file__}/x"), "cannot be looked at"),
    "long": (lambda path: path.symlink_to("x" * 300), "cannot be looked at"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "leads nowhere"),
    "folder": (lambda path: path.symlink_to(".."), "to what is no file"),
    "zero": (lambda path: path.symlink_to("/dev/zero"), "to what is no file"),
    "pipe": (os.mkfifo, "no regular file"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_entry_ends_no_listing_and_is_told(store: LocalStore, tmp_path: Path, name: str):
    for key in ("good", *(f"f{i:02}" for i in range(1, 20))):
        store.write(key, b"")
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        ODD[name][0](folder / name)
    told: dict[str, str] = {}

    listed = {info.key for info in store.list(passed_over=told.__setitem__)}

    assert listed == {"good", *(f"f{i:02}" for i in range(1, 20))}
    assert set(told) == {name, f"sub/{name}"}
    assert all(ODD[name][1] in reason for reason in told.values())


def test_a_link_that_leads_out_is_followed_unless_only_the_inside_is_asked_for(store: LocalStore, tmp_path: Path):
    outside = tmp_path.parent / "outside"
    outside.write_bytes(b"secret")
    store.write("a", b"data")
    (tmp_path / "in").symlink_to("a")
    (tmp_path / "out").symlink_to(outside)
    told: dict[str, str] = {}

    assert {info.key for info in store.list()} == {"a", "in", "out"}
    assert {info.key for info in store.list(passed_over=told.__setitem__, inside=True)} == {"a", "in"}
    assert told == {"out": "a symbolic link that leads out of the folder, which is not followed"}


def test_a_path_longer_than_the_system_takes_is_passed_over(store: LocalStore, tmp_path: Path):
    store.write("good", b"")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(500):
            os.mkdir("d" * 10, dir_fd=fd)
            inner = os.open("d" * 10, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)
    told: dict[str, str] = {}

    assert [info.key for info in store.list(passed_over=told.__setitem__)] == ["good"]
    [reason] = told.values()
    assert "cannot be listed" in reason


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter: pytest's own are for one alone."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_folder_that_may_not_be_listed_is_told_or_an_error(public: Path):
    """`lost+found` of a disk that is mounted there."""
    LocalStore(str(public)).write("good", b"")
    (public / "lost+found").mkdir(mode=0)
    code = """
if os.geteuid() == 0:
    os.setuid(65534)
print([info.key for info in store.list(passed_over=lambda key, reason: print(key, reason))])
try:
    list(store.list())
except PermissionDenied as error:
    print(error)
"""
    result = run(public, code)
    told, listed, error = result.stdout.splitlines()

    assert told == "lost+found/ the folder cannot be listed: Permission denied"
    assert listed == "['good']"
    assert "check the owner and mode" in error


@pytest.mark.parametrize(
    ("seconds", "year"), [(-70_000_000_000, 1), (-2_000_000_000, 1906), (-1, 1969), (300_000_000_000, 9999)]
)
def test_a_file_may_have_any_time(seconds: int, year: int):
    """Some file systems know times that no datetime can hold. They are told as near as one comes."""
    assert moment(seconds).year == year
    assert moment(seconds).astimezone(timezone(timedelta(hours=14))).utcoffset() == timedelta(hours=14)
    assert moment(seconds).astimezone(timezone(timedelta(hours=-12))).utcoffset() == timedelta(hours=-12)


@pytest.mark.parametrize("verb", ["write", "create"])
@pytest.mark.parametrize(
    ("mode", "kept"), [(None, 0o644), (0o600, 0o600), (0o640, 0o640), (0o777, 0o644), (0o4755, 0o644), (0, 0o600)]
)
def test_a_copy_is_open_to_nobody_that_the_mode_does_not_name(
    store: LocalStore, tmp_path: Path, verb: str, mode: int | None, kept: int
):
    umask = os.umask(0o022)
    try:
        getattr(store, verb)("key", b"secret", mode=mode)
    finally:
        os.umask(umask)

    assert store.mode("key") == kept


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


@pytest.mark.parametrize("call", ["os.mkdir", "os.rename"])
def test_a_full_disk_can_be_drained(store: LocalStore, tmp_path: Path, call: str):
    """What a delete compares is moved into a folder of its own, for which there may be no room."""
    old, kept = store.write("old", b"old"), store.write("kept", b"kept")
    code = """
import errno
def hook(event, _):
    if event == arguments[0]:
        raise OSError(errno.ENOSPC, "No space left on device")
sys.addaudithook(hook)
store.delete("old", if_match=arguments[1], sha256=arguments[3])
for etag, digest in ((arguments[1], arguments[4]), (arguments[2], arguments[3])):
    try:
        store.delete("kept", if_match=etag, sha256=digest)
    except PreconditionFailed:
        print("kept")
"""
    digests = [hashlib.sha256(data).hexdigest() for data in (b"old", b"kept")]
    result = run(tmp_path, code, call, old.etag, kept.etag, *digests)

    assert result.stdout.split() == ["kept", "kept"], result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


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

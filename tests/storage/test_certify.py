"""A place that is tried: what holds and what does not, and that nothing of it stays."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import AZURE, CLOUDS, GCS, urls_of
from tests.s3_server import wait_until
from tests.storage import broken
from tidemill.storage.certify.hands import TOGETHER, Call, hands_on
from tidemill.storage.certify.promises import PROMISES, Promise
from tidemill.storage.certify.run import PREFIX, Certificate, Kept, certify, tried
from tidemill.storage.certify.trial import Effort, Trial
from tidemill.storage.errors import AlreadyExists, InvalidURL, PermissionDenied, StorageError, StoreNotFound
from tidemill.storage.local import LocalStore
from tidemill.storage.urls import open_store

pytestmark = pytest.mark.slow  # each try starts four processes

LITTLE = Effort(rounds=3, looks=2, objects=40, calls=3, large_bytes=2**21)
WORDS = [promise.words for promise in PROMISES]
CREATE, REPLACE, DELETE, SEEN, WHOLE, PINNED, ETAG, LISTING, MISSING, LARGE, KEYS, FOLDER, CLOCK = WORDS


@pytest.fixture(params=["local", "s3", *CLOUDS])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    return urls_of(request, tmp_path)


def broken_in(found: Certificate) -> set[str]:
    return {one.promise for one in found.promises if not one.holds}


def test_what_a_good_place_keeps_is_said_and_nothing_stays(
    make_url: Callable[[str], str], request: pytest.FixtureRequest
):
    url = make_url("place")
    open_store(url).write("mine", b"mine")
    other = f"{PREFIX}other/a/b"
    open_store(url).write(other, b"")
    found = certify(url, LITTLE)

    # What each of these servers is known for; on a disk a name is a file or a folder
    limits = {"local": {FOLDER}, "s3": set(), GCS: set(), AZURE: set()}
    assert broken_in(found) == limits[request.node.callspec.params["make_url"]], found.promises
    assert found.fit
    assert [one.promise for one in found.promises] == WORDS
    assert all(one.seen for one in found.promises)
    refuses = request.node.callspec.params["make_url"] in (GCS, AZURE)
    assert refuses == any("refused" in one.seen for one in found.promises if one.promise == KEYS)
    assert [each.verb for each in found.latencies][:3] == ["create", "stat", "read"]
    assert all(0 < (each.p50_ms or 0) <= (each.p99_ms or 0) for each in found.latencies), found.latencies
    assert set(found.per_second) == {"create", "read", "delete"}
    assert set(found.bytes_per_second) == {"write", "read"}
    assert found.left == [f"{found.url}/{PREFIX}other"]  # it may still be running
    assert {info.key for info in open_store(url).list()} == {"mine", other}
    if found.url.startswith("file:"):
        assert set(os.listdir(url)) == {"mine", f"{PREFIX}other"}


def promise_of(words: str) -> Promise:
    return next(promise for promise in PROMISES if promise.words == words)


@pytest.mark.parametrize(
    ("store", "broken_promises"),
    [
        (broken.ChecksThenWrites, {CREATE: f"of {TOGETHER} succeeded at once, in ", REPLACE: "succeeded at once, in "}),
        (broken.DeletesAnyway, {DELETE: "a delete that named an older object removed the newer one"}),
        (broken.RemembersListings, {SEEN: "others saw the old object, or none, after it was replaced"}),
        (broken.WritesInPlace, {WHOLE: "a part of each"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_several_processes_break_is_found(store: broken.Opener, broken_promises: dict[str, str], tmp_path: Path):
    with hands_on(f"file://{tmp_path}", store) as hands:
        for words, seen in broken_promises.items():
            found = tried(promise_of(words), Trial(store(str(tmp_path)), hands, Effort(rounds=30)))
            assert not found.holds
            assert seen in found.seen
            assert found.follows


class NoHands:
    """For checks that need no other process."""


@pytest.mark.parametrize(
    ("store", "words", "seen"),
    [
        (broken.IgnoresPins, PINNED, "a read that named an older object returned the newer one"),
        (broken.HasOneEtag, ETAG, "other bytes have the same etag"),
        (broken.ListsOnePage, LISTING, "20 of 40 objects were not listed"),
        (broken.LimitsSizes, LARGE, "413"),
        (broken.TrimsKeys, KEYS, "'trailing space '"),
        (broken.LivesTomorrow, CLOCK, "ahead"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_one_process_sees_broken_is_found(store: broken.Opener, words: str, seen: str, tmp_path: Path):
    found = tried(promise_of(words), Trial(store(str(tmp_path)), NoHands(), LITTLE))  # type: ignore[arg-type]
    assert not found.holds
    assert seen in found.seen
    assert found.follows


def test_what_cannot_be_done_without_makes_a_place_unfit_and_a_limit_does_not(tmp_path: Path):
    needed = certify(f"{tmp_path}", LITTLE, broken.LimitsSizes)
    assert (needed.fit, broken_in(needed)) == (False, {LARGE, FOLDER})
    limited = certify(f"{tmp_path}", LITTLE, broken.DeletesAnyway)
    assert (limited.fit, broken_in(limited)) == (True, {DELETE, FOLDER})
    assert os.listdir(tmp_path) == []


def test_what_may_not_be_deleted_is_said_to_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = certify(str(tmp_path), LITTLE, broken.NeverDeletes)

    assert DELETE in broken_in(found)
    [url] = found.left
    assert url.startswith(f"file://{tmp_path}/{PREFIX}")
    assert f"{url} could not be removed, remove it" in caplog.text
    assert {each.verb: each.failed for each in found.latencies if each.failed} == {"delete": "no deletes here"}
    assert "delete" not in found.per_second


def test_a_place_that_is_not_there_is_not_made(tmp_path: Path):
    with pytest.raises(StoreNotFound, match="there is no such folder"):
        certify(f"{tmp_path}/nowhere", LITTLE)
    assert os.listdir(tmp_path) == []


def test_memory_is_nothing_to_check():
    with pytest.raises(InvalidURL, match="lives in this process alone"):
        certify(f"memory://{uuid.uuid4().hex}", LITTLE)


class Denies(LocalStore):
    def create(self, *_: object, **__: object):
        raise PermissionDenied("may not create")


def test_a_place_where_nothing_may_be_written_is_one_error(tmp_path: Path):
    with pytest.raises(PermissionDenied, match="may not create"):
        certify(str(tmp_path), LITTLE, lambda url: Denies(url.removeprefix("file://")))
    assert os.listdir(tmp_path) == []


# ---- processes -------------------------------------------------------------------------------------------------------
def test_a_file_is_no_place_and_nothing_is_said_to_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(StorageError, match="an object and a folder would need the same name"):
        certify(str(tmp_path / "a.parquet"), LITTLE)
    assert "could not be removed" not in caplog.text


def test_calls_together_are_answered_in_their_order(tmp_path: Path):
    with hands_on(f"file://{tmp_path}", open_store) as hands:
        hands.together([Call("write", f"{place}", {"data": b"%d" % place}) for place in range(TOGETHER)])
        read = hands.together([Call("read", f"{place}") for place in range(TOGETHER)])
        assert read == [b"%d" % place for place in range(TOGETHER)]
        made = hands.together([Call("create", "0", {"data": b""}), Call("list", "1")])
    assert isinstance(made[0], AlreadyExists)
    assert [info.key for info in made[1]] == ["1"]


def test_a_process_that_dies_is_an_error_and_what_was_written_goes(tmp_path: Path):
    with pytest.raises(RuntimeError, match="a process of this check has died"):
        certify(str(tmp_path), LITTLE, broken.EndsItself)
    assert os.listdir(tmp_path) == []


# ---- the command -----------------------------------------------------------------------------------------------------
def started(url: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tidemill", "check", url, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_check_that_is_stopped_leaves_nothing(number: int, code: int, tmp_path: Path):
    process = started(str(tmp_path), "--rounds", "100000")
    wait_until(lambda: any(tmp_path.glob(f"{PREFIX}*/create/5")), seconds=60, what="the race")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert process.returncode == code, err
    assert out == ""
    assert "what it had written is removed" in err
    assert os.listdir(tmp_path) == []


def test_a_check_that_is_killed_has_said_where_and_the_next_one_removes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "tidemill.storage")
    process = started(str(tmp_path), "--rounds", "100000")
    wait_until(lambda: any(tmp_path.glob(f"{PREFIX}*/create/5")), seconds=60, what="the race")
    process.kill()
    _, err = process.communicate(timeout=60)
    [folder] = tmp_path.iterdir()
    assert f"everything is written below file://{folder}" in err
    # The processes that raced for it end too
    wait_until(lambda: not _users_of(str(folder)), seconds=30, what="the end of the other processes")

    assert certify(str(tmp_path), LITTLE).left == [f"file://{folder}"]
    assert "is of another check" in caplog.text
    hours_ago = time.time() - 2 * 3600
    os.utime(folder, (hours_ago, hours_ago))
    assert certify(str(tmp_path), LITTLE).left == []
    assert "left by a check that was killed, is removed" in caplog.text
    assert os.listdir(tmp_path) == []


def _users_of(folder: str) -> list[str]:
    """The processes that were started to race below a folder, and are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and folder.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


def test_the_command_prints_a_table_and_figures(tmp_path: Path):
    process = started(str(tmp_path), "--rounds", "2")
    out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    first, *lines = out.splitlines()
    assert first == f"file://{tmp_path}: fit for Tidemill, with 1 limit"
    assert [line.partition("  ")[0] for line in lines[2 : 2 + len(WORDS)]] == WORDS
    assert any(line.startswith(FOLDER) and "let no producer use one name" in line for line in lines)
    assert any(line.startswith("calls a second, 8 at once: create ") for line in lines)
    assert any(line.startswith("MB a second, one large object: write ") for line in lines)


def test_the_command_tells_programs_and_fails_where_a_promise_is_lacking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from tidemill.flows.cli import main
    from tidemill.storage.certify import run

    kept = [
        Kept(
            promise=each.words,
            holds=each.words != LISTING,
            needed=each.needed,
            seen="20 are missing",
            follows=each.follows,
        )
        for each in PROMISES
    ]
    whole = Certificate(url="file:///x", fit=False, promises=kept, latencies=[], per_second={}, bytes_per_second={})
    monkeypatch.setattr(run, "certify", lambda url, effort: whole)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path), "--json"])
    assert ended.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fit"] is False
    assert [one["promise"] for one in told["promises"]] == WORDS
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "not fit" in shown
    assert "NO     20 are missing: shards and versions would be passed over" in shown

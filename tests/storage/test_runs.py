"""The progress of a batch run: killed anywhere, it goes on; started again, it finds its own result."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.storage.faults import Call, FaultStore, fail_at
from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject, Unavailable
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Entry, verified
from tidemill.storage.memory import MemoryStore
from tidemill.storage.runs import BatchProgress, Checkpoint, Source
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store

KEY = "0123456789abcdef"


def as_stored(checkpoint: Checkpoint, weights: Source, state: Source) -> tuple[Checkpoint, Source, Source]:
    return checkpoint, weights, state


@pytest.fixture
def log(store: Store) -> VersionLog:
    return VersionLog(store, "taxi")


@pytest.fixture
def memory() -> VersionLog:
    """For what does not depend on the backend."""
    return VersionLog(MemoryStore(uuid.uuid4().hex), "taxi")


def commit(log: VersionLog, run: str | None = None) -> Version:
    parent = log.head() if log.exists() else None
    number = 0 if parent is None else parent.number + 1
    blobs = Blobs(
        weights=log.write_blob(number, "safetensors", b"w"), state=log.write_blob(number, "state.safetensors", b"s")
    )
    return log.commit(parent, Entry(kind="batch", spec={}, blobs=blobs, run=run))


def save(progress: BatchProgress, epochs: int) -> None:
    losses = tuple(1 / (e + 1) for e in range(epochs))
    progress.save(losses, f"weights {epochs}".encode(), f"state {epochs}".encode())


def kept(progress: BatchProgress) -> list[str]:
    prefix = f"{progress.log.model}/runs/{progress.key}/"
    return sorted(info.key.removeprefix(prefix) for info in progress.log.store.list(prefix))


# ---- the life of a run ---------------------------------------------------------------------------------------------------


def test_a_run_from_its_beginning_to_its_end(log: VersionLog) -> None:
    progress = BatchProgress(log, KEY)
    assert progress.registered() is None
    progress.begin()
    assert progress.latest(as_stored) is None
    assert progress.registered() is None
    save(progress, 1)
    save(progress, 2)
    found = progress.latest(as_stored)
    assert found is not None
    checkpoint, weights, state = found
    assert (checkpoint.epochs, checkpoint.losses) == (2, (1.0, 0.5))
    assert (weights, state) == (b"weights 2", b"state 2")
    version = commit(log, KEY)
    assert progress.registered() == (version, False)  # registered, but the alias is not moved yet
    progress.finish(version)
    assert progress.registered() == (version, True)
    assert kept(progress) == ["done.json", "run.json"]
    assert progress.latest(as_stored) is None


def test_a_run_started_again_finds_its_version_among_later_ones(log: VersionLog) -> None:
    commit(log)
    progress = BatchProgress(log, KEY)
    progress.begin()
    mine = commit(log, KEY)
    commit(log)
    commit(log, "another run")
    assert BatchProgress(log, KEY).registered() == (mine, False)


def test_where_the_run_began_is_noted_once(log: VersionLog) -> None:
    progress = BatchProgress(log, KEY)
    progress.begin()
    mine = commit(log, KEY)
    commit(log)
    BatchProgress(log, KEY).begin()  # an attempt after a crash
    assert progress.registered() == (mine, False)


def test_versions_before_the_run_began_are_not_read(memory: VersionLog) -> None:
    for _ in range(5):
        commit(memory)
    progress = BatchProgress(memory, KEY)
    progress.begin()
    commit(memory)
    read: list[str] = []

    def hook(call: Call) -> None:
        if call.verb == "read" and "/log/" in call.key:
            read.append(call.key[-13:])

    assert BatchProgress(VersionLog(FaultStore(memory.store, hook), "taxi"), KEY).registered() is None
    assert set(read) == {"00000005.json", "00000004.json"}


def test_two_runs_do_not_see_each_other(log: VersionLog) -> None:
    a, b = BatchProgress(log, KEY), BatchProgress(log, KEY + "0")
    a.begin()
    b.begin()
    save(a, 1)
    version = commit(log, a.key)
    assert b.latest(as_stored) is None
    assert b.registered() is None
    a.finish(version)
    save(b, 1)
    assert b.latest(as_stored) is not None
    assert (a.registered(), b.registered()) == ((version, True), None)


def test_a_registry_that_is_not_there_yet_has_no_progress(tmp_path: Path) -> None:
    log = VersionLog(open_store(str(tmp_path / "registry")), "taxi")
    assert BatchProgress(log, KEY).registered() is None
    progress = BatchProgress(log, KEY)
    progress.begin()
    save(progress, 1)
    assert progress.latest(as_stored) is not None


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


def test_only_the_last_two_checkpoints_are_kept(log: VersionLog) -> None:
    progress = BatchProgress(log, KEY)
    for epochs in range(1, 6):
        save(progress, epochs)
    assert sorted({name[:8] for name in kept(progress)}) == ["00000004", "00000005"]
    assert len(kept(progress)) == 6


@pytest.mark.parametrize("lost", ["checkpoint", "weights", "state"])
@pytest.mark.parametrize("damage", ["gone", "empty", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(log: VersionLog, lost: str, damage: str) -> None:
    progress = BatchProgress(log, KEY)
    save(progress, 1)
    save(progress, 2)
    found = progress.latest(as_stored)
    assert found is not None
    key = {
        "checkpoint": f"taxi/runs/{KEY}/00000002.json",
        "weights": found[0].weights.key,
        "state": found[0].state.key,
    }[lost]
    if damage == "gone":
        log.store.delete(key)
    else:
        data = log.store.read(key)
        log.store.write(key, b"" if damage == "empty" else bytes([data[0] ^ 1]) + data[1:])
    older = progress.latest(as_stored)
    assert older is not None
    assert (older[0].epochs, older[1]) == (1, b"weights 1")


def test_if_no_checkpoint_is_whole_the_run_starts_over(memory: VersionLog) -> None:
    progress = BatchProgress(memory, KEY)
    save(progress, 1)
    for info in list(memory.store.list(f"taxi/runs/{KEY}/0")):
        memory.store.write(info.key, b"[" * 99_999)
    assert progress.latest(as_stored) is None


def test_an_unreachable_checkpoint_is_not_a_damaged_one(memory: VersionLog) -> None:
    progress = BatchProgress(memory, KEY)
    save(progress, 1)
    for index in range(4):  # the listing, the checkpoint, its two blobs
        faulty = FaultStore(memory.store, fail_at(index, "before", Unavailable("no answer")))
        with pytest.raises(Unavailable):
            BatchProgress(VersionLog(faulty, "taxi"), KEY).latest(as_stored)


def test_the_same_epoch_may_be_saved_by_two_attempts(log: VersionLog) -> None:
    progress = BatchProgress(log, KEY)
    save(progress, 1)
    save(progress, 2)
    save(BatchProgress(log, KEY), 2)
    found = progress.latest(as_stored)
    assert found is not None
    assert found[1] == b"weights 2"


def test_a_slow_attempt_does_not_hide_the_progress_of_a_fast_one(log: VersionLog) -> None:
    fast, slow = BatchProgress(log, KEY), BatchProgress(log, KEY)
    for epochs in (1, 2, 3, 4):
        save(fast, epochs)
    save(slow, 2)
    found = slow.latest(as_stored)
    assert found is not None
    assert found[0].epochs == 4


def test_killed_at_any_call_of_a_save_the_run_goes_on_from_a_whole_checkpoint(memory: VersionLog) -> None:
    class Killed(BaseException):
        pass

    def calls_of_a_save() -> int:
        count: list[Call] = []
        save(BatchProgress(VersionLog(FaultStore(memory.store, count.append), "taxi"), KEY), 3)
        return len(count) // 2

    for epochs in (1, 2):
        save(BatchProgress(memory, KEY), epochs)
    total = calls_of_a_save()
    assert total > 3
    for index in range(total):
        for phase in ("before", "after"):
            for info in list(memory.store.list()):
                memory.store.delete(info.key)
            progress = BatchProgress(memory, KEY)
            save(progress, 1)
            save(progress, 2)

            def hook(call: Call, index: int = index, phase: str = phase) -> None:
                if (call.index, call.phase) == (index, phase):
                    raise Killed

            with pytest.raises(Killed):
                save(BatchProgress(VersionLog(FaultStore(memory.store, hook), "taxi"), KEY), 3)
            found = progress.latest(as_stored)
            assert found is not None
            assert found[0].epochs in (2, 3)
            assert found[1] == f"weights {found[0].epochs}".encode()
            save(progress, 3)  # what the run does next, as if nothing had been
            save(progress, 4)
            assert {name[:8] for name in kept(progress)} == {"00000003", "00000004"}


@pytest.mark.parametrize("phase", ["before", "after"])
def test_killed_while_finishing_the_run_finishes_again(memory: VersionLog, phase: str) -> None:
    progress = BatchProgress(memory, KEY)
    progress.begin()
    save(progress, 1)
    version = commit(memory, KEY)
    for index in range(6):
        faulty = FaultStore(memory.store, fail_at(index, phase, Unavailable("killed")))
        try:
            BatchProgress(VersionLog(faulty, "taxi"), KEY).finish(version)
        except Unavailable:
            found = progress.registered()
            assert found is not None
            assert found[0] == version
    progress.finish(version)
    assert progress.registered() == (version, True)
    assert kept(progress) == ["done.json", "run.json"]


def test_foreign_objects_among_the_checkpoints_are_left_alone(memory: VersionLog) -> None:
    progress = BatchProgress(memory, KEY)
    for name in ("0notes.txt", "0.json", "notes", "0/x"):
        memory.store.write(f"taxi/runs/{KEY}/{name}", b"mine")
    save(progress, 1)
    version = commit(memory)
    progress.finish(version)
    assert {"0notes.txt", "0.json", "notes", "0/x"} <= set(kept(progress))


# ---- damaged records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "done.json"])
@pytest.mark.parametrize("garbage", [b"", b"{}", b"[]", b"\xff", b'{"after": "x", "version": "x"}', b"[" * 99_999])
def test_a_damaged_record_is_named_with_a_remedy(memory: VersionLog, name: str, garbage: bytes) -> None:
    progress = BatchProgress(memory, KEY)
    commit(memory)
    memory.store.write(f"taxi/runs/{KEY}/{name}", garbage)
    with pytest.raises(CorruptObject, match=f"{KEY}/{name} is damaged.*Delete it"):
        progress.registered()


def test_the_records_are_as_documented(make_url: Callable[[str], str]) -> None:
    log = VersionLog(open_store(make_url("registry")), "taxi")
    progress = BatchProgress(log, KEY)
    progress.begin()

    def stored(name: str) -> Any:
        return verified(log.store.read(f"taxi/runs/{KEY}/{name}"))

    assert stored("run.json") == {"after": -1}
    save(progress, 1)
    assert stored("00000001.json")["epochs"] == 1
    version = commit(log, KEY)
    progress.finish(version)
    assert stored("done.json") == {"version": 0}

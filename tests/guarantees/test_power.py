"""Power loss: what the disk holds at any moment, mounted again and run on, gives the same bits; nothing is lost or trained twice.

    make prove ARGS="tests/guarantees/test_power.py -rP"                              # every moment, root only
    .venv/bin/python -m pytest tests/guarantees/test_power.py --power                 # some of them

The registry and the archive lie on one file system (ext4), the inbox and the dataset on another, each in an image of its own
behind a loop device. At a moment the writer stops itself (SIGSTOP), and both images are copied as they are. Nobody syncs. The
copies are mounted in place of the originals, as by a machine that comes back: the file system replays its journal, the run
begins anew, and the audit follows. What the writer had been told to be stored must still be there.

An image, read through the page cache of the file that it is, holds exactly what the file system has sent to its device. What was
written and not yet fsynced is not in it: that waits in the pages of the mounted file system. So a copy is the disk of a machine
that loses power, if a disk keeps what it was sent; the volatile cache of a real one is emptied by the flush that belongs to an
fsync. Two controls show that such a copy loses something: a writer whose fsync does nothing loses versions that it had committed,
and so does one that syncs its files and not the folders.

There are two file systems because each has a journal of its own. Within one of them, a shard's removal never survives unless the
manifest that was stored before it survives too, whatever was fsynced.
"""

import json
import os
import signal
import stat
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from re import sub
from typing import Any, Final, Literal

import pytest

from tests.guarantees.audit import audit
from tests.guarantees.children import (
    BATCH,
    DATASET,
    DEADLINE,
    END,
    ONLINE,
    REJECTED,
    SHARDS,
    SPEC,
    Stores,
    bits,
    collect_garbage,
    drain,
    fill,
    rollback,
    sample,
    start_child,
    start_server,
    state_of,
    train,
    waiting,
)
from tests.s3_server import wait_until
from tests.storage.faults import Call, hooked
from tidemill.storage.aliases import all_aliases
from tidemill.storage.chain import Version
from tidemill.storage.disposal import archive_keys
from tidemill.storage.errors import NotFound
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import sha256
from tidemill.storage.urls import open_store
from tidemill.tasks.online import step as online
from tidemill.tasks.settings import Archive, GateSettings

pytestmark = pytest.mark.timeout(14_400)
ALL_SHARDS: Final = SHARDS | REJECTED
MOMENTS: Final = 6
"""How many moments of a run are taken without --full."""
DONE: Final = "done"
BETWEEN: Final = "between"
Syncs = Literal["everything", "files", "nothing"]
"""What a writer's fsync does: "files" forgets the folders."""


# ---- disks -----------------------------------------------------------------------------------------------------------
class Disk:
    """An image of a file system, and the folder where it is mounted."""

    def __init__(self, folder: Path, name: str) -> None:
        self.image, self.mounted = folder / f"{name}.img", folder / name
        self.mounted.mkdir(parents=True)

    def make(self) -> None:
        with self.image.open("xb") as file:
            file.truncate(32 * 2**20)
        # Nothing is initialised in the background later: whatever reaches the device, a writer has sent.
        options = ["-E", "lazy_itable_init=0,lazy_journal_init=0", "-J", "size=4", "-N", "2048", "-m", "0"]
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", *options, str(self.image))

    def mount(self) -> None:
        """Without ext4's own remedies for those who forget fsync: early commits, and blocks that are allocated at a rename."""
        _run("mount", "-o", "loop,noatime,noauto_da_alloc,commit=3600", str(self.image), str(self.mounted))

    def unmount(self) -> None:
        _run("umount", str(self.mounted))

    def copy(self, target: Path) -> None:
        """The image as it is. The kernel may write to the device meanwhile, by itself: then again, since no disk was ever so."""
        device = os.stat(self.mounted).st_dev
        sent = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        while True:
            before = _writes(sent)
            _copy(self.image, target)
            if before == _writes(sent) and before[1] == 0:
                return


def _writes(path: Path) -> tuple[int, int]:
    """Of a device: how many writes it has ended, and how many requests are under way."""
    fields = path.read_text().split()
    return int(fields[4]), int(fields[8])


def _copy(source: Path, target: Path) -> None:
    _run("cp", "--sparse=always", str(source), str(target))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


class Machine:
    """Disk a with registry and archive, disk b with inbox and dataset."""

    def __init__(self, folder: Path) -> None:
        self._disks = (Disk(folder, "a"), Disk(folder, "b"))
        self._folder, self._writers = folder, list[Writer]()
        a, b = (disk.mounted for disk in self._disks)
        self.registry, self.archive = str(a / "registry"), str(a / "archive")
        self.inbox, self.dataset = str(b / "inbox"), str(b / "dataset")

    @contextmanager
    def running(self, prepared: Path) -> Iterator[None]:
        """Mounted, with the disks as `prepared` left them, or empty ones, which are then kept there."""
        for disk in self._disks:
            kept = prepared / disk.image.name
            _copy(kept, disk.image) if kept.exists() else disk.make()
            disk.mount()
        try:
            yield
        finally:
            for writer in self._writers:
                writer.end()
            for disk in self._disks:
                disk.unmount()
                if not (kept := prepared / disk.image.name).exists():
                    prepared.mkdir(exist_ok=True)
                    disk.image.rename(kept)
                disk.image.unlink(missing_ok=True)

    @property
    def log(self) -> VersionLog:
        return VersionLog(open_store(self.registry), "model")

    def lose_power(self) -> None:
        """All writers are stopped. The disks are copied, the writers end, and the machine comes back with the copies."""
        copies = [disk.image.with_suffix(".copy") for disk in self._disks]
        for disk, copy in zip(self._disks, copies, strict=True):
            disk.copy(copy)
        for writer in self._writers:
            writer.end()
        for disk, copy in zip(self._disks, copies, strict=True):
            disk.unmount()  # what that writes, nobody will see
            copy.replace(disk.image)
            disk.mount()

    def start(
        self, run: Callable[..., None], *arguments: object, at: Sequence[str] = (END,), syncs: Syncs = "everything"
    ) -> "Writer":
        """A process that is stopped at each of these moments in turn. The end of a moment's name is enough."""
        report = self._folder / uuid.uuid4().hex
        writer = Writer(start_child(_write, run, arguments, at, syncs, report), report)
        self._writers.append(writer)
        return writer


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    start_server()
    return Machine(tmp_path / "machine")


# ---- writers ---------------------------------------------------------------------------------------------------------
@dataclass
class Stopped:
    """What a writer leaves word of when it stops itself."""

    moments: list[str] = field(default_factory=list)
    """Before which calls of a store and of fsync, and after which deletes, it could have been stopped; the last is the end."""
    stored: dict[str, bool] = field(default_factory=dict)
    """"URL key" of each object that it was told to be stored, and has not begun to delete."""


class Writer:
    """A child process that stops itself."""

    def __init__(self, process: BaseProcess, report: Path) -> None:
        self._process, self._report, self._stops = process, report, 0

    def stopped(self) -> Stopped:
        """Wait until it is."""
        report = _numbered(self._report, self._stops)
        wait_until(lambda: state_of(self._process) in ("Z", "") or self._is_at(report), seconds=DEADLINE, what="a stop")
        assert self._is_at(report), "the writer failed, or never met its moment; its traceback is above"
        return Stopped(**json.loads(report.read_text()))

    def _is_at(self, report: Path) -> bool:
        return report.exists() and state_of(self._process) == "T"

    def go_on(self) -> None:
        """To its next moment."""
        self._stops += 1
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def ended(self) -> Stopped:
        """Wait until it is at its moment, then end it."""
        stopped = self.stopped()
        self.end()
        return stopped

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _numbered(report: Path, stops: int) -> Path:
    return report.with_suffix(f".{stops}")


class _Stop:
    """A hook for all stores of a process, and what stands for `os.fsync` in it: stops the process at its moments."""

    def __init__(self, at: Sequence[str], syncs: Syncs, report: Path) -> None:
        self._at, self._syncs, self._report, self._stops = at, syncs, report, 0
        self._fsync, self._facts, self._lock = os.fsync, Stopped(), threading.Lock()  # several threads call stores
        self._seen: dict[str, int] = {}

    def __call__(self, call: Call) -> None:
        with self._lock:
            what = f"{call.url} {call.key}"
            if call.phase == "before":
                self._moment(call.name)
                if call.verb == "delete":
                    self._facts.stored.pop(what, None)
            else:
                if call.verb in ("write", "create", "replace"):
                    self._facts.stored[what] = True
                elif call.verb == "delete":
                    self._moment(f"{call.name} {DONE}")

    def fsync(self, fd: int) -> None:
        path = sub("[0-9a-f]{32}", "*", os.readlink(f"/proc/self/fd/{fd}"))
        with self._lock:
            self._seen[path] = self._seen.get(path, 0) + 1
            self._moment(f"fsync {path} {self._seen[path]}")
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        if self._syncs == "everything" or (self._syncs == "files" and not is_folder):
            self._fsync(fd)

    def end(self) -> None:
        with self._lock:
            self._moment(END)

    def _moment(self, name: str) -> None:
        self._facts.moments.append(name)
        if self._stops < len(self._at) and f" {name}".endswith(f" {self._at[self._stops]}"):
            _numbered(self._report, self._stops).write_text(json.dumps(vars(self._facts)))
            self._stops += 1
            os.kill(os.getpid(), signal.SIGSTOP)


def _write(run: Callable[..., None], arguments: tuple[Any, ...], at: Sequence[str], syncs: Syncs, report: Path) -> None:
    stop = _Stop(at, syncs, report)
    os.fsync = stop.fsync  # not the store but the operating system is what is disturbed, in a process of its own
    run(hooked(stop), *arguments)
    stop.end()


# ---- runs ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """A run, what it begins with, and how it must have ended."""

    prepare: Callable[[Machine], None]
    run: Callable[..., None]
    arguments: Callable[[Machine], tuple[object, ...]]
    check: Callable[[Machine], None]
    """Raises AssertionError if something is lost, or there twice."""


def _with_version_0(machine: Machine) -> None:
    fill(machine.dataset, DATASET)
    machine.start(train, machine.dataset, machine.registry, SPEC, BATCH).ended()


def _with_shards(machine: Machine) -> None:
    _with_version_0(machine)
    fill(machine.inbox, ALL_SHARDS)


def _with_history(machine: Machine) -> None:
    _with_shards(machine)
    machine.start(drain, machine.inbox, machine.registry, ONLINE).ended()


def _gated(machine: Machine) -> tuple[object, ...]:
    """Shards go to the archive or to quarantine; version 1 is refused and rolled back; the champion moves with the others."""
    gate = GateSettings(tolerance=0.0, recent_shards=2, refusals=1, after_refusals="rollback")
    settings = ONLINE.model_copy(update={"gate": gate, "after_commit": Archive(archive_to=machine.archive)})
    return machine.inbox, machine.registry, settings


def _check_trained(machine: Machine) -> None:
    audit(machine.log, [])
    assert all_aliases(machine.log) == {"champion": 0}


def _check_drained(machine: Machine) -> None:
    history = audit(machine.log, ALL_SHARDS.items())
    assert [version.manifest.rolled_back_to for version in history] == [None, None, 0, None, None, None]
    assert all_aliases(machine.log) == {"champion": 5}
    assert waiting(machine.inbox) == []
    archive = open_store(machine.archive)
    for key, data in SHARDS.items():
        assert archive.read(archive_keys(key, sha256(data))[0]) == data


def _check_deleted(machine: Machine) -> None:
    audit(machine.log, ALL_SHARDS.items())
    assert waiting(machine.inbox) == []


def _keep_house(stores: Stores, registry: str) -> None:
    """A rollback, the alias moved, and garbage collected."""
    rollback(stores, registry, "1")
    collect_garbage(stores, registry, 2)


def _check_kept(machine: Machine) -> None:
    log = machine.log
    audit(log, ALL_SHARDS.items())
    assert log.head().manifest.rolled_back_to == 1
    assert all_aliases(log) == {"champion": 1}
    for version in log.history(log.head(), 2):
        for blob in version.manifest.blobs.refs:
            log.read_blob(blob)


WORKS: Final = {
    "batch run": Work(
        lambda machine: fill(machine.dataset, DATASET),
        *(train, lambda machine: (machine.dataset, machine.registry, SPEC, BATCH), _check_trained),
    ),
    "online run": Work(_with_shards, drain, _gated, _check_drained),
    "rollback, promotion, collection": Work(
        _with_history, _keep_house, lambda machine: (machine.registry,), _check_kept
    ),
}
DELETES: Final = Work(_with_shards, drain, lambda machine: (machine.inbox, machine.registry, ONLINE), _check_deleted)
"""An online run that removes what it has trained on; no alias moves."""


def come_back(machine: Machine, work: Work, *writers: Writer) -> tuple[str, str]:
    """Power is lost where the writers are. What they were told is there, and the run ends as it must. Returns the bits."""
    stored = {what for writer in writers for what in writer.stopped().stored}
    machine.lose_power()
    lost = [what for what in stored if not _exists(*what.split(" ", 1))]
    assert not lost, f"the disk lacks what was said to be stored: {sorted(lost)}"
    machine.start(work.run, *work.arguments(machine)).ended()
    work.check(machine)
    return bits(machine.log)


def _exists(url: str, key: str) -> bool:
    try:
        open_store(url).stat(key)
    except NotFound:
        return False
    return True


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WORKS)
def test_power_is_lost_at_any_moment_and_the_run_ends_with_the_same_bits(
    name: str, machine: Machine, tmp_path: Path, full: bool, record_property: Callable[[str, object], None]
) -> None:
    work, prepared = WORKS[name], tmp_path / "prepared"
    with machine.running(prepared):
        work.prepare(machine)
    with machine.running(prepared):
        moments = machine.start(work.run, *work.arguments(machine)).ended().moments
        work.check(machine)
        undisturbed = bits(machine.log)
    chosen = sample(moments, None if full else MOMENTS)
    for moment in chosen:
        with machine.running(prepared):
            writer = machine.start(work.run, *work.arguments(machine), at=[moment])
            assert come_back(machine, work, writer) == undisturbed, moment
    record_property("power lost at", f"{len(chosen)} of {len(moments)} moments")
    print(f"{name}: power lost at {len(chosen)} of {len(moments)} moments")


class _Hasty(VersionLog):
    """The control: believes that what it has found is durable."""

    def make_durable(self, version: Version) -> None:
        pass


def _open_and_step(stores: Stores, inbox: str, registry: str, log: type[VersionLog]) -> None:
    """A run that waits between its opening, when it has asked the stores what they promise, and its first step."""
    run = online.OnlineRun(inbox, registry, "model", ONLINE, stores)
    run.places.log = log(run.places.log.store, run.places.log.model)
    with suppress(NotFound):
        stores(inbox).stat(BETWEEN)
    online.step(run)


@pytest.mark.parametrize("log", [VersionLog, _Hasty])
def test_a_version_that_another_run_found_is_durable_before_its_debts_are_paid(
    log: type[VersionLog], machine: Machine, tmp_path: Path
) -> None:
    """One run is stopped between version 1 and the sync of its folder; another finds that version and removes a shard.

    The other one has been opened before, so that it writes nothing to the registry any more: any fsync there commits the journal.
    """
    prepared = tmp_path / "prepared"
    with machine.running(prepared):
        DELETES.prepare(machine)
    with machine.running(prepared):
        moments = machine.start(DELETES.run, *DELETES.arguments(machine)).ended().moments
    created = next(at for at, name in enumerate(moments) if name.endswith("create model/log/00000001.json 1"))
    not_durable = next(name for name in moments[created:] if name.startswith(f"fsync {machine.registry}/model/log "))
    with machine.running(prepared):
        removed = f"delete {min(SHARDS)} 1 {DONE}"
        other = machine.start(_open_and_step, machine.inbox, machine.registry, log, at=[f"stat {BETWEEN} 1", removed])
        other.stopped()
        one = machine.start(DELETES.run, *DELETES.arguments(machine), at=[not_durable])
        one.stopped()
        assert machine.log.head().number == 1
        other.go_on()
        with nullcontext() if log is VersionLog else pytest.raises(AssertionError):
            come_back(machine, DELETES, one, other)


# ---- controls: without fsync, such a copy does lose something --------------------------------------------------------
@pytest.mark.parametrize("syncs", ["nothing", "files"])
def test_a_writer_that_does_not_wait_for_the_disk_is_caught(syncs: Syncs, machine: Machine, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    with machine.running(prepared):
        DELETES.prepare(machine)
    with machine.running(prepared):
        writer = machine.start(DELETES.run, *DELETES.arguments(machine), syncs=syncs)
        writer.stopped()
        DELETES.check(machine)  # as long as the power is there, all is well
        with pytest.raises(AssertionError, match=r"said to be stored: .*model/log/\d{8}\.json"):
            come_back(machine, DELETES, writer)

"""Files of a local store: their identity, durable new ones, folders' locks, and deletes that take only what was meant.

Names that start with `OWN` are Tidemill's: unfinished files, and folders of files that are being deleted.
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final

from tidemill.storage.errors import UnsupportedStore

logger = logging.getLogger("tidemill.storage")

OWN: Final = ".tidemill-"
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)

_TEMPORARY: Final = f"{OWN}tmp-"
_DELETING: Final = f"{OWN}delete-"
_STALE_SECONDS: Final = 24 * 3600
_TICK_NS: Final = 10_000_000
"""File times come from a clock of the kernel that ticks every 1 to 10 ms."""


def lasting_etag_of(found: os.stat_result) -> str:
    """Survives a rename, `chmod` and hard links."""
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def etag_of(found: os.stat_result) -> str:
    return f"{lasting_etag_of(found)}-{found.st_ctime_ns:x}"


def moment(seconds: float) -> datetime:
    """As near to it as a datetime comes: file systems know times before year 1 and after 9999."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        day = timedelta(days=1)  # so that no time zone leads beyond
        return datetime.min.replace(tzinfo=UTC) + day if seconds < 0 else datetime.max.replace(tzinfo=UTC) - day


def until_proven(found: os.stat_result) -> float:
    """Seconds until a change of the file must show in its change time; 0 if that is so already.

    How coarse the file system's clock is, the zeros at the end of the time tell: nine of them, and it counts whole seconds.
    """
    changed, step = found.st_ctime_ns, 1
    while step < 10**9 and changed % (10 * step) == 0:
        step *= 10
    age = time.time_ns() - changed
    # A change time in the future is of a clock that was set back since, and will not repeat soon
    return (step + _TICK_NS - age) / 10**9 if -_TICK_NS <= age < step + _TICK_NS else 0.0


def open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or a named pipe would wait for its writer


@contextmanager
def temporary_file(
    folder: str, data: bytes | Iterable[memoryview], mode: int | None = None
) -> Iterator[tuple[str, int]]:
    """A durable file with these bytes under a name of its own, open; it is gone at the end if it was not renamed."""
    path = f"{folder}/{_TEMPORARY}{uuid.uuid4().hex}"
    permissions = 0o666 if mode is None else (mode | 0o600) & 0o666
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, permissions)
    try:
        with open(fd, "wb", closefd=False) as file:
            for piece in (data,) if isinstance(data, bytes | bytearray | memoryview) else data:
                file.write(piece)
        now = time.time_ns()
        # The kernel's own time stamps repeat for some milliseconds, inodes are reused at once: etags would repeat
        os.utime(fd, ns=(now, now))
        os.fsync(fd)
        yield path, fd
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(path)


def link(source: str, path: str) -> None:
    try:
        os.link(source, path)
    except FileExistsError:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path) from None
        raise
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise UnsupportedStore(f"{path}: this file system has no hard links, which put-if-absent needs") from error
        raise


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Exclude Tidemill's other processes and threads from changing names in `folder`. The lock dies with its holder.

    The folder itself is locked: a file would need room on the disk, and write permission.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def park_and_unlink(path: str, etag: str, digest: str | None) -> bool:
    """Under the lock, delete the file if it has this etag, and this sha256 if one is given; False if not: it stays."""
    folder, name = os.path.split(path)
    # A folder rather than a longer name, which might become too long
    parked = f"{folder}/{_DELETING}{etag}.{digest or ''}.{uuid.uuid4().hex}"
    try:
        os.mkdir(parked)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return _unlink_in_place(path, etag, digest)
    try:
        os.rename(path, f"{parked}/{name}")
    except OSError as error:
        os.rmdir(parked)
        if error.errno not in NO_ROOM:
            raise
        return _unlink_in_place(path, etag, digest)
    return _finish_delete(parked)


def _unlink_in_place(path: str, etag: str, digest: str | None) -> bool:
    """As `park_and_unlink`, but a file that another program puts there between comparing and unlinking is lost."""
    if digest is not None and _sha256(path) != digest:
        return False
    if etag_of(os.stat(path)) != etag:
        return False
    os.unlink(path)
    return True


def _finish_delete(parked: str) -> bool:
    """Under the lock, finish a delete from any point where it was left. False if the file was another and went back."""
    folder, own_name = os.path.split(parked)
    etag, digest, _ = f"{own_name.removeprefix(_DELETING)}..".split(".", 2)
    deleted = True
    for name in os.listdir(parked):
        file = f"{parked}/{name}"
        deleted = _is_meant(file, folder, etag, digest)
        if not deleted:
            _put_back(file, f"{folder}/{name}")
        with suppress(FileNotFoundError):
            os.unlink(file)
    os.rmdir(parked)
    return deleted


def _put_back(file: str, path: str) -> None:
    """Give the file its old name too, unless a still newer object has it."""
    try:
        os.link(file, path, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError as error:
        # Linux may forbid hard links to files of others (fs.protected_hardlinks); some file systems have none
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, *NO_ROOM):
            raise
        if not os.path.lexists(path):
            os.rename(file, path)


def _is_meant(parked: str, folder: str, etag: str, digest: str) -> bool:
    """Whether the file, which was moved aside from `folder`, is the one with this etag and sha256 (empty: whatever it is)."""
    try:
        if os.path.islink(parked):  # a relative link leads on from where it was; what it names was not moved
            parked = os.path.join(folder, os.readlink(parked))
            same = etag_of(os.stat(parked)) == etag
        else:  # moving it has set its change time, which was compared before
            same = lasting_etag_of(os.stat(parked)) == etag.rpartition("-")[0]
        return same and (not digest or _sha256(parked) == digest)
    except OSError:  # it cannot be read any more, or its link leads nowhere
        return False


def _sha256(path: str) -> str:
    with open(path, "rb", opener=open_without_waiting) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean_up(entry: os.DirEntry[str]) -> None:
    """Finish a crashed process's delete, or remove its unfinished file once no writer can be that slow."""
    try:
        if entry.name.startswith(_DELETING):
            with locked(os.path.dirname(entry.path)):  # a delete that is still alive holds it
                _finish_delete(entry.path)
        elif entry.name.startswith(_TEMPORARY) and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
            os.unlink(entry.path)
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        logger.warning("cannot clean up after a crashed process: %s", error)


def make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
        fsync_folder(parent)


def file_system_of(folder: str) -> tuple[str, int] | None:
    """What tells the file system of a folder from others; None while there is no such folder."""
    try:
        return "file", os.stat(folder).st_dev
    except OSError:
        return None


def fsync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""A folder on a local disk (or a network file system with POSIX semantics).

Every change is one atomic system call: `os.link` for create, `os.replace` for write and replace, `os.rename` for
delete. Bytes are fsynced before that call and the folder after it, so what a verb returned survives a power cut.

Names that start with `.tidemill-` are this module's own: unfinished files, deletes in progress, locks. They are never
listed.
"""

import errno
import fcntl
import logging
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StoreFull,
    StoreNotFound,
    Unavailable,
    UnsupportedStore,
)
from tidemill.storage.store import ObjectInfo, Store

log = logging.getLogger("tidemill.storage")

_OWN = ".tidemill-"
_TEMPORARY = ".tidemill-tmp-"
_DELETING = ".tidemill-delete-"
_LOCK = ".tidemill-lock"

_STALE_SECONDS = 24 * 3600


class LocalStore(Store):
    """A folder; keys are paths below it. `write` and `create` make it, and folders below it, as they need them.

    An etag is (inode, modification time, size). Tidemill's own writes set a modification time in nanoseconds, so
    theirs never repeat; of other programs, one that rewrites a file in place keeping size and time would go unseen.

    Producers should write under a name that starts with `.` and rename: a file written in place is listed half-written.
    Symbolic links to files are followed, links to folders are not listed, and no key leads out of the root.

    Raises beyond the contract of `Store`: InvalidKey for keys that no file can have, or where a folder stands in the
    way; StoreFull; UnsupportedStore for file systems without hard links.
    """

    concurrency = 4

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)
        self._warned = False
        self.url = f"file://{self._root}"

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yields while it scans. Also finishes what crashed processes left behind, as far as this one may."""
        if not os.path.isdir(self._root):
            raise StoreNotFound(f"{self.url}: there is no such folder. Check the URL")
        start, slash, _ = prefix.rpartition("/")
        if slash and _problem(start):
            return  # no key starts like that
        folders = [start + slash]
        while folders:
            folder = folders.pop()
            with (
                self._errors(folder, obstacle=NotFound),
                suppress(FileNotFoundError, NotADirectoryError),  # the folder went since, or never was
                os.scandir(f"{self._root}/{folder}") as entries,
            ):
                for entry in entries:
                    key = folder + entry.name
                    if entry.name.startswith(_OWN):
                        _clean_up(entry)
                    elif not key.startswith(prefix):
                        continue
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(f"{key}/")
                    elif entry.is_file() and self._is_listable(key):
                        with suppress(FileNotFoundError):  # it went since
                            yield _info(key, entry.stat())

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._errors(key, obstacle=NotFound):
            return _info(key, self._stat(path, key))

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """If another program rewrites the file in place meanwhile: PreconditionFailed, or CorruptObject without `if_match`."""
        path = self._path(key)
        with self._errors(key, obstacle=NotFound), open(path, "rb", opener=_open_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise NotFound(f"{self.url}/{key} is no regular file")
            self._check(before, key, if_match)
            end = before.st_size if length is None else start + length
            if not 0 <= start <= end <= before.st_size:
                raise CorruptObject(f"{self.url}/{key} has {before.st_size} bytes, not bytes {start} to {end}")
            file.seek(start)
            data = file.read(end - start)
            after = os.fstat(file.fileno())
        self._check(after, key, if_match)
        if _etag(after) != _etag(before):
            raise CorruptObject(
                f"{self.url}/{key} changed while it was read: its producer should write elsewhere, then rename"
            )
        return data

    def write(self, key: str, data: bytes) -> ObjectInfo:
        path = self._path(key)
        folder = os.path.dirname(path)
        with self._errors(key, obstacle=InvalidKey):
            _make_folder(folder)
            # Without the lock, a `replace` that has just compared etags could overwrite this
            with _temporary(folder, data) as (temporary, info), _locked(folder):
                os.replace(temporary, path)
            _fsync_folder(folder)
        return _info(key, info)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Needs no lock: `os.link` itself tells the losers."""
        path = self._path(key)
        folder = os.path.dirname(path)
        with self._errors(key, obstacle=InvalidKey):
            _make_folder(folder)
            with _temporary(folder, data) as (temporary, info):
                _link(temporary, path)
            _fsync_folder(folder)
        return _info(key, info)

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        path = self._path(key)
        folder = os.path.dirname(path)
        with self._errors(key, obstacle=NotFound):
            self._check(self._stat(path, key), key, if_match)
            with _temporary(folder, data) as (temporary, info), _locked(folder):
                self._check(self._stat(path, key), key, if_match)
                os.replace(temporary, path)
            _fsync_folder(folder)
        return _info(key, info)

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        """With `if_match` the file is first moved aside, so that what is unlinked is what was compared.

        If a program that knows no locks put another file there since, that one is moved back. In the moment between,
        its key looks free; after a crash in that moment, the next listing moves it back.
        """
        path = self._path(key)
        folder = os.path.dirname(path)
        with self._errors(key, obstacle=NotFound):
            with _locked(folder):
                self._check(self._stat(path, key), key, if_match)
                if if_match is None:
                    os.unlink(path)
                elif not _park_and_unlink(path, if_match):
                    raise PreconditionFailed(f"{self.url}/{key} was replaced while being deleted; the new object stays")
            _fsync_folder(folder)

    def _path(self, key: str) -> str:
        problem = _problem(key)
        if problem:
            raise InvalidKey(f"{self.url}: the key {key!r} {problem}")
        folder = os.path.dirname(f"{self._root}/{key}")
        if "/" in key:  # a link to a folder may lead out
            root = os.path.realpath(self._root)
            if os.path.commonpath([root, os.path.realpath(folder)]) != root:
                raise InvalidKey(f"{self.url}: the key {key!r} leads out of the folder by a symbolic link")
        return f"{self._root}/{key}"

    def _is_listable(self, key: str) -> bool:
        problem = _problem(key)
        if problem and not self._warned:
            self._warned = True
            log.warning("%s: skipping the file %r, and others like it: the name %s", self.url, key, problem)
        return problem is None

    def _stat(self, path: str, key: str) -> os.stat_result:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise NotFound(f"{self.url}/{key} is no regular file")
        return found

    def _check(self, found: os.stat_result, key: str, if_match: str | None) -> None:
        if if_match is not None and if_match != _etag(found):
            raise PreconditionFailed(f"{self.url}/{key} has etag {_etag(found)}, not {if_match}")

    @contextmanager
    def _errors(self, key: str, *, obstacle: type[StorageError]) -> Iterator[None]:
        """Translate OSError. `obstacle` is what a folder in place of a file means to this verb, or the reverse."""
        try:
            yield
        except OSError as error:
            raise self._translated(error, key, obstacle) from error

    def _translated(self, error: OSError, key: str, obstacle: type[StorageError]) -> StorageError:
        where = f"{self.url}/{key}"
        if isinstance(error, FileNotFoundError) and obstacle is NotFound:
            if os.path.isdir(self._root):
                return NotFound(f"{where} does not exist")
            return StoreNotFound(f"{self.url}: there is no such folder. Check the URL")
        if isinstance(error, IsADirectoryError | NotADirectoryError):
            return obstacle(f"{where}: an object and a folder would need the same name")
        if isinstance(error, FileExistsError):
            return AlreadyExists(f"{where} exists")
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return PermissionDenied(
                f"{where}: {error.strerror}: check the owner and mode of {error.filename or self._root}"
            )
        if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP):
            return InvalidKey(f"{where}: {error.strerror}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return StoreFull(f"{where}: {error.strerror}: nothing was written. Make room and start again")
        return Unavailable(f"{where}: {error}")


def _problem(key: str) -> str | None:
    """Why no file can have this key."""
    parts = key.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "has an empty, '.' or '..' segment"
    if any(part.startswith(_OWN) for part in parts):
        return f"has a segment that starts with {_OWN}, which is reserved"
    if "\0" in key:
        return "has a NUL"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is no valid Unicode"
    return None


def _etag(found: os.stat_result) -> str:
    """Survives a rename, unlike anything made from the change time."""
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found), datetime.fromtimestamp(found.st_mtime, UTC))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or a named pipe would wait for its writer


@contextmanager
def _temporary(folder: str, data: bytes) -> Iterator[tuple[str, os.stat_result]]:
    """A durable file with these bytes under a name of its own; it is gone at the end if it was not renamed."""
    path = f"{folder}/{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            now = time.time_ns()
            # The kernel's own time stamps repeat for some milliseconds, inodes are reused at once: etags would repeat
            os.utime(file.fileno(), ns=(now, now))
            os.fsync(file.fileno())
            info = os.fstat(file.fileno())
        yield path, info
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _link(source: str, path: str) -> None:
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
def _locked(folder: str) -> Iterator[None]:
    """Exclude Tidemill's other processes and threads from changing names in `folder`.

    The lock dies with its holder; its file stays, because a lock file that is deleted excludes nobody.
    """
    fd = os.open(f"{folder}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _park_and_unlink(path: str, etag: str) -> bool:
    """Under the lock, delete the file if it has this etag; False if it has another by now."""
    folder, name = os.path.split(path)
    # A folder rather than a longer name, which might become too long
    parked = f"{folder}/{_DELETING}{etag}-{uuid.uuid4().hex}"
    os.mkdir(parked)
    try:
        os.rename(path, f"{parked}/{name}")
    except OSError:
        os.rmdir(parked)
        raise
    return _settle(parked)


def _settle(parked: str) -> bool:
    """Under the lock, finish a delete from any point where it was left. False if the file was another and went back."""
    folder, own_name = os.path.split(parked)
    etag = own_name.removeprefix(_DELETING).rpartition("-")[0]
    deleted = True
    for name in os.listdir(parked):
        file = f"{parked}/{name}"
        # A relative link leads nowhere from here; it was compared before it was moved, and only the link goes
        deleted = os.path.islink(file) or _etag(os.stat(file)) == etag
        if not deleted:
            with suppress(FileExistsError):  # a still newer object is there
                os.link(file, f"{folder}/{name}")
        os.unlink(file)
    os.rmdir(parked)
    return deleted


def _clean_up(entry: os.DirEntry[str]) -> None:
    """Finish a crashed process's delete, or remove its unfinished file once no writer can be that slow."""
    try:
        if entry.name.startswith(_DELETING):
            with _locked(os.path.dirname(entry.path)):  # a delete that is still alive holds it
                _settle(entry.path)
        elif entry.name.startswith(_TEMPORARY) and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
            os.unlink(entry.path)
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        log.warning("cannot clean up after a crashed process: %s", error)


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
        _fsync_folder(parent)


def _fsync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

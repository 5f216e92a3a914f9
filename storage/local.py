"""A folder on a local disk (or a network file system with POSIX semantics).

Every change is one atomic system call: `os.link` for create, `os.replace` for write and replace, `os.rename` for
delete. Bytes are fsynced before that call and the folder after it, so what a verb returned survives a power cut.

Names that start with `.tidemill-` are this module's own: unfinished files and deletes in progress. They are never listed.
"""

import errno
import os
import stat
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

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
)
from tidemill.storage.files import (
    NO_ROOM,
    OWN,
    clean_up,
    etag_of,
    file_system_of,
    fsync_folder,
    lasting_etag_of,
    link,
    locked,
    make_folder,
    moment,
    open_without_waiting,
    park_and_unlink,
    temporary_file,
    until_proven,
)
from tidemill.storage.pieces import Pieces
from tidemill.storage.store import ObjectInfo, PassedOver, Store


class LocalStore(Store):
    """A folder; keys are paths below it. `write` and `create` make it, and folders below it, as they need them.

    An etag is (inode, modification time, size, change time). Any program can set the second and keep the third, and inodes are
    used again; the change time is the kernel's alone. It may repeat within a tick of the file system's clock (a whole second
    on some): a pinned `read` waits until that is over. A write through a memory map need not change any time, so `delete`
    can be asked to compare the bytes.

    Producers should write under a name that starts with `.` and rename: a file written in place is listed half-written.
    Symbolic links to files are followed, links to folders are not listed, and no key leads out of the root by a link to a
    folder.

    Raises beyond the contract of `Store`: InvalidKey for keys that no file can have, or where a folder stands in the
    way; StoreFull; UnsupportedStore for file systems without hard links.
    """

    concurrency = 4

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)
        self.url = f"file://{self._root}"

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    @property
    def keeper(self) -> Hashable:
        return file_system_of(self._root) or self.url

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        """Yields while it scans. Also finishes what crashed processes left behind, as far as this one may."""
        if not os.path.isdir(self._root):
            raise StoreNotFound(f"{self.url}: there is no such folder. Check the URL")
        start, slash, _ = prefix.rpartition("/")
        if slash and _problem(start):
            return  # no key starts like that
        root = os.path.realpath(self._root) if inside else None
        folders = [start + slash]
        while folders:
            folder = folders.pop()
            try:
                entries = os.scandir(f"{self._root}/{folder}")
            except (FileNotFoundError, NotADirectoryError):  # the folder went since, or never was
                continue
            except OSError as error:
                if passed_over is None or not folder:
                    raise _translated(error, self._root, folder, NotFound) from error
                passed_over(folder, f"the folder cannot be listed: {error.strerror}")
                continue
            with _errors(self._root, folder, NotFound), entries:
                for entry in entries:
                    key = folder + entry.name
                    if entry.name.startswith(OWN):
                        clean_up(entry)
                    elif not key.startswith(prefix):
                        continue
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(f"{key}/")
                    elif key > after:
                        try:
                            info = _listed(entry, key, root)
                        except FileNotFoundError:  # it went since
                            continue
                        except _Odd as odd:
                            (passed_over or self._warn_of)(key, str(odd))
                        else:
                            yield info

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with _errors(self._root, key, NotFound):
            return _info(key, self._stat(path, key))

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """If another program rewrites the file in place meanwhile: PreconditionFailed, or CorruptObject without `if_match`."""
        path = self._path(key)
        with _errors(self._root, key, NotFound), open(path, "rb", opener=open_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise NotFound(f"{self.url}/{key} is no regular file")
            self._check(before, key, if_match)
            if if_match is not None and (seconds := until_proven(before)):
                time.sleep(seconds)
                before = os.fstat(file.fileno())
                self._check(before, key, if_match)
            end = before.st_size if length is None else start + length
            if not 0 <= start <= end <= before.st_size:
                raise CorruptObject(f"{self.url}/{key} has {before.st_size} bytes, not bytes {start} to {end}")
            file.seek(start)
            data = file.read(end - start)
            after = os.fstat(file.fileno())
        self._check(after, key, if_match)
        if lasting_etag_of(after) != lasting_etag_of(
            before
        ):  # the change time is new too if `write` has just replaced the file
            raise CorruptObject(
                f"{self.url}/{key} changed while it was read: its producer should write elsewhere, then rename"
            )
        return data

    def mode(self, key: str) -> int:
        path = self._path(key)
        with _errors(self._root, key, NotFound):
            return stat.S_IMODE(self._stat(path, key).st_mode)

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        """One file, written piece by piece before it gets its name."""
        return self.write(key, data)

    def write(self, key: str, data: bytes | Pieces, *, mode: int | None = None) -> ObjectInfo:
        path = self._path(key)
        folder = os.path.dirname(path)
        with _errors(self._root, key, InvalidKey):
            make_folder(folder)
            # Without the lock, a `replace` that has just compared etags could overwrite this
            with temporary_file(folder, data, mode) as (temporary, fd), locked(folder):
                os.replace(temporary, path)
                found = os.fstat(fd)
            fsync_folder(folder)
        return _info(key, found)

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """Needs no lock: `os.link` itself tells the losers."""
        path = self._path(key)
        folder = os.path.dirname(path)
        with _errors(self._root, key, InvalidKey):
            make_folder(folder)
            with temporary_file(folder, data, mode) as (temporary, fd):
                link(temporary, path)
                os.unlink(temporary)  # which sets the change time
                found = os.fstat(fd)
            fsync_folder(folder)
        return _info(key, found)

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        path = self._path(key)
        folder = os.path.dirname(path)
        with _errors(self._root, key, NotFound):
            self._check(self._stat(path, key), key, if_match)
            with temporary_file(folder, data) as (temporary, fd), locked(folder):
                self._check(self._stat(path, key), key, if_match)
                os.replace(temporary, path)
                found = os.fstat(fd)
            fsync_folder(folder)
        return _info(key, found)

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        """With `if_match` the file is first moved aside, so that what is unlinked is what was compared.

        If a program that knows no locks put another file there since, that one is moved back. In the moment between,
        its key looks free; after a crash in that moment, the next listing moves it back. On a disk too full to move it
        aside, the file is compared and unlinked where it is.
        """
        path = self._path(key)
        folder = os.path.dirname(path)
        with _errors(self._root, key, NotFound):
            with locked(folder):
                self._check(self._stat(path, key), key, if_match)
                if if_match is None:
                    os.unlink(path)
                elif not park_and_unlink(path, if_match, sha256):
                    raise PreconditionFailed(
                        f"{self.url}/{key} was replaced while being deleted, or its bytes are not those that its etag stood "
                        "for; the new object stays"
                    )
            fsync_folder(folder)

    def make_durable(self, key: str) -> None:
        """Fsyncs the object's folder and those above it: their maker may have died before it did."""
        path = self._path(key)
        with _errors(self._root, key, NotFound):
            self._stat(path, key)
            folder = os.path.dirname(path)
            while len(folder) > len(self._root):
                fsync_folder(folder)
                folder = os.path.dirname(folder)
            fsync_folder(self._root)

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

    def _stat(self, path: str, key: str) -> os.stat_result:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise NotFound(f"{self.url}/{key} is no regular file")
        return found

    def _check(self, found: os.stat_result, key: str, if_match: str | None) -> None:
        if if_match is not None and if_match != etag_of(found):
            raise PreconditionFailed(f"{self.url}/{key} has etag {etag_of(found)}, not {if_match}")


@contextmanager
def _errors(root: str, key: str, obstacle: type[StorageError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _translated(error, root, key, obstacle) from error


def _translated(error: OSError, root: str, key: str, obstacle: type[StorageError]) -> StorageError:
    """What to raise. `obstacle` is what a folder in place of a file means to the verb, or the reverse."""
    url = f"file://{root}"
    where = f"{url}/{key}"
    if isinstance(error, FileNotFoundError) and obstacle is NotFound:
        if os.path.isdir(root):
            return NotFound(f"{where} does not exist")
        return StoreNotFound(f"{url}: there is no such folder. Check the URL")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return obstacle(f"{where}: an object and a folder would need the same name")
    if isinstance(error, FileExistsError):
        return AlreadyExists(f"{where} exists")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return PermissionDenied(f"{where}: {error.strerror}: check the owner and mode of {error.filename or root}")
    if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP):
        return InvalidKey(f"{where}: {error.strerror}")
    if error.errno in (*NO_ROOM, errno.EFBIG):
        return StoreFull(f"{where}: {error.strerror}: nothing was written. Make room and start again")
    return Unavailable(f"{where}: {error}")


def _problem(key: str) -> str | None:
    """Why no file can have this key."""
    parts = key.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "has an empty, '.' or '..' segment"
    if any(part.startswith(OWN) for part in parts):
        return f"has a segment that starts with {OWN}, which is reserved"
    if "\0" in key:
        return "has a NUL"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is no valid Unicode"
    return None


class _Odd(Exception):
    """Why an entry of a folder is no object."""


def _listed(entry: os.DirEntry[str], key: str, root: str | None) -> ObjectInfo:
    """What a listing says of an entry that is no folder. `root`: where a link must lead, if that matters.

    Raises:
        FileNotFoundError: it has gone.
        _Odd: it is no object.
    """
    if problem := _problem(key):
        raise _Odd(f"the name {problem}")
    try:
        found = entry.stat()
    except FileNotFoundError:
        if entry.is_symlink() and os.path.lexists(entry.path):
            raise _Odd("a symbolic link that leads nowhere") from None
        raise
    except OSError as error:  # a link to itself, through a file, or where this process may not go
        raise _Odd(f"it cannot be looked at: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise _Odd("a symbolic link to what is no file" if entry.is_symlink() else "it is no regular file")
    if root is not None and entry.is_symlink() and os.path.commonpath([root, os.path.realpath(entry.path)]) != root:
        raise _Odd("a symbolic link that leads out of the folder, which is not followed")
    return _info(key, found)


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, etag_of(found), moment(found.st_mtime), lasting_etag_of(found))

"""A small file system of folders in which names that differ in case alone are one name, as on macOS, Windows and FAT.

It speaks the kernel's FUSE protocol (linux/fuse.h, version 7.31) itself, because few kernels have one of their own to mount: ext4
needs CONFIG_UNICODE. Root only. It holds folders and nothing else.
"""

import ctypes
import errno
import os
import stat
import struct
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_IN: Final = struct.Struct("<IIQQIIIHH")
_OUT: Final = struct.Struct("<IiQ")
_ATTRIBUTES: Final = struct.Struct("<6Q10I")
_ROOT: Final = 1
_LOOKUP, _FORGET, _GETATTR, _MKDIR, _STATFS, _INIT = 1, 2, 3, 9, 17, 26
_OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = 27, 28, 29, 36, 38, 42
_MNT_DETACH: Final = 2


def _folded(name: bytes) -> str:
    return unicodedata.normalize("NFC", os.fsdecode(name)).casefold()


class _Folders:
    """Folders by their numbers, and what stands in each."""

    def __init__(self) -> None:
        self._held: dict[int, dict[str, tuple[bytes, int]]] = {_ROOT: {}}
        """Number of a folder -> folded name -> (name as it was made, number)."""

    def answer(self, opcode: int, number: int, body: bytes) -> bytes | int:
        """What the kernel is told; an errno if it is an error."""
        if opcode == _INIT:
            return struct.pack("<4I2H2I2H3I", 7, 31, 0, 0, 1, 1, 4096, 1, 0, 0, 0, 0, 0).ljust(64, b"\0")
        if opcode == _LOOKUP:
            found = self._held[number].get(_folded(body.rstrip(b"\0")))
            return errno.ENOENT if found is None else self._entry(found[1])
        if opcode == _MKDIR:
            name = body[8:].rstrip(b"\0")
            if _folded(name) in self._held[number]:
                return errno.EEXIST
            made = len(self._held) + _ROOT
            self._held[made] = {}
            self._held[number][_folded(name)] = (name, made)
            return self._entry(made)
        if opcode == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(number)
        if opcode == _OPENDIR:
            return bytes(16)
        if opcode == _READDIR:
            return self._listed(number, *struct.unpack_from("<QI", body, 8))
        return {_STATFS: bytes(80), _RELEASEDIR: b""}.get(opcode, errno.ENOSYS)

    def _entry(self, number: int) -> bytes:
        return struct.pack("<4Q2I", number, 0, 0, 0, 0, 0) + self._attributes(number)

    def _attributes(self, number: int) -> bytes:
        return _ATTRIBUTES.pack(number, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)

    def _listed(self, number: int, offset: int, size: int) -> bytes:
        found = b""
        for at, (name, below) in list(enumerate(self._held[number].values(), start=1))[offset:]:
            entry = struct.pack("<QQII", below, at, len(name), stat.S_IFDIR >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def _serve(device: int) -> None:
    folders = _Folders()
    with suppress(OSError):  # unmounted
        while True:
            request = os.read(device, 2**17)
            length, opcode, unique, number, *_ = _IN.unpack_from(request)
            if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue  # nobody waits for an answer
            answer = folders.answer(opcode, number, request[_IN.size : length])
            error, body = (answer, b"") if isinstance(answer, int) else (0, answer)
            os.write(device, _OUT.pack(_OUT.size + len(body), -error, unique) + body)
            if opcode == _DESTROY:
                return


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """While the context is open, this file system is mounted at the folder.

    Raises:
        OSError: it may not be mounted, or the kernel has no FUSE.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
        if libc.mount(b"case-blind", os.fsencode(folder), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        server = threading.Thread(target=_serve, args=(device,), daemon=True)
        server.start()
        try:
            yield
        finally:
            libc.umount2(os.fsencode(folder), _MNT_DETACH)
            server.join(10)
    finally:
        os.close(device)

"""Local stores that break one promise each, for whoever is to find that out; other processes make them too."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from tidemill.storage.errors import AlreadyExists, NotFound, PermissionDenied, StorageError
from tidemill.storage.local import LocalStore
from tidemill.storage.store import ObjectInfo, PassedOver, Store

Opener = Callable[[str], Store]


class Local(LocalStore):
    def __init__(self, url: str) -> None:
        super().__init__(urlsplit(url).path or url)


class ChecksThenWrites(Local):
    """As versitygw on POSIX: put-if-absent and compare-and-swap look first, and write then."""

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        try:
            self.stat(key)
        except NotFound:
            return self.write(key, data)
        raise AlreadyExists(f"{key} exists")

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        self.read(key, if_match=if_match)
        return self.write(key, data)


class DeletesAnyway(Local):
    """As MinIO."""

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        super().delete(key)


class NeverDeletes(Local):
    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        raise PermissionDenied("no deletes here")


class RemembersListings(Local):
    """A cache before the store: a listing may be a second old."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._listings: dict[str, tuple[float, list[ObjectInfo]]] = {}

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        found = self._listings.get(prefix)
        if found is None or prefix != "seen/" or time.monotonic() - found[0] > 1.0:
            found = self._listings[prefix] = time.monotonic(), [*super().list(prefix, after=after)]
        yield from found[1]


class ListsOnePage(Local):
    """Forgets to ask for the second page."""

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        yield from sorted(super().list(prefix, after=after), key=lambda info: info.key)[:20]


class WritesInPlace(Local):
    """As a program that opens the file and writes: a reader sees a part of each."""

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        path = Path(self._root, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            for start in range(0, len(data), 2**16):
                file.write(data[start : start + 2**16])
                file.flush()
                if len(data) == 2**20:
                    time.sleep(0.001)
            file.truncate()
        return self.stat(key)

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        if if_match is not None:
            return super().read(key, if_match=if_match, start=start, length=length)
        self.stat(key)
        return Path(self._root, key).read_bytes()


class IgnoresPins(Local):
    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return super().read(key, start=start, length=length)


class LimitsSizes(Local):
    """A proxy with a limit."""

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        if len(data) > 2**20:
            raise StorageError(f"{key}: the store refused put_object: 413 (413): Request Entity Too Large")
        return super().write(key, data)


class TrimsKeys(Local):
    """Takes ` a` for `a`."""

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        return super().create("/".join(part.strip() for part in key.split("/")), data)


class LivesTomorrow(Local):
    def stat(self, key: str) -> ObjectInfo:
        found = super().stat(key)
        later: datetime = found.last_modified + timedelta(days=1)
        return ObjectInfo(key, found.size, found.etag, later, found.lasting_etag)


class HasOneEtag(Local):
    """Etags of the size alone."""

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        found = super().write(key, data)
        return ObjectInfo(key, found.size, f"{found.size}", found.last_modified)


class EndsItself(Local):
    """The process that makes the seventh object of a race dies."""

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        if key == "create/1":
            os._exit(3)
        return super().create(key, data)

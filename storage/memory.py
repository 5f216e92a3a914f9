"""A store in this process's memory, for tests and examples.

Stores of one name share their objects, as a bucket would.
"""

import hashlib
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tidemill.storage.errors import AlreadyExists, CorruptObject, InvalidKey, NotFound, PreconditionFailed
from tidemill.storage.store import ObjectInfo, PassedOver, Store


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    etag: str
    last_modified: datetime

    def info(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.data), self.etag, self.last_modified)


@dataclass(frozen=True, slots=True)
class _Bucket:
    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, _Object] = field(default_factory=dict)


_buckets: dict[str, _Bucket] = {}
_buckets_lock = threading.Lock()


class MemoryStore(Store):
    """`memory://name/prefix`: every verb is atomic; nothing outlives the process.

    An etag is the MD5 of the bytes, as on S3: equal bytes have equal etags, whenever they were written. A name always
    exists, so `StoreNotFound` is never raised. Any key but the empty one is allowed.
    """

    def __init__(self, name: str, prefix: str = "") -> None:
        self._root = f"{prefix}/" if prefix else ""
        self.url = f"memory://{name}/{prefix}".rstrip("/")
        self._name = name
        with _buckets_lock:
            self._bucket = _buckets.setdefault(name, _Bucket())

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"

    @property
    def keeper(self) -> Hashable:
        """All that shares its objects."""
        return "memory", self._name

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        start = self._root + prefix
        with self._bucket.lock:
            found = [(key, obj) for key, obj in self._bucket.objects.items() if key.startswith(start)]
        for full_key, obj in found:
            if (key := full_key.removeprefix(self._root)) > after:
                yield obj.info(key)

    def stat(self, key: str) -> ObjectInfo:
        with self._bucket.lock:
            return self._get(key).info(key)

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        with self._bucket.lock:
            obj = self._get(key, if_match)
        end = len(obj.data) if length is None else start + length
        if not 0 <= start <= end <= len(obj.data):
            raise CorruptObject(f"{self.url}/{key} has {len(obj.data)} bytes, not bytes {start} to {end}")
        return obj.data[start:end]

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        with self._bucket.lock:
            return self._put(key, data)

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        with self._bucket.lock:
            if self._root + key in self._bucket.objects:
                raise AlreadyExists(f"{self.url}/{key} exists")
            return self._put(key, data)

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        with self._bucket.lock:
            self._get(key, if_match)
            return self._put(key, data)

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        with self._bucket.lock:
            self._get(key, if_match)
            del self._bucket.objects[self._root + key]

    def _get(self, key: str, if_match: str | None = None) -> _Object:
        obj = self._bucket.objects.get(self._root + key)
        if obj is None:
            raise NotFound(f"{self.url}/{key} does not exist")
        if if_match is not None and if_match != obj.etag:
            raise PreconditionFailed(f"{self.url}/{key} has etag {obj.etag}, not {if_match}")
        return obj

    def _put(self, key: str, data: bytes) -> ObjectInfo:
        if not key:
            raise InvalidKey(f"{self.url}: an object needs a name, not the empty key")
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        # bytes(): the caller may go on writing into a bytearray
        obj = self._bucket.objects[self._root + key] = _Object(bytes(data), etag, datetime.now(UTC))
        return obj.info(key)

"""The verbs of an object store, one function each, and what every backend must promise of them.

Certified by `tests/storage/test_conformance.py`, which runs the same bodies over every backend.

Keys are exact strings relative to the store's root, `/`-separated, never normalised. An etag is opaque: equal etags
mean equal objects, and no etag is reused for other bytes at the same key.

Transient failures are retried inside the verbs (see each backend); `Unavailable` means the retries ran out. After a
lost answer a verb may have been applied: `create` and `replace` can then lose against their own write, and `delete`
can find nothing. Callers that must know read back (`tidemill.storage.log` does).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing says of one object."""

    key: str
    size: int
    """Bytes."""
    etag: str
    last_modified: datetime
    """Timezone-aware, by the store's clock; S3 gives whole seconds or milliseconds."""


class Store(ABC):
    """A prefix of an object store, or a local folder. Threads may share an instance; a forked process must open its own."""

    url: str
    """Canonical URL of the root, without a trailing slash and without credentials."""

    conditional_delete: bool = True
    """Whether the server compares etags on delete. `probe.py` clears it where the server ignores them; then `delete`
    compares by itself, and an object put between its two requests is lost."""

    concurrency: int = 1
    """How many calls are worth having under way at once. 1: a call returns sooner than another thread could take it over."""

    readers: int = 1
    """How many row groups of Parquet files are worth reading at once. 1: reading is as fast as decoding, if not faster."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix` (plain string prefix, all depths), in no stated order.

        Consistent for objects that exist from start to end of the call. Half-written objects of this API are never
        shown, nor are keys that the other verbs would refuse (one warning names the first). Errors come with the
        first item.

        Raises:
            StoreNotFound: the bucket or root folder does not exist.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """What is at `key` now.

        Raises:
            NotFound: nothing is there.
        """

    @abstractmethod
    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """All bytes of one object from `start`, or exactly `length` of them: never torn between two writes.

        Raises:
            NotFound: nothing is there.
            PreconditionFailed: `if_match` is given and the object's etag is another.
            CorruptObject: the range lies outside of the object, or the body stayed short after retries.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Put an object, replacing what is there. Atomic: a reader sees all of the old or all of the new bytes.

        Durable when it returns.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Put an object only if nothing is there. Of any number of concurrent creators exactly one wins. Durable.

        Raises:
            AlreadyExists: an object is there (after a lost answer it may be our own: compare the bytes).
        """

    @abstractmethod
    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        """Put an object only over the one with this etag (compare-and-swap).

        Local: atomic among Tidemill's processes, through a lock that dies with its holder.

        Raises:
            PreconditionFailed: the object is another (after a lost answer it may be our own: compare the bytes).
            NotFound: nothing is there.
        """

    @abstractmethod
    def delete(self, key: str, *, if_match: str | None = None) -> None:
        """Remove an object, or only the one with this etag.

        Raises:
            NotFound: nothing is there (after a lost answer: it may have been this call).
            PreconditionFailed: `if_match` is given and the object's etag is another; the object stays.
            PermissionDenied: not allowed; the object stays.
        """

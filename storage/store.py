"""The verbs of an object store, one function each, and what every backend must promise of them.

Certified by `tests/storage/test_conformance.py`, which runs the same bodies over every backend.

Keys are exact strings relative to the store's root, `/`-separated, never normalised.

A key that is another key's folder (`a` beside `a/b`) may be refused, or not listed while the other is there.

An etag is opaque. Equal etags of one key mean equal bytes; another etag does not mean other bytes (a local one changes by
`chmod` too). S3 and memory make etags from the bytes. A local folder makes them from what the file system tells: a program
that writes through a memory map, or after the clock was set back, can put other bytes under the same etag. A pinned
`read` is sure of its etag. What is removed because of an etag that was remembered is named by its sha256 too: see `delete`.

Transient failures are retried inside the verbs (see each backend); `Unavailable` means the retries ran out. After a
lost answer a verb may have been applied: `create` and `replace` can then lose against their own write, and `delete`
can find nothing. Callers that must know read back (`tidemill.storage.log` does).
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from datetime import datetime

from tidemill.storage.errors import AlreadyExists
from tidemill.storage.pieces import Pieces

logger = logging.getLogger("tidemill.storage")

PassedOver = Callable[[str, str], None]
"""Is told the key and the reason for each entry that a listing passes over; the key of a folder ends in `/`."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing says of one object."""

    key: str
    size: int
    """Bytes."""
    etag: str
    last_modified: datetime
    """Timezone-aware, by the store's clock. `stat` may round down to whole seconds what a listing tells in milliseconds."""
    lasting_etag: str = ""
    """Only where it differs from the etag (local): stays the same through `chmod` and hard links, but may repeat for other
    bytes of the same size where a program sets times by hand. For a fingerprint that holds more evidence of the bytes."""

    @property
    def fingerprint_etag(self) -> str:
        """`lasting_etag`, or the etag where that is as lasting."""
        return self.lasting_etag or self.etag


@dataclass(frozen=True, slots=True)
class Upload:
    """Parts of an object that was never completed: its writer is still at it, or died."""

    key: str
    id: str
    began: datetime
    """Timezone-aware, by the store's clock."""


@dataclass(frozen=True, slots=True)
class Promises:
    """What a store keeps where stores differ. Found by asking it (`probe.py`), not by its name.

    A store that nobody has asked promises nothing.
    """

    compares_on_delete: bool = False
    """A delete that names an etag is refused if the object has another. Where the server does not compare, `delete` does
    before it asks: an object that is put between the two requests is lost, or put back where the bucket keeps versions."""


class Store(ABC):
    """A prefix of an object store, or a local folder. Threads may share an instance; a forked process must open its own."""

    url: str
    """Canonical URL of the root, without a trailing slash and without credentials."""

    promises: Promises = Promises()
    """Set once for each instance, by the probe."""

    @property
    def keeper(self) -> Hashable:
        """Who keeps the promises: stores with equal ones keep the same, as all places of one bucket of a server do. Unless a
        backend says otherwise, each place for itself."""
        return self.url

    @property
    def one_call_below(self) -> int:
        """Bytes up to which `write_pieces` makes one request, so that `concurrency` such calls may be under way at once. A larger
        object may go up in parts, several at once, and has the store for itself."""
        return 64 * 2**20

    concurrency: int = 1
    """How many calls are worth having under way at once. 1: a call returns sooner than another thread could take it over."""

    readers: int = 1
    """How many row groups of Parquet files are worth reading at once. 1: reading is as fast as decoding, if not faster."""

    @abstractmethod
    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix` (plain string prefix, all depths), in no stated order.

        With `after`, only keys that sort after it, by their UTF-8 bytes: whether there is any costs one request.
        (Not the name of a folder of keys: SeaweedFS passes over all of it.)
        Consistent for objects that exist from start to end of the call. Half-written objects of this API are never
        shown. Nothing ends a listing early: an entry that cannot be an object (a key that the other verbs would refuse, a
        link that leads nowhere, a pipe) is passed over, and `passed_over` is told. Without `passed_over`, one warning
        names the first such entry, and a folder that may not be listed is an error.

        With `inside`, a local symbolic link that leads out of the root is passed over too. Errors come with the first item.

        Raises:
            StoreNotFound: the bucket or root folder does not exist.
            PermissionDenied: the root may not be listed; without `passed_over`, a folder below it.
        """

    def make_durable(self, key: str) -> None:  # noqa: B027  # most stores have nothing to do
        """Make sure that an object which is there, written by whom it may be, is still there after a power cut.

        For readers who act on it: another process may have made it visible and died before it was durable. Nothing to do
        where a store shows only what is durable.
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

    _warned = False

    def _warn_of(self, key: str, reason: str) -> None:
        """What a listing does without `passed_over`."""
        if not self._warned:
            self._warned = True
            logger.warning("%s: skipping %r, and others like it: %s", self.url, key, reason)

    def mode(self, key: str) -> int | None:
        """Who may read the object, as permission bits for `write` and `create` of a copy; None where a store has no such bits.

        Raises:
            NotFound: nothing is there (not on a store without bits, which is not asked).
        """
        return None

    @abstractmethod
    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """Put an object, replacing what is there. Atomic: a reader sees all of the old or all of the new bytes.

        Durable when it returns. A local file gets no permission that `mode` lacks, but its owner may read and write it.
        """

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        """As `write`, of bytes that come in pieces, which need not all be in memory at once: here they are.

        The pieces may be asked for several times. An error that they end with is raised, and then nothing is stored.

        Raises:
            NotFound: parts had been stored, and were given up (`abandon`).
        """
        return self.write(key, data.joined())

    def unfinished(self, prefix: str = "") -> Iterator[Upload]:
        """Yield what `write_pieces` has begun below a prefix and not completed; nothing where a store itself drops such parts.

        What is begun or completed meanwhile may be missing. No other verb sees any of it.
        """
        return iter(())

    def abandon(self, upload: Upload) -> None:  # noqa: B027  # most stores have nothing to do
        """Remove the parts of an upload: it can be completed no more. Nothing happens if it was completed or is gone."""

    @abstractmethod
    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """Put an object only if nothing is there. Of any number of concurrent creators exactly one wins. Durable.

        `mode` is as in `write`.

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
    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        """Remove an object, or only the one with this etag.

        `sha256`, beside `if_match`: only these bytes, which were read under that etag at some time. A local folder, whose
        etags alone do not prove it, compares the bytes that it is about to remove. If they are others, the object is put
        back and has another etag from then on.

        Raises:
            NotFound: nothing is there (after a lost answer: it may have been this call).
            PreconditionFailed: the object's etag or its bytes are others than those named; the object stays.
            PermissionDenied: not allowed; the object stays.
        """


def create_or_same(store: Store, key: str, data: bytes, *, mode: int | None = None) -> bool:
    """Put an object only if nothing is there, with `mode` as in `write`. False if the key holds other bytes.

    True also if it holds these bytes already: the answer to this very `create` may have been lost, or it was done before.

    Raises:
        NotFound: an object was there, and was removed before it could be compared.
    """
    try:
        store.create(key, data, mode=mode)
    except AlreadyExists:
        return store.read(key) == data
    return True

"""Blobs: written under names that only one attempt uses, read and verified.

Large ones are written in pieces, and read as streams: in ranges that are fetched ahead, verified when the last byte has come.
"""

import hashlib
import logging
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from tidemill.storage.chain import Chain
from tidemill.storage.errors import CorruptObject, HeadMoved, NotFound, PreconditionFailed, UnknownVersion
from tidemill.storage.manifest import BlobRef, Blobs, sha256
from tidemill.storage.pieces import Buffer, Buffers, Hashed, Pieces
from tidemill.storage.store import Store

logger = logging.getLogger("tidemill.storage")

T = TypeVar("T")

STREAMED_ABOVE: Final = 64 * 2**20
"""Bytes of a blob from which on it is read in ranges; a smaller one is read whole, and verified before it is parsed."""
RANGE: Final = 4 * 2**20
"""Bytes of a range. As many ranges are in memory as calls of the store are under way."""
WHOLE: Final = 2**20
"""Bytes of a blob up to which its pieces are joined before they are written: one call of a store, as of any small object."""
RESTORE: Final = "Nothing was loaded. Restore the object, or `tidemill rollback` to another version."


def pinned(store: Store, ref: BlobRef) -> str:
    """The etag of a blob that has the size which was committed.

    Raises:
        UnknownVersion: the blob is gone (retention).
        CorruptObject: it has another size.
    """
    where = f"{store.url}/{ref.key}"
    try:
        found = store.stat(ref.key)
    except NotFound:
        raise gone(where) from None
    if found.size != ref.bytes:  # before memory is taken for it
        raise CorruptObject(f"{where} is not what was committed: {found.size} bytes instead of {ref.bytes}. {RESTORE}")
    return found.etag


def gone(where: str) -> UnknownVersion:
    """What to raise where a blob is not there any more."""
    return UnknownVersion(
        f"{where} is gone: retention removed the blobs of this version. Choose a newer one (`tidemill log`)."
    )


def check_digest(where: str, found: str, ref: BlobRef) -> None:
    """Raises CorruptObject: the blob at `where` has another sha256 than was committed."""
    if found != ref.sha256:
        raise CorruptObject(f"{where} is not what was committed: sha256 {found} instead of {ref.sha256}. {RESTORE}")


class Stream:
    """A blob, read once from its beginning to its end.

    Its last bytes are handed out only if all of them are what was committed. What was made of the others must be thrown away
    where that fails.
    """

    def __init__(self, store: Store, ref: BlobRef) -> None:
        """Raises UnknownVersion, CorruptObject: as `pinned`."""
        self._ref, self._ranges = ref, _verified_ranges(store, ref, pinned(store, ref))
        self._range = memoryview(b"")
        self.nbytes = ref.bytes

    def readinto(self, buffer: memoryview) -> int:
        """Fill a flat buffer with the bytes that follow. Returns how many there were: fewer only at the end.

        Raises:
            UnknownVersion: the blob went meanwhile (retention).
            CorruptObject: it is not what was committed.
        """
        at = 0
        while at < len(buffer):
            if not self._range and (following := next(self._ranges, None)) is not None:
                self._range = following
            elif not self._range:
                break
            taken = self._range[: len(buffer) - at]
            buffer[at : at + len(taken)] = taken
            self._range, at = self._range[len(taken) :], at + len(taken)
        return at

    def finish(self) -> None:
        """Read what is left, so that all of it is verified. Raises as `readinto`."""
        for _ in self._ranges:
            pass

    def close(self) -> None:
        """Fetch nothing more."""
        self._ranges.close()


class Stored(Pieces):
    """The bytes of a blob, to be written elsewhere. Verified each time that they are read."""

    def __init__(self, store: Store, ref: BlobRef) -> None:
        self._store, self._ref = store, ref

    def __len__(self) -> int:
        return self._ref.bytes

    def __iter__(self) -> Iterator[memoryview]:
        return _verified_ranges(self._store, self._ref, pinned(self._store, self._ref))


def _verified_ranges(store: Store, ref: BlobRef, etag: str) -> Generator[memoryview]:
    where, digest = f"{store.url}/{ref.key}", hashlib.sha256()

    def fetch(start: int) -> bytes:
        try:
            return store.read(ref.key, if_match=etag, start=start, length=min(RANGE, ref.bytes - start))
        except NotFound:
            raise gone(where) from None
        except PreconditionFailed as error:
            raise CorruptObject(f"{where} was replaced while it was read: {error}. {RESTORE}") from error

    left = ref.bytes
    for data in _ahead(fetch, range(0, ref.bytes, RANGE), store.concurrency):
        digest.update(data)
        left -= len(data)
        if not left:
            check_digest(where, digest.hexdigest(), ref)
        yield memoryview(data)


def _ahead(fetch: Callable[[int], bytes], starts: range, calls: int) -> Iterator[bytes]:
    """What is fetched from each start, in order, with so many calls under way; with one they are made here, in turn."""
    if calls == 1:
        yield from map(fetch, starts)
        return
    pool = ThreadPoolExecutor(calls, thread_name_prefix="tidemill-store")
    under_way: deque[Future[bytes]] = deque()
    try:
        for start in starts:
            if len(under_way) == calls:
                yield under_way.popleft().result()
            under_way.append(pool.submit(fetch, start))
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- of a model ----------------------------------------------------------------------------------------------------------
class BlobChain(Chain):
    """A chain of versions, and the blobs that they name."""

    def write_blob(self, number: int, suffix: str, data: bytes | Sequence[Buffer]) -> BlobRef:
        """Store bytes for version `number`, which does not exist yet, under a name that only this call uses.

        Buffers are stored one after the other without being joined. They must not change meanwhile.

        Raises:
            HeadMoved: others have made that version, and retention has removed what was written of the blob so far.
        """
        return self.write_blob_at(f"{self.model}/blobs/{number:08d}", suffix, data, number)

    def write_blob_at(
        self, prefix: str, suffix: str, data: bytes | Sequence[Buffer], number: int | None = None
    ) -> BlobRef:
        """The same below any prefix of a key, as a run keeps its checkpoints."""
        key = f"{prefix}-{uuid.uuid4().hex}.{suffix}"
        if not isinstance(data, bytes):
            pieces = Buffers(data)
            if len(pieces) > WHOLE:
                return self._write_pieces(key, pieces, number)
            data = pieces.joined()
        self.store.write(key, data)
        return BlobRef(key=key, bytes=len(data), sha256=sha256(data))

    def _write_pieces(self, key: str, pieces: Pieces, number: int | None) -> BlobRef:
        hashed = Hashed(pieces)
        try:
            self.store.write_pieces(key, hashed)
        except NotFound as error:  # its upload: that of a version which exists by now is given up by retention
            if number is None or self.head().number < number:
                raise
            raise HeadMoved(f"{self.url}: another run committed version {number} first.") from error
        return BlobRef(key=key, bytes=len(pieces), sha256=hashed.digest)

    def copy_blobs(self, number: int, blobs: Blobs, source: "BlobChain | None" = None) -> tuple[BlobRef, BlobRef]:
        """Store weights and state of a version, of this log or of another one, for version `number`; see `write_blob`.

        Raises:
            UnknownVersion, CorruptObject: as `read_blob`. Of small blobs nothing is stored then.
        """
        source = source or self
        refs = {"safetensors": blobs.weights, "state.safetensors": blobs.state}
        read = {suffix: source.read_blob(ref) for suffix, ref in refs.items() if ref.bytes <= STREAMED_ABOVE}
        made = []
        for suffix, ref in refs.items():
            if suffix in read:
                made.append(self.write_blob(number, suffix, read[suffix]))
            else:
                key = f"{self.model}/blobs/{number:08d}-{uuid.uuid4().hex}.{suffix}"
                made.append(self._write_pieces(key, Stored(source.store, ref), number))
        return made[0], made[1]

    def read_blob(self, ref: BlobRef) -> bytes:
        """The bytes of a blob, verified before anyone parses them.

        Raises:
            UnknownVersion: the blob is gone (retention).
            CorruptObject: length or sha256 differ.
        """
        where = f"{self.store.url}/{ref.key}"
        pinned(self.store, ref)
        try:
            data = self.store.read(ref.key)
        except NotFound:
            raise gone(where) from None
        check_digest(where, sha256(data), ref)
        return data

    def read_blobs(self, refs: Sequence[BlobRef], use: Callable[..., T]) -> T:
        """What `use` makes of the blobs: of each its bytes, or a `Stream` of them if they are many.

        A stream is verified when its last bytes are read. What `use` returns or raises is of verified bytes alone. If bytes
        came that are not those of the blob, all are read once more: they may have been altered on their way.

        Raises:
            UnknownVersion, CorruptObject: as `read_blob`.
        """
        for attempt in (1, 2):
            # A stream has nothing under way before it is read
            sources = [self.read_blob(ref) if ref.bytes <= STREAMED_ABOVE else Stream(self.store, ref) for ref in refs]
            try:
                try:
                    found = use(*sources)
                except Exception:
                    _finish(sources)
                    raise
                _finish(sources)
                return found
            except CorruptObject as error:
                if attempt == 2 or not any(isinstance(source, Stream) for source in sources):
                    raise
                logger.warning("%s Reading it once more.", error)
            finally:
                for source in sources:
                    if isinstance(source, Stream):
                        source.close()
        raise AssertionError("the second attempt returns or raises")

    def verify_blob(self, ref: BlobRef) -> None:
        """Read a blob, and keep nothing. Raises as `read_blob`."""
        self.read_blobs([ref], lambda source: None)


def _finish(sources: Sequence[bytes | Stream]) -> None:
    for source in sources:
        if isinstance(source, Stream):
            source.finish()

"""Files of a model as they are read: in ranges that are fetched ahead, verified when the last byte of each unit has come."""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Final, TypeVar

from tidemill.storage.errors import CorruptObject, NotFound, PreconditionFailed, UnknownVersion
from tidemill.storage.parallel import concurrently
from tidemill.storage.pieces import BlockHash, Hash, Pieces
from tidemill.storage.refs import BlobRef, ChangedRows, FileRef, Segment, Unit
from tidemill.storage.store import Store

if TYPE_CHECKING:
    from tidemill.storage.rows import RowsOver

T = TypeVar("T")
R = TypeVar("R")

RANGE: Final = 4 * 2**20
"""Bytes of a range. As many ranges are in memory as calls of the store are under way."""
RESTORE: Final = "Nothing was loaded. Restore the object, or `tidemill rollback` to another version."

Seen = Callable[[str, bytes], None]
"""Told of each segment that was read: its sha256, and the sha256 of each of its blocks."""


def pinned(store: Store, unit: Unit) -> str:
    """The etag of a blob that has the size which was committed.

    Raises:
        UnknownVersion: the blob is gone (retention).
        CorruptObject: it has another size.
    """
    where = f"{store.url}/{unit.key}"
    try:
        found = store.stat(unit.key)
    except NotFound:
        raise gone(where) from None
    if found.size != unit.bytes:  # before memory is taken for it
        raise CorruptObject(f"{where} is not what was committed: {found.size} bytes instead of {unit.bytes}. {RESTORE}")
    return found.etag


def gone(where: str) -> UnknownVersion:
    """What to raise where a blob is not there any more."""
    return UnknownVersion(
        f"{where} is gone: retention removed the blobs of this version. Choose a newer one (`tidemill log`)."
    )


def check_digest(where: str, found: str, unit: Unit) -> None:
    """Raises CorruptObject: what is at `where` has another sha256 than was committed."""
    if found != unit.sha256:
        raise CorruptObject(f"{where} is not what was committed: sha256 {found} instead of {unit.sha256}. {RESTORE}")


class Stream:
    """A file, read once from its beginning to its end.

    The last bytes of each unit are handed out only if all of it is what was committed. What was made of the others must be
    thrown away where that fails.
    """

    def __init__(self, store: Store, ref: FileRef, seen: Seen | None = None) -> None:
        """Raises UnknownVersion, CorruptObject: as `pinned`."""
        self._ranges = verified(store, ref.units, seen)
        self._range = memoryview(b"")
        self.nbytes = ref.bytes

    def readinto(self, buffer: memoryview) -> int:
        """Fill a flat buffer with the bytes that follow. Returns how many there were: fewer only at the end.

        Raises:
            UnknownVersion: a blob went meanwhile (retention).
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
    """The bytes of a unit, or of a file, to be written elsewhere. Verified each time that they are read."""

    def __init__(self, store: Store, ref: FileRef | Unit) -> None:
        self._store, self._ref = store, ref

    def __len__(self) -> int:
        return self._ref.bytes

    def __iter__(self) -> Iterator[memoryview]:
        return verified(self._store, self._ref.units)


def verified(store: Store, units: Sequence[Unit], seen: Seen | None = None) -> Generator[memoryview]:
    """The bytes of these units, one after the other.

    Raises:
        UnknownVersion, CorruptObject: as `pinned` of one of them, at once.
    """
    etags = concurrently(lambda unit: pinned(store, unit), units, store.concurrency)
    return _ranges(store, list(zip(units, etags, strict=True)), seen)


def _ranges(store: Store, pinned: Sequence[tuple[Unit, str]], seen: Seen | None) -> Generator[memoryview]:
    def fetch(wanted: tuple[Unit, str, int]) -> bytes:
        (unit, etag, start), where = wanted, f"{store.url}/{wanted[0].key}"
        try:
            return store.read(unit.key, if_match=etag, start=start, length=min(RANGE, unit.bytes - start))
        except NotFound:
            raise gone(where) from None
        except PreconditionFailed as error:
            raise CorruptObject(f"{where} was replaced while it was read: {error}. {RESTORE}") from error

    wanted = [(unit, etag, start) for unit, etag in pinned for start in range(0, unit.bytes, RANGE)]
    with closing(_ahead(fetch, wanted, store.concurrency)) as fetched:
        for unit, _ in pinned:
            over = _rows_over(store, unit) if isinstance(unit, Segment) and unit.changed else None
            taken: Hash = BlockHash() if isinstance(unit, Segment) else hashlib.sha256()
            for start in range(0, unit.bytes, RANGE):
                data = next(fetched)
                piece = memoryview(data) if over is None else over.put(data, start)
                taken.update(piece)
                if start + RANGE >= unit.bytes:
                    check_digest(_where(store, unit), taken.hexdigest(), unit)
                    if seen is not None and isinstance(taken, BlockHash):
                        seen(unit.sha256, taken.blocks)
                yield piece


def _where(store: Store, unit: Unit) -> str:
    changed = len(unit.changed or ()) if isinstance(unit, Segment) else 0
    return f"{store.url}/{unit.key}" + (f" with the rows that {changed} versions have changed" if changed else "")


def _ahead(fetch: Callable[[T], R], wanted: Iterable[T], calls: int) -> Generator[R]:
    """What is fetched of each, in order, with so many calls under way; with one they are made here, in turn."""
    if calls == 1:
        yield from map(fetch, wanted)
        return
    pool = ThreadPoolExecutor(calls, thread_name_prefix="tidemill-store")
    under_way: deque[Future[R]] = deque()
    try:
        for each in wanted:
            if len(under_way) == calls:
                yield under_way.popleft().result()
            under_way.append(pool.submit(fetch, each))
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _rows_over(store: Store, segment: Segment) -> "RowsOver":
    from tidemill.storage.rows import RowsOver  # and numpy, which nobody else here needs

    def read(ref: ChangedRows) -> bytes:
        where = f"{store.url}/{ref.key}"
        try:
            data = store.read(ref.key, start=0, length=ref.bytes)  # no more memory than the manifest says
        except NotFound:
            raise gone(where) from None
        except CorruptObject as error:
            raise CorruptObject(f"{where} is not what was committed: {error}. {RESTORE}") from error
        check_digest(where, hashlib.sha256(data).hexdigest(), BlobRef(key=ref.key, bytes=ref.bytes, sha256=ref.sha256))
        return data

    changed = segment.changed or ()
    blobs = concurrently(read, changed, store.concurrency)
    try:
        return RowsOver(changed, blobs)
    except ValueError as error:
        raise CorruptObject(
            f"{store.url}/{segment.key}: its changed rows cannot be read: {error}. {RESTORE}"
        ) from error

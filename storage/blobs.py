"""Blobs: written under names that only one attempt uses, read and verified.

Large ones are written in pieces, and read as streams (`streams.py`); large files of tensors in segments (`segments.py`).
"""

import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeVar

from tidemill.storage.chain import Chain
from tidemill.storage.errors import CorruptObject, HeadMoved, NotFound
from tidemill.storage.manifest import Blobs, sha256
from tidemill.storage.parallel import concurrently
from tidemill.storage.pieces import BlockHash, Buffer, Buffers, Hash, Hashed, Pieces
from tidemill.storage.refs import BlobRef, ChangedRows, FileRef, Segment, Segments, Unit
from tidemill.storage.segments import (
    LEAST,
    Cut,
    KnownBlocks,
    blocks_with,
    can_change,
    cut,
    is_same,
    joint,
)
from tidemill.storage.streams import Stored, Stream, check_digest, gone, pinned

logger = logging.getLogger("tidemill.storage")

if TYPE_CHECKING:
    from tidemill.storage.rows import Rows, Touched

T = TypeVar("T")
H = TypeVar("H", bound=Hash)

STREAMED_ABOVE: Final = 64 * 2**20
"""Bytes of a blob from which on it is read in ranges; a smaller one is read whole, and verified before it is parsed."""
WHOLE: Final = 2**20
"""Bytes of a blob up to which its pieces are joined before they are written: one call of a store, as of any small object."""
SUFFIXES: Final = ("safetensors", "state.safetensors")
"""How the keys of weights and state end."""
UNKNOWN: Final["Sequence[Touched]"] = ({}, {})
"""Nothing is known of which rows have changed."""


class WritingChain(Chain):
    """A chain of versions, and the blobs of the next one."""

    segmented_above: int = STREAMED_ABOVE
    """Bytes of a file of tensors from which on it is stored in segments."""
    least_segment: int = LEAST
    """Bytes of a segment; see `segments.LEAST`."""

    @cached_property
    def _known(self) -> KnownBlocks:
        return KnownBlocks()

    def write_learner(
        self,
        number: int,
        pieces: Sequence[Sequence[Buffer]],
        parent: Blobs | None = None,
        touched: "Sequence[Touched]" = UNKNOWN,
    ) -> list[FileRef]:
        """Store weights and state for version `number`, which does not exist yet; see `write_blob`.

        Of a large file, `parent`'s segments are named again where they hold the same bytes. Where few rows have changed, only
        these are stored. `parent` must be the version that `number` follows: no collection removes its blobs before there is
        another, and `commit` takes no blobs of others.

        Args:
            pieces: Of both files, as `Learner.pieces` gives them. They must not change meanwhile.
            parent: The blobs of the version before; None: all is stored.
            touched: For both files, which rows may hold other bytes than in `parent`.
        """
        parts = list(zip(SUFFIXES, pieces, strict=True))
        large = [sum(buffer.nbytes for buffer in part) > self.segmented_above for part in pieces]
        if not any(large):
            return [*concurrently(lambda part: self.write_blob(number, *part), parts, self.store.concurrency)]
        befores = (None, None) if parent is None else (parent.weights, parent.state)
        jobs = [
            [
                _Job(suffix, each, _same_place(each, before), each.rows_of(rows))
                for each in cut(part, self.least_segment)
            ]
            for (suffix, part), before, rows, is_large in zip(parts, befores, touched, large, strict=True)
            if is_large
        ]
        made = iter(self._write_segments(number, [job for file in jobs for job in file]))
        segments = iter([[next(made) for _ in file] for file in jobs])
        return [
            Segments.of(next(segments)) if is_large else self.write_blob(number, *part)
            for part, is_large in zip(parts, large, strict=True)
        ]

    def _write_segments(self, number: int, jobs: Sequence["_Job"]) -> list[Segment]:
        """Several at once; one after the other those that the store may send in parts."""
        made: list[Segment | None] = [None] * len(jobs)
        sizes, limit = [len(job.cut.pieces) for job in jobs], self.store.one_call_below
        for calls, chosen in (
            (self.store.concurrency, [at for at, size in enumerate(sizes) if size <= limit]),
            (1, [at for at, size in enumerate(sizes) if size > limit]),
        ):
            done = concurrently(lambda at: self._write_segment(number, jobs[at]), chosen, calls)
            for at, segment in zip(chosen, done, strict=True):
                made[at] = segment
        return [segment for segment in made if segment is not None]

    def _write_segment(self, number: int, job: "_Job") -> Segment:
        """A segment for version `number`: that of the version before if it is the same, its changed rows, or all of it."""
        cut, before, rows = job.cut, job.before, job.rows
        if before is not None:
            known = self._known.get(before.sha256)
            if rows is None:
                if is_same(cut, before, known):
                    return before
            elif not len(rows):
                return before
            elif known is not None and can_change(before, cut.row_bytes, len(rows)):
                return self._write_rows(number, job, before, rows, known)
        key = self._key(number, f"{job.suffix}.segment")
        blocks = self._write_hashed(key, cut.pieces, number, BlockHash).blocks
        self._known.put(digest := joint(blocks), blocks)
        return Segment(name=cut.name, key=key, bytes=len(cut.pieces), sha256=digest)

    def _write_rows(self, number: int, job: "_Job", before: Segment, rows: "Rows", known: bytes) -> Segment:
        """The segment before, whose blocks are known, with these rows over it. Costs what they do."""
        from tidemill.storage.rows import changed_rows, touched_blocks  # and numpy, which nobody else here needs

        (buffer,), size = job.cut.buffers, job.cut.row_bytes
        blocks = blocks_with(buffer, known, touched_blocks(size, rows))
        digest = joint(blocks)
        if digest == before.sha256:
            return before
        blob = self.write_blob(number, f"{job.suffix}.rows", changed_rows(buffer, size, rows))
        self._known.put(digest, blocks)
        changed = (*(before.changed or ()), ChangedRows(**dict(blob), rows=len(rows)))
        return before.model_copy(update={"sha256": digest, "changed": changed})

    def _key(self, number: int, suffix: str) -> str:
        """A name that only this call gives."""
        return f"{self.model}/blobs/{number:08d}-{uuid.uuid4().hex}.{suffix}"

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
        taken = self._write_hashed(key, pieces, number, hashlib.sha256)
        return BlobRef(key=key, bytes=len(pieces), sha256=taken.hexdigest())

    def _write_hashed(self, key: str, pieces: Pieces, number: int | None, make: Callable[[], H]) -> H:
        """Store pieces, and hash them meanwhile."""
        hashed = Hashed(pieces, make)
        try:
            if len(pieces) > WHOLE:
                self.store.write_pieces(key, hashed)
            else:
                self.store.write(key, hashed.joined())
        except NotFound as error:  # its upload: that of a version which exists by now is given up by retention
            if number is None or self.head().number < number:
                raise
            raise HeadMoved(f"{self.url}: another run committed version {number} first.") from error
        return hashed.hash


class BlobChain(WritingChain):
    """A chain of versions, and the blobs that they name."""

    def copy_blobs(
        self, number: int, blobs: Blobs, source: "BlobChain | None" = None, parent: Blobs | None = None
    ) -> tuple[FileRef, FileRef]:
        """Store weights and state of a version, of this log or of another one, for version `number`; see `write_blob`.

        A segment that `parent` has too, the version that `number` follows, is not stored again. Changed rows are put into
        what is stored.

        Raises:
            UnknownVersion, CorruptObject: as `read_blob`. Of small blobs nothing is stored then.
        """
        source = source or self
        refs = dict(zip(SUFFIXES, (blobs.weights, blobs.state), strict=True))
        read = {suffix: source.read_blob(ref) for suffix, ref in refs.items() if _is_small(ref)}
        older = {} if parent is None else {each.sha256: each for each in (*parent.weights.units, *parent.state.units)}
        made: list[FileRef] = []
        for suffix, ref in refs.items():
            if suffix in read:
                made.append(self.write_blob(number, suffix, read[suffix]))
            elif isinstance(ref, BlobRef):
                made.append(self._write_pieces(self._key(number, suffix), Stored(source.store, ref), number))
            else:
                made.append(Segments.of(self._copied(number, suffix, each, source, older) for each in ref.segments))
        return made[0], made[1]

    def _copied(
        self, number: int, suffix: str, segment: Segment, source: "BlobChain", older: Mapping[str, Unit]
    ) -> Segment:
        same = older.get(segment.sha256)
        if isinstance(same, Segment):
            return same.model_copy(update={"name": segment.name})
        key = self._key(number, f"{suffix}.segment")
        self._write_hashed(key, Stored(source.store, segment), number, BlockHash)
        return segment.model_copy(update={"key": key, "changed": None})

    def read_blob(self, ref: FileRef) -> bytes:
        """The bytes of a blob, or of a file in segments, verified before anyone parses them.

        Raises:
            UnknownVersion: the blob is gone (retention).
            CorruptObject: length or sha256 differ.
        """
        if isinstance(ref, Segments):
            return Stored(self.store, ref).joined()
        where = f"{self.store.url}/{ref.key}"
        pinned(self.store, ref)
        try:
            data = self.store.read(ref.key)
        except NotFound:
            raise gone(where) from None
        check_digest(where, sha256(data), ref)
        return data

    def read_blobs(self, refs: Sequence[FileRef], use: Callable[..., T]) -> T:
        """What `use` makes of the blobs: of each its bytes, or a `Stream` of them if they are many.

        A stream is verified when its last bytes are read. What `use` returns or raises is of verified bytes alone. If bytes
        came that are not those of the blob, all are read once more: they may have been altered on their way.

        Raises:
            UnknownVersion, CorruptObject: as `read_blob`.
        """
        for attempt in (1, 2):
            # A stream has nothing under way before it is read
            sources = [
                self.read_blob(ref) if _is_small(ref) else Stream(self.store, ref, self._known.put) for ref in refs
            ]
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

    def missing(self, keys: Sequence[str]) -> str | None:
        """The first of these objects that is not there; None: all are. Several are asked for at once."""

        def is_gone(key: str) -> bool:
            try:
                self.store.stat(key)
            except NotFound:
                return True
            return False

        gone = concurrently(is_gone, keys, self.store.concurrency)
        return next((key for key, is_gone in zip(keys, gone, strict=True) if is_gone), None)

    def verify_blob(self, ref: FileRef | Unit) -> None:
        """Read a blob, a segment or a file, and keep nothing. Raises as `read_blob`."""
        self.read_blobs([Segments.of([ref]) if isinstance(ref, Segment) else ref], lambda source: None)


def _finish(sources: Sequence[bytes | Stream]) -> None:
    for source in sources:
        if isinstance(source, Stream):
            source.finish()


@dataclass(frozen=True)
class _Job:
    """A segment to store."""

    suffix: str
    cut: Cut
    before: Segment | None
    """Of the version before."""
    rows: "Rows | None"
    """Which may have changed since; None: any."""


def _same_place(cut: Cut, before: FileRef | None) -> Segment | None:
    """The segment that had the place of this one in the version before."""
    if isinstance(before, Segments):
        for segment in before.segments:
            if (segment.name, segment.bytes) == (cut.name, len(cut.pieces)):
                return segment
    return None


def _is_small(ref: FileRef) -> bool:
    """Whether it is read whole: a blob that is not large."""
    return isinstance(ref, BlobRef) and ref.bytes <= STREAMED_ABOVE

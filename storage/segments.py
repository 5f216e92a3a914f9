"""A large file of tensors in segments: where it is cut, and what of a segment must be stored where its parent's is known.

How a file is cut, and the sha256 of a segment, follow from its bytes alone: the same bits have the same sha256, whatever was
stored before. Reading is in `streams.py`.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from tidemill.storage.pieces import BLOCK, BlockHash, Buffer, Buffers, Hash, Pieces
from tidemill.storage.refs import FileRef, Segment

if TYPE_CHECKING:
    from tidemill.storage.rows import Rows, Touched

LEAST: Final = 4 * 2**20
"""Bytes of a segment at least, but for the header, what is left over at the end, and what lies before a large tensor."""
MOST_SEGMENTS: Final = 64
"""Segments of so many bytes make a whole file: of a larger file, they are longer."""
MOST_CHANGES: Final = 32
"""Blobs of changed rows over one segment. Then it is stored whole again."""
CHANGED_SHARE: Final = 4
"""All changed rows over a segment have at most a fourth of its bytes: so much more memory is needed to read it."""
KNOWN_BYTES: Final = 64 * 2**20
"""Of what is remembered of blocks: 32 bytes for each 16 KiB, which is for 32 GiB of tensors."""


@dataclass(frozen=True)
class Cut:
    """A stretch of a file that is to be stored by itself."""

    name: str
    """Of its first tensor; empty: the header."""
    buffers: tuple[Buffer, ...]
    row_bytes: int = 0
    """Of a row of a large tensor; 0: it is none, but the header, or several tensors."""

    @property
    def pieces(self) -> Buffers:
        return Buffers(self.buffers)

    def rows_of(self, touched: "Touched") -> "Rows | None":
        """Which rows may have changed; None: any. Of several tensors no rows are told, whatever is known of the first."""
        return touched.get(self.name) if self.row_bytes else None


def cut(buffers: Sequence[Buffer], least: int = LEAST) -> list[Cut]:
    """A file of tensors, as `tensors.buffers_of` gives it, where it is cut: header, large tensors, runs of smaller ones."""
    size = sum(buffer.nbytes for buffer in buffers)
    while size > least * MOST_SEGMENTS:
        least *= 2  # by steps, so that a few bytes more do not cut a file elsewhere
    found, run, room = [Cut("", (buffers[0],))], list[Buffer](), least
    name = ""
    for (tensor, rows), buffer in zip(_tensors(buffers[0]), buffers[1:], strict=True):
        alone = buffer.nbytes >= least
        if run and (alone or room <= 0):
            found.append(Cut(name, tuple(run)))
            run, room = [], least
        if alone:
            found.append(Cut(tensor, (buffer,), buffer.nbytes // rows))
            continue
        name = name if run else tensor
        run.append(buffer)
        room -= buffer.nbytes
    return [*found, Cut(name, tuple(run))] if run else found


def _tensors(header: Buffer) -> Iterator[tuple[str, int]]:
    """(name, rows) of the tensors that have bytes, in the order of the file."""
    about: dict[str, dict[str, Any]] = json.loads(bytes(header[8 : header.nbytes]))
    about.pop("__metadata__", None)
    places = sorted((*tensor["data_offsets"], name) for name, tensor in about.items())
    for begin, end, name in places:
        if end > begin:
            yield name, (about[name]["shape"] or [1])[0]


def can_change(before: Segment, size: int, rows: int) -> bool:
    """Whether rows of so many bytes may be stored in place of a whole segment."""
    changed = before.changed or ()
    together = sum(each.bytes for each in changed) + rows * (8 + size)
    alike = all(each.row_bytes == size for each in changed)
    return alike and len(changed) < MOST_CHANGES and together * CHANGED_SHARE <= before.bytes


# ---- blocks --------------------------------------------------------------------------------------------------------------
def blocks_of(cut: Cut) -> bytes:
    """The sha256 of each block."""
    taken = BlockHash()
    for piece in cut.pieces:
        taken.update(piece)
    return taken.blocks


def blocks_with(buffer: Buffer, known: bytes, numbers: Iterable[int]) -> bytes:
    """The same of a tensor where they are known of the segment before, and only these blocks may be others."""
    found = bytearray(known)
    for number in numbers:
        block = buffer[number * BLOCK : min((number + 1) * BLOCK, buffer.nbytes)]
        found[32 * number : 32 * number + 32] = hashlib.sha256(block).digest()
    return bytes(found)


def joint(blocks: bytes) -> str:
    """The sha256 of a segment with these blocks."""
    return hashlib.sha256(blocks).hexdigest()


def is_same(cut: Cut, before: Segment, known: bytes | None) -> bool:
    """Whether a segment holds the bytes of the one before. Where its blocks are known, the first other one ends it."""
    if known is None:
        return joint(blocks_of(cut)) == before.sha256
    taken, at = BlockHash(), 0
    for piece in cut.pieces:
        taken.update(piece)
        new = taken.whole[at:]
        if known[at : at + len(new)] != new:
            return False
        at += len(new)
    return taken.blocks == known


def is_of(ref: FileRef, data: Pieces) -> bool:
    """Whether these are the bytes of a file, however it is stored."""
    if len(data) != ref.bytes:
        return False
    pieces, piece = iter(data), memoryview(b"")
    for unit in ref.units:
        taken: Hash = BlockHash() if isinstance(unit, Segment) else hashlib.sha256()
        left = unit.bytes
        while left:
            piece = piece or next(pieces)
            part = piece[:left]
            taken.update(part)
            piece, left = piece[part.nbytes :], left - part.nbytes
        if taken.hexdigest() != unit.sha256:
            return False
    return True


class KnownBlocks:
    """The blocks of segments that were read or written lately, by the sha256 of the segment, which follows from them."""

    def __init__(self) -> None:
        self._found, self._bytes, self._lock = OrderedDict[str, bytes](), 0, Lock()

    def put(self, sha256: str, blocks: bytes) -> None:
        """Remember them, and forget the oldest ones where they become too many."""
        with self._lock:
            self._bytes += len(blocks) - len(self._found.pop(sha256, b""))
            self._found[sha256] = blocks
            while self._bytes > KNOWN_BYTES and len(self._found) > 1:
                self._bytes -= len(self._found.popitem(last=False)[1])

    def get(self, sha256: str) -> bytes | None:
        return self._found.get(sha256)

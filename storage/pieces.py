"""Bytes that come in pieces, as large blobs do: written one after the other, and never joined."""

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

PIECE: Final = 4 * 2**20
"""Bytes of a piece at most: few enough to be hashed while the one before is written, many enough for that to be cheap."""


class Buffer(Protocol):
    """What holds bytes: a flat memoryview of them, or what fetches a part of them when it is asked for."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def __getitem__(self, part: slice, /) -> memoryview:
        """Some of them."""


class Pieces(ABC):
    """Bytes of a known length, as often as they are asked for: a request that failed is made again."""

    @abstractmethod
    def __len__(self) -> int:
        """Bytes of all of them."""

    @abstractmethod
    def __iter__(self) -> Iterator[memoryview]:
        """One piece after the other. What cannot be read ends it with a StorageError before its last piece."""

    def joined(self) -> bytes:
        """All of them, in memory."""
        return b"".join(self)

    def sha256(self) -> str:
        """In hexadecimal digits."""
        digest = hashlib.sha256()
        for piece in self:
            digest.update(piece)
        return digest.hexdigest()

    def crc32(self) -> int:
        """As `zlib.crc32` of all of them."""
        found = 0
        for piece in self:
            found = zlib.crc32(piece, found)
        return found


class Buffers(Pieces):
    """The bytes of several buffers, which must not change meanwhile."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers, self._bytes = buffers, sum(buffer.nbytes for buffer in buffers)

    def __len__(self) -> int:
        return self._bytes

    def __iter__(self) -> Iterator[memoryview]:
        for buffer in self._buffers:
            for at in range(0, buffer.nbytes, PIECE):
                yield buffer[at : at + PIECE]


class Hashed(Pieces):
    """The same bytes, whose sha256 is known once the last one was taken. A thread hashes a piece while its taker writes it."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self.digest = pieces, ""
        """In hexadecimal digits, of the last time that all pieces were taken."""

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[memoryview]:
        digest = hashlib.sha256()
        before: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="tidemill-sha256") as pool:
            for piece in self._pieces:
                if before is not None:
                    before.result()
                before = pool.submit(digest.update, piece)
                yield piece
        self.digest = digest.hexdigest()


def in_parts(pieces: Iterable[memoryview], size: int) -> Iterator[Buffers]:
    """The same bytes as parts of `size` bytes, the last one of what is left. Nothing is copied."""
    part: list[memoryview] = []
    room = size
    for piece in pieces:
        at = 0
        while at < piece.nbytes:
            taken = piece[at : at + room]
            part.append(taken)
            at, room = at + taken.nbytes, room - taken.nbytes
            if not room:
                yield Buffers(part)
                part, room = [], size
    if part:
        yield Buffers(part)

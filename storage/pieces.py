"""Bytes that come in pieces, as large blobs do: written one after the other, and never joined."""

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, Protocol, TypeVar

BLOCK: Final = 16 * 2**10
"""Bytes of a block of `BlockHash`. What a change costs grows with it, and what is kept of the blocks shrinks."""
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


class Hash(Protocol):
    """What `hashlib` has, and `BlockHash`."""

    def update(self, data: memoryview, /) -> None:
        """Take the bytes that follow."""

    def hexdigest(self) -> str:
        """Of all that were taken."""


H = TypeVar("H", bound=Hash)


class BlockHash:
    """The sha256 of the sha256 of each block of 16 KiB: where a few bytes change, only their blocks are hashed again."""

    def __init__(self) -> None:
        self.whole = bytearray()
        """The sha256 of each block that is whole, 32 bytes each."""
        self._open, self._room = hashlib.sha256(), BLOCK

    def update(self, data: memoryview, /) -> None:
        """Take the bytes that follow."""
        at = 0
        while at < data.nbytes:
            taken = data[at : at + self._room]
            self._open.update(taken)
            at, self._room = at + taken.nbytes, self._room - taken.nbytes
            if not self._room:
                self.whole += self._open.digest()
                self._open, self._room = hashlib.sha256(), BLOCK

    @property
    def blocks(self) -> bytes:
        """The same with that of the last block, which may be a shorter one."""
        return bytes(self.whole) + (self._open.digest() if self._room < BLOCK else b"")

    def hexdigest(self) -> str:
        """Of all that were taken."""
        return hashlib.sha256(self.blocks).hexdigest()


class Hashed(Pieces, Generic[H]):
    """The same bytes, whose hash is known once the last one was taken. A thread hashes a piece while its taker writes it."""

    def __init__(self, pieces: Pieces, make: Callable[[], H]) -> None:
        self._pieces, self._make = pieces, make
        self.hash = make()
        """Of all pieces, from the last time that all of them were taken."""

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[memoryview]:
        taken = self._make()
        before: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="tidemill-sha256") as pool:
            for piece in self._pieces:
                if before is not None:
                    before.result()
                before = pool.submit(taken.update, piece)
                yield piece
            if before is not None:
                before.result()
        self.hash = taken


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

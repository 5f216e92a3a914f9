"""Bytes in pieces: cut and hashed without being joined."""

import hashlib
import zlib
from collections.abc import Iterator

import pytest

from tidemill.storage.pieces import BLOCK, PIECE, BlockHash, Buffers, Hashed, Pieces, in_parts

DATA = bytes(range(256)) * 41_000  # 10 MB, no multiple of a piece


def buffers(*sizes: int) -> Buffers:
    """The data in buffers of these sizes, and one of what is left."""
    found, at = [], 0
    for size in (*sizes, len(DATA) - sum(sizes)):
        found.append(memoryview(DATA)[at : at + size])
        at += size
    return Buffers(found)


@pytest.mark.parametrize("sizes", [(), (1,), (PIECE,), (PIECE + 1, 0, 7), (3, PIECE - 3, 2 * PIECE)])
def test_no_byte_is_lost_and_no_piece_is_long(sizes: tuple[int, ...]) -> None:
    pieces = buffers(*sizes)
    assert len(pieces) == len(DATA)
    assert max(piece.nbytes for piece in pieces) <= PIECE
    assert pieces.joined() == DATA
    assert pieces.sha256() == hashlib.sha256(DATA).hexdigest()
    assert pieces.crc32() == zlib.crc32(DATA)


class Unable(BlockHash):
    """Memory runs out at the last piece."""

    taken = 0

    def update(self, data: memoryview) -> None:
        self.taken += len(data)
        if self.taken == len(DATA):
            raise MemoryError


def test_a_hash_that_fails_at_the_last_piece_is_no_hash() -> None:
    with pytest.raises(MemoryError):
        list(Hashed(buffers(), Unable))


@pytest.mark.parametrize("size", [1_000_000, PIECE, PIECE + 1, len(DATA), 2 * len(DATA)])
def test_parts_have_the_size_that_was_asked_for(size: int) -> None:
    parts = list(in_parts(buffers(5, PIECE, 1), size))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert 0 < len(parts[-1]) <= size
    assert b"".join(part.joined() for part in parts) == DATA


def test_a_digest_is_that_of_the_last_time_that_all_pieces_were_taken() -> None:
    hashed = Hashed(buffers(PIECE, 3), hashlib.sha256)
    next(iter(hashed))
    assert hashed.hash.hexdigest() == hashlib.sha256(b"").hexdigest()
    for _ in range(2):
        assert hashed.joined() == DATA
        assert hashed.hash.hexdigest() == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 77])
def test_a_hash_by_blocks_is_that_of_their_hashes_however_the_bytes_come(size: int) -> None:
    data = DATA[:size]
    blocks = b"".join(hashlib.sha256(data[at : at + BLOCK]).digest() for at in range(0, size, BLOCK))
    for step in (1 + size // 3, BLOCK, size or 1):
        taken = BlockHash()
        for at in range(0, size, step):
            taken.update(memoryview(data)[at : at + step])
        assert taken.blocks == blocks
        assert taken.hexdigest() == hashlib.sha256(blocks).hexdigest()


def test_the_error_that_pieces_end_with_comes_through_the_hash() -> None:
    class Torn(Pieces):
        def __len__(self) -> int:
            return 2 * PIECE

        def __iter__(self) -> Iterator[memoryview]:
            yield memoryview(DATA)[:PIECE]
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        Hashed(Torn(), hashlib.sha256).joined()

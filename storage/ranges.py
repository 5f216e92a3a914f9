"""Byte ranges of one object, fetched before they are needed, and the file that Arrow reads them from."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from tidemill.storage.parallel import concurrently

_COALESCE_GAP: Final = 256 * 1024  # reading this much for nothing is cheaper than another request
_COALESCED_BYTES: Final = 32 * 2**20  # as Arrow does: then several requests at once are faster than a larger one


class Fetch(Protocol):
    """Read exactly `length` bytes from `start` of one pinned object."""

    def __call__(self, start: int, length: int) -> bytes: ...


class RangesFile(io.RawIOBase):
    """A read-only file over byte ranges fetched beforehand; what lies outside of them is fetched when asked for."""

    def __init__(self, size: int, fetch: Fetch) -> None:
        self._size, self._fetch, self._at = size, fetch, 0
        self._starts: list[int] = []
        self._chunks: list[memoryview] = []

    def load(self, ranges: Sequence[tuple[int, int]], concurrency: int) -> None:
        """Fetch [start, stop) ranges, each by one request, up to `concurrency` at once. The ranges are in order and apart."""
        chunks = concurrently(lambda wanted: self._fetch(wanted[0], wanted[1] - wanted[0]), ranges, concurrency)
        for (start, _), chunk in zip(ranges, chunks, strict=True):
            self.hold(start, chunk)

    def hold(self, start: int, data: bytes) -> None:
        """Keep bytes that lie after all that are held already."""
        self._starts.append(start)
        self._chunks.append(memoryview(data))

    def read(self, size: int | None = -1) -> Any:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        start, self._at = self._at, max(self._at, end)
        i = bisect_right(self._starts, start) - 1
        if i >= 0 and end - self._starts[i] <= len(self._chunks[i]):
            return self._chunks[i][start - self._starts[i] : end - self._starts[i]]
        return self._fetch(start, end - start) if end > start else b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError(f"offset {at} lies before the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def coalesced(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges. Those are joined that overlap, or lie at most `_COALESCE_GAP` apart and have `_COALESCED_BYTES` together."""
    begin, end = -1, -1
    for start, stop in sorted(ranges):
        small = start <= end + _COALESCE_GAP and stop - begin <= _COALESCED_BYTES
        if begin >= 0 and (start < end or small):  # a footer that lies may have many columns share the same bytes
            end = max(end, stop)
            continue
        if begin >= 0:
            yield begin, end
        begin, end = start, stop
    if begin >= 0:
        yield begin, end

"""Rows of a tensor that a version has changed: their blob, the blocks in which they lie, and rows over a segment."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tidemill.storage.pieces import BLOCK, Buffer
from tidemill.storage.refs import ChangedRows

Rows = NDArray[np.int64]
"""Numbers of rows, ascending, each once."""
Touched = Mapping[str, Rows]
"""By the name of a tensor: which of its rows may hold other bytes than in the version before; absent: any may."""


def changed_rows(buffer: Buffer, size: int, rows: Rows) -> list[Buffer]:
    """The blob of these rows of a tensor: their numbers, then their bytes."""
    numbers = memoryview(rows.astype("<i8").tobytes())
    if isinstance(buffer, memoryview):
        found = np.frombuffer(buffer, np.uint8).reshape(-1, size)[rows]
        return [numbers, memoryview(found.reshape(-1))]  # type: ignore[arg-type]  # numpy's arrays are buffers
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1  # on an accelerator: each run of neighbours at once
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)]
    return [numbers, *(buffer[begin * size : end * size] for begin, end in runs)]


def touched_blocks(size: int, rows: Rows) -> list[int]:
    """In which blocks of `pieces.BlockHash` rows of so many bytes lie."""
    first, last = rows * size // BLOCK, ((rows + 1) * size - 1) // BLOCK
    reach = int((last - first).max()) + 1
    found: list[int] = np.unique(np.concatenate([np.minimum(first + step, last) for step in range(reach)])).tolist()
    return found


class RowsOver:
    """Rows that lie over the bytes of a segment. Of two with one number the later one counts."""

    def __init__(self, changed: Sequence[ChangedRows], blobs: Sequence[bytes]) -> None:
        """Raises ValueError: the blobs are no rows of one length."""
        (self._row_bytes,) = {each.row_bytes for each in changed}
        numbers = [np.frombuffer(data, "<i8", each.rows) for each, data in zip(changed, blobs, strict=True)]
        # In each blob the numbers ascend. The first of equal ones is found, so that the last blob comes first.
        joined = np.concatenate(numbers[::-1])
        blob = np.repeat(np.arange(len(blobs))[::-1], [len(each) for each in numbers[::-1]])
        place = np.concatenate([np.arange(len(each)) for each in numbers[::-1]])
        self._numbers, first = np.unique(joined, return_index=True)
        self._blob, self._place = blob[first], place[first]
        self._rows = [memoryview(data)[8 * each.rows :] for each, data in zip(changed, blobs, strict=True)]

    def put(self, data: bytes, start: int) -> memoryview:
        """Bytes of the segment, from `start` on, with the rows over them."""
        size = self._row_bytes
        low = np.searchsorted(self._numbers, start // size, "left")
        high = np.searchsorted(self._numbers, (start + len(data) - 1) // size, "right")
        if low == high:
            return memoryview(data)
        found = memoryview(bytearray(data))
        chosen = (self._numbers[low:high], self._blob[low:high], self._place[low:high])
        for number, blob, place in zip(*(each.tolist() for each in chosen), strict=True):
            at = number * size - start
            begin, end = max(at, 0), min(at + size, len(data))
            found[begin:end] = self._rows[blob][place * size + begin - at : place * size + end - at]
        return found

"""Logs that store small files of tensors in segments too, as the product does large ones."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs
from tidemill.storage.pieces import Buffer
from tidemill.storage.refs import FileRef


class InSegments(VersionLog):
    """Files of any size are in segments, tensors of 64 bytes and more in one of their own."""

    segmented_above = 0
    least_segment = 64


class InRows(InSegments):
    """Knows which rows have changed, as a learner does that has noted them: here it compares them with the parent's."""

    def write_learner(
        self, number: int, pieces: Sequence[Sequence[Buffer]], parent: Blobs | None = None, touched: Any = None
    ) -> list[FileRef]:
        if parent is not None and touched is None:
            files = zip((parent.weights, parent.state), pieces, strict=True)
            touched = tuple(changed(self.read_blob(ref), b"".join(part)) for ref, part in files)
        return super().write_learner(number, pieces, parent, touched or ({}, {}))


def changed(before: bytes, now: bytes) -> dict[str, np.ndarray]:
    """Of each tensor that both files have, the rows that hold other bytes."""
    older, found = tensors(before), {}
    for name, rows in tensors(now).items():
        if name in older and older[name].shape == rows.shape:
            found[name] = np.flatnonzero((older[name] != rows).any(axis=1)).astype(np.int64)
    return found


def tensors(file: bytes) -> dict[str, np.ndarray]:
    """uint8 [rows, bytes of a row] of each tensor that has bytes."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        begin, end = (8 + size + at for at in about["data_offsets"])
        if end > begin:
            rows = (about["shape"] or [1])[0]
            found[name] = np.frombuffer(file[begin:end], np.uint8).reshape(rows, -1)
    return found

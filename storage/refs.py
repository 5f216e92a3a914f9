"""What a manifest says of the bytes of a version: blobs, and large files that are stored in segments.

`docs/format.md` tells the fields, `blobs.py` writes what they name.
"""

import hashlib
from collections.abc import Iterable
from typing import Self

from pydantic import Field, model_validator

from tidemill.storage.records import Record


class BlobRef(Record):
    """A blob by key, with what its bytes must be."""

    key: str
    """Below the registry."""
    bytes: int
    """Its size."""
    sha256: str

    @property
    def object_keys(self) -> tuple[str, ...]:
        """Of all objects that it needs."""
        return (self.key,)

    @property
    def units(self) -> "tuple[BlobRef, ...]":
        """What is stored and verified by itself, in the order of the file."""
        return (self,)


class TombstonesRef(BlobRef):
    """A blob of tombstones. Those of the shards that later versions consumed stand in the manifests of these."""

    version: int | None = None
    """The last version whose shards it has; None: the version that names it."""


class ChangedRows(BlobRef):
    """A blob of the rows of a segment that a version has changed: their numbers (int64, little-endian), then their bytes."""

    rows: int = Field(gt=0)
    """How many."""

    @property
    def row_bytes(self) -> int:
        """Of a row. Raises ValueError: they are no whole rows."""
        size, odd = divmod(self.bytes - 8 * self.rows, self.rows)
        if odd or size < 1:
            raise ValueError(f"{self.bytes} bytes are not {self.rows} rows with their numbers")
        return size


class Segment(Record):
    """A stretch of a file of tensors that is stored by itself: the header, a large tensor, or several smaller ones.

    Its bytes are those of the blob at `key`, with the rows of each of `changed` put over them, in order.
    """

    name: str
    """Of its first tensor; empty: the header."""
    key: str
    bytes: int
    sha256: str
    """Of its bytes as they are in this version, by blocks: `pieces.BlockHash`. So it does not tell how they are stored."""
    changed: tuple[ChangedRows, ...] | None = None

    @property
    def object_keys(self) -> tuple[str, ...]:
        """Of all objects that it needs."""
        return (self.key, *(each.key for each in self.changed or ()))

    @property
    def units(self) -> "tuple[Segment, ...]":
        """Itself."""
        return (self,)


class Segments(Record):
    """A large file that is stored in segments. One that a version has not changed is that of its parent. Since format 2.4."""

    bytes: int
    """Of the whole file."""
    sha256: str
    """Of the sha256 (32 bytes each) of the segments."""
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Self:
        """The file that these make."""
        found = tuple(segments)
        return cls(bytes=sum(each.bytes for each in found), sha256=_joint(found), segments=found)

    @property
    def object_keys(self) -> tuple[str, ...]:
        """Of all objects that it needs."""
        return tuple(key for segment in self.segments for key in segment.object_keys)

    @property
    def units(self) -> tuple[Segment, ...]:
        """What is stored and verified by itself, in the order of the file."""
        return self.segments

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.bytes, self.sha256) != (sum(each.bytes for each in self.segments), _joint(self.segments)):
            raise ValueError("bytes and sha256 of a file are not those of its segments")
        return self


Unit = BlobRef | Segment
"""What is stored and verified by itself."""
FileRef = BlobRef | Segments
"""A file of weights, or of a state."""


def _joint(segments: Iterable[Segment]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(each.sha256) for each in segments)).hexdigest()

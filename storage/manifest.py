"""The manifest: the JSON object whose creation is a commit. Its fields are documented one by one in `docs/format.md`."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tidemill.storage.errors import CorruptObject, UnsupportedFormat

FORMAT = 1


class Record(BaseModel):
    """Part of a manifest: immutable, and strict about its fields, so that a typo is an error and not a loss."""

    # "constants": by default pydantic would write NaN as null, and a number that cannot be stored would vanish unseen
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class BlobRef(Record):
    """A blob by name, with what its bytes must be."""

    key: str
    size: int
    sha256: str


class TombstonesRef(BlobRef):
    """A blob of tombstones. Those of the shards that later versions consumed stand in the manifests of these."""

    version: int | None = None
    """The last version whose shards it has; None: the version that names it."""


class Blobs(Record):
    """The blobs of one version."""

    weights: BlobRef
    state: BlobRef
    tombstones: TombstonesRef | None = None
    """None: all that was ever consumed stands in the manifests."""

    @property
    def refs(self) -> tuple[BlobRef, ...]:
        """All that there are."""
        return tuple(ref for ref in (self.weights, self.state, self.tombstones) if ref is not None)


class Parent(Record):
    """The version before, pinned by the sha256 of its manifest's bytes."""

    version: int
    sha256: str


class LabelShard(Record):
    """The shard of labels that a shard of features was joined with, and that was consumed with it."""

    inbox: str
    key: str
    sha256: str
    etag: str
    size: int
    last_modified: datetime
    column: str
    """The key column by which its rows were joined."""
    unmatched: int
    """Its rows that no feature row asked for."""


class Predicted(Record):
    """How the version that served when the features arrived does on them, now that their labels are known."""

    version: int
    score: dict[str, float]


class Consumed(Record):
    """A shard that this version was trained on."""

    inbox: str
    key: str
    sha256: str
    etag: str
    size: int
    last_modified: datetime
    ordinal: int
    """How many shards the model had consumed before this one; seeds its random numbers."""
    rows: int
    """Rows with a label; the others cannot be trained on."""
    unlabelled: int
    score: dict[str, float]
    """Prequential: of the model as it was before it trained on this shard."""
    champion: dict[str, float] = Field(default_factory=dict)
    """The champion's score on the same rows; empty if there was none to compare with."""
    loss: float | None = None
    """Mean over samples while training on it, last pass."""
    passes: int = 1
    """How many times its rows were trained on."""
    labels: LabelShard | None = None
    """Where its targets came from, if they arrived later."""
    predicted: Predicted | None = None


def consumed_objects(consumed: Iterable[Consumed]) -> Iterator[Consumed | LabelShard]:
    """The shards, each followed by that of its labels."""
    for shard in consumed:
        yield shard
        if shard.labels is not None:
            yield shard.labels


class Rejected(Record):
    """A shard that can never be used as it is."""

    inbox: str
    key: str
    sha256: str
    etag: str
    size: int
    last_modified: datetime
    reason: str


class Owed(Record):
    """An object that a committed version is done with, and that the inbox may still hold."""

    inbox: str
    key: str
    sha256: str
    etag: str
    then: Literal["delete", "archive", "quarantine"]
    to: str | None = None
    """Where it is copied first: URL of the archive, or key below the model's `quarantine/`."""
    reason: str | None = None


class Compared(Record):
    """One score of this version's learner and of the champion on the same rows; lower is better."""

    rows: int
    learner: float
    champion: float
    """On the holdout: the best of the champions since anyone but the gate moved the alias."""


class Gate(Record):
    """Whether the champion's alias moves to this version, and why."""

    champion: int
    """The version that had the alias."""
    moves: int
    """How often the alias had moved: it moves to this version only from there."""
    metric: str
    decision: Literal["promoted", "refused"]
    tolerance: float
    """The share by which the metric may be worse."""
    window: Compared
    """On the shards of the window, each before it was trained on."""
    holdout: Compared | None = None
    refusals: int
    """In a row, up to this one."""
    then: Literal["stop", "rollback", "retrain"] | None = None
    """What is to be done after so many."""

    @property
    def numbers(self) -> str:
        """What the decision rests on, in words."""
        compared = (("window", self.window), ("holdout", self.holdout))
        return "; ".join(
            f"{self.metric} {c.learner:.4g} against {c.champion:.4g} on {c.rows:,} rows of the {name}"
            for name, c in compared
            if c is not None
        )


class DatasetRef(Record):
    """What a batch run was trained on."""

    url: str
    fingerprint: str
    files: int
    rows: int


class Entry(Record):
    """What a run wants to commit; the log adds the rest."""

    kind: Literal["batch", "online", "rollback"]
    spec: dict[str, Any]
    blobs: Blobs
    consumed: tuple[Consumed, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    owed: tuple[Owed, ...] = ()
    fired: tuple[str, ...] = ()
    """Why its shards were trained on when they were: names of triggers. Absent if there was nothing to wait for."""
    gate: Gate | None = None
    """Whether the champion moves to this version; absent if there was nothing to compare."""
    new_columns: dict[str, str] = Field(default_factory=dict)
    """Arrow types of columns that shards have had since the last batch training, and its dataset had not."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    counters: dict[str, int] = Field(default_factory=dict)
    """What the learner has seen in all: epochs, shards, rows, steps."""
    dataset: DatasetRef | None = None
    run: str | None = None
    """Key of the batch run that made it: what makes a repeated run find its own result."""
    rolled_back_to: int | None = None
    code: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)


class Manifest(Entry):
    """One version, as stored."""

    format: Literal[1] = 1
    model: str
    version: int
    parent: Parent | None = None
    nonce: str
    """Unique to the attempt that wrote it: tells a lost answer from a lost race."""
    created: datetime


def encode(manifest: Manifest) -> bytes:
    """JSON of a manifest, with its checksum.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    return checked(manifest.model_dump(mode="json", exclude_none=True))


def decode(data: bytes, where: str) -> Manifest:
    """Parse a stored manifest.

    Raises:
        UnsupportedFormat: a newer Tidemill wrote it.
        CorruptObject: it is not what Tidemill wrote.
    """
    try:
        fields = json.loads(data)
        stated, found = fields.pop("checksum", None), fields.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise UnsupportedFormat(
                f"{where} has manifest format {found}; this Tidemill reads up to {FORMAT}. Upgrade Tidemill to go on."
            )
        if stated != _checksum(fields):
            raise CorruptObject(
                f"{where} was edited or damaged after it was committed (its checksum does not match). Restore the object, "
                "for example from a bucket version; Tidemill never continues from altered history."
            )
        return Manifest.model_validate(fields)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptObject(f"{where} is no Tidemill manifest: {error}") from error


def checked(fields: dict[str, Any]) -> bytes:
    """JSON of an object with a `checksum` over all of its fields, so that damage is noticed.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    return (json.dumps({**fields, "checksum": _checksum(fields)}, indent=1, allow_nan=False) + "\n").encode()


def verified(data: bytes) -> dict[str, Any]:
    """The fields that `checked` was given.

    Raises:
        ValueError, TypeError, AttributeError, RecursionError: it is something else, or was altered.
    """
    fields: dict[str, Any] = json.loads(data)
    if fields.pop("checksum", None) != _checksum(fields):
        raise ValueError("its checksum does not match")
    return fields


def sha256(data: bytes) -> str:
    """Hex digest, the form that manifests hold."""
    return hashlib.sha256(data).hexdigest()


def _checksum(fields: dict[str, Any]) -> str:
    return sha256(json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())

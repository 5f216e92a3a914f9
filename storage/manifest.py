"""The manifest: the JSON object whose creation is a commit. Its fields are documented one by one in `docs/format.md`."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final, Literal, Self

from pydantic import Field, model_serializer, model_validator

from tidemill.storage.errors import CorruptObject, UnsupportedFormat
from tidemill.storage.formats import from_format_1, parsed_format
from tidemill.storage.records import DatasetRef, Record, WarmStart
from tidemill.storage.refs import FileRef, TombstonesRef

FORMAT: Final = "2.4"
"""What this Tidemill writes, `major.minor`. It reads this and every lower one. A field's meaning never changes; a new field is
optional, and comes with a higher minor."""


class Blobs(Record):
    """The blobs of one version. Stored as a list of named parts, so that a later minor format can add some:
    `[{"name": "weights", "key": ..., "bytes": ..., "sha256": ...}, ...]`. Of a large file, `segments` stand in place of `key`."""

    weights: FileRef
    state: FileRef
    tombstones: TombstonesRef | None = None
    """None: all that was ever consumed stands in the manifests."""

    @property
    def refs(self) -> tuple[FileRef, ...]:
        """All that there are."""
        return tuple(ref for ref in (self.weights, self.state, self.tombstones) if ref is not None)

    @property
    def object_keys(self) -> frozenset[str]:
        """Of all objects that the version needs, whichever version has stored them."""
        return frozenset(key for ref in self.refs for key in ref.object_keys)

    @property
    def learner_keys(self) -> tuple[str, ...]:
        """Of those that weights and state need."""
        return (*self.weights.object_keys, *self.state.object_keys)

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        parts = {part["name"]: {name: value for name, value in part.items() if name != "name"} for part in given}
        if len(parts) != len(given):
            raise ValueError("two blobs have one name")
        return parts

    @model_serializer
    def _as_list(self) -> list[dict[str, Any]]:
        named = {"weights": self.weights, "state": self.state, "tombstones": self.tombstones}
        return [{"name": name, **ref.model_dump(exclude_none=True)} for name, ref in named.items() if ref is not None]


class Parent(Record):
    """The version before, pinned by the sha256 of its manifest's bytes."""

    version: int
    sha256: str


class ObjectRef(Record):
    """An object of an inbox that was read."""

    inbox: str
    """URL."""
    key: str
    sha256: str
    """With inbox and key: what makes it this object and no other."""
    etag: str
    """Under which it was read: pins its removal."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """(inbox, key, sha256)."""
        return self.inbox, self.key, self.sha256


class ShardRef(ObjectRef):
    """A shard as it was listed and read."""

    size: int
    """Bytes."""
    last_modified: datetime


class LabelShard(ShardRef):
    """The shard of labels that a shard of features was joined with, and that was consumed with it."""

    column: str
    """The key column by which its rows were joined."""
    unmatched: int
    """Its rows that no feature row asked for."""


class JoinedLabels(ShardRef):
    """A shard of labels that come row by row, from which rows of a shard of features have their labels."""

    column: str
    """The key column by which its rows were joined."""
    rows: int
    """Rows of the features whose label is from it."""


class OpenLabels(ShardRef):
    """A shard of labels that come row by row. Some of its rows are used: features that were consumed have their keys."""

    rows: int
    used: str
    """Which rows: a bit for each, the first one the lowest of the first byte; deflated (RFC 1950), as base64."""


class DoneLabels(ShardRef):
    """A shard of labels that come row by row, and that is of no more use: it is consumed."""

    rows: int
    unmatched: int
    """Rows whose keys no features had in time."""


class Predicted(Record):
    """How the version that served when the features arrived does on them, now that their labels are known."""

    version: int
    score: dict[str, float]


class Served(Record):
    """How the answers that a version gave do, as they stand in a log of requests, now that their labels are known."""

    version: int
    rows: int
    """Rows that it has answered and that have a label."""
    score: dict[str, float]


class Consumed(ShardRef):
    """A shard that this version was trained on."""

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
    labels: tuple[LabelShard, ...] = ()
    """Where its targets came from, if they arrived later, in a shard for this one."""
    joined: tuple[JoinedLabels, ...] | None = None
    """Where its targets came from, if they arrived later, row by row: of two labels of a row, the one of the later shard of these
    counts. Since format 2.2."""
    predicted: Predicted | None = None
    """Absent where the shard itself says what was answered (`served`)."""
    served: tuple[Served, ...] | None = None
    """One for each version whose answers stand in the shard. Since format 2.2."""


def consumed_objects(
    consumed: Iterable[Consumed], done: Iterable[DoneLabels] | None = None
) -> Iterator[Consumed | LabelShard | DoneLabels]:
    """The shards, each followed by those of its labels, and the shards of labels that are of no more use."""
    for shard in consumed:
        yield shard
        yield from shard.labels
    yield from done or ()


class Rejected(ShardRef):
    """A shard that can never be used as it is."""

    reason: str


class Owed(ObjectRef):
    """An object that a committed version is done with, and that the inbox may still hold."""

    action: Literal["delete", "archive", "quarantine"]
    destination: str | None = None
    """Where it is copied first: URL of the archive, or key below the model's `quarantine/`."""
    reason: str | None = None
    """Why it was rejected; `quarantine` only."""

    @classmethod
    def of(
        cls,
        ref: ObjectRef,
        action: Literal["delete", "archive", "quarantine"],
        destination: str | None = None,
        reason: str | None = None,
    ) -> Self:
        """The debt for an object that was consumed or rejected."""
        inbox, key, sha256 = ref.identity
        return cls(
            inbox=inbox, key=key, sha256=sha256, etag=ref.etag, action=action, destination=destination, reason=reason
        )


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
    recent: Compared
    """On the last shards, each before it was trained on."""
    holdout: Compared | None = None
    refusals: int
    """In a row, up to this one."""

    @property
    def numbers(self) -> str:
        """What the decision rests on, in words."""
        compared = (("last shards", self.recent), ("holdout", self.holdout))
        return "; ".join(
            f"{self.metric} {c.learner:.4g} against {c.champion:.4g} on {c.rows:,} rows of the {name}"
            for name, c in compared
            if c is not None
        )


class Entry(Record):
    """What a run wants to commit; the log adds the rest."""

    kind: Literal["batch", "online", "rollback"]
    spec: dict[str, Any]
    """As it was asked for."""
    resolved_spec: dict[str, Any] | None = None
    """The same, with what the spec leaves to the data and to defaults filled in. Absent in versions of format 1."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Arrow type of every column of the dataset of the last batch training, used or not. Absent in versions of format 1."""
    unused_columns: dict[str, str] = Field(default_factory=dict)
    """Columns that a pattern among the features has met, and that are no features: why. Of a batch training; since format 2.1."""
    blobs: Blobs
    consumed: tuple[Consumed, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    owed: tuple[Owed, ...] = ()
    open_labels: tuple[OpenLabels, ...] | None = None
    """Shards of labels that come row by row, used in part by this version or one before it. Each version carries them on until
    they are done. Since format 2.2."""
    done_labels: tuple[DoneLabels, ...] | None = None
    """Such shards that this version is done with. Since format 2.2."""
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
    init_from: WarmStart | None = None
    """What the learner of a batch training began with; None: with new weights. Since format 2.3."""
    run: str | None = None
    """Key of the batch run that made it: what makes a repeated run find its own result."""
    rolled_back_to: int | None = None
    code: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)

    @property
    def consumed_objects(self) -> Iterator[Consumed | LabelShard | DoneLabels]:
        """All objects that this version has consumed."""
        return consumed_objects(self.consumed, self.done_labels)


class Manifest(Entry):
    """One version, as stored."""

    format: str = FORMAT
    """`major.minor`, of the Tidemill that wrote it."""
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
        stated, written = fields.pop("checksum", None), fields.get("format")
        if parsed_format(written) > parsed_format(FORMAT):
            raise UnsupportedFormat(
                f"{where} has format {written}; this Tidemill reads up to {FORMAT}. Upgrade Tidemill to go on."
            )
        if stated != _checksum(fields):
            raise CorruptObject(
                f"{where} was edited or damaged after it was committed (its checksum does not match). Restore the object, "
                "for example from a bucket version; Tidemill never continues from altered history."
            )
        return Manifest.model_validate(from_format_1(fields) if written == 1 else fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptObject(
            f"{where} is no Tidemill manifest: {error!r}. Restore the object, for example from a bucket version."
        ) from error


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

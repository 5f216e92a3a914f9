"""The resumable progress of one batch run: `<model>/runs/<run key>/`. Nothing in it is a version; losing it costs time only.

run.json            {"after": head when the run began}: the run's own version, if any, has a higher number
<epoch>.json        a checkpoint; written after its blobs, so its existence means that they are whole
<epoch>-<uuid>.*    the blobs of a checkpoint
<epoch>.<rows>.json, <epoch>.<rows>-<uuid>.*  the same of one in the middle of the epoch after it
done.json           {"version": n}: the run has registered its version and moved the alias
source.json         below a key of its own: which version an alias named when a run began with its weights
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pydantic import Field

from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject, NotFound, StoreNotFound, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import checked, verified
from tidemill.storage.pieces import Buffer
from tidemill.storage.records import Record, WarmStart
from tidemill.storage.refs import BlobRef
from tidemill.storage.store import create_or_same
from tidemill.storage.streams import Stream

T = TypeVar("T")
Source = bytes | Stream
"""All bytes of a blob, or a large one as a stream."""

_BROKEN = (NotFound, UnknownVersion, CorruptObject, AttributeError, RecursionError, TypeError, ValueError)
"""What reading a damaged checkpoint raises."""


class Place(NamedTuple):
    """Where a checkpoint stands in a run. Later ones are greater."""

    epochs: int
    rows: int
    """Of the next epoch."""


_PLACE = re.compile(r"(\d{8})(?:\.(\d{12}))?[-.]")
"""How the names of a checkpoint and of its blobs begin."""


class Checkpoint(Record):
    """The learner after `epochs` epochs; of a search, of all learners that it has trained one after the other."""

    epochs: int
    losses: tuple[float, ...]
    """Mean loss over samples of each epoch so far."""
    holdout_losses: tuple[float, ...] = ()
    """Loss on the holdout after each epoch so far, where a run chooses its best epoch by it."""
    environment: dict[str, str | int] = Field(default_factory=dict)
    """What the bits depend on besides the inputs, where the last epoch was trained."""
    search: dict[str, Any] = Field(default_factory=dict)
    """Where a run stands that finds out how long to train. Empty: it does not."""
    resolved: dict[str, Any] = Field(default_factory=dict)
    """What the spec came to on this dataset. Empty in checkpoints that are older than this field: what was asked."""
    init_from: WarmStart | None = None
    """What the learner began with; None: with new weights."""
    midway: dict[str, Any] = Field(default_factory=dict)
    """Where the pass stands that the learner is in the middle of. Empty: it is between two."""
    weights: BlobRef
    state: BlobRef


@dataclass(frozen=True)
class BatchProgress:
    """What is stored of the batch run with this key."""

    log: VersionLog
    key: str

    @property
    def _prefix(self) -> str:
        return f"{self.log.model}/runs/{self.key}"

    def begin(self) -> None:
        """Note where the log stood, unless an earlier attempt of this run has."""
        after = self.log.head().number if self.log.exists() else -1
        create_or_same(self.log.store, f"{self._prefix}/run.json", checked({"after": after}))

    def finished(self) -> bool:
        """True if the run has registered its version and moved the alias."""
        return self.done() is not None

    def done(self) -> int | None:
        """The version of a run that has registered it and moved the alias, else None."""
        return self._number("done.json", "version")

    def registered(self) -> tuple[Version, bool] | None:
        """(the version that this run has committed, True if it also finished), or None."""
        if not self.log.exists():
            return None
        if (done := self.done()) is not None:
            version = self.log.version(done)
            if version.manifest.run == self.key:  # else the history went back behind it and on again
                return version, True
        if (after := self._number("run.json", "after")) is None:
            return None
        for version in self.log.history(self.log.head()):
            if version.number <= after:
                return None
            if version.manifest.run == self.key:
                return version, False
        return None

    def save(
        self,
        losses: tuple[float, ...],
        weights: bytes | Sequence[Buffer],
        state: bytes | Sequence[Buffer],
        holdout_losses: tuple[float, ...] = (),
        best: int | None = None,
        environment: Mapping[str, str | int] | None = None,
        resolved: Mapping[str, Any] | None = None,
        search: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        init_from: WarmStart | None = None,
        midway: Mapping[str, Any] | None = None,
        rows: int = 0,
    ) -> None:
        """Store a checkpoint after so many epochs, None: as many as there are losses; and of `rows` of the next epoch, if any.

        Then drop all but it, the one before, which an overlapping attempt may be reading, and that after `best` epochs.
        """
        refs, epochs = [], len(losses) if epochs is None else epochs
        place = f"{epochs:08d}.{rows:012d}" if rows else f"{epochs:08d}"
        for suffix, data in (("safetensors", weights), ("state.safetensors", state)):
            refs.append(self.log.write_blob_at(f"{self._prefix}/{place}", suffix, data))
        checkpoint = Checkpoint(
            epochs=epochs,
            losses=losses,
            holdout_losses=holdout_losses,
            environment=dict(environment or {}),
            search=dict(search or {}),
            resolved=dict(resolved or {}),
            init_from=init_from,
            midway=dict(midway or {}),
            weights=refs[0],
            state=refs[1],
        )
        self.log.store.write(f"{self._prefix}/{place}.json", checked(checkpoint.model_dump(mode="json")))
        self._drop_older(Place(epochs, rows), best)

    def latest(self, use: Callable[[Checkpoint, Source, Source], T]) -> T | None:
        """What `use` makes of the newest checkpoint that is whole, its weights and its state: see `VersionLog.read_blobs`."""
        found = {place: key for key, place in self._stored() if key.endswith(".json")}
        for _, key in sorted(found.items(), reverse=True):
            try:
                checkpoint = self._checkpoint(key)
            except _BROKEN:
                continue  # an older one, or the start, leads to the same bits
            try:
                return self._used(checkpoint, use)
            except (UnknownVersion, CorruptObject):
                continue
        return None

    def has_checkpoint(self) -> bool:
        """Whether there is any, whole or not: then the run has begun."""
        return any(key.endswith(".json") for key, _ in self._stored())

    def after(self, epochs: int, use: Callable[[Checkpoint, Source, Source], T]) -> T:
        """What `use` makes of the checkpoint after `epochs` epochs, its weights and its state.

        Raises:
            CorruptObject: it is damaged or gone.
        """
        key = f"{self._prefix}/{epochs:08d}.json"
        damaged = f"{self.log.store.url}/{key}, the best epoch, is damaged or gone"
        remedy = f"Delete {self._prefix} and train again."
        try:
            checkpoint = self._checkpoint(key)
        except _BROKEN as error:
            raise CorruptObject(f"{damaged}: {error}. {remedy}") from error
        try:
            return self._used(checkpoint, use)
        except (UnknownVersion, CorruptObject) as error:
            raise CorruptObject(f"{damaged}: {error}. {remedy}") from error

    def _checkpoint(self, key: str) -> Checkpoint:
        return Checkpoint.model_validate(verified(self.log.store.read(key)))

    def _used(self, checkpoint: Checkpoint, use: Callable[[Checkpoint, Source, Source], T]) -> T:
        return self.log.read_blobs(
            (checkpoint.weights, checkpoint.state), lambda weights, state: use(checkpoint, weights, state)
        )

    def finish(self, version: Version) -> None:
        """Record that nothing is left to do, and drop the checkpoints."""
        self.log.store.write(f"{self._prefix}/done.json", checked({"version": version.number}))
        self._drop([key for key, _ in self._stored()])

    def _stored(self) -> list[tuple[str, Place]]:
        """The keys of all checkpoints and of their blobs, and where each one stands."""
        found = []
        for info in self.log.store.list(f"{self._prefix}/0"):
            match = _PLACE.match(info.key.removeprefix(f"{self._prefix}/"))
            if match is not None:
                found.append((info.key, Place(int(match[1]), int(match[2] or 0))))
        return found

    def _drop_older(self, last: Place, best: int | None) -> None:
        """Drop what is older than the last checkpoint, but for the one before it, and for that after the best epoch."""
        older = [(key, place) for key, place in self._stored() if place < last]
        kept = {Place(-1 if best is None else best, 0)}
        kept.add(max((place for key, place in older if key.endswith(".json")), default=last))
        self._drop([key for key, place in older if place not in kept])

    def _drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self.log.store.delete(key)
            except NotFound:
                continue  # an overlapping attempt was faster

    def _number(self, name: str, field: str) -> int | None:
        """The number in `<name>`, or None if there is no such object."""
        key = f"{self._prefix}/{name}"
        try:
            return int(verified(self.log.store.read(key))[field])
        except (NotFound, StoreNotFound):  # a registry on a disk begins with its first object
            return None
        except (AttributeError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _damaged(self.log, key, error) from error


def _damaged(log: VersionLog, key: str, error: Exception) -> CorruptObject:
    return CorruptObject(
        f"{log.store.url}/{key} is damaged: {error!r}. Delete it; at worst the batch run trains again."
    )


def pin_source(log: VersionLog, asked: str, source: Mapping[str, Any]) -> None:
    """Store which source the run that is asked for under `asked` begins with, in place of that of an earlier run."""
    log.store.write(_source_key(log, asked), checked({"source": dict(source)}))


def pinned_source(log: VersionLog, asked: str) -> dict[str, Any] | None:
    """What `pin_source` stored; None: nothing.

    Raises:
        CorruptObject: it is damaged.
    """
    key = _source_key(log, asked)
    try:
        return dict(verified(log.store.read(key))["source"])
    except (NotFound, StoreNotFound):
        return None
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(log, key, error) from error


def _source_key(log: VersionLog, asked: str) -> str:
    return f"{log.model}/runs/{asked}/source.json"


def newest_registered(log: VersionLog, below: int) -> Version | None:
    """The newest version below a number that a batch run has registered, found by the records of the runs that are done."""
    prefix, numbers = f"{log.model}/runs/", set[int]()
    for info in log.store.list(prefix):
        key, _, name = info.key.removeprefix(prefix).partition("/")
        if name == "done.json" and (number := BatchProgress(log, key).done()) is not None and number < below:
            numbers.add(number)
    return log.older(max(numbers)) if numbers else None

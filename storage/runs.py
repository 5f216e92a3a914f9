"""The resumable progress of one batch run: `<model>/runs/<run key>/`. Nothing in it is a version; losing it costs time only.

run.json            {"after": head when the run began}: the run's own version, if any, has a higher number
<epoch>.json        a checkpoint; written after its blobs, so its existence means that they are whole
<epoch>-<uuid>.*    the blobs of a checkpoint
done.json           {"version": n}: the run has registered its version and moved the alias
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject, NotFound, StoreNotFound, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import BlobRef, checked, sha256, verified
from tidemill.storage.records import Record
from tidemill.storage.store import create_or_same

_BROKEN = (NotFound, UnknownVersion, CorruptObject, AttributeError, RecursionError, TypeError, ValueError)
"""What reading a damaged checkpoint raises."""


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
        weights: bytes,
        state: bytes,
        holdout_losses: tuple[float, ...] = (),
        best: int | None = None,
        environment: Mapping[str, str | int] | None = None,
        resolved: Mapping[str, Any] | None = None,
        search: Mapping[str, Any] | None = None,
        epochs: int | None = None,
    ) -> None:
        """Store a checkpoint after so many epochs; None: as many as there are losses.

        Then drop all but it, the one before, which an overlapping attempt may be reading, and that after `best` epochs.
        """
        refs, epochs = [], len(losses) if epochs is None else epochs
        for suffix, data in (("safetensors", weights), ("state.safetensors", state)):
            key = f"{self._prefix}/{epochs:08d}-{uuid.uuid4().hex}.{suffix}"
            self.log.store.write(key, data)
            refs.append(BlobRef(key=key, bytes=len(data), sha256=sha256(data)))
        checkpoint = Checkpoint(
            epochs=epochs,
            losses=losses,
            holdout_losses=holdout_losses,
            environment=dict(environment or {}),
            search=dict(search or {}),
            resolved=dict(resolved or {}),
            weights=refs[0],
            state=refs[1],
        )
        self.log.store.write(f"{self._prefix}/{epochs:08d}.json", checked(checkpoint.model_dump(mode="json")))
        self._drop(before=epochs - 1, best=best)

    def latest(self) -> tuple[Checkpoint, bytes, bytes] | None:
        """The newest checkpoint that is whole, with its verified weights and state."""
        keys = [info.key for info in self.log.store.list(f"{self._prefix}/0") if info.key.endswith(".json")]
        for key in sorted(keys, reverse=True):
            try:
                return self._checkpoint(key)
            except _BROKEN:
                continue  # an older one, or the start, leads to the same bits
        return None

    def after(self, epochs: int) -> tuple[Checkpoint, bytes, bytes]:
        """The checkpoint after `epochs` epochs.

        Raises:
            CorruptObject: it is damaged or gone.
        """
        key = f"{self._prefix}/{epochs:08d}.json"
        try:
            return self._checkpoint(key)
        except _BROKEN as error:
            raise CorruptObject(
                f"{self.log.store.url}/{key}, the best epoch, is damaged or gone: {error}. Delete {self._prefix} and train again."
            ) from error

    def _checkpoint(self, key: str) -> tuple[Checkpoint, bytes, bytes]:
        checkpoint = Checkpoint.model_validate(verified(self.log.store.read(key)))
        return checkpoint, self.log.read_blob(checkpoint.weights), self.log.read_blob(checkpoint.state)

    def finish(self, version: Version) -> None:
        """Record that nothing is left to do, and drop the checkpoints."""
        self.log.store.write(f"{self._prefix}/done.json", checked({"version": version.number}))
        self._drop(before=None)

    def _drop(self, before: int | None, best: int | None = None) -> None:
        for info in list(self.log.store.list(f"{self._prefix}/0")):
            epoch = re.match(r"\d{8}", info.key.removeprefix(f"{self._prefix}/"))
            if epoch is not None and int(epoch[0]) != best and (before is None or int(epoch[0]) < before):
                try:
                    self.log.store.delete(info.key)
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
            raise CorruptObject(
                f"{self.log.store.url}/{key} is damaged: {error!r}. Delete it; at worst the batch run trains again."
            ) from error


def newest_registered(log: VersionLog, below: int) -> Version | None:
    """The newest version below a number that a batch run has registered, found by the records of the runs that are done."""
    prefix, numbers = f"{log.model}/runs/", set[int]()
    for info in log.store.list(prefix):
        key, _, name = info.key.removeprefix(prefix).partition("/")
        if name == "done.json" and (number := BatchProgress(log, key).done()) is not None and number < below:
            numbers.add(number)
    return log.older(max(numbers)) if numbers else None

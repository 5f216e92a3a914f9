"""Where the learner goes back to when something fails on a shard: as it was committed, or after some shards more."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from tidemill.storage.errors import StorageError
from tidemill.storage.log import VersionLog
from tidemill.storage.refs import BlobRef
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.spec import Spec

KEPT_BYTES: Final = 64 * 2**20
"""Bytes of a stored learner above which it is kept in the store, and not in memory beside the one in training."""


@dataclass(frozen=True)
class KeptLearner:
    """A learner as it was, in memory or in blobs of the version that is coming, which no manifest will name."""

    spec: Spec
    device: str
    dumped: tuple[bytes, bytes] | None
    stored: tuple[BlobRef, BlobRef] | None = None

    @classmethod
    def of(cls, learner: Learner, log: VersionLog, number: int, device: str) -> "KeptLearner":
        """Keep the learner on which version `number` may be built. Raises StorageError, HeadMoved: it could not be stored."""
        if learner.stored_bytes <= KEPT_BYTES:
            return cls(learner.spec, device, learner.dump())
        weights, state = learner.pieces()
        stored = log.write_blob(number, "safetensors", weights), log.write_blob(number, "state.safetensors", state)
        return cls(learner.spec, device, None, stored)

    def load(self, log: VersionLog) -> Learner:
        """The learner, bit for bit. Raises what `Learner.load` and `VersionLog.read_blobs` raise."""
        if self.dumped is not None:
            return Learner.load(self.spec, *self.dumped, self.device)
        assert self.stored is not None, "it is in the one place or in the other"
        return log.read_blobs(self.stored, lambda *blobs: Learner.load(self.spec, blobs[0], blobs[1], self.device))

    def drop(self, log: VersionLog) -> None:
        """Remove it from the store. What stays because the store is away, garbage collection removes."""
        for ref in self.stored or ():
            with suppress(StorageError):
                log.store.delete(ref.key)

"""The model of a backtest: a history of its own that follows the log's, with a version now and then."""

from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Final

from tidemill.storage.chain import Version
from tidemill.storage.errors import NotFound
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Consumed, Entry, consumed_objects
from tidemill.storage.refs import TombstonesRef
from tidemill.tasks.scores import Summary
from tidemill.tasks.training.environment import code_revision, environment
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.versions import resolved_spec

REACHED: Final = "backtest"
"""Among the metrics of an online version: `{"version", "sha256"}` of the log's version that it has come to. A batch version and a
rollback have come to one more than the version before them."""


def followed_by(version: Version) -> str | None:
    """The sha256 of the manifest of the log that an online version of a backtest has come to."""
    return str(version.manifest.metrics[REACHED]["sha256"]) if version.manifest.kind == "online" else None


class Kept:
    """What is stored of a backtest, and what is added to it."""

    def __init__(self, log: VersionLog, needed: Container[int]) -> None:
        """`needed`: versions of the log to which it goes back later, so that the blobs of them are kept."""
        self.log, self.needed = log, needed
        self.reached: dict[int, Version] = {}
        """Version of the log that was followed -> the version here that has come to it."""

    def read(self) -> None:
        """Find out what is stored."""
        self.reached = {}
        if not self.log.exists():
            return
        at = -1
        for version in list(self.log.history(self.log.head()))[::-1]:
            at = int(version.manifest.metrics[REACHED]["version"]) if version.manifest.kind == "online" else at + 1
            self.reached[at] = version

    @property
    def at(self) -> int:
        """The version of the log that this has come to; -1: nothing is stored."""
        return max(self.reached, default=-1)

    @property
    def head(self) -> Version | None:
        return self.reached.get(self.at)

    def copy(self, original: VersionLog, version: Version) -> None:
        """Take over a batch version of the log.

        Raises:
            UnknownVersion: retention has removed its blobs.
        """
        manifest, head = version.manifest, self.head
        number = 0 if head is None else head.number + 1
        weights, state = self.log.copy_blobs(number, manifest.blobs, original)
        entry = Entry(
            kind="batch",
            spec=manifest.spec,
            resolved_spec=manifest.resolved_spec,
            columns=manifest.columns,
            unused_columns=manifest.unused_columns,
            blobs=Blobs(
                weights=weights,
                state=state,
                tombstones=self.log.carried_tombstones(head),
            ),
            metrics=manifest.metrics,
            counters=manifest.counters,
            dataset=manifest.dataset,
            code=manifest.code,
            environment=manifest.environment,
        )
        self.add(version.number, self.log.commit(head, entry))

    def trained_on(self, fingerprint: str) -> Version | None:
        """A batch version that was made from the dataset with this fingerprint."""
        for version in self.reached.values():
            dataset = version.manifest.dataset
            if version.manifest.kind == "batch" and dataset is not None and dataset.fingerprint == fingerprint:
                return version
        return None

    def go_back(self, number: int, target: Version) -> None:
        """Come to a version of the log by going back to an older version here."""
        self.add(number, self.log.rollback(target, self.head))

    def commit(self, number: int, sha256: str, learner: Learner, consumed: Sequence[Consumed]) -> None:
        """Store the learner that has come to a version of the log, and what it was trained on since the last one here."""
        parent = self.head
        assert parent is not None, "a log begins with a batch training"
        following, summary = parent.number + 1, Summary.of(consumed)
        cumulative = Summary.model_validate(parent.manifest.metrics.get("cumulative", {}))
        cumulative.add(consumed)
        refs = self.log.write_learner(following, learner.pieces(), parent.manifest.blobs)
        entry = Entry(
            kind="online",
            spec=parent.manifest.spec,
            resolved_spec=resolved_spec(learner),
            columns=parent.manifest.columns,
            blobs=Blobs(weights=refs[0], state=refs[1], tombstones=self._tombstones(parent, consumed)),
            consumed=tuple(consumed),
            metrics={
                **summary.score.mean,
                "cumulative": cumulative.model_dump(),
                REACHED: {"version": number, "sha256": sha256},
            },
            counters=asdict(learner.counters),
            code=code_revision(),
            environment=environment(),
        )
        self.add(number, self.log.commit(parent, entry))

    def add(self, number: int, version: Version) -> None:
        """Take in the version here that has come to a version of the log: the weights of the one before may be in the way."""
        at, before = self.at, self.head
        self.reached[number] = version
        if before is not None and before.manifest.kind != "batch" and at not in self.needed:
            self._drop(before)

    def _tombstones(self, parent: Version, consumed: Sequence[Consumed]) -> TombstonesRef | None:
        if not self.log.tombstones_due(parent, len(consumed)):
            return self.log.named_tombstones(parent)
        found = self.log.tombstones(parent)
        for shard in consumed_objects(consumed):
            found.add(shard.inbox, shard.key, shard.sha256, shard.etag)
        return self.log.write_tombstones(parent.number + 1, found)

    def _drop(self, version: Version) -> None:
        """Remove the weights and state of a version that nothing goes on from any more."""
        going = [each for at, each in self.reached.items() if each.manifest.kind == "batch" or at in self.needed]
        kept = {key for each in (*going, self.head) if each is not None for key in each.manifest.blobs.object_keys}
        for key in set(version.manifest.blobs.learner_keys) - kept:
            try:
                self.log.store.delete(key)
            except NotFound:
                continue

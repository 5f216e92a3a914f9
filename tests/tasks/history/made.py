"""Histories as runs leave them, made without training: manifests are all that the rooms of a history read."""

import math
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from tidemill.storage.chain import Version
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import (
    Blobs,
    Compared,
    Consumed,
    DatasetRef,
    Entry,
    Gate,
    Manifest,
    Parent,
    Rejected,
    encode,
    sha256,
)
from tidemill.storage.memory import MemoryStore
from tidemill.storage.refs import BlobRef
from tidemill.tasks.scores import Summary

BEGAN: Final = datetime(2026, 3, 1, tzinfo=UTC)
SPEC: Final = {
    "features": [{"name": "distance", "kind": "number"}, {"name": "carrier", "kind": "category"}],
    "target": "delay",
    "task": "regression",
    "model": {"factory": "mlp", "arguments": {"hidden": [64, 32]}},
    "optimizer": {"name": "adam", "arguments": {}},
    "learning_rate": 0.001,
    "batch_size": 256,
    "epochs": 5,
    "loss": "l1",
}


class Story:
    """A history that is written version by version, with times that are told, not taken."""

    def __init__(self, model: str = "flights", spec: Mapping[str, Any] = SPEC) -> None:
        self.log = VersionLog(MemoryStore(uuid.uuid4().hex), model)
        self.spec, self.shards = dict(spec), 0
        self._parent: Version | None = None
        self._summary = Summary()

    def batch(self, losses: Iterable[float] = (3.0, 2.0, 1.5), **metrics: Any) -> Version:
        """A batch training."""
        self._summary = Summary()
        scores = {"epoch_loss": list(losses), "holdout_rows": 40, "holdout": {"loss": 1.6, "mae": 1.6, "rmse": 2.0}}
        dataset = DatasetRef(url="s3://bucket/data", fingerprint="f" * 64, files=3, rows=400)
        return self._commit(kind="batch", metrics=scores | metrics, dataset=dataset)

    def online(
        self,
        scores: Iterable[float | None],
        *,
        champion: float | None = 2.0,
        metric: str = "mae",
        rows: int = 100,
        decision: str | None = "promoted",
        rejected: Mapping[str, str] = {},  # only read
        keys: Iterable[str] | None = None,
    ) -> Version:
        """A commit of shards with these scores; None: the metric could not be computed."""
        scores = list(scores)
        names = list(keys or (f"{self.shards + i:06d}.parquet" for i in range(len(scores))))
        consumed = tuple(
            Consumed(
                **_object(name),
                ordinal=self.shards + i,
                rows=rows,
                unlabelled=0,
                score={} if score is None else {metric: score},
                champion={} if champion is None else {metric: champion},
                loss=0.5,
            )
            for i, (name, score) in enumerate(zip(names, scores, strict=True))
        )
        self.shards += len(consumed)
        self._summary.add(consumed)
        gate = None
        if decision is not None and consumed:
            compared = Compared(rows=rows, learner=next(s for s in scores if s is not None), champion=champion or 0.0)
            number = self._parent.number if self._parent is not None else 0
            gate = Gate(
                champion=number,
                moves=3,
                metric=metric,
                decision=decision,
                tolerance=0.05,
                recent=compared,
                refusals=int(decision == "refused"),
            )
        return self._commit(
            kind="online",
            consumed=consumed,
            rejected=tuple(Rejected(**_object(key), reason=reason) for key, reason in rejected.items()),
            gate=gate,
            metrics={"cumulative": self._summary.model_dump(), "recent": Summary.of(consumed).model_dump()},
        )

    def rollback(self, number: int) -> Version:
        """Back to a version."""
        return self._commit(kind="rollback", rolled_back_to=number)

    def rewind(self, number: int) -> None:
        """As if a backup had been restored: nothing after this version has ever been."""
        assert self._parent is not None
        for gone in range(number + 1, self._parent.number + 1):
            self.log.store.delete(self.log.manifest_key(gone))
        self._parent = self.log.version(number)

    def _commit(self, **fields: Any) -> Version:
        blob = BlobRef(key="none", bytes=1234, sha256="ab" * 32)
        number = 0 if self._parent is None else self._parent.number + 1
        entry = Entry(
            spec=self.spec,
            blobs=Blobs(weights=blob, state=blob),
            counters={"epochs": 5, "shards": self.shards},
            code="tidemill 0.1.0",
            environment={"torch": "2.13.0", "threads": 1},
            **fields,
        )
        parent = None if self._parent is None else Parent(version=self._parent.number, sha256=self._parent.sha256)
        manifest = Manifest(
            **dict(entry),
            model=self.log.model,
            version=number,
            parent=parent,
            nonce="n",
            created=BEGAN + timedelta(hours=number),
        )
        data = encode(manifest)
        self.log.store.create(self.log.manifest_key(number), data)
        self._parent = Version(manifest, sha256(data))
        return self._parent


def _object(key: str) -> dict[str, Any]:
    return {
        "inbox": "s3://bucket/inbox",
        "key": key,
        "sha256": "cd" * 32,
        "etag": '"e"',
        "size": 10,
        "last_modified": BEGAN,
    }


def wave(number: int) -> float:
    """An error that goes up and down, as those of days and nights do."""
    return 20 + 5 * math.sin(number / 7) + (number % 5)

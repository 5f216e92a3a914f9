"""What MLflow is told of versions, in our own words: numbers with their steps, and what they were trained on."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tidemill.storage.chain import Version
from tidemill.storage.manifest import Manifest
from tidemill.tasks.scores import Summary


class Value(NamedTuple):
    """One point of a metric."""

    name: str
    value: float
    step: int
    """An epoch of a batch training, else the number of the version."""
    milliseconds: int
    """When its version was made, since 1970."""


class Input(NamedTuple):
    """Rows that a version was trained on."""

    name: str
    digest: str
    """sha256 of a shard, fingerprint of a dataset."""
    url: str
    rows: int


@dataclass(frozen=True)
class Publication:
    """A version with all that MLflow is told of it."""

    version: Version
    values: list[Value]
    """Of this version, and of those between the one that was published before it and this one."""
    inputs: list[Input]
    """Of the same versions."""


def measured(version: Version) -> list[Value]:
    """The numbers of one version. Of an online version: its shards, each scored before it was trained on, weighted by rows."""
    manifest = version.manifest
    found = list(_named(manifest.metrics, "")) if manifest.kind == "batch" else list(_online(manifest))
    when = milliseconds(manifest)
    return [
        Value(name, value, manifest.version if step is None else step, when)
        for name, value, step in found
        if math.isfinite(value)
    ]


def _online(manifest: Manifest) -> Iterator[tuple[str, float, None]]:
    if not manifest.consumed:
        return
    summary = Summary.of(manifest.consumed)
    yield "rows", float(summary.rows), None
    for who, means in (("score", summary.score), ("champion", summary.champion)):
        for name, value in means.mean.items():
            yield f"{who}/{name}", value, None


def _named(metrics: Mapping[str, Any], above: str) -> Iterator[tuple[str, float, int | None]]:
    """(name, value, epoch) of every number in the metrics of a batch training; those in lists are one for each epoch."""
    for name, found in metrics.items():
        if isinstance(found, Mapping):
            yield from _named(found, f"{above}{name}/")
        elif isinstance(found, list | tuple):
            for epoch, each in enumerate(found):
                if isinstance(each, Mapping):
                    yield from ((inner, value, epoch) for inner, value, _ in _named(each, f"{above}{name}/"))
                elif _is_number(each):
                    yield f"{above}{name}", float(each), epoch
        elif _is_number(found):
            yield f"{above}{name}", float(found), None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def trained_on(version: Version) -> list[Input]:
    """The dataset of a batch training, or the shards of an online version, with those of their labels."""
    manifest = version.manifest
    dataset = manifest.dataset if manifest.kind == "batch" else None
    found = [] if dataset is None else [Input(dataset.url, dataset.fingerprint, dataset.url, dataset.rows)]
    for shard in manifest.consumed:
        found.append(Input(shard.key, shard.sha256, f"{shard.inbox.removesuffix('/')}/{shard.key}", shard.rows))
        found += [
            Input(labels.key, labels.sha256, f"{labels.inbox.removesuffix('/')}/{labels.key}", shard.rows)
            for labels in (*shard.labels, *(shard.joined or ()))
        ]
    return found


def milliseconds(manifest: Manifest) -> int:
    """When a version was made, since 1970."""
    return int(manifest.created.timestamp() * 1000)

"""A history made again: train again on the archived shards, in the recorded order, and compare all bits."""

import logging
import math
from collections.abc import Sequence

from pydantic import BaseModel

from tidemill.progress import each
from tidemill.storage.chain import Version
from tidemill.storage.disposal import archive_keys
from tidemill.storage.errors import CorruptObject, NotFound, ShardRejected, StoreNotFound, UnknownVersion
from tidemill.storage.inbox import Shard
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Consumed, JoinedLabels, ShardRef, sha256
from tidemill.storage.parquet import RowGroup as FileGroup
from tidemill.storage.pieces import Buffers
from tidemill.storage.records import IN_MEMORY
from tidemill.storage.segments import is_of
from tidemill.storage.store import ObjectInfo, Store
from tidemill.tasks.online.labels import Labels
from tidemill.tasks.online.latest import LabelRows, join_again
from tidemill.tasks.training.environment import differences, environment
from tidemill.tasks.training.errors import TrainingError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult, Score, score, train_shard
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.versions import load_learner

logger = logging.getLogger("tidemill.reproduce")


class Reproduction(BaseModel):
    """What was made again. All of it has the bits of the first time if `findings` is empty."""

    reproduced: int = 0
    """Online versions that were made again from the one before."""
    skipped: int = 0
    """Online versions that could not be: retention had removed the blobs to start from, or several ranks had trained them without
    parts."""
    shards: int = 0
    findings: list[str] = []


def reproduce(log: VersionLog, archives: Sequence[Store]) -> Reproduction:
    """Start from the stored weights of version 0 (or the oldest that retention has left) and train through to the head.

    A batch version or a rollback is loaded, every online version is trained and its weights and state are compared with
    the sha256 in its manifest. Shards are looked for in `archives`, one after the other. Memory: a learner and a shard.
    """
    result = Reproduction()
    steps: Steps | None = None
    for number in each("training again", range(log.head().number + 1), unit="versions"):
        version = log.version(number)
        if version.manifest.kind != "online":
            trained_on = version.manifest.dataset
            if version.manifest.kind == "batch" and trained_on is not None and trained_on.url == IN_MEMORY:
                logger.info("version %d was trained on a table in memory: to train it again needs that table", number)
            steps = _stored(log, version)
            if steps is None and (dataset := version.manifest.dataset) is not None:
                needed = "the table in memory" if dataset.url == "memory:" else dataset.url
                logger.info("version %d has no weights any more: to make it again, train on %s", number, needed)
            continue
        if steps is None:
            result.skipped += 1
            steps = _stored(log, version)
            continue
        if (ranks := version.manifest.environment.get("ranks")) is not None:
            result.skipped += 1
            logger.info(
                "version %d was trained by %s ranks without parts: no other number of them has its bits", number, ranks
            )
            steps = _stored(log, version)
            continue
        try:
            for consumed in version.manifest.consumed:
                train_again(steps, consumed, archives)
                result.shards += 1
        except (NotFound, ShardRejected, TrainingError) as error:
            result.findings.append(f"version {number} cannot be reproduced: {error}")
            steps = _stored(log, version)
            continue
        result.reproduced += 1
        if not _same(steps.learner, version):
            changed = "; ".join(differences(version.manifest.environment, environment()))
            result.findings.append(
                f"version {number}: the shards that it names give other weights or another state than it has"
                + (f" (but bits may differ here: {changed})" if changed else "")
            )
            steps = _stored(log, version)
        logger.info("version %d: %d shards trained on again", number, len(version.manifest.consumed))
    return result


def _stored(log: VersionLog, version: Version) -> Steps | None:
    """Of the learner as it was committed; None if retention has removed it, or if it is no longer that (`audit`)."""
    try:
        return Steps(load_learner(log, version))
    except (UnknownVersion, CorruptObject):
        return None


def _same(learner: Learner, version: Version) -> bool:
    blobs = version.manifest.blobs
    files = zip((blobs.weights, blobs.state), learner.pieces(), strict=True)
    return all(is_of(ref, Buffers(part)) for ref, part in files)


def train_again(
    steps: Steps, consumed: Consumed, archives: Sequence[Store], *, scored: bool = False
) -> tuple[Score | None, PassResult]:
    """Train on an archived shard as the log says that it was trained on: (the score before, if `scored`; the training).

    Raises:
        NotFound, ShardRejected: as `archived_groups`.
        TrainingError: the learner is then half trained and must be loaded again.
    """
    if not consumed.rows:  # no label came in time: it is counted, and that is all
        steps.learner.counters.shards += 1
        nothing = PassResult(0, 0, math.nan, consumed.unlabelled)
        return Score(0, math.nan) if scored else None, nothing
    groups = archived_groups(consumed, archives, steps.learner.features)
    before = score(steps.learner, groups) if scored else None
    labelled = None if before is None else before.rows
    return before, train_shard(steps, groups, consumed.passes, labelled=labelled)


def archived_groups(consumed: Consumed, archives: Sequence[Store], features: Features) -> Sequence[RowGroup]:
    """What was trained on, labels joined. Raises NotFound, and ShardRejected: they do not fit together any more."""
    groups = _found(consumed, archives).row_groups(features.types)
    if consumed.joined is not None:
        return _joined_again(groups, consumed.joined, archives, features)
    if not consumed.labels:
        return groups
    (labels,) = consumed.labels  # Tidemill joins with one shard of labels
    found = _found(labels, archives).row_groups(features.types)
    return Labels(found, labels.column, features.targets).join(groups).groups


def _joined_again(
    groups: Sequence[FileGroup], joined: Sequence[JoinedLabels], archives: Sequence[Store], features: Features
) -> Sequence[RowGroup]:
    """The same where labels came row by row. Raises as `archived_groups`."""
    key = joined[0].column if joined else ""
    shards = [LabelRows(_found(each, archives).row_groups(features.types), key, features.targets) for each in joined]
    return join_again(groups, shards, key, features.targets, features.types)


def _found(consumed: ShardRef, archives: Sequence[Store]) -> Shard:
    """Raises NotFound: no archive holds exactly these bytes."""
    others: list[str] = []
    for archive in archives:
        for key in archive_keys(consumed.key, consumed.sha256):
            try:
                data = archive.read(key)
            except (NotFound, StoreNotFound):
                continue
            if sha256(data) == consumed.sha256:
                info = ObjectInfo(consumed.key, consumed.size, consumed.etag, consumed.last_modified)
                return Shard(consumed.inbox, info, data, consumed.sha256)
            others.append(f"{archive.url}/{key} holds other bytes, with sha256 {sha256(data)}")
    where = ", ".join(archive.url for archive in archives) or "no archive"
    changed = f": {'; '.join(others)}" if others else ""
    raise NotFound(f"{where} holds no shard {consumed.key!r} with sha256 {consumed.sha256}{changed}")

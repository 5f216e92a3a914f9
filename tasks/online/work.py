"""One shard after the other: scored, trained on, or rejected. What of that is not committed yet lives in memory alone.

A shard on which the model, the loss or Arrow fails is rejected only if it is shown to be at fault: the learner, read anew,
fails on it again, and takes a step on another shard that waits, or on made-up rows where no other can be trained on. Else the
model is at fault: a bad deploy must not empty an inbox into quarantine.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from tidemill import progress
from tidemill.storage.chain import Version
from tidemill.storage.errors import HeadMoved, ShardRejected, StorageError, UnknownVersion, on_one_line
from tidemill.storage.inbox import Shard
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Consumed, Gate, LabelShard, ObjectRef, Owed, Predicted, Rejected, consumed_objects
from tidemill.storage.store import ObjectInfo
from tidemill.storage.tombstones import Tombstones
from tidemill.tasks.online.gate import Champion
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.reading import Kept, Later, Readable, Reader, Unusable, may_be_the_shards
from tidemill.tasks.online.triggers import Judged, Trigger
from tidemill.tasks.scores import Summary
from tidemill.tasks.settings import Limits, OnlineSettings, Triggers
from tidemill.tasks.training.errors import ColumnError, ModelFails, NonFiniteLoss, described, of_the_machine
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult, score, train_shard
from tidemill.tasks.training.made_up import made_up
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.versions import load_learner

logger = logging.getLogger("tidemill.online")

SUSPECTS: Final = 32
"""After this many shards on which the model failed, and none on which it did not, made-up rows decide whether to go on."""


Identity = tuple[str, str, str]
"""Inbox, key and etag of an object as it was listed."""


@dataclass
class Head:
    """A committed version in memory. Dropped whenever a step does not end in the commit of exactly this memory."""

    version: Version
    steps: Steps
    """Of the learner; they live as long as it, since to compile them takes a while."""
    tombstones: Tombstones
    owed: tuple[Owed, ...]
    disposed_at: float
    """When it was last tried to pay the debts, by `time.monotonic`."""
    recent: deque[Consumed]
    """The last shards that this learner has scored and trained on."""
    cumulative: Summary
    """Of all shards that this learner has seen since the last batch training."""
    gate: Gate | None
    """The last decision about one of the recent shards."""
    trigger: Trigger
    """When to train on what waits: what was found out about it."""
    kept: Kept = field(default_factory=Kept)
    """What was read to be judged by the trigger."""

    @property
    def learner(self) -> Learner:
        """As it was committed, until the next shard is trained on."""
        return self.steps.learner

    def read_again(self, log: VersionLog, device: str) -> None:
        """Go back to the learner as it was committed. Raises what `read_learner` raises."""
        self.steps = Steps(read_learner(log, self.version, device))

    def consumed(self, shard: Shard) -> bool:
        """Whether a shard was consumed before: the same key and the same bytes, whatever its etag is now."""
        return self.has(shard.ref)

    def has(self, ref: ObjectRef) -> bool:
        """Whether this object was consumed before."""
        return self.tombstones.has(*ref.identity)


def trigger_on(settings: Triggers, spec: Spec, recent: Sequence[Consumed]) -> Trigger:
    """The trigger on top of a version whose last shards are these."""
    metric = spec.main_metric
    past = [Judged(shard.rows, shard.score[metric]) for shard in recent if metric in shard.score]
    return Trigger(settings, past)


def read_learner(log: VersionLog, version: Version, device: str) -> Learner:
    """The learner exactly as it was committed.

    Raises:
        HeadMoved: others went on from the version, and retention removed it.
        UnknownVersion, CorruptObject, TrainingError: see `load_learner`.
    """
    try:
        return load_learner(log, version, device)
    except UnknownVersion as error:
        if log.head().number == version.number:
            raise
        raise HeadMoved(f"{log.url}: retention has removed version {version.number}, the head before.") from error


def removal(consumed: ObjectRef, settings: OnlineSettings) -> Owed:
    """The removal of a shard, or of its labels, that was consumed now or before.

    One that was consumed before is archived like others, since it may have been kept until now. An archive does not get twice
    what it holds.
    """
    return Owed.of(consumed, "delete" if settings.archive_to is None else "archive", settings.archive_to)


@dataclass
class Scored:
    """Scores of one shard before it is trained on."""

    learner: dict[str, float]
    champion: dict[str, float]
    predicted: Predicted | None = None


@dataclass
class Work:
    """What was done on top of a head, and is not committed yet."""

    head: Head
    consumed: list[Consumed] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    duplicates: list[Owed] = field(default_factory=list)
    """To be removed: shards that were consumed before, and have come again under another etag."""
    unreadable: dict[Identity, str] = field(default_factory=dict)
    """Shards that cannot be read -> why."""
    new_columns: dict[str, str] = field(default_factory=dict)
    rows: int = 0

    def __bool__(self) -> bool:
        """True if there is something to commit."""
        return bool(self.consumed or self.rejected)

    def add(self, found: Readable, ordinal: int, scored: Scored, result: PassResult, passes: int) -> None:
        """Count a shard that was trained on."""
        self.rows += result.rows
        self.consumed.append(
            Consumed(
                **dict(found.shard.ref),
                ordinal=ordinal,
                rows=result.rows,
                unlabelled=result.unlabelled,
                score=scored.learner,
                champion=scored.champion,
                predicted=scored.predicted,
                labels=() if found.labels is None else (found.labels,),
                loss=result.loss,
                passes=passes,
            )
        )
        progress.current().advance(1, rows=result.rows, newest=found.shard.info.last_modified)

    def __str__(self) -> str:
        parts = [f"shards {len(self.consumed)}", f"rows {self.rows:,}"]
        if unlabelled := sum(shard.unlabelled for shard in self.consumed):
            parts.append(f"rows without a label {unlabelled:,}")
        if self.rejected:
            parts.append(f"rejected {len(self.rejected)}")
        if (loss := self.metrics().get("loss")) is not None:
            parts.append(f"loss before training {loss:.4g}")
        return ", ".join(parts)

    @property
    def consumed_objects(self) -> list[Consumed | LabelShard]:
        """The shards, and those of their labels."""
        return list(consumed_objects(self.consumed))

    def metrics(self) -> dict[str, Any]:
        """Prequential metrics of this commit's shards, and the champion's on the same rows."""
        summary = Summary.of(self.consumed)
        champion = {"champion": summary.champion.mean} if summary.champion.mean else {}
        return summary.score.mean | champion


# ---- training on what was selected -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """Something failed on a shard. The learner may be half trained since, and is read anew."""

    shard: Shard
    reason: str
    certain: bool = False
    """True: the reason says what is wrong with the rows. False: it may be the model's fault as well."""
    passing: bool = True
    """True: it may not happen again, and the shard has its turn once more."""


def train_on(reader: Reader, head: Head, champion: Champion, places: Places, settings: OnlineSettings) -> Work:
    """Validate, score and train on the next of the selected shards, one by one, in order. Changes the learner of `head`.

    At most `max_shards`, of `max_bytes` together (or one), and none after `max_rows`. A shard that cannot be used is rejected
    before the model is touched. One on which something fails twice is taken out, and the others are trained on again from
    the head, as if it had not been there; if none of them can be, more are taken, beyond the limits.

    Raises:
        ModelFails: the model fails on all that waits and on made-up rows too. Nothing is rejected.
        HeadMoved: another run committed, and retention removed the head.
        StorageError, MemoryError, RuntimeError: of the store, of memory, of an accelerator: no shard is at fault.
    """
    faults: list[Fault] = []
    once: set[Identity] = set()
    while True:
        suspects = [fault for fault in faults if not fault.certain]
        work = Work(head, rejected=[fault.shard.rejected(fault.reason) for fault in faults if fault.certain])
        taken: list[ObjectInfo] = []
        if (fault := _train_in_turn(work, taken, reader, champion, places, settings, bool(suspects))) is None:
            break
        head.read_again(places.log, settings.device)
        identity = (fault.shard.inbox, fault.shard.info.key, fault.shard.info.etag)
        if fault.passing and identity not in once:
            once.add(identity)
            reader.put_back(taken)
            continue
        faults.append(fault)
        reader.put_back(taken[:-1])
        suspects = [fault for fault in faults if not fault.certain]
        if (
            not fault.certain and len(suspects) % SUSPECTS == 0 and not work.consumed
        ):  # not all of a large inbox in vain
            _try_made_up_rows(head, suspects, places.log, settings)
    if suspects and not work.consumed:
        if len(suspects) > SUSPECTS:
            raise _model_fails(places.log, suspects, "made-up rows speak for a few shards only")
        _try_made_up_rows(head, suspects, places.log, settings)
    for fault in suspects:
        work.rejected.append(fault.shard.rejected(fault.reason))
    return work


def _train_in_turn(
    work: Work,
    taken: list[ObjectInfo],
    reader: Reader,
    champion: Champion,
    places: Places,
    settings: OnlineSettings,
    until_one: bool,
) -> Fault | None:
    """Train up to the limits, and with `until_one` until a shard could be trained on. Adds to `taken` what had its turn."""
    size = 0
    while reader:
        within = _takes(settings.limits, len(taken), size + reader.upcoming.size, work.rows)
        if not (within or (until_one and not work.consumed)):
            return None
        info, read = reader.take()
        taken.append(info)
        size += info.size
        if isinstance(read, Later):
            if read.reason is not None:
                work.unreadable[places.inbox.url, info.key, info.etag] = read.reason
        elif work.head.consumed(read.shard):
            _note_duplicate(work, read.shard.ref, settings)
            if isinstance(read, Readable) and read.labels is not None and work.head.has(read.labels):
                _note_duplicate(work, read.labels, settings)  # or they would wait for other features for ever
        elif isinstance(read, Unusable):
            if read.unforeseen:
                return Fault(read.shard, read.reason)
            work.rejected.append(read.shard.rejected(read.reason))
        elif (fault := _train_one(work, read, champion, settings)) is not None:
            return fault
    return None


def _note_duplicate(work: Work, shard: ObjectRef, settings: OnlineSettings) -> None:
    """A shard that was consumed before is here again, under another etag. It is removed, or kept and known by its etag."""
    if settings.after_commit == "keep":
        work.head.tombstones.add(*shard.identity, shard.etag)  # so that the next listing passes over it unread
    else:
        work.duplicates.append(removal(shard, settings))


def _takes(limits: Limits, shards: int, size: int, rows: int) -> bool:
    """Whether a commit of `shards` shards and `rows` rows may take another shard, for `size` bytes in all."""
    return shards < limits.max_shards and rows < limits.max_rows and (not shards or size <= limits.max_bytes)


def _train_one(work: Work, found: Readable, champion: Champion, settings: OnlineSettings) -> Fault | None:
    """Add one shard to the work; the fault if scoring or training failed on it."""
    shard, groups, learner = found.shard, found.groups, work.head.learner
    try:
        new_columns = _new_columns(learner, groups[0].schema, shard.info.key, settings)
        before = score(learner, groups).finite
    except (ShardRejected, ColumnError) as unusable:  # found before the model was used
        work.rejected.append(shard.rejected(str(unusable)))
        return None
    except Exception as error:  # noqa: BLE001  # of whatever class: _fault raises what is no shard's
        return _fault(shard, error)
    ordinal, version = learner.counters.shards, work.head.version
    # The same weights give the same scores.
    same = not work.consumed and champion.is_version(version.number)
    scored = Scored(before, before if same else champion.score(groups))
    if found.labels is not None:
        scored.predicted = champion.predicted(version, shard.info.last_modified, groups)
    try:
        result = train_shard(work.head.steps, groups, settings.passes)
    except Exception as error:  # noqa: BLE001  # of whatever class: _fault raises what is no shard's
        return _fault(shard, error)
    work.add(found, ordinal, scored, result, settings.passes)
    work.new_columns |= new_columns
    return None


def _fault(shard: Shard, error: Exception) -> Fault:
    """What failed on a shard. Raises the error where it can be no shard's."""
    if not may_be_the_shards(error):
        raise error
    logger.debug("%s/%s", shard.inbox, on_one_line(shard.info.key), exc_info=error)
    certain = isinstance(error, ColumnError | ShardRejected)
    return Fault(shard, described(error), certain, not (certain or isinstance(error, NonFiniteLoss)))


def _new_columns(learner: Learner, schema: pa.Schema, key: str, settings: OnlineSettings) -> dict[str, str]:
    """Columns to record. Raises ShardRejected: the settings refuse them."""
    if settings.new_columns == "ignore" or not (found := learner.features.new_columns(schema)):
        return {}
    if settings.new_columns == "fail":
        raise ShardRejected(
            f"{key} has columns that the dataset of the batch training had not: {', '.join(found)}: drop them, set "
            "new_columns to add or ignore, or train a new model on a dataset that has them."
        )
    return found


# ---- is it the shard or the model? -----------------------------------------------------------------------------------
def _try_made_up_rows(head: Head, faults: Sequence[Fault], log: VersionLog, settings: OnlineSettings) -> None:
    """Let the learner take a step on made-up rows; then read it anew, as if it had not.

    Raises:
        ModelFails: it cannot.
    """
    learner = head.learner
    try:
        rows = [made_up(learner.features, learner.spec.batch_size)]
        score(learner, rows)
        train_shard(head.steps, rows, passes=1)
    except Exception as error:
        if isinstance(error, StorageError) or of_the_machine(error):
            raise
        raise _model_fails(log, faults, f"on made-up rows: {described(error)}") from error
    head.read_again(log, settings.device)


def _model_fails(log: VersionLog, faults: Sequence[Fault], also: str) -> ModelFails:
    first = f"{on_one_line(faults[0].shard.info.key)}: {faults[0].reason}"
    return ModelFails(
        f"{log.url}: the model fails on each of {len(faults)} shards ({also}), and no other waits. Nothing was rejected, "
        f"the shards stay in the inbox. Was the model's code changed? The first was {first}"
    )

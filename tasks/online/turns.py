"""One shard after the other: scored and trained on, or rejected. What of that is not committed yet lives in memory alone.

Is it the shard or the model? A shard on which the model, the loss or Arrow fails is rejected only if it is shown to be at
fault: the learner, read anew, fails on it again, and then takes a step on another shard that waits. Where no other waits that
can be used, remembered rows decide, which are real. Where there are none either, made-up rows decide about a single shard. Else
the model is at fault: the run stops and rejects nothing, since a bad deploy must not empty an inbox into quarantine.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from tidemill.storage.errors import ShardRejected, StorageError, on_one_line
from tidemill.storage.inbox import Shard
from tidemill.storage.manifest import ObjectRef, Served
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.gate import Champion
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.points import KEPT_BYTES, KeptLearner
from tidemill.tasks.online.reading import Later, Read, Readable, Reader, may_be_the_shards
from tidemill.tasks.online.work import Head, Identity, Scored, Work, removal
from tidemill.tasks.ranks.leader import agree, train_shard
from tidemill.tasks.settings import Limits, OnlineSettings
from tidemill.tasks.training.errors import ColumnError, ModelFails, NonFiniteLoss, described, of_the_machine
from tidemill.tasks.training.given import has_answers, score_answers
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult, score
from tidemill.tasks.trial import remembers, rows_at_hand, try_step

logger = logging.getLogger("tidemill.online")

TOLD_AFTER: Final = 32
"""After this many shards on which the model failed, and none on which it did not, a warning says what goes on."""


@dataclass(frozen=True)
class Fault:
    """Something failed on a shard. The learner may be half trained since, and goes back."""

    shard: Shard
    reason: str
    certain: bool = False
    """True: the reason says what is wrong with the rows. False: it may be the model's fault as well."""
    passing: bool = True
    """True: it may not happen again, and the shard has its turn once more."""
    in_reading: bool = False
    """True: it happened before the rows were tensors, and what the model does with other tensors says nothing of it."""


@dataclass
class _Point:
    """Where the learner goes back to when something fails on the next shards."""

    learner: KeptLearner | None = None
    """None: as it was committed."""
    consumed: int = 0
    """How many shards of the work it has been trained on."""
    rows: int = 0
    new_columns: dict[str, str] = field(default_factory=dict)


def train_on(reader: Reader, head: Head, champion: Champion, places: Places, settings: OnlineSettings) -> Work:
    """Validate, score and train on the next of the selected shards, one by one, in order. Changes the learner of `head`.

    At most `max_shards`, of `max_bytes` together (or one), and none after `max_rows`. A shard that cannot be used is rejected
    before the model is touched. One on which something fails twice is taken out, and the bits are those of a run in which it
    had not been there. If none of them can be trained on, more are taken, beyond the limits.

    Raises:
        ModelFails: the model fails on all that waits, if that is one shard on remembered or made-up rows too. Nothing is
            rejected.
        HeadMoved: another run committed, and retention removed the head.
        StorageError, MemoryError, RuntimeError: of the store, of memory, of an accelerator: no shard is at fault.
    """
    return _Turns(reader, head, champion, places, settings).work_of_a_commit()


class _Turns:
    """The turns of the shards of one commit.

    When something fails, the learner goes back to the last point, and the shards since then are trained on again. Then that is
    a point too: each shard is trained on twice at most, however many others fail.
    """

    def __init__(
        self, reader: Reader, head: Head, champion: Champion, places: Places, settings: OnlineSettings
    ) -> None:
        self.reader, self.work = reader, Work(head)
        self.champion, self.places, self.settings = champion, places, settings
        self.taken = self.size = 0
        """Shards that have had their turn, and their bytes: without those that come again."""
        self.point = _Point()
        self.since: list[ObjectInfo] = []
        """Shards that were trained on since the point, in order."""
        self.again = 0
        """How many shards are left of those that come again."""
        self.once: set[Identity] = set()
        """Shards that have failed once."""
        self.suspects: list[Fault] = []
        """Of shards that have failed for good, and may be at fault."""
        self.unproven = 0
        """How many of them failed after the last shard that was trained on."""
        self.failed = False
        """Whether anything has."""
        self.witness: Readable | None = None
        """The last shard that was trained on after something had failed."""

    def work_of_a_commit(self) -> Work:
        """Train up to the limits, and beyond them while the model has failed on each shard. Raises as `train_on`."""
        while self.reader and self._takes_another():
            info, read = self.reader.take()
            self.taken += 1
            self.size += info.size
            before = len(self.work.consumed)
            if (fault := _turn(self.work, info, read, self.champion, self.places, self.settings)) is not None:
                self._go_back(fault, info)
                continue
            if len(self.work.consumed) > before:
                self.since.append(info)
                assert isinstance(read, Readable), "nothing else is trained on"
                if read.labelled:
                    self.unproven = 0
                    self.witness = read if self.failed else self.witness
            if self.again:
                self.again -= 1
                if not self.again:  # here something failed: what is good so far need not be trained on another time
                    self._make_point()
        if self.unproven:
            prove(self.work, self.suspects, self.witness, self.places, self.settings)
            self._restore()
        self.work.rejected += [fault.shard.rejected(fault.reason) for fault in self.suspects]
        self._move_point(_Point())
        return self.work

    def _takes_another(self) -> bool:
        upcoming = self.size + self.reader.upcoming.size
        within = _within(self.settings.limits, self.taken, upcoming, self.work.rows)
        return within or bool(self.suspects and not self.work.rows)

    def _go_back(self, fault: Fault, info: ObjectInfo) -> None:
        """To the point, and let the shards since then have their turn again; the shard itself too if it has failed once."""
        shard = fault.shard
        identity = (shard.inbox, shard.info.key, shard.info.etag)
        again = self.since
        if fault.certain:
            self.work.rejected.append(shard.rejected(fault.reason))
        elif fault.passing and identity not in self.once:
            self.once.add(identity)
            again = [*self.since, info]
        else:
            self.suspects.append(fault)
            self.unproven += 1
            if len(self.suspects) == TOLD_AFTER and not self.work.consumed:
                logger.warning(
                    "%s: the model has failed on each of %d shards; the others that wait are tried. The first was %s",
                    *(self.places.log.url, TOLD_AFTER, _told(self.suspects[0])),
                )
        self.taken -= len(again)
        self.size -= sum(each.size for each in again)
        self.again = len(self.since)
        self.reader.put_back(again)
        self._restore()

    def _restore(self) -> None:
        work, head, log = self.work, self.work.head, self.places.log
        self.failed = True
        if self.point.learner is not None:
            head.go_back(self.point.learner, log)
        else:
            head.read_again(log, self.settings.device)
            if head.learner.stored_bytes <= KEPT_BYTES:
                self.point.learner = self._kept()  # so that it is read from the store once
        work.consumed, work.rows = work.consumed[: self.point.consumed], self.point.rows
        work.new_columns = self.point.new_columns.copy()
        self.since = []

    def _make_point(self) -> None:
        work = self.work
        if work.consumed:
            agree(work.head.steps)
            self._move_point(_Point(self._kept(), len(work.consumed), work.rows, work.new_columns.copy()))
            self.since = []

    def _move_point(self, point: _Point) -> None:
        if self.point.learner is not None:
            self.point.learner.drop(self.places.log)
        self.point = point

    def _kept(self) -> KeptLearner:
        head = self.work.head
        return KeptLearner.of(head.learner, self.places.log, head.version.number + 1, self.settings.device)


def _within(limits: Limits, shards: int, size: int, rows: int) -> bool:
    """Whether a commit of `shards` shards and `rows` rows may take another shard, for `size` bytes in all."""
    return shards < limits.max_shards and rows < limits.max_rows and (not shards or size <= limits.max_bytes)


# ---- the turn of one shard -------------------------------------------------------------------------------------------
def _turn(
    work: Work, info: ObjectInfo, read: Read, champion: Champion, places: Places, settings: OnlineSettings
) -> Fault | None:
    """Add to the work what becomes of one shard; the fault if something failed on it."""
    if isinstance(read, Later):
        if read.reason is not None:
            work.unreadable[places.inbox.url, info.key, info.etag] = read.reason
    elif work.head.consumed(read.shard):
        _note_duplicate(work, read.shard.ref, settings)
        if isinstance(read, Readable) and read.labels is not None and work.head.has(read.labels):
            _note_duplicate(work, read.labels, settings)  # or they would wait for other features for ever
    elif isinstance(read, Readable):
        return _train_one(work, read, champion, settings)
    elif read.unforeseen:
        return Fault(read.shard, read.reason, in_reading=True)
    else:
        work.rejected.append(read.shard.rejected(read.reason))
    return None


def _note_duplicate(work: Work, shard: ObjectRef, settings: OnlineSettings) -> None:
    """A shard that was consumed before is here again, under another etag. It is removed, or kept and known by its etag."""
    if settings.after_commit == "keep":
        work.head.tombstones.add(*shard.identity, shard.etag)  # so that the next listing passes over it unread
    else:
        work.duplicates.append(removal(shard, settings))


def _train_one(work: Work, found: Readable, champion: Champion, settings: OnlineSettings) -> Fault | None:
    """Add one shard to the work; the fault if scoring or training failed on it."""
    shard, groups, learner = found.shard, found.groups, work.head.learner
    try:
        new_columns = _new_columns(learner, groups[0].schema, shard.info.key, settings)
        if not found.labelled:
            work.add(found, learner.counters.shards, Scored({}, {}), _nothing(groups), settings.passes)
            work.new_columns |= new_columns
            learner.counters.shards += 1
            return None
        found_before = score(learner, groups)
    except (ShardRejected, ColumnError) as unusable:  # found before the model was used
        work.rejected.append(shard.rejected(str(unusable)))
        return None
    except Exception as error:  # noqa: BLE001  # of whatever class: _fault raises what is no shard's
        return _fault(shard, error)
    before = found_before.finite
    ordinal, version = learner.counters.shards, work.head.version
    # The same weights give the same scores.
    same = not work.consumed and champion.is_version(version.number)
    scored = Scored(before, before if same else champion.score(groups))
    if has_answers(groups[0].schema):
        scored.served = _served(learner, groups, shard.info.key)
    elif found.labels is not None or found.joined is not None:
        scored.predicted = champion.predicted(version, shard.info.last_modified, groups)
    try:
        result = train_shard(work.head.steps, groups, settings.passes, labelled=found_before.rows)
    except Exception as error:  # noqa: BLE001  # of whatever class: _fault raises what is no shard's
        return _fault(shard, error)
    work.add(found, ordinal, scored, result, settings.passes)
    work.new_columns |= new_columns
    return None


def _served(learner: Learner, groups: Sequence[RowGroup], key: str) -> tuple[Served, ...] | None:
    """How the answers do that stand in a shard; None if they cannot be scored, which is no fault of its rows."""
    try:
        found = score_answers(learner, groups)
    except Exception as error:
        if not may_be_the_shards(error):
            raise
        logger.warning("the answers that stand in %s cannot be scored: %s", on_one_line(key), described(error))
        return None
    return tuple(Served(version=version, rows=score.rows, score=score.finite) for version, score in found.items())


def _nothing(groups: Sequence[RowGroup]) -> PassResult:
    """What a shard has been trained on that has no label."""
    return PassResult(rows=0, steps=0, loss=math.nan, unlabelled=sum(group.num_rows for group in groups))


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
def prove(
    work: Work, suspects: list[Fault], witness: Readable | None, places: Places, settings: OnlineSettings
) -> None:
    """Make sure that the last suspects are at fault, and not the model. The learner of the work's head is used up by that.

    Args:
        work: What was trained on beside them.
        suspects: Of all shards that failed.
        witness: A shard that was trained on, but before they failed. None: no other shard that waits can be trained on.
        places: The log that is named.
        settings: How often a shard is trained on.

    Raises:
        ModelFails: the model fails on everything that there is to try it on.
    """
    learner = work.head.learner
    if witness is None and len(suspects) > 1 and not _memory_decides(learner, suspects):
        raise _model_fails(places, suspects, "and no other that waits can be trained on")
    name = rows_at_hand(learner) if witness is None else on_one_line(witness.shard.info.key)
    try:
        if witness is None:
            try_step(work.head.steps)
        else:
            score(learner, witness.groups)
            train_shard(work.head.steps, witness.groups, settings.passes)
    except Exception as error:
        if isinstance(error, StorageError) or of_the_machine(error):
            raise
        raise _model_fails(places, suspects, f"and then on {name}: {described(error)}") from error


def _memory_decides(learner: Learner, suspects: list[Fault]) -> bool:
    """Whether a step on remembered rows tells if the model or several shards are at fault. Made-up rows are no proof."""
    return remembers(learner) and not any(fault.in_reading for fault in suspects)


def _model_fails(places: Places, suspects: list[Fault], also: str) -> ModelFails:
    shards = "a shard" if len(suspects) == 1 else f"each of {len(suspects)} shards"
    return ModelFails(
        f"{places.log.url}: the model fails on {shards}, {also}. Nothing was rejected, the shards stay in the inbox. If the "
        "model's code was changed, mend it. If the shards are at fault, put a good one beside them, which shows it, or move "
        f"them away. The first was {_told(suspects[0])}"
    )


def _told(fault: Fault) -> str:
    return f"{on_one_line(fault.shard.info.key)}: {fault.reason}"

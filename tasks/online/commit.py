"""A commit: blobs first, then the manifest that names them. What is in no manifest has not happened."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tidemill.storage.disposal import quarantine_key
from tidemill.storage.manifest import Blobs, Consumed, Entry, Gate, Owed
from tidemill.storage.refs import TombstonesRef
from tidemill.tasks.online.gate import Champion, decide
from tidemill.tasks.online.places import Places
from tidemill.tasks.online.reading import Kept
from tidemill.tasks.online.selection import Selection
from tidemill.tasks.online.work import Head, Work, removal, trigger_on
from tidemill.tasks.ranks.leader import agree, environment_of
from tidemill.tasks.scores import Summary
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.environment import code_revision
from tidemill.tasks.versions import resolved_spec


def commit(work: Work, selection: Selection, champion: Champion, places: Places, settings: OnlineSettings) -> Head:
    """Write the blobs, then create the manifest. Returns the new head; what it owes is not removed yet.

    Raises:
        HeadMoved: another run was faster; nothing of this work counts.
        RanksDiffer: of several processes that have trained together, one holds other bits. Nothing was written.
    """
    log, head = places.log, work.head
    learner, parent, number = head.learner, head.version.manifest, head.version.number + 1
    owed = (*head.owed, *debts(work, number, log.model, settings))
    for shard in work.consumed_objects:
        head.tombstones.add(shard.inbox, shard.key, shard.sha256, shard.etag)
    agree(head.steps)
    recent = head.recent.copy()
    recent.extend(work.consumed)
    cumulative = head.cumulative.model_copy(deep=True)
    cumulative.add(work.consumed)
    compared = list(recent)[-settings.gate.recent_shards :]
    gate, holdout = _decide(work, compared, champion, settings)
    touched = [{name: rows.numpy() for name, rows in part.items()} for part in learner.touched()]
    refs = log.write_learner(number, learner.pieces(), parent.blobs, touched)
    entry = Entry(
        kind="online",
        spec=parent.spec,
        resolved_spec=resolved_spec(learner),
        columns=parent.columns,
        blobs=Blobs(
            weights=refs[0], state=refs[1], tombstones=_tombstones(work, number, owed, selection, places, settings)
        ),
        consumed=tuple(work.consumed),
        rejected=tuple(work.rejected),
        owed=owed,
        open_labels=(parent.open_labels if work.open_labels is None else work.open_labels) or None,
        done_labels=work.done_labels or None,
        fired=selection.why if settings.train_when.given else (),
        gate=gate,
        new_columns=parent.new_columns | work.new_columns,
        metrics=work.metrics()
        | {"recent": Summary.of(compared).model_dump(), "cumulative": cumulative.model_dump()}
        | ({"holdout": holdout} if holdout else {}),
        counters=asdict(learner.counters),
        code=code_revision(),
        environment=environment_of(learner.spec),
    )
    version = log.commit(head.version, entry)
    learner.committed()
    return replace(
        head,
        version=version,
        owed=owed,
        disposed_at=head.disposed_at if head.owed else time.monotonic(),
        recent=recent,
        cumulative=cumulative,
        gate=gate or head.gate,
        trigger=trigger_on(settings.train_when, learner.spec, recent),
        kept=Kept(),
    )


def debts(work: Work, number: int, model: str, settings: OnlineSettings) -> list[Owed]:
    """What version `number` owes for this work: shards to delete or to archive, unless they are kept, and to quarantine."""
    consumed = [] if settings.after_commit == "keep" else work.consumed_objects
    return [removal(shard, settings) for shard in consumed] + [
        Owed.of(shard, "quarantine", quarantine_key(model, number, shard.sha256, shard.key), shard.reason)
        for shard in work.rejected
    ]


def _tombstones(
    work: Work, number: int, owed: Sequence[Owed], selection: Selection, places: Places, settings: OnlineSettings
) -> TombstonesRef | None:
    """Where version `number` finds its tombstones; they are stored, and old ones forgotten, when that is due."""
    head, log = work.head, places.log
    if not log.tombstones_due(head.version, head.tombstones.unstored):
        return log.named_tombstones(head.version)
    # What is in the inbox must be remembered: all that is kept, and what an earlier run has kept and is not removed yet.
    if settings.after_commit != "keep" and selection.complete:
        mine = {inbox.url for inbox in places.inboxes}
        head.tombstones.prune(mine, keep=(debt.identity for debt in owed))
    return log.write_tombstones(number, head.tombstones)


def _decide(
    work: Work, compared: Iterable[Consumed], champion: Champion, settings: OnlineSettings
) -> tuple[Gate | None, dict[str, Any]]:
    """(whether the champion moves to the new version, the new version's scores on the holdout)."""
    learner = work.head.learner
    scored = champion.holdout(learner)
    on_holdout = {} if scored is None else {"rows": scored[0].rows, **scored[0].finite}
    if settings.gate.champion != "move" or champion.alias is None or not work.consumed:
        return None, on_holdout
    gate = decide(settings.gate, champion.alias, learner.spec.main_metric, compared, scored, work.head.gate)
    return gate, on_holdout

"""A model at a glance, as one record: where it stands, what waits for it, and what is wrong, with the remedy.

Reads the log and an inbox; nothing here can touch a commit. What each problem means, and what to do: `docs/operations.md`.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from pydantic import BaseModel

from tidemill.storage.aliases import all_aliases
from tidemill.storage.audit import lost_versions
from tidemill.storage.chain import Version
from tidemill.storage.errors import (
    CorruptObject,
    NotFound,
    PermissionDenied,
    StorageError,
    StoreFull,
    UnknownVersion,
    UnsupportedStore,
    on_one_line,
)
from tidemill.storage.inbox import Inbox
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Gate, Manifest, Owed
from tidemill.storage.overlap import spelled_as
from tidemill.storage.parallel import concurrently
from tidemill.storage.probe import check_preconditions
from tidemill.storage.rejected import RejectedShard, rejected
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tombstones import Seen
from tidemill.storage.traces import traces_above
from tidemill.storage.urls import open_store

LATELY: Final = timedelta(days=1)
"""A shard that was rejected within this time is a problem. After it, it is a thing to be tidied up."""
IN_A_ROW: Final = 3
"""So many refused versions in a row are a problem: one or two may be chance."""
LOOKED_AT: Final = 20
"""So many debts are looked at: whether the object is still there."""
AT_ONCE: Final = 8
"""So many of them at once."""

ProblemName = Literal["stalled", "behind", "rejected", "refused", "owed", "retired", "passed_over", "lost", "store"]
"""Each has its entry in `docs/operations.md`."""


class Problem(BaseModel):
    """Something that needs a person."""

    name: ProblemName
    what: str
    """What is wrong, on one line."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return on_one_line(f"{self.what}: {self.remedy}")


class Status(BaseModel):
    """Where a model stands."""

    model: str
    url: str
    looked: datetime
    """When this was found."""
    head: int
    kind: str
    created: datetime
    """When the head was committed: the last commit."""
    aliases: dict[str, int]
    champion: int | None
    """The version that the alias `champion` names."""
    counters: dict[str, int]
    metrics: dict[str, Any]
    gate: Gate | None
    new_columns: dict[str, str]
    owed: int
    """Removals that the head owes. Those of its own shards are usually done: its manifest was written before."""
    owed_in: dict[str, int]
    """The same by inbox."""
    owed_elsewhere: dict[str, int]
    """Those of inboxes that the head has no shards of."""
    quarantined: int
    rejected: list[RejectedShard]
    """The newest of them."""
    rejected_lately: int
    """How many of them were rejected within the last day."""
    lost_versions: list[str]
    inbox: str | None = None
    """URL of the inbox that was looked into. None: of none, and then what follows is None too."""
    waiting: int | None = None
    """Shards there that no version contains."""
    waiting_bytes: int | None = None
    oldest_waiting: datetime | None = None
    """When the oldest of them was written, by the clock of its store."""
    consumed_in_inbox: int | None = None
    """Shards that a version contains, and that are still there."""
    passed_over: dict[str, str] | None = None
    """Key -> why it can be no shard."""
    notes: list[str] = []
    """What is good to know, and no problem."""
    problems: list[Problem] = []

    @property
    def wrong(self) -> bool:
        """True if anything needs a person."""
        return bool(self.problems)


def look(
    log: VersionLog,
    inbox: Inbox | None = None,
    *,
    behind_seconds: float,
    ask_store: bool = False,
    stores: Callable[[str], Store] = open_store,
) -> Status:
    """The state of a model, and of what waits for it in an inbox.

    Args:
        log: Of the model.
        inbox: Where its shards arrive; None: nothing is said of it.
        behind_seconds: A shard that waits longer than this is a problem.
        ask_store: Ask the registry whether it keeps its promises, with a hidden object that is removed again. One that may not
            be written to is not asked.
        stores: Opens the inboxes of debts.

    Raises:
        UnknownModel: there is no such model.
        StorageError: the log or the inbox cannot be read.
    """
    head, now = log.head(), datetime.now(UTC)
    manifest, aliases = head.manifest, all_aliases(log)
    own = {shard.inbox for shard in (*manifest.consumed_objects, *manifest.rejected)}
    owed_in = dict(Counter(debt.inbox for debt in manifest.owed))
    quarantine = rejected(log, head.number, since=now - LATELY)
    found = Status(
        model=log.model,
        url=log.url,
        looked=now,
        head=head.number,
        kind=manifest.kind,
        created=manifest.created,
        aliases=aliases,
        champion=aliases.get("champion"),
        counters=manifest.counters,
        metrics=manifest.metrics,
        gate=manifest.gate,
        new_columns=manifest.new_columns,
        owed=len(manifest.owed),
        owed_in=owed_in,
        owed_elsewhere={url: objects for url, objects in owed_in.items() if url not in own},
        quarantined=quarantine.kept,
        rejected=quarantine.newest,
        rejected_lately=quarantine.lately,
        lost_versions=lost_versions(log) if next(traces_above(log.store, log.model, head.number), None) else [],
        **({} if inbox is None else _waiting(log, head, inbox)),
    )
    found.problems = [
        *_of_waiting(found, log, timedelta(seconds=behind_seconds)),
        *_of_versions(found, log),
        *_of_debts(found, head.manifest, behind_seconds, stores),
        *(_of_the_store(found, log) if ask_store else ()),
    ]
    return found


# ---- what there is ---------------------------------------------------------------------------------------------------
def _waiting(log: VersionLog, head: Version, inbox: Inbox) -> dict[str, Any]:
    """What waits in an inbox, and how much is still in it though the model has consumed it."""
    tombstones, spelled = log.tombstones(head), spelled_as(inbox.url)
    tombstones.respell(spelled)
    seen = Seen(tombstones, head.manifest.owed, spelled)
    consumed = size = 0

    def known(info: ObjectInfo) -> bool:
        nonlocal consumed, size
        was = seen.consumed(inbox.url, info)
        consumed += was
        size += 0 if was else info.size
        return was

    listing = inbox.list(1, known)
    return {
        "inbox": inbox.url,
        "waiting": listing.waiting,
        "waiting_bytes": size,
        "oldest_waiting": listing.oldest,
        "consumed_in_inbox": consumed,
        "passed_over": listing.passed_over,
    }


# ---- what is wrong ---------------------------------------------------------------------------------------------------
def _of_waiting(found: Status, log: VersionLog, behind: timedelta) -> Iterator[Problem]:
    """Shards that wait for too long, and objects that nobody will take."""
    if found.oldest_waiting is not None and found.looked - found.oldest_waiting > behind:
        shards = f"{_count(found.waiting or 0, 'shard')} waiting, the oldest for {_time(found.looked - found.oldest_waiting)}"
        begin = shlex.join(["tidemill", "follow", str(found.inbox), log.store.url, log.model])
        if (since := found.looked - found.created) > behind:
            what = f"{shards}, and no version was committed for {_time(since)}"
            remedy = f"see whether a run is alive and what it logs; `{begin}` begins one"
            yield Problem(name="stalled", what=what, remedy=remedy)
        else:
            what = f"{shards}, though versions are committed"
            remedy = (
                "either more arrives than is trained on, or these shards cannot have their turn (too large, no labels yet): "
                "the log of the run says which"
            )
            yield Problem(name="behind", what=what, remedy=remedy)
    if found.passed_over:
        key, why = next(iter(found.passed_over.items()))
        what = (
            f"{_count(len(found.passed_over), 'object')} in {found.inbox} that can be no shard, such as {key} ({why})"
        )
        them = "it" if len(found.passed_over) == 1 else "them"
        remedy = f"remove or rename {them}; nothing takes {them} out of the inbox"
        yield Problem(name="passed_over", what=what, remedy=remedy)


def _of_versions(found: Status, log: VersionLog) -> Iterator[Problem]:
    """Versions that were refused, rejected shards, are lost, or have an alias and no weights."""
    place = shlex.join([log.store.url, log.model])
    if found.rejected_lately:
        what = f"{_count(found.rejected_lately, 'shard')} rejected within a day"
        if found.rejected:
            what += f", the last by version {found.rejected[0].version}: {found.rejected[0].key}: {found.rejected[0].reason}"
        remedy = f"mend the cause, then `tidemill requeue {place} --all --inbox INBOX`; or delete what is of no use in quarantine"
        yield Problem(name="rejected", what=what, remedy=remedy)
    if (gate := found.gate) is not None and gate.refusals >= IN_A_ROW:
        what = f"the last {gate.refusals} versions were worse than champion {gate.champion} ({gate.numbers})"
        remedy = (
            f"`tidemill promote {place} {found.head}` accepts the head, `tidemill rollback {place} {gate.champion}` gives it "
            "up, `tidemill train` begins anew"
        )
        yield Problem(name="refused", what=what, remedy=remedy)
    named: dict[int, str] = {found.head: "the head"}
    named |= {number: f"alias {name}" for name, number in found.aliases.items() if number != found.head}
    states = zip(
        named, concurrently(lambda number: _is_retired(log, number), named, log.store.concurrency), strict=True
    )
    for number, state in states:
        if state:
            alias = named[number].removeprefix("alias ")
            mend = f"`tidemill promote {place} VERSION --alias {alias}` names another version"
            remedy = mend if number != found.head else f"restore them, or `tidemill rollback {place} VERSION`"
            yield Problem(name="retired", what=f"{named[number]} is version {number}, {state}", remedy=remedy)
    for lost in found.lost_versions:
        what, _, remedy = lost.partition("version has them: ")
        yield Problem(name="lost", what=f"{what}version has them", remedy=remedy)


def _is_retired(log: VersionLog, number: int) -> str:
    """Why a version cannot be loaded; empty if it can."""
    try:
        missing = log.missing(log.version(number).manifest.blobs.learner_keys)
    except UnknownVersion:
        return "which does not exist"
    except CorruptObject as error:
        return f"which cannot be read ({error})"
    return "" if missing is None else "whose weights or state are gone"


def _of_debts(
    found: Status, head: Manifest, behind_seconds: float, stores: Callable[[str], Store]
) -> Iterator[Problem]:
    """Removals that an earlier version has left to the head, of objects that are still there."""
    own = {shard.identity for shard in (*head.consumed_objects, *head.rejected)}
    carried = [debt for debt in head.owed if debt.identity not in own]
    fresh = head.kind != "online" and (found.looked - head.created).total_seconds() < behind_seconds
    if not carried or fresh:  # a batch version carries on what the next run with that inbox pays
        return
    looked_at = carried[:LOOKED_AT]
    gone = concurrently(lambda debt: _is_gone(debt, stores), looked_at, AT_ONCE)
    there = [debt for debt, is_gone in zip(looked_at, gone, strict=True) if not is_gone]
    if there:
        more = len(carried) - len(looked_at)
        shards = f"{_count(len(there) + more, 'consumed shard')} could not be removed, such as {there[0].inbox}/{there[0].key}"
        remedy = (
            f"allow the run to delete there (and to write to the archive), or run once with {there[0].inbox} as its inbox; none "
            "of them is trained on again"
        )
        yield Problem(name="owed", what=shards, remedy=remedy)


def _is_gone(debt: Owed, stores: Callable[[str], Store]) -> bool:
    """Whether the object of a debt is not in its inbox any more. What cannot be looked at may still be there."""
    try:
        return stores(debt.inbox).stat(debt.key).etag != debt.etag
    except NotFound:
        return True
    except StorageError:
        return False


def _of_the_store(found: Status, log: VersionLog) -> Iterator[Problem]:
    """A registry that does not keep what the version log is built on."""
    try:
        check_preconditions(log.store)
    except (PermissionDenied, StoreFull):  # who may only read cannot ask: nothing is known
        return
    except UnsupportedStore as error:
        what, _, remedy = str(error).rpartition(". ")
        yield Problem(name="store", what=what, remedy=remedy)
    if not log.store.promises.compares_on_delete:
        found.notes.append(
            "the store ignores If-Match on DELETE (MinIO does): let producers never reuse a key (docs/guarantees.md)"
        )


# ---- words -----------------------------------------------------------------------------------------------------------
def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _time(span: timedelta) -> str:
    """`90 seconds`, `3 minutes`, `26 hours`, `3 days`."""
    seconds = int(span.total_seconds())
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"{seconds // size:,} {unit}s"
    return _count(seconds, "second")

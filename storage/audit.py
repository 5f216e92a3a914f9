"""The audit of a model's whole history: is it what the protocol promises? Reads only; needs neither torch nor the shards.

`tidemill.tasks.reproduce` goes further where consumed shards were archived: it trains again and compares the bits.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel

from tidemill.progress import each
from tidemill.storage.aliases import all_aliases
from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject, StorageError, UnknownVersion, UnsupportedFormat
from tidemill.storage.log import VersionLog
from tidemill.storage.refs import Unit
from tidemill.storage.tombstones import WINDOW
from tidemill.storage.traces import traces_above

_MANIFEST = re.compile(r"(\d{8,})\.json")

T = TypeVar("T")
_Identity = tuple[str, ...]


class Audit(BaseModel):
    """What an audit saw. The history is sound if `findings` is empty."""

    model: str
    versions: int = 0
    consumed: int = 0
    rejected: int = 0
    rows: int = 0
    """Labelled rows of the consumed shards."""
    blobs: int = 0
    """Blobs whose length and sha256 were compared."""
    removed: int = 0
    """Versions whose weights and state retention has removed: no defect."""
    findings: list[str] = []


def audit(log: VersionLog) -> Audit:
    """Check every version from 0 to the newest one, and every blob and alias that there is.

    A version follows from the one before it (number, sha256, counters, ordinals, spec); blobs are what was committed; the head
    and every alias have theirs; no shard is consumed twice while it is remembered, or both consumed and rejected; the
    head remembers what was consumed lately; nothing is left of versions above the head. Memory: one blob, and the
    identities of the last 10,000 shards.

    Raises:
        UnknownModel: there is no version at all.
        Unavailable, PermissionDenied: the store cannot be read, so nothing can be said.
    """
    result = Audit(model=log.model)
    numbers = sorted(_numbers(log))
    if not numbers:
        log.head()  # says which models there are
    for expected, number in enumerate(numbers):
        if number != expected:
            missing = f"{log.url}/log: version {expected} is missing, though version {number} is there"
            result.findings.append(f"{missing}; what comes after it was not looked at")
            numbers = numbers[:expected]
            break
    served = _aliased(log, len(numbers), result.findings)
    shards = _Shards(result.findings)
    before: Version | None = None
    sound = frozenset[Unit]()  # of the version before: neighbours name the same tombstones, and segments of large files
    for number in each("audit", numbers, unit="versions"):
        try:
            version = log.version(number)
        except (CorruptObject, UnsupportedFormat) as error:
            result.findings.append(str(error))
            before = None
            continue
        manifest = version.manifest
        if number and before is not None:
            result.findings += [f"version {number}: {what}" for what in _broken_links(log, before, version)]
        for shard in manifest.consumed_objects:
            shards.consumed(number, shard.identity, shard.last_modified.isoformat())
        for rejected in manifest.rejected:
            shards.rejected(number, rejected.identity, rejected.last_modified.isoformat())
        units = [unit for ref in manifest.blobs.refs for unit in ref.units]
        gone = [unit for unit in units if unit not in sound and not _is_whole(log, unit, number, result)]
        sound = frozenset(units) - frozenset(gone)
        if gone and (number == numbers[-1] or number in served):
            named = "the head" if number == numbers[-1] else f"alias {served[number]!r}"
            lacks = log.missing(gone[0].object_keys) or gone[0].key
            result.findings.append(f"version {number}, {named}: {log.store.url}/{lacks} is missing")
        result.removed += any(unit != manifest.blobs.tombstones for unit in gone)
        result.versions += 1
        result.consumed += len(manifest.consumed)
        result.rejected += len(manifest.rejected)
        result.rows += sum(shard.rows for shard in manifest.consumed)
        before = version
    if before is not None and before.number == numbers[-1]:
        result.findings += _forgotten(log, before, shards)
    result.findings += lost_versions(log)
    return result


def lost_versions(log: VersionLog) -> list[str]:
    """What shows that versions above the head were committed and are gone, as after a restore from an older backup.

    Their shards have left the inbox, and no version has them. A registry that was restored whole shows nothing.
    """
    numbers = max(_numbers(log), default=-1)
    traces = list(traces_above(log.store, log.model, numbers))
    if not traces or max(_numbers(log), default=-1) != numbers:  # committed since
        return []
    what = "; ".join(traces)
    return [
        f"{log.url}/log ends with version {numbers}, but there were more: {what}. Their shards have left the inbox, and no "
        "version has them: restore the manifests, or put those shards into the inbox again (an archive has them)"
    ]


def _numbers(log: VersionLog) -> Iterator[int]:
    prefix = f"{log.model}/log/"
    for info in log.store.list(prefix):
        if found := _MANIFEST.fullmatch(info.key.removeprefix(prefix)):
            yield int(found[1])


def _aliased(log: VersionLog, versions: int, findings: list[str]) -> dict[int, str]:
    """Version -> an alias that names it."""
    try:
        aliases = all_aliases(log)
    except CorruptObject as error:
        findings.append(str(error))
        return {}
    for name, number in aliases.items():
        if not 0 <= number < versions:
            findings.append(f"{log.url}: alias {name!r} names version {number}, which does not exist")
    return {number: name for name, number in aliases.items()}


def _broken_links(log: VersionLog, before: Version, version: Version) -> Iterator[str]:
    """How a version fails to follow from the one before it."""
    parent, manifest, older = version.manifest.parent, version.manifest, before.manifest
    if parent is None or parent.sha256 != before.sha256:
        yield f"it was made from another version {before.number} than the one stored; the history was altered"
    own = f"{manifest.model}/blobs/{manifest.version:08d}-"
    if strange := {key for key in manifest.blobs.object_keys - older.blobs.object_keys if not key.startswith(own)}:
        yield f"it names blobs that it has not stored and the version before it does not name, such as {min(strange)}"
    if manifest.kind == "online":
        if manifest.spec != older.spec:
            yield "online training changed the spec"
        first = older.counters.get("shards", 0)
        if [shard.ordinal for shard in manifest.consumed] != list(range(first, first + len(manifest.consumed))):
            yield f"the ordinals of its shards do not continue from {first}"
        if manifest.counters.get("shards") != first + len(manifest.consumed):
            yield f"it counts {manifest.counters.get('shards')} shards after {first} and {len(manifest.consumed)} more"
    elif manifest.consumed or manifest.rejected:
        yield f"a version of kind {manifest.kind!r} consumed shards"
    # Another run may spell the inbox in another way.
    known = {(each.key, each.sha256) for each in (*(manifest.open_labels or ()), *(manifest.done_labels or ()))}
    used = [*(older.open_labels or ()), *(labels for shard in manifest.consumed for labels in shard.joined or ())]
    if lost := {each.key for each in used if (each.key, each.sha256) not in known}:
        yield f"it does not say what became of {len(lost)} shards of labels of which rows were used, such as {min(lost)!r}"
    if manifest.kind == "rollback":
        yield from _broken_rollback(log, version)
    if not _carries_on(log, before, version):
        yield "it does not carry on the tombstones of the version before it"


def _carries_on(log: VersionLog, before: Version, version: Version) -> bool:
    """Whether a version names the tombstones of the one before it, or others that hold all of them."""
    ref = version.manifest.blobs.tombstones
    if ref in (before.manifest.blobs.tombstones, log.named_tombstones(before)):
        return True
    if ref is None or ref.version not in (None, version.number):
        return False
    if version.manifest.kind == "online":  # may have forgotten the oldest: what the head knows is looked at
        return True
    try:
        return set(log.tombstones(before)) <= set(log.tombstones(version))
    except (CorruptObject, UnknownVersion):
        return True  # the first is a finding already, the second retention's work


def _broken_rollback(log: VersionLog, version: Version) -> Iterator[str]:
    number = version.manifest.rolled_back_to
    if number is None or not 0 <= number < version.number:
        yield f"it goes back to version {number}, which is no older version"
        return
    try:
        target = log.version(number).manifest
    except StorageError as error:
        yield str(error)
        return
    now, then = version.manifest.blobs, target.blobs
    same = (now.weights.sha256, now.state.sha256) == (then.weights.sha256, then.state.sha256)
    if not same or version.manifest.counters != target.counters:
        yield f"its weights, state or counters are not those of version {number}, to which it goes back"


def _is_whole(log: VersionLog, unit: Unit, number: int, result: Audit) -> bool:
    """False if the blob is gone; a blob that is not what was committed is a finding."""
    try:
        log.verify_blob(unit)
    except UnknownVersion:
        return False
    except CorruptObject as error:
        result.findings.append(f"version {number}: {error}")
    result.blobs += 1
    return True


def _forgotten(log: VersionLog, head: Version, shards: "_Shards") -> Iterator[str]:
    """Shards consumed lately that the head would train on again if they were sent again."""
    try:
        remembered = log.tombstones(head)
    except (CorruptObject, UnknownVersion):
        return  # the blob is a finding already
    lost = [identity for identity in shards.lately if not remembered.has(*identity)]
    if lost:
        yield f"the head, version {head.number}, does not remember {len(lost)} consumed shards, such as {lost[0]!r}"


class _Shards:
    """Which shards were consumed and rejected, as far back as tombstones reach."""

    def __init__(self, findings: list[str]) -> None:
        self._findings = findings
        self._consumed: OrderedDict[_Identity, tuple[int, str]] = OrderedDict()
        self._rejected: OrderedDict[_Identity, int] = OrderedDict()

    @property
    def lately(self) -> list[tuple[str, str, str]]:
        return [(inbox, key, digest) for inbox, key, digest in self._consumed]

    def consumed(self, number: int, identity: tuple[str, str, str], written: str) -> None:
        if identity in self._consumed:
            self._findings.append(f"shard {identity!r} was consumed twice: {self._consumed[identity][0]} and {number}")
        if (*identity, written) in self._rejected:
            self._findings.append(
                f"shard {identity!r} was rejected by version {self._rejected[*identity, written]} and consumed by {number}"
            )
        _remember(self._consumed, identity, (number, written))

    def rejected(self, number: int, identity: tuple[str, str, str], written: str) -> None:
        # Bytes that can never be used may be sent again and be rejected again: then they were written at another time.
        if (*identity, written) in self._rejected:
            earlier = self._rejected[*identity, written]
            self._findings.append(f"shard {identity!r} was rejected twice: by versions {earlier} and {number}")
        if self._consumed.get(identity, (0, ""))[1] == written:
            self._findings.append(f"shard {identity!r} was rejected by version {number} after it was consumed")
        _remember(self._rejected, (*identity, written), number)


def _remember(seen: OrderedDict[_Identity, T], identity: _Identity, value: T) -> None:
    seen[identity] = value
    seen.move_to_end(identity)
    if len(seen) > WINDOW:
        seen.popitem(last=False)

"""The version log of one model: how a version comes to exist, is found again, and is never lost or written twice.

A version exists from the moment that `log/<version>.json` is created, put-if-absent; nothing else is a commit. Manifests are
never deleted and have no gaps, which is why the head can be found by looking for the first number that is absent. Blobs are
written before, under names that only one attempt uses. See `docs/format.md` for every object and `docs/guarantees.md` for
what follows from it.
"""

import contextlib
import difflib
import json
import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise

from tidemill.storage.errors import (
    CorruptObject,
    HeadMoved,
    NotFound,
    StorageError,
    StoreNotFound,
    UnknownModel,
    UnknownVersion,
)
from tidemill.storage.manifest import (
    BlobRef,
    Blobs,
    Entry,
    Manifest,
    Parent,
    TombstonesRef,
    consumed_objects,
    decode,
    encode,
    sha256,
)
from tidemill.storage.parallel import concurrently
from tidemill.storage.probe import check_preconditions
from tidemill.storage.store import Store, create_or_same
from tidemill.storage.tombstones import Tombstones, due
from tidemill.storage.traces import traces_above
from tidemill.storage.urls import open_store

logger = logging.getLogger("tidemill.storage")

HINT_EVERY = 16
"""A run that opens the log starts to look for the head at most this many versions below it."""

_ALTERED = "The history was altered; restore it, for example from bucket versions."
_GAP = (
    "Versions are never deleted: restore their manifests from a backup or from bucket versions, and let no lifecycle rule reach "
    "them; what cannot be restored ends this model (train another one under another name, or remove all of this one first)."
)
_RESTORE = "Nothing was loaded. Restore the object, or `tidemill rollback` to another version."
_MANIFEST = re.compile(r"(\d{8,})\.json")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What models and aliases may be called."""


@dataclass(frozen=True)
class Version:
    """A committed version: its manifest, and the sha256 of the manifest's bytes that its child will name."""

    manifest: Manifest
    sha256: str

    @property
    def number(self) -> int:
        return self.manifest.version


class VersionLog:
    """The history of one model below a registry."""

    def __init__(self, store: Store, model: str) -> None:
        """`store` is the registry's root.

        Raises:
            UnknownModel: the name cannot be a model's name.
        """
        if not NAME.fullmatch(model):
            raise UnknownModel(
                f"{model!r} cannot name a model: use letters, digits, '.', '_' and '-', starting with a letter or digit."
            )
        self.store, self.model = store, model

    @cached_property
    def url(self) -> str:
        return f"{self.store.url}/{self.model}"

    # ---- finding versions --------------------------------------------------------------------------------------------
    def head(self) -> Version:
        """The newest version, its link to its parent checked. Costs O(1) requests, however long the history.

        Raises:
            UnknownModel: there is no version 0: a wrong URL or name, never a fresh start.
            CorruptObject: the manifest was altered, or does not follow from its parent; or numbers are missing below or
                above it.
        """
        number = self._newest(self._hint())
        if number < 0 and not self.exists():
            raise self.unknown()
        while (above := self._first_above(number)) is not None:
            if not self._has(number + 1):
                raise CorruptObject(
                    f"{self.url}/log: version {number + 1} is gone, though version {above} is there. {_GAP}"
                )
            number = self._newest(number + 1)  # committed since
        if not self._has(0):
            raise CorruptObject(f"{self.url}/log: version 0 is gone, though version {number} is there. {_GAP}")
        version = self.version(number)
        self._parent(version)
        return version

    def exists(self) -> bool:
        """True if the model has a version 0. A registry that does not exist yet holds no model.

        Raises:
            CorruptObject: version 0 is gone, but there are others, or what only a version leaves behind.
        """
        try:
            if self._has(0):
                return True
            trace = self._lost_beginning()
            if trace is None or self._has(0):  # the second: begun since
                return trace is not None
        except StoreNotFound:
            return False
        raise CorruptObject(f"{self.url}/log: version 0 is gone, though {trace}. {_GAP}")

    def _lost_beginning(self) -> str | None:
        """What shows that a model without version 0 had one; None: it never began."""
        if (above := self._first_above(-1)) is not None:
            return f"version {above} is there"
        return next(traces_above(self.store, self.model, -1), None)

    def check(self, version: Version) -> None:
        """Make sure that a version which was read before is still there, unaltered. Costs one small request.

        For whoever kept it in memory and acts on it: nothing may be committed or removed on the strength of a history that
        was removed, restored from a backup or begun anew meanwhile.

        Raises:
            CorruptObject: it is gone, or another one has its number.
        """
        key = self._manifest_key(version.number)
        try:
            state = "is another one now" if sha256(self.store.read(key)) != version.sha256 else ""
        except (NotFound, StoreNotFound):
            state = "is gone"
        if state:
            raise CorruptObject(
                f"{self.store.url}/{key} {state}: the registry was removed, restored or begun anew while a run went on from "
                "this version. The run stops here: nothing of its last work counts, and its shards stay in the inbox. If what "
                "is there now is right, start it again; else restore the registry first."
            )

    def make_durable(self, version: Version) -> None:
        """Before acting on a version that another run may have written: it may have died before that was durable."""
        self.store.make_durable(self._manifest_key(version.number))

    def version(self, number: int) -> Version:
        """One version by number.

        Raises:
            UnknownVersion, CorruptObject, UnsupportedFormat.
        """
        key = self._manifest_key(number)
        try:
            data = self.store.read(key)
        except NotFound:
            raise UnknownVersion(f"{self.url} has no version {number}. `tidemill log` lists what there is.") from None
        manifest = decode(data, f"{self.store.url}/{key}")
        if manifest.version != number or manifest.model != self.model:
            raise CorruptObject(
                f"{self.store.url}/{key} holds version {manifest.version} of {manifest.model!r}: it was copied by hand."
            )
        if (manifest.parent.version if manifest.parent else -1) != number - 1:
            raise CorruptObject(f"{self.store.url}/{key} does not name version {number - 1} as its parent.")
        return Version(manifest, sha256(data))

    def history(self, head: Version, limit: int | None = None) -> Iterator[Version]:
        """Versions from `head` back to version 0, or `limit` of them, every link checked."""
        version: Version | None = head
        while version is not None and limit != 0:
            yield version
            limit = None if limit is None else limit - 1
            version = self._parent(version) if limit != 0 else None

    def _parent(self, child: Version) -> Version | None:
        """The version that `child` was made from; None before version 0."""
        if (parent := child.manifest.parent) is None:
            return None
        found = self._older(parent.version)
        self._check_link(found, child)
        return found

    def _older(self, number: int) -> Version:
        """A version that must be there, because a later one is."""
        try:
            return self.version(number)
        except UnknownVersion as error:
            raise CorruptObject(f"{self.url}/log: version {number} is gone. {_ALTERED}") from error

    def _check_link(self, parent: Version, child: Version) -> None:
        if child.manifest.parent != Parent(version=parent.number, sha256=parent.sha256):
            raise CorruptObject(
                f"{self.url}/log: version {child.number} was made from another version {parent.number} than the one "
                f"stored. {_ALTERED}"
            )

    # ---- blobs -------------------------------------------------------------------------------------------------------
    def write_blob(self, number: int, suffix: str, data: bytes) -> BlobRef:
        """Store bytes for version `number`, which does not exist yet, under a name that only this call uses."""
        key = f"{self.model}/blobs/{number:08d}-{uuid.uuid4().hex}.{suffix}"
        self.store.write(key, data)
        return BlobRef(key=key, bytes=len(data), sha256=sha256(data))

    def read_blob(self, ref: BlobRef) -> bytes:
        """The bytes of a blob, verified before anyone parses them.

        Raises:
            UnknownVersion: the blob is gone (retention).
            CorruptObject: length or sha256 differ.
        """
        where = f"{self.store.url}/{ref.key}"
        try:
            size = self.store.stat(ref.key).size
            if size != ref.bytes:  # before memory is taken for it
                raise CorruptObject(
                    f"{where} is not what was committed: {size} bytes instead of {ref.bytes}. {_RESTORE}"
                )
            data = self.store.read(ref.key)
        except NotFound:
            raise UnknownVersion(
                f"{where} is gone: retention removed the blobs of this version. Choose a newer one (`tidemill log`)."
            ) from None
        if sha256(data) != ref.sha256:
            raise CorruptObject(
                f"{where} is not what was committed: sha256 {sha256(data)} instead of {ref.sha256}. {_RESTORE}"
            )
        return data

    # ---- tombstones --------------------------------------------------------------------------------------------------
    def tombstones(self, version: Version | None) -> Tombstones:
        """The shards that `version` remembers as consumed: those of the blob that it names, and of the manifests since.

        Raises:
            UnknownVersion: the blob is gone (retention).
            CorruptObject: the blob or one of the manifests was altered.
        """
        if version is None:
            return Tombstones()
        ref, stored = _stored_tombstones(version)
        found = Tombstones() if ref is None else Tombstones.decode(self.read_blob(ref), f"{self.store.url}/{ref.key}")
        if stored < version.number:
            numbers = range(stored + 1, version.number)
            since = [*concurrently(self._older, numbers, self.store.concurrency), version]
            for parent, child in pairwise(since):
                self._check_link(parent, child)
            for each in since:
                for shard in consumed_objects(each.manifest.consumed):
                    found.add(shard.inbox, shard.key, shard.sha256, shard.etag)
        return found

    def tombstones_due(self, parent: Version, loose: int = 0) -> bool:
        """Whether a version after `parent` stores all tombstones, of which so many are in no blob, or names an older blob."""
        _, stored = _stored_tombstones(parent)
        return due(parent.number + 1 - stored, loose)

    def write_tombstones(self, number: int, tombstones: Tombstones) -> TombstonesRef:
        """Store all tombstones for version `number`, as `write_blob` does."""
        ref = self.write_blob(number, "tombstones.jsonl", tombstones.encode())
        tombstones.loose = 0
        return TombstonesRef(**dict(ref), version=number)

    def carried_tombstones(self, parent: Version | None) -> TombstonesRef | None:
        """What a version after `parent` names that consumes nothing; stored anew if they are due.

        Raises:
            HeadMoved: others went on from `parent`, and retention removed its tombstones.
        """
        if parent is None:
            return None
        if not self.tombstones_due(parent):
            return self.named_tombstones(parent)
        try:
            found = self.tombstones(parent)
        except UnknownVersion as error:
            if self.head().number == parent.number:
                raise
            raise HeadMoved(f"{self.url}: retention has removed version {parent.number}, the head before.") from error
        return self.write_tombstones(parent.number + 1, found)

    def named_tombstones(self, parent: Version) -> TombstonesRef | None:
        """What a version after `parent` names that does not store tombstones."""
        ref, stored = _stored_tombstones(parent)
        return None if ref is None else ref.model_copy(update={"version": stored})

    # ---- committing --------------------------------------------------------------------------------------------------
    def commit(self, parent: Version | None, entry: Entry) -> Version:
        """Append a version after `parent` (None: as version 0). The one PUT of a manifest decides.

        The parent must be there before and after that PUT: else the manifest is taken back, as are the blobs.

        Raises:
            HeadMoved: another run appended first. Reload the head; nothing of this attempt counts.
            CorruptObject: the parent is gone or altered; or, for version 0, a lost history had one. Nothing is committed.
        """
        nonce, number = uuid.uuid4().hex, 0 if parent is None else parent.number + 1
        manifest = Manifest(
            **dict(entry),
            model=self.model,
            version=number,
            parent=None if parent is None else Parent(version=parent.number, sha256=parent.sha256),
            nonce=nonce,
            created=datetime.now(UTC),
        )
        data, key = encode(manifest), self._manifest_key(number)
        # Read back before it counts: a manifest that cannot be read would end the model.
        version = Version(decode(data, f"{self.store.url}/{key}"), sha256(data))
        try:
            self._check_ground(parent)
            if not create_or_same(self.store, key, data):
                raise HeadMoved(
                    f"{self.url}: another run committed version {number} first; this attempt is discarded, nothing is lost."
                )
            if parent is not None:
                self.check(parent)
        except CorruptObject:
            self._take_back(version)
            raise
        if number % HINT_EVERY == 0:
            try:
                self.store.write(f"{self.model}/head.json", json.dumps({"version": number}).encode())
            except StorageError as error:  # committed all the same; without it the head is only found more slowly
                logger.warning("version %d is committed, but head.json could not be written: %s", number, error)
        return version

    def _check_ground(self, parent: Version | None) -> None:
        """Raises CorruptObject: a version after `parent` would stand on nothing."""
        if parent is not None:
            self.check(parent)
        else:
            self.exists()  # which knows a lost history from none; that there is a version 0 by now, the PUT tells

    def _take_back(self, version: Version) -> None:
        """Remove what an attempt wrote whose parent is gone: its manifest and blobs would be taken for a lost history's.

        Others can have built on it only if the parent was there after all: then it stays.
        """
        own = f"{self.model}/blobs/{version.number:08d}-"
        try:
            key = self._manifest_key(version.number)
            with contextlib.suppress(NotFound, StoreNotFound):
                info = self.store.stat(key)
                if sha256(self.store.read(key, if_match=info.etag)) == version.sha256:
                    if self._has(version.number + 1):
                        return
                    self.store.delete(key, if_match=info.etag)
            for ref in version.manifest.blobs.refs:
                if ref.key.startswith(own):
                    with contextlib.suppress(NotFound, StoreNotFound):
                        self.store.delete(ref.key)
        except StorageError as error:
            logger.warning(
                "%s: what was written for version %d could not be taken back: %s", self.url, version.number, error
            )

    def rollback(self, target: Version, head: Version | None = None) -> Version:
        """Append a version with the weights and state of `target`. Owed shards and tombstones stay the head's.

        The blobs are copied under new names: garbage collection may be removing the old ones at this moment.

        Raises:
            HeadMoved: `head`, about which it was decided (None: whichever it is now), is the head no more.
        """
        head = head or self.head()
        blobs, number = target.manifest.blobs, head.number + 1
        weights, state = self.read_blob(blobs.weights), self.read_blob(blobs.state)
        entry = Entry(
            kind="rollback",
            spec=target.manifest.spec,
            resolved_spec=target.manifest.resolved_spec,
            columns=target.manifest.columns,
            blobs=Blobs(
                weights=self.write_blob(number, "safetensors", weights),
                state=self.write_blob(number, "state.safetensors", state),
                tombstones=self.carried_tombstones(head),
            ),
            owed=head.manifest.owed,
            new_columns=head.manifest.new_columns,
            metrics=target.manifest.metrics,
            counters=target.manifest.counters,
            dataset=target.manifest.dataset,
            rolled_back_to=target.number,
            environment=target.manifest.environment,
        )
        return self.commit(head, entry)

    # ---- keys --------------------------------------------------------------------------------------------------------
    def _manifest_key(self, number: int) -> str:
        return f"{self.model}/log/{number:08d}.json"

    def _has(self, number: int) -> bool:
        try:
            self.store.stat(self._manifest_key(number))
        except NotFound:
            return False
        return True

    def _first_above(self, number: int) -> int | None:
        """A version above this number that has a manifest, whatever lies between."""
        prefix = f"{self.model}/log/"
        for info in self.store.list(prefix, after=self._manifest_key(number) if number >= 0 else ""):
            if (found := _MANIFEST.fullmatch(info.key.removeprefix(prefix))) is not None:
                return int(found[1])
        return None

    def _hint(self) -> int:
        """A version that probably exists; only ever a place to start looking."""
        try:
            number = json.loads(self.store.read(f"{self.model}/head.json"))["version"]
        except (NotFound, CorruptObject, ValueError, KeyError, TypeError, RecursionError):
            return 0
        # A number of hundreds of digits would be a key that no store takes.
        return number if type(number) is int and 0 < number < 10**15 and self._has(number) else 0

    def _newest(self, known: int) -> int:
        """The last number without a gap from `known` on, by doubling steps and then bisection; -1 for none at all."""
        if known == 0 and not self._has(0):
            return -1
        step = 1
        while self._has(known + step):
            known += step
            step *= 2
        absent = known + step
        while absent - known > 1:
            middle = (known + absent) // 2
            known, absent = (middle, absent) if self._has(middle) else (known, middle)
        return known

    def unknown(self) -> UnknownModel:
        """What to raise if the model does not exist: says which ones do."""
        known = _models(self.store)
        nearest = difflib.get_close_matches(self.model, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return UnknownModel(
            f"{self.store.url} holds no model {self.model!r}.{hint} It holds: {', '.join(known) or 'none'}. "
            "A model begins with `tidemill train`; check the registry's URL and the name."
        )


def _stored_tombstones(version: Version) -> tuple[TombstonesRef | None, int]:
    """(the blob of tombstones that a version names, the last version whose shards it has)."""
    ref = version.manifest.blobs.tombstones
    if ref is None:
        return None, -1
    return ref, version.number if ref.version is None else ref.version


def open_log(registry: str, model: str, *, writable: bool = True) -> VersionLog:
    """The version log of `model` in the registry at this URL.

    Raises:
        UnsupportedStore: for writing, the store must honour put-if-absent; it is asked once per process.
    """
    store = open_store(registry)
    log = VersionLog(store, model)
    if writable:
        check_preconditions(store)
    return log


def list_models(registry: str) -> list[str]:
    """Names of all models in a registry. Lists all of its keys."""
    return _models(open_store(registry))


def _models(store: Store) -> list[str]:
    """Those with any manifest: one whose beginning was lost is still one."""
    return sorted(
        {info.key.split("/")[0] for info in store.list() if re.fullmatch(r"[^/]+/log/\d{8,}\.json", info.key)}
    )

"""The version log of one model: how a version comes to exist, and is never lost or written twice.

A version exists from the moment that `log/<version>.json` is created, put-if-absent; nothing else is a commit. How versions are
found again and checked is in `chain.py`. Blobs are written before, under names that only one attempt uses. See
`docs/format.md` for every object and `docs/guarantees.md` for what follows from it.
"""

import contextlib
import json
import logging
import uuid
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from tidemill.storage.blobs import BlobChain
from tidemill.storage.chain import Version, models_in
from tidemill.storage.errors import (
    CorruptObject,
    HeadMoved,
    NotFound,
    StorageError,
    StoreNotFound,
    UnknownVersion,
)
from tidemill.storage.manifest import (
    Blobs,
    Entry,
    Manifest,
    Parent,
    decode,
    encode,
    sha256,
)
from tidemill.storage.parallel import concurrently
from tidemill.storage.probe import check_preconditions
from tidemill.storage.refs import TombstonesRef
from tidemill.storage.store import create_or_same
from tidemill.storage.tombstones import Tombstones, due
from tidemill.storage.urls import open_store

logger = logging.getLogger("tidemill.storage")

HINT_EVERY: Final = 16
"""A run that opens the log starts to look for the head at most this many versions below it."""


class VersionLog(BlobChain):
    """The history of one model below a registry: blobs, tombstones, and the versions that name them."""

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
            since = [*concurrently(self.older, numbers, self.store.concurrency), version]
            for parent, child in pairwise(since):
                self.check_link(parent, child)
            for each in since:
                for shard in each.manifest.consumed_objects:
                    found.add(shard.inbox, shard.key, shard.sha256, shard.etag)
        return found

    def tombstones_due(self, parent: Version, unstored: int = 0) -> bool:
        """True if the version after `parent` must store a new tombstone blob; `unstored`: tombstones added since the last."""
        _, stored = _stored_tombstones(parent)
        return due(parent.number + 1 - stored, unstored)

    def write_tombstones(self, number: int, tombstones: Tombstones) -> TombstonesRef:
        """Store all tombstones for version `number`, as `write_blob` does."""
        ref = self.write_blob(number, "tombstones.jsonl", tombstones.encode())
        tombstones.unstored = 0
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
            ValueError: the version would name blobs that neither its parent names nor this attempt has written.
        """
        nonce, number = uuid.uuid4().hex, 0 if parent is None else parent.number + 1
        self._check_blobs(parent, entry.blobs, number)
        manifest = Manifest(
            **dict(entry),
            model=self.model,
            version=number,
            parent=None if parent is None else Parent(version=parent.number, sha256=parent.sha256),
            nonce=nonce,
            created=datetime.now(UTC),
        )
        data, key = encode(manifest), self.manifest_key(number)
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

    def _check_blobs(self, parent: Version | None, blobs: Blobs, number: int) -> None:
        """Raises ValueError: a version would need blobs that a collection may be removing.

        A collection lists the blobs, then reads the head. It deletes no blob that the head names, and none with a higher number.
        So no blob that a child of the head names is deleted, however long ago the collection or the writer began.
        """
        own = f"{self.model}/blobs/{number:08d}-"
        kept = frozenset[str]() if parent is None else parent.manifest.blobs.object_keys
        if strange := {key for key in blobs.object_keys - kept if not key.startswith(own)}:
            raise ValueError(f"{self.url}: version {number} would name {min(strange)}, which its parent does not name")

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
            key = self.manifest_key(version.number)
            with contextlib.suppress(NotFound, StoreNotFound):
                info = self.store.stat(key)
                if sha256(self.store.read(key, if_match=info.etag)) == version.sha256:
                    if self.has(version.number + 1):
                        return
                    self.store.delete(key, if_match=info.etag)
            for blob in version.manifest.blobs.object_keys:
                if blob.startswith(own):
                    with contextlib.suppress(NotFound, StoreNotFound):
                        self.store.delete(blob)
        except StorageError as error:
            logger.warning(
                "%s: what was written for version %d could not be taken back: %s", self.url, version.number, error
            )

    def rollback(self, target: Version, head: Version | None = None) -> Version:
        """Append a version with the weights and state of `target`. Owed shards and tombstones stay the head's.

        The blobs are copied under new names: garbage collection may be removing the old ones at this moment. Only what the head
        names too is named again.

        Raises:
            HeadMoved: `head`, about which it was decided (None: whichever it is now), is the head no more.
        """
        head = head or self.head()
        number = head.number + 1
        weights, state = self.copy_blobs(number, target.manifest.blobs, parent=head.manifest.blobs)
        entry = Entry(
            kind="rollback",
            spec=target.manifest.spec,
            resolved_spec=target.manifest.resolved_spec,
            columns=target.manifest.columns,
            blobs=Blobs(
                weights=weights,
                state=state,
                tombstones=self.carried_tombstones(head),
            ),
            owed=head.manifest.owed,
            open_labels=head.manifest.open_labels,
            new_columns=head.manifest.new_columns,
            metrics=target.manifest.metrics,
            counters=target.manifest.counters,
            dataset=target.manifest.dataset,
            rolled_back_to=target.number,
            environment=target.manifest.environment,
        )
        return self.commit(head, entry)


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
    return models_in(open_store(registry))

"""The chain of one model's versions as it is read: the head found, every link checked, no gap taken for an end.

Manifests are never deleted and have no gaps, which is why the head can be found by looking for the first number that is absent.
What appends to the chain is in `log.py`.
"""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from tidemill.storage.errors import CorruptObject, NotFound, StoreNotFound, UnknownModel, UnknownVersion
from tidemill.storage.manifest import Manifest, Parent, decode, sha256
from tidemill.storage.store import Store
from tidemill.storage.traces import traces_above

_ALTERED: Final = "The history was altered; restore it, for example from bucket versions."
_GAP: Final = (
    "Versions are never deleted: restore their manifests from a backup or from bucket versions, and let no lifecycle rule reach "
    "them; what cannot be restored ends this model (train another one under another name, or remove all of this one first)."
)
_MANIFEST: Final = re.compile(r"(\d{8,})\.json")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What models and aliases may be called."""


@dataclass(frozen=True)
class Version:
    """A committed version: its manifest, and the sha256 of the manifest's bytes that its child will name."""

    manifest: Manifest
    sha256: str

    @property
    def number(self) -> int:
        return self.manifest.version


class Chain:
    """The manifests of one model below a registry, and how they follow from each other."""

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
            if not self.has(number + 1):
                raise CorruptObject(
                    f"{self.url}/log: version {number + 1} is gone, though version {above} is there. {_GAP}"
                )
            number = self._newest(number + 1)  # committed since
        if not self.has(0):
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
            if self.has(0):
                return True
            trace = self._lost_beginning()
            if trace is None or self.has(0):  # the second: begun since
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
        key = self.manifest_key(version.number)
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
        self.store.make_durable(self.manifest_key(version.number))

    def version(self, number: int) -> Version:
        """One version by number.

        Raises:
            UnknownVersion, CorruptObject, UnsupportedFormat.
        """
        key = self.manifest_key(number)
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
        found = self.older(parent.version)
        self.check_link(found, child)
        return found

    def older(self, number: int) -> Version:
        """A version that must be there, because a later one is."""
        try:
            return self.version(number)
        except UnknownVersion as error:
            raise CorruptObject(f"{self.url}/log: version {number} is gone. {_ALTERED}") from error

    def check_link(self, parent: Version, child: Version) -> None:
        """Raises CorruptObject: `child` was not made from `parent`."""
        if child.manifest.parent != Parent(version=parent.number, sha256=parent.sha256):
            raise CorruptObject(
                f"{self.url}/log: version {child.number} was made from another version {parent.number} than the one "
                f"stored. {_ALTERED}"
            )

    # ---- keys --------------------------------------------------------------------------------------------------------
    def manifest_key(self, number: int) -> str:
        """Where the manifest of a version is, below the registry."""
        return f"{self.model}/log/{number:08d}.json"

    def has(self, number: int) -> bool:
        """Whether a version has a manifest."""
        try:
            self.store.stat(self.manifest_key(number))
        except NotFound:
            return False
        return True

    def _first_above(self, number: int) -> int | None:
        """A version above this number that has a manifest, whatever lies between."""
        prefix = f"{self.model}/log/"
        for info in self.store.list(prefix, after=self.manifest_key(number) if number >= 0 else ""):
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
        return number if type(number) is int and 0 < number < 10**15 and self.has(number) else 0

    def _newest(self, known: int) -> int:
        """The last number without a gap from `known` on, by doubling steps and then bisection; -1 for none at all."""
        if known == 0 and not self.has(0):
            return -1
        step = 1
        while self.has(known + step):
            known += step
            step *= 2
        absent = known + step
        while absent - known > 1:
            middle = (known + absent) // 2
            known, absent = (middle, absent) if self.has(middle) else (known, middle)
        return known

    def unknown(self) -> UnknownModel:
        """What to raise if the model does not exist: says which ones do."""
        known = models_in(self.store)
        nearest = difflib.get_close_matches(self.model, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return UnknownModel(
            f"{self.store.url} holds no model {self.model!r}.{hint} It holds: {', '.join(known) or 'none'}. "
            "A model begins with `tidemill train`; check the registry's URL and the name."
        )


def models_in(store: Store) -> list[str]:
    """Those with any manifest or alias: one whose beginning was lost is still one."""
    own = re.compile(r"[^/]+/(log/\d{8,}|aliases/[^/]+)\.json")
    return sorted({info.key.split("/")[0] for info in store.list() if own.fullmatch(info.key)})

"""Tombstones: which shards were consumed lately, so that a producer that sends one again does not train it twice.

Stored now and then as a blob of JSON lines, oldest first: `["<inbox>", "<key>", "<sha256>", "<etag>"]`. What was consumed since
stands in the manifests: writing 10,000 of them at each commit would cost more than training on a small shard.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from tidemill.storage.errors import CorruptObject
from tidemill.storage.manifest import ObjectRef
from tidemill.storage.store import ObjectInfo

WINDOW = 10_000
"""How many of the last consumed shards are remembered at least. One that is still in the inbox is remembered in any case."""
WHOLE_VERSIONS = 32
"""How many versions may follow a blob before the next one: a run that opens the log reads their manifests."""
WHOLE_SHARDS = 2500
"""How many shards may be consumed before the next blob."""


def due(versions: int, shards: int) -> bool:
    """Whether to write a new blob, `versions` versions and `shards` shards after the last."""
    return versions > WHOLE_VERSIONS or shards >= WHOLE_SHARDS


class Tombstones:
    """The identities of consumed shards, in the order of their consumption."""

    def __init__(self) -> None:
        self.unstored = 0
        """How many were added since these were stored as a whole."""
        self._lines: dict[tuple[str, str, str], tuple[str, bytes]] = {}
        self._etags: dict[tuple[str, str, str], str] = {}
        self._spellings: Mapping[str, str] = {}

    @classmethod
    def decode(cls, data: bytes, where: str) -> "Tombstones":
        """Raises: CorruptObject."""
        self = cls()
        try:
            for line in data.splitlines():
                fields = json.loads(line)
                if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
                    raise ValueError(f"{line[:100]!r} is no list of strings")
                self.add(*fields)
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptObject(f"{where} does not hold tombstones: {error}") from error
        self.unstored = 0
        return self

    def encode(self) -> bytes:
        return b"".join(line for _, line in self._lines.values())

    def respell(self, spelled: Callable[[str], str]) -> None:
        """Let URLs of one inbox stand for the one that `spelled` returns for each of them; stored lines keep theirs."""
        inboxes = {inbox for inbox, _, _ in self._lines}
        self._spellings = {url: asked for url in inboxes if (asked := spelled(url)) != url}
        if not self._spellings:
            return
        lines, unstored = [json.loads(line) for _, line in self._lines.values()], self.unstored
        self._lines, self._etags = {}, {}
        for fields in lines:
            self.add(*fields)
        self.unstored = unstored

    def add(self, inbox: str, key: str, sha256: str, etag: str) -> None:
        line = json.dumps([inbox, key, sha256, etag]).encode() + b"\n"
        inbox = self._spellings.get(inbox, inbox)
        self._forget((inbox, key, sha256))  # so that one consumed again counts as recent
        self.unstored += 1
        self._lines[inbox, key, sha256] = etag, line
        self._etags[inbox, key, etag] = sha256

    def has(self, inbox: str, key: str, sha256: str) -> bool:
        """True if this shard was consumed: the same key and the same bytes."""
        return (inbox, key, sha256) in self._lines

    def sha256_of(self, inbox: str, key: str, etag: str) -> str | None:
        """Of a consumed shard with this etag, without having read the bytes: an equal etag means equal bytes.

        None says nothing: the same bytes may have come under another etag.
        """
        return self._etags.get((inbox, key, etag))

    def prune(self, inboxes: Collection[str], keep: Iterable[tuple[str, str, str]] = (), window: int = WINDOW) -> None:
        """Forget all but the last `window` of these inboxes: another run may have kept its shards in another one.

        Never one of `keep` (inbox, key, sha256): those are still in the inbox.
        """
        identities = [identity for identity in self._lines if identity[0] in inboxes]
        if (surplus := len(identities) - window) <= 0:
            return
        kept = {(self._spellings.get(inbox, inbox), key, sha256) for inbox, key, sha256 in keep}
        for identity in identities[:surplus]:
            if identity not in kept:
                self._forget(identity)

    def _forget(self, identity: tuple[str, str, str]) -> None:
        if (found := self._lines.pop(identity, None)) is not None:
            self._etags.pop((identity[0], identity[1], found[0]), None)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return iter(self._lines)


class Seen:
    """Which objects of inboxes were consumed before, told without reading them: the one answer for whoever lists an inbox."""

    def __init__(
        self, tombstones: Tombstones, owed: Iterable[ObjectRef], spelled: Callable[[str], str] = lambda url: url
    ) -> None:
        """Tell by etags.

        Args:
            tombstones: What a version remembers.
            owed: What that version is done with, and what may still be there.
            spelled: The URL by which the lister knows an inbox that `owed` may spell in another way.
        """
        self._tombstones = tombstones
        self._owed = {(spelled(debt.inbox), debt.key, debt.etag) for debt in owed}

    def consumed(self, inbox: str, info: ObjectInfo) -> bool:
        """True if this object was consumed, or rejected and not yet removed.

        False may be wrong: the same bytes may have come under another etag. Then their sha256 tells (`Tombstones.has`).
        """
        shard = (inbox, info.key, info.etag)
        return shard in self._owed or self._tombstones.sha256_of(*shard) is not None

    def again(self, inbox: str, info: ObjectInfo) -> ObjectRef | None:
        """The consumed object, if it is there although no removal of it is owed: it was sent again, or kept."""
        shard = (inbox, info.key, info.etag)
        digest = None if shard in self._owed else self._tombstones.sha256_of(*shard)
        return None if digest is None else ObjectRef(inbox=inbox, key=info.key, sha256=digest, etag=info.etag)

"""Shards on their way into training: fetched, checked and decoded while those before them are trained on.

What is handed out, and in which order, follows from the listing alone, never from which read is faster. What became of
reading one shard is decided here, once: it can be trained on, it never can, or a later listing decides (`Read`).
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa

from tidemill.storage.errors import (
    NotFound,
    NotReady,
    PreconditionFailed,
    ShardRejected,
    StorageError,
    StoreFull,
    StoreNotFound,
    Unavailable,
    UnsupportedStore,
)
from tidemill.storage.inbox import Inbox, Shard
from tidemill.storage.manifest import JoinedLabels, LabelShard
from tidemill.storage.parquet import RowGroup as FileGroup
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.training.errors import ColumnError, ModelFails, described, of_the_machine
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.once import Decoded

AHEAD_BYTES: Final = 64 * 2**20
"""Shards are read ahead while they and their labels have no more bytes together than this; a larger one is read alone."""
DECODED_BYTES: Final = 4 * 2**20
"""Larger shards are not decoded ahead. They are decoded at each use, which is cheap next to training on them."""

_OF_THE_STORE: Final = (Unavailable, StoreNotFound, StoreFull, UnsupportedStore)
"""Errors that say something of a store, and nothing of the object that was asked for."""


# ---- what became of reading a shard ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Readable:
    """A shard that can be scored and trained on."""

    shard: Shard
    groups: Sequence[RowGroup]
    labels: LabelShard | None = None
    """Where its targets come from, if not from the shard itself."""
    joined: tuple[JoinedLabels, ...] | None = None
    """The same where labels come row by row."""
    labelled: bool = True
    """False: labels come row by row, and none came in time for any row of the shard: nothing can be learned of it."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds: those of the file, and those of its decoded and encoded columns."""
        return len(self.shard.data) + sum(group.nbytes for group in self.groups if isinstance(group, Decoded))


@dataclass(frozen=True)
class Unusable:
    """A shard that can never be used as it is: of features; or of labels, and then its features wait for better ones."""

    shard: Shard
    reason: str
    unforeseen: bool = False
    """True: nobody had thought of this error. It is the shard's fault only if another shard can be trained on."""


@dataclass(frozen=True)
class Later:
    """A shard that cannot be used now; a later listing decides."""

    reason: str | None = None
    """Why it cannot be read, where that is for a person to mend. None: it has gone, has changed, or is not whole yet."""


Read = Readable | Unusable | Later


def read_shard(
    inbox: Inbox,
    complete: "Callable[[Shard, Sequence[FileGroup], Features], Read] | None",
    features: Features,
    grace_seconds: float,
    info: ObjectInfo,
) -> Read:
    """Fetch a shard, check its columns, and decode them if it is small.

    Args:
        inbox: Where it was listed.
        complete: Joins the shard with the labels that have come for it; None if labels are not delayed.
        features: The columns that training needs.
        grace_seconds: What is no whole Parquet file is unusable once it has not changed for this long.
        info: The shard as it was listed.

    Raises:
        Unavailable, StoreNotFound: the store as a whole cannot be read.
    """
    shard = fetched(inbox, info)
    if isinstance(shard, Later):
        return shard
    try:
        groups = shard.row_groups(features.types)
        found = Readable(shard, groups) if complete is None else complete(shard, groups, features)
        if not isinstance(found, Readable):
            return found
        features.check(found.groups[0].schema, info.key)
        return replace(found, groups=_decoded(found.groups, features, info.size))
    except NotReady as unready:
        return unfinished(inbox, shard, unready, grace_seconds)
    except (ShardRejected, ColumnError) as bad:
        return Unusable(shard, str(bad))
    except Exception as error:
        if not may_be_the_shards(error):
            raise
        return Unusable(shard, described(error), unforeseen=True)


def fetched(inbox: Inbox, info: ObjectInfo) -> Shard | Later:
    """The whole object as it was listed. One that cannot be read must not stop the others."""
    try:
        return inbox.read(info) or Later()
    except _OF_THE_STORE:
        raise
    except StorageError as error:
        return Later(str(error))


def unfinished(inbox: Inbox, shard: Shard, unready: NotReady, grace_seconds: float) -> Unusable | Later:
    """What an object is that is no whole Parquet file: its writer is still at it, or has given up."""
    return Unusable(shard, str(unready)) if inbox.is_stable(shard.info, grace_seconds) else Later()


def count_rows(inbox: Inbox, grace_seconds: float, info: ObjectInfo) -> int | None:
    """How many rows a shard has, by its footer alone; None where reading it would end in `Later`.

    Raises:
        ShardRejected: it can never be used.
        Unavailable, StoreNotFound: as in `read_shard`.
    """
    try:
        return inbox.count_rows(info)
    except (NotFound, PreconditionFailed):
        return None
    except NotReady as unready:
        if inbox.is_stable(info, grace_seconds):
            raise ShardRejected(str(unready)) from unready
        return None
    except (ShardRejected, *_OF_THE_STORE):
        raise
    except StorageError:
        return None


def may_be_the_shards(error: Exception) -> bool:
    """Whether an error met on a shard's rows may be the fault of these rows.

    Errors of a store, of memory or of an accelerator never are, nor is ModelFails. All others may be: of the model, the loss, a
    metric, Arrow.
    """
    return isinstance(error, ShardRejected) or not (
        isinstance(error, StorageError | ModelFails) or of_the_machine(error)
    )


def _decoded(groups: Sequence[RowGroup], features: Features, size: int) -> Sequence[RowGroup]:
    """The groups, decoded, if that takes no more than `DECODED_BYTES`; `size` is that of the file."""
    if size > DECODED_BYTES or sum(group.num_rows for group in groups) * features.row_bytes > DECODED_BYTES:
        return groups  # values that compress well may be far more bytes than the file
    columns = features.names(labelled=True)
    tables, nbytes = list[pa.Table](), 0
    for group in groups:
        tables.append(group.read(columns))
        nbytes += tables[-1].nbytes
        if nbytes > DECODED_BYTES:
            return groups
    return [Decoded(group, table, features.row_bytes) for group, table in zip(groups, tables, strict=True)]


# ---- reading ahead ---------------------------------------------------------------------------------------------------
class Kept:
    """Shards that were read before their turn, because a trigger asked how the model does on them.

    They hold at most `AHEAD_BYTES`. What does not fit is read again when it has its turn.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Readable] = {}
        self._bytes = 0

    def put(self, identity: Hashable, found: Readable) -> None:
        """Keep a shard under an identity, which says exactly which bytes it was made of."""
        if identity not in self._found and self._bytes + found.nbytes <= AHEAD_BYTES:
            self._found[identity] = found
            self._bytes += found.nbytes

    def pop(self, identity: Hashable) -> Readable | None:
        """Hand out what is kept under an identity, once."""
        if (found := self._found.pop(identity, None)) is not None:
            self._bytes -= found.nbytes
        return found

    def only(self, identities: Iterable[Hashable]) -> None:
        """Drop all others."""
        for gone in self._found.keys() - set(identities):
            self.pop(gone)


class Reader:
    """Reads shards in order, some of them ahead of their turn; `workers` at once. With one worker, none is read ahead."""

    def __init__(
        self,
        shards: Iterable[ObjectInfo],
        read: Callable[[ObjectInfo], Read],
        size: Callable[[ObjectInfo], int],
        workers: int,
    ) -> None:
        """`read` may be called from any thread; `size` tells how many bytes it will hold."""
        self._waiting = deque(shards)
        self._again: deque[ObjectInfo] = deque()
        """These have their turn before all others, and are read in it: what was read ahead meanwhile is kept."""
        self._read, self._size, self._ahead = read, size, 2 * workers if workers > 1 else 0
        self._coming: deque[tuple[ObjectInfo, Future[Read]]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tidemill-reader")

    def __len__(self) -> int:
        return len(self._again) + len(self._coming) + len(self._waiting)

    @property
    def upcoming(self) -> ObjectInfo:
        """The shard whose turn it is."""
        if self._again:
            return self._again[0]
        return self._coming[0][0] if self._coming else self._waiting[0]

    def take(self) -> tuple[ObjectInfo, Read]:
        """The shard whose turn it is, and what became of reading it; reading of the next ones goes on.

        Raises what `read_shard` raises; the shard has then had its turn.
        """
        if self._again or not self._ahead:
            info = (self._again or self._waiting).popleft()
            return info, self._read(info)
        self._prefetch()
        info, coming = self._coming.popleft()
        self._prefetch()
        return info, coming.result()

    def begin(self) -> None:
        """Begin to read what comes first, before its turn."""
        if self._ahead:
            self._prefetch()

    def _prefetch(self) -> None:
        size = sum(self._size(info) for info, _ in self._coming)
        while self._waiting and len(self._coming) < self._ahead:
            size += self._size(self._waiting[0])
            if self._coming and size > AHEAD_BYTES:
                return
            info = self._waiting.popleft()
            self._coming.append((info, self._pool.submit(self._read, info)))

    def put_back(self, shards: Sequence[ObjectInfo]) -> None:
        """Let these have their turn once more, before all others."""
        self._again.extendleft(reversed(shards))

    def close(self) -> None:
        """Hand out nothing more. What is being read is waited for, and dropped."""
        stopped, self._coming = self._coming, deque()
        # Not cancelled: which requests a run makes follows from the listing alone, and tests interrupt each of them.
        wait([coming for _, coming in stopped])
        self._again.clear()
        self._waiting.clear()
        self._pool.shutdown()

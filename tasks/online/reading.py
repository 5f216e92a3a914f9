"""Shards on their way into training: fetched, checked and decoded while those before them are trained on.

What is handed out, and in which order, follows from the listing alone, never from which read is faster.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa

from tidemill.storage.errors import NotReady, ShardRejected
from tidemill.storage.inbox import Inbox, Shard
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.online.delayed import BadLabels, Complete, DelayedLabels
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup

AHEAD_BYTES: Final = 64 * 2**20
"""Shards are read ahead for as long as they and their labels have no more bytes together than this; or one of them."""
DECODED_BYTES: Final = 4 * 2**20
"""A shard that takes more when encoded is decoded piece by piece when it is used, as often as it is: there it costs little."""


@dataclass(frozen=True)
class Ready:
    """A shard that was read, and what can be trained on."""

    shard: Shard
    found: Complete | None
    """None: its labels have gone since they were listed, or there is a problem."""
    problem: Exception | None = None
    """Why it cannot be used now (NotReady) or ever (ShardRejected, BadLabels, ColumnError)."""

    def complete(self) -> Complete | None:
        """What was found. Raises the problem."""
        if self.problem is not None:
            raise self.problem
        return self.found


@dataclass(frozen=True)
class Decoded:
    """A row group whose columns have been decoded already."""

    group: RowGroup
    table: pa.Table

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def num_rows(self) -> int:
        return self.group.num_rows

    @property
    def schema(self) -> pa.Schema:
        return self.group.schema

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns; those that nobody had expected are decoded now."""
        if set(columns) <= set(self.table.column_names):
            return self.table.select(list(columns))
        return self.group.read(columns)


def read_shard(inbox: Inbox, delayed: DelayedLabels | None, features: Features, info: ObjectInfo) -> Ready | None:
    """Fetch a shard, and its labels if they are delayed; check its columns, and decode them if it is small.

    None if it went or changed since it was listed.
    """
    if (shard := inbox.read(info)) is None:
        return None
    try:
        groups = shard.row_groups()
        found = Complete(groups, None)
        if delayed is not None:
            completed = delayed.completed(shard, groups, features)
            if completed is None:
                return Ready(shard, None)
            found = completed
        features.check(found.groups[0].schema, info.key)
        return Ready(shard, replace(found, groups=_decoded(found.groups, features, info.size)))
    except (NotReady, BadLabels, ShardRejected, ColumnError) as problem:
        return Ready(shard, None, problem)


def _decoded(groups: Sequence[RowGroup], features: Features, size: int) -> Sequence[RowGroup]:
    """The groups, decoded, if that takes no more than `DECODED_BYTES`; `size` is that of the file."""
    if size > DECODED_BYTES or sum(group.num_rows for group in groups) * features.row_bytes > DECODED_BYTES:
        return groups  # values that compress well may be far more bytes than the file
    columns = features.names(labelled=True)
    tables: list[pa.Table] = []
    decoded = 0
    for group in groups:
        tables.append(group.read(columns))
        decoded += tables[-1].nbytes
        if decoded > DECODED_BYTES:
            return groups
    return [Decoded(group, table) for group, table in zip(groups, tables, strict=True)]


class Reader:
    """Reads shards in order, some of them ahead of their turn; `workers` at once. With one worker, none is read ahead."""

    def __init__(
        self,
        shards: Iterable[ObjectInfo],
        read: Callable[[ObjectInfo], Ready | None],
        size: Callable[[ObjectInfo], int],
        workers: int,
    ) -> None:
        """`read` may be called from any thread; `size` tells how many bytes it will hold."""
        self._waiting = deque(shards)
        self._read, self._size, self._ahead = read, size, 2 * workers if workers > 1 else 0
        self._coming: deque[tuple[ObjectInfo, Future[Ready | None]]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tidemill-reader")

    def __len__(self) -> int:
        return len(self._coming) + len(self._waiting)

    @property
    def upcoming(self) -> ObjectInfo:
        """The shard whose turn it is."""
        return self._coming[0][0] if self._coming else self._waiting[0]

    def take(self) -> tuple[ObjectInfo, Ready | None]:
        """The shard whose turn it is, read (None: it has gone or changed); reading of the next ones goes on.

        Raises what `Inbox.read` raises; the shard has then had its turn.
        """
        if not self._ahead:
            info = self._waiting.popleft()
            return info, self._read(info)
        self._fill()
        info, coming = self._coming.popleft()
        self._fill()
        return info, coming.result()

    def _fill(self) -> None:
        size = sum(self._size(info) for info, _ in self._coming)
        while self._waiting and len(self._coming) < self._ahead:
            size += self._size(self._waiting[0])
            if self._coming and size > AHEAD_BYTES:
                return
            info = self._waiting.popleft()
            self._coming.append((info, self._pool.submit(self._read, info)))

    def put_back(self, shards: Sequence[ObjectInfo]) -> None:
        """Let these have their turn once more, before all others."""
        again = [*shards, *self._stop()]
        self._waiting.extendleft(reversed(again))

    def close(self) -> None:
        """Hand out nothing more."""
        self._stop()
        self._waiting.clear()
        self._pool.shutdown()

    def _stop(self) -> list[ObjectInfo]:
        """Wait for what is being read, and drop it."""
        stopped, self._coming = self._coming, deque()
        # Not cancelled: which requests a run makes follows from the listing alone, and tests interrupt each of them.
        wait([coming for _, coming in stopped])
        return [info for info, _ in stopped]

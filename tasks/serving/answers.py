"""The log of answers: what was asked and what was answered, as Parquet shards in an inbox.

It never fails or slows an answer: a thread of its own makes and stores the shards. While the store is away, answers wait in
memory up to a bound; those beyond it are dropped, and counted and told. Killed, a worker takes with it what is in no stored
shard: the answers of at most the time that was asked for, where the store takes no longer than half of that.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tidemill.storage.errors import NotFound, StorageError
from tidemill.storage.store import Store, create_or_same
from tidemill.tasks.serving.tables import Answered, table_of_answers

if TYPE_CHECKING:
    from tidemill.tasks.serving.metrics import Numbers

logger = logging.getLogger("tidemill.serve")

BUFFER_BYTES: Final = 128 * 2**20
"""Answers that wait in memory for their shard, as they are counted by `Answered.size`. Those beyond it are dropped."""
RETRY_SECONDS: Final = 1.0
"""How long after a store refused a shard it is asked again; the store's own retries come first."""
TOLD_SECONDS: Final = 60.0
"""A warning about dropped answers is repeated no sooner."""


class AnswerLog:
    """Takes answers, and stores them as shards. Threads may share it."""

    def __init__(
        self, store: Store, rows: int, seconds: float, numbers: "Numbers", *, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        """Begins at once.

        Args:
            store: The inbox.
            rows: A shard is made once this many rows wait.
            seconds: An answer is in a stored shard after this time, unless the store takes more than half of it.
            numbers: Where rows are counted.
            buffer_bytes: How much may wait in memory.
        """
        self._store, self._rows, self._seconds = store, rows, seconds / 2
        self._numbers, self._bound = numbers, buffer_bytes
        self._name, self._number = uuid.uuid4().hex, 0
        self._waiting: deque[tuple[float, Answered]] = deque()
        self._waiting_rows = self._bytes = self._dropped = 0
        self._ends = float("inf")
        """When the thread gives up, once the log is closed."""
        self._away, self._told = False, float("-inf")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="tidemill-answers", daemon=True)
        self._thread.start()

    def add(self, answered: Answered) -> None:
        """Take an answer, or drop it if too many wait. Returns at once."""
        with self._changed:
            if self._bytes + answered.size > self._bound or self._ends != float("inf"):
                self._drop(answered.rows)
                return
            self._waiting.append((time.monotonic(), answered))
            self._bytes += answered.size
            self._waiting_rows += answered.rows
            self._numbers.waiting.set(self._waiting_rows)
            if len(self._waiting) == 1 or self._waiting_rows >= self._rows:
                self._changed.notify()

    def close(self, seconds: float) -> None:
        """Store what waits, for at most this long. What is then in no shard is counted as dropped."""
        with self._changed:
            self._ends = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            left, self._waiting_rows = self._waiting_rows, 0
            if left:
                self._drop(left)
            if self._dropped:
                logger.warning("%s: %d rows of answers are in no shard", self._store.url, self._dropped)

    # ---- in the thread -----------------------------------------------------------------------------------------------
    def _write(self) -> None:
        while batch := self._next():
            rows = sum(answered.rows for answered in batch)
            try:
                stored = sum(self._stored(*file) for file in self._files(batch))
            except _GivenUp:
                return
            with self._changed:
                self._bytes -= sum(answered.size for answered in batch)
                self._waiting_rows -= rows
                self._numbers.waiting.set(self._waiting_rows)
                self._numbers.logged.inc(stored)
                if stored != rows:
                    self._drop(rows - stored)

    def _next(self) -> list[Answered]:
        """The answers of the next shard, once it is due; none: the log is closed and all is stored."""
        with self._changed:
            while True:
                closing = self._ends != float("inf")
                if not self._waiting:
                    if closing:
                        return []
                    self._changed.wait()
                    continue
                due = self._waiting[0][0] + self._seconds - time.monotonic()
                if closing or due <= 0 or self._waiting_rows >= self._rows:
                    break
                self._changed.wait(min(due, threading.TIMEOUT_MAX))
            batch, rows = list[Answered](), 0
            while self._waiting and rows < self._rows:
                batch.append(self._waiting.popleft()[1])
                rows += batch[-1].rows
            return batch

    def _files(self, batch: Sequence[Answered], *, alone: bool = False) -> list[tuple[int, bytes]]:
        """(rows, Parquet) of as few shards as the schemas allow. An answer that cannot be written is left out, no other one.

        `alone`: each answer has the types that it has by itself; several may not fit into those of all.
        """
        try:
            return [(table.num_rows, _parquet(table)) for table in _tables(batch, alone=alone)]
        except Exception as error:  # noqa: BLE001  # of whatever class: a request is not there to be logged
            if len(batch) == 1:
                logger.warning("an answer cannot be logged, and is left out: %r", error)
                return []
        whole = [answered for answered in batch if self._files([answered])]
        if not alone:
            return self._files(whole, alone=True)
        return [file for answered in whole for file in self._files([answered])]

    def _stored(self, rows: int, data: bytes) -> int:
        """Store one shard, however often it takes. How many rows.

        Raises:
            _GivenUp: the log was closed, and its time is up.
        """
        key = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{self._name}-{self._number:08d}.parquet"
        self._number += 1
        while True:
            try:
                create_or_same(self._store, key, data)
            except NotFound:  # stored by an earlier try, and consumed meanwhile
                pass
            except StorageError as error:
                if not self._away:
                    self._away = True
                    logger.warning("answers cannot be logged, and wait: %s", error)
                with self._changed:
                    self._changed.wait_for(lambda: time.monotonic() >= self._ends, RETRY_SECONDS)
                if time.monotonic() >= self._ends:
                    raise _GivenUp from error
                continue
            if self._away:
                self._away = False
                logger.warning("answers are logged to %s again", self._store.url)
            return rows

    def _drop(self, rows: int) -> None:
        """Count rows that no shard will hold. Called with the lock."""
        self._dropped += rows
        self._numbers.dropped.inc(rows)
        if time.monotonic() - self._told >= TOLD_SECONDS:
            self._told = time.monotonic()
            logger.warning("%s: answers are dropped from the log, %d rows so far", self._store.url, self._dropped)


class _GivenUp(Exception):
    """The log is closed, and its time is up."""


def _tables(batch: Sequence[Answered], *, alone: bool) -> Iterator[pa.Table]:
    """As few tables as their schemas allow."""
    groups: dict[object, list[Answered]] = {}
    for number, answered in enumerate(batch):
        kind = number if alone else None if answered.table is None else str(answered.table.schema)
        groups.setdefault((answered.predictor, answered.table is None, kind), []).append(answered)
    alike: dict[str, list[pa.Table]] = {}
    for group in groups.values():
        table = table_of_answers(group)
        alike.setdefault(str(table.schema), []).append(table)
    for tables in alike.values():
        yield pa.concat_tables(tables)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data

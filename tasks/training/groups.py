"""Where rows come from, how they are read ahead, and which of them are held out.

Shape legend: N rows of one row group.
"""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Final, Literal, Protocol, TypeVar, runtime_checkable

import pyarrow as pa
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # ships no type hints
from torch import Tensor

T = TypeVar("T")

AHEAD_BYTES: Final = 64 * 2**20
"""Several row groups are read at once for as long as their tables have no more bytes together than this."""
THREADS: Final = "tidemill-ahead"
"""How the names of the threads begin that work ahead."""


class RowGroup(Protocol):
    """A piece of a table that is read whole: a Parquet row group.

    `read` is called from background threads; different row groups of one `Remote` source are read at once.
    """

    @property
    def name(self) -> str:
        """Names the group in messages and seeds its split: the same data must always get the same name."""
        ...

    @property
    def num_rows(self) -> int: ...

    @property
    def schema(self) -> pa.Schema:
        """Schema of the whole file, not only of the columns that are read."""
        ...

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns, `num_rows` rows, in file order."""
        ...


def is_partition(group: RowGroup, column: str) -> bool:
    """Whether a column's value comes from a `name=value` folder (`tidemill.storage.partitions.MARK`)."""
    return (group.schema.field(column).metadata or {}).get(b"tidemill") == b"partition"


@dataclass(eq=False)
class TableGroup:
    """A row group that is a table in memory."""

    name: str
    table: pa.Table
    file: str = ""
    """What it is a part of, for messages."""

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    @property
    def readers(self) -> int:
        """One: nothing is waited for."""
        return 1

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns."""
        return self.table.select(list(columns))


@runtime_checkable
class Remote(Protocol):
    """What a row group is besides if it can say how many of its source are worth reading at once; of others, one is."""

    @property
    def readers(self) -> int:
        """How many."""
        ...


def read_ahead(groups: Iterable[RowGroup], read: Callable[[RowGroup], pa.Table]) -> Generator[pa.Table]:
    """`read` of each group, in order, in a thread while the table before it is used; a single group is read here.

    Groups that are `Remote` are read by as many threads as they say, for as long as what is under way or waits has no more than
    `AHEAD_BYTES` by what a row has had so far. In memory: the table in use, and one for each reader.

    Which groups are read follows from what was handed out alone, so that the requests of a run are always the same; in the end,
    what is under way is awaited. To be closed even if an error's traceback still refers to it, as `groups.prefetch` says.

    Raises:
        Exception: what `read` raises, when its group has its turn.
    """
    waiting = deque(groups)
    if len(waiting) == 1:  # starting a thread takes longer than reading a small shard
        yield read(waiting[0])
    if len(waiting) < 2:
        return
    readers = waiting[0].readers if isinstance(waiting[0], Remote) else 1  # they are all of one source
    coming = deque[tuple[int, Future[pa.Table]]]()  # with their rows
    seen_rows = seen_bytes = 0
    with ThreadPoolExecutor(readers, thread_name_prefix=THREADS, initializer=work_alone) as pool:

        def begin() -> None:
            coming.append((waiting[0].num_rows, pool.submit(read, waiting.popleft())))

        for _ in range(min(readers, 2)):  # as many tables as with one reader, of whatever size: none is in use yet
            begin()
        while coming:
            table = coming.popleft()[1].result()
            seen_rows += table.num_rows
            seen_bytes += table.get_total_buffer_size()
            while waiting and len(coming) < readers:
                ahead_rows = waiting[0].num_rows + sum(rows for rows, _ in coming)
                if coming and ahead_rows * seen_bytes > AHEAD_BYTES * seen_rows:
                    break
                begin()
            yield table
            del table  # before the next one is awaited


def prefetch(items: Generator[T], needed: Callable[[bool], None] = lambda _: None) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used. In the end `items` is closed.

    `needed` is told when the next item is waited for (True), and when it is there (False).

    `items` is closed even if an error's traceback still refers to it: otherwise the garbage collector would close it, at a time
    and in a thread of its choice. Joining a thread while another one starts is a deadlock in CPython 3.11.
    """
    end = object()
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix=THREADS, initializer=work_alone) as executor:
        try:
            coming = executor.submit(next, items, end)
            while True:
                needed(True)
                item = coming.result()
                needed(False)
                if item is end:
                    return
                coming = executor.submit(next, items, end)
                yield item  # type: ignore[misc]  # only `end` is no T
        finally:
            needed(True)


def work_alone() -> None:
    """Lets torch's operators in this thread use no other one.

    OpenMP gives every thread its own helpers. Where there are more of all of them than cores, helpers sleep between operators in
    place of spinning: training a net of 256 hidden units with 2 threads on 2 cores fell to 0.74 of its speed.
    """
    torch.get_num_threads()  # torch sets a thread up at its first use, which would undo the limit
    _openmp().limit(limits=1, user_api="openmp")  # of this thread, by OpenMP's rules


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController()


def stable_seed(*key: str | int) -> int:
    """A 63-bit seed that depends on the key only, never on the process: Python's own `hash` is salted."""
    return int.from_bytes(blake2b(json.dumps(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded with `stable_seed(*key)`."""
    return torch.Generator().manual_seed(stable_seed(*key))


class Subset(Protocol):
    """Some rows of a dataset, however they were chosen."""

    def rows(self, group: RowGroup) -> Tensor:
        """bool [N]: which rows of the group they are."""
        ...


@dataclass(frozen=True)
class Split:
    """One side of a row-level split that depends only on the names of the row groups.

    Neither the spec's seed nor the epoch enters, so a held-out row is never trained on, whatever else is changed.
    """

    share: float
    """Of the rows, in (0, 1), that is held out."""
    side: Literal["train", "holdout"]
    """`holdout`: the rows that are held out. `train`: all others."""
    draw: str = "split"
    """Splits of two draws have nothing to do with each other."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}: choose a share of the rows between 0 and 1")

    def rows(self, group: RowGroup) -> Tensor:
        """bool [N]: which rows of the group are on this side."""
        random = generator(self.draw, group.name)
        holdout_N = torch.rand(group.num_rows, dtype=torch.float32, generator=random) < self.share
        return holdout_N if self.side == "holdout" else ~holdout_N


@dataclass(frozen=True, eq=False)
class Marked:
    """Rows that were chosen one by one."""

    chosen: Mapping[str, Tensor]
    """Name of a row group -> bool [N]."""

    def rows(self, group: RowGroup) -> Tensor:
        """As in `Subset`."""
        return self.chosen[group.name]


@dataclass(frozen=True)
class Both:
    """The rows that are among the one and among the other."""

    one: Subset
    other: Subset

    def rows(self, group: RowGroup) -> Tensor:
        """As in `Subset`."""
        return self.one.rows(group) & self.other.rows(group)

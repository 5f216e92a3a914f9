"""Row groups to batches: streamed, split, shuffled inside a window, with memory that does not grow with the data.

Shape legend: N rows of a row group, slice or window, B rows of a batch, F numbers and C ids of one row, T targets.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count, starmap
from typing import Final, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.cutting import Batch, Blocks, rebatched
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup, Subset, generator, is_partition, prefetch
from tidemill.tasks.training.once import Decoded, Rows
from tidemill.tasks.training.packing import place
from tidemill.tasks.training.pool import Empty, WindowPool

ORDER: Final = 3
"""Number of the rule that makes a shuffled order of a seed. Another rule needs another number: a batch run of one spec is then
another run, and a replay says why it finds other bits."""
PLACE_BYTES: Final = 4
"""Of a row while its window is filled: where it goes."""
MOVED_ROWS: Final = 16_384
"""At a time."""


class _Slice(NamedTuple):
    """Neighbouring rows of one row group."""

    group: RowGroup
    start: int
    stop: int
    wanted_N: Tensor | None
    """bool: rows on our side of the split; None: all of them"""
    rows: int
    """How many are wanted."""


class Stream:
    """One pass over row groups, in batches of `batch_size` rows (only the last may be smaller), or in the blocks of a plan.

    Unshuffled (`shuffle_seed` None), the batches are those of a plain loop over the rows in order. Shuffled, the row
    groups come in a random order, as many of them as fit `window_bytes` once encoded are mixed row by row, and window
    follows window; rows that turn out to have no label leave their window smaller. A row group that is larger than the
    window is cut into equal slices, which come in a random order, so that the setting always bounds the encoded rows.
    Every random number derives from `shuffle_seed` and from the position of a group or window in the pass.

    A row group is read, and a window prepared, each in a thread while the one before it is used; rows are encoded right
    into their places in the window. In memory at a time: the Arrow tables of two row groups (of more, within the bounds of
    `groups.read_ahead`, if they come from far away), the window being filled, and the window being used.

    Iterating raises ColumnError (see `Features`); before the last window, if a whole column turns out to be null.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        features: Features,
        *,
        batch_size: int,
        window_bytes: int,
        shuffle_seed: tuple[str | int, ...] | None = None,
        split: Subset | None = None,
        plan: Sequence[Blocks] | None = None,
    ) -> None:
        """`plan`: how all rows of the pass, known before, are cut; it takes the place of `batch_size`."""
        self._groups = groups
        self._features = features
        self._plan = None if plan is None else [(part.size * part.held, part.blocks) for part in plan]
        self._batch_size = batch_size
        self._window_rows = max(1, window_bytes // (features.row_bytes + PLACE_BYTES))
        self._seed = shuffle_seed
        self._split = split
        self.rows = 0
        """Of the split, with a target; final after the last batch, like the next."""
        self.unlabelled = 0
        """Rows of the split left out because their target is null."""

    def __iter__(self) -> Generator[Batch]:
        self.rows = self.unlabelled = 0
        sizes = iter([(self._batch_size, None)] if self._plan is None else self._plan)
        if self._is_one_block and isinstance(self._groups[0], Decoded):
            return rebatched(self._from_memory(self._groups[0]), sizes)
        if self._seed is None:
            blocks = self._in_order()
            return rebatched(blocks if self._is_one_block else prefetch(blocks), sizes)
        rows = min(self._window_rows, sum(group.num_rows for group in self._groups))
        pool = WindowPool(rows * self._features.row_bytes, tensors=len(Batch._fields))
        blocks = self._windows(self._seed, pool)
        return rebatched(blocks if self._is_one_block else prefetch(blocks, pool.needed), sizes)

    @property
    def _is_one_block(self) -> bool:
        """Whether there is nothing to prepare ahead: starting threads takes longer than reading a small shard."""
        return len(self._groups) == 1 and self._groups[0].num_rows <= self._window_rows

    def _from_memory(self, group: Decoded) -> Generator[Batch]:
        """The only block: what `_in_order` or `_windows` would make, of rows that are encoded once for all passes."""
        wanted_N = self._wanted(group)
        total = group.num_rows if wanted_N is None else int(wanted_N.sum())
        if not group.num_rows:
            return
        if (rows := group.encoded(self._features)) is None:
            with closing(self._tables(lambda _: None)) as tables:
                _, table = next(tables)
                rows = self._all_rows(table, group.name)
                if next(tables, None) is not None:  # it also says what is wrong with all of them
                    raise AssertionError("one block has one slice")
            group.keep(self._features, rows)
        if self._seed is None:
            block = _kept(rows, wanted_N)
        else:
            order_N = torch.randperm(total, generator=generator(*self._seed, "window", 0), dtype=torch.int32)
            window = _Window(self._features, order_N, torch.empty)
            window.put(rows, wanted_N)
            block = window.block()
        self.rows += len(block.y_B)
        self.unlabelled += total - len(block.y_B)
        yield block

    def _all_rows(self, table: pa.Table, where: str) -> Rows:
        features = self._features
        y_N, labelled_N = features.target(table, where)
        w_N = features.weights(table, where)
        x_NF, ids_NC = features.allocate(table.num_rows)
        features.encode_into(table, where, x_NF, ids_NC)
        return Rows(x_NF, ids_NC, y_N.contiguous(), w_N if w_N is None else w_N.contiguous(), labelled_N)

    def _in_order(self) -> Generator[Batch]:
        yield from starmap(self._encoded, self._tables(self._wanted))

    def _encoded(self, piece: _Slice, table: pa.Table) -> Batch:
        """The wanted and labelled rows of a slice, in order."""
        features, where, kept_N = self._features, piece.group.name, piece.wanted_N
        y_N, labelled_N = features.target(table, where)
        w_N = features.weights(table, where)
        if labelled_N is not None:
            kept_N = labelled_N if kept_N is None else kept_N & labelled_N
        places_N = None
        rows = piece.rows
        if kept_N is not None:
            rows_N = kept_N.nonzero().squeeze(1)
            rows = len(rows_N)
            places_N = torch.full((len(kept_N),), -1, dtype=torch.int32)
            places_N[rows_N] = torch.arange(rows, dtype=torch.int32)
            y_N, w_N = y_N.index_select(0, rows_N), None if w_N is None else w_N.index_select(0, rows_N)
        x_NF, ids_NC = features.allocate(rows)
        features.encode_into(table, where, x_NF, ids_NC, places_N)
        self.rows += rows
        self.unlabelled += piece.rows - rows
        return Batch(x_NF, ids_NC, y_N, w_N)

    def _windows(self, seed: tuple[str | int, ...], pool: WindowPool) -> Generator[Batch]:
        drawn = deque[Tensor | None]()  # of the row groups that are planned and not yet read

        def planned() -> Iterator[_Slice]:
            for group in self._turns():
                drawn.append(self._wanted(group))  # of 131,072 rows this takes 1 ms: once is enough
                yield from self._cut(group, drawn[-1])

        windows = _grouped(planned(), self._window_rows)
        window = next(windows, None)
        # Closed whatever happens: the traceback of an error would keep its thread alive.
        with closing(self._tables(lambda _: drawn.popleft())) as tables:
            for number in count():
                if window is None:
                    return
                rows = sum(piece.rows for piece in window)
                # int32: half the memory, and the time, of int64.
                order_N = torch.randperm(rows, generator=generator(*seed, "window", number), dtype=torch.int32)
                filled = _Window(self._features, order_N, pool.borrow())
                for _ in window:
                    filled.add(*next(tables))
                block = filled.block()
                del filled
                self.rows += len(block.y_B)
                self.unlabelled += rows - len(block.y_B)
                window = next(windows, None)
                if window is None and next(tables, None) is not None:  # it also says what is wrong with all of them
                    raise AssertionError("a slice is in no window")
                yield block

    def _turns(self) -> list[RowGroup]:
        """The row groups that have rows, in the order of the pass."""
        groups = [self._groups[i] for i in self._order("groups", len(self._groups))]
        return [group for group in groups if group.num_rows]

    def _wanted(self, group: RowGroup) -> Tensor | None:
        """bool [N]: rows on our side of the split; None: all of them."""
        return None if self._split is None else self._split.rows(group)

    def _cut(self, group: RowGroup, wanted_N: Tensor | None) -> Iterator[_Slice]:
        """A row group as slices of at most a window, in order or permuted."""
        slices = -(-group.num_rows // self._window_rows)
        size = -(-group.num_rows // slices)
        for i in self._order(f"slices of {group.name}", slices):
            start, stop = i * size, min((i + 1) * size, group.num_rows)
            if wanted_N is None:
                yield _Slice(group, start, stop, None, stop - start)
            else:
                yield _Slice(group, start, stop, wanted_N[start:stop], int(wanted_N[start:stop].sum()))

    def _tables(self, wanted: Callable[[RowGroup], Tensor | None]) -> Generator[tuple[_Slice, pa.Table]]:
        """The slices with their tables; each row group is read once, ahead of its use if it is not the only one.

        `wanted` is asked about a row group after it was read: one that cannot be read may claim any number of rows. (A shuffled
        pass has drawn them by then; the pass that fits the statistics has read the groups before.)
        """
        columns = [column.name for column in self._features.columns]
        nulls, labels, rows = [0] * len(columns), 0, 0
        groups = self._turns()
        with closing(self._features.tables(groups)) as tables:
            for group in groups:
                table = next(tables)
                nulls = [n + _nulls(group, table, name) for n, name in zip(nulls, columns, strict=True)]
                labels += self._features.labelled(table)
                rows += table.num_rows
                for piece in self._cut(group, wanted(group)):
                    yield piece, table.slice(piece.start, piece.stop - piece.start)
                del table  # before the next is awaited
        if rows and not labels:
            targets = " or ".join(map(repr, self._features.targets))
            raise ColumnError(f"target {targets} is null in all {rows} rows: write labels to it")
        if column := self._features.improbably_null(nulls, rows):
            raise ColumnError(
                f"column {column!r} is null in all {rows} rows: was it renamed, or does its producer fail?"
            )

    def _order(self, what: str, count: int) -> Iterable[int]:
        if self._seed is None:
            return range(count)
        return torch.randperm(count, generator=generator(*self._seed, what)).tolist()


def _nulls(group: RowGroup, table: pa.Table, column: str) -> int:
    """How many values of a column are missing. None if its file lies in the partition of the nulls: all of it is one value."""
    nulls = table.column(column).null_count
    return 0 if nulls == table.num_rows and is_partition(group, column) else nulls


class _Window:
    """A window being filled: row i of the wanted ones that are added goes to place order_N[i] (int32) of the block."""

    def __init__(self, features: Features, order_N: Tensor, empty: Empty) -> None:
        self._features, self._order_N, self._empty = features, order_N, empty
        self._x_NF, self._ids_NC = features.allocate(len(order_N), empty)
        self._y_N: Tensor | None = None  # made for the first table, which has its type, as the weights
        self._w_N: Tensor | None = None
        self._added = 0
        self._holes: list[Tensor] = []  # places of rows without a label

    def add(self, piece: _Slice, table: pa.Table) -> None:
        """Encodes the next slice into the window."""
        features, where = self._features, piece.group.name
        y_N, labelled_N = features.target(table, where)
        places_N = self._add_labels(y_N, features.weights(table, where), labelled_N, piece.wanted_N, piece.rows)
        features.encode_into(table, where, self._x_NF, self._ids_NC, places_N)

    def put(self, rows: Rows, wanted_N: Tensor | None) -> None:
        """Fills the window with rows that are encoded already."""
        places_N = self._add_labels(rows.y_N, rows.w_N, rows.labelled_N, wanted_N, len(self._order_N))
        for tensor, room in ((rows.x_NF, self._x_NF), (rows.ids_NC, self._ids_NC)):
            if tensor is not None and room is not None and tensor.shape[1]:
                place(tensor, places_N, room)

    def _add_labels(
        self, y_N: Tensor, w_N: Tensor | None, labelled_N: Tensor | None, wanted_N: Tensor | None, wanted: int
    ) -> Tensor:
        """Takes in the targets and weights of the next rows, `wanted` of which count. Returns the places of all of them."""
        if self._y_N is None:
            self._y_N, self._w_N = (
                None if tensor is None else self._empty((len(self._order_N), *tensor.shape[1:]), dtype=tensor.dtype)
                for tensor in (y_N, w_N)
            )
        places_N = self._order_N[self._added : self._added + wanted]
        self._added += wanted
        if wanted_N is not None:
            places_N = torch.full((len(wanted_N),), -1, dtype=torch.int32).masked_scatter_(wanted_N, places_N)
        if labelled_N is not None:
            self._holes.append(places_N[~labelled_N])
        for tensor, room in ((y_N, self._y_N), (w_N, self._w_N)):
            if tensor is not None and room is not None:
                place(tensor, places_N, room)
        return places_N

    def block(self) -> Batch:
        """The window. Places of rows without a label are taken by its last rows: a random choice, as good as any."""
        assert self._y_N is not None, "every window has a slice"
        whole = Batch(self._x_NF, self._ids_NC, self._y_N, self._w_N)
        if not self._holes:
            return whole
        holes = torch.cat(self._holes).long()
        holes = holes[holes >= 0]
        size = len(self._order_N) - len(holes)
        left = torch.ones(len(holes), dtype=torch.bool)  # of the last rows, those that have a label
        left[holes[holes >= size] - size] = False
        free, moved = holes[holes < size], size + left.nonzero().squeeze(1)
        for tensor in whole:
            if tensor is not None:
                for to, at in zip(torch.split(free, MOVED_ROWS), torch.split(moved, MOVED_ROWS), strict=True):
                    tensor[to] = tensor[at]
        return Batch._make(None if tensor is None else tensor[:size] for tensor in whole)


def _kept(rows: Rows, wanted_N: Tensor | None) -> Batch:
    """The wanted and labelled rows, in order."""
    whole = Batch._make(rows[: len(Batch._fields)])
    kept_N = wanted_N
    if rows.labelled_N is not None:
        kept_N = rows.labelled_N if kept_N is None else kept_N & rows.labelled_N
    if kept_N is None:
        return whole
    rows_N = kept_N.nonzero().squeeze(1)
    return Batch._make(None if tensor is None else tensor.index_select(0, rows_N) for tensor in whole)


def _grouped(slices: Iterable[_Slice], window_rows: int) -> Iterator[list[_Slice]]:
    """Neighbouring slices, as many together as fit a window."""
    window: list[_Slice] = []
    rows = 0
    for piece in slices:
        if rows + piece.rows > window_rows and window:
            yield window
            window, rows = [], 0
        window.append(piece)
        rows += piece.rows
    if window:
        yield window

"""Row groups to batches: streamed, split, shuffled inside a window, with memory that does not grow with the data.

Shape legend: N rows of a row group, slice or window, B rows of a batch, F numbers and C ids of one row, T targets.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import count, islice, starmap
from typing import Final

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.cutting import Batch, Blocks, after, rebatched, sliced
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup, Subset, generator, is_partition, prefetch
from tidemill.tasks.training.once import Decoded, Rows
from tidemill.tasks.training.order import Order, Place, Slice, grouped
from tidemill.tasks.training.packing import place
from tidemill.tasks.training.pool import Empty, WindowPool

ORDER: Final = 3
"""Number of the rule that makes a shuffled order of a seed. Another rule needs another number: a batch run of one spec is then
another run, and a replay says why it finds other bits."""
PLACE_BYTES: Final = 4
"""Of a row while its window is filled: where it goes."""
MOVED_ROWS: Final = 16_384
"""At a time."""


class Stream:
    """One pass over row groups, in batches of `batch_size` rows (only the last may be smaller), or in the blocks of a plan.

    Unshuffled (`shuffle_seed` None), the batches are those of a plain loop over the rows in order. Shuffled, the row
    groups come in a random order, as many of them as fit `window_bytes` once encoded are mixed row by row, and window
    follows window; rows that turn out to have no label leave their window smaller. A row group that is larger than the
    window is cut into equal slices, which come in a random order, so that the setting always bounds the encoded rows.
    Every random number derives from `shuffle_seed` and from the position of a group or window in the pass. So a pass may begin
    at a place that an earlier one has reached: what it used up is not read again, but for the rest of a row group or window.

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
        start: Place | None = None,
    ) -> None:
        """`plan`: how all rows of the pass, known before, are cut; it takes the place of `batch_size`. `start`: where to begin,
        as `place` of a pass with the same plan has said."""
        self._groups = groups
        self._features = features
        self._plan = None if plan is None else [(part.size * part.held, part.blocks) for part in plan]
        self._batch_size = batch_size
        self._window_rows = max(1, window_bytes // (features.row_bytes + PLACE_BYTES))
        self._seed = shuffle_seed
        self._order = Order(groups, self._window_rows, shuffle_seed, split)
        self.rows = 0
        """Of the split, with a target; final after the last batch, like the next."""
        self.unlabelled = 0
        """Rows of the split left out because their target is null."""
        self._start = start
        self._used = start or Place(0)
        """The last place between two windows that `place` was asked for."""
        self._ends = deque[tuple[int, int]]()
        """(rows, unlabelled) up to the end of each window that was made since."""

    def __iter__(self) -> Generator[Batch]:
        self._used = self._start or Place(0)
        self.rows, self.unlabelled = self._used.before, self._used.unlabelled
        self._ends.clear()
        sizes: Iterator[tuple[int, int | None]] = iter([(self._batch_size, None)])
        if self._plan is not None:
            sizes = iter(self._plan if self._start is None else after(self._plan, self._start.rows))
        if self._is_one_block and isinstance(self._groups[0], Decoded):
            return rebatched(self._begun(self._from_memory(self._groups[0])), sizes)
        if self._seed is None:
            blocks = self._in_order()
            return rebatched(self._begun(blocks if self._is_one_block else prefetch(blocks)), sizes)
        rows = min(self._window_rows, sum(group.num_rows for group in self._groups))
        pool = WindowPool(rows * self._features.row_bytes, tensors=len(Batch._fields))
        blocks = self._windows(self._seed, pool)
        return rebatched(self._begun(blocks if self._is_one_block else prefetch(blocks, pool.needed)), sizes)

    def place(self, rows: int) -> Place:
        """Where the pass stands once so many rows, from its beginning on, were used. To be asked with ever more rows."""
        while self._ends and self._ends[0][0] <= rows:
            before, unlabelled = self._ends.popleft()
            self._used = Place(rows, self._used.windows + 1, before, unlabelled)
        return self._used._replace(rows=rows)

    def _begun(self, blocks: Iterator[Batch]) -> Iterator[Batch]:
        """The blocks, the first one without the rows that were used before."""
        if self._start is None or self._start.rows == self._start.before:
            return blocks
        return _without(blocks, self._start.rows - self._start.before)

    def _made(self, rows: int, unlabelled: int) -> None:
        """A window, or a block of rows in order, was made."""
        self.rows += rows
        self.unlabelled += unlabelled
        self._ends.append((self.rows, self.unlabelled))

    @property
    def _is_one_block(self) -> bool:
        """Whether there is nothing to prepare ahead: starting threads takes longer than reading a small shard."""
        return len(self._groups) == 1 and self._groups[0].num_rows <= self._window_rows

    def _from_memory(self, group: Decoded) -> Generator[Batch]:
        """The only block: what `_in_order` or `_windows` would make, of rows that are encoded once for all passes."""
        wanted_N = self._order.wanted(group)
        total = group.num_rows if wanted_N is None else int(wanted_N.sum())
        if not group.num_rows:
            return
        if (rows := group.encoded(self._features)) is None:
            with closing(self._tables(lambda _: None)) as tables:
                _, table = next(tables)
                rows = _all_rows(self._features, table, group.name)
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
        self._made(len(block.y_B), total - len(block.y_B))
        yield block

    def _in_order(self) -> Generator[Batch]:
        yield from starmap(self._encoded, self._tables(self._order.wanted, self._used.windows))

    def _encoded(self, piece: Slice, table: pa.Table) -> Batch:
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
        self._made(rows, piece.rows - rows)
        return Batch(x_NF, ids_NC, y_N, w_N)

    def _windows(self, seed: tuple[str | int, ...], pool: WindowPool) -> Generator[Batch]:
        drawn = deque[Tensor | None]()  # of the row groups that are planned and not yet read

        def planned() -> Iterator[Slice]:
            for group in self._order.turns():
                drawn.append(self._order.wanted(group))  # of 131,072 rows this takes 1 ms: once is enough
                yield from self._order.cut(group, drawn[-1])

        windows = grouped(planned(), self._window_rows)
        used = self._used.windows
        slices = sum(len(window) for window in islice(windows, used))
        window = next(windows, None)
        # Closed whatever happens: the traceback of an error would keep its thread alive.
        with closing(self._tables(lambda _: drawn.popleft(), slices)) as tables:
            for number in count(used):
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
                self._made(len(block.y_B), rows - len(block.y_B))
                window = next(windows, None)
                if window is None and next(tables, None) is not None:  # it also says what is wrong with all of them
                    raise AssertionError("a slice is in no window")
                yield block

    def _tables(self, wanted: Callable[[RowGroup], Tensor | None], used: int = 0) -> Generator[tuple[Slice, pa.Table]]:
        """The slices with their tables, but for the first ones that are used up; each row group is read once, ahead of its use
        if it is not the only one.

        `wanted` is asked about a row group after it was read: one that cannot be read may claim any number of rows. (A shuffled
        pass has drawn them by then; the pass that fits the statistics has read the groups before.)
        """
        columns = [column.name for column in self._features.columns]
        nulls, labels, rows = [0] * len(columns), 0, 0
        groups, whole = self._order.turns(), used == 0
        while groups and used >= self._order.slices(groups[0]):
            used -= self._order.slices(groups[0])
            wanted(groups.pop(0))
        with closing(self._features.tables(groups)) as tables:
            for group in groups:
                table = next(tables)
                nulls = [n + _nulls(group, table, name) for n, name in zip(nulls, columns, strict=True)]
                labels += self._features.labelled(table)
                rows += table.num_rows
                for piece in islice(self._order.cut(group, wanted(group)), used, None):
                    yield piece, table.slice(piece.start, piece.stop - piece.start)
                used = 0
                del table  # before the next is awaited
        if not whole:  # whoever began at the beginning has looked at all of them, and the pass before the first one
            return
        if rows and not labels:
            targets = " or ".join(map(repr, self._features.targets))
            raise ColumnError(f"target {targets} is null in all {rows} rows: write labels to it")
        if column := self._features.improbably_null(nulls, rows):
            raise ColumnError(
                f"column {column!r} is null in all {rows} rows: was it renamed, or does its producer fail?"
            )


def _all_rows(features: Features, table: pa.Table, where: str) -> Rows:
    y_N, labelled_N = features.target(table, where)
    w_N = features.weights(table, where)
    x_NF, ids_NC = features.allocate(table.num_rows)
    features.encode_into(table, where, x_NF, ids_NC)
    return Rows(x_NF, ids_NC, y_N.contiguous(), w_N if w_N is None else w_N.contiguous(), labelled_N)


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

    def add(self, piece: Slice, table: pa.Table) -> None:
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


def _without(blocks: Iterator[Batch], rows: int) -> Iterator[Batch]:
    """The blocks without the first rows, which are of the first block."""
    if (first := next(blocks, None)) is not None:
        yield sliced(first, rows)
    del first  # its memory is lent to another window
    yield from blocks


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

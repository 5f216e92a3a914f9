"""Which rows of its tables a learner has changed: known from the indices of sparse gradients, without a look at the tables.

An optimizer that goes by the rows of a sparse gradient (`goes_by_rows`) changes these rows of the parameter and of its own state,
and no others. Whatever else writes to a tensor in place, as a dense gradient, `max_norm` of an embedding or `load_state_dict`,
moves the version on that torch counts for each tensor: from then on it is not known what has changed.

Torch does not count what a model writes through `.data` or numpy, as code does that keeps weights in bounds. Some rows of each
large table are therefore kept at a commit, and compared at the next one: a table of which one has changed that no gradient has
named is known to change in other ways, and nothing is told of it any more.

Shape legend: R rows of a table, E columns, N row numbers as they come, U distinct ones, S rows that are kept.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakSet, ref

import torch
from torch import Tensor

MANY: Final = 2**16
"""Row numbers of a table that are kept as they come; of more, those that repeat others are dropped."""
SHARE: Final = 4
"""Of a table of which more than one row in so many has changed, it is no longer kept which ones: it is as good as all of them."""
SAMPLED: Final = 4096
"""Rows of a table that are kept, evenly spread, others each time; of fewer, all."""
LARGE: Final = 2**18
"""Numbers of a table from which on rows are kept: smaller ones are stored whole anyway."""
_PRIME: Final = 7919

logger = logging.getLogger("tidemill.training")


class Touched:
    """What is known of the changes of a learner's parameters, and of the state that its optimizer keeps for them."""

    def __init__(self, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Of these parameters, if the optimizer goes by rows; of none where it does not."""
        self._optimizer = optimizer
        self.tables = {id(parameter): _Table(parameter) for parameter in parameters if parameter.ndim > 1}
        self.by_rows = False
        """Whether a parameter has had a sparse gradient: of others nothing is known."""
        self._marks: WeakSet[Mark] = WeakSet()
        self._samples = 0

    def mark(self) -> "Mark":
        """What changes from now on."""
        for key in self.tables:
            self._look(key)
        mark = Mark(self)
        self._marks.add(mark)
        return mark

    @contextmanager
    def step(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Around a step of the optimizer in which these parameters have sparse gradients."""
        noted = {}
        for parameter in parameters:
            key, gradient = id(parameter), parameter.grad
            if key in self.tables and gradient is not None and gradient.sparse_dim():
                self._look(key)
                noted[key] = gradient._indices()[0].clone()  # which may be a part of the batch
        yield
        for key, rows_N in noted.items():
            self.by_rows = self.tables[key].by_rows = True
            self.tables[key].look(self._optimizer)
            for mark in self._marks:
                mark.add(key, rows_N)

    def keep_rows(self, mark: "Mark") -> None:
        """Keep some rows of each large table as they are at this moment."""
        self._samples += 1
        for key, table in self.tables.items():
            if table.parameter.numel() >= LARGE and table.trusted:
                mark.kept[key] = table.sample(self._samples)

    def compare_rows(self, mark: "Mark") -> None:
        """Compare them. Trust no table of which one has changed that no gradient has named."""
        for key, (rows_S, was_SE) in mark.kept.items():
            table = self.tables[key]
            told_U = mark.rows(table.parameter)
            if told_U is None:
                continue
            differs_S = (was_SE != table.bits(rows_S)).any(1)
            if bool((differs_S & ~torch.isin(rows_S, told_U)).any()):
                table.trusted = False
                logger.warning(
                    "a table of the model, %s, changes where no gradient has named a row, as by a write through .data: each "
                    "version stores all of it",
                    list(table.parameter.shape),
                )

    def holds(self, key: int, tensor: Tensor) -> bool:
        """Whether a tensor is one of a table that goes by rows. A change by something else than a step is noted first."""
        table = self.tables[key]
        if not (table.by_rows and table.trusted):
            return False
        self._look(key)
        return table.holds(tensor)

    def _look(self, key: int) -> None:
        """Whatever has changed the table since its last step: the rows are not known."""
        table = self.tables[key]
        before = table.versions
        table.look(self._optimizer)
        if table.versions != before:
            for mark in self._marks:
                mark.forget(key)


class Mark:
    """A moment of a learner's, since which it is known what has changed. It does not keep the learner in memory."""

    def __init__(self, owner: Touched) -> None:
        """By `Touched.mark`."""
        self._owner = ref(owner)
        self._rows = {key: _Rows(len(table.parameter)) for key, table in owner.tables.items()}
        """Of tables whose changes are known."""
        self._key_at = {address: key for key, table in owner.tables.items() for address in table.versions}
        """Tensors that were there at that moment."""
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        """Of large tables some rows of then: int64 [S], and their bytes."""

    def rows(self, tensor: Tensor) -> Tensor | None:
        """int64 [U] on the tensor's device, sorted: no other rows have changed. None: that is not known.

        The tensor is a parameter of the learner's model, one that its optimizer keeps, or another view of all of one.
        """
        owner, key = self._owner(), self._key_at.get(tensor.data_ptr())
        if owner is None or key is None or not owner.holds(key, tensor):
            return None
        found = self._rows.get(key)
        return None if found is None else found.distinct().to(tensor.device)

    def add(self, key: int, rows_N: Tensor) -> None:
        """These rows of a table have changed."""
        if (rows := self._rows.get(key)) is not None and not rows.add(rows_N):
            self.forget(key)

    def forget(self, key: int) -> None:
        """It is not known any more which rows of a table have changed."""
        self._rows.pop(key, None)


class _Table:
    """A parameter, and the tensors of its shape that the optimizer keeps for it."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.by_rows = False
        """Whether it has had a sparse gradient."""
        self.trusted = True
        """Whether only gradients are known to write to it."""
        self.versions: dict[int, int] = {}
        """By the address of each tensor, as they were when last looked at."""
        self._tensors: dict[int, Tensor] = {}
        """Held, so that nothing else comes to have their addresses."""

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """See where the tensors are, and which versions they have."""
        parameter = self.parameter
        state: dict[str, Any] = optimizer.state.get(parameter, {})  # never `state[parameter]`, which would add an entry
        kept = [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape and not v.is_sparse]
        self._tensors = {tensor.data_ptr(): tensor for tensor in (parameter, *kept)}
        self.versions = {address: tensor._version for address, tensor in self._tensors.items()}

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """int64 [S] and uint8 [S, bytes]: some rows and their bytes, others for each number; the first and the last always."""
        rows = len(self.parameter)
        stride = -(-rows // SAMPLED)
        numbers = [0, *range(number * _PRIME % stride, rows, stride), rows - 1]
        rows_S = torch.tensor(numbers, device=self.parameter.device)
        return rows_S, self.bits(rows_S)

    def bits(self, rows_S: Tensor) -> Tensor:
        """uint8 [S, bytes]: these rows of the parameter."""
        return self.parameter.detach().index_select(0, rows_S).flatten(1).view(torch.uint8)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor that begins at one of the addresses is that one."""
        own = self._tensors.get(tensor.data_ptr())
        if own is None or not own.is_contiguous():
            return False
        return (own.shape, own.stride(), own.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


class _Rows:
    """Row numbers of one table."""

    def __init__(self, of: int) -> None:
        """`of`: how many rows the table has."""
        self._of, self._count, self._limit = of, 0, MANY
        self._parts: list[Tensor] = []

    def add(self, rows_N: Tensor) -> bool:
        """Whether they are still worth knowing."""
        self._parts.append(rows_N)
        self._count += len(rows_N)
        if self._count <= self._limit:
            return True
        distinct = len(self.distinct())
        self._limit = 2 * max(MANY, distinct)
        return SHARE * distinct <= self._of

    def distinct(self) -> Tensor:
        """int64 [U], sorted."""
        if not self._parts:
            return torch.zeros(0, dtype=torch.int64)
        self._parts = [torch.unique(torch.cat(self._parts))]
        self._count = len(self._parts[0])
        return self._parts[0]

"""Whether all numbers are finite that a version would hold."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from tidemill.tasks.training.large import blocks, is_large
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.touched import Mark


class Finite:
    """Looks at weights, buffers and the optimizer's state of a learner, time and again.

    What was not finite from the start, as a causal mask of -inf, may stay so, but for NaN. Rows of a table of which it is known
    that they have not changed since the last time are not looked at again.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._masks = {id(tensor) for tensor in _kept(learner.model) if not is_finite(tensor)}
        """Tensors that were not finite when the learner was made or loaded."""
        self._since: Mark | None = None
        """When all were finite; None: nothing is known of what has changed since."""

    def all(self) -> bool:
        """Whether they are."""
        learner = self._learner
        states = (value for state in learner.optimizer.state.values() for value in state.values())
        kept = chain(_kept(learner.model), (value for value in states if isinstance(value, Tensor)))
        found = all(self._stays(tensor) for tensor in kept)
        self._since = learner.changes.mark() if found and learner.changes.by_rows else None
        return found

    def _stays(self, tensor: Tensor) -> bool:
        rows_U = None if self._since is None else self._since.rows(tensor)
        values = tensor if rows_U is None else tensor.detach().index_select(0, rows_U)
        return is_finite(values) or (id(tensor) in self._masks and not bool(torch.isnan(values).any()))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; of any layout and type."""
    values = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
    if values.dtype.itemsize == 1 and values.is_floating_point():
        values = values.float()  # torch has no such check for its 8-bit types
    if is_large(values):
        return all(bool(torch.isfinite(block).all()) for block in blocks(values))
    return bool(torch.isfinite(values).all())


def _kept(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())

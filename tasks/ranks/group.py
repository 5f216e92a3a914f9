"""A group of processes that train one model together: all that a gradient step knows of them.

Rank 0 is the leader. All ranks call the same methods in the same order, with tensors of one shape, type and device.
"""

from typing import Final, Protocol

from torch import Tensor


class Group(Protocol):
    """The processes, and how tensors are added up and sent among them.

    A rank that cannot reach another one ends there and then (`tasks/ranks/ending.py`): no method returns, and none raises.
    """

    @property
    def rank(self) -> int:
        """Which of the processes this is, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum_(self, flat: Tensor) -> None:
        """Replace a tensor by its sum over all ranks: the same bits on each of them, and in each run of a group of this size."""
        ...

    def sum_pair_(self, flat: Tensor, distance: int) -> None:
        """Add the tensor of the rank whose number differs in this bit, 1, 2, 4 or so on: of two addends the order is no matter,
        and both ranks have the same bits afterwards, whatever carries them. For groups whose size is a power of two."""
        ...

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by the leader's."""
        ...


class Alone:
    """The group of a single process: nothing is to be added or sent."""

    rank: int = 0
    size: int = 1

    def sum_(self, flat: Tensor) -> None:
        """As in `Group`."""

    def sum_pair_(self, flat: Tensor, distance: int) -> None:
        """As in `Group`, which never asks for it here."""

    def broadcast_(self, tensor: Tensor) -> None:
        """As in `Group`."""


ALONE: Final = Alone()

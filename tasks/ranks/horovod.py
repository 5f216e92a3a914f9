"""Horovod as what carries tensors among the ranks, for those who have it installed."""

import os

import torch
from torch import Tensor

from tidemill.tasks.errors import RanksRefused
from tidemill.tasks.ranks.ending import ending_if_another_has_gone


class HorovodGroup:
    """A `Group` (`tasks/ranks/group.py`) of the processes that horovodrun has started."""

    def __init__(self, timeout_seconds: float) -> None:
        """Waits until all of them are here.

        Raises:
            RanksRefused: Horovod is not installed.
        """
        # By default Horovod waits for a rank that is stopped for ever
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(timeout_seconds / 2))))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(1, round(timeout_seconds))))
        try:
            import horovod.torch as horovod
        except ImportError as error:
            raise RanksRefused(
                f"backend horovod: horovod.torch cannot be imported ({error}): install Horovod, built for this torch, or let "
                "torchrun start the ranks"
            ) from error
        horovod.init()
        if torch.cuda.is_available():
            torch.cuda.set_device(horovod.local_rank() % torch.cuda.device_count())
        self._horovod = horovod
        self.rank: int = horovod.rank()
        self.size: int = horovod.size()

    def sum_(self, flat: Tensor) -> None:
        """As in `Group`."""
        with ending_if_another_has_gone():
            self._horovod.allreduce_(flat, op=self._horovod.Sum, name="sum")

    def sum_pair_(self, flat: Tensor, distance: int) -> None:
        """Never called: whoever has `parts` is refused (`leader.steps_of`)."""
        raise NotImplementedError

    def broadcast_(self, tensor: Tensor) -> None:
        """As in `Group`."""
        with ending_if_another_has_gone():
            self._horovod.broadcast_(tensor, 0, name="broadcast")

"""Tensors among the ranks by torch's process groups: gloo for those in memory, NCCL for those on CUDA devices.

The groups are Tidemill's own, and none is torch's default one: to whatever else runs in the process, as a user's metric that
would add up over all ranks by itself, it is a single process (`torch.distributed.is_initialized()` is False).
"""

import os
from datetime import timedelta
from typing import Final

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them too, but its types do not say so
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.rendezvous import rendezvous

from tidemill.tasks.errors import RanksRefused
from tidemill.tasks.ranks.ending import ending_if_another_has_gone
from tidemill.tasks.ranks.launched import Place

JOIN_SECONDS: Final = 600.0
"""How long a rank waits for the others to start. Whoever cannot start ends, and the launcher ends or restarts the others."""


class TorchGroup:
    """A `Group` (`tasks/ranks/group.py`). A rank that cannot reach another one ends at once, as if it had been killed."""

    def __init__(self, store: Store, place: Place, timeout_seconds: float) -> None:
        """`store` is the same for all ranks. Waits until all of them are here."""
        self.rank, self.size = place.rank, place.size
        timeout = timedelta(seconds=timeout_seconds)
        self._pairs: dict[int, ProcessGroup] = {}
        """By the distance of the two ranks. Made here, not when first used: who is connected to a rank hears at once that it
        has gone, and who is yet to be waits till the timeout."""
        with ending_if_another_has_gone("the others have not all started"):
            store.set(f"here/{self.rank}", "")
            store.wait([f"here/{rank}" for rank in range(self.size)], timedelta(seconds=JOIN_SECONDS))
        with ending_if_another_has_gone("no group could be made with the others"):
            self._all = _process_group(PrefixStore("all", store), self.rank, self.size, timeout)
            bits = self.size.bit_length() - 1
            for distance in (2**bit for bit in range(bits) if self.size == 2**bits):
                low = self.rank & ~distance
                between = PrefixStore(f"pair/{low}/{distance}", store)
                self._pairs[distance] = _process_group(between, int(low != self.rank), 2, timeout)

    def sum_(self, flat: Tensor) -> None:
        """As in `Group`."""
        with ending_if_another_has_gone():
            self._all.allreduce(flat, ReduceOp.SUM).wait()

    def sum_pair_(self, flat: Tensor, distance: int) -> None:
        """As in `Group`."""
        with ending_if_another_has_gone():
            self._pairs[distance].allreduce(flat, ReduceOp.SUM).wait()

    def broadcast_(self, tensor: Tensor) -> None:
        """As in `Group`."""
        with ending_if_another_has_gone():
            self._all.broadcast(tensor, 0).wait()


def connected(place: Place, timeout_seconds: float) -> TorchGroup:
    """The group of all ranks that the launcher has started; of those of torch's default group where that is there already, as
    Ray Train makes it.

    Raises:
        RanksRefused: the launcher has named no port at which ranks could meet.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return TorchGroup(_store(place), place, timeout_seconds)


def _store(place: Place) -> Store:
    if distributed.is_initialized():
        return PrefixStore("tidemill", distributed.distributed_c10d._get_default_store())
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal():
        raise RanksRefused(f"MASTER_PORT is {port!r}: give the number of a port of {address}, the host of rank 0")
    what = f"{address}:{port} (MASTER_ADDR, MASTER_PORT), where ranks meet, cannot be {'used' if place.leads else 'reached'}"
    with ending_if_another_has_gone(what):
        store: Store
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=JOIN_SECONDS)))
    return store


def _process_group(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
    """A process group that no other part of torch knows of."""
    group = ProcessGroup(store, rank, size)
    kinds = ProcessGroup.BackendType
    gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)
    group._set_default_backend(kinds.GLOO)
    group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    if torch.cuda.is_available() and distributed.is_nccl_available():
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = distributed.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
        group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
    return group

"""A group of ranks on this machine, forked from a server that has imported torch: what costs them seconds otherwise."""

import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch.distributed import FileStore

from tests.guarantees.children import DEADLINE, make_pipe, start_child
from tidemill.tasks.ranks.group import ALONE, Group
from tidemill.tasks.ranks.launched import Place
from tidemill.tasks.ranks.transport import TorchGroup

P = ParamSpec("P")
R = TypeVar("R")


def ranks(size: int, work: Callable[Concatenate[Group, P], R], *args: P.args, **named: P.kwargs) -> list[R]:
    """What `work` returns on each of so many ranks, each a process of its own with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        here = []
        for rank in range(size):
            receiving, sending = make_pipe()
            child = start_child(_rank, rank, size, f"{folder}/store", sending, work, args, named)
            sending.close()
            here.append((child, receiving))
        found = []
        for rank, (child, receiving) in enumerate(here):
            assert receiving.poll(DEADLINE), f"rank {rank} of {size} has not answered"
            try:
                found.append(receiving.recv())
            except EOFError:
                child.join(DEADLINE)
                raise AssertionError(f"rank {rank} of {size} has ended with {child.exitcode}") from None
            child.join(DEADLINE)
        return found


def _rank(
    rank: int,
    size: int,
    store: str,
    result: Connection,
    work: Callable[..., object],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    group = ALONE if size == 1 else TorchGroup(FileStore(store, size), Place(rank, size), DEADLINE / 4)
    result.send(work(group, *args, **named))

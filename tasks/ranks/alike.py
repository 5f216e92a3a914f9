"""What all ranks do in the same way: the training of a shard, and the digest of what came of it."""

from collections.abc import Callable
from typing import TypeVar

from tidemill.storage.pieces import Buffers
from tidemill.tasks.ranks.ending import end_here
from tidemill.tasks.ranks.group import Group
from tidemill.tasks.ranks.messages import gathered
from tidemill.tasks.training.errors import described, of_the_machine
from tidemill.tasks.training.learner import Learner

R = TypeVar("R")


def together(group: Group, train: Callable[[], R]) -> R | Exception:
    """Train as one of the group; what came of it, or the error that all ranks have raised.

    Raises:
        Exception: of this machine. This rank is then not where the others are.
    """
    error: Exception | None = None
    try:
        result = train()
    except Exception as raised:  # of whatever class: a user's code may raise any
        if of_the_machine(raised):
            raise
        error = raised
    told = [said.decode() for said in gathered(group, b"" if error is None else (described(error) or "?").encode())]
    if any(told) and not all(told):
        rank = next(rank for rank, said in enumerate(told) if said)
        end_here(f"rank {rank} failed on a shard, and others did not: {told[rank]}")
    return result if error is None else error


def digest(learner: Learner) -> bytes:
    """sha256 of the weights that would be stored of a learner, then of its state."""
    return b"".join(bytes.fromhex(Buffers(part).sha256()) for part in learner.pieces())

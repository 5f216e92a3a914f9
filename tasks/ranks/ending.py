"""How a rank ends that has lost another one: at once, as if it had been killed."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from tidemill.tasks.ranks import launched

logger = logging.getLogger("tidemill")

LOST: Final = os.EX_TEMPFAIL
"""The exit code of a rank that has lost another one. Whoever starts all ranks again goes on from the head."""


def end_here(why: str) -> NoReturn:
    """End this process without undoing or telling anything. That is "killed between two calls", which the protocol survives.

    No exception: on its way out it would meet code that takes it for the fault of a shard, and Prefect, to which a run that ended
    in an error is over.
    """
    place = launched.place()
    logger.error(
        "rank %d ends, as if it had been killed: %s. Nothing half done is stored; started again, all ranks go on from there",
        0 if place is None else place.rank,
        " ".join(why.split()),
    )
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(LOST)


@contextmanager
def ending_if_another_has_gone(what: str = "another rank has gone, or cannot be reached") -> Iterator[None]:
    """Around a call of a transport. torch and Horovod raise RuntimeError, and classes below it, for whatever keeps a rank from
    another."""
    try:
        yield
    except RuntimeError as error:
        end_here(f"{what}: {str(error).partition('. ')[0]}")  # gloo adds what it supposes

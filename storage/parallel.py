"""Several calls of a store at once, where it can do with them."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def at_once(function: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """`function` of each item, in order; at most so many calls are under way. With one worker they are made here, in turn.

    The first error, in the order of the items, is raised once nothing is under way any more; what had not begun by then never
    does.
    """
    given = list(items)
    if workers == 1 or len(given) < 2:
        return [function(item) for item in given]
    with ThreadPoolExecutor(min(workers, len(given)), thread_name_prefix="tidemill-store") as pool:
        return list(pool.map(function, given))

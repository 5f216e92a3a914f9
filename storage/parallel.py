"""Several calls of a store at once, where it can do with them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


def concurrently(function: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """`function` of each item, in order; at most `workers` calls are under way. With one worker they are made here, in turn.

    After an error no further call begins. The first error, in the order of the items, is raised once nothing is under way.
    """
    given = list(items)
    if workers == 1 or len(given) < 2:
        return [function(item) for item in given]
    stop = threading.Event()

    def call(item: T) -> R:
        if stop.is_set():
            return cast(R, None)  # nobody sees it: an error is on its way
        try:
            return function(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(min(workers, len(given)), thread_name_prefix="tidemill-store") as pool:
        return list(pool.map(call, given))

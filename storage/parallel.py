"""Several calls of a store at once, where it can do with them."""

import threading
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


def concurrently(function: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """`function` of each item, in order; at most `workers` calls are under way. With one worker they are made here, in turn.

    Items that are made one by one are taken no faster than calls end: one more than `workers` of them are in memory. After an
    error no further call begins. The first error, in the order of the items, is raised once nothing is under way.
    """
    if workers == 1 or (isinstance(items, Sized) and len(items) < 2):
        return [function(item) for item in items]
    room, stop = threading.Semaphore(len(items) if isinstance(items, Sized) else workers), threading.Event()

    def call(item: T) -> R:
        try:
            if stop.is_set():
                return cast(R, None)  # nobody sees it: an error is on its way
            return function(item)
        except BaseException:
            stop.set()
            raise
        finally:
            room.release()

    calls = list[Future[R]]()
    with ThreadPoolExecutor(workers, thread_name_prefix="tidemill-store") as pool:
        try:
            for item in items:
                room.acquire()
                if stop.is_set():
                    break
                calls.append(pool.submit(call, item))
        except BaseException:
            stop.set()
            raise
    return [each.result() for each in calls]

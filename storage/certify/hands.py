"""Other processes that call one store, several at the same instant.

A process that stays alive when its maker dies would go on writing: each ends when its connection does. Messages are pickled, as
`multiprocessing` does; both ends are Tidemill.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Final

from tidemill.storage.errors import StorageError
from tidemill.storage.store import Promises, Store

PROCESSES: Final = 4
THREADS: Final = 2
"""Calls that one process has under way at once."""
TOGETHER: Final = PROCESSES * THREADS
_AHEAD_SECONDS: Final = 0.003
"""How long before its instant a call is handed over, so that all processes have it by then."""
_SPUN_SECONDS: Final = 0.001
"""The last part of waiting for an instant is not slept, which is not exact."""

Opener = Callable[[str], Store]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a store's verb."""

    verb: str
    key: str
    options: dict[str, Any] = field(default_factory=dict)
    later_seconds: float = 0.0
    """After the instant that the calls of one turn share."""


class Hands:
    """`TOGETHER` pairs of hands, in `PROCESSES` processes, on one store."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], connections: Sequence[Connection]) -> None:
        self._processes, self._connections = processes, connections

    def together(self, calls: Sequence[Call]) -> list[Any]:
        """What each call returned, or the StorageError that it raised. At most `TOGETHER` calls; neighbours are in different
        processes.

        Raises:
            RuntimeError: one of the processes has died.
        """
        assert len(calls) <= TOGETHER
        at = time.monotonic() + _AHEAD_SECONDS
        shares = [calls[number::PROCESSES] for number in range(PROCESSES)]
        busy = [(number, share) for number, share in enumerate(shares) if share]
        results: list[Any] = [None] * len(calls)
        try:
            for number, share in busy:
                self._connections[number].send((at, share))
            for number, _ in busy:
                results[number::PROCESSES] = self._connections[number].recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a process of this check has died; what it printed stands above") from error
        return results

    def close(self) -> None:
        """End the processes: those that are in a call are killed."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def hands_on(url: str, opener: Opener) -> Iterator[Hands]:
    """Hands on the store at `url`, each process with a store of its own, made by `opener`: a function of a module."""
    processes, connections = list[subprocess.Popen[bytes]](), list[Connection]()
    hands = Hands(processes, connections)
    try:
        for _ in range(PROCESSES):
            ours, theirs = Pipe()
            connections.append(ours)
            with theirs:
                code = f"import sys; sys.path[:] = {sys.path!r}; from tidemill.storage.certify import hands; "
                command = [sys.executable, "-c", f"{code}hands.serve({theirs.fileno()})", url]  # so that `ps` tells
                processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
        for connection in connections:
            connection.send((url, opener))
        yield hands
    finally:
        hands.close()


def serve(fd: int) -> None:
    """What such a process does, until the other end of its connection is closed."""
    # Ctrl-C is sent to all processes of a terminal: the maker ends these
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(fd) as connection, ThreadPoolExecutor(THREADS) as pool:
        try:
            url, opener = connection.recv()
            store: Store = opener(url)
            store.promises = Promises(compares_on_delete=True)  # the server is asked
            while True:
                at, calls = connection.recv()
                connection.send([*pool.map(partial(_done, store, at), calls)])
        except (EOFError, BrokenPipeError):
            return


def _done(store: Store, at: float, call: Call) -> Any:
    at += call.later_seconds
    time.sleep(max(0.0, at - time.monotonic() - _SPUN_SECONDS))
    while time.monotonic() < at:
        pass
    try:
        result = getattr(store, call.verb)(call.key, **call.options)
        return [*result] if call.verb == "list" else result
    except StorageError as error:
        return error

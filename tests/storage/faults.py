"""Inject faults by wrapping a store, never by patching

A hook sees every call before it starts and after it is applied.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

from storage.store import ObjectInfo, Store


@dataclass(frozen=True, slots=True)
class Call:
    index: int
    """0 for the first call of the store."""
    verb: str
    key: str
    """For `list`, the prefix."""
    phase: Literal["before", "after"]


T = TypeVar("T")
Hook = Callable[[Call], None]


class FaultStore(Store):
    """The wrapped store, with `hook` called around every verb; "after" only when the verb returned."""

    def __init__(self, store: Store, hook: Hook) -> None:
        self.url = store.url
        self._store = store
        self._hook = hook
        self._indices = count()  # next() of it is atomic: threads may share the store

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from self._around("list", prefix, lambda: [*self._store.list(prefix)])

    def stat(self, key: str) -> ObjectInfo:
        return self._around("stat", key, lambda: self._store.stat(key))

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return self._around("read", key, lambda: self._store.read(key, if_match=if_match, start=start, length=length))

    def write(self, key: str, data: bytes) -> ObjectInfo:
        return self._around("write", key, lambda: self._store.write(key, data))

    def create(self, key: str, data: bytes) -> ObjectInfo:
        return self._around("create", key, lambda: self._store.create(key, data))

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        return self._around("replace", key, lambda: self._store.replace(key, data, if_match=if_match))

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        self._around("delete", key, lambda: self._store.delete(key, if_match=if_match))

    def _around(self, verb: str, key: str, run: Callable[[], T]) -> T:
        index = next(self._indices)
        self._hook(Call(index, verb, key, "before"))
        result = run()
        self._hook(Call(index, verb, key, "after"))
        return result


def kill_at(index: int, phase: str) -> Hook:
    """SIGKILL this process at that call: nothing is cleaned up, no `finally` runs."""

    def hook(call: Call) -> None:
        if (call.index, call.phase) == (index, phase):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def fail_at(index: int, phase: str, error: Exception) -> Hook:
    """Raise at that call. "after" is a lost answer: the store did it, the caller does not know."""

    def hook(call: Call) -> None:
        if (call.index, call.phase) == (index, phase):
            raise error

    return hook

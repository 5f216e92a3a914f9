"""Inject faults by wrapping a store, never by patching.

A hook sees every call before it starts and after it is applied. What it raises, the caller gets; what it does, happens then.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

from storage.errors import AlreadyExists, NotFound, PermissionDenied, PreconditionFailed, StorageError
from storage.store import ObjectInfo, Store
from storage.urls import open_store

Phase = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Call:
    index: int
    """0 for the first call of the store, or of all stores that share a numbering."""
    verb: str
    key: str
    """For `list`, the prefix."""
    phase: Phase
    url: str = ""
    """Of the store."""
    if_match: str | None = None


T = TypeVar("T")
Hook = Callable[[Call], None]


class FaultStore(Store):
    """The wrapped store, with `hook` called around every verb; "after" only when the verb returned."""

    def __init__(self, store: Store, hook: Hook, indices: Iterator[int] | None = None) -> None:
        """Stores that are given the same `indices` number their calls together."""
        self.url = store.url
        self._store = store
        self._hook = hook
        self._indices = count() if indices is None else indices  # next() of it is atomic: threads may share the store

    @property
    def conditional_delete(self) -> bool:  # type: ignore[override]  # the wrapped store acts on it
        return self._store.conditional_delete

    @conditional_delete.setter
    def conditional_delete(self, compares: bool) -> None:
        self._store.conditional_delete = compares

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from self._around("list", prefix, lambda: [*self._store.list(prefix)])

    def stat(self, key: str) -> ObjectInfo:
        return self._around("stat", key, lambda: self._store.stat(key))

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return self._around(
            "read", key, lambda: self._store.read(key, if_match=if_match, start=start, length=length), if_match
        )

    def write(self, key: str, data: bytes) -> ObjectInfo:
        return self._around("write", key, lambda: self._store.write(key, data))

    def create(self, key: str, data: bytes) -> ObjectInfo:
        return self._around("create", key, lambda: self._store.create(key, data))

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        return self._around("replace", key, lambda: self._store.replace(key, data, if_match=if_match), if_match)

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        self._around("delete", key, lambda: self._store.delete(key, if_match=if_match), if_match)

    def _around(self, verb: str, key: str, run: Callable[[], T], if_match: str | None = None) -> T:
        index = next(self._indices)
        self._hook(Call(index, verb, key, "before", self.url, if_match))
        result = run()
        self._hook(Call(index, verb, key, "after", self.url, if_match))
        return result


def hooked(hook: Hook) -> Callable[[str], Store]:
    """Opens stores as `open_store` does, all with one hook and one numbering of their calls."""
    indices = count()
    return lambda url: FaultStore(open_store(url), hook, indices)


def together(*hooks: Hook) -> Hook:
    """All of these, one after the other."""

    def hook(call: Call) -> None:
        for one in hooks:
            one(call)

    return hook


def act_at(index: int, phase: Phase, act: Callable[[], object]) -> Hook:
    """Do something at that call: a pause in which others act, or the end."""

    def hook(call: Call) -> None:
        if (call.index, call.phase) == (index, phase):
            act()

    return hook


def act_once(verb: str, key: str, phase: Phase, act: Callable[[], object]) -> Hook:
    """Do something at the first call of this verb for a key that ends so."""
    done: list[Call] = []

    def hook(call: Call) -> None:
        if (call.verb, call.phase) == (verb, phase) and call.key.endswith(key) and not done:
            done.append(call)
            act()

    return hook


def fail_at(index: int, phase: Phase, error: Exception) -> Hook:
    """Raise at that call. "after" is a lost answer: the store did it, the caller does not know."""

    def fail() -> None:
        raise error

    return act_at(index, phase, fail)


MEETS_ITSELF: dict[str, type[StorageError]] = {
    "create": AlreadyExists,
    "replace": PreconditionFailed,
    "delete": NotFound,
}
"""What a verb raises when its answer is lost and it retries by itself: the second request finds what the first one did."""


def meet_itself_at(index: int) -> Hook:
    """Lose the answer to that call, one of `MEETS_ITSELF`, and let the verb retry by itself."""

    def hook(call: Call) -> None:
        if (call.index, call.phase) == (index, "after"):
            raise MEETS_ITSELF[call.verb](f"{call.verb} of {call.key} met its own first request")

    return hook


@dataclass
class Deny:
    """A hook: one store refuses a verb for as long as `denied` is set."""

    url: str
    verb: str
    denied: bool = True

    def __call__(self, call: Call) -> None:
        if self.denied and (call.url, call.verb, call.phase) == (self.url, self.verb, "before"):
            raise PermissionDenied(f"{call.verb} of {call.key} is not allowed")

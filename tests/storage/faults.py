"""Inject faults by wrapping a store, never by patching.

A hook sees every call before it starts and after it is applied. What it raises, the caller gets; what it does, happens then. It
is called in the thread of the call; several may be under way.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, TypeVar

from tidemill.storage.errors import AlreadyExists, NotFound, PermissionDenied, PreconditionFailed, StorageError
from tidemill.storage.pieces import Pieces
from tidemill.storage.store import ObjectInfo, PassedOver, Promises, Store, Upload
from tidemill.storage.urls import open_store

Phase = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Call:
    index: int
    """0 for the first call of the store, or of all stores that share a numbering. Of calls that are under way together, it
    differs from run to run which comes first."""
    name: str
    """What it is, the same in every run: store, verb, key and how often that came before."""
    verb: str
    key: str
    """For `list`, the prefix."""
    phase: Phase
    url: str = ""
    """Of the store."""
    if_match: str | None = None


T = TypeVar("T")
Hook = Callable[[Call], None]


class Numbering:
    """Numbers and names the calls of the stores that share it."""

    def __init__(self) -> None:
        self._next, self._stores, self._seen = 0, list[str](), Counter[str]()
        self._lock = threading.Lock()

    def __call__(self, url: str, verb: str, key: str) -> tuple[int, str]:
        with self._lock:
            if url not in self._stores:
                self._stores.append(url)
            # What only one attempt uses does not count as a name.
            what = f"{self._stores.index(url)} {verb} {re.sub('[0-9a-f]{32}', '*', key)}"
            index, self._next = self._next, self._next + 1
            self._seen[what] += 1
            return index, f"{what} {self._seen[what]}"


class FaultStore(Store):
    """The wrapped store, with `hook` called around every verb; "after" only when the verb returned."""

    def __init__(
        self, store: Store, hook: Hook, numbering: Numbering | None = None, concurrency: int | None = None
    ) -> None:
        """Stores that are given the same `numbering` number their calls together.

        With `concurrency` 1, which bounds `readers` too, the caller makes one call after the other, in its own thread: for hooks
        that do what may not happen beside a training.
        """
        self.url = store.url
        self._store = store
        self._hook = hook
        self._numbering = Numbering() if numbering is None else numbering
        self.concurrency = store.concurrency if concurrency is None else concurrency
        self.readers = store.readers if concurrency is None else min(concurrency, store.readers)

    @property
    def keeper(self) -> Hashable:
        return self._store.keeper

    @property
    def one_call_below(self) -> int:
        return self._store.one_call_below

    @property
    def promises(self) -> Promises:  # type: ignore[override]  # the wrapped store acts on them
        return self._store.promises

    @promises.setter
    def promises(self, found: Promises) -> None:
        self._store.promises = found

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        yield from self._around(
            "list", prefix, lambda: [*self._store.list(prefix, after=after, passed_over=passed_over, inside=inside)]
        )

    def make_durable(self, key: str) -> None:
        self._around("make_durable", key, lambda: self._store.make_durable(key))

    def stat(self, key: str) -> ObjectInfo:
        return self._around("stat", key, lambda: self._store.stat(key))

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return self._around(
            "read", key, lambda: self._store.read(key, if_match=if_match, start=start, length=length), if_match
        )

    def mode(self, key: str) -> int | None:
        return self._store.mode(key)

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        return self._around("write", key, lambda: self._store.write(key, data, mode=mode))

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        return self._around("write", key, lambda: self._store.write_pieces(key, data))

    def unfinished(self, prefix: str = "") -> Iterator[Upload]:
        return self._store.unfinished(prefix)

    def abandon(self, upload: Upload) -> None:
        self._around("abandon", upload.key, lambda: self._store.abandon(upload))

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        return self._around("create", key, lambda: self._store.create(key, data, mode=mode))

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        return self._around("replace", key, lambda: self._store.replace(key, data, if_match=if_match), if_match)

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        self._around("delete", key, lambda: self._store.delete(key, if_match=if_match, sha256=sha256), if_match)

    def _around(self, verb: str, key: str, run: Callable[[], T], if_match: str | None = None) -> T:
        index, name = self._numbering(self.url, verb, key)
        self._hook(Call(index, name, verb, key, "before", self.url, if_match))
        result = run()
        self._hook(Call(index, name, verb, key, "after", self.url, if_match))
        return result


class Dated(FaultStore):
    """The wrapped store, whose objects were written at the times that `dates` has for their URLs, or when they were."""

    def __init__(
        self,
        store: Store,
        dates: Mapping[str, datetime],
        hook: Hook = lambda call: None,
        numbering: Numbering | None = None,
        concurrency: int | None = None,
    ) -> None:
        super().__init__(store, hook, numbering, concurrency)
        self._dates = dates

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        for info in super().list(prefix, after=after, passed_over=passed_over, inside=inside):
            yield replace(info, last_modified=self._dates.get(f"{self.url}/{info.key}", info.last_modified))


def hooked(hook: Hook, concurrency: int | None = None) -> Callable[[str], Store]:
    """Opens stores as `open_store` does, all with one hook and one numbering of their calls; see `FaultStore`."""
    numbering = Numbering()
    return lambda url: FaultStore(open_store(url), hook, numbering, concurrency)


def together(*hooks: Hook) -> Hook:
    """All of these, one after the other."""

    def hook(call: Call) -> None:
        for one in hooks:
            one(call)

    return hook


def act_at(which: int | str, phase: Phase, act: Callable[[], object]) -> Hook:
    """Do something at the call of that index or name: a pause in which others act, or the end."""

    def hook(call: Call) -> None:
        if which in (call.index, call.name) and call.phase == phase:
            act()

    return hook


class act_once:  # a hook like those of the functions beside it
    """Do something at the first call of this verb for a key that contains this text; `done` tells whether it came."""

    def __init__(self, verb: str, text: str, phase: Phase, act: Callable[[], object]) -> None:
        self._verb, self._text, self._phase, self._act, self.done = verb, text, phase, act, False

    def __call__(self, call: Call) -> None:
        if not self.done and (call.verb, call.phase) == (self._verb, self._phase) and self._text in call.key:
            self.done = True
            self._act()


def fail_at(which: int | str, phase: Phase, error: Exception) -> Hook:
    """Raise at that call (see `act_at`). "after" is a lost answer: the store did it, the caller does not know."""

    def fail() -> None:
        raise error

    return act_at(which, phase, fail)


MEETS_ITSELF: dict[str, type[StorageError]] = {
    "create": AlreadyExists,
    "replace": PreconditionFailed,
    "delete": NotFound,
}
"""What a verb raises when its answer is lost and it retries by itself: the second request finds what the first one did."""


def meet_itself_at(name: str) -> Hook:
    """Lose the answer to that call, one of `MEETS_ITSELF`, and let the verb retry by itself."""

    def hook(call: Call) -> None:
        if (call.name, call.phase) == (name, "after"):
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


class Counting:
    """A hook: counts the calls by verb."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, call: Call) -> None:
        if call.phase == "before":
            self.calls[call.verb] += 1


class Fails:
    """A hook: raises at the first `times` calls of a verb for a key that contains a text."""

    def __init__(self, verb: str, text: str, phase: str, error: Exception, times: int = 1) -> None:
        self.verb, self.text, self.phase, self.error, self.times = verb, text, phase, error, times

    def __call__(self, call: Call) -> None:
        if self.times and (call.verb, call.phase) == (self.verb, self.phase) and self.text in call.key:
            self.times -= 1
            raise self.error


def fails(verb: str, error: Exception, phase: Phase = "before") -> Hook:
    """Raise at every call of this verb."""

    def hook(call: Call) -> None:
        if (call.verb, call.phase) == (verb, phase):
            raise error

    return hook

"""What one process sees of a store: one check for each promise."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Final

from tidemill.storage.certify.trial import NO_ETAG, OBJECT, Broken, Trial, refused
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    Unavailable,
)
from tidemill.storage.store import Store

_CLOCK_SECONDS: Final = 60.0
_ODD_KEYS: Final = (
    *(" leading space", "trailing space ", "a+b", "a%20b", "a%2Fb", "a&b=c;d", "a#b", "a?b", "~'\"<*>", "a:b", "..a"),
    *("new\nline", "control\x01", "ünï-日本-😀", "col=1/part.parquet", ".hidden", "x" * 200),
)
_ALIKE: Final = (("case", "CASE"), ("\u00e9", "e\u0301"))
"""Two keys each that some stores take for one."""


def reads_what_was_named(trial: Trial) -> str:
    store, data = trial.store, bytes(range(256)) * 40
    first = store.write("pinned", b"other bytes")
    info = store.write("pinned", data)
    for start, length in ((0, None), (3, None), (0, 1), (100, 1000), (10_239, 1)):
        end = None if length is None else start + length
        for etag in (None, info.etag):
            if store.read("pinned", if_match=etag, start=start, length=length) != data[start:end]:
                raise Broken(f"bytes from {start} are others than those that were written")
        stale = "a read that named an older object returned the newer one"
        refused(
            PreconditionFailed, partial(store.read, "pinned", if_match=first.etag, start=start, length=length), stale
        )
    outside = "a range beyond the end returned bytes"
    refused(CorruptObject, lambda: store.read("pinned", start=10_239, length=2), outside)
    return "whole and by ranges"


def etags_tell_objects_apart(trial: Trial) -> str:
    store = trial.store
    infos = [store.write("etag", f"{number:04}".encode()) for number in range(10)]
    if len({info.etag for info in infos}) != len(infos):
        raise Broken("other bytes have the same etag")
    told = {(info.etag, info.size) for info in (infos[-1], store.stat("etag"), *store.list("etag"))}
    if len(told) != 1:
        raise Broken(f"write, stat and list tell of other objects: {sorted(told)}")
    return "of write, stat and list"


def listings_are_whole(trial: Trial) -> str:
    store = trial.store
    keys = sorted(f"many/{number % 7}/{number:05}" for number in range(trial.effort.objects))
    began = time.monotonic()
    trial.many(lambda key: store.create(key, OBJECT), keys)
    trial.per_second["create"] = len(keys) / (time.monotonic() - began)

    def check(prefix: str, after: str = "") -> None:
        found = [info.key for info in store.list(prefix, after=after)]
        expected = [key for key in keys if key.startswith(prefix) and key > after]
        if missing := set(expected) - set(found):
            raise Broken(f"{len(missing)} of {len(expected)} objects were not listed, such as {min(missing)}")
        if len(found) != len(expected):
            raise Broken(f"{len(found)} objects were listed where {len(expected)} are")

    check("many/")
    check("many/3/0")
    check("many/", after=keys[len(keys) // 2])
    return f"{len(keys):,} objects"


def missing_is_not_found(trial: Trial) -> str:
    store = trial.store
    calls: dict[str, Callable[[], object]] = {
        "stat": lambda: store.stat("missing"),
        "read": lambda: store.read("missing"),
        "a pinned read": lambda: store.read("missing", if_match=NO_ETAG),
        "delete": lambda: store.delete("missing"),
    }
    for verb, call in calls.items():
        refused(NotFound, call, f"{verb} of what is not there succeeded")
    return f"{len(calls)} verbs"


def keeps_large_objects(trial: Trial) -> str:
    size = trial.effort.large_bytes
    block = bytes(range(251)) * 4096
    data = (block * (size // len(block) + 1))[:size]
    try:
        began = time.monotonic()
        info = trial.store.write("large", data)
        wrote = time.monotonic()
        if trial.store.read("large", if_match=info.etag) != data:
            raise Broken("other bytes came back")
    except Unavailable as error:  # a proxy before the store may hang up on it
        raise Broken(str(error)) from error
    trial.bytes_per_second |= {"write": size / (wrote - began), "read": size / (time.monotonic() - wrote)}
    return f"{size / 1e6:,.0f} MB"


# ---- limits ----------------------------------------------------------------------------------------------------------
def keeps_keys_exactly(trial: Trial) -> str:
    kept = {key: _kept_alone(trial.store, f"keys/{key}") for key in _ODD_KEYS}
    wrong = [key for key, so in kept.items() if so is False]
    wrong += [" and ".join(pair) for pair in _ALIKE if not _kept_apart(trial.store, *(f"alike/{key}" for key in pair))]
    if wrong:
        raise Broken(f"not {', '.join(map(repr, wrong))}")
    refused = [key for key, so in kept.items() if so is None]
    return f"{len(_ODD_KEYS)} odd ones" + (f", {', '.join(map(repr, refused))} refused" if refused else "")


def _kept_alone(store: Store, key: str) -> bool | None:
    """Whether an object of this key is listed and read by it; None: such a key is refused, so that nothing can go wrong."""
    try:
        info = store.create(key, b"odd")
        kept = store.read(key) == b"odd" and key in [listed.key for listed in store.list("keys/")]
        with suppress(PermissionDenied):
            store.delete(key, if_match=info.etag)  # here, since what is not listed will not be removed at the end
    except InvalidKey:
        return None
    except StorageError:
        return False
    return kept


def _kept_apart(store: Store, one: str, other: str) -> bool:
    try:
        store.create(one, b"one")
        store.create(other, b"other")
    except AlreadyExists:
        return False
    return (store.read(one), store.read(other)) == (b"one", b"other")


def keys_may_be_folders(trial: Trial) -> str:
    store, keys = trial.store, ("folder", "folder/inside")
    for key in keys:
        try:
            store.create(key, b"both")
        except StorageError as error:
            raise Broken(f"{key!r} was refused beside {keys[0]!r}") from error
    if listed := set(keys) - {info.key for info in store.list("folder")}:
        raise Broken(f"{min(listed)!r} is not listed while both are there")
    return "both are listed"


def clocks_agree(trial: Trial) -> str:
    trial.store.write("clock", b"")
    off = (trial.store.stat("clock").last_modified - datetime.now(UTC)).total_seconds()
    if abs(off) > _CLOCK_SECONDS:
        raise Broken(f"the store's clock is {abs(off):,.0f} s {'ahead' if off > 0 else 'behind'}")
    return f"within {_CLOCK_SECONDS:.0f} s"

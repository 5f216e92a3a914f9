"""Ask a store, before anything depends on it, whether it keeps the promises that the version log is built on."""

import logging
import uuid
from collections.abc import Hashable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import urlsplit

from tidemill.storage.errors import (
    AlreadyExists,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StoreFull,
    StoreNotFound,
    UnsupportedStore,
)
from tidemill.storage.store import Promises, Store

logger = logging.getLogger("tidemill.storage")

_REMEDY: Final = (
    "Use AWS S3, Google Cloud Storage, Azure, Cloudflare R2, SeaweedFS, or MinIO RELEASE.2024-05-07 or newer"
)

_PREFIX: Final = ".tidemill_probe-"
_OLD: Final = timedelta(hours=1)
"""No probe takes that long: what is older was left by a process that was killed."""

_found: dict[str, Promises] = {}
"""What was found out, by URL, for the life of this process."""
_shown: dict[Hashable, Promises] = {}
"""What a store has shown, by who keeps its promises (`Store.keeper`), whichever place it was asked at."""
_unasked: set[str] = set()
"""URLs of inboxes where nothing may be created, so that they cannot be asked."""
_warned: set[tuple[str, str]] = set()
"""Servers and buckets whose deletes have been warned of."""


def check_preconditions(store: Store) -> None:
    """Make sure that a registry can live here, and give the store its `promises`. Asked once per process and URL.

    A hidden object is created twice, deleted with a wrong etag, then deleted. This catches a server that ignores a
    precondition, not one that honours it but races. A root that does not exist yet is left so and not tested.

    Raises:
        UnsupportedStore: put-if-absent is ignored: two runs could both commit the same version.
        PermissionDenied: the credentials may not create objects here.
        StoreFull: no room for the hidden object.
    """
    if store.url not in _found:
        key = f"{_PREFIX}{uuid.uuid4().hex}"
        try:
            _remove_old(store)
        except StoreNotFound:
            return
        _found[store.url] = _ask(store, key)
    store.promises = _found[store.url]


def check_inbox(store: Store) -> None:
    """The same for an inbox, out of which objects will be deleted: warn, once a bucket, if deletes are not compared.

    Nothing is created in an inbox to ask what its bucket, or its disk, has shown at another place before: at the registry, or
    at the inbox of another model. A consumer need not be allowed to write there, and the disk may be full: then each delete
    compares for itself. An inbox that is not there is no fault of this function's, and nothing is said of it.

    Raises:
        UnsupportedStore: as `check_preconditions`.
    """
    if (shown := _shown.get(store.keeper)) is not None:
        store.promises = shown
    else:
        try:
            if store.url not in _unasked:
                check_preconditions(store)
        except (PermissionDenied, StoreFull):
            _unasked.add(store.url)
        if store.url in _unasked or store.url not in _found:  # nothing may be created; or there is no such place
            store.promises = Promises()
            return
    place = urlsplit(store.url)[:2]
    if not store.promises.compares_on_delete and place not in _warned:
        _warned.add(place)
        logger.warning(
            "%s: the store ignores If-Match on DELETE (MinIO does). Tidemill compares before it deletes instead: an object "
            "that is replaced in that very moment is lost, unless the bucket keeps versions. Let producers never reuse a key, "
            "or use another store",
            store.url,
        )


def _remove_old(store: Store) -> None:
    for left in store.list(_PREFIX):
        if datetime.now(UTC) - left.last_modified > _OLD:
            with suppress(NotFound, PermissionDenied):
                store.delete(left.key, if_match=left.etag)


def _ask(store: Store, key: str) -> Promises:
    with suppress(AlreadyExists):  # nobody else knows the key: our own write, whose answer was lost
        store.create(key, b"first")
    try:
        _check_create(store, key)
        compares = _compares_on_delete(store, key)
        store.promises = Promises(compares_on_delete=compares is not False)
        if compares is not None:
            _shown[store.keeper] = store.promises
        return store.promises
    finally:
        # A registry may well forbid deletes, and the policy of an inbox's bucket those that compare nothing
        with suppress(NotFound, PermissionDenied):
            store.delete(key, if_match=store.stat(key).etag)


def _check_create(store: Store, key: str) -> None:
    try:
        store.create(key, b"second")
    except AlreadyExists:
        return
    raise UnsupportedStore(
        f"{store.url}: the store ignores put-if-absent (If-None-Match: *), so commits are unsafe. {_REMEDY}"
    )


def _compares_on_delete(store: Store, key: str) -> bool | None:
    """None: nothing may be deleted here, which shows nothing of places where it may."""
    stale = "0" * 32  # no etag of these bytes
    store.promises = Promises(compares_on_delete=True)  # so that the server is asked: else `delete` compares for itself
    try:
        store.delete(key, if_match=stale)
    except PreconditionFailed:
        return True
    except PermissionDenied:
        return None
    finally:
        store.promises = Promises()
    return False

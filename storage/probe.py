"""Ask a store, before anything depends on it, whether it keeps the promises that the version log is built on."""

import logging
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from tidemill.storage.errors import (
    AlreadyExists,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StoreNotFound,
    UnsupportedStore,
)
from tidemill.storage.store import Store

logger = logging.getLogger("tidemill.storage")

_REMEDY = "Use AWS S3, Cloudflare R2, SeaweedFS, or MinIO RELEASE.2024-05-07 or newer"

_PREFIX = ".tidemill_probe-"
_OLD = timedelta(hours=1)  # no probe takes that long: what is older was left by a process that was killed

_compares_on_delete: dict[str, bool] = {}
"""Results by URL, for the life of this process."""


def check_preconditions(store: Store) -> None:
    """Create a hidden object twice, delete it with a wrong etag, then delete it. Done once per process and URL.

    This catches a server that ignores a precondition, not one that honours it but races. If deletes are not compared,
    `store.conditional_delete` is cleared, with one warning. A root that does not exist yet is left so and not tested.

    Raises:
        UnsupportedStore: put-if-absent is ignored: two runs could both commit the same version.
        PermissionDenied: the credentials may not create objects here.
    """
    if store.url not in _compares_on_delete:
        key = f"{_PREFIX}{uuid.uuid4().hex}"
        try:
            _remove_old(store)
        except StoreNotFound:
            return
        _compares_on_delete[store.url] = _probe(store, key)
    store.conditional_delete = _compares_on_delete[store.url]


def _remove_old(store: Store) -> None:
    for left in store.list(_PREFIX):
        if datetime.now(UTC) - left.last_modified > _OLD:
            with suppress(NotFound, PermissionDenied):
                store.delete(left.key)


def _probe(store: Store, key: str) -> bool:
    """Whether deletes compare etags."""
    with suppress(AlreadyExists):  # nobody else knows the key: our own write, whose answer was lost
        store.create(key, b"first")
    try:
        _check_create(store, key)
        return _delete_compares(store, key)
    finally:
        with suppress(NotFound, PermissionDenied):  # a registry may well forbid deletes
            store.delete(key)


def _check_create(store: Store, key: str) -> None:
    try:
        store.create(key, b"second")
    except AlreadyExists:
        return
    raise UnsupportedStore(
        f"{store.url}: the store ignores put-if-absent (If-None-Match: *), so commits are unsafe. {_REMEDY}"
    )


def _delete_compares(store: Store, key: str) -> bool:
    stale = "0" * 32  # no etag of these bytes
    try:
        store.delete(key, if_match=stale)
    except (PreconditionFailed, PermissionDenied):
        return True
    logger.warning(
        "%s: the store ignores If-Match on DELETE (MinIO does). Tidemill compares before it deletes instead: an object "
        "that is replaced in that very moment is lost. Let producers never reuse a key, or use another store",
        store.url,
    )
    return False

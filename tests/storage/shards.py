"""What the tests of inboxes are made of: small shards, debts for them, and stores that fail."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import pyarrow as pa

from tests import data
from tests.storage.faults import Call, FaultStore
from tidemill.storage import disposal
from tidemill.storage.disposal import quarantine_key
from tidemill.storage.inbox import Inbox
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Owed, sha256
from tidemill.storage.probe import check_preconditions
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store

Stores = Callable[[str], Store]


def parquet(*numbers: int, **options: Any) -> bytes:
    """A file with these numbers as column x."""
    return data.parquet(pa.table({"x": pa.array(numbers, pa.int64())}), **({"row_group_size": None} | options))


def unknown(_: ObjectInfo) -> bool:
    return False


def keys(store: Store, prefix: str = "") -> list[str]:
    return sorted(info.key for info in store.list(prefix))


def owe(inbox: Inbox, key: str, then: Literal["delete", "archive", "quarantine"], to: str | None = None) -> Owed:
    """The debt for the object that is there now."""
    info = inbox.store.stat(key)
    digest = sha256(inbox.store.read(key))
    if then == "quarantine":
        to = quarantine_key("taxi", 3, digest, key)
    return Owed(inbox=inbox.url, key=key, sha256=digest, etag=info.etag, action=then, destination=to, reason="no rows")


def faulty(url: str, hook: Callable[[Call], None]) -> Stores:
    """Opens stores as a run does, asked what they promise, but the one at `url` with a hook."""
    return lambda other: FaultStore(asked(other), hook) if other == url else asked(other)


def asked(url: str) -> Store:
    """A store that was asked what it promises."""
    store = open_store(url)
    check_preconditions(store)
    return store


def anywhere(url: str) -> bool:
    """For tests that are not about which places a run may touch."""
    return True


def dispose(log: VersionLog, owed: Iterable[Owed], stores: Stores = open_store) -> tuple[Owed, ...]:
    return disposal.dispose(log, owed, anywhere, stores)


def requeue(log: VersionLog, name: str, stores: Stores = open_store) -> str:
    return disposal.requeue(log, name, anywhere, stores)

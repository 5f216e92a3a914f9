"""What an inbox holds, asked without a learner: as much as says whether a turn may find something to do."""

from collections.abc import Callable, Iterator

from tidemill.storage.inbox import Inbox, is_shard
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store


def entries(inbox: Inbox) -> Iterator[tuple[str, str]]:
    """(key, etag) of what may be shards, and at the end (key, reason) of what can be none: the turn that follows tells of it.

    Raises:
        StorageError: the inbox is not there, or cannot be listed.
    """
    passed_over: list[tuple[str, str]] = []
    for info in inbox.store.list(passed_over=lambda *entry: passed_over.append(entry), inside=True):
        if is_shard(info.key):
            yield info.key, info.etag
    yield from (entry for entry in passed_over if is_shard(entry[0].removesuffix("/")))


def anything_in(inbox: str, stores: Callable[[str], Store] = open_store) -> bool:
    """Whether an inbox, by its URL, holds anything. Costs one request.

    Raises:
        StorageError: as `entries`.
    """
    return next(entries(Inbox(stores(inbox))), None) is not None

"""Where a backtest reads and writes: the archives are whole, the dataset of the start is what it was, nothing lies in another."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tidemill.storage.chain import Version
from tidemill.storage.choice import Choice
from tidemill.storage.dataset import Snapshot
from tidemill.storage.disposal import archive_keys
from tidemill.storage.errors import DatasetChanged, NotFound, PlacesOverlap, on_one_line
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import ShardRef
from tidemill.storage.overlap import Relation, keep_out_of_dataset, keep_out_of_inbox, named_inboxes, relation
from tidemill.storage.probe import check_preconditions
from tidemill.storage.records import IN_MEMORY
from tidemill.storage.store import Store
from tidemill.tasks.snapshots import take_snapshot

_NAMED: Final = 3
"""So many shards are named of those that an archive lacks."""


def check_place(to: Store, log: VersionLog, archives: Iterable[Store]) -> None:
    """What a backtest writes lies outside of what it reads, and its store can keep versions.

    Raises:
        PlacesOverlap: it does not.
        UnsupportedStore: the store cannot keep versions safe.
    """
    if (lies := relation(to.url, log.store.url)) in (Relation.SAME, Relation.INSIDE):
        raise PlacesOverlap(
            f"--to, {to.url}, {lies.value} the registry {log.store.url}, which is only read: choose a place of its own."
        )
    for inbox in sorted(named_inboxes(log)):
        keep_out_of_inbox(inbox, [("--to", to.url)], "an inbox of the model,")
    for archive in archives:
        keep_out_of_dataset(archive.url, [("--to", to.url)], "the archive")
    check_preconditions(to)


def check_archived(wanted: Iterable[ShardRef], archives: Sequence[Store]) -> None:
    """Every shard, and every shard of labels, lies in an archive with as many bytes as the log says, before any is trained on.

    Raises:
        NotFound: some do not; the first of them are named.
    """
    sizes: dict[str, set[int]] = {}
    for archive in archives:
        for info in archive.list():
            sizes.setdefault(info.key, set()).add(info.size)
    count = 0
    missing, changed = list[str](), list[str]()
    for shard in wanted:
        count += 1
        there = set[int]().union(*(sizes.get(key, ()) for key in archive_keys(shard.key, shard.sha256)))
        if not there:
            missing.append(shard.key)
        elif shard.size not in there:
            changed.append(shard.key)
    if not missing and not changed:
        return
    where = ", ".join(archive.url for archive in archives)
    told = [
        f"{what} {len(keys):,} of {count:,} shards ({_named(keys)})"
        for what, keys in (("lacks", missing), ("holds other bytes for", changed))
        if keys
    ]
    raise NotFound(
        f"{where} {' and '.join(told)}: nothing was trained. Name every place where shards were archived or kept (--archive), or "
        "bring them back."
    )


def _named(keys: Sequence[str]) -> str:
    more = ", ..." if len(keys) > _NAMED else ""
    return ", ".join(map(on_one_line, keys[:_NAMED])) + more


def dataset_of(
    log: VersionLog, version: Version, archives: Iterable[Store], stores: Callable[[str], Store]
) -> Snapshot:
    """What a batch version of the log was trained on; an archive that has come to lie inside of it is left out.

    Raises:
        DatasetChanged: it is no longer what it was, or was a table in memory.
        StorageError: it is gone, or cannot be read.
    """
    wanted = version.manifest.dataset
    what = f"version {version.number} of {log.url} was trained on"
    if wanted is None or wanted.url == IN_MEMORY:
        raise DatasetChanged(
            f"{what} a table in memory: name a dataset to train the start on (--dataset), or give the table."
        )
    inside = [archive.url for archive in archives if relation(archive.url, wanted.url) is Relation.INSIDE]
    table = wanted.table
    url = wanted.url if table is None or table.metadata is None else f"{wanted.url}/{table.metadata}"
    for without in (None, *inside):
        found = take_snapshot(url, without, stores, Choice.of(wanted.chosen), None if table is None else table.version)
        if found.ref.fingerprint == wanted.fingerprint:
            return found
    raise DatasetChanged(
        f"{what} {wanted.url} when it had {wanted.files} files and {wanted.rows} rows, and it is no longer what it was. Bring "
        "that back, or name the dataset to train the start on (--dataset)."
    )

"""The audit that every fault ends with: is the history sound, was each shard consumed or rejected exactly once, and do the shards
give these weights again, bit for bit?"""

import threading
import uuid
from collections import Counter
from collections.abc import Iterable

from tidemill.storage.audit import audit as audit_history
from tidemill.storage.chain import Version
from tidemill.storage.disposal import archive_keys
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import sha256
from tidemill.storage.memory import MemoryStore
from tidemill.storage.store import Store
from tidemill.tasks.reproduce import reproduce

_one_at_a_time = threading.Lock()  # dropout draws from torch's generator, which all threads share


def audit(log: VersionLog, shards: Iterable[tuple[str, bytes]]) -> list[Version]:
    """Check the history against every (key, bytes) that was ever put into the inbox; return it, oldest first.

    What was put twice, same key and same bytes, stands in `shards` once.
    """
    put = list(shards)
    check_bits(log, archive(put))
    history = list(log.history(log.head()))[::-1]
    consumed = [shard for version in history for shard in version.manifest.consumed]
    rejected = [shard for version in history for shard in version.manifest.rejected]
    assert Counter((s.key, s.sha256) for s in [*consumed, *rejected]) == Counter(
        (key, sha256(data)) for key, data in put
    )
    return history


def check_bits(log: VersionLog, archived: Store) -> None:
    """The history is sound, and the shards in the archive give these weights again."""
    sound = audit_history(log)
    assert not sound.findings, sound.findings
    with _one_at_a_time:
        again = reproduce(log, [archived])
    assert not again.findings, again.findings


def archive(shards: Iterable[tuple[str, bytes]]) -> Store:
    """Shards as an archive keeps them."""
    store = MemoryStore(uuid.uuid4().hex)
    for key, data in shards:
        own, second = archive_keys(key, sha256(data))
        store.write(second if own in (info.key for info in store.list(own)) else own, data)
    return store

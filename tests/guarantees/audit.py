"""The audit that every fault ends with: is the log whole, and was each shard consumed or rejected exactly once?"""

from collections import Counter
from collections.abc import Iterable

from storage.log import Version, VersionLog
from storage.manifest import sha256


def audit(log: VersionLog, shards: Iterable[tuple[str, bytes]]) -> list[Version]:
    """Check the history against every (key, bytes) that was ever put into the inbox; return it, oldest first.

    What was put twice, same key and same bytes, stands in `shards` once.
    """
    head = log.head()
    history = list(log.history(head))[::-1]  # checks every link to a parent
    assert [version.number for version in history] == list(range(head.number + 1))
    for version in history:
        for ref in version.manifest.blobs.refs:
            log.read_blob(ref)  # checks length and sha256
    consumed = [shard for version in history for shard in version.manifest.consumed]
    rejected = [shard for version in history for shard in version.manifest.rejected]
    assert Counter((s.key, s.sha256) for s in [*consumed, *rejected]) == Counter(
        (key, sha256(data)) for key, data in shards
    )
    assert [shard.ordinal for shard in consumed] == list(range(len(consumed)))
    assert head.manifest.counters["shards"] == len(consumed)
    return history

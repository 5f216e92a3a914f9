"""Retention: which versions keep their weights and state, and the removal of all other blobs."""

import logging
import re

from tidemill.storage.aliases import aliased, all_aliases
from tidemill.storage.errors import NotFound, UnknownAlias
from tidemill.storage.log import VersionLog, open_log

logger = logging.getLogger("tidemill.storage")

_BLOB = re.compile(r"(\d{8})-[0-9a-f]{32}\..*")


def maintain(registry: str, model: str, keep: int) -> list[str]:
    """`collect_garbage` for a model by name, told in the log. Returns the deleted keys."""
    log = open_log(registry, model)
    deleted = collect_garbage(log, keep)
    logger.info(
        "%s: %d blobs removed; the last %d versions and the aliased ones keep theirs", log.url, len(deleted), keep
    )
    return deleted


def collect_garbage(log: VersionLog, keep: int) -> list[str]:
    """Delete the blobs that no version in retention names: the last `keep` versions, and every aliased one.

    Never touches a number above the head, where a run may be about to commit, nor any manifest. Safe to repeat, and to run
    beside training. Returns the deleted keys.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 (the head), not {keep}")
    prefix = f"{log.model}/blobs/"
    listed = [info.key for info in log.store.list(prefix)]  # before the head is read: what is newer is not in it
    head = log.head()
    log.make_durable(head)  # or a power cut could leave an older head, without its blobs
    retained = list(log.history(head, keep))
    for alias in all_aliases(log):
        try:
            retained.append(aliased(log, alias))
        except UnknownAlias as error:  # it was deleted just now, or it names nothing: then it keeps nothing
            logger.warning("%s", error)
    named = {ref.key for version in retained for ref in version.manifest.blobs.refs}
    deleted = []
    for key in sorted(listed):
        number = _BLOB.fullmatch(key.removeprefix(prefix))
        if number is None or int(number[1]) > head.number or key in named:
            continue
        try:
            log.store.delete(key)
        except NotFound:
            continue
        deleted.append(key)
    return deleted

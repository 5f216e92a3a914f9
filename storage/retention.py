"""Retention: which versions keep their weights and state, and the removal of all other blobs."""

import logging
import re
from datetime import UTC, datetime, timedelta
from typing import Final

from tidemill.storage.aliases import aliased, all_aliases
from tidemill.storage.errors import NotFound, PermissionDenied, UnknownAlias, UnsupportedStore
from tidemill.storage.log import VersionLog, open_log

logger = logging.getLogger("tidemill.storage")

STALE: Final = timedelta(days=1)
"""An upload that was begun so long ago has no writer any more."""
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
    beside training. What was uploaded of blobs that were never finished goes too. Returns the deleted keys.
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
    named = {
        key for version in retained for key in version.manifest.blobs.object_keys
    }  # whichever version has stored them
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
    _give_up(log, head.number)
    return deleted


def _give_up(log: VersionLog, head: int) -> None:
    """Remove what killed processes have uploaded of blobs that they did not finish.

    The rule is that of finished blobs: a version that exists needs no more of them, those above the head may still be
    committed. Checkpoints of batch runs have no such number, so that theirs must be older than any writer.
    """
    old = datetime.now(UTC) - STALE
    try:
        for upload in list(log.store.unfinished(f"{log.model}/")):
            name = upload.key.removeprefix(f"{log.model}/")
            number = _BLOB.fullmatch(name.removeprefix("blobs/"))
            lost = name.startswith("blobs/") and number is not None and int(number[1]) <= head
            if lost or (name.startswith("runs/") and upload.began < old):
                log.store.abandon(upload)
    except (PermissionDenied, UnsupportedStore) as error:  # which no other verb needs
        logger.warning("%s: what killed processes had begun to upload stays: %s", log.url, error)

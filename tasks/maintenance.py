"""Upkeep of a registry: retention and garbage collection."""

import logging

from tidemill.storage import retention
from tidemill.storage.log import open_log

logger = logging.getLogger("tidemill.maintenance")


def collect_garbage(registry: str, model: str, keep: int) -> list[str]:
    """Delete the blobs that no version in retention names; see `tidemill.storage.retention`. Returns the deleted keys."""
    log = open_log(registry, model)
    deleted = retention.collect_garbage(log, keep)
    logger.info(
        "%s: %d blobs removed; the last %d versions and the aliased ones keep theirs", log.url, len(deleted), keep
    )
    return deleted

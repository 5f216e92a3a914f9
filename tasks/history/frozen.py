"""The batch model as it was left, scored anew on the archived shards that came after it: as if nothing were trained online."""

import logging
from collections import Counter
from collections.abc import Sequence

from tidemill.storage.errors import CorruptObject, NotFound, ShardRejected, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Consumed
from tidemill.storage.store import Store
from tidemill.tasks.history.charts import Frozen
from tidemill.tasks.history.reading import History
from tidemill.tasks.reproduce import archived_groups
from tidemill.tasks.training.errors import TrainingError, described
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.loop import score
from tidemill.tasks.versions import load_frozen

logger = logging.getLogger("tidemill.report")


def score_frozen(log: VersionLog, history: History, archives: Sequence[Store]) -> Frozen:
    """Score, on each shard of a history, the model of the last batch training before it.

    What cannot be scored is counted, and the notes say why: a shard that is in no archive, a batch model whose weights are out of
    retention. Memory: one model and one shard.

    Args:
        log: The model's versions.
        history: The shards, as they were read.
        archives: Where consumed shards are now; a shard is looked for in one after the other.
    """
    scores, missing = dict[int, float](), Counter[str]()
    before = history.batch is not None and history.batch.version < history.versions[0].number
    network = _load(log, history.batch.version) if before and history.batch is not None else None
    number = 0
    for version in history.versions:
        if version.kind == "batch":
            network = _load(log, version.number)
        if not version.shards:
            continue
        for shard in log.older(version.number).manifest.consumed:
            number += 1
            found = _score(network, shard, history.metric, archives)
            if isinstance(found, float):
                scores[number] = found
            else:
                missing[found] += 1
    notes = [
        f"The frozen model has no score on {count:,} of {number:,} shards: {why}." for why, count in missing.items()
    ]
    for note in notes:
        logger.warning(note)
    return Frozen(scores, notes)


def _load(log: VersionLog, number: int) -> Network | str:
    """The network of a version, or why there is none."""
    try:
        return load_frozen(log, log.older(number))
    except UnknownVersion:
        return f"the weights of version {number} are out of retention"
    except (CorruptObject, TrainingError) as error:
        return f"version {number} cannot be loaded ({error})"


def _score(network: Network | str | None, shard: Consumed, metric: str, archives: Sequence[Store]) -> float | str:
    """The network's score on a shard, or why there is none."""
    if not shard.rows:
        return "no row of them has a label"
    if network is None:
        return "no batch training comes before them"
    if isinstance(network, str):
        return network
    try:
        return score(network, archived_groups(shard, archives, network.features)).finite.get(
            metric, "it is not finite there"
        )
    except NotFound:
        return "they are in none of the archives"
    except ShardRejected:
        return "their labels do not fit them any more"
    except TrainingError as error:
        logger.info("the frozen model cannot score %s: %s", shard.key, described(error))
        return "it cannot read them"

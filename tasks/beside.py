"""What the score of a batch run stands beside, on the same rows: the baseline, and the version whose alias it takes.

None of it changes a bit of what is trained, or makes a run fail. A store that is away is waited for, as everywhere: what is
stored of a run must not depend on that.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tidemill.storage.aliases import find_alias
from tidemill.storage.chain import Version
from tidemill.storage.errors import Unavailable, on_one_line
from tidemill.storage.log import VersionLog
from tidemill.tasks.training.baseline import baseline
from tidemill.tasks.training.errors import described
from tidemill.tasks.training.groups import RowGroup, Subset
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.loop import Score, score
from tidemill.tasks.versions import load_frozen

logger = logging.getLogger("tidemill.batch")


@dataclass(frozen=True)
class Rows:
    """Rows that nothing was trained on."""

    groups: Sequence[RowGroup]
    split: Subset | None
    schemas: Sequence[tuple[str, pa.Schema]]
    """Each distinct schema of their files, with the name of a row group that has it."""

    def score(self, learner: Learner | Network) -> Score:
        """Of a learner that was not trained on them. Raises ColumnError and ModelError."""
        for name, schema in self.schemas:
            learner.features.check(schema, name)
        return score(learner, self.groups, self.split)


def of_baseline(learner: Learner, rows: Rows, class_counts: Sequence[int] | None) -> dict[str, float]:
    """The scores of the mean, or of the base rates, by metric; empty if they cannot be computed.

    Raises:
        Unavailable: the dataset's store is away for now.
    """
    try:
        return score(baseline(learner.spec, learner.features, class_counts), rows.groups, rows.split).finite
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001  # of the user's loss or metrics, which any code may raise
        logger.warning("the baseline could not be scored: %s", described(error))
        return {}


def of_replaced(learner: Learner, rows: Rows | None, log: VersionLog, alias: str) -> dict[str, Any] | None:
    """The version that the alias names until now: `{"alias", "version", "score"}`, or `reason` in place of a score.

    None if there is no such alias yet. `rows` is None where no rows were held out.

    Raises:
        Unavailable: a store is away for now.
    """
    try:
        if not log.exists() or (found := find_alias(log, alias)) is None:
            return None
        replaced: dict[str, Any] = {"alias": alias, "version": found.version}
        if rows is None:
            return replaced | {"reason": "no rows were held out"}
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001  # of a damaged registry: nothing is told then
        logger.warning("where the alias %r stands could not be read: %s", alias, described(error))
        return None
    try:
        return replaced | _scored(learner, rows, log, log.version(found.version))
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001  # whatever it is that another model cannot read, or needs
        return replaced | {"reason": on_one_line(described(error))}


def _scored(learner: Learner, rows: Rows, log: VersionLog, version: Version) -> dict[str, Any]:
    own = [path.partition(":")[0] for path in learner.spec.import_paths]  # whoever runs this has named them
    other = load_frozen(log, version, learner.device.type, allowed=own)
    if (other.spec.targets, other.spec.task) != (learner.spec.targets, learner.spec.task):
        return {"reason": f"it is for task {other.spec.task!r} of target {', '.join(map(repr, other.spec.targets))}"}
    return {"score": rows.score(other).finite}

"""May a new version serve? The champion, what it scores and when it served; and the decision that a manifest records.

Nothing here influences what the learner is trained on, except a rollback or a retraining after many refusals, which the log
itself calls for.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Final

from tidemill.storage.aliases import Alias, find_alias, promote
from tidemill.storage.chain import Version
from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import CorruptObject, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Compared, Consumed, Gate, Predicted
from tidemill.storage.store import Store
from tidemill.tasks.online.reading import may_be_the_shards
from tidemill.tasks.scores import Means
from tidemill.tasks.settings import GateSettings
from tidemill.tasks.training.errors import TrainingError, described
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.loop import Score, score
from tidemill.tasks.versions import load_frozen, spec_of

logger = logging.getLogger("tidemill.gate")

REMEMBERED: Final = 1000
"""How many versions back the last decision on the holdout is looked for."""
UNDECIDED: Final = 1000
"""Give up the search for the version that served after this many versions without a decision of the gate."""
AS_BAD_AS_CAN_BE: Final = sys.float_info.max
"""Stands for a score of the learner that is not finite: JSON has no infinity."""


class OwnCode(Exception):
    """The champion's spec names code of the user's own, which may not run where it was to be loaded."""


class Champion:
    """The version that an alias names, in memory: it scores what the learner scores, and makes way for better ones."""

    def __init__(self, log: VersionLog, settings: GateSettings, device: str, stores: Callable[[str], Store]) -> None:
        """`stores` opens the holdout, and `device` is where networks score, as in `Learner.create`."""
        self.log, self.settings, self._device, self._stores = log, settings, device, stores
        self.alias: Alias | None = None
        self._network: Network | None = None
        self._number: int | None = None
        self._holdout: Sequence[RowGroup] | None = None
        self._holdout_score: Score | None = None
        self._decided: tuple[int, Gate] | None = None
        """The last decision, and the version that it was about."""
        self._served: tuple[int, Network | None] | None = None
        """A version that served once, and its network if that can still be read."""
        self._version = lru_cache(maxsize=64)(log.version)
        """Manifests never change; bisections for neighbouring moments ask for the same ones."""

    def refresh(self, head: Version, learner: Learner, *, own_code: bool = True) -> None:
        """Finish what the head decided, if its run was killed before; then find out who the champion is.

        A champion that cannot be loaded is warned of, and nothing is compared.

        Raises:
            OwnCode: the champion is to be loaded, and is of the user's own code, which `own_code` forbids. A later call loads it.
        """
        if self.settings.champion == "ignore":
            return
        self._promote(head)
        self._find(head, learner, own_code)
        if self.alias is None:
            logger.warning("%s has no alias %r: nothing to compare with", self.log.url, self.settings.alias)
        elif self.settings.champion == "move" and self.settings.holdout_dataset is not None:
            self._decided = self._last_decision(head)

    def finish(self, head: Version) -> None:
        """What `refresh` does first, for whoever has no learner: the alias moves as the head decided, if it has not yet."""
        if self.settings.champion != "ignore":
            self._promote(head)

    def forget(self) -> None:
        """Drop all that takes memory. `refresh` finds it again; only what the settings and the alias say is kept."""
        self._network = self._number = self._holdout = self._holdout_score = self._served = None
        self._version.cache_clear()

    def _find(self, head: Version, learner: Learner, own_code: bool = True) -> None:
        self.alias = find_alias(self.log, self.settings.alias)
        if self.alias is None or self.alias.version == self._number:
            return
        self._number = self._network = self._holdout_score = None
        try:
            if self.alias.version == head.number:
                self._network = learner.network()
            else:
                champion = self.log.version(self.alias.version)
                if not own_code and spec_of(self.log, champion).import_paths:
                    raise OwnCode
                self._network = load_frozen(self.log, champion, self._device)
        except (UnknownVersion, CorruptObject, TrainingError) as error:
            logger.warning("champion, version %d, cannot be compared with: %s", self.alias.version, error)
        self._number = self.alias.version

    def _last_decision(self, head: Version) -> tuple[int, Gate] | None:
        """On the way to the head, refusals that were rolled back included."""
        for version in islice(self.log.history(head), REMEMBERED):
            if (gate := version.manifest.gate) is not None:
                return version.number, gate
        return None

    def score(self, groups: Sequence[RowGroup]) -> dict[str, float]:
        """The champion's scores on these rows; none if it cannot read them."""
        found = None if self._network is None else _scored(self._network, groups, groups[0].name)
        return {} if found is None else found.finite

    def is_version(self, number: int) -> bool:
        """Whether the champion is this version."""
        return self._number == number

    # ---- the holdout -------------------------------------------------------------------------------------------------
    def holdout(self, learner: Learner) -> tuple[Score, Score | None] | None:
        """Scores on the fixed holdout of the learner and of the champion, or None if there is no holdout.

        Where an earlier champion had a better score, the champion's has that in place of its own. Than the present one alone
        would let champions get worse by the tolerance again and again. What a person or a batch training has made the
        champion is measured by itself: whoever moved the alias has accepted it.

        Raises:
            ColumnError: the holdout lacks columns of the learner's spec, or has no label.
        """
        if self.settings.holdout_dataset is None:
            return None
        if self._holdout is None:
            self._holdout = snapshot(self.settings.holdout_dataset, self._stores, learner.features.types).row_groups
        found = score(learner, self._holdout)
        if self._holdout_score is None and self._network is not None:
            self._holdout_score = _scored(self._network, self._holdout, self.settings.holdout_dataset)
            if self._holdout_score is None:
                self._network = None
        return found, self._best(self._holdout_score, learner.spec.main_metric)

    def _best(self, champion: Score | None, metric: str) -> Score | None:
        if champion is None or self._decided is None:
            return champion
        number, gate = self._decided
        stays, moves = Alias(gate.champion, gate.moves), Alias(number, gate.moves + 1)
        if self.alias not in ((stays, moves) if gate.decision == "promoted" else (stays,)):
            return champion
        if gate.holdout is None or (gate.metric, gate.holdout.rows) != (metric, champion.rows):  # other rows
            return champion
        if metric == "loss":
            return replace(champion, loss=min(gate.holdout.champion, champion.loss))
        best = min(gate.holdout.champion, champion.metrics[metric])
        return replace(champion, metrics=champion.metrics | {metric: best})

    # ---- moving the alias --------------------------------------------------------------------------------------------
    def move_alias(self, version: Version, learner: Learner) -> None:
        """Move the alias, if the version just committed says so; else find out whether somebody else has moved it."""
        if self.alias is None:
            return
        if version.manifest.gate is not None:
            self._decided = version.number, version.manifest.gate
        if (moved := self._promote(version)) is None:
            self._find(version, learner)
        else:
            self.alias, self._number = moved, version.number
            tables = {} if self._network is None else self._network.renewed(learner)
            self._network = self._holdout_score = None  # before the next one takes memory
            self._network = learner.network(tables)

    def _promote(self, version: Version) -> Alias | None:
        gate = version.manifest.gate
        if gate is None or gate.decision == "refused":
            return None
        try:
            return promote(self.log, self.settings.alias, version, only_from=Alias(gate.champion, gate.moves))
        except UnknownVersion:  # others have gone on long since, and retention has removed it
            return None

    # ---- who would have predicted ------------------------------------------------------------------------------------
    def predicted(self, head: Version, arrived: datetime, groups: Sequence[RowGroup]) -> Predicted | None:
        """The score, on rows whose labels came late, of the version that served when the rows arrived.

        None if retention has removed that version, or if it cannot score them.
        """
        version = self._serving(head, arrived)
        if self._served is None or self._served[0] != version.number:
            try:
                network = load_frozen(self.log, version, self._device)
            except (UnknownVersion, CorruptObject, TrainingError) as error:
                logger.warning("version %d cannot be scored any more: %s", version.number, error)
                network = None
            self._served = version.number, network
        network = self._served[1]
        found = None if network is None else _scored(network, groups, groups[0].name)
        return None if found is None else Predicted(version=version.number, score=found.finite)

    def _serving(self, head: Version, moment: datetime) -> Version:
        """The version that served at a moment. Where no gate moves the alias, the one that it names, if that existed."""
        if self.settings.champion == "move":
            return served_at(self.log, self._version, head, moment)
        alias = find_alias(self.log, self.settings.alias)
        newest = newest_at(self._version, head, moment)
        return newest if alias is None or alias.version > newest.number else self._version(alias.version)


def _scored(network: Network, groups: Sequence[RowGroup], name: str) -> Score | None:
    """Scores of a version that is not being trained; None if it cannot score these rows, which is no fault of theirs.

    Its spec may name columns that the head's does not, and its code may fail.
    """
    try:
        return score(network, groups)
    except Exception as error:
        if not may_be_the_shards(error):
            raise
        logger.warning("champion cannot score %s: %s", name, described(error))
        return None


def served_at(log: VersionLog, version_at: Callable[[int], Version], head: Version, moment: datetime) -> Version:
    """The version that served at a moment, as far as the gate moved the alias; version 0 before there was any.

    That is what the last decision before it left as champion, or what a batch training or a rollback has made since.
    """
    newest = newest_at(version_at, head, moment)
    for version in islice(log.history(newest), UNDECIDED):
        if (gate := version.manifest.gate) is not None:
            return version if gate.decision == "promoted" else version_at(gate.champion)
        if version.manifest.kind != "online":
            return version
    return newest


def newest_at(version_at: Callable[[int], Version], head: Version, moment: datetime) -> Version:
    """The newest version at a moment; version 0 before there was any.

    Found by bisection: the log is ordered by time as far as the clocks of its writers agree.
    """
    low, high = 0, head.number
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if version_at(middle).manifest.created <= moment else (low, middle - 1)
    return version_at(low)


# ---- deciding --------------------------------------------------------------------------------------------------------
def decide(
    settings: GateSettings,
    alias: Alias,
    metric: str,
    recent: Iterable[Consumed],
    holdout: tuple[Score, Score | None] | None,
    before: Gate | None,
) -> Gate | None:
    """The decision on a version whose shards are the last of `recent`; None if nothing can be compared.

    It is promoted if, with the tolerance, it is not worse than the champion: before training, on the rows of these shards; and
    after it, on the holdout (`Champion.holdout`). `before` is the decision before this one, if there was one: refusals are
    counted in a row, until somebody moves the alias.
    """
    lately = _compared(recent, metric)
    fixed = None if holdout is None else _on_holdout(*holdout, metric)
    if lately is None or (holdout is not None and fixed is None):
        return None
    worse = [c for c in (lately, fixed) if c is not None and not _holds(c, settings.tolerance)]
    in_a_row = 0 if before is None or before.moves != alias.moves else before.refusals
    refusals = in_a_row + 1 if worse else 0
    return Gate(
        champion=alias.version,
        moves=alias.moves,
        metric=metric,
        decision="refused" if worse else "promoted",
        tolerance=settings.tolerance,
        recent=lately,
        holdout=fixed,
        refusals=refusals,
    )


def _holds(compared: Compared, tolerance: float) -> bool:
    return compared.learner <= compared.champion + tolerance * abs(compared.champion)


def _compared(shards: Iterable[Consumed], metric: str) -> Compared | None:
    learner, champion = Means(), Means()
    for shard in shards:
        if metric in shard.champion:
            champion.add({metric: shard.champion[metric]}, shard.rows)
            learner.add({metric: shard.score[metric]} if metric in shard.score else {}, shard.rows)
    if metric not in champion.mean:
        return None
    rows = champion.rows[metric]
    scored_all = learner.rows.get(metric) == rows
    return Compared(
        rows=rows, learner=learner.mean[metric] if scored_all else AS_BAD_AS_CAN_BE, champion=champion.mean[metric]
    )


def _on_holdout(learner: Score, champion: Score | None, metric: str) -> Compared | None:
    found, best = learner.finite, {} if champion is None else champion.finite
    if metric not in best:
        return None
    return Compared(rows=learner.rows, learner=found.get(metric, AS_BAD_AS_CAN_BE), champion=best[metric])

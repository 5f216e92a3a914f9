"""What an online run tells of itself: while it runs, to whoever listens (`tidemill.progress`), and when it ends."""

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from pydantic import BaseModel, PrivateAttr

from tidemill import progress
from tidemill.storage.aliases import Alias
from tidemill.storage.errors import on_one_line
from tidemill.storage.manifest import Manifest
from tidemill.tasks.online.events import Committed, Looked
from tidemill.tasks.scores import Means, Summary, add_served

logger = logging.getLogger("tidemill.online")

NAMED: Final = 20
"""How many shards a report names with the reason."""
ALIVE_SECONDS: Final = 300.0
"""After this time without a commit, a run that follows logs that it is alive, and what waits."""


class OnlineReport(BaseModel):
    """What an online run did, and what it left."""

    model: str
    first_version: int | None = None
    head: int
    versions: int = 0
    shards: int = 0
    rows: int = 0
    unlabelled: int = 0
    """Rows without a label, that were not trained on."""
    unmatched: int = 0
    """Labels that came row by row, of rows that no shard had in time."""
    score: dict[str, float] = {}
    """Prequential: of each shard before training on it, weighted by rows."""
    champion: dict[str, float] = {}
    """Of the champion, on the same shards."""
    served: dict[str, float] = {}
    """Of the answers that were given, where the shards say which (`tidemill serve --log-to`)."""
    recent: dict[str, float] = {}
    """As `score`, of the last `recent_shards` shards, those of earlier runs included."""
    recent_champion: dict[str, float] = {}
    """Of the champion, on the same shards."""
    promoted: int = 0
    """Versions to which the champion's alias has moved."""
    refused: int = 0
    """Versions that the gate found worse than the champion."""
    rejected: int = 0
    last_rejected: dict[str, str] = {}
    """Key -> reason of the last few."""
    duplicates: int = 0
    """Shards that were sent again and removed without training."""
    lost_races: int = 0
    owed: int = 0
    """Consumed shards that could not be deleted yet."""
    waiting: int = 0
    """Shards in the inbox at the last look that were not trained on."""
    oldest_waiting: datetime | None = None
    passed_over: int = 0
    """Those of the waiting shards that stay until a person acts: too large, or not to be read."""
    last_passed_over: dict[str, str] = {}
    """URL -> reason of the last few."""
    _scored: Summary = PrivateAttr(default_factory=Summary)
    _served: Means = PrivateAttr(default_factory=Means)
    _logged_at: float = PrivateAttr(default_factory=time.monotonic)

    def look(self, waiting: int, oldest: datetime | None) -> None:
        """Note what a look into the inbox found; what is passed over is counted anew."""
        self.waiting, self.oldest_waiting = waiting, oldest
        self.passed_over, self.last_passed_over = 0, {}

    def pass_over(self, shards: Mapping[str, str]) -> None:
        """Count shards, URL -> reason, that are passed over since the last look."""
        self.passed_over += len(shards)
        self.last_passed_over = _last({**self.last_passed_over, **shards})

    def tell_looked(self) -> None:
        """Tell whoever listens what the last look into the inbox found."""
        under_way = progress.current()
        under_way.expect(under_way.done + self.waiting)
        progress.happened(Looked(self.model, self.head, self.waiting, self.oldest_waiting, self.passed_over, self.owed))

    def tell_committed(self, version: Manifest, owed: int, champion: Alias | None) -> None:
        """Tell of a version that was committed, once what it is done with is disposed of; name each shard that it rejected."""
        self.owed = owed
        for shard in version.rejected[:NAMED]:
            reason = shard.reason.removeprefix(f"{shard.key}: ")
            logger.warning("%s", on_one_line(f"{shard.inbox}/{shard.key} is rejected, to quarantine: {reason}"))
        if (more := len(version.rejected) - NAMED) > 0:
            logger.warning("%d more shards are rejected by version %d (see tidemill requeue)", more, version.version)
        progress.happened(Committed(version, None if champion is None else champion.version, owed))

    def tell_alive(self) -> None:
        """Now and then, log that the run is alive, and what waits."""
        if time.monotonic() - self._logged_at < ALIVE_SECONDS:
            return
        self._logged_at = time.monotonic()
        waits = "nothing waits"
        if self.oldest_waiting is not None:
            waits = f"{self.waiting:,} waiting, the oldest since {self.oldest_waiting.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        passed_over = f", {self.passed_over:,} passed over" if self.passed_over else ""
        owed = f", {self.owed:,} consumed but not removed" if self.owed else ""
        logger.info("alive: head of %s is version %d; %s%s%s", self.model, self.head, waits, passed_over, owed)

    def _repr_html_(self) -> str:
        from tidemill.tasks.history.notebook import online_end

        names = ("versions", "shards", "rows", "promoted", "refused", "rejected", "waiting")
        return online_end(self.model, self.head, {n: getattr(self, n) for n in names}, self.score, self.champion)

    def add(self, version: Manifest) -> None:
        """Count one committed version."""
        self.versions += 1
        self._logged_at = time.monotonic()
        self.first_version = version.version if self.first_version is None else self.first_version
        self._scored.add(version.consumed)
        self.score, self.champion = self._scored.score.mean, self._scored.champion.mean
        add_served(self._served, version.consumed)
        self.served = self._served.mean
        recent = Summary.model_validate(version.metrics["recent"])
        self.recent, self.recent_champion = recent.score.mean, recent.champion.mean
        for shard in version.consumed:
            self.shards, self.rows = self.shards + 1, self.rows + shard.rows
            self.unlabelled += shard.unlabelled
        self.unmatched += sum(labels.unmatched for labels in version.done_labels or ())
        if version.gate is not None:
            self.promoted += version.gate.decision == "promoted"
            self.refused += version.gate.decision == "refused"
        self.rejected += len(version.rejected)
        self.last_rejected = _last(self.last_rejected | {shard.key: shard.reason for shard in version.rejected})


def _last(named: Mapping[str, str]) -> dict[str, str]:
    return dict(list(named.items())[-NAMED:])

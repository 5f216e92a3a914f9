"""When a run trains on what waits in the inbox: at once, or when there is enough of it, or when the model does worse on it.

When is all that is decided here. Which shards, in which order and with which random numbers is not, so that no trigger can
change the bits of a version.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Final, Literal, Protocol, TypeVar

from tidemill.storage.errors import ShardRejected
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.settings import Triggers
from tidemill.tasks.training.errors import ColumnError, SpecError

T = TypeVar("T")

Reason = Literal[
    "at_once", "min_rows", "min_bytes", "max_wait_seconds", "drift", "score_drop", "no_history", "unreadable", "backlog"
]
"""What fired. `at_once`: no trigger is set. `no_history`: score_drop has nothing to compare with before a first shard was
trained on. `unreadable`: a shard can never be used, and only a step can reject it. `backlog`: more waits than a run looks at
together. The others are triggers of that name."""

CLIP: Final = 4.0
"""Errors are clipped to this many standard deviations from the usual: one broken shard alone is no drift."""
NEGLIGIBLE: Final = 1e-6
"""The least noise that is reckoned with, as a share of the error: changes of a lower order are rounding."""


@dataclass(frozen=True)
class Judged:
    """How the model did on one shard before it trained on it."""

    rows: int
    """Rows with a label."""
    error: float
    """What the gate compares: in the target's own unit for regression, else the mean loss."""


class Trigger:
    """The triggers on top of one version, with what was found out about the shards that wait for the next.

    It decides from the history and the waiting shards alone and keeps nothing else, so that a new process decides as the old
    one would have. A new version needs a new `Trigger`: the model scores differently.
    """

    def __init__(self, settings: Triggers, past: Sequence[Judged]) -> None:
        """`past` is the history of the version, oldest first; the last `settings.recent_shards` shards of it are used.

        Raises:
            SpecError: `drift` is set and River is not installed.
        """
        self._settings = settings
        self._past = [seen for seen in past if _is_usable(seen)][-settings.recent_shards :]
        self._detector = None if settings.drift is None else _detectors(settings.drift)
        self._rows: dict[tuple[str, str], int] = {}
        self._scores: dict[tuple[str, str], Judged] = {}

    def fired(
        self,
        waiting: Sequence[ObjectInfo],
        rows: Callable[[ObjectInfo], int | None],
        error: Callable[[ObjectInfo], Judged | None],
        now: datetime,
    ) -> list[Reason]:
        """Why to train now on what waits, given in the order of training; empty: not yet.

        `rows` tells how many rows a shard has, and `error` how the model does on it. They are asked as late as possible: not
        before cheaper triggers have said no, and once for each (key, etag). None means that the shard has gone or is not
        whole yet: it does not count now, and is asked for again. ShardRejected or ColumnError means that it can never be
        used: that fires, because a step must reject it.
        """
        if not waiting:
            return []
        if not self._settings.given:
            return ["at_once"]
        present = {(info.key, info.etag) for info in waiting}
        self._rows = {key: found for key, found in self._rows.items() if key in present}
        self._scores = {key: found for key, found in self._scores.items() if key in present}
        try:
            return (
                self._by_listing(waiting, now)
                or self._by_rows(_each(waiting, rows, self._rows))
                or self._by_score(_each(waiting, error, self._scores))
            )
        except (ShardRejected, ColumnError):
            return ["unreadable"]

    def _by_listing(self, waiting: Sequence[ObjectInfo], now: datetime) -> list[Reason]:
        settings, reasons = self._settings, list[Reason]()
        if settings.min_bytes is not None and sum(info.size for info in waiting) >= settings.min_bytes:
            reasons.append("min_bytes")
        # A store whose clock is ahead makes this negative, which is below any max_wait_seconds.
        age = (now - min(info.last_modified for info in waiting)).total_seconds()
        if settings.max_wait_seconds is not None and age >= settings.max_wait_seconds:
            reasons.append("max_wait_seconds")
        return reasons

    def _by_rows(self, rows: Iterator[int]) -> list[Reason]:
        if self._settings.min_rows is None:
            return []
        total = 0
        for count in rows:
            total += count
            if total >= self._settings.min_rows:  # the other footers need not be read
                return ["min_rows"]
        return []

    def _by_score(self, scores: Iterator[Judged]) -> list[Reason]:
        settings, reasons = self._settings, list[Reason]()
        if not settings.by_score:
            return reasons
        waiting = [seen for seen in scores if seen.rows]
        infinite = not all(_is_usable(seen) for seen in waiting)  # worse than anything that could be compared
        if self._detector is not None and waiting:
            errors = [seen.error for seen in (*self._past, *waiting)]
            if infinite or _rises(self._detector(), errors, since=len(self._past)):
                reasons.append("drift")
        if settings.score_drop is not None and waiting:
            if not self._past:
                reasons.append("no_history")
            elif infinite or _mean_error(waiting) > (usual := _mean_error(self._past)) + settings.score_drop * abs(
                usual
            ):
                reasons.append("score_drop")
        return reasons


def _each(
    waiting: Sequence[ObjectInfo], ask: Callable[[ObjectInfo], T | None], known: dict[tuple[str, str], T]
) -> Iterator[T]:
    """What is known of each shard, asked for where it is not known yet."""
    for info in waiting:
        identity = (info.key, info.etag)
        if identity not in known:
            if (found := ask(info)) is None:
                continue
            known[identity] = found
        yield known[identity]


def _is_usable(seen: Judged) -> bool:
    return seen.rows > 0 and math.isfinite(seen.error)


def _mean_error(shards: Sequence[Judged]) -> float:
    """Mean over the rows of all of them."""
    return math.fsum(seen.error * seen.rows for seen in shards) / sum(seen.rows for seen in shards)


# ---- drift -----------------------------------------------------------------------------------------------------------
class _Detector(Protocol):
    """What we need of River's detectors."""

    @property
    def drift_detected(self) -> bool: ...

    def update(self, x: float) -> object: ...


def _detectors(name: Literal["adwin", "page_hinkley"]) -> Callable[[], _Detector]:
    """Makes detectors for the means of a few dozen shards, in units of their noise (`_in_units_of_noise`).

    ADWIN (Bifet and Gavalda, "Learning from Time-Changing Data with Adaptive Windowing", SDM 2007) cuts its window where the
    means of two parts differ by more than chance. River looks for a cut at each 32nd value, which may be a day of shards;
    here at each one (clock 1), and from parts of 3 values on. The bound is proven for values in [0, 1]. Ours have a deviation
    of 1 instead, and `delta` is no proven rate of false alarms: what it gives was measured, see below.

    Page-Hinkley (Page, "Continuous Inspection Schemes", Biometrika 41, 1954) adds up how far values lie above their mean, less
    a tolerance: delta 0.5, half of the smallest rise that matters. At the threshold 12 false alarms are rare even though mean
    and noise are estimated from dozens of values. It forgets nothing (alpha 1): the window of history does.

    Measured with 64 shards of history, looking at each new shard, the others consumed by eights (ADWIN / Page-Hinkley):
    a rise by 2 standard deviations of the shards' noise is found after 10 / 9 shards (median), by 3 after 7 / 6. False alarms
    in 60 streams of 500 shards: none / none with normal noise, in 1 / 8 of them with exponential noise.

    Raises:
        SpecError: River is not installed.
    """
    try:
        from river.drift import ADWIN, PageHinkley  # takes a second: not for those who do not ask for it
    except ImportError as error:
        raise SpecError(
            f"drift={name!r} needs River ({error}): install 'tidemill[drift]', or set another trigger"
        ) from error
    if name == "adwin":
        return partial(ADWIN, delta=0.05, clock=1, min_window_length=3)
    return partial(PageHinkley, min_instances=10, delta=0.5, threshold=12.0, alpha=1.0, mode="up")


def _rises(detector: _Detector, errors: Sequence[float], since: int) -> bool:
    """True if the detector, given all the finite errors, finds at the one numbered `since` or later that they have risen.

    ADWIN finds a fall too: that is the model having learned, and no reason to train. After each change that they find, River's
    detectors begin anew, and need some ten values before the next.
    """
    for i, error in enumerate(_in_units_of_noise(errors)):
        before = getattr(detector, "estimation", None)  # the mean in ADWIN's window
        detector.update(error)
        if detector.drift_detected and i >= since and (before is None or getattr(detector, "estimation", 0.0) > before):
            return True
    return False


def _in_units_of_noise(errors: Sequence[float]) -> list[float]:
    """Errors as standard deviations from their median, clipped: the detectors know no scale, and an error may have any.

    The noise is estimated from neighbours, s = median |x[i+1] - x[i]| / (sqrt(2) * 0.6745) for normal noise, which neither a
    jump nor a slow trend inflates as they would a standard deviation (von Neumann, "Distribution of the Ratio of the Mean
    Square Successive Difference to the Variance", 1941; the median in place of the mean is Hampel's).
    """
    if len(errors) < 2:
        return [0.0] * len(errors)
    centre = statistics.median(errors)
    noise = statistics.median(abs(b - a) for a, b in pairwise(errors)) / (math.sqrt(2) * 0.6745)
    noise = max(noise, NEGLIGIBLE * abs(centre), math.ulp(0.0))  # of equal errors it would be 0
    return [max(-CLIP, min(CLIP, (error - centre) / noise)) for error in errors]

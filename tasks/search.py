"""How long to train, found on held-out rows: what `epochs: auto` does.

A search trains a learner without the held-out rows, and scores it on them after 1, 2, 3, 4, 6, 8, 11, ... epochs (times the
root of 2, and not before 25 gradient steps). It stops once two scores in a row brought no new best: after about twice as many
epochs. Of small data two searches with other held-out rows are made, and their scores added up, for one is mostly luck. Then a
new learner is trained on all rows for as many epochs as were best. Of large data, where all rows are hardly more than the
searched ones, the search's own learner at its best is taken.

Everything follows from the rows and the spec, nothing from a clock, so that a run that was killed goes on to the same bits from
whatever checkpoint there is.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tidemill.progress import under_way
from tidemill.tasks.ranks.passes import ReadByAll, train_pass
from tidemill.tasks.scores import Means
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import Both, Marked, RowGroup, Split, Subset, generator
from tidemill.tasks.training.kept import Kept
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import Score, score
from tidemill.tasks.training.midway import Keeper, Midway
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

logger = logging.getLogger("tidemill.batch")

TWO_BELOW: Final = 2_000
"""Rows below which two searches are made."""
REFIT_BELOW: Final = 20_000
"""Rows below which a learner is trained on all of them in the end."""
SMALL_SHARE: Final = 0.15
"""Of the rows, held out where all are trained on in the end."""
LARGE_SHARE: Final = 0.1
LARGE_ROWS: Final = 20_000
"""Held out of large data: the share, and at most about so many."""
PATIENCE: Final = 2
"""Scores in a row without a new best after which a search ends."""
FIRST_STEPS: Final = 25
MOST_EPOCHS: Final = 100
LEAST_STEPS: Final = 1_600
"""A search may take at least so many gradient steps, however many epochs these are."""
MOST_STEPS: Final = 25_600
"""A search takes at most so many, or one epoch."""
CHECKPOINT_SECONDS: Final = 5.0
"""A checkpoint is stored this long after the last one at the earliest; a kill costs so much training."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Point(_Record):
    """A score on the held-out rows."""

    epochs: int
    rows: int
    loss: float
    """Of the training loss the mean; the largest float for one that is not finite."""
    score: dict[str, float]
    """Loss and metrics, as far as they are finite."""


class Progress(_Record):
    """Where a search stands. Checkpoints hold it, beside the learner of its phase."""

    points: tuple[tuple[Point, ...], ...] = ((),)
    """Of each search that has begun."""
    refit: bool = False
    """The searches are over: all rows are trained on."""


@dataclass(frozen=True)
class Plan:
    """What a search is going to do. It follows from the number of rows."""

    searches: int
    share: float
    """Of the rows, that each search holds out."""
    refit: bool
    """Whether all rows are trained on in the end."""
    points: tuple[int, ...]
    """Epochs after which a search is scored, if it comes so far."""

    @classmethod
    def of(cls, rows: int, batch_size: int) -> Self:
        """For so many labelled rows."""
        refit = rows < REFIT_BELOW
        share = SMALL_SHARE if refit else min(LARGE_SHARE, LARGE_ROWS / rows)
        steps = max(1, math.ceil(rows * (1 - share) / batch_size))  # of an epoch
        last = max(1, min(max(MOST_EPOCHS * steps, LEAST_STEPS), MOST_STEPS) // steps)
        first = max(1.0, FIRST_STEPS / steps)
        found = [round(first * 2 ** (i / 2)) for i in range(1 + int(2 * math.log2(max(1.0, last / first))))]
        return cls(2 if rows < TWO_BELOW else 1, share, refit, tuple(sorted({min(point, last) for point in found})))


def best_of(losses: Sequence[float], patience: int) -> int:
    """Index of the lowest loss before the first `patience` in a row that are no new best."""
    best = 0
    for at, loss in enumerate(losses):
        if loss < losses[best]:
            best = at
        elif at - best >= patience:
            break
    return best


def hold_out(
    groups: Sequence[RowGroup], features: Features, split: Subset | None, plan: Plan, seed: int
) -> list[tuple[Subset, Subset]]:
    """(rows to train on, rows held out) of each search. Of small data in proportion: as many of each class, or low and high.

    Of small data the targets are read once; of large data a hash decides, as in `Split`. Two searches hold out other rows.
    """
    if not plan.refit:
        sides = [Split(plan.share, side, draw=f"search {seed}") for side in ("train", "holdout")]
        train, holdout = sides if split is None else [Both(split, side) for side in sides]
        return [(train, holdout)]
    open_rows: dict[str, Tensor] = {}  # bool [N] of each row group: on our side of the split, with all targets
    targets: list[Tensor] = []
    some = [group for group in groups if group.num_rows]
    with closing(features.target_tables(some)) as tables:
        for group, table in zip(some, tables, strict=True):
            y_N, labelled_N = features.target(table, group.name)
            rows_N = torch.ones(group.num_rows, dtype=torch.bool) if split is None else split.rows(group)
            rows_N = rows_N if labelled_N is None else rows_N & labelled_N
            open_rows[group.name] = rows_N
            targets.append((y_N if y_N.ndim == 1 else y_N[:, 0])[rows_N].double())
    y_N = torch.cat(targets)
    order_N = torch.randperm(len(y_N), generator=generator(seed, "search"))
    order_N = order_N[y_N[order_N].argsort(stable=True)]
    count = max(1, round(plan.share * len(y_N)))
    found: list[tuple[Subset, Subset]] = []
    for number in range(plan.searches):
        places = (torch.arange(count, dtype=torch.float64) + (number + 0.5) / plan.searches) * (len(y_N) / count)
        held_N = torch.zeros(len(y_N), dtype=torch.bool)
        held_N[order_N[places.long().clamp(max=len(y_N) - 1)]] = True
        train_rows: dict[str, Tensor] = {}
        held_rows: dict[str, Tensor] = {}
        at = 0
        for name, rows_N in open_rows.items():
            of_group = held_N[at : at + int(rows_N.sum())]
            at += len(of_group)
            held_rows[name] = torch.zeros_like(rows_N).masked_scatter_(rows_N, of_group)
            train_rows[name] = rows_N & ~held_rows[name]
        found.append((Marked(train_rows), Marked(held_rows)))
    return found


@dataclass
class Data:
    """The rows of a phase: kept if they fit the shuffle window, else read anew in every epoch."""

    train: Sequence[RowGroup] | Kept
    train_rows: Subset | None
    labelled: int
    holdout: Sequence[RowGroup] | Kept = ()
    holdout_rows: Subset | None = None


class Search:
    """A search on its way: which phase it is in, and what it has found."""

    def __init__(
        self,
        groups: Sequence[RowGroup],
        split: Subset | None,
        spec: Spec,
        features: Features,
        progress: Progress | None = None,
        read_by_all: ReadByAll | None = None,
    ) -> None:
        """`progress` is that of a checkpoint; `read_by_all` is for ranks."""
        assert features.statistics is not None, "rows are counted before"
        self._groups, self._split, self._spec, self._features = groups, split, spec, features
        self._read_by_all = read_by_all
        self.plan = Plan.of(features.statistics.labelled or features.statistics.rows, spec.batch_size)
        self.progress = progress or Progress()
        self._sides: list[tuple[Subset, Subset]] | None = None
        self._data: tuple[object, Data] | None = None

    # ---- where it stands ---------------------------------------------------------------------------------------------
    @property
    def best(self) -> int:
        """Which of the plan's points was best so far, in the sum over the searches."""
        losses = [[point.loss for point in points] for points in self.progress.points]
        return best_of([sum(all_) for all_ in zip(*losses, strict=False)], PATIENCE)  # as far as all have come

    def is_best(self, epochs: int) -> bool:
        """Whether no score was better than the one after so many epochs, which is the last one."""
        return self.best_epochs == epochs

    @property
    def best_epochs(self) -> int:
        """Epochs to train for."""
        return self.plan.points[self.best]

    def done(self, epochs: int) -> int:
        """How many stretches are trained, in all phases, if the learner of this one has been trained for `epochs`."""
        refit = sum(point <= epochs for point in self.plan.points[: self.best + 1]) if self.progress.refit else 0
        return sum(map(len, self.progress.points)) + refit

    def scores_after(self, epochs: int) -> bool:
        """Whether the learner of this phase is scored once it has been trained for so many epochs."""
        return not self.progress.refit and epochs in self.plan.points

    def ended(self, epochs: int) -> bool:
        """Whether nothing is left to train."""
        if self.plan.refit:
            return self.progress.refit and epochs >= self.best_epochs
        return self._is_over(self.progress.points[-1])

    def epochs_before(self) -> int:
        """Of the phases before this one, all together."""
        earlier = self.progress.points if self.progress.refit else self.progress.points[:-1]
        return sum(points[-1].epochs for points in earlier)

    @property
    def result(self) -> Score:
        """Of the best epochs: the mean over the searches, weighted by rows."""
        means, rows = Means(), 0
        for points in self.progress.points:
            point = points[self.best]
            means.add(point.score, point.rows)
            rows += point.rows
        metrics = dict(means.mean)
        return Score(rows, metrics.pop("loss", math.nan), metrics)

    def holdout(self) -> Subset:
        """All rows that were held out by one search or another."""
        held = [holdout for _, holdout in self._all_sides()]
        return held[0] if len(held) == 1 else _Either(*held)

    def facts(self) -> dict[str, object]:
        """What a manifest says of it: scores by epochs, of each search, and which epochs were best."""
        longest = max(map(len, self.progress.points))
        return {
            "epochs": list(self.plan.points[:longest]),
            "holdout_loss": [[point.loss for point in points] for points in self.progress.points],
            "best_epochs": self.best_epochs,
            "all_rows": self.plan.refit,
        }

    # ---- training ----------------------------------------------------------------------------------------------------
    def advance(
        self,
        learner: Learner,
        steps: Steps,
        epoch_done: Callable[[float], None],
        start: Midway | None = None,
        keeper: Keeper | None = None,
    ) -> bool:
        """Train up to the next point, and score there unless all rows are trained on. True: a new learner is to go on.

        `epoch_done` is told the loss of each epoch. `start` and `keeper`: as of `train_pass`. Raises what that raises.
        """
        began, data = learner.counters.epochs, self.data()
        until = next(point for point in self.plan.points if point > began)
        phase = "all" if self.progress.refit else len(self.progress.points) - 1
        what = (
            f"all rows, to epoch {until} of {self.best_epochs}" if self.progress.refit else f"search, to epoch {until}"
        )
        with under_way(what, total=(until - began) * data.labelled) as activity:
            while learner.counters.epochs < until:
                epoch = learner.counters.epochs
                result = train_pass(
                    self._read_by_all,
                    steps,
                    data.train,
                    key=("search", phase, epoch),
                    split=data.train_rows,
                    remember=epoch == 0 and (self.progress.refit or not self.plan.refit),
                    labelled=data.labelled,
                    activity=activity,
                    start=start,
                    keeper=keeper,
                    search=self.progress.model_dump(mode="json"),
                )
                start = None
                learner.counters.epochs = epoch + 1
                epoch_done(result.loss)
        if self.progress.refit:
            logger.info("all rows: epoch %d of %d: loss %.6g", until, self.best_epochs, result.loss)
            return False
        found = score(learner, data.holdout, data.holdout_rows)
        loss = found.loss if math.isfinite(found.loss) else sys.float_info.max / len(self.progress.points)
        point = Point(epochs=until, rows=found.rows, loss=loss, score=found.finite)
        *earlier, current = self.progress.points
        current = (*current, point)
        logger.info(
            "search %d of %d: epoch %d: loss %.6g, on held-out rows %.6g",
            *(len(self.progress.points), self.plan.searches, until, result.loss, found.loss),
        )
        self.progress = Progress(points=(*earlier, current))
        if not self._is_over(current) or not self.plan.refit:
            return False
        if len(self.progress.points) < self.plan.searches:
            self.progress = Progress(points=(*self.progress.points, ()))
        else:
            self.progress = Progress(points=self.progress.points, refit=True)
            logger.info("%d epochs were best; now on all rows", self.best_epochs)
        return True

    def _is_over(self, points: Sequence[Point]) -> bool:
        """Whether the search that has these scores has come to its end."""
        patience = PATIENCE + (self.plan.searches > 1)  # one more: the sum may be best where one of them is not
        losses = [point.loss for point in points]
        waited = len(losses) - 1 - best_of(losses, patience) if losses else 0
        return waited >= patience or len(losses) == len(self.plan.points)

    def _all_sides(self) -> list[tuple[Subset, Subset]]:
        if self._sides is None:
            self._sides = hold_out(self._groups, self._features, self._split, self.plan, self._spec.seed)
        return self._sides

    def data(self) -> Data:
        """The rows of this phase, made once."""
        phase = self.progress.refit, len(self.progress.points)
        if self._data is None or self._data[0] != phase:
            train, holdout = (self._split, None) if self.progress.refit else self._all_sides()[phase[1] - 1]
            self._data = phase, self._made(train, holdout)
        return self._data[1]

    def _made(self, train: Subset | None, holdout: Subset | None) -> Data:
        groups, features, window = self._groups, self._features, self._spec.window_bytes
        if sum(group.num_rows for group in groups) * features.row_bytes > window:
            return Data(groups, train, features.labelled_rows(groups, train), groups, holdout)
        kept = Kept(groups, features, window, train)
        held = () if holdout is None else Kept(groups, features, window, holdout)
        return Data(kept, None, kept.rows, held, None)


@dataclass(frozen=True)
class _Either:
    """The rows that are among the one or among the other."""

    one: Subset
    other: Subset

    def rows(self, group: RowGroup) -> Tensor:
        return self.one.rows(group) | self.other.rows(group)


class Clock:
    """When the next checkpoint is due."""

    def __init__(self, seconds: float = CHECKPOINT_SECONDS) -> None:
        self.seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether it is time; if so, it is counted from here again."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True

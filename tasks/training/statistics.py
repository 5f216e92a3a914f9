"""What is learned of the columns to scale them: how it is made, follows the shards, and is told from what nobody learned.

Shape legend: F numbers of one row, T targets, K numbers of either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.moments import Moments

WIDENING: Final = 1e3
"""Rows that would make a column's running standard deviation so many times as large are refused: once in the statistics, they
would be believed for ever."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `Features.fit` learned, and `followed` after it. Standard deviations are of the population; a constant column's is 1.

    Each row counts once, whatever its sample weight.
    """

    rows: int
    nulls: tuple[int, ...]  # of each input column
    mean_F: Tensor  # float64, over the values that are not null
    std_F: Tensor  # float64
    target_mean: Tensor  # float64 [T], over the values that are not null
    target_std: Tensor  # float64 [T]
    class_counts: Tensor | None  # int64 [classes]: labelled rows of each; None: class weights are not learned
    moments: tuple[Moments, Moments] | None = None  # of the F numbers and the T targets; None: they stay as they are

    @classmethod
    def of(
        cls,
        rows: int,
        nulls: Sequence[int],
        inputs: Moments,
        targets: Moments,
        class_counts: Tensor | None,
        *,
        running: bool,
    ) -> Self:
        """Of so many rows with these moments; only with `running` more can be added."""
        return cls(
            rows=rows,
            nulls=tuple(nulls),
            mean_F=inputs.mean_K,
            std_F=inputs.std_K,
            target_mean=targets.mean_K,
            target_std=targets.std_K,
            class_counts=class_counts,
            moments=(inputs, targets) if running else None,
        )

    def with_rows(
        self, rows: int, nulls: Sequence[int], inputs: Moments, targets: Moments, names: Sequence[str]
    ) -> Self:
        """Of these rows too; class counts stay. `names` are those of the F numbers and the T targets.

        Raises ColumnError: values so far out that the standard deviation would be of them alone (`WIDENING`).
        """
        assert self.moments is not None, "running statistics were asked for"
        old = Moments.of_columns(self.moments)
        new = old.joined(Moments.of_columns((inputs, targets)))
        wide_K = ~torch.isfinite(new.m2_K) | ((old.m2_K > 0) & (new.std_K > WIDENING * old.std_K))
        if wide_K.any():
            at = int(wide_K.nonzero()[0])
            raise ColumnError(
                f"column {names[at]!r} has values so far out that its standard deviation over all rows seen would rise from "
                f"{old.std_K[at]:g} to {new.std_K[at]:g}: mend them, or write nulls"
            )
        all_nulls = [before + more for before, more in zip(self.nulls, nulls, strict=True)]
        inputs, targets = self.moments[0].joined(inputs), self.moments[1].joined(targets)
        return self.of(self.rows + rows, all_nulls, inputs, targets, self.class_counts, running=True)

    def check(self, columns: int, numbers: int, targets: int) -> None:
        """Raises ValueError if no dataset of so many columns, numbers and targets has these statistics."""
        lowest, smallest = torch.finfo(torch.float64).min, torch.finfo(torch.float64).tiny
        inputs = self.mean_F.shape == self.std_F.shape == (numbers,)
        outputs = self.target_mean.shape == self.target_std.shape == (targets,)
        sound = inputs and outputs and len(self.nulls) == columns
        sound = sound and _are_numbers(torch.cat([self.mean_F, self.target_mean]), lowest)
        sound = sound and _are_numbers(torch.cat([self.std_F, self.target_std]), smallest)
        for moments in self.moments or ():
            shape = moments.mean_K.shape
            sound = sound and moments.count_K.dtype == torch.int64 and bool((moments.count_K > 0).all())
            sound = sound and moments.count_K.shape == moments.m2_K.shape == shape and _are_numbers(moments.m2_K, 0.0)
        if not sound:
            raise ValueError("statistics of the columns that no dataset has")


def _are_numbers(values: Tensor, least: float) -> bool:
    return values.dtype == torch.float64 and bool(torch.isfinite(values).all() and (values >= least).all())

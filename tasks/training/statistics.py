"""What is learned of the columns to scale them: how it is counted, updated by the shards, and checked when it is read back.

Shape legend: N rows, B rows of a block, F numbers of one row, T targets, K numbers of one column, or of F or T.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.columns import as_tensor
from tidemill.tasks.training.errors import ColumnError

BLOCK_NUMBERS: Final = 24_576
"""float64s in flight. Small enough for the cache; and below 32,768 torch uses one thread, so that the bits of the statistics
do not depend on the number of threads. Larger buffers also fragment the heap: before version 2.38 glibc does not reuse the
memory of aligned blocks well."""

WIDENING: Final = 1e3
"""Rows that would multiply a column's running standard deviation by more than this are refused. Once in the statistics,
they would stay there."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations (M2) of each of the K numbers of a column."""

    count_K: Tensor  # int64
    mean_K: Tensor  # float64
    m2_K: Tensor  # float64

    @classmethod
    def zero(cls, k: int) -> Self:
        """Moments of no values."""
        return cls(torch.zeros(k, dtype=torch.int64), *torch.zeros(2, k, dtype=torch.float64).unbind())

    @classmethod
    def of_columns(cls, columns: Sequence[Self]) -> Self:
        """Moments of neighbouring columns as those of one."""
        return cls(
            *(torch.cat([getattr(column, name) for column in columns]) for name in ("count_K", "mean_K", "m2_K"))
        )

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Self:
        """Moments of one column in which the number i occurs `counts[i]` times."""
        count_V = torch.tensor(counts, dtype=torch.float64)
        value_V = torch.arange(len(counts), dtype=torch.float64)
        mean = (count_V * value_V).sum() / count_V.sum().clamp(min=1)
        m2 = (count_V * (value_V - mean).square()).sum()
        return cls(count_V.sum().long().view(1), mean.view(1), m2.view(1))

    @property
    def std_K(self) -> Tensor:
        """float64 [K]: population standard deviation; 1 where the column is constant."""
        std_K = (self.m2_K / self.count_K).sqrt()
        return torch.where(self.m2_K > 0, std_K, 1.0)

    def merged(self, array: pa.Array[Any], width: int | None, rows_N: Tensor | None) -> Self:
        """Moments of all values so far and those of `array`, or of its `rows_N` (int64 row numbers).

        Exact two-pass moments of each block are joined by the parallel rule of Chan, Golub and LeVeque (1979),
        https://doi.org/10.1007/978-3-642-51461-6_3, so no large sums cancel. NaN and infinity make the mean NaN
        or infinite.
        """
        values_NK, present_NK = as_tensor(array, width)
        if rows_N is not None:
            values_NK = values_NK.index_select(0, rows_N)
            present_NK = None if present_NK is None else present_NK.index_select(0, rows_N)
        block = max(1, BLOCK_NUMBERS // values_NK.shape[1])
        total = self
        for at in range(0, len(values_NK), block):
            present_BK = None if present_NK is None else present_NK[at : at + block]
            total = total.joined(self._of(values_NK[at : at + block].to(torch.float64, copy=True), present_BK))
        return total

    @classmethod
    def _of(cls, values_NK: Tensor, present_NK: Tensor | None) -> Self:
        """Moments of one block; values_NK is overwritten."""
        # Deviations are taken from the first value, so that a constant column is found to be exactly constant.
        if present_NK is None:
            count_K = torch.full(values_NK.shape[1:], len(values_NK))
            first_K = values_NK[0].clone()
        else:
            count_K = present_NK.sum(0)
            first_K = values_NK.gather(0, present_NK.byte().argmax(0, keepdim=True)).squeeze(0)
        deviations_NK = values_NK.sub_(first_K)
        if present_NK is not None:
            deviations_NK.masked_fill_(~present_NK, 0.0)
        shift_K = deviations_NK.sum(0) / count_K.clamp(min=1)
        deviations_NK.sub_(shift_K)
        if present_NK is not None:
            deviations_NK.masked_fill_(~present_NK, 0.0)
        return cls(count_K, first_K + shift_K, deviations_NK.square_().sum(0))

    def joined(self, other: Self) -> Self:
        """Moments of the values of both."""
        count_K = self.count_K + other.count_K
        share_K = other.count_K.double() / count_K.clamp(min=1)  # int64 / int64 would be float32
        delta_K = other.mean_K - self.mean_K
        mean_K = self.mean_K + delta_K * share_K
        m2_K = self.m2_K + other.m2_K + delta_K.square() * self.count_K * share_K
        return type(self)(count_K, mean_K, m2_K)


def range_of(array: pa.Array[Any], rows_N: Tensor | None) -> Tensor:
    """float64 [2]: the lowest and the highest value of a plain column, or of its `rows_N`; infinity and -infinity of none."""
    values_NK, present_NK = as_tensor(array, None)
    values_N = values_NK.squeeze(1)
    if rows_N is not None:
        values_N = values_N.index_select(0, rows_N)
        present_NK = None if present_NK is None else present_NK.index_select(0, rows_N)
    if present_NK is not None:
        values_N = values_N[present_NK.squeeze(1)]
    if not len(values_N):
        return torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
    return torch.stack(values_N.aminmax()).double()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `Features.fit` learned, and `updated` after it. Standard deviations are of the population; a constant column's is 1.

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
    labelled: int | None = None
    """Rows of the dataset, of its training side, that have all targets. None: the state is older than this field."""
    target_range: Tensor | None = None
    """float64 [2, T]: the lowest and the highest target that was trained on; None: predictions have no limits."""

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
        labelled: int | None,
    ) -> Self:
        """Statistics of `rows` rows with these moments. More rows can be added only with `running`."""
        return cls(
            rows=rows,
            nulls=tuple(nulls),
            mean_F=inputs.mean_K,
            std_F=inputs.std_K,
            target_mean=targets.mean_K,
            target_std=targets.std_K,
            class_counts=class_counts,
            moments=(inputs, targets) if running else None,
            labelled=labelled,
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
        found = self.of(
            self.rows + rows, all_nulls, inputs, targets, self.class_counts, running=True, labelled=self.labelled
        )
        return replace(found, target_range=self.target_range)

    def check(self, columns: int, numbers: int, targets: int) -> None:
        """Raises ValueError if no dataset with these numbers of columns and targets can have these statistics."""
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
        if (limits := self.target_range) is not None:
            sound = (
                sound
                and limits.shape == (2, targets)
                and _are_numbers(limits, lowest)
                and bool((limits[0] <= limits[1]).all())
            )
        if not sound:
            raise ValueError("statistics of the columns that no dataset has")


def _are_numbers(values: Tensor, least: float) -> bool:
    return values.dtype == torch.float64 and bool(torch.isfinite(values).all() and (values >= least).all())

"""Mean and standard deviation of columns of any length, in one pass.

Shape legend: N rows, K numbers of one column.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.columns import as_tensor

BLOCK_NUMBERS: Final = 24_576
"""float64s in flight. Small enough for the cache; and below 32,768 torch uses one thread, so that the bits of the statistics
do not depend on the number of threads. Larger buffers also fragment the heap: before version 2.38 glibc does not reuse the
memory of aligned blocks well."""


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

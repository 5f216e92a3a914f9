"""Where rows come from, and which of them are held out.

Shape legend: N rows of one row group.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor


class RowGroup(Protocol):
    """A piece of a table that is read whole: a Parquet row group.

    `read` is called from one background thread at a time.
    """

    @property
    def name(self) -> str:
        """Names the group in messages and seeds its split: the same data must always get the same name."""
        ...

    @property
    def num_rows(self) -> int: ...

    @property
    def schema(self) -> pa.Schema:
        """Schema of the whole file, not only of the columns that are read."""
        ...

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Exactly these columns, `num_rows` rows, in file order."""
        ...


def stable_seed(*key: str | int) -> int:
    """A 63-bit seed that depends on the key only, never on the process: Python's own `hash` is salted."""
    return int.from_bytes(blake2b(json.dumps(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded with `stable_seed(*key)`."""
    return torch.Generator().manual_seed(stable_seed(*key))


@dataclass(frozen=True)
class Split:
    """One side of a row-level split that depends only on the names of the row groups.

    Neither the spec's seed nor the epoch enters, so a held-out row is never trained on, whatever else is changed.
    """

    fraction: float  # of the rows, in (0, 1), is held out
    held_out: bool  # True: the held-out rows; False: the rest

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}: choose a share of the rows between 0 and 1")

    def rows(self, group: RowGroup) -> Tensor:
        """bool [N]: which rows of the group are on this side."""
        held_out_N = torch.rand(group.num_rows, generator=generator("split", group.name)) < self.fraction
        return held_out_N if self.held_out else ~held_out_N

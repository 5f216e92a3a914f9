"""What one measurement is about, the same for every case."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import pyarrow.parquet as pq

Net = Literal["net", "mlp", "linear"]
NETS: Final[dict[Net, str]] = {
    "net": "the example Net: Linear(n, 20) -> Linear(20, 1)",
    "mlp": "an MLP n-256-256-1 with ReLU",
    "linear": "a linear model",
}
LEARNING_RATE: Final = 0.01


@dataclass(frozen=True)
class Work:
    """Shuffled float32 rows of a folder of Parquet files, in batches; in training a net, SGD and the mean squared error."""

    folder: str
    batch: int
    seconds: float  # about how long to measure
    threads: int  # of torch's operators
    scratch: str  # a folder for what a peer must write
    net: Net = "net"
    shuffle_bytes: int | None = None  # of Tidemill's shuffle; None: what it has by default

    @cached_property
    def files(self) -> list[str]:
        return sorted(map(str, Path(self.folder).glob("*.parquet")))

    @cached_property
    def rows(self) -> int:
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    @cached_property
    def group_rows(self) -> int:
        """Of the first row group; all are alike."""
        return pq.read_metadata(self.files[0]).row_group(0).num_rows

    @cached_property
    def features(self) -> list[str]:
        return [name for name in pq.read_schema(self.files[0]).names if name != "y"]

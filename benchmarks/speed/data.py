"""The datasets of the benchmarks: random float32 columns x0, x1, ... and y, a noisy linear function of them.

    .venv/bin/python -m benchmarks.speed data            # all that `make bench` reads: 1.1 GB
    .venv/bin/python -m benchmarks.speed data --small

A dataset is made once, from seeds, and is found again by its name.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS: Final = 131_072
FOLDER: Final = Path(__file__).parents[2] / "bench-data"


@dataclass(frozen=True)
class Dataset:
    """What lies in one folder of Parquet files."""

    name: str
    columns: int  # y included
    files: int
    groups: int  # row groups of a file
    group_rows: int = GROUP_ROWS

    @property
    def rows(self) -> int:
        return self.files * self.groups * self.group_rows


# The writer's default settings, as for data in the wild: dictionary pages that random floats overflow.
FULL: Final = (Dataset("narrow4m", columns=11, files=16, groups=2), Dataset("wide1m", columns=100, files=8, groups=1))
# Enough row groups for two shuffle windows of one group each, and no more.
SMALL: Final = (
    Dataset("narrow-small", columns=11, files=2, groups=2, group_rows=8192),
    Dataset("wide-small", columns=100, files=2, groups=1, group_rows=2048),
)


def dataset(width: str, *, small: bool) -> Dataset:
    """The `narrow` or the `wide` one."""
    return next(found for found in (SMALL if small else FULL) if found.name.startswith(width))


def made(wanted: Dataset, folder: Path = FOLDER) -> Path:
    """The folder of the dataset, which is written if it is not there."""
    place = folder / wanted.name
    if not place.exists():
        half = folder / f".{wanted.name}.{os.getpid()}"  # whole or not there at all, whoever is killed
        half.mkdir(parents=True)
        for number in range(wanted.files):
            pq.write_table(_table(wanted, number), half / f"part-{number:05}.parquet", row_group_size=wanted.group_rows)
        half.rename(place)
    return place


def repeated(wanted: Dataset, times: int, folder: Path = FOLDER) -> Path:
    """The dataset `times` over: the same files under further names, so that 64 million rows take no more disk than 4."""
    place = folder / f"{wanted.name}-x{times}"
    if not place.exists():
        source = made(wanted, folder)
        half = folder / f".{place.name}.{os.getpid()}"
        half.mkdir()
        for copy in range(times):
            for file in sorted(source.iterdir()):
                os.link(file, half / f"{copy:03}-{file.name}")
        half.rename(place)
    return place


def _table(wanted: Dataset, number: int) -> pa.Table:
    weights = np.random.default_rng(0).standard_normal(wanted.columns - 1, dtype=np.float32)
    random = np.random.default_rng((1, number))
    rows = wanted.groups * wanted.group_rows
    x = random.standard_normal((wanted.columns - 1, rows), dtype=np.float32)
    y = weights @ x + 0.1 * random.standard_normal(rows, dtype=np.float32)
    return pa.table({**{f"x{j}": x[j] for j in range(len(x))}, "y": y})

"""The suite `loader`: from Parquet files to shuffled batches of float32 tensors.

A case is a function of the `Work` that opens what it needs and returns a function from the number of a pass to its
batches (x first, then y).
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed.cases import Register
from benchmarks.speed.work import Work

Passes = Callable[[int], Iterator[Any]]
LOADERS: Register[Callable[[Work], Passes]] = Register()

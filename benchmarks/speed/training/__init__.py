"""The suite `training`: from Parquet files to updated weights.

A case is a function of the `Work` and of the time at which it began; it returns what it measured.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.speed.cases import Register
from benchmarks.speed.work import Work

TRAINERS: Register[Callable[[Work, float], dict[str, Any]]] = Register()

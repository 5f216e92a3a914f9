"""What goes wrong in production, done to a stream of shards: pure functions from tables to tables.

Shape legend: N rows of a shard.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.learning.streams import Y
from tidemill.tasks.training.groups import stable_seed

Poison = Callable[[pa.Table, int], pa.Table]  # a shard and its number


def during(shards: Iterable[pa.Table], first: int, last: int, poison: Poison) -> Iterator[pa.Table]:
    """The shards, those numbered `first` to `last` (inclusive, from 0) poisoned."""
    for number, shard in enumerate(shards):
        yield poison(shard, number) if first <= number <= last else shard


def flipped_labels(share: float = 1.0, seed: int = 0) -> Poison:
    """Wrong targets in a share of the rows: the other class of integers 0 and 1, floats mirrored at the shard's mean."""

    def poison(shard: pa.Table, number: int) -> pa.Table:
        y_N = shard[Y].to_numpy()
        mirrored_N = 1 - y_N if pa.types.is_integer(shard.schema.field(Y).type) else 2 * y_N.mean() - y_N
        hit_N = np.random.default_rng(stable_seed("flip", seed, number)).random(len(y_N)) < share
        return _with(shard, Y, np.where(hit_N, mirrored_N, y_N))

    return poison


def broken_sensor(column: str, kind: Literal["stuck", "garbage"], seed: int = 0) -> Poison:
    """A number column that is stuck at 0, or full of normal noise with a hundred times the spread of the shard's values."""

    def poison(shard: pa.Table, number: int) -> pa.Table:
        if kind == "stuck":
            return _with(shard, column, np.zeros(shard.num_rows))
        spread = 100 * (pc.stddev(shard[column]).as_py() or 1.0)
        noise_N = np.random.default_rng(stable_seed("garbage", seed, number)).normal(0.0, spread, shard.num_rows)
        return _with(shard, column, noise_N)

    return poison


def duplicated(shards: Iterable[pa.Table], number: int, copies: int) -> Iterator[pa.Table]:
    """The shards, with `copies` more of shard `number` right after it, as a producer sends that retries under new keys.

    Its rows come in another order each time, so that equal bytes cannot give them away.
    """
    for current, shard in enumerate(shards):
        yield shard
        if current == number:
            for copy in range(copies):
                order_N = np.random.default_rng(stable_seed("duplicate", number, copy)).permutation(shard.num_rows)
                yield shard.take(pa.array(order_N))


def _with(shard: pa.Table, name: str, values_N: np.ndarray) -> pa.Table:
    place, field = shard.schema.get_field_index(name), shard.schema.field(name)
    if pa.types.is_integer(field.type):
        values_N = np.rint(values_N)
    return shard.set_column(place, field, pa.array(values_N).cast(field.type))

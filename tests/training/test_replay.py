"""The replay memory: what it keeps, what it draws, and that both are bit for bit the same again."""

import pyarrow as pa
import pytest
import torch

from tests.training.rows import begin, cut, encoded, numbers_table, plain_spec, same_bits
from tidemill.tasks.training import replay as module
from tidemill.tasks.training.cutting import Batch
from tidemill.tasks.training.errors import SpecError, StateMismatch
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import generator
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import train_pass, train_shard
from tidemill.tasks.training.replay import ReplayBuffer, mixed
from tidemill.tasks.training.steps import Steps


def empty(rows: int = 100, classes: int = 0, **replay) -> ReplayBuffer:
    """A memory of rows of one number."""
    kind = {"task": "multiclass", "classes": classes} if classes else {}
    spec = plain_spec(1, replay={"rows": rows, **replay}, **kind)
    return ReplayBuffer(spec, Features.resolve(spec, numbers_table(1, 1).schema))


def batch(start: int, stop: int, classes: int = 0) -> Batch:
    """Rows that are known by their number."""
    x_N = torch.arange(start, stop)
    return Batch(x_N.float().unsqueeze(1), None, x_N % classes if classes else x_N.float())


def kept(memory: ReplayBuffer) -> list[int]:
    return [int(x) for x in memory.state()["x_BF"].squeeze(1)]


def test_it_keeps_everything_in_order_until_it_is_full():
    memory = empty(100)
    memory.offer(batch(0, 60), generator(0))
    memory.offer(batch(60, 100), generator(0))
    memory.admit(generator(0))
    assert kept(memory) == list(range(100))


def test_every_row_of_a_long_stream_is_kept_with_the_same_chance():
    """20 kept of 1,000, in 200 runs: each tenth of the stream has a tenth of what is kept (five standard deviations)."""
    counts = torch.zeros(10)
    for run in range(200):
        memory, chance = empty(20), generator("run", run)
        for start in range(0, 1000, 70):
            memory.offer(batch(start, min(start + 70, 1000)), chance)
            memory.admit(chance)
        counts += torch.bincount(torch.tensor(kept(memory)) // 100, minlength=10)
    assert counts.sum() == 200 * 20
    assert (counts - 400).abs().max() < 5 * (400 * 0.9) ** 0.5


def test_rows_settled_together_are_kept_as_if_they_had_come_one_by_one():
    """Algorithm R, row by row, with the same random numbers."""
    memory, chance = empty(7), generator("together")
    memory.offer(batch(0, 3000), chance)
    memory.admit(chance)
    draws = torch.rand(3000, dtype=torch.float64, generator=generator("together"))
    slots: list[int] = []
    for row, draw in enumerate(draws.tolist()):
        if row < 7:
            slots.append(row)
        elif (place := int(draw * (row + 1))) < 7:
            slots[place] = row
    assert kept(memory) == slots


def test_a_balanced_memory_keeps_as_many_of_a_rare_class():
    """Class 2 is one row in 50."""
    memory, chance = empty(30, classes=3, policy="balanced"), generator(0)
    y_N = torch.tensor([2 if row % 50 == 0 else row % 2 for row in range(5000)])
    memory.offer(Batch(torch.zeros(5000, 1), None, y_N), chance)
    memory.admit(chance)
    assert torch.bincount(memory.state()["y_B"]).tolist() == [10, 10, 10]


@pytest.mark.parametrize("classes", [0, 3])
def test_draws_are_uniform_over_what_is_kept_however_full_the_parts_are(classes):
    memory, chance = empty(300, classes=classes, policy="balanced" if classes else "reservoir"), generator(0)
    rows = (
        batch(0, 40, classes) if not classes else Batch(torch.arange(40.0).unsqueeze(1), None, torch.arange(40) // 39)
    )
    memory.offer(rows, chance)
    memory.admit(chance)
    draws = memory.draws(10, generator(1))
    drawn = torch.cat([next(draws).x_BF for _ in range(2000)]).long().squeeze(1)
    counts = torch.bincount(drawn, minlength=40)
    assert len(counts) == 40
    assert (counts - 500).abs().max() < 5 * 500**0.5


def test_nothing_is_drawn_from_an_empty_memory():
    assert next(empty().draws(3, generator(0)), None) is None


def test_bytes_bound_it_too():
    assert empty(1000, bytes=8 * 10).slots == 10  # a number and a target of 4 bytes each
    with pytest.raises(SpecError, match="holds no row"):
        empty(1000, bytes=7)


def test_what_it_works_on_is_bounded_in_bytes_and_changes_nothing(monkeypatch):
    """Rows of images are decided on and drawn in smaller parts."""
    found = []
    for working_bytes in (module.WORKING_BYTES, 8 * 100):  # of rows of 8 bytes
        monkeypatch.setattr(module, "WORKING_BYTES", working_bytes)
        memory, chance = empty(20), generator(0)
        memory.offer(batch(0, 1000), chance)
        assert memory._waiting < working_bytes / 8
        memory.admit(chance)
        draws = memory.draws(30, generator(1))
        found.append((kept(memory), [next(draws).y_B.tolist() for _ in range(10)]))
    assert found[0] == found[1]


def test_mixing_appends_old_rows():
    both = mixed(batch(0, 4), batch(10, 20), 3)
    assert both.y_B.tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert both.ids_BC is None


# ---- in a learner ----------------------------------------------------------------------------------------------------
def learner_with(**settings) -> Learner:
    table = numbers_table(300, 3)
    groups = cut(table)
    spec = plain_spec(3, shuffle=True, batch_size=16, **settings)
    learner = begin(spec, groups)
    train_pass(Steps(learner), groups, key=("epoch", 0), remember=True)
    return learner


def shard(number: int):
    return cut(numbers_table(50 + number, 3, seed=100 + number), 20)


@pytest.mark.parametrize("replay", [{"rows": 40}, {"rows": 1000, "ratio": 0.5}, {"rows": 40, "ratio": 3}])
def test_a_learner_stored_and_loaded_after_each_shard_gives_the_same_bits(replay):
    straight, stored = learner_with(replay=replay), learner_with(replay=replay)
    for number in range(4):
        train_shard(Steps(straight), shard(number), 2)
        train_shard(Steps(stored), shard(number), 2)
        stored = Learner.load(stored.spec, *stored.dump())
    assert straight.dump() == stored.dump()


@pytest.mark.parametrize("replay", [None, {"rows": 40}, {"rows": 1000, "ratio": 0.5}])
def test_running_statistics_are_part_of_what_is_stored(replay):
    settings = {"replay": replay, "standardize_features": True, "standardize_target": True, "running_statistics": True}
    straight, stored = learner_with(**settings), learner_with(**settings)
    for number in range(4):
        train_shard(Steps(straight), shard(number), 2)
        train_shard(Steps(stored), shard(number), 2)
        stored = Learner.load(stored.spec, *stored.dump())
    assert straight.dump() == stored.dump()
    assert straight.features.statistics.rows == 300 + 50 + 51 + 52 + 53


def test_statistics_stay_those_of_the_dataset_unless_they_are_to_run():
    learner = learner_with(standardize_features=True)
    before = learner.features
    train_shard(Steps(learner), shard(0), 1)
    assert learner.features is before


def test_kept_rows_follow_the_running_statistics():
    """They are what they would be, had they been encoded today; a null, which was the mean, is the old mean."""
    far = pa.table({"x0": pa.array([100, 300], pa.float32()), "y": pa.array([500, 900], pa.float32())})
    scaled = {"standardize_features": True, "standardize_target": True, "running_statistics": True}
    spec = plain_spec(1, replay={"rows": 8}, **scaled)
    raw = pa.table({"x0": pa.array([1, 2, 3, None], pa.float32()), "y": pa.array([10, 20, 30, 40], pa.float32())})
    learner = begin(spec, cut(raw))
    rows = encoded(learner.features, raw)
    learner.memory.offer(Batch(rows.x_NF, None, rows.y_N), generator(0))
    learner.memory.admit(generator(0))
    learner.update_statistics(cut(far))
    today = encoded(learner.features, raw)
    kept = learner.memory.state()
    torch.testing.assert_close(kept["x_BF"][:3], today.x_NF[:3])
    torch.testing.assert_close(kept["y_B"], today.y_N)
    old_mean = (2 - learner.features.statistics.mean_F) / learner.features.statistics.std_F
    torch.testing.assert_close(kept["x_BF"][3], old_mean.float())


def test_old_rows_are_trained_on_beside_the_new_ones_and_counted_apart():
    learner = learner_with(replay={"rows": 40})
    before = learner.counters.rows
    result = train_shard(Steps(learner), shard(0), 1)
    assert (result.rows, learner.counters.rows - before) == (50, 50)
    plain = learner_with()
    train_shard(Steps(plain), shard(0), 1)
    assert not same_bits(learner.model.weight, plain.model.weight)


def test_the_first_shard_trains_on_rows_of_the_dataset():
    """The old row of each step is one that the shards say nothing of (they say -4.5): the model follows it all the same."""
    spec = plain_spec(1, learning_rate=0.01, batch_size=4, replay={"rows": 1, "ratio": 1})
    learner = begin(spec, cut(numbers_table(8, 1)))
    learner.memory.offer(Batch(torch.tensor([[5.0]]), None, torch.tensor([50.0])), generator(0))
    learner.memory.admit(generator(0))
    learner.memory.seen_P[0] = 10**9  # so that no new row takes its place
    for _ in range(100):
        train_shard(Steps(learner), cut(numbers_table(8, 1).slice(0, 4)), 1)
    assert learner.model(torch.tensor([[5.0]])).item() == pytest.approx(50, abs=10)


def test_a_memory_that_does_not_fit_the_spec_is_refused():
    learner = learner_with(replay={"rows": 40})
    weights, state = learner.dump()
    other = learner.spec.model_copy(update={"task": "binary"})
    tensors = learner.memory.state()
    with pytest.raises(StateMismatch, match="does not hold the 40 rows"):
        ReplayBuffer.load(learner.spec, learner.features, tensors | {"y_B": tensors["y_B"][:3]})
    with pytest.raises(StateMismatch, match="parts"):
        ReplayBuffer.load(learner.spec, learner.features, tensors | {"seen": torch.tensor([1, 2])})
    with pytest.raises(StateMismatch):
        Learner.load(other, weights, state)

"""Compiled steps do what eager steps do, for every optimizer and every part of a step, up to the order of sums."""

import logging
from typing import Any

import pytest
import torch

from tests.training.rows import begin, cut, numbers_table, plain_spec, same_bits
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import train_pass, train_shard
from tidemill.tasks.training.optimizers import OPTIMIZERS
from tidemill.tasks.training.pool import WindowPool
from tidemill.tasks.training.steps import AUTO_STEPS, STEPS_PER_CALL, Steps, wanted

COUNT = 3
BATCH = 32
ROWS = BATCH * (2 * COUNT + 1) + 5  # 2 calls, then a full and a short batch
HERE = "tests.training.rows"


def trained(mode: str, epochs: int = 2, old_rows: bool = False, backend: str = "aot_eager", **spec: Any) -> Learner:
    """`aot_eager` traces and differentiates as the real backend does, and runs the result without a C++ compiler."""
    groups = cut(numbers_table(ROWS))
    learner = begin(plain_spec(compile=mode, batch_size=BATCH, **spec), groups)
    steps = Steps(learner, per_call=COUNT, backend=backend)
    for epoch in range(epochs):
        train_pass(steps, groups, key=("epoch", epoch), replay=old_rows and epoch > 0, remember=True)
    return learner


def furthest(one: Learner, other: Learner) -> float:
    """Largest difference between two weights, and between two numbers of the optimizers' states."""
    pairs = list(zip(one.served.state_dict().values(), other.served.state_dict().values(), strict=True))
    mine, theirs = one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for index, values in mine.items():
        assert {n for n, v in values.items() if v is not None} == {n for n, v in theirs[index].items() if v is not None}
        pairs += [(value, theirs[index][name]) for name, value in values.items() if isinstance(value, torch.Tensor)]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


PARTS = {
    "momentum": {"optimizer": {"arguments": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}}},
    "clipping, average": {"clip_norm": 0.1, "ema_decay": 0.9},
    "schedule": {"schedule": {"name": "cosine", "arguments": {"T_max": 40}, "warmup_steps": 5}},
    "buffers, dropout": {"model": {"factory": f"{HERE}:DropoutNet"}},
    "tied weights": {"model": {"factory": f"{HERE}:TiedNet"}},
    "bfloat16": {"precision": "bfloat16"},
}


@pytest.mark.slow
def test_the_eager_steps_of_a_first_pass_keep_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    new = WindowPool._new

    def counted(pool: WindowPool) -> Any:
        made.append(pool)
        return new(pool)

    monkeypatch.setattr(WindowPool, "_new", counted)
    rows = BATCH * COUNT + 20  # of a row group; two do not fit a window
    groups = cut(numbers_table(5 * rows), *[rows] * 4)
    learner = begin(plain_spec(compile="on", batch_size=BATCH, shuffle=True, shuffle_bytes=2 * 50 * rows), groups)
    train_pass(Steps(learner, per_call=COUNT, backend="aot_eager"), groups, key=("epoch", 0))
    assert 0 < learner.counters.compiled_steps < learner.counters.steps
    assert len(made) == 2  # one for each of the two windows that are in memory at a time


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_step_is_what_it_is_in_the_eager_loop(part: str) -> None:
    eager, compiled = trained("off", **PARTS[part]), trained("on", **PARTS[part])
    assert eager.counters.compiled_steps == 0
    assert compiled.counters.compiled_steps == 3 * COUNT  # the first call's steps are eager: they make the state
    assert compiled.counters.steps == eager.counters.steps
    assert furthest(eager, compiled) < (1e-3 if part == "bfloat16" else 1e-5)


@pytest.mark.slow
def test_blocks_that_straddle_windows_hold_ids_weights_and_several_targets() -> None:
    table = numbers_table(700, 3)
    table = table.append_column("c", [["red", "green", None, "blue"] * 175])
    table = table.append_column("z", table.column("x0")).append_column("w", [[1.0, 2.0] * 350])
    spec = plain_spec(
        *(3,),
        features=["x0", "x1", "x2", {"name": "c", "kind": "category", "buckets": 8}],
        **{"target": ["y", "z"], "sample_weight": "w", "model": {"factory": "mlp", "arguments": {"hidden": [8]}}},
        **{"shuffle": True, "shuffle_bytes": 2 * 100 * 32, "batch_size": 16, "loss": "huber"},
    )
    groups = cut(table, 130, 250)
    found = {}
    for mode in ("off", "on"):
        found[mode] = learner = begin(spec.model_copy(update={"compile": mode}), groups)
        steps = Steps(learner, per_call=COUNT, backend="aot_eager")
        for epoch in range(2):
            train_pass(steps, groups, key=("epoch", epoch))
    assert found["on"].counters.compiled_steps > 20 * COUNT
    assert furthest(found["off"], found["on"]) < 1e-5


@pytest.mark.slow
def test_the_averaged_model_has_the_buffers_of_the_trained_one() -> None:
    compiled = trained("on", 1, ema_decay=0.9, model={"factory": f"{HERE}:DropoutNet"})
    before = compiled.counters.compiled_steps
    whole = cut(numbers_table(BATCH * COUNT, seed=1))  # no eager step after the last call, which would copy them
    train_pass(Steps(compiled, per_call=COUNT, backend="aot_eager"), whole, key=("epoch", 1))
    assert compiled.counters.compiled_steps == before + COUNT
    assert compiled.averaged is not None
    buffers = dict(compiled.model.named_buffers())
    assert buffers
    assert all(same_bits(value, buffers[name]) for name, value in compiled.averaged.module.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"sgd", "radam"}))
def test_every_optimizer_is_torchs(name: str) -> None:
    eager, compiled = (trained(mode, 1, optimizer={"name": name}) for mode in ("off", "on"))
    assert compiled.counters.compiled_steps == COUNT
    assert furthest(eager, compiled) < 1e-5


@pytest.mark.slow
def test_old_rows_from_the_memory_are_part_of_compiled_steps() -> None:
    settings: dict[str, Any] = {"replay": {"rows": 100, "ratio": 0.5}}
    eager, compiled = trained("off", old_rows=True, **settings), trained("on", old_rows=True, **settings)
    assert compiled.counters.compiled_steps == 3 * COUNT
    assert furthest(eager, compiled) < 1e-5


def test_what_does_not_compile_is_said_once_and_trained_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    """RAdam branches on the value of a tensor."""
    settings: dict[str, Any] = {
        "optimizer": {"name": "radam"},
        "schedule": {"name": "exponential", "arguments": {"gamma": 0.9}},
    }
    with caplog.at_level(logging.WARNING, logger="tidemill.training"):
        compiled = trained("on", **settings)
    eager = trained("off", **settings)
    assert len([record for record in caplog.records if "without compilation" in record.message]) == 1
    assert compiled.counters.compiled_steps == 0
    for name, weights in eager.model.state_dict().items():
        assert same_bits(compiled.model.state_dict()[name], weights), name


@pytest.mark.slow
def test_the_generated_code_makes_the_same_steps() -> None:
    """The real backend, C++ compiler included; this found torch 2.13.0 drop `alpha` (see `_INDUCTOR`)."""
    eager, compiled = trained("off"), trained("on", backend="inductor")
    assert compiled.counters.compiled_steps == 3 * COUNT
    assert furthest(eager, compiled) < 1e-5


@pytest.mark.slow
def test_a_learner_that_was_stored_goes_on_with_the_same_bits() -> None:
    groups = cut(numbers_table(ROWS))
    straight = trained("on")
    stored = trained("on", 1)
    resumed = Learner.load(stored.spec, *stored.dump())
    train_pass(Steps(resumed, per_call=COUNT, backend="aot_eager"), groups, key=("epoch", 1))
    assert resumed.dump() == straight.dump()


def test_auto_compiles_long_runs_only() -> None:
    assert [wanted("auto", steps) for steps in (0, AUTO_STEPS - 1, AUTO_STEPS)] == [False, False, True]
    assert wanted("on", 0)
    assert not wanted("off", 10 * AUTO_STEPS)
    learner = begin(plain_spec(compile="auto", batch_size=BATCH), cut(numbers_table(ROWS)))
    assert Steps(learner, AUTO_STEPS - 1).per_call == 1
    assert Steps(learner, AUTO_STEPS).per_call == STEPS_PER_CALL


@pytest.mark.slow
@pytest.mark.parametrize("first", [3 * BATCH, 100], ids=["full batches first", "others first"])
def test_shards_of_many_sizes_share_one_compiled_code(first: int) -> None:
    """Full batches have another, since an open size costs time; nothing is compiled anew for every shard."""
    learner = begin(plain_spec(compile="on", batch_size=BATCH), cut(numbers_table(ROWS)))
    steps = Steps(learner, per_call=COUNT, backend="aot_eager")
    train_shard(steps, cut(numbers_table(COUNT * BATCH)), 1)  # eager: it makes the optimizer's state
    torch._dynamo.utils.counters.clear()
    for rows in (first, 3 * BATCH, 100, 93, 90, 6 * BATCH, 170, 84):
        before = learner.counters.compiled_steps
        train_shard(steps, cut(numbers_table(rows)), 1)
        assert learner.counters.compiled_steps > before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_the_code_of_an_open_size_gives_the_same_bits_whichever_size_came_first() -> None:
    """A run that was killed meets its first shard at another place in the stream."""
    groups = cut(numbers_table(ROWS))
    straight = begin(plain_spec(compile="on", batch_size=BATCH), groups)
    steps = Steps(straight, per_call=COUNT, backend="inductor")
    for rows in (50, 84):  # two batches of 25, which are eager; three of 28
        train_shard(steps, cut(numbers_table(rows)), 1)
    stored = straight.dump()
    later = (87, 72)  # three batches of 29, and of 24
    for rows in later:
        train_shard(steps, cut(numbers_table(rows)), 1)
    resumed = Learner.load(straight.spec, *stored)
    steps = Steps(resumed, per_call=COUNT, backend="inductor")
    for rows in later:
        train_shard(steps, cut(numbers_table(rows)), 1)
    assert resumed.counters.compiled_steps > 0
    assert resumed.dump() == straight.dump()

"""A shard on which the model fails is rejected, a model that fails on everything stops the run; nothing is half done.

The models are those of `failing.py`. Column b of shard i is i / 16 in every row: by that they know what they are given.
"""

import re
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, hooked
from tests.tasks.online import failing
from tests.tasks.online.failing import Backward, Deed, Failing
from tidemill.storage.audit import audit
from tidemill.storage.disposal import quarantined
from tidemill.storage.inbox import Shard
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online import drain, turns
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.step import OnlineRun, Outcome, step
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ModelFails
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.made_up import made_up
from tidemill.tasks.training.spec import ReplayMemory, Spec

MODULE = failing.__name__
FAILING = SPEC.model_copy(
    update={
        "model": SPEC.model.model_copy(update={"factory": f"{MODULE}:model", "arguments": {"numbers": 2}}),
        "loss": f"{MODULE}:loss",
        "standardize_features": False,
        "standardize_target": False,
    }
)
REMEMBERING = FAILING.model_copy(update={"replay": ReplayMemory(rows=50)})
PAIRS = SPEC.model_copy(
    update={"model": SPEC.model.model_copy(update={"factory": f"{MODULE}:pairs", "arguments": {"numbers": 2}})}
)


def shard(number: int, count: int = 20) -> pa.Table:
    table = rows(count, number)
    return table.set_column(1, "b", [[number / 16] * count])


def shards(*numbers: int) -> dict[str, pa.Table]:
    return {f"{number}.parquet": shard(number) for number in numbers}


class World:
    """A registry with version 0 of a model, and an inbox, in memory."""

    def __init__(self, make_url: Callable[[str], str], spec: Spec = FAILING) -> None:
        self.url = make_url
        put(self.url("dataset"), {"part-0.parquet": rows(200, 0)})
        put(self.url("inbox"), {})
        batch.train(self.url("dataset"), self.url("registry"), "model", spec, BatchSettings(device="cpu"))

    @property
    def log(self) -> VersionLog:
        return open_log(self.url("registry"), "model")

    def put(self, tables: dict[str, pa.Table]) -> None:
        put(self.url("inbox"), tables)

    def run(self, stores: Callable[[str], Store] = open_store, **settings: object) -> OnlineRun:
        return OnlineRun(self.url("inbox"), self.url("registry"), "model", self.settings(**settings), stores)

    def settings(self, **settings: object) -> OnlineSettings:
        return OnlineSettings.model_validate({"grace_seconds": 0, "device": "cpu"} | settings)

    def drain(self, stores: Callable[[str], Store] = open_store, **settings: object) -> OnlineReport:
        return drain(self.url("inbox"), self.url("registry"), "model", self.settings(**settings), stores=stores)

    @property
    def bits(self) -> tuple[str, str]:
        blobs = self.log.head().manifest.blobs
        return blobs.weights.sha256, blobs.state.sha256

    @property
    def rejected(self) -> dict[str, str]:
        """Key -> reason of all that is in quarantine."""
        return {about["key"]: about["reason"] for about in quarantined(self.log).values()}

    @property
    def consumed(self) -> list[str]:
        return [s.key for v in list(self.log.history(self.log.head()))[::-1] for s in v.manifest.consumed]


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMILL_FACTORIES", MODULE)


@pytest.fixture
def world(memory_url: Callable[[str], str]) -> World:
    return World(memory_url)


def clean_bits(
    memory_url: Callable[[str], str], *numbers: int, spec: Spec = FAILING, **settings: object
) -> tuple[str, str]:
    """Of a run that never saw any other shards."""
    other = World(lambda name: memory_url(f"clean/{name}"), spec)
    other.put(shards(*numbers))
    other.drain(**settings)
    return other.bits


def given(x_BF: Tensor) -> int:
    """The number of the shard that a model is given, 0 for other rows."""
    b_B = x_BF[:, 1]
    return int(b_B[0].item() * 16) if (b_B == b_B[0]).all() else 0


def on(*numbers: int, error: Callable[[], BaseException] = lambda: ValueError("cannot have it")) -> Deed:
    """Fails on these shards."""

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        if given(x_BF) in numbers:
            raise error()

    return deed


def everywhere(model: Failing, x_BF: Tensor, output: Tensor) -> None:
    raise RuntimeError("size mismatch, m1: [20 x 2], m2: [3 x 1]")


def in_scoring(model: Failing, x_BF: Tensor, output: Tensor) -> None:
    if not model.training and given(x_BF) == 2:
        raise ValueError("cannot have it")


def in_training(model: Failing, x_BF: Tensor, output: Tensor) -> None:
    if model.training and given(x_BF) == 2:
        raise ValueError("cannot have it")


def in_backward(model: Failing, x_BF: Tensor, output: Tensor) -> Tensor | None:
    return Backward.apply(output) if given(x_BF) == 2 and model.training else None


def not_finite(model: Failing, x_BF: Tensor, output: Tensor) -> Tensor | None:
    return output * torch.inf if given(x_BF) == 2 else None


# ---- a shard is at fault ---------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("deed", [on(2), in_scoring, in_training, in_backward, not_finite])
@pytest.mark.parametrize("max_shards", [1, 256])
def test_a_shard_on_which_the_model_fails_is_rejected_as_if_it_had_not_been_there(
    deed: Deed, max_shards: int, world: World, memory_url: Callable[[str], str]
) -> None:
    limits = {"max_shards": max_shards}
    world.put(shards(1, 2, 3))
    with failing.failing(deed):
        report = world.drain(limits=limits)
    assert (report.shards, report.rejected, keys(world.url("inbox"))) == (2, 1, [])
    assert world.consumed == ["1.parquet", "3.parquet"]
    (reason,) = world.rejected.values()
    assert "cannot have it" in reason or "no gradient today" in reason or "non-finite" in reason
    assert audit(world.log).findings == []
    assert world.bits == clean_bits(memory_url, 1, 3, limits=limits)


def test_the_reason_names_the_class_the_message_and_the_place(world: World) -> None:
    world.put(shards(1, 2))
    with failing.failing(on(2)):
        world.drain()
    reason = world.rejected["2.parquet"]
    assert "raised ValueError: cannot have it (" in reason
    assert re.search(r"test_turns.py:\d+ in deed", reason)


def test_a_loss_that_fails_on_a_shard_rejects_it(world: World, memory_url: Callable[[str], str]) -> None:
    world.put(shards(1, 3) | {"2.parquet": shard(2).set_column(2, "y", [[77.0] * 20])})

    def picky(target: Tensor) -> None:
        if 77.0 in target:
            raise AssertionError("77 is no target")

    with failing.losing(picky):
        world.drain()
    assert list(world.rejected) == ["2.parquet"]
    assert world.bits == clean_bits(memory_url, 1, 3)


@pytest.mark.parametrize("bad", [(1, 2), (1, 3), (2, 3)])
def test_one_good_shard_shows_that_two_others_are_at_fault(
    bad: tuple[int, int], world: World, memory_url: Callable[[str], str]
) -> None:
    world.put(shards(1, 2, 3))
    with failing.failing(on(*bad)):
        world.drain()
    assert sorted(world.rejected) == [f"{number}.parquet" for number in bad]
    (good,) = {1, 2, 3} - set(bad)
    assert world.bits == clean_bits(memory_url, good)


def test_a_shard_that_is_committed_already_shows_nothing_since_it_does_not_wait(
    world: World, memory_url: Callable[[str], str]
) -> None:
    world.put(shards(1, 2, 3))
    with failing.failing(on(2, 3)):
        with pytest.raises(ModelFails, match="on each of 2 shards"):
            world.drain(limits={"max_shards": 1})
        assert (world.consumed, world.rejected) == (["1.parquet"], {})
        world.put(shards(4))
        world.drain(limits={"max_shards": 1})
    assert (world.consumed, sorted(world.rejected)) == (["1.parquet", "4.parquet"], ["2.parquet", "3.parquet"])
    assert world.bits == clean_bits(memory_url, 1, 4)


def test_a_good_shard_behind_many_bad_ones_is_trained_on(world: World, memory_url: Callable[[str], str]) -> None:
    """Whatever the model does with made-up rows, on which it fails here too, and whatever one commit may take."""
    bad = range(1, turns.TOLD_AFTER + 4)
    world.put({f"{number:02}.parquet": shard(number) for number in (*bad, 90)})
    with failing.failing(on(*bad, 0)):
        report = world.drain(limits={"max_shards": 3})
    assert (world.consumed, report.rejected, keys(world.url("inbox"))) == (["90.parquet"], len(bad), [])
    assert world.bits == clean_bits(memory_url, 90)


def test_where_nothing_else_waits_made_up_rows_show_it(world: World, memory_url: Callable[[str], str]) -> None:
    world.put(shards(2) | {"3.parquet": b"no Parquet"})
    before = world.bits
    with failing.failing(on(2)):
        world.drain()
    assert sorted(world.rejected) == ["2.parquet", "3.parquet"]
    assert world.bits == before, "the step on made-up rows is undone"
    world.put(shards(5))
    world.drain()
    assert world.bits == clean_bits(memory_url, 5)


@pytest.mark.parametrize("fails_on", ["made-up rows", "remembered rows"])
def test_where_nothing_else_waits_rows_that_the_model_remembers_show_it(
    fails_on: str, memory_url: Callable[[str], str]
) -> None:
    """They are real; made-up rows are asked only where there are none."""
    world = World(memory_url, REMEMBERING)
    real = set(rows(200, 0)["a"].cast(pa.float32()).to_pylist())

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        remembered = x_BF[0, 0].item() in real
        if given(x_BF) == 2 or remembered == (fails_on == "remembered rows"):
            raise ValueError("cannot have it")

    world.put(shards(2))
    before = world.bits
    with failing.failing(deed):
        if fails_on == "made-up rows":
            world.drain()
        else:
            with pytest.raises(ModelFails, match=r"on a shard, and then on remembered rows: .*cannot have it"):
                world.drain()
    assert list(world.rejected) == (["2.parquet"] if fails_on == "made-up rows" else [])
    assert world.bits == before, "the step on remembered rows is undone"


@pytest.mark.parametrize("fails_on", ["made-up rows", "remembered rows"])
def test_of_several_shards_that_all_fail_remembered_rows_tell_whose_fault_it_is(
    fails_on: str, memory_url: Callable[[str], str]
) -> None:
    """Two bad shards are left after a good one was committed: they stop no run that remembers rows it was trained on."""
    world = World(memory_url, REMEMBERING)
    world.put(shards(1))
    world.drain()
    before = world.bits
    real = {*rows(200, 0)["a"].cast(pa.float32()).to_pylist(), *shard(1)["a"].cast(pa.float32()).to_pylist()}

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        remembered = x_BF[0, 0].item() in real
        if given(x_BF) in (2, 3) or remembered == (fails_on == "remembered rows"):
            raise ValueError("cannot have it")

    world.put(shards(2, 3))
    with failing.failing(deed):
        if fails_on == "made-up rows":
            world.drain()
        else:
            with pytest.raises(ModelFails, match=r"on each of 2 shards, and then on remembered rows: .*cannot have it"):
                world.drain()
    assert sorted(world.rejected) == (["2.parquet", "3.parquet"] if fails_on == "made-up rows" else [])
    assert world.bits == before, "the step on remembered rows is undone"
    world.put(shards(4))
    with failing.failing(on(2, 3)):
        world.drain()
    assert sorted(world.rejected) == ["2.parquet", "3.parquet"]
    assert world.bits == clean_bits(memory_url, 1, 4, spec=REMEMBERING)


def test_remembered_rows_say_nothing_of_several_shards_that_cannot_be_decoded(
    memory_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tensors already: a new version of Arrow that can read nothing must not empty an inbox."""
    world = World(memory_url, REMEMBERING)
    world.put(shards(1, 2))

    def undecodable(*_: object) -> None:
        raise RuntimeError("no such codec")

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "row_groups", undecodable)
        with pytest.raises(ModelFails, match=r"on each of 2 shards, and no other .*no such codec"):
            world.drain()
    assert world.rejected == {}
    world.drain()
    assert world.bits == clean_bits(memory_url, 1, 2, spec=REMEMBERING)


def test_a_step_on_remembered_rows_that_gives_no_number_is_no_proof(memory_url: Callable[[str], str]) -> None:
    world = World(memory_url, REMEMBERING)
    world.put(shards(2))
    with (
        failing.failing(lambda model, x_BF, output: output * torch.inf if model.training else None),
        pytest.raises(ModelFails, match=r"on remembered rows: .*non-finite"),
    ):
        world.drain()
    assert world.rejected == {}


def test_a_shard_that_was_trained_on_before_shows_that_the_model_still_can(
    world: World, memory_url: Callable[[str], str]
) -> None:
    """After the last bad one nothing waits. The step on the shard before it is undone."""
    world.put(shards(1, 2, 3))
    with failing.failing(on(2, 3, 0)):
        world.drain()
    assert (world.consumed, sorted(world.rejected)) == (["1.parquet"], ["2.parquet", "3.parquet"])
    assert world.bits == clean_bits(memory_url, 1)


def test_a_shard_that_was_trained_on_before_shows_that_the_model_can_no_more(
    world: World, memory_url: Callable[[str], str]
) -> None:
    """The model breaks in the middle of the run, for ever: what it could do before proves nothing."""
    world.put(shards(1, 2, 3))
    failures: list[int] = []

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        if given(x_BF) in (2, 3) or len(failures) >= 4:
            failures.append(given(x_BF))
            raise ValueError("cannot have it")

    with (
        failing.failing(deed),
        pytest.raises(ModelFails, match=r"each of 2 shards, and then on 1.parquet: .*cannot have it"),
    ):
        world.drain()
    assert failures == [2, 2, 3, 3, 1]
    assert (world.log.head().number, world.rejected) == (0, {})
    world.drain()
    assert world.bits == clean_bits(memory_url, 1, 2, 3)


def test_many_bad_shards_in_one_commit_cost_each_good_one_one_more_training(
    world: World, memory_url: Callable[[str], str]
) -> None:
    """And the head's blobs are read from the store once more."""
    bad, good = range(1, 41, 2), range(2, 41, 2)
    tables = {f"{number:02}.parquet": shard(number) for number in range(1, 41)}
    world.put(tables)
    trained: Counter[int] = Counter()
    read: Counter[str] = Counter()

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        if given(x_BF) in bad:
            raise ValueError("cannot have it")
        trained[given(x_BF)] += model.training

    def note(call: Call) -> None:
        if (call.verb, call.phase) == ("read", "before"):
            read[call.key.rpartition("/")[2].partition(".")[2]] += 1

    with failing.failing(deed):
        report = world.drain(hooked(note), gate={"champion": "ignore"})
    assert (world.log.head().number, report.shards, report.rejected) == (1, len(good), len(bad))
    steps = 2  # of 20 rows, 16 a step
    assert max(trained.values()) == 2 * steps
    assert read["safetensors"] <= 3, "opened, gone back to, and opened for the trial of a restart"
    other = World(lambda name: memory_url(f"clean/{name}"))
    other.put({key: table for key, table in tables.items() if int(key[:2]) in good})
    other.drain(gate={"champion": "ignore"})
    assert world.bits == other.bits


def test_what_fails_once_only_is_trained_on_in_its_turn(world: World, memory_url: Callable[[str], str]) -> None:
    """As the first call after a deploy may: no shard is at fault."""
    world.put(shards(1, 2, 3))
    calls: list[int] = []

    def first(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        calls.append(given(x_BF))
        if len(calls) == 1:
            raise RuntimeError("warming up")

    with failing.failing(first):
        report = world.drain()
    assert (report.shards, report.rejected) == (3, 0)
    assert world.bits == clean_bits(memory_url, 1, 2, 3)


def test_a_champion_that_fails_rejects_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The champion stays version 0, whose weights the model knows."""
    world.put(shards(1, 2, 3))
    learner = world.run().head().learner
    first = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}

    def old(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        if not model.training and torch.equal(model.linear.weight, first["linear.weight"]) and given(x_BF) > 1:
            raise KeyError("an old bug")

    with failing.failing(old):
        report = world.drain(gate={"champion": "score"}, limits={"max_shards": 1})
    assert (report.shards, report.rejected) == (3, 0)
    scored = [bool(s.champion) for v in list(world.log.history(world.log.head()))[::-1] for s in v.manifest.consumed]
    assert scored == [True, False, False]
    assert "champion cannot score" in caplog.text


def test_a_trigger_that_scores_does_not_die_of_a_shard(world: World) -> None:
    world.put(shards(1, 2, 3))
    with failing.failing(on(2)):
        world.drain(train_when={"score_drop": 0.5})
    assert (world.consumed, list(world.rejected)) == (["1.parquet", "3.parquet"], ["2.parquet"])


def test_a_lone_row_is_rejected_by_a_model_that_needs_two(memory_url: Callable[[str], str]) -> None:
    world = World(memory_url, PAIRS)
    world.put({"1.parquet": rows(1, 1), "2.parquet": rows(40, 2)})
    assert world.drain().shards == 1
    assert "Expected more than 1 value per channel" in world.rejected["1.parquet"]


# ---- the model is at fault -------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1,), (1, 2, 3)])
def test_a_model_that_fails_on_everything_stops_the_run_and_rejects_nothing(
    numbers: tuple[int, ...], world: World, memory_url: Callable[[str], str]
) -> None:
    world.put(shards(*numbers))
    run = world.run()
    with failing.failing(everywhere), pytest.raises(ModelFails, match="RuntimeError: size mismatch") as told:
        step(run)
    assert "the shards stay in the inbox" in str(told.value)
    assert (world.log.head().number, world.rejected) == (0, {})
    assert keys(world.url("inbox")) == [f"{number}.parquet" for number in numbers]
    while step(run).outcome is not Outcome.IDLE:  # the code is mended
        pass
    assert world.bits == clean_bits(memory_url, *numbers)


def test_all_that_waits_is_tried_before_the_model_is_blamed_and_that_is_said(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TOLD_AFTER", 3)
    world.put(shards(*range(1, 10)))
    seen: set[int] = set()

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        seen.add(given(x_BF))
        raise RuntimeError("no")

    with failing.failing(deed), pytest.raises(ModelFails, match="on each of 9 shards"):
        world.drain(limits={"max_shards": 2})
    assert seen == set(range(1, 10))
    assert caplog.text.count("the model has failed on each of 3 shards; the others that wait are tried") == 1
    assert world.rejected == {}


@pytest.mark.parametrize("count", [2, 5])
def test_where_several_shards_all_fail_made_up_rows_do_not_empty_the_inbox(
    count: int, world: World, memory_url: Callable[[str], str]
) -> None:
    bad = range(1, count + 1)
    world.put(shards(*bad))
    with failing.failing(on(*bad)), pytest.raises(ModelFails, match=f"on each of {count} shards") as told:
        world.drain()
    assert "put a good one beside them" in str(told.value)
    assert (world.rejected, len(keys(world.url("inbox")))) == ({}, count)
    world.put(shards(6))
    with failing.failing(on(*bad)):
        world.drain()
    assert (world.consumed, len(world.rejected)) == (["6.parquet"], count)
    assert world.bits == clean_bits(memory_url, 6)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_shards_fault_is_raised_and_rejects_nothing(
    error: BaseException, world: World, memory_url: Callable[[str], str]
) -> None:
    world.put(shards(1, 2, 3))
    with failing.failing(on(2, error=lambda: error)), pytest.raises(type(error)):
        world.drain()
    assert world.rejected == {}
    world.drain()
    assert world.bits == clean_bits(memory_url, 1, 2, 3)


def test_a_run_that_is_killed_in_the_step_on_made_up_rows_has_changed_nothing(
    world: World, memory_url: Callable[[str], str]
) -> None:
    world.put(shards(2))

    class Killed(BaseException):
        pass

    def deed(model: Failing, x_BF: Tensor, output: Tensor) -> None:
        if given(x_BF) == 2:
            raise ValueError("cannot have it")
        if model.training:
            raise Killed

    before = world.bits
    with failing.failing(deed), pytest.raises(Killed):
        world.drain()
    assert (world.bits, world.log.head().number, keys(world.url("inbox"))) == (before, 0, ["2.parquet"])
    with failing.failing(on(2)):
        world.drain()
    assert list(world.rejected) == ["2.parquet"]
    assert world.bits == before


def test_it_costs_nothing_while_no_shard_fails(memory_url: Callable[[str], str]) -> None:
    """The head's weights and state are read once, each shard once."""
    world = World(memory_url, SPEC)
    world.put(shards(1, 2, 3))
    read: list[str] = []

    def note(call: Call) -> None:
        if (call.verb, call.phase) == ("read", "before") and (call.key.endswith((".safetensors", ".parquet"))):
            read.append(call.key.rpartition("/")[2].partition(".")[2])

    world.drain(hooked(note), gate={"champion": "ignore"})
    assert sorted(read) == ["parquet"] * 3 + ["safetensors", "state.safetensors"]


# ---- what a restart would lose ---------------------------------------------------------------------------------------
def test_state_that_a_restart_would_lose_is_told_once_at_the_first_commit(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that counts its calls in Python, deployed after version 0 was made."""
    world.put(shards(1, 2, 3))

    def counting(model: Failing, x_BF: Tensor, output: Tensor) -> Tensor:
        model.calls = getattr(model, "calls", 0) + model.training
        return output * (1 + 0.01 * model.calls)

    with failing.failing(counting):
        world.drain(limits={"max_shards": 1})
    assert caplog.text.count("after a restart this model goes on with other bits") == 1


def test_a_model_whose_state_is_stored_is_not_warned_of_and_keeps_its_bits(
    world: World, memory_url: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whether each process makes one commit or one process makes them all."""
    world.put(shards(1, 2, 3))
    for _ in range(3):
        step(world.run(limits={"max_shards": 1}))
    assert world.bits == clean_bits(memory_url, 1, 2, 3)
    assert "after a restart" not in caplog.text


# ---- made-up rows ----------------------------------------------------------------------------------------------------
EVERY_KIND = pa.table(
    {
        "number": pa.array([1.0, 2.0]),
        "vector": pa.array([[1.0, 2.0, 3.0]] * 2, pa.list_(pa.float32(), 3)),
        "time": pa.array([0, 86_400_000_000], pa.timestamp("us")),
        "duration": pa.array([0, 1_000_000], pa.duration("us")),
        "text": ["a", "b"],
        "id": [1, 2],
        "integers": [[1, 2], [3]],
        "texts": [["a"], ["b", "c"]],
        "weight": [1.0, 2.0],
        "y": [0, 1],
    }
)


@pytest.mark.parametrize("task", ["regression", "binary", "multiclass"])
def test_made_up_rows_have_every_kind_of_column(task: str) -> None:
    columns = ["number", "vector", "time", "duration", "text", {"name": "id", "kind": "category"}, "integers", "texts"]
    spec = Spec.model_validate(
        {"features": columns, "target": "y", "task": task, "sample_weight": "weight"}
        | ({"classes": 3} if task == "multiclass" else {})
    )
    features = Features.resolve(spec, EVERY_KIND.schema).fit([made_up(Features.resolve(spec, EVERY_KIND.schema), 50)])
    group = made_up(features, 50)
    features.check(group.schema, group.name)
    table = group.read(features.names(labelled=True))
    encoded = features.encode(table, group.name)
    assert (len(encoded.x_NF), torch.isfinite(encoded.x_NF).all().item()) == (50, True)
    y_N, labelled_N = features.target(table, group.name)
    assert (len(y_N), labelled_N) == (50, None)
    assert features.weights(table, group.name) is not None
    assert group.table.equals(made_up(features, 50).table)


def test_made_up_rows_are_like_those_of_the_dataset(memory_url: Callable[[str], str]) -> None:
    table = rows(200, 0)
    far = table.set_column(0, "a", [[1e6 + 10 * value for value in table["a"].to_pylist()]])
    world = World(memory_url, SPEC)
    features = Features.resolve(SPEC, far.schema)
    put(world.url("far"), {"part-0.parquet": far})
    group = made_up(features.fit(batch.take_snapshot(world.url("far")).row_groups), 100)
    values = torch.tensor(group.table["a"].to_pylist(), dtype=torch.float64)
    assert (values - 1e6).abs().max() < 60

"""A rank that dies, freezes or holds other bits, at any moment: today's "killed between two calls", whoever it is."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchmetrics.regression import MeanAbsoluteError

from tests.data import parquet
from tests.guarantees.audit import audit
from tests.guarantees.children import (
    DEADLINE,
    ONLINE,
    SHARDS,
    Kill,
    MakeUrl,
    _report,
    bits,
    fill,
    sample,
    start_child,
    start_server,
    state_of,
    waiting,
)
from tests.ranks.crews import INBOX, SECONDS, SPEC, Ended, begin, drained, joined, lead, registered
from tests.s3_server import wait_until
from tests.storage.faults import act_once, hooked
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store
from tidemill.tasks.errors import RanksDiffer
from tidemill.tasks.online import commit, doors, turns
from tidemill.tasks.online import step as online
from tidemill.tasks.ranks.crew import Crew, follow_orders
from tidemill.tasks.ranks.messages import Order
from tidemill.tasks.training.models import Inputs
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps


@pytest.fixture(params=["local"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """URLs of roots that do not exist yet."""
    start_server()
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return lambda name: f"s3://tidemill-tests/{tmp_path.name}-{id(request):x}/{name}"
    return lambda name: str(tmp_path / "stores" / name)


on_s3 = pytest.mark.parametrize("make_url", ["s3"], indirect=True)


@dataclass
class Runs:
    """Runs of ranks on copies of one registry, all of which must come to the same bits."""

    make_url: MakeUrl
    tmp_path: Path
    reference: tuple[str, str] | None = None

    def begin(self, name: str) -> tuple[str, str]:
        place = self.make_url(f"{name}/inbox"), self.make_url(f"{name}/registry")
        begin(self.make_url("base"), *place)
        return place

    def drained(self, size: int, place: tuple[str, str], kill: tuple[int, Kill] | None = None) -> list[Ended]:
        return drained(size, *place, self.tmp_path, kill=kill)

    def check(self, place: tuple[str, str]) -> None:
        """The inbox is empty, each shard was consumed once, and the bits are those of the first run and of one process."""
        inbox, registry = place
        log = VersionLog(open_store(registry), "model")
        audit(log, INBOX.items())
        assert waiting(inbox) == []
        self.reference = self.reference or bits(log)
        assert bits(log) == self.reference


@pytest.fixture
def runs(make_url: MakeUrl, tmp_path: Path) -> Runs:
    """With the bits that one process comes to as reference."""
    registered(make_url("dataset"), make_url("base"))
    found = Runs(make_url, tmp_path)
    alone = found.begin("alone")
    assert [ended.how for ended in found.drained(1, alone)] == ["done"]
    found.check(alone)
    return found


def killed_and_again(runs: Runs, size: int, kill: tuple[int, Kill], then: int) -> None:
    """A rank is killed, which ends all; then so many ranks start again."""
    place = runs.begin(f"{size}-{kill[0]}-{kill[1].moment}".replace(" ", "-").replace("/", "-").replace("*", "x"))
    first = runs.drained(size, place, kill)
    assert first[kill[0]].how == "killed", f"the kill did not happen: {kill}"
    assert [ended.how for ended in runs.drained(then, place)] == ["done"] * then
    runs.check(place)


def moments(runs: Runs, size: int) -> list[Ended]:
    """At which each of so many ranks could be killed: of a run in which none is."""
    place = runs.begin(f"clean-{size}")
    found = runs.drained(size, place)
    assert [ended.how for ended in found] == ["done"] * size
    runs.check(place)
    return found


def test_a_rank_is_killed_and_fewer_or_more_go_on_with_the_same_bits(runs: Runs) -> None:
    """The sample of `make test`."""
    of_ranks = moments(runs, 2)
    for (rank, moment), then in zip([(0, -3), (1, 0.5)], [1, 4], strict=True):
        known = of_ranks[rank].moments
        at = known[moment if isinstance(moment, int) else int(moment * len(known))]
        killed_and_again(runs, 2, (rank, Kill(at)), then)


@pytest.mark.ranks
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("make_url", ["local", "s3"], indirect=True)
def test_any_rank_is_killed_at_any_moment(
    runs: Runs, full: bool, piece: slice, record_property: Callable[[str, object], None]
) -> None:
    """By (rank, moment): a sample of twenty, or each of them; afterwards as many ranks as before, or fewer, or more."""
    of_all = [
        (size, rank, moment)
        for size in (2, 4)
        for rank, ended in enumerate(moments(runs, size))
        for moment in ended.moments
    ]
    chosen = sample(of_all, None if full else 20)[piece]
    for size, rank, moment in chosen:
        then = random.Random(f"{size} {rank} {moment}").choice([1, 2, 4])
        killed_and_again(runs, size, (rank, Kill(moment)), then)
    figures = f"{len(chosen)} of {len(of_all)} moments"
    record_property("killed at", figures)
    print(f"killed at {figures}")


@pytest.mark.ranks
@pytest.mark.timeout(14_400)
def test_ranks_are_killed_again_and_again_while_their_number_changes(
    runs: Runs, full: bool, record_property: Callable[[str, object], None]
) -> None:
    """At random moments of random ranks, half of them in the middle of a call, until a run comes to its end."""
    known, kills = {size: moments(runs, size) for size in (2, 4)}, 0
    for number in range(100 if full else 3):
        draw, place = random.Random(number), runs.begin(str(number))
        for _ in range(12):
            size = draw.choice([2, 4])
            rank = draw.randrange(size)
            moment = draw.randrange(len(known[size][rank].moments))
            kill = Kill(moment, draw.choice([0.0, draw.uniform(0, 0.01)]))
            ended = runs.drained(size, place, (rank, kill))
            kills += ended[rank].how == "killed"
            if all(each.how == "done" for each in ended):
                break
        else:
            assert [each.how for each in runs.drained(4, place)] == ["done"] * 4
        runs.check(place)
    record_property("random kills", kills)
    print(f"{kills} random kills")
    assert kills >= 3


def add_up_in_pairs(store: str, rank: int) -> None:
    """As the ranks of a step with parts; the last one dies before its first sum."""
    group = joined(rank, 4, store, lambda _: None)
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    for distance in (1, 2):
        group.sum_pair_(torch.ones(1), distance)


def test_ranks_hear_at_once_of_one_that_dies_before_its_first_sum(tmp_path: Path) -> None:
    """No launcher ends them here, and they would wait for a living one for longer than this test waits for them."""
    children = [start_child(add_up_in_pairs, str(tmp_path / "store"), rank) for rank in range(4)]
    for child in children:
        child.join(DEADLINE)
    assert [child.exitcode for child in children] == [os.EX_TEMPFAIL] * 3 + [-signal.SIGKILL]


# ---- frozen ----------------------------------------------------------------------------------------------------------
FROZEN_SECONDS: Final = 10.0
"""How long the ranks of these tests wait for each other."""


def step_and_freeze(store: str, inbox: str, registry: str, result: Path) -> None:
    """A leader of two that stops itself before it creates a manifest."""
    freeze = act_once("create", "/log/", "before", lambda: os.kill(os.getpid(), signal.SIGSTOP))

    def step() -> None:
        run = online.OnlineRun(inbox, registry, "model", ONLINE, hooked(freeze, concurrency=1))
        _report(result, online.step(run).outcome.value)

    lead(joined(0, 2, store, lambda _: None, FROZEN_SECONDS), step, FROZEN_SECONDS)


def crew(store: str, rank: int, size: int, seconds: float) -> None:
    follow_orders(Crew(joined(rank, size, store, lambda _: None, seconds)))


@pytest.mark.ranks
def test_a_leader_that_is_frozen_before_its_commit_and_woken_after_that_of_others_changes_nothing(
    runs: Runs, tmp_path: Path
) -> None:
    place, result = runs.begin("frozen"), tmp_path / "outcome"
    leader = start_child(step_and_freeze, str(tmp_path / "store"), *place, result)
    follower = start_child(crew, str(tmp_path / "store"), 1, 2, FROZEN_SECONDS)
    wait_until(lambda: state_of(leader) in ("T", ""), seconds=DEADLINE, what="the leader stops itself")
    assert state_of(leader) == "T", "it ended instead; its traceback is above"
    follower.join(DEADLINE)
    assert follower.exitcode == os.EX_TEMPFAIL, "a crew that does not hear of its leader ends"

    assert [ended.how for ended in runs.drained(2, place)] == ["done", "done"]
    runs.check(place)

    assert leader.pid is not None
    os.kill(leader.pid, signal.SIGCONT)
    leader.join(DEADLINE)
    assert result.exists() is False or json.loads(result.read_text()) == ["lost"], "it has committed nothing"
    runs.check(place)


# ---- idle ------------------------------------------------------------------------------------------------------------
def follow_after_a_pause(store: str, inbox: str, registry: str, seconds: float, result: Path) -> None:
    """A leader that finds nothing in its inbox for twice as long as ranks wait for each other."""

    def run() -> None:
        opened = online.OnlineRun(inbox, registry, "model", ONLINE)
        before = online.step(opened).outcome
        until = time.monotonic() + 2 * seconds
        wait_until(lambda: time.monotonic() > until, seconds=60, what="a pause")
        fill(inbox, INBOX)
        while online.step(opened).outcome is not online.Outcome.IDLE:
            pass
        _report(result, before.value)

    lead(joined(0, 2, store, lambda _: None, seconds), run, seconds)


@pytest.mark.ranks
def test_a_crew_hears_of_its_idle_leader(runs: Runs, tmp_path: Path) -> None:
    inbox, registry = runs.make_url("idle/inbox"), runs.make_url("idle/registry")
    begin(runs.make_url("base"), inbox, registry)
    for key in INBOX:
        open_store(inbox).delete(key)
    result, seconds = tmp_path / "outcome", 10.0
    leader = start_child(follow_after_a_pause, str(tmp_path / "store"), inbox, registry, seconds, result)
    follower = start_child(crew, str(tmp_path / "store"), 1, 2, seconds)
    for child in (leader, follower):
        child.join(DEADLINE)
        assert child.exitcode == 0
    assert json.loads(result.read_text()) == ["idle"]
    runs.check((inbox, registry))


# ---- other bits ------------------------------------------------------------------------------------------------------
class Flips(Crew):
    """A rank in whose memory a bit of a weight changes after the second shard."""

    trained = 0

    def obey(self, order: Order) -> None:
        super().obey(order)
        if order.name == "shard":
            self.trained += 1
            if self.trained == 2:
                flip(self.held.learner.model)


def flip(model: torch.nn.Module) -> None:
    """The lowest bit of one weight."""
    next(model.parameters()).detach().view(-1).view(torch.int32)[0] ^= 1


def lead_and_flip(store: str, inbox: str, registry: str, result: Path, flips: bool, compares: bool) -> None:
    """Drain at the head of two ranks, and report how many steps were refused.

    Args:
        store: Where the ranks meet.
        inbox, registry: Where they train.
        result: The file of the report.
        flips: Whether a bit of this rank's weights changes after the second shard.
        compares: Whether the ranks compare their bits before a commit.
    """
    trained = refused = 0
    train_shard, agree = turns.train_shard, commit.agree

    def flipping(steps: Steps, *args: object, **named: object) -> object:
        nonlocal trained
        done = train_shard(steps, *args, **named)  # type: ignore[arg-type]
        trained += 1
        if flips and trained == 2:
            flip(steps.learner.model)
        return done

    def run() -> None:
        nonlocal refused
        opened = online.OnlineRun(inbox, registry, "model", ONLINE)
        while True:
            try:
                if online.step(opened).outcome is online.Outcome.IDLE:
                    return
            except RanksDiffer:
                assert VersionLog(open_store(registry), "model").head().number == 0, "nothing was committed"
                refused += 1

    with (
        patch.object(turns, "train_shard", flipping),
        patch.object(commit, "agree", agree if compares else lambda *_: None),
    ):
        lead(joined(0, 2, store, lambda _: None), run)
    _report(result, refused)


def crew_that_flips(store: str) -> None:
    follow_orders(Flips(joined(1, 2, store, lambda _: None)))


@pytest.mark.parametrize("whose", [pytest.param("leader", marks=pytest.mark.ranks), "crew"])
def test_one_flipped_bit_is_caught_before_the_commit_and_all_ranks_read_the_head_again(
    runs: Runs, tmp_path: Path, whose: str
) -> None:
    place, result, store = runs.begin(whose), tmp_path / "refused", str(tmp_path / "store")
    leader = start_child(lead_and_flip, store, *place, result, whose == "leader", True)
    follower = start_child(*((crew_that_flips, store) if whose == "crew" else (crew, store, 1, 2, SECONDS)))
    for child in (leader, follower):
        child.join(DEADLINE)
        assert child.exitcode == 0
    assert json.loads(result.read_text()) == [1]
    runs.check(place)


@pytest.mark.ranks
def test_without_the_comparison_a_flipped_bit_would_be_committed(runs: Runs, tmp_path: Path) -> None:
    """The control of the test above."""
    place, result, store = runs.begin("careless"), tmp_path / "refused", str(tmp_path / "store")
    leader = start_child(lead_and_flip, store, *place, result, True, False)
    follower = start_child(crew, store, 1, 2, SECONDS)
    for child in (leader, follower):
        child.join(DEADLINE)
        assert child.exitcode == 0
    assert json.loads(result.read_text()) == [0]
    with pytest.raises(AssertionError):
        runs.check(place)


# ---- what else runs in a rank ----------------------------------------------------------------------------------------
class AddsUp(MeanAbsoluteError):
    """A metric that adds up over all processes by itself, where there are several: so torchmetrics does, and so do users."""

    def compute(self) -> torch.Tensor:
        value = super().compute()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(value)
        return value


def lead_with_own_code(store: str, inbox: str, registry: str) -> None:
    os.environ["TIDEMILL_FACTORIES"] = "tests.ranks.test_deaths"
    lead(joined(0, 2, store, lambda _: None), lambda: doors.drain(inbox, registry, "model", ONLINE))


def crew_with_own_code(store: str) -> None:
    os.environ["TIDEMILL_FACTORIES"] = "tests.ranks.test_deaths"
    crew(store, 1, 2, SECONDS)


@pytest.mark.ranks
def test_metrics_that_add_up_over_all_processes_do_so_in_the_leader_alone_and_wait_for_nobody(
    make_url: MakeUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMILL_FACTORIES", "tests.ranks.test_deaths")
    metrics = ["tests.ranks.test_deaths:AddsUp", "torchmetrics:MeanAbsolutePercentageError"]
    registered(make_url("dataset"), make_url("base"), Spec.model_validate(SPEC.model_dump() | {"metrics": metrics}))
    place, store = (make_url("inbox"), make_url("registry")), str(tmp_path / "store")
    begin(make_url("base"), *place)
    children = start_child(lead_with_own_code, store, *place), start_child(crew_with_own_code, store)
    for child in children:
        child.join(DEADLINE)
        assert child.exitcode == 0
    audit(log := VersionLog(open_store(place[1]), "model"), INBOX.items())
    scored = log.head().manifest.metrics
    assert scored["addsup"] == pytest.approx(scored["mae"], rel=1e-5)
    assert scored["meanabsolutepercentageerror"] > 0


class Choosy(torch.nn.Linear):
    """A model that fails in training on a large number: on whichever rank has its row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and bool((x > 1e6).any()):
            raise ValueError("a number above a million")
        return super().forward(x)


def choosy(inputs: Inputs) -> torch.nn.Module:
    return Choosy(inputs.numbers, inputs.outputs)


@pytest.mark.ranks
def test_a_shard_on_which_the_model_fails_on_one_rank_is_rejected_and_the_bits_are_those_of_one_process(
    make_url: MakeUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMILL_FACTORIES", "tests.ranks.test_deaths")
    spec = Spec.model_validate(
        {
            "features": ["a", "b"],
            "target": "y",
            "model": {"factory": "tests.ranks.test_deaths:choosy"},
            "batch_size": 8,
            "parts": 2,
        }
    )
    registered(make_url("dataset"), make_url("base"), spec)
    bad = pq.read_table(pa.BufferReader(SHARDS["02.parquet"]))
    bad = bad.set_column(0, "a", [[*bad["a"].to_pylist()[:-1], 2e6]])
    shards = SHARDS | {"02.parquet": parquet(bad, 12)}
    found = []
    for name, size in (("alone", 1), ("together", 2)):
        place, store = (make_url(f"{name}/inbox"), make_url(f"{name}/registry")), str(tmp_path / name)
        begin(make_url("base"), *place)
        fill(place[0], shards)
        open_store(place[0]).delete("03b.parquet")
        if size == 1:
            doors.drain(*place, "model", ONLINE)
        else:
            children = start_child(lead_with_own_code, store, *place), start_child(crew_with_own_code, store)
            for child in children:
                child.join(DEADLINE)
                assert child.exitcode == 0
        log = VersionLog(open_store(place[1]), "model")
        (rejected,) = [r for version in log.history(log.head()) for r in version.manifest.rejected]
        assert (rejected.key, "a number above a million" in rejected.reason) == ("02.parquet", True)
        audit(log, shards.items())
        found.append(bits(log))
    assert found[0] == found[1]

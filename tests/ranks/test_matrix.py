"""The ranks of a group train what one process trains; with parts, the same bits, also where their number changes on the way."""

import math
from pathlib import Path

import pytest

from tests.guarantees.children import start_server
from tests.ranks import matrix
from tests.ranks.forked import ranks
from tests.ranks.matrix import DROPS, ROUGH, SETTINGS, Trained, largest, spec_of
from tests.training.test_steps import furthest
from tidemill.tasks.training.learner import Learner

NAMES = [name for name in SETTINGS if name != "compiled"]
"""Compiled steps take seconds on each rank."""


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


def agreeing(found: list[dict[str, Trained]]) -> dict[str, Trained]:
    """What all ranks have come to, bit for bit."""
    for other in found[1:]:
        assert {name: each.digest for name, each in other.items()} == {n: each.digest for n, each in found[0].items()}
        assert {name: each.losses for name, each in other.items()} == {n: each.losses for n, each in found[0].items()}
    return found[0]


@pytest.mark.parametrize(
    "size", [2, pytest.param(3, marks=pytest.mark.ranks), pytest.param(4, marks=pytest.mark.ranks)]
)
def test_ranks_without_parts_train_what_one_process_trains_up_to_the_order_of_sums(size: int) -> None:
    (alone,), together = ranks(1, matrix.train, NAMES, None), agreeing(ranks(size, matrix.train, NAMES, None))
    again = agreeing(ranks(size, matrix.train, NAMES, None))
    for name in NAMES:
        assert together[name].digest == again[name].digest, f"{name}: the same number of ranks gives the same bits"
        if name in DROPS:
            continue
        learners = [Learner.load(spec_of(name, None), *of[name][:2]) for of in (alone, together)]
        near, losses = ROUGH.get(name, 1e-6), zip(alone[name].losses, together[name].losses, strict=True)
        assert furthest(*learners) < near * largest(learners[0]), name
        assert all(math.isclose(one, other, rel_tol=near) for one, other in losses), name


def test_with_parts_any_number_of_ranks_trains_the_same_bits() -> None:
    (alone,) = ranks(1, matrix.train, NAMES, 4)
    for size in (2, 4):
        together = agreeing(ranks(size, matrix.train, NAMES, 4))
        assert [name for name in NAMES if together[name] != alone[name]] == []


@pytest.mark.ranks
def test_compiled_parts_have_the_same_bits_on_any_number_of_ranks() -> None:
    (alone,) = ranks(1, matrix.train, ["compiled"], 4)
    for size in (2, 4):
        assert agreeing(ranks(size, matrix.train, ["compiled"], 4)) == alone


@pytest.mark.ranks
def test_parts_that_inductor_compiles_have_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Machine code, made on each rank for the size of the part that it sees first: they differ, and the code must not."""
    found = [agreeing(ranks(size, matrix.train_by_inductor, str(tmp_path / str(size)))) for size in (1, 2)]
    assert found[0] == found[1]
    (eager,) = ranks(1, matrix.train, ["plain"], 4)
    compiled, plain = (
        Learner.load(spec_of(name, 4), *of[name][:2]) for name, of in (("compiled", found[0]), ("plain", eager))
    )
    assert compiled.counters.compiled_steps > plain.counters.compiled_steps == 0
    assert furthest(compiled, plain) < 1e-6 * largest(plain)


@pytest.mark.ranks
def test_the_number_of_ranks_may_change_from_shard_to_shard() -> None:
    (alone,) = ranks(1, matrix.train, NAMES, 4)
    found: dict[str, Trained] | None = None
    for shard, size in enumerate((4, 2, 1, 4)):
        found = agreeing(ranks(size, matrix.train, NAMES, 4, shard, shard + 1, found))
    assert found is not None
    assert [name for name in NAMES if found[name].digest != alone[name].digest] == []


def test_a_metric_that_would_add_up_over_all_ranks_is_of_the_one_that_scores(tmp_path: Path) -> None:
    """torchmetrics does so in torch's default group; the others do not score, and it would wait for them."""
    store = str(tmp_path / "store")
    (alone,), (leader, other) = ranks(1, matrix.score_alone, store), ranks(2, matrix.score_alone, store)
    assert leader == alone
    assert set(alone) == {"mae", "rmse", "r2score"}
    assert other == {}


def test_what_fails_on_the_part_of_one_rank_fails_on_all_with_the_same_words() -> None:
    """Else the others would wait, and a shard at fault would end all ranks each time it is tried."""
    (alone,) = ranks(1, matrix.fail)
    assert alone[0] == "ModelError"
    assert "RuntimeError: a row that I do not like" in alone[1]
    told = set(ranks(2, matrix.fail))
    assert len(told) == 1
    [(kind, words)] = told
    assert kind == "ModelError"
    assert "RuntimeError: a row that I do not like" in words
    assert "float32[8, 4]" in words, "the shape of the part"

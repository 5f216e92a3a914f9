"""The stretches of a stream: every shard is in one, means are weighted by rows, and the error is that of the whole."""

import math

import pytest

from tidemill.tasks.choosing.stretches import Pair, cut, difference, same, whole


def pairs(count: int) -> list[Pair]:
    return [
        Pair(i // 2 + 1, 10 * (i + 1), {"mae": float(i)}, {"mae": 1.0}, {} if i % 2 else {"mae": 2.0})
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 9, 10, 11, 37])
def test_every_shard_is_in_one_stretch(count: int) -> None:
    found = cut(pairs(count), "mae")
    assert len(found) == min(10, count)
    assert sum(stretch.shards for stretch in found) == count
    assert [stretch.begin for stretch in found] == [
        sum(stretch.shards for stretch in found[:i]) for i in range(len(found))
    ]
    assert sum(stretch.rows for stretch in found) == whole(pairs(count), "mae").rows


def test_means_are_weighted_by_rows_and_over_the_shards_that_have_the_score() -> None:
    total = whole(pairs(3), "mae")
    assert total.spec == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
    assert (total.learner, total.champion) == (1.0, 2.0)
    assert whole(pairs(3), "rmse").spec is None


def test_the_difference_has_the_standard_error_of_a_weighted_mean() -> None:
    found = difference(pairs(3), "mae")
    assert found is not None
    mean, error = found
    assert mean == pytest.approx((-1 * 10 + 0 * 20 + 1 * 30) / 60)
    squares = sum((rows * (between - mean)) ** 2 for rows, between in ((10, -1), (20, 0), (30, 1)))
    assert error == pytest.approx(math.sqrt(squares * 3 / 2) / 60)
    assert difference(pairs(1), "mae") == (-1.0, None)
    assert difference(pairs(3), "rmse") is None


def test_of_no_shard_there_is_nothing_to_tell() -> None:
    assert cut([], "mae") == []
    assert whole([], "mae").shards == 0


def test_shards_are_the_same_if_all_their_scores_are() -> None:
    one = Pair(1, 5, {"mae": 1.0, "rmse": 2.0}, {"mae": 1.0, "rmse": 2.0}, {})
    other = Pair(1, 5, {"mae": 1.0, "rmse": 2.0}, {"mae": 1.0, "rmse": 2.0 + 1e-15}, {})
    assert same([one, other]) == 1

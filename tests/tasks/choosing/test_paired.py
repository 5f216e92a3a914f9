"""Errors in pairs: the measures are those of their definitions, and the standard error is what drawing rows again shows."""

import math

import pytest
import torch

from tidemill.tasks.choosing.paired import CLIP, Measure, RowErrors, difference


def kept(measure: Measure, *batches: tuple[list[float] | list[list[float]], list[float]]) -> RowErrors:
    errors = RowErrors(measure)
    for predicted, actual in batches:
        errors.update(torch.tensor(predicted), torch.tensor(actual))
    return errors


def test_each_row_keeps_its_error_whatever_the_batches() -> None:
    errors = kept("rmse", ([1.0, 2.0], [1.0, 4.0]), ([0.0], [3.0]))
    assert errors.errors_N.tolist() == [0.0, 4.0, 9.0]
    assert errors.compute() == math.sqrt(13 / 3)
    assert kept("mae", ([1.0, 2.0], [1.0, 4.0])).compute() == 1.0


def test_of_several_targets_a_row_has_the_mean_error() -> None:
    errors = RowErrors("mae")
    errors.update(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 1.0]]))
    assert errors.errors_N.tolist() == [2.0, 0.5]


def test_a_label_costs_the_logarithm_of_its_probability() -> None:
    two = kept("log_loss", ([0.25, 0.25], [1, 0]))
    assert two.errors_N.tolist() == pytest.approx([-math.log(0.25), -math.log(0.75)])
    three = kept("log_loss", ([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [1, 2]))
    assert three.errors_N.tolist() == pytest.approx([-math.log(0.3), -math.log(0.8)])


def test_certainty_of_what_did_not_come_costs_much_and_is_no_infinity() -> None:
    assert kept("log_loss", ([0.0, 1.0], [1, 0])).errors_N.tolist() == pytest.approx([-math.log(CLIP)] * 2)


def test_the_difference_is_that_of_the_measures() -> None:
    draw = torch.Generator().manual_seed(1)
    one_N, other_N = torch.rand(2, 500, generator=draw, dtype=torch.float64)
    assert difference(one_N, other_N, "rmse")[0] == pytest.approx(one_N.mean().sqrt() - other_N.mean().sqrt())
    assert difference(one_N, other_N, "mae")[0] == pytest.approx(one_N.mean() - other_N.mean())


@pytest.mark.parametrize("measure", ["rmse", "mae"])
def test_the_standard_error_is_what_rows_drawn_again_show(measure: Measure) -> None:
    """The bootstrap, of errors that go together as those of two models on the same rows do."""
    draw = torch.Generator().manual_seed(2)
    both_N, own_N = torch.randn(2, 400, generator=draw, dtype=torch.float64)
    one_N, other_N = (both_N + 0.3 * own_N).square(), both_N.square()
    found = []
    for _ in range(400):
        rows = torch.randint(400, (400,), generator=draw)
        found.append(difference(one_N[rows], other_N[rows], measure)[0])
    assert difference(one_N, other_N, measure)[1] == pytest.approx(torch.tensor(found).std().item(), rel=0.15)


def test_two_that_are_never_wrong_do_not_differ() -> None:
    none_N = torch.zeros(3, dtype=torch.float64)
    assert difference(none_N, none_N, "rmse") == (0.0, 0.0)

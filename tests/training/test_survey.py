"""Columns that a pattern has chosen and that tell nothing are left out, in the one pass over the dataset."""

from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.training.rows import Noted, cut
from tidemill.tasks.training import survey
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.fitting import fit
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.resolving import Resolved
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.survey import CONSTANT, NULL, ONE_PER_ROW, TOO_CLOSE

ROWS = 120
FLOATS = torch.linspace(0, 1, ROWS).tolist()


def fitted(column: Any, features: Any = "*", split: Split | None = None) -> tuple[Resolved, Features]:
    """A dataset of the columns x, a and y in three row groups."""
    table = pa.table({"x": column, "a": FLOATS, "y": FLOATS[::-1]})
    groups = cut(table, 50, 20)
    return fit(Spec(features=features, target="y"), [("part", table.schema)], table.schema, groups, split)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([3.0] * ROWS), CONSTANT),
        (pa.array([True] * ROWS), CONSTANT),
        (pa.array(["one"] * ROWS), CONSTANT),
        (pa.array(["one"] * ROWS).dictionary_encode(), CONSTANT),
        (pa.array([[1.0, 2.0]] * ROWS, pa.list_(pa.float32(), 2)), CONSTANT),
        (pa.array([2**62 + i for i in range(ROWS)]), TOO_CLOSE),
        (pa.nulls(ROWS, pa.float64()), NULL),
        (pa.nulls(ROWS, pa.string()), NULL),
        (pa.array(range(ROWS)), ONE_PER_ROW),
        (pa.array(range(ROWS, 0, -1), pa.int16()), ONE_PER_ROW),
        (pa.array([2 * i for i in range(ROWS)]), ONE_PER_ROW),
        (pa.array([f"id {i}" for i in range(ROWS)]), ONE_PER_ROW),
        (pa.array([f"free text {i % 115}" for i in range(ROWS)]), ONE_PER_ROW),
        (pa.array([str(i).encode() for i in range(ROWS)]), ONE_PER_ROW),
        (pa.array([3.0] * (ROWS - 1) + [3.5]), None),
        (pa.array(["one"] * (ROWS - 1) + ["two"]), None),
        (pa.array(["one"] * (ROWS - 1) + [None]), None),
        (pa.array([3.0] * (ROWS - 1) + [None]), None),
        (pa.array([f"group {i // 2}" for i in range(ROWS)]), None),
        (pa.array([f"seldom {i}" if i < 8 else None for i in range(ROWS)]), None),
        (pa.array([1900 + i for i in range(ROWS)]), None),
        (pa.array([10 * i for i in range(ROWS)]), None),
        (pa.array([-i for i in range(ROWS)]), None),
        (pa.array([0, *range(ROWS - 1)]), None),
        (pa.array([float(i) for i in range(ROWS)]), None),
        (pa.array([[i] for i in range(ROWS)]), None),
    ],
)
def test_what_tells_nothing_is_left_out_of_a_pattern(column: pa.Array, reason: str | None) -> None:
    resolved, features = fitted(column)
    names = [c.name for c in features.columns]
    assert [c.name for c in resolved.spec.features] == names
    assert (resolved.unused.get("x"), "x" in names) == (reason, reason is None)


def test_what_is_named_stays_if_it_can_be_used_at_all() -> None:
    for column in (pa.array([3.0] * ROWS), pa.array(range(ROWS)), pa.array([f"id {i}" for i in range(ROWS)])):
        resolved, features = fitted(column, ["x", "*"])
        assert ([c.name for c in features.columns], resolved.unused) == (["x", "a"], {})
    with pytest.raises(ColumnError, match="column 'x' is null in all 120 rows of the dataset: remove it from features"):
        fitted(pa.nulls(ROWS, pa.float64()), ["x", "*"])


def test_the_others_have_the_statistics_that_they_have_alone() -> None:
    split = Split(0.2, side="train")
    _, features = fitted(pa.array(range(ROWS)), split=split)
    _, alone = fitted(pa.array(range(ROWS)), "a", split)
    assert features.statistics is not None
    assert alone.statistics is not None
    assert features.state()[1] == alone.state()[1]
    for name, tensor in features.state()[0].items():
        assert torch.equal(tensor, alone.state()[0][name])


def test_no_column_left_is_an_error_that_says_why() -> None:
    table = pa.table({"x": range(ROWS), "c": [1] * ROWS, "y": FLOATS})
    with pytest.raises(ColumnError) as error:
        fit(Spec(target="y"), [("part", table.schema)], table.schema, cut(table, 50))
    assert str(error.value).startswith("no column of the dataset is left for features (")
    assert f"'x' is {ONE_PER_ROW}" in str(error.value)
    assert f"'c' is {CONSTANT}" in str(error.value)


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ([2**62 + i for i in range(ROWS)], True),
        ([2**62 + max(0, i - 60) for i in range(ROWS)], True),  # none of them in the first row group
        ([1_764_400_000_000_000 + i for i in range(ROWS)], True),  # microseconds, which float64 still tells apart
        ([1_764_400_000 + i / 1e6 for i in range(ROWS)], True),  # the same in seconds
        ([2**62] * ROWS, False),
        ([0.0, -0.0] * (ROWS // 2), False),
    ],
)
@pytest.mark.parametrize("more", [{}, {"task": "regression"}, {"loss": "huber"}, {"recipe": 1}, {"target": ("x", "y")}])
def test_a_target_whose_differences_are_lost_is_refused(
    target: list[float], refused: bool, more: dict[str, Any]
) -> None:
    table = pa.table({"a": FLOATS, "x": FLOATS, "y": target})
    with (
        pytest.raises(ColumnError, match="'y' of the dataset has values that differ by less than float32")
        if refused
        else nullcontext()
    ):
        fit(Spec.model_validate({"target": "y"} | more), [("part", table.schema)], table.schema, cut(table, 50))


def test_what_only_held_out_rows_have_of_a_target_or_of_a_column_is_not_called_a_lost_difference() -> None:
    split = Split(0.2, side="train")
    table = pa.table({"x": [5] * ROWS, "a": FLOATS, "y": [0.5] * ROWS})
    trained = split.rows(cut(table, ROWS)[0]).tolist()
    other = trained.index(False)
    wholes, halves = [5] * ROWS, [0.5] * ROWS
    wholes[other], halves[other] = 6, 7.5
    table = table.set_column(0, "x", pa.array(wholes)).set_column(2, "y", pa.array(halves))
    resolved, _ = fit(Spec(features="*", target="y"), [("part", table.schema)], table.schema, cut(table, ROWS), split)
    assert resolved.unused == {"x": CONSTANT}


def test_it_is_one_pass_over_the_row_groups() -> None:
    table = pa.table({"x": [f"id {i}" for i in range(ROWS)], "a": FLOATS, "y": ["p", "q"] * (ROWS // 2)})
    groups: list[Noted] = cut(table, 50, 20)
    fit(Spec(target="y"), [("part", table.schema)], table.schema, groups)
    assert [len(group.reads) for group in groups] == [1, 1, 1]


def test_text_is_judged_by_its_first_rows_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "JUDGED_ROWS", 60)
    texts = [f"id {i}" for i in range(60)] + ["the same"] * 60
    assert fitted(pa.array(texts))[0].unused == {"x": ONE_PER_ROW}
    for same in (65, 100):
        assert fitted(pa.array(["the same"] * same + ["another"] * (ROWS - same)))[0].unused == {}
    monkeypatch.setattr(survey, "JUDGED_BYTES", 1000)
    assert fitted(pa.array([f"text {i % 6} " * 50 for i in range(ROWS)]))[0].unused == {"x": ONE_PER_ROW}

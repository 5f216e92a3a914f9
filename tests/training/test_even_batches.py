"""A pass is cut into batches that differ by at most one row: no row is alone in a batch, unless it is alone."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.rows import begin, cut, numbers_table, plain_spec
from tidemill.tasks.training.cutting import even
from tidemill.tasks.training.errors import ColumnError, ModelError
from tidemill.tasks.training.groups import RowGroup, Split
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import train_pass, train_shard
from tidemill.tasks.training.steps import Steps

BATCH_NORM = {"factory": "tests.training.rows:DropoutNet"}


class Sizes(nn.Linear):
    """Notes the number of rows that it is trained on; refuses a single one, as a batch norm does."""

    def __init__(self) -> None:
        super().__init__(10, 1)
        self.seen: list[int] = []

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.training:
            self.seen.append(len(x_BF))
        return super().forward(x_BF)


def sizes_of(learner: Learner) -> list[int]:
    assert isinstance(learner.model, Sizes)
    return learner.model.seen


def noting(**settings: Any) -> Any:
    return plain_spec(model={"factory": f"{__name__}:Sizes"}, **settings)


@given(st.integers(0, 5000), st.integers(1, 300))
def test_batches_differ_by_at_most_one_row(rows: int, at_most: int) -> None:
    sizes = [size for size, count in even(rows, at_most) for _ in range(count)]
    assert sum(sizes) == rows
    assert len(sizes) == -(-rows // at_most)
    assert max(sizes, default=0) <= at_most
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert 1 not in sizes or at_most <= 2 or rows == 1


@pytest.mark.parametrize("rows", [1, 64, 65, 129, 200])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_over_row_groups_with_holes_and_a_holdout_is_cut_evenly(rows: int, shuffle: bool) -> None:
    table = numbers_table(3 * rows)
    y = pa.array([None if i % 3 == 0 else float(i) for i in range(3 * rows)], pa.float32())
    groups = cut(table.set_column(10, "y", y), rows // 2, rows)
    split = Split(0.5, side="train")
    spec = noting(batch_size=16, shuffle=shuffle, shuffle_bytes=2 * 50 * 30)
    learner = begin(spec, groups)
    labelled = learner.features.labelled_rows(groups, split)
    present = [torch.tensor(group.table.column("y").is_valid().to_pylist(), dtype=torch.bool) for group in groups]
    expected = sum(int((split.rows(group) & here).sum()) for group, here in zip(groups, present, strict=True))
    assert labelled == expected
    result = train_pass(Steps(learner), groups, key=("epoch", 0), split=split)
    assert result.rows == labelled
    assert sizes_of(learner) == [size for size, count in even(labelled, 16) for _ in range(count)]


def test_the_statistics_count_the_rows_that_the_passes_are_cut_by() -> None:
    table = numbers_table(60).set_column(10, "y", pa.array([None, 1.0, 2.0] * 20, pa.float32()))
    groups = cut(table, 33)
    split = Split(0.3, side="train")
    features = begin(plain_spec(), groups).features.fit(groups, split)
    assert features.statistics is not None
    assert features.statistics.labelled == features.labelled_rows(groups, split) < 40
    learner = Learner.create(noting(), features)
    assert Learner.load(learner.spec, *learner.dump()).features.statistics.labelled == features.statistics.labelled  # type: ignore[union-attr]


def test_a_shard_is_cut_evenly_and_so_it_is_with_old_rows() -> None:
    spec = noting(batch_size=16, replay={"rows": 50, "ratio": 1.0})
    learner = begin(spec, cut(numbers_table(16)))
    steps = Steps(learner)
    for rows in (33, 17):
        train_shard(steps, cut(numbers_table(rows), rows // 2), 1)
    assert sizes_of(learner) == [11, 11, 11, 18, 16]


def test_a_batch_norm_is_trained_on_any_number_of_rows_but_one() -> None:
    groups = cut(numbers_table(65))
    for mode in ("off", "on"):
        spec = plain_spec(model=BATCH_NORM, batch_size=16, compile=mode)
        learner = begin(spec, groups)
        assert train_pass(Steps(learner, backend="aot_eager"), groups, key=("epoch", 0)).rows == 65
    one = cut(numbers_table(1))
    with pytest.raises(ModelError, match=r"on a single row raised ValueError: Expected more than 1 value per channel"):
        train_shard(Steps(begin(plain_spec(model=BATCH_NORM), groups)), one, 1)


class Rewritten:
    """A row group that has other rows when it is read again."""

    def __init__(self, group: Any, other: pa.Table) -> None:
        self.group, self.other, self.reads = group, other, 0
        self.name, self.num_rows, self.schema = group.name, group.num_rows, group.schema

    def read(self, columns: Sequence[str]) -> pa.Table:
        self.reads += 1
        return (self.group.table if self.reads == 1 else self.other).select(list(columns))


@pytest.mark.parametrize("nulls", [0, 20])
def test_another_number_of_labels_than_was_counted_is_an_error(nulls: int) -> None:
    def labelled(missing: int) -> pa.Table:
        y = pa.array([None] * missing + [1.0] * (40 - missing), pa.float32())
        return numbers_table(40).set_column(10, "y", y)

    groups: list[RowGroup] = [Rewritten(cut(labelled(20 - nulls))[0], labelled(nulls))]
    learner = begin(plain_spec(batch_size=7), cut(numbers_table(40)))
    with pytest.raises(ColumnError, match="rewritten"):
        train_pass(Steps(learner), groups, key=("epoch", 0))

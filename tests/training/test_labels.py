"""Labels that are no class numbers: learned in the pass, numbered, read, and given back."""

import json
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.training.rows import begin, cut, encoded
from tidemill.tasks.training.classes import LONGEST, MOST, Values, class_numbers, predicted_columns
from tidemill.tasks.training.errors import ColumnError, SpecError, StateMismatch
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.fitting import fit
from tidemill.tasks.training.groups import Split, TableGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.made_up import made_up
from tidemill.tasks.training.resolving import Resolved
from tidemill.tasks.training.spec import Spec

REPEAT = 10


def fitted(labels: Any, split: Split | None = None, /, **settings: Any) -> tuple[Resolved, Features]:
    """A dataset whose target has these labels, in several row groups."""
    target = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table({"a": torch.linspace(0, 1, len(target)).numpy(), "y": target})
    groups = cut(table, len(target) // 3, len(target) // 4)
    return fit(Spec(target="y", **settings), [("part", table.schema)], table.schema, groups, split)


@pytest.mark.parametrize(
    ("labels", "settings", "task", "classes", "expected"),
    [
        (["yes", "no"] * REPEAT, {}, "binary", None, ("no", "yes")),
        ([True, False] * REPEAT, {}, "binary", None, (False, True)),
        ([True] * REPEAT, {}, "binary", None, (False, True)),
        ([0, 1] * REPEAT, {}, "binary", None, None),
        ([0.0, 1.0, None] * REPEAT, {}, "binary", None, None),
        ([1, 2] * REPEAT, {}, "binary", None, (1, 2)),
        ([-1, 1] * REPEAT, {}, "binary", None, (-1, 1)),
        ([0, 1, 2] * REPEAT, {}, "multiclass", 3, None),
        ([4, 2, 3, 1] * REPEAT, {}, "multiclass", 4, (1, 2, 3, 4)),
        ([0, 2, 3] * REPEAT, {}, "multiclass", 3, (0, 2, 3)),
        ([1.0, 2.0, 3.0, None] * REPEAT, {}, "multiclass", 3, (1, 2, 3)),
        (["b", "ä", "a", ""] * REPEAT, {}, "multiclass", 4, ("", "a", "b", "ä")),
        (pa.array(["x", "y", "z"] * REPEAT).dictionary_encode(), {}, "multiclass", 3, ("x", "y", "z")),
        (pa.array([b"x", b"y"] * REPEAT), {}, "binary", None, ("x", "y")),
        (pa.array([1, 2, 3] * REPEAT, pa.decimal128(5, 2)), {}, "multiclass", 3, (1, 2, 3)),
        (pa.array([1, 2, 2**63] * REPEAT, pa.uint64()), {}, "regression", None, None),
        ([0.5, 1.5] * REPEAT, {}, "regression", None, None),
        ([7] * REPEAT, {}, "regression", None, None),
        (list(range(20)) * 2, {}, "multiclass", 20, None),
        ([*range(20), 0], {}, "regression", None, None),
        (list(range(21)) * REPEAT, {}, "regression", None, None),
        ([0, 1] * REPEAT, {"task": "regression"}, "regression", None, None),
        ([0, 1] * REPEAT, {"loss": "l1"}, "regression", None, None),
        ([0, 1] * REPEAT, {"standardize_target": True}, "regression", None, None),
        ([True, False] * REPEAT, {"task": "regression"}, "regression", None, None),
        ([True, False] * REPEAT, {"task": "binary"}, "binary", None, None),
        ([0, 1, 1] * REPEAT, {"task": "binary"}, "binary", None, None),
        ([1] * REPEAT, {"task": "binary"}, "binary", None, None),
        (["p", "q"] * REPEAT, {"task": "binary"}, "binary", None, ("p", "q")),
        ([5, 6] * REPEAT, {"task": "binary"}, "binary", None, (5, 6)),
        ([0, 2] * REPEAT, {"task": "multiclass", "classes": 5}, "multiclass", 5, None),
        ([0, 2] * REPEAT, {"classes": 5}, "multiclass", 5, None),
        ([1, 2, 3] * REPEAT, {"task": "multiclass", "classes": 3}, "multiclass", 3, (1, 2, 3)),
        ([True, False] * REPEAT, {"task": "multiclass"}, "multiclass", 2, (False, True)),
        (list(range(30)) * 2, {"task": "multiclass"}, "multiclass", 30, None),
        (list(range(1500)) * 2, {"classes": 2000}, "multiclass", 2000, None),
        (["a", "b", "c"], {}, None, None, "about one a row"),
    ],
)
def test_the_target_tells_the_task_and_its_labels(
    labels: Any, settings: dict[str, Any], task: str | None, classes: int | None, expected: Any
) -> None:
    if task is None:
        with pytest.raises(ColumnError, match=expected):
            fitted(labels, **settings)
        return
    resolved, features = fitted(labels, **settings)
    assert (resolved.spec.task, resolved.spec.classes, resolved.labels) == (task, classes, expected)
    assert (features.task, features.classes, features.labels) == (task, classes, expected)
    assert Resolved.model_validate_json(resolved.model_dump_json()) == resolved
    Learner.create(resolved.spec, features)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([f"name {i}" for i in range(30)], {}, "has 30 labels in 30 rows, about one a row, as an id or free text has"),
        ([f"name {i // 2}" for i in range(59)], {}, "has 30 labels in 59 rows"),
        ([f"{i}" for i in range(MOST + 1)] * 3, {}, "has more than 1,000 distinct values"),
        (
            ["x" * (LONGEST + 1), "y"] * REPEAT,
            {},
            "which is no label: labels are booleans, whole numbers, or text of at",
        ),
        (pa.array([b"\xff", b"y"] * REPEAT), {}, "which is no label"),
        (["only"] * REPEAT, {}, "is 'only' in all rows: nothing can be learned"),
        ([7] * REPEAT, {"task": "binary"}, "is 7 in all rows"),
        ([0, 1, 2] * REPEAT, {"task": "binary"}, r"has 3 labels \(0, 1, 2\), and binary was asked for with 2"),
        (["a", "b", "c"] * REPEAT, {"loss": "bce"}, "has 3 labels .'a', 'b', 'c'., and binary was asked for with 2"),
        (["a", "b", "c"] * REPEAT, {"classes": 4}, "has 3 labels .*, and multiclass was asked for with 4"),
        ([0.5, 1.0] * REPEAT, {"task": "binary"}, "holds 0.5, which is no label"),
        (pa.array([None] * REPEAT, pa.string()), {}, "target 'y' is null in all 10 rows"),
        (pa.array([None] * REPEAT, pa.float64()), {}, "target 'y' is null in all 10 rows"),
        (["a", "b"] * REPEAT, {"task": "regression"}, "target 'y' of the dataset has type text: write a number"),
        (pa.array([[1], [2]] * REPEAT), {}, "target 'y' of the dataset has type list of int64: write a number"),
    ],
)
def test_what_can_be_no_classes_is_refused_with_the_reason(labels: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        fitted(labels, **settings)


def test_what_the_target_decides_must_fit_the_rest_of_the_spec() -> None:
    with pytest.raises(SpecError, match=r"which gives task 'regression': class_weights are for"):
        fitted([0.5, 1.5] * REPEAT, class_weights="balanced")
    with pytest.raises(SpecError, match=r"class_weights holds 2 weights for 3 classes"):
        fitted(["a", "b", "c"] * REPEAT, class_weights=(1.0, 2.0))


def test_a_label_that_only_held_out_rows_have_is_known() -> None:
    split = Split(0.3, side="train")
    table = pa.table({"a": torch.linspace(0, 1, 300).numpy(), "y": ["common"] * 300})
    groups = cut(table, 300)
    rare = int((~split.rows(groups[0])).nonzero()[0])
    labels = ["common"] * 299
    labels.insert(rare, "rare")
    group = TableGroup(groups[0].name, table.set_column(1, "y", pa.array(labels)))
    resolved, features = fit(Spec(target="y"), [("part", table.schema)], table.schema, [group], split)
    assert resolved.labels == ("common", "rare")
    assert features.statistics is not None
    assert resolved.class_counts == (features.statistics.rows, 0)


def test_statistics_are_those_of_the_class_numbers() -> None:
    numbers, labels = [2, 0, 1, 1, None, 2] * REPEAT, ["c", "a", "b", "b", None, "c"] * REPEAT
    _, plain = fitted(numbers, task="multiclass", classes=3, class_weights="balanced")
    resolved, named = fitted(labels, class_weights="balanced")
    assert plain.statistics is not None
    assert named.statistics is not None
    assert resolved.class_counts == (10, 20, 20)
    assert named.statistics.class_counts is not None
    assert plain.statistics.class_counts is not None
    assert named.statistics.class_counts.tolist() == plain.statistics.class_counts.tolist() == [10, 20, 20]
    torch.testing.assert_close(named.statistics.target_mean, plain.statistics.target_mean)
    torch.testing.assert_close(named.statistics.target_std, plain.statistics.target_std)
    assert (named.statistics.rows, named.statistics.labelled) == (60, 50)


def test_a_spec_that_states_its_classes_has_the_statistics_and_the_state_of_before() -> None:
    table = pa.table({"a": torch.linspace(0, 1, 60).numpy(), "y": [0, 1, 2] * 20})
    spec = Spec(features=["a"], target="y", task="multiclass", classes=3)
    before = Features.resolve(spec, table.schema).fit(cut(table, 20, 15))
    resolved, now = fit(spec, [("part", table.schema)], table.schema, cut(table, 20, 15))
    assert resolved.spec == spec
    assert Learner.create(spec, now).dump() == Learner.create(spec, before).dump()
    assert rb"\"format\": \"1.0\"" in Learner.create(spec, now).dump()[1]


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (("no", "yes"), pa.array(["yes", None, "no"]), [1, None, 0]),
        (("no", "yes"), pa.array(["yes", None, "no"]).dictionary_encode(), [1, None, 0]),
        (("no", "yes"), pa.array([b"no", b"yes"], pa.large_binary()), [0, 1]),
        (("no", "yes"), pa.array(["no"], pa.string_view()), [0]),
        (("no", "yes"), pa.nulls(2, pa.string()), [None, None]),
        ((False, True), pa.array([True, None, False]), [1, None, 0]),
        ((False, True), pa.array([1, 0], pa.int8()), [1, 0]),
        ((1, 2, 4), pa.array([4, 1, None, 2], pa.int8()), [2, 0, None, 1]),
        ((1, 2, 4), pa.array([4.0, 1.0]), [2, 0]),
        ((1, 2, 4), pa.array([4, 1], pa.uint64()), [2, 0]),
        ((1, 2, 4), pa.array([4, 1], pa.decimal128(6, 3)), [2, 0]),
        ((-(2**63), 2**63 - 1), pa.array([2**63 - 1, -(2**63)]), [1, 0]),
    ],
)
def test_labels_are_read_as_class_numbers_whatever_their_type(labels: Any, given: pa.Array, expected: Any) -> None:
    assert class_numbers(given, labels, "y", "s.parquet").to_pylist() == expected


@pytest.mark.parametrize(
    ("labels", "given", "shown"),
    [
        (("no", "yes"), pa.array(["no", "maybe", "what"]), "'maybe'"),
        (("no", "yes"), pa.array(["Yes"]), "'Yes'"),
        (("no", "yes"), pa.array([b"\xff"]), "'\ufffd'"),
        ((1, 2), pa.array([1, 3]), "3"),
        ((1, 2), pa.array([1.5]), "1.5"),
        ((1, 2), pa.array([float("nan")]), "nan"),
        ((1, 2), pa.array([2**64 - 1], pa.uint64()), "1.84467e+19"),
        ((False, True), pa.array([2], pa.int8()), "2"),
    ],
)
def test_a_label_that_nobody_knows_is_named(labels: Any, given: pa.Array, shown: str) -> None:
    with pytest.raises(ColumnError) as error:
        class_numbers(given, labels, "y", "s.parquet")
    assert str(error.value).startswith(
        f"target 'y' of s.parquet holds {shown}, which is none of the model's 2 labels ("
    )


def test_a_learner_with_labels_comes_back_and_says_so_in_its_format() -> None:
    resolved, features = fitted(["no", "yes"] * REPEAT)
    learner = Learner.create(resolved.spec, features)
    weights, state = learner.dump()
    assert rb"\"format\": \"1.1\"" in state
    again = Learner.load(resolved.spec, weights, state)
    assert again.features.labels == ("no", "yes")
    assert again.dump() == (weights, state)
    rows = encoded(again.features, pa.table({"a": [1.0, 2.0], "y": ["yes", None]}))
    assert (rows.y_N.tolist(), rows.labelled_N.tolist()) == ([1, 0], [True, False])
    short = state.replace(rb"[\"no\", \"yes\"]", rb"[\"no\"]         ")
    with pytest.raises(StateMismatch, match="labels are no 2 labels"):
        Learner.load(resolved.spec, weights, short)


def test_made_up_rows_have_labels_of_the_model() -> None:
    _, features = fitted(["b", "a", "c"] * REPEAT)
    rows = made_up(features, 5)
    assert rows.table.column("y").to_pylist() == ["a", "b", "c", "a", "b"]
    assert encoded(features, rows.table).y_N.tolist() == [0, 1, 2, 0, 1]


def test_predictions_are_labels_with_the_probabilities_of_all() -> None:
    (field, predicted), (other, probabilities) = predicted_columns(torch.tensor([0.25, 0.75, 0.5]), ("no", "yes"))
    assert (field.name, field.type, predicted.to_pylist()) == ("prediction", pa.string(), ["no", "yes", "no"])
    assert (other.name, other.type) == ("probabilities", pa.list_(pa.float32(), 2))
    assert probabilities.to_pylist() == [[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]
    assert json.loads(other.metadata[b"labels"]) == ["no", "yes"]
    outputs = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    (field, predicted), (_, probabilities) = predicted_columns(outputs, (1, 2, 40))
    assert (field.type, predicted.to_pylist()) == (pa.int64(), [2, 1])
    assert probabilities.to_pylist()[1] == pytest.approx([0.5, 0.2, 0.3])
    (field, _), _ = predicted_columns(torch.tensor([0.9]), (False, True))
    assert field.type == pa.bool_()


def test_predictions_without_labels_are_what_they_were() -> None:
    [(field, values)] = predicted_columns(torch.tensor([0.25, 3.0]), None)
    assert (field.name, field.type, values.to_pylist()) == ("prediction", pa.float32(), [0.25, 3.0])
    [(field, values)] = predicted_columns(torch.tensor([[0.25, 0.75]]), None)
    assert (field.type, values.to_pylist()) == (pa.list_(pa.float32(), 2), [[0.25, 0.75]])


def test_the_pass_keeps_no_more_than_its_bound_of_values() -> None:
    values = Values(most=100)
    for at in range(0, 1000, 90):
        values.add(pa.array([str(i) for i in range(at, at + 90)]), None)
    assert values.none == "has more than 100 distinct values"
    assert values.counts == {}


def test_a_model_without_labels_refuses_text() -> None:
    table = pa.table({"a": [1.0, 2.0], "y": [0.5, 1.0]})
    learner = begin(Spec(features=["a"], target="y"), cut(table, 1))
    with pytest.raises(ColumnError, match="column 'y' of s has type text, but the model was begun with a number"):
        learner.features.check(pa.schema([("a", pa.float64()), ("y", pa.string())]), "s")

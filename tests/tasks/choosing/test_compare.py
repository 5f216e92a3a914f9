"""Several specs on the same rows: the table has what each was found to be, ranked, with how sure that is."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from tests.data import keys, put, rows
from tidemill.storage.errors import PlacesOverlap
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.choosing.compare import compare
from tidemill.tasks.choosing.page import ShownComparison
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.errors import SpecError, TrainingError
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]


def spec(**changes: Any) -> Spec:
    return Spec.model_validate({"features": ["a", "b"], "target": "y", "learning_rate": 0.1, "epochs": 3} | changes)


def labelled(count: int, seed: int, **values: Any) -> pa.Table:
    """A label that follows from a and b."""
    table = rows(count, seed)
    above = [value > 0 for value in table["y"].to_pylist()]
    return table.append_column("late", pa.array(above)).append_column(
        "kind", pa.array([("up" if y else "down") if i % 3 else "flat" for i, y in enumerate(above)])
    )


@pytest.fixture
def dataset(memory_url: MakeUrl) -> str:
    put(memory_url("data"), {"1.parquet": labelled(300, 1), "2.parquet": labelled(300, 2)})
    return memory_url("data")


GOOD, BLIND = spec(), spec(features=["b"])


def test_the_spec_that_knows_more_is_best_and_the_others_are_told_apart(dataset: str, memory_url: MakeUrl) -> None:
    found = compare(dataset, {"blind": BLIND, "good": GOOD, "same": spec(seed=1)}, memory_url("to"))
    assert [row.name for row in found.specs][-1] == "blind"
    assert found.measure == "rmse"
    best, _, blind = found.specs
    assert best.difference is None
    assert blind.told_apart
    assert blind.difference == pytest.approx(blind.scores["rmse"] - best.scores["rmse"])
    assert found.baseline is not None
    assert found.baseline.told_apart
    assert (best.epochs, best.weights) == (3, 3)
    assert best.rows == 3 * (600 - found.held_out)


def test_the_scores_are_those_that_each_version_was_registered_with(dataset: str, memory_url: MakeUrl) -> None:
    found = compare(dataset, {"good": GOOD, "blind": BLIND}, memory_url("to"), holdout=0.3)
    assert found.baseline is not None
    for row in found.specs:
        assert row.version is not None
        metrics = open_log(memory_url("to"), row.model).version(row.version).manifest.metrics
        assert metrics["holdout_rows"] == found.held_out
        for name in ("rmse", "mae"):
            assert row.scores[name] == pytest.approx(metrics["holdout"][name], rel=1e-12)
            assert found.baseline.scores[name] == pytest.approx(metrics["baseline"][name], rel=1e-5)


def test_run_again_it_finds_what_was_trained_and_tells_the_same(dataset: str, memory_url: MakeUrl) -> None:
    specs = {"good": GOOD, "blind": BLIND}
    first = compare(dataset, specs, memory_url("to"))
    page, there = open_store(memory_url("to")).read("compare.html"), keys(memory_url("to"))
    assert compare(dataset, specs, memory_url("to")) == first
    assert (open_store(memory_url("to")).read("compare.html"), keys(memory_url("to"))) == (page, there)


def test_the_page_has_the_table_and_escapes_names(dataset: str, memory_url: MakeUrl) -> None:
    found = compare(dataset, {"<good>": GOOD, "blind": BLIND}, memory_url("to"))
    page = open_store(memory_url("to")).read("compare.html").decode()
    assert "&lt;good&gt;" in page
    assert "<good>" not in page
    assert all(sentence.replace("<good>", "&lt;good&gt;") in page for sentence in found.verdict)


@pytest.mark.parametrize(("target", "measure"), [("late", "log_loss"), ("kind", "log_loss")])
def test_classes_are_compared_by_one_measure_whatever_the_weights_of_their_losses(
    dataset: str, memory_url: MakeUrl, target: str, measure: str
) -> None:
    specs = {"plain": spec(target=target), "balanced": spec(target=target, class_weights="balanced", task=None)}
    if target == "kind":
        specs["balanced"] = spec(target=target, class_weights="balanced", task="multiclass")
    else:
        specs["balanced"] = spec(target=target, class_weights="balanced", task="binary")
    found = compare(dataset, specs, memory_url("to"))
    assert found.measure == measure
    plain = next(row for row in found.specs if row.name == "plain")
    assert plain.version is not None
    metrics = open_log(memory_url("to"), plain.model).version(plain.version).manifest.metrics
    assert plain.scores[measure] == pytest.approx(metrics["holdout"]["loss"], rel=1e-5)
    assert plain.scores["accuracy"] == metrics["holdout"]["accuracy"]
    assert found.baseline is not None
    assert found.baseline.scores[measure] == pytest.approx(metrics["baseline"]["loss"], rel=1e-5)


def test_specs_that_all_train_by_absolute_errors_are_compared_by_these(dataset: str, memory_url: MakeUrl) -> None:
    found = compare(dataset, {"a": spec(loss="l1"), "b": spec(loss="l1", features=["a"])}, memory_url("to"))
    assert found.measure == "mae"


def test_the_recipe_takes_part_and_is_scored_on_the_same_rows(dataset: str, memory_url: MakeUrl) -> None:
    blind = {"features": ["b"], "target": "a"}  # nothing can be learned, which is soon found out
    specs = {"recipe": Spec.model_validate(blind | {"recipe": 1}), "line": spec(**blind)}
    found = compare(dataset, specs, memory_url("to"))
    assert [row.failed for row in found.specs] == [None, None]
    for row in found.specs:
        assert row.version is not None
        manifest = open_log(memory_url("to"), row.model).version(row.version).manifest
        assert manifest.metrics["holdout_rows"] == found.held_out
    assert found.baseline is not None
    assert not found.baseline.told_apart
    assert "It is not told apart from the baseline, which knows no column." in found.verdict


def test_a_separate_dataset_may_be_scored_on(dataset: str, memory_url: MakeUrl) -> None:
    put(memory_url("new"), {"1.parquet": labelled(70, 9)})
    specs = {"good": GOOD, "blind": BLIND}
    found = compare(dataset, specs, memory_url("to"), holdout_dataset=memory_url("new"))
    assert found.held_out == 70
    assert found.best.rows == 3 * 600


def test_a_spec_that_fails_is_told_and_the_others_go_on(dataset: str, memory_url: MakeUrl) -> None:
    found = compare(dataset, {"wild": spec(learning_rate=1e30), "good": GOOD}, memory_url("to"))
    assert [row.name for row in found.specs] == ["good", "wild"]
    assert "non-finite" in str(found.specs[1].failed)
    with pytest.raises(TrainingError, match="non-finite"):
        compare(dataset, {"wild": spec(learning_rate=1e30)}, memory_url("to"))


def test_what_predicts_different_things_is_refused_before_anything_is_trained(
    dataset: str, memory_url: MakeUrl
) -> None:
    with pytest.raises(SpecError, match="good predicts 'y' and other predicts 'a': errors of different targets"):
        compare(dataset, {"good": GOOD, "other": spec(features=["b"], target="a")}, memory_url("to"))
    with pytest.raises(SpecError, match="one is for task 'binary' and open for 'regression'"):
        compare(dataset, {"one": spec(task="binary"), "open": spec()}, memory_url("to"))
    with pytest.raises(SpecError, match="no spec to compare"):
        compare(dataset, {}, memory_url("to"))
    assert keys(memory_url("to")) == []


def test_results_may_not_lie_in_the_dataset(dataset: str) -> None:
    with pytest.raises(PlacesOverlap):
        compare(dataset, {"good": GOOD}, f"{dataset}/to")


def test_a_registry_in_use_keeps_its_models_as_they_are(dataset: str, memory_url: MakeUrl) -> None:
    from tidemill.tasks.batch import train

    train(dataset, memory_url("to"), "good", BLIND, BatchSettings())
    before = keys(memory_url("to"))
    found = compare(dataset, {"good": GOOD}, memory_url("to"))
    assert found.best.model.startswith("good-")
    assert [key for key in keys(memory_url("to")) if key.startswith("good/")] == before


def test_a_table_in_memory_will_do(memory_url: MakeUrl) -> None:
    found = compare(labelled(200, 1), {"good": GOOD, "blind": BLIND}, memory_url("to"))
    assert found.dataset == "memory:"
    assert isinstance(found, ShownComparison)
    assert "<table>" in found._repr_html_()

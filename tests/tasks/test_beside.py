"""Each score of a batch version stands beside that of a baseline, and beside that of the version whose alias it takes."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.data import SPEC, put, rows
from tests.storage.faults import fails, hooked
from tidemill.storage.aliases import promote
from tidemill.storage.errors import Unavailable
from tidemill.storage.log import VersionLog, open_log
from tidemill.tasks import batch
from tidemill.tasks.beside import Rows, of_baseline, of_replaced
from tidemill.tasks.online.doors import drain
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.telling import still_fell, unsettled
from tidemill.tasks.training.groups import RowGroup, Split
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]


def train(url: MakeUrl, spec: Spec = SPEC, dataset: str = "dataset", **settings: Any) -> tuple[VersionLog, list[str]]:
    info = batch.train(url(dataset), url("registry"), "model", spec, BatchSettings.model_validate(settings))
    return open_log(url("registry"), "model"), info.notes


def changed(**settings: object) -> Spec:
    return Spec.model_validate(SPEC.model_dump() | settings)


def split_of(url: MakeUrl, column: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of a column on the training side and among the held-out rows."""
    sides: tuple[list[float], list[float]] = ([], [])
    for group in batch.take_snapshot(url("dataset")).row_groups:
        values = torch.tensor(group.read([column]).column(column).to_pylist(), dtype=torch.float64)
        held = Split(0.25, side="holdout").rows(group)
        for side, kept in zip(sides, (~held, held), strict=True):
            side.extend(values[kept].tolist())
    return torch.tensor(sides[0], dtype=torch.float64), torch.tensor(sides[1], dtype=torch.float64)


@pytest.mark.parametrize("standardize_target", [False, True])
def test_the_baseline_of_a_regression_is_the_mean_of_the_training_rows(
    memory_url: MakeUrl, standardize_target: bool
) -> None:
    put(memory_url("dataset"), {f"{i}.parquet": rows(120, i) for i in range(2)})
    log, notes = train(memory_url, changed(standardize_target=standardize_target), holdout=0.25)
    trained, held = split_of(memory_url, "y")
    baseline = log.head().manifest.metrics["baseline"]
    assert baseline["rmse"] == pytest.approx(float((held - trained.mean()).square().mean().sqrt()), rel=1e-5)
    assert baseline["mae"] == pytest.approx(float((held - trained.mean()).abs().mean()), rel=1e-5)
    score = log.head().manifest.metrics["holdout"]["rmse"]
    better = f"rmse {1 - score / baseline['rmse']:.1%} better"
    assert notes[0].startswith("the mean of the target alone: ")
    assert notes[0].endswith(f"; this version: {better}")


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_the_baseline_of_a_classification_is_the_base_rates(memory_url: MakeUrl, weights: str | None) -> None:
    for i in range(2):
        made = rows(120, i)
        labels = [int(min(2, abs(v))) for v in made["y"].to_pylist()]
        put(memory_url("dataset"), {f"{i}.parquet": made.set_column(2, "y", pa.array(labels))})
    log, notes = train(memory_url, changed(class_weights=weights), holdout=0.25)
    trained, held = split_of(memory_url, "y")
    counts = trained.long().bincount().double()
    rates = (counts + 0.5) / (counts + 0.5).sum()
    baseline = log.head().manifest.metrics["baseline"]
    assert baseline["accuracy"] == pytest.approx(float((held == counts.argmax()).double().mean()))
    if weights is None:
        assert baseline["loss"] == pytest.approx(float(-rates.log()[held.long()].mean()), rel=1e-5)
    else:
        weight = counts.sum() / (3 * counts)
        assert baseline["loss"] == pytest.approx(float(-(weight * rates.log())[held.long()].mean()), rel=1e-5)
    assert notes[0].startswith("the base rates of the labels alone: loss ")


@pytest.mark.parametrize("stated", [True, False])
def test_the_baseline_of_two_classes_is_the_share_of_the_second(memory_url: MakeUrl, stated: bool) -> None:
    made = rows(400, 0)
    put(
        memory_url("dataset"),
        {"0.parquet": made.set_column(2, "y", pa.array([int(v > 1) for v in made["y"].to_pylist()]))},
    )
    log, _ = train(memory_url, changed(**({"task": "binary"} if stated else {})), holdout=0.25)
    trained, held = split_of(memory_url, "y")
    rate = (trained.sum() + 0.5) / (len(trained) + 1)
    baseline = log.head().manifest.metrics["baseline"]
    expected = -(held * rate.log() + (1 - held) * (1 - rate).log()).mean()
    assert baseline["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert baseline["accuracy"] == pytest.approx(float((held == 0).double().mean()))
    assert baseline["auroc"] == 0.5


def test_beside_a_baseline_without_error_the_difference_is_told(memory_url: MakeUrl) -> None:
    made = rows(120, 0)
    put(memory_url("dataset"), {"0.parquet": made.set_column(2, "y", pa.array([4.0] * 120))})
    log, notes = train(memory_url)
    error = log.head().manifest.metrics["holdout"]["rmse"]
    assert notes[0].endswith(f"rmse 0; this version: rmse {error:.4g} worse")


def test_several_targets_have_a_baseline_too(memory_url: MakeUrl) -> None:
    made = rows(200, 0)
    put(memory_url("dataset"), {"0.parquet": made.append_column("z", made["a"])})
    log, _ = train(memory_url, changed(features=["b"], target=["y", "z"]))
    assert math.isfinite(log.head().manifest.metrics["baseline"]["rmse"])
    flags = pa.table({"b": made["b"], "y": [v > 0 for v in made["y"].to_pylist()], "z": [1, 0] * 100})
    put(memory_url("flags"), {"0.parquet": flags})
    spec = changed(features=["b"], target=["y", "z"], task="binary")
    log, _ = train(memory_url, spec, "flags")
    assert math.isfinite(log.head().manifest.metrics["baseline"]["loss"])


def test_the_baseline_reads_the_target_alone(memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidemill.storage.parquet import RowGroup

    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    run = batch.open_run(
        batch.take_snapshot(memory_url("dataset")), memory_url("registry"), "model", SPEC, BatchSettings()
    )
    while (epoch := run.next_epoch()) is not None:
        batch.train_epoch(run, epoch)
    reads: list[list[str]] = []
    read = RowGroup.read
    monkeypatch.setattr(RowGroup, "read", lambda group, columns: (reads.append(list(columns)), read(group, columns))[1])
    batch.evaluate(run)
    assert [columns for columns in reads if columns != ["a", "b", "y"]] == [["y"]] * len(run.dataset.row_groups)


def test_the_alias_moves_from_a_version_that_is_scored_on_the_same_rows(
    memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    put(memory_url("dataset"), {f"{i}.parquet": rows(120, i) for i in range(2)})
    log, notes = train(memory_url, changed(epochs=1))
    assert "replaced" not in log.head().manifest.metrics
    assert notes[-1] == "alias champion names version 0"
    first = log.head().manifest.metrics["holdout"]
    caplog.set_level(logging.INFO, "tidemill.batch")
    log, notes = train(memory_url)
    metrics = log.head().manifest.metrics
    assert metrics["replaced"] == {"alias": "champion", "version": 0, "score": pytest.approx(first)}
    change = 1 - metrics["holdout"]["rmse"] / first["rmse"]
    assert notes[-1].startswith("alias champion moves from version 0 to version 1: loss ")
    assert notes[-1].endswith(f" before, on the same rows; this version: rmse {change:.1%} better")
    assert notes[-1] in caplog.text
    log, notes = train(memory_url, changed(epochs=1, seed=1), alias="staging")
    assert notes[-1] == "alias staging names version 2"
    log, notes = train(memory_url, changed(epochs=1), again=True)
    assert notes[-1].endswith(" worse")


@pytest.mark.parametrize(
    ("asked", "dataset", "reason"),
    [
        ({"features": ["a"]}, "other", "column 'b' is missing from "),
        ({"target": "z"}, "dataset", "it is for task 'regression' of target 'y'"),
        ({"task": "binary"}, "signs", "it is for task 'regression' of target 'y'"),
    ],
)
def test_a_version_that_cannot_be_compared_is_told_with_the_reason(
    asked: dict[str, Any], dataset: str, reason: str, memory_url: MakeUrl
) -> None:
    made = rows(120, 0)
    put(memory_url("dataset"), {"0.parquet": made.append_column("z", made["a"])})
    put(memory_url("other"), {"0.parquet": made.drop_columns(["b"])})
    put(memory_url("signs"), {"0.parquet": made.set_column(2, "y", pa.array([v > 0 for v in made["y"].to_pylist()]))})
    train(memory_url)
    log, notes = train(memory_url, changed(**asked), dataset)
    replaced = log.head().manifest.metrics["replaced"]
    assert (replaced["version"], "score" in replaced) == (0, False)
    assert replaced["reason"].startswith(reason)
    assert notes[-1].startswith("alias champion moves from version 0 to version 1; the two were not compared: ")


def test_without_held_out_rows_the_alias_is_told_all_the_same(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    train(memory_url, holdout=0)
    log, notes = train(memory_url, changed(seed=1), holdout=0)
    assert log.head().manifest.metrics["replaced"]["reason"] == "no rows were held out"
    assert "baseline" not in log.head().manifest.metrics
    assert notes[-1].endswith("the two were not compared: no rows were held out")


def test_a_version_whose_blobs_are_gone_does_not_stop_the_run(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    log, _ = train(memory_url)
    log.store.delete(log.head().manifest.blobs.weights.key)
    log, notes = train(memory_url, changed(seed=1))
    assert log.head().number == 1
    assert "the two were not compared: " in notes[-1]


def test_a_version_of_own_code_is_scored_since_the_spec_names_it_again(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    spec = changed(model={"factory": "tests.tasks.own_models:Plain"})
    train(memory_url, spec)
    log, _ = train(memory_url, spec.model_copy(update={"seed": 1}))
    assert set(log.head().manifest.metrics["replaced"]["score"]) == {"loss", "mae", "rmse"}
    log, _ = train(memory_url, changed(seed=2))
    assert "tests.tasks.own_models:Plain" in log.head().manifest.metrics["replaced"]["reason"]


def test_an_online_version_is_replaced_as_well(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    log, _ = train(memory_url)
    put(memory_url("inbox"), {"s.parquet": rows(40, 3)})
    drain(memory_url("inbox"), memory_url("registry"), "model")
    promote(log, "champion", log.head())
    log, _ = train(memory_url, changed(seed=1))
    assert log.head().manifest.metrics["replaced"]["version"] == 1


@pytest.mark.parametrize(
    ("losses", "best", "fell"),
    [
        ([1.0, 0.5], None, 0.5),
        ([1.0, 0.5], 2, 0.5),
        ([1.0, 0.995], None, None),
        ([1.0, 2.0], None, None),
        ([1.0], None, None),
        ([], None, None),
        ([1.0, 0.5, 0.25], 2, None),
        ([-1.0, -2.0], None, None),
        ([0.0, 0.0], None, None),
    ],
)
def test_a_loss_that_still_falls_is_told(losses: list[float], best: int | None, fell: float | None) -> None:
    assert still_fell(losses, best) == (None if fell is None else pytest.approx(fell))


def test_it_is_told_of_a_run_that_stopped_too_early(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    _, notes = train(memory_url, changed(epochs=2))
    [told] = [note for note in notes if "still fell" in note]
    assert told.endswith("in the last epoch: more epochs would help (--epochs)")
    _, notes = train(memory_url, changed(epochs=60))
    assert not [note for note in notes if "still fell" in note]


def test_of_a_search_the_held_out_rows_tell_it_and_not_the_loss() -> None:
    losses = [1.0, 0.5]
    found = {"epochs": [1, 2, 3], "best_epochs": 2}
    assert unsettled({"epoch_loss": losses, "search": found}) is None
    told = unsettled({"epoch_loss": losses, "search": found | {"best_epochs": 3}})
    assert told is not None
    assert told.startswith("the search ended at its limit, 3 epochs")


def test_a_store_that_is_away_is_waited_for_and_leaves_no_score_out(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(120, 0)})
    log, _ = train(memory_url)
    stores = hooked(fails("read", Unavailable("away")))
    learner, away = load_learner(log, log.head()), VersionLog(stores(memory_url("registry")), "model")
    data = batch.take_snapshot(memory_url("dataset"))
    held_out = Rows(data.row_groups, None, data.schemas)
    with pytest.raises(Unavailable):
        of_replaced(learner, held_out, away, "champion")
    read = Unreadable(data.row_groups[0])
    with pytest.raises(Unavailable):
        of_baseline(learner, Rows([read], None, data.schemas), None)


class Unreadable:
    """A row group of a store that is away."""

    def __init__(self, group: RowGroup) -> None:
        self.name, self.num_rows, self.schema = group.name, group.num_rows, group.schema

    def read(self, columns: object) -> pa.Table:
        raise Unavailable("away")

"""The user's own model and metrics are tried on a few rows: before the first epoch, and before the first commit."""

import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.data import SPEC, keys, put, rows
from tests.tasks import own_models
from tidemill.storage.log import open_log
from tidemill.tasks import batch
from tidemill.tasks.online import drain
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.errors import FactoryError, StateMismatch
from tidemill.tasks.training.spec import Model, Spec

MakeUrl = Callable[[str], str]


def own(model: str = "Plain", *metrics: str, **settings: object) -> Spec:
    named = {"model": {"factory": f"tests.tasks.own_models:{model}"}}
    return Spec.model_validate(
        SPEC.model_dump() | named | {"metrics": [f"tests.tasks.own_models:{m}" for m in metrics]} | settings
    )


@pytest.fixture
def dataset(memory_url: MakeUrl) -> str:
    put(memory_url("dataset"), {"a.parquet": rows(60, 0), "b.parquet": rows(60, 1)})
    return memory_url("dataset")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("Many", r"metrics 'many' fails on made-up rows: it gives \[3\], not one number"),
        ("Mapped", r"metrics 'mapped' fails on made-up rows: it gives dict, not one number"),
        (
            "Refuses",
            r"metrics 'refuses' fails on made-up rows \(RuntimeError: only for images.*\) and on the first",
        ),
    ],
)
def test_a_metric_that_gives_no_number_is_refused_before_the_first_epoch(
    metric: str, message: str, dataset: str, memory_url: MakeUrl
) -> None:
    run = batch.open_run(
        batch.take_snapshot(dataset), memory_url("registry"), "model", own("Plain", metric), BatchSettings()
    )
    with pytest.raises(FactoryError, match=message):
        batch.prepare(run)
    assert not [info.key for info in run.log.store.list() if "/00000" in info.key]


def test_a_metric_is_tried_on_made_up_rows_where_the_first_rows_have_no_labels(memory_url: MakeUrl) -> None:
    unlabelled = rows(300, 0).set_column(2, "y", [pa.nulls(300, pa.float64())])
    put(memory_url("dataset"), {"a.parquet": unlabelled, "b.parquet": rows(60, 1)})
    with pytest.raises(FactoryError, match="metrics 'refuses' fails on made-up rows"):
        batch.train(memory_url("dataset"), memory_url("registry"), "model", own("Plain", "Refuses"))


PRICES = rows(200, 0).set_column(2, "y", [[abs(y) + 0.01 for y in rows(200, 0)["y"].to_pylist()]])


@pytest.mark.parametrize(
    ("metric", "table"), [("OfPrices", PRICES), ("OfBothSigns", rows(200, 0).sort_by([("y", "descending")]))]
)
def test_a_metric_that_fails_on_made_up_rows_alone_or_on_the_first_rows_alone_is_sound(
    metric: str, table: pa.Table, memory_url: MakeUrl
) -> None:
    """The values may be at fault: no price is negative, and a sorted dataset begins with values of one kind."""
    put(memory_url("dataset"), {"a.parquet": table})
    made = batch.train(memory_url("dataset"), memory_url("registry"), "model", own("Plain", metric))
    assert metric.lower() in made.metrics["holdout"]  # type: ignore[operator]


@pytest.mark.parametrize("gives", [torch.zeros(3), {"total": torch.zeros(1)}])
def test_a_follower_refuses_a_metric_that_gives_no_number_as_training_does(
    gives: object, dataset: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric's code was changed since the version was trained."""
    monkeypatch.setenv("TIDEMILL_FACTORIES", own_models.__name__)
    batch.train(dataset, memory_url("registry"), "model", own("Plain", "Single"))
    put(memory_url("inbox"), {"1.parquet": rows(20, 3)})
    monkeypatch.setattr(own_models.Single, "compute", lambda self: gives)
    with pytest.raises(FactoryError, match=r"metrics 'single' fails on made-up rows: it gives .*, not one number"):
        drain(memory_url("inbox"), memory_url("registry"), "model")
    assert keys(memory_url("inbox")) == ["1.parquet"]
    monkeypatch.undo()
    monkeypatch.setenv("TIDEMILL_FACTORIES", own_models.__name__)
    assert drain(memory_url("inbox"), memory_url("registry"), "model").shards == 1


def test_a_metric_that_fails_on_the_rows_of_a_shard_is_left_out_of_it_and_stops_nothing(
    memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TIDEMILL_FACTORIES", own_models.__name__)
    put(memory_url("dataset"), {"a.parquet": PRICES})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", own("Plain", "OfPrices"))
    put(memory_url("inbox"), {"1.parquet": rows(20, 3), "2.parquet": PRICES.slice(0, 20)})
    assert drain(memory_url("inbox"), memory_url("registry"), "model").shards == 2
    first, second = open_log(memory_url("registry"), "model").head().manifest.consumed
    assert ("ofprices" in first.score, "ofprices" in second.score) == (False, True)
    assert "metric ofprices of" in caplog.text


def test_a_metric_of_one_number_is_computed(dataset: str, memory_url: MakeUrl) -> None:
    made = batch.train(dataset, memory_url("registry"), "model", own("Plain", "Single"))
    assert set(made.metrics["holdout"]) == {"loss", "mae", "rmse", "single"}  # type: ignore[arg-type, call-overload]


def test_the_trial_changes_no_bit(dataset: str, memory_url: MakeUrl) -> None:
    """As in a plain factory of torch's with dropout, which is tried, against the built-in model, which is not."""
    hidden = {"hidden": [4], "dropout": 0.3}
    built_in = Spec.model_validate(SPEC.model_dump() | {"model": {"factory": "mlp", "arguments": hidden}})
    imported = {"factory": "tidemill.tasks.training.models:mlp", "arguments": hidden}
    tried = Spec.model_validate(SPEC.model_dump() | {"model": imported})
    for name, spec in (("a", built_in), ("b", tried)):
        batch.train(dataset, memory_url(name), "model", spec)
    a, b = (open_log(memory_url(name), "model").head().manifest for name in "ab")
    assert (a.blobs.weights.sha256, a.counters) == (b.blobs.weights.sha256, b.counters)


@pytest.mark.parametrize("model", ["Counter", "Unkept", "Numpy", "Python", "OwnGenerator"])
def test_state_that_no_checkpoint_finds_is_told_at_the_first_commit(
    model: str, dataset: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    batch.train(dataset, memory_url("registry"), "model", own(model))
    assert caplog.text.count("after a restart this model goes on with other bits") == 1
    assert "'layer.weight'" in caplog.text


def test_state_that_no_checkpoint_finds_is_told_by_a_run_that_only_registers(
    dataset: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    """It was killed after its last epoch, so that its learner comes from a checkpoint."""
    arguments = batch.take_snapshot(dataset), memory_url("registry"), "model", own("Counter"), BatchSettings()
    killed = batch.open_run(*arguments)
    batch.prepare(killed)
    while (epoch := killed.next_epoch()) is not None:
        batch.train_epoch(killed, epoch)
    again = batch.open_run(*arguments)
    batch.register(again, batch.evaluate(again))
    assert caplog.text.count("after a restart this model goes on with other bits") == 1


def test_a_script_that_ends_itself_when_it_is_imported_is_told(
    dataset: str, memory_url: MakeUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not end the run with an exit code of its own, without a word."""
    (tmp_path / "ends_itself.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = own().model_copy(update={"model": Model(factory="ends_itself:Net")})
    with pytest.raises(FactoryError, match=r"'ends_itself:Net': importing it raised SystemExit: 3 .*ends_itself.py:2"):
        batch.train(dataset, memory_url("registry"), "model", spec)


@pytest.mark.parametrize(("model", "word"), [("Grows", "seen is float32"), ("Hides", "Missing key")])
def test_a_model_that_cannot_be_read_back_is_refused_before_the_first_epoch(
    model: str, word: str, dataset: str, memory_url: MakeUrl
) -> None:
    with pytest.raises(
        StateMismatch, match=rf"{model}': what is stored of the model cannot be read back: .*{word}"
    ) as told:
        batch.train(dataset, memory_url("registry"), "model", own(model))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("averaged", [{}, {"ema_decay": 0.9}, {"replay": {"rows": 10}}, {"running_statistics": True}])
def test_sound_models_are_not_warned_of(
    averaged: dict[str, object], dataset: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    spec = own("Plain", optimizer={"name": "adam"}, **averaged)
    made = batch.train(dataset, memory_url("registry"), "model", spec)
    assert caplog.text == ""
    manifest = open_log(memory_url("registry"), "model").head().manifest
    assert manifest.counters["shards"] == 0, "what the trial trained on is not part of the version"
    again = batch.train(dataset, memory_url("other"), "model", spec)
    other = open_log(memory_url("other"), "model").head().manifest
    assert made.metrics == again.metrics
    assert manifest.blobs.state.sha256 == other.blobs.state.sha256
    assert torch.initial_seed()  # and torch's generator was left alone

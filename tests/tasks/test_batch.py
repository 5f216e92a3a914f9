"""Batch training as plain functions: snapshot, epochs with checkpoints, evaluation, registration. No Prefect."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from tenacity import wait_none

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, hooked
from tidemill.storage.aliases import all_aliases
from tidemill.storage.audit import audit
from tidemill.storage.errors import (
    CorruptObject,
    DatasetChanged,
    DatasetError,
    PlacesOverlap,
    StoreNotFound,
    Unavailable,
)
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Entry
from tidemill.storage.retention import collect_garbage
from tidemill.storage.store import Store
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store
from tidemill.tasks import batch, retrying
from tidemill.tasks.batch_run import BatchRun
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError, FactoryError, NonFiniteLoss, OutputShapeError
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]


@pytest.fixture
def dataset(make_url: MakeUrl) -> str:
    url = make_url("dataset")
    put(url, {f"part-{i}.parquet": rows(120, i) for i in range(2)})
    return url


def open_run(dataset: str, registry: str, spec: Spec = SPEC, **settings: object) -> BatchRun:
    taken = batch.take_snapshot(dataset)
    return batch.open_run(taken, registry, "model", spec, BatchSettings.model_validate(settings))


def train(dataset: str, registry: str, spec: Spec = SPEC, **settings: object) -> VersionLog:
    batch.train(dataset, registry, "model", spec, BatchSettings.model_validate(settings))
    return open_log(registry, "model")


def changed(**settings: object) -> Spec:
    return Spec.model_validate(SPEC.model_dump() | settings)


def test_a_run_ends_in_a_version_that_champion_names(dataset: str, make_url: MakeUrl) -> None:
    log = train(dataset, make_url("registry"), holdout=0.25)
    manifest = log.head().manifest
    assert (manifest.version, manifest.kind, all_aliases(log)) == (0, "batch", {"champion": 0})
    assert manifest.dataset is not None
    assert (manifest.dataset.files, manifest.dataset.rows) == (2, 240)
    losses = manifest.metrics["epoch_loss"]
    assert len(losses) == 3
    assert losses[2] < losses[0] / 10
    assert set(manifest.metrics["holdout"]) == {"loss", "mae", "rmse"}
    held_out = manifest.metrics["holdout_rows"]
    assert 30 < held_out < 90
    assert manifest.counters == {
        "epochs": 3,
        "shards": 0,
        "rows": 3 * (240 - held_out),
        "steps": 3 * -(-(240 - held_out) // 16),
        "compiled_steps": 0,
    }


def test_what_a_dataset_passes_over_is_told_with_the_version(dataset: str, make_url: MakeUrl) -> None:
    put(dataset, {"_year=2020/part.parquet": rows(60, 2), "part-00000": rows(60, 3)})
    info = batch.train(dataset, make_url("registry"), "model", SPEC)
    assert info.passed_over == ["1 files that do not end in .parquet, .parq, .pq (part-00000)"]
    manifest = open_log(make_url("registry"), "model").head().manifest
    assert manifest.dataset is not None
    assert manifest.dataset.rows == 300


def test_checkpoints_are_dropped_when_the_run_is_done(dataset: str, make_url: MakeUrl) -> None:
    log = train(dataset, make_url("registry"))
    left = [info.key.rsplit("/", 1)[-1] for info in log.store.list("model/runs/")]
    assert sorted(left) == ["done.json", "run.json"]


def test_an_interrupted_run_goes_on_after_its_last_checkpoint(dataset: str, make_url: MakeUrl) -> None:
    reference = train(dataset, make_url("reference"))
    interrupted = open_run(dataset, make_url("registry"))
    batch.train_epoch(interrupted, 0)

    again = open_run(dataset, make_url("registry"))
    assert again.next_epoch() == 1
    log = train(dataset, make_url("registry"))
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256
    assert log.head().manifest.metrics == reference.head().manifest.metrics


def test_a_damaged_checkpoint_costs_an_epoch_and_nothing_else(dataset: str, make_url: MakeUrl) -> None:
    reference = train(dataset, make_url("reference"))
    interrupted = open_run(dataset, make_url("registry"))
    batch.train_epoch(interrupted, 0)
    batch.train_epoch(interrupted, 1)
    store = interrupted.log.store
    newest = max(i.key for i in store.list("model/runs/") if "/00000002-" in i.key and "state" not in i.key)
    store.write(newest, b"damaged")

    assert open_run(dataset, make_url("registry")).next_epoch() == 1
    log = train(dataset, make_url("registry"))
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256


def test_a_finished_run_is_found_instead_of_trained_again(dataset: str, make_url: MakeUrl) -> None:
    train(dataset, make_url("registry"))
    run = open_run(dataset, make_url("registry"))
    assert run.registered is not None
    version, finished = run.registered
    assert (version.number, finished) == (0, True)


def test_killed_between_commit_and_alias_the_version_is_found_and_the_alias_moved(
    dataset: str, make_url: MakeUrl
) -> None:
    run = open_run(dataset, make_url("registry"))
    while (epoch := run.next_epoch()) is not None:
        batch.train_epoch(run, epoch)
    batch.register(run, batch.evaluate(run))

    again = open_run(dataset, make_url("registry"))
    assert again.registered is not None
    version, finished = again.registered
    assert (version.number, finished) == (0, False)
    batch.finish(again, version)
    assert all_aliases(again.log) == {"champion": 0}


def test_killed_between_commit_and_alias_and_out_of_retention_since(dataset: str, memory_url: MakeUrl) -> None:
    """The run ends all the same, now and the next time; the alias is not moved to a version that cannot be served."""
    run = open_run(dataset, memory_url("registry"))
    version = batch.register(run, batch.evaluate(run))
    run.log.rollback(run.log.version(0))
    collect_garbage(run.log, keep=1)

    batch.finish(open_run(dataset, memory_url("registry")), version)
    assert all_aliases(run.log) == {}
    assert open_run(dataset, memory_url("registry")).registered == (version, True)


@pytest.mark.parametrize("change", ["data", "spec", "holdout"])
def test_other_data_spec_or_split_is_another_run(change: str, dataset: str, make_url: MakeUrl) -> None:
    train(dataset, make_url("registry"))
    if change == "data":
        put(dataset, {"part-2.parquet": rows(50, 2)})
    spec = changed(seed=8) if change == "spec" else SPEC
    log = train(dataset, make_url("registry"), spec, holdout=0.3 if change == "holdout" else 0.1)
    assert log.head().number == 1
    assert all_aliases(log) == {"champion": 1}


def test_an_edited_model_is_another_run(dataset: str, make_url: MakeUrl, tmp_path, monkeypatch) -> None:
    source = "import torch\n\ndef make():\n    return torch.nn.Linear(2, 1)\n"
    (tmp_path / "edited_model.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    spec = changed(model={"factory": "edited_model:make"})
    first = open_run(dataset, make_url("registry"), spec).progress.key
    (tmp_path / "edited_model.py").write_text(source.replace("Linear(2, 1)", "Linear(2, 1, bias=False)"))
    assert open_run(dataset, make_url("registry"), spec).progress.key != first


def test_a_retrained_model_carries_what_the_head_owes_and_remembers(dataset: str, make_url: MakeUrl) -> None:
    log = train(dataset, make_url("registry"))
    head = log.head()
    remembered = Tombstones()
    remembered.add("i", "k", "s", "e")
    memory = log.write_tombstones(1, remembered)
    owed = {"inbox": "memory://gone", "key": "k", "sha256": "s", "etag": "e", "action": "delete"}
    blobs = {**dict(head.manifest.blobs), "tombstones": memory}
    entry = Entry.model_validate({"kind": "online", "spec": head.manifest.spec, "blobs": blobs, "owed": [owed]})
    log.commit(head, entry)

    log = train(dataset, make_url("registry"), changed(seed=9))
    manifest = log.head().manifest
    assert (manifest.version, manifest.kind) == (2, "batch")
    assert [debt.key for debt in manifest.owed] == ["k"]
    assert manifest.blobs.tombstones == memory


def test_a_separate_dataset_can_be_the_holdout(dataset: str, make_url: MakeUrl) -> None:
    put(make_url("other"), {"x.parquet": rows(40, 9)})
    log = train(dataset, make_url("registry"), holdout_dataset=make_url("other"))
    assert log.head().manifest.metrics["holdout_rows"] == 40
    assert log.head().manifest.counters["rows"] == 3 * 240


def test_without_a_holdout_there_is_no_score(dataset: str, make_url: MakeUrl) -> None:
    log = train(dataset, make_url("registry"), holdout=0)
    assert (log.head().manifest.metrics["holdout_rows"], log.head().manifest.metrics["holdout"]) == (0, {})


def test_hive_partitions_are_columns(make_url: MakeUrl) -> None:
    put(make_url("dataset"), {f"city={c}/x.parquet": rows(60, i) for i, c in enumerate(["oslo", "rome"])})
    spec = changed(features=["a", "b", {"name": "city", "buckets": 4}])
    assert train(make_url("dataset"), make_url("registry"), spec).head().manifest.dataset.rows == 120


# ---- the plain door --------------------------------------------------------------------------------------------------
def test_every_store_is_opened_by_the_one_that_is_given(dataset: str, memory_url: MakeUrl) -> None:
    put(memory_url("holdout"), {"x.parquet": rows(40, 9)})
    opened = set()

    def stores(url: str) -> Store:
        opened.add(url)
        return open_store(url)

    settings = BatchSettings(holdout_dataset=memory_url("holdout"))
    info = batch.train(dataset, memory_url("registry"), "model", SPEC, settings, stores=stores)
    assert (info.version, info.trained) == (0, True)
    assert opened == {dataset, memory_url("holdout"), memory_url("registry")}


def test_a_step_that_finds_the_store_away_is_tried_again(dataset: str, memory_url: MakeUrl, caplog) -> None:
    """Twice with waits made short; any other error comes back at once."""
    reference = train(dataset, memory_url("reference"))
    calls = Counter[str]()

    def impatient(step: Callable[..., object]) -> Callable[..., object]:
        return retrying.retried(step).retry_with(wait=wait_none())  # type: ignore[attr-defined, no-any-return]

    def away(call: Call) -> None:
        calls[call.verb] += call.phase == "before"
        if call.verb == "write" and call.phase == "after" and calls["write"] in (2, 3):
            raise Unavailable("no answer")

    steps = batch.BatchSteps.of(impatient)
    batch.train_by(steps, dataset, memory_url("registry"), "model", SPEC, BatchSettings(), hooked(away))
    log = open_log(memory_url("registry"), "model")
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256
    assert [record.message for record in caplog.records if "tried again" in record.message] == [
        "to be tried again: no answer"
    ] * 2

    def broken(call: Call) -> None:
        raise CorruptObject("damaged")

    with pytest.raises(CorruptObject, match="damaged"):
        batch.train_by(steps, dataset, memory_url("other"), "model", SPEC, BatchSettings(), hooked(broken))


def test_what_an_earlier_run_has_made_is_said(dataset: str, make_url: MakeUrl, caplog) -> None:
    made = batch.train(dataset, make_url("registry"), "model", SPEC)
    caplog.set_level(logging.INFO, "tidemill.batch")
    found = batch.train(dataset, make_url("registry"), "model", SPEC)
    assert (found.version, found.trained, found.metrics) == (made.version, False, made.metrics)
    created = open_log(make_url("registry"), "model").head().manifest.created.isoformat(timespec="seconds")
    assert re.search(rf"version 0 of .*/model, committed at {re.escape(created)}, .*--again", caplog.text)


def test_again_trains_what_has_not_changed_and_goes_on_when_killed(dataset: str, make_url: MakeUrl) -> None:
    again = BatchSettings(again=True)
    assert batch.train(dataset, make_url("registry"), "model", SPEC, again).version == 0  # the first time, as without
    killed = batch.open_run(batch.take_snapshot(dataset), make_url("registry"), "model", SPEC, again)
    batch.train_epoch(killed, 0)
    assert batch.open_run(killed.dataset, make_url("registry"), "model", SPEC, again).next_epoch() == 1
    found = batch.train(dataset, make_url("registry"), "model", SPEC)
    assert (found.version, found.trained) == (0, False)  # what is not finished is not found
    made = batch.train(dataset, make_url("registry"), "model", SPEC, again)
    assert (made.version, made.trained) == (1, True)
    assert batch.train(dataset, make_url("registry"), "model", SPEC).version == 1
    log = open_log(make_url("registry"), "model")
    assert log.version(0).manifest.blobs.weights.sha256 == log.version(1).manifest.blobs.weights.sha256
    assert all_aliases(log) == {"champion": 1}
    assert audit(log).findings == []


def test_a_run_that_goes_on_elsewhere_says_what_the_bits_depend_on(dataset: str, memory_url: MakeUrl, caplog) -> None:
    run = open_run(dataset, memory_url("registry"))
    batch.train_epoch(run, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        open_run(dataset, memory_url("registry")).load_or_fit()
    finally:
        torch.set_num_threads(threads)
    assert f"bits may differ from those of an uninterrupted run: threads was {threads}, is now" in caplog.text


def test_a_registry_begins_with_its_first_object(tmp_path: Path) -> None:
    put(str(tmp_path / "dataset"), {"x.parquet": rows(60, 0)})
    assert batch.train(str(tmp_path / "dataset"), str(tmp_path / "new/registry"), "model", SPEC).version == 0


# ---- places ----------------------------------------------------------------------------------------------------------
def test_a_holdout_inside_the_dataset_is_left_out_of_it(make_url: MakeUrl) -> None:
    """Of the statistics, the epochs and the fingerprint: the bits are those of a dataset that never had it."""
    parts, holdout = {f"part-{i}.parquet": rows(120, i) for i in range(2)}, {"x.parquet": rows(40, 9)}
    put(make_url("dataset"), parts)
    put(make_url("dataset") + "/sub/holdout", holdout)
    put(make_url("apart"), holdout)
    inside = train(make_url("dataset"), make_url("a"), holdout_dataset=make_url("dataset") + "/sub/holdout").head()
    assert inside.manifest.dataset is not None
    assert (inside.manifest.dataset.files, inside.manifest.dataset.rows) == (2, 240)
    assert inside.manifest.metrics["holdout_rows"] == 40
    open_store(make_url("dataset")).delete("sub/holdout/x.parquet")
    without = train(make_url("dataset"), make_url("b"), holdout_dataset=make_url("apart")).head()
    assert inside.manifest.dataset == without.manifest.dataset
    assert inside.manifest.blobs.weights.sha256 == without.manifest.blobs.weights.sha256


@pytest.mark.parametrize("holdout", ["dataset", "."])
def test_a_dataset_inside_its_holdout_is_refused(holdout: str, dataset: str, make_url: MakeUrl) -> None:
    url = dataset if holdout == "dataset" else dataset.rpartition("/")[0]
    with pytest.raises(
        PlacesOverlap, match=r"the dataset, .*, (is|lies inside) holdout_dataset .*nothing would be left"
    ):
        train(dataset, make_url("registry"), holdout_dataset=url)
    assert keys(make_url("registry")) == []


@pytest.mark.parametrize("place", ["", "/registry", "/city=oslo"])
def test_a_registry_in_a_dataset_or_holdout_is_refused(place: str, dataset: str, make_url: MakeUrl) -> None:
    before = keys(dataset)
    with pytest.raises(PlacesOverlap, match=r"the registry, .* lies inside the dataset"):
        train(dataset, dataset + place)
    put(make_url("other"), {"x.parquet": rows(40, 9)})
    with pytest.raises(PlacesOverlap, match=r"the registry, .* lies inside holdout_dataset"):
        train(make_url("other"), dataset + place, holdout_dataset=dataset)
    assert keys(dataset) == before


def test_an_inbox_of_the_model_is_no_dataset(dataset: str, make_url: MakeUrl) -> None:
    train(dataset, make_url("registry"))
    put(make_url("inbox"), {"x.parquet": rows(40, 9)})
    online.step(OnlineRun(make_url("inbox"), make_url("registry"), "model", OnlineSettings(after_commit="keep")))
    with pytest.raises(PlacesOverlap, match=r"the dataset, .* is an inbox of the model"):
        train(make_url("inbox"), make_url("registry"))
    with pytest.raises(PlacesOverlap, match=r"holdout_dataset, .* is an inbox of the model"):
        train(dataset, make_url("registry"), holdout_dataset=make_url("inbox"))


# ---- bad input -------------------------------------------------------------------------------------------------------
def nothing_was_registered(registry: str) -> bool:
    return not open_log(registry, "model", writable=False).exists()


def test_an_empty_dataset(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"_SUCCESS": b"", "readme.txt": b"hello"})
    with pytest.raises(DatasetError, match="holds no Parquet file"):
        batch.take_snapshot(memory_url("dataset"))


def test_a_dataset_that_is_not_there(tmp_path) -> None:
    with pytest.raises(StoreNotFound, match="nowhere"):
        batch.take_snapshot(str(tmp_path / "nowhere"))


def test_a_file_that_changes_during_training_is_named(dataset: str, make_url: MakeUrl) -> None:
    run = open_run(dataset, make_url("registry"))
    batch.train_epoch(run, 0)
    put(dataset, {"part-1.parquet": rows(120, 99)})
    with pytest.raises(DatasetChanged, match=r"part-1\.parquet changed"):
        batch.train_epoch(run, 1)
    assert nothing_was_registered(make_url("registry"))


WIDE = {"in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    ("spec", "table", "error", "message"),
    [
        (changed(features=["a", "bb"]), rows(60, 0), ColumnError, "'bb'.*'b'"),
        (SPEC, rows(60, 0).set_column(1, "b", pa.nulls(60, pa.float64())), ColumnError, "'b' is null in all"),
        (SPEC, rows(60, 0).set_column(1, "b", [[[1.0]] * 60]), ColumnError, "'b'"),
        (SPEC, rows(60, 0).set_column(1, "b", [[float("nan")] * 60]), ColumnError, "'b'.*write nulls"),
        (changed(model={"factory": "no_such_module:Net"}), rows(60, 0), FactoryError, "no_such_module"),
        (changed(model={"factory": "json:dumps"}), rows(60, 0), FactoryError, "json:dumps"),
        (changed(model={"factory": "torch.nn:Linear", "arguments": WIDE}), rows(60, 0), OutputShapeError, "3"),
        (changed(learning_rate=1e30), rows(60, 0), NonFiniteLoss, "learning_rate"),
    ],
    ids=["missing", "null", "type", "nan", "module", "no-module", "shape", "diverges"],
)  # fmt: skip
def test_what_cannot_be_trained(spec, table, error, message, memory_url: MakeUrl) -> None:
    """The message names the setting or the column; nothing is registered."""
    put(memory_url("dataset"), {"x.parquet": table})
    with pytest.raises(error, match=message):
        train(memory_url("dataset"), memory_url("registry"), spec)
    assert nothing_was_registered(memory_url("registry"))


def test_files_of_different_types(memory_url: MakeUrl) -> None:
    text = rows(30, 1).set_column(0, "a", [["text"] * 30])
    put(memory_url("dataset"), {"1.parquet": rows(30, 0), "2.parquet": text})
    with pytest.raises(ColumnError, match=r"'a' of .*2\.parquet"):
        train(memory_url("dataset"), memory_url("registry"))


def test_settings_refuse_two_holdouts() -> None:
    with pytest.raises(ValueError, match="not both"):
        BatchSettings(holdout=0.2, holdout_dataset="s3://x/y")


def test_the_snapshot_pins_what_was_listed(dataset: str) -> None:
    taken = batch.take_snapshot(dataset)
    open_store(dataset).delete("part-0.parquet")
    with pytest.raises(DatasetChanged, match="part-0"):
        taken.row_groups[0].read(["a"])
    assert keys(dataset) == ["part-1.parquet"]


# ---- early stopping --------------------------------------------------------------------------------------------------
OVERFITS = Spec.model_validate(
    {
        "features": [f"x{i}" for i in range(20)],
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [64]}},
        "optimizer": {"name": "adam"},
        "batch_size": 8,
        "epochs": 60,
        "replay": {"rows": 20},
    }
)
PATIENT = BatchSettings(holdout=0.3, patience=3)


@pytest.fixture
def noise(memory_url: MakeUrl) -> str:
    """80 rows of which only the first column means something: a network soon learns the rest by heart."""
    values = torch.randn(21, 80, generator=torch.Generator().manual_seed(3)).tolist()
    columns = {f"x{i}": column for i, column in enumerate(values[:20])}
    table = pa.table(columns | {"y": [x + e for x, e in zip(values[0], values[20], strict=True)]})
    put(memory_url("noise"), {"part-0.parquet": table})
    return memory_url("noise")


def stopped_early(noise: str, registry: str, epochs: int = 60) -> VersionLog:
    """A run that trains at most so many epochs, and registers only if it came to its end."""
    run = batch.open_run(batch.take_snapshot(noise), registry, "model", OVERFITS, PATIENT)
    while (epoch := run.next_epoch()) is not None:
        if epoch == epochs:
            return run.log
        batch.train_epoch(run, epoch)
    batch.finish(run, batch.register(run, batch.evaluate(run)))
    return run.log


def test_it_stops_when_held_out_rows_get_worse_and_registers_the_best_epoch(noise: str, memory_url: MakeUrl) -> None:
    manifest = stopped_early(noise, memory_url("registry")).head().manifest
    held_out, best = manifest.metrics["epoch_holdout"], manifest.metrics["best_epoch"]
    assert len(held_out) == len(manifest.metrics["epoch_loss"]) == best + 3 < 60
    assert held_out[best - 1] == min(held_out) == manifest.metrics["holdout"]["loss"]
    assert manifest.counters["epochs"] == best


@pytest.mark.parametrize("killed_after", [1, "best", "best + 1", "all"])
def test_killed_it_goes_on_to_the_same_best_epoch(noise: str, memory_url: MakeUrl, killed_after: int | str) -> None:
    reference = stopped_early(noise, memory_url("reference")).head().manifest
    best = reference.metrics["best_epoch"]
    epochs = {"best": best, "best + 1": best + 1, "all": best + 2}.get(str(killed_after), killed_after)
    assert isinstance(epochs, int)
    assert not stopped_early(noise, memory_url("registry"), epochs).exists()
    manifest = stopped_early(noise, memory_url("registry")).head().manifest
    assert manifest.metrics == reference.metrics
    assert manifest.blobs.weights.sha256 == reference.blobs.weights.sha256
    assert manifest.blobs.state.sha256 == reference.blobs.state.sha256


def test_a_best_epoch_that_is_lost_is_not_replaced_by_another(noise: str, memory_url: MakeUrl) -> None:
    run = batch.open_run(batch.take_snapshot(noise), memory_url("registry"), "model", OVERFITS, PATIENT)
    while (epoch := run.next_epoch()) is not None:
        batch.train_epoch(run, epoch)
    run.log.store.write(f"model/runs/{run.progress.key}/{run.best_epoch:08d}.json", b"damaged")
    with pytest.raises(CorruptObject, match="the best epoch, is damaged or gone"):
        batch.evaluate(run)


def test_patience_needs_rows_that_are_held_out() -> None:
    with pytest.raises(ValueError, match="patience needs held-out rows"):
        BatchSettings(holdout=0, patience=3)


# ---- the shipped deployments -----------------------------------------------------------------------------------------
def test_the_places_of_the_shipped_deployments_lie_well(make_url: MakeUrl) -> None:
    """Their archive lies in the dataset: the next batch run trains on what the online run has consumed."""
    shipped = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text())
    asked = {one["name"]: one.get("parameters", {}) for one in shipped["deployments"]}

    def here(url: str) -> str:
        return make_url(url.removeprefix("s3://my-bucket/"))

    put(here(asked["batch"]["dataset"]), {"x.parquet": rows(60, 0)})
    put(here(asked["online"]["inbox"]), {"s.parquet": rows(40, 1)})
    where = here(asked["batch"]["dataset"]), here(asked["batch"]["registry"]), "model"
    batch.train(*where, SPEC)
    given = asked["online"]["settings"]
    archive = here(given["after_commit"]["archive_to"])
    settings = {"after_commit": {"archive_to": archive}, "grace_seconds": 0}
    run = OnlineRun(here(asked["online"]["inbox"]), where[1], "model", OnlineSettings.model_validate(settings))
    assert online.step(run).outcome is online.Outcome.COMMITTED
    assert keys(archive) == ["s.parquet"]
    assert batch.train(*where, SPEC).version == 2
    dataset = open_log(where[1], "model").head().manifest.dataset
    assert dataset is not None
    assert dataset.rows == 100
    labelled = settings | {"labels": {"inbox": here("s3://my-bucket/labels"), "key": "id"}}
    with pytest.raises(PlacesOverlap, match="where features and labels lie apart"):
        OnlineRun(here(asked["online"]["inbox"]), where[1], "model", OnlineSettings.model_validate(labelled))

"""Targets of every kind, from a batch training that is killed to shards, predictions, delayed labels and a reproduction."""

import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import keys, put, rows
from tests.storage.faults import Call, hooked
from tidemill.storage.audit import audit
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online.doors import drain
from tidemill.tasks.predict import SUCCESS, predict
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner, spec_of

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]
SPEC = Spec(target="y", learning_rate=0.05, batch_size=16, epochs=3, seed=7)
"""Nothing but the target and how to train: features, task and labels are left open."""


def _of(value: float, *labels: Any) -> Any:
    """The label of a number: about as many rows have each."""
    return labels[min(len(labels) - 1, int(abs(value) / 1.5))] if len(labels) > 2 else labels[value > 0]


KINDS: dict[str, tuple[Callable[[float], Any], str, Any]] = {
    "numbers": (lambda v: v, "regression", None),
    "text": (lambda v: _of(v, "no", "yes"), "binary", ("no", "yes")),
    "booleans": (lambda v: v > 0, "binary", (False, True)),
    "0 and 1": (lambda v: int(v > 0), "binary", None),
    "1 and 2": (lambda v: 1 + (v > 0), "binary", (1, 2)),
    "names": (lambda v: _of(v, "a", "b", "ç"), "multiclass", ("a", "b", "ç")),
    "1 to 4": (lambda v: _of(v, 1, 2, 3, 4), "multiclass", (1, 2, 3, 4)),
    "0 to 2": (lambda v: _of(v, 0, 1, 2), "multiclass", None),
    "floats": (lambda v: _of(v, 1.0, 2.0, 5.0), "multiclass", (1, 2, 5)),
}


def table(count: int, seed: int, kind: str, *, nulls: int = 0) -> pa.Table:
    """Rows of a, b, an id, and a target of this kind, `nulls` of which are missing."""
    label = KINDS[kind][0]
    made = rows(count, seed)
    target = [None if i < nulls else label(value) for i, value in enumerate(made["y"].to_pylist())]
    return (
        made.drop_columns(["y"])
        .append_column("id", pa.array(range(seed * count, (seed + 1) * count)))
        .append_column("y", pa.array(target))
    )


def read_back(url: str, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(open_store(url).read(key)))


def train(url: MakeUrl, registry: str, **settings: Any) -> VersionLog:
    batch.train(url("dataset"), url(registry), "model", SPEC, BatchSettings.model_validate(settings))
    return open_log(url(registry), "model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_any_kind_is_trained_followed_predicted_and_reproduced(kind: str, memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {f"part-{i}.parquet": table(120, i, kind, nulls=5) for i in range(2)})
    _, task, labels = KINDS[kind]
    log = train(memory_url, "registry")
    manifest = log.head().manifest
    assert manifest.resolved_spec is not None
    assert [column["name"] for column in manifest.resolved_spec["features"]] == ["a", "b"]
    assert manifest.resolved_spec["task"] == task
    assert manifest.resolved_spec.get("labels") == (None if labels is None else list(labels))
    assert (manifest.spec["task"], manifest.spec["features"][0]["name"]) == (None, "*")
    assert list(manifest.unused_columns) == ["id"]
    assert manifest.metrics["unlabelled_rows"] <= 10
    assert "baseline" in manifest.metrics

    shards = {f"{i}.parquet": table(40, 10 + i, kind, nulls=1).drop_columns(["id"]) for i in range(3)}
    settings = OnlineSettings(after_commit={"archive_to": memory_url("archive")}, limits={"max_shards": 1})
    put(memory_url("inbox"), shards)
    report = drain(memory_url("inbox"), memory_url("registry"), "model", settings)
    assert (report.versions, report.rejected, report.rows) == (3, 0, 117)
    assert spec_of(log, log.head()).task == task
    assert load_learner(log, log.head()).features.labels == labels

    predict(memory_url("registry"), "model", memory_url("dataset"), memory_url("out"), "head")
    predicted = read_back(memory_url("out"), "part-0.parquet")
    if labels is None:
        assert predicted.schema.names == ["prediction"]
    else:
        assert predicted.schema.names == ["prediction", "probabilities"]
        assert predicted.schema.field("prediction").type == pa.array(labels).type
        assert json.loads(open_store(memory_url("out")).read(SUCCESS))["labels"] == list(labels)
        best = torch.tensor(predicted["probabilities"].to_pylist()).argmax(1).tolist()
        assert predicted["prediction"].to_pylist() == [labels[i] for i in best]
        assert len(set(best)) > 1

    again = reproduce(log, [open_store(memory_url("archive"))])
    assert (again.reproduced, again.findings) == (3, [])
    assert audit(log).findings == []


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("kind", ["text", "1 to 4", "numbers"])
def test_killed_at_any_write_it_ends_with_the_same_bits(kind: str, memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {f"part-{i}.parquet": table(60, i, kind) for i in range(2)})
    put(memory_url("inbox"), {"s.parquet": table(30, 5, kind)})

    def run(registry: str, hook: Callable[[Call], None]) -> VersionLog:
        stores = hooked(hook, concurrency=1)
        batch.train(memory_url("dataset"), memory_url(registry), "model", SPEC, stores=stores)
        drain(memory_url("inbox"), memory_url(registry), "model", OnlineSettings(after_commit="keep"), stores=stores)
        return open_log(memory_url(registry), "model")

    writes: list[str] = []
    reference = run("reference", lambda call: writes.append(call.name) if _is_write(call) else None)
    assert len(writes) > 10
    for number, moment in enumerate(writes):

        def kill(call: Call, moment: str = moment) -> None:
            if call.name == moment and _is_write(call):
                raise Killed

        registry = f"registry-{number}"
        with pytest.raises(Killed):
            run(registry, kill)
        log = run(registry, lambda _: None)
        assert log.head().number == 1
        for version in range(2):
            ours, theirs = log.version(version).manifest, reference.version(version).manifest
            assert (ours.resolved_spec, ours.unused_columns) == (theirs.resolved_spec, theirs.unused_columns)
            assert ours.blobs.weights.sha256 == theirs.blobs.weights.sha256
            assert ours.blobs.state.sha256 == theirs.blobs.state.sha256


def _is_write(call: Call) -> bool:
    """Of the model: a store is asked only once in a process what it promises."""
    return call.phase == "before" and call.verb in ("write", "create", "replace") and call.key.startswith("model/")


@pytest.mark.parametrize(
    ("kind", "bad", "told"),
    [
        ("text", "maybe", "'maybe', which is none of the model's 2 labels ('no', 'yes')"),
        ("1 to 4", 5, "5, which is none of the model's 4 labels (1, 2, 3, 4)"),
        ("0 and 1", 2, "2, but binary labels are 0 or 1"),
        ("0 to 2", 3, "3, but multiclass labels are whole numbers from 0 to 2"),
    ],
)
def test_a_shard_with_an_unknown_label_is_quarantined_whole(
    kind: str, bad: Any, told: str, memory_url: MakeUrl
) -> None:
    put(memory_url("dataset"), {"part.parquet": table(120, 0, kind)})
    log = train(memory_url, "registry")
    good = table(40, 2, kind)
    labels = good["y"].to_pylist()
    labels[25] = bad
    put(memory_url("inbox"), {"a.parquet": good.set_column(3, "y", pa.array(labels)), "b.parquet": good})
    report = drain(memory_url("inbox"), memory_url("registry"), "model")
    assert (report.shards, report.rows, report.rejected) == (1, 40, 1)
    [rejected] = log.head().manifest.rejected
    assert rejected.key == "a.parquet"
    assert rejected.reason.startswith("target 'y' of a.parquet row group 0 holds ")
    assert told in rejected.reason


def test_delayed_labels_are_text_too(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"part.parquet": table(120, 0, "text")})
    log = train(memory_url, "registry")
    shard = table(40, 2, "text")
    features, labels = shard.drop_columns(["y"]), shard.select(["id", "y"])
    put(
        memory_url("inbox"),
        {"a.parquet": features, "b.parquet": features, "c.parquet": features, "d.parquet": features},
    )
    unknown = labels.set_column(1, "y", pa.array(["maybe", *labels["y"].to_pylist()[1:]]))
    contradiction = pa.concat_tables([labels, labels.set_column(1, "y", pa.array(["no"] * 40))])
    put(
        memory_url("labels"),
        {
            "a.parquet": labels,
            "b.parquet": unknown,
            "c.parquet": labels.set_column(1, "y", pa.array([1.0] * 40)),
            "d.parquet": contradiction,
        },
    )
    settings = OnlineSettings(
        labels={"inbox": memory_url("labels"), "key": "id"}, after_commit={"archive_to": memory_url("archive")}
    )
    report = drain(memory_url("inbox"), memory_url("registry"), "model", settings)
    assert (report.shards, report.rejected) == (1, 3)
    reasons = {bad.key: bad.reason for bad in log.head().manifest.rejected}
    assert "holds 'maybe', which is none of the model's 2 labels" in reasons["b.parquet"]
    assert "column 'y' of" in reasons["c.parquet"]
    assert "has type double, but the model was begun with a text" in reasons["c.parquet"]
    assert "with different labels in 'y'" in reasons["d.parquet"]
    assert sorted(keys(memory_url("inbox"))) == ["b.parquet", "c.parquet", "d.parquet"]
    again = reproduce(log, [open_store(memory_url("archive"))])
    assert (again.reproduced, again.findings) == (1, [])


def test_a_holdout_with_an_unknown_label_names_it(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"part.parquet": table(120, 0, "text")})
    put(memory_url("holdout"), {"part.parquet": table(120, 0, "names")})
    with pytest.raises(ColumnError, match=r"holds '[abç]', which is none of the model's 2 labels"):
        train(memory_url, "registry", holdout_dataset=memory_url("holdout"))
    assert not [key for key in keys(memory_url("registry")) if key.endswith("safetensors")], "before the first epoch"


def test_retraining_keeps_the_task_and_learns_the_labels_anew(memory_url: MakeUrl) -> None:
    from tidemill.tasks.online.step import OnlineRun, retraining

    put(memory_url("dataset"), {"part.parquet": table(120, 0, "1 to 4")})
    train(memory_url, "registry")
    settings = OnlineSettings(gate={"after_refusals": {"retrain_on": memory_url("dataset")}})
    *_, spec, _ = retraining(OnlineRun(memory_url("inbox"), memory_url("registry"), "model", settings))
    assert spec == SPEC.model_copy(update={"task": "multiclass"})


def test_the_pass_over_a_text_target_costs_no_second_one(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"part.parquet": table(120, 0, "text")})
    run = batch.open_run(
        batch.take_snapshot(memory_url("dataset")), memory_url("registry"), "model", SPEC, BatchSettings()
    )
    batch.train_epoch(run, 0)
    again = batch.open_run(
        batch.take_snapshot(memory_url("dataset")), memory_url("registry"), "model", SPEC, BatchSettings()
    )
    assert again.next_epoch() == 1
    assert again.resolved == run.resolved
    assert again.spec.task == "binary"

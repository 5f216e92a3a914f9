"""The answers that were given are scored when their labels come: as they stand in the log of requests."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.data import put, rows
from tests.tasks.test_label_kinds import KINDS, SPEC, table
from tidemill.flows import views
from tidemill.storage.log import open_log
from tidemill.storage.manifest import Consumed
from tidemill.storage.status import look
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.history.page import page
from tidemill.tasks.history.reading import HistoryReader
from tidemill.tasks.online.doors import drain
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.classes import predicted_columns
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.loop import predict, score
from tidemill.tasks.training.request_log import PREFIX, REQUEST, TIME, TYPES, VERSION
from tidemill.tasks.versions import load_frozen


def asked(frozen: Network, version: int, features: pa.Table) -> pa.Table:
    """A shard as a server writes it: the rows that it was asked for, and what it has answered."""
    put(where := f"memory://asked-{id(features):x}", {"a.parquet": features})
    outputs = torch.cat(list(predict(frozen, batch.take_snapshot(where).row_groups)))
    count = features.num_rows
    told = {
        REQUEST: pa.array([f"{version}-{i}" for i in range(count)], TYPES[REQUEST]),
        TIME: pa.array([datetime.now(UTC)] * count, TYPES[TIME]),
        VERSION: pa.array([version] * count, TYPES[VERSION]),
    }
    for name, values in told.items():
        features = features.append_column(name, values)
    for field, values in predicted_columns(outputs, frozen.features.labels):
        features = features.append_column(field.with_name(PREFIX + field.name), values)
    return features


class World:
    def __init__(self, memory_url: Any, kind: str = "numbers", **spec: Any) -> None:
        self.url, self.kind = memory_url, kind
        put(self.url("dataset"), {"a.parquet": self.rows(200, 0)})
        for name in ("inbox", "labels"):
            put(self.url(name), {})
        batch.train(self.url("dataset"), self.url("registry"), "model", SPEC.model_copy(update=spec))
        self.log = open_log(self.url("registry"), "model")

    def rows(self, count: int, seed: int) -> pa.Table:
        found = table(count, seed, self.kind).drop_columns("id")
        return found.append_column("z", found["a"]) if self.kind == "numbers" else found

    def shard(self, key: str, version: int, count: int, seed: int) -> pa.Table:
        """Put what a version was asked, and the labels; returns its rows with the labels."""
        rows = self.rows(count, seed)
        shard = asked(load_frozen(self.log, self.log.version(version)), version, rows.drop_columns("y"))
        put(self.url("inbox"), {key: shard})
        put(self.url("labels"), {key: pa.table({REQUEST: shard[REQUEST], "y": rows["y"]})})
        return rows

    def drain(self, **settings: Any) -> OnlineReport:
        labels = {"inbox": self.url("labels"), "key": REQUEST, "wait_seconds": 3600.0}
        return drain(
            self.url("inbox"),
            self.url("registry"),
            "model",
            OnlineSettings.model_validate({"labels": labels, **settings}),
        )

    @property
    def consumed(self) -> Consumed:
        return self.log.head().manifest.consumed[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_the_answers_is_that_of_the_version_that_gave_them(kind: str, memory_url: Any) -> None:
    world = World(memory_url, kind)
    rows = world.shard("a.parquet", 0, 60, 1)
    report = world.drain(new_columns="fail", after_commit={"archive_to": memory_url("archive")})
    assert (report.rows, report.rejected) == (60, 0), "they are no new columns"
    served = world.consumed.served
    assert served is not None
    ((version, count),) = [(each.version, each.rows) for each in served]
    assert (version, count) == (0, 60)
    put(memory_url("same"), {"a.parquet": rows})
    expected = score(
        load_frozen(world.log, world.log.version(0)), batch.take_snapshot(memory_url("same")).row_groups
    ).finite
    assert served[0].score == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert report.served == served[0].score
    assert world.log.head().manifest.metrics["served"] == served[0].score
    assert world.consumed.predicted is None, "it need not be guessed who served"
    assert reproduce(world.log, [open_store(memory_url("archive"))]).findings == []


def test_several_targets_and_weights_of_rows_count_as_they_do_in_training(memory_url: Any) -> None:
    made = rows(200, 0).append_column("w", pa.array([1.0 + i % 3 for i in range(200)]))
    made = made.append_column("z", made["a"])
    spec = SPEC.model_copy(update={"target": ("y", "z"), "sample_weight": "w", "standardize_target": True})
    put(memory_url("dataset"), {"a.parquet": made})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", spec)
    log = open_log(memory_url("registry"), "model")
    frozen = load_frozen(log, log.version(0))
    shard = asked(frozen, 0, made.slice(0, 70).drop_columns(["y", "z"]))
    put(memory_url("inbox"), {"a.parquet": shard})
    known = pa.table({REQUEST: shard[REQUEST], "y": made["y"].slice(0, 70), "z": made["z"].slice(0, 70)})
    put(memory_url("labels"), {"a.parquet": known.slice(0, 30), "b.parquet": known.slice(30)})
    labels = {"inbox": memory_url("labels"), "key": REQUEST, "wait_seconds": 3600.0}
    drain(memory_url("inbox"), memory_url("registry"), "model", OnlineSettings.model_validate({"labels": labels}))
    (served,) = log.head().manifest.consumed[0].served or ()
    put(memory_url("same"), {"a.parquet": made.slice(0, 70)})
    expected = score(frozen, batch.take_snapshot(memory_url("same")).row_groups).finite
    assert served.score == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_who_looks_is_told(memory_url: Any) -> None:
    world = World(memory_url)
    world.shard("a.parquet", 0, 60, 1)
    report = world.drain()
    mae = f"mae {report.served['mae']:.4g}"
    assert mae in next(line for line in views.followed(report)[1].splitlines() if "answers" in line)
    _, told = views.status(look(world.log, behind_seconds=900.0))
    assert mae in next(line for line in told.splitlines() if "answers" in line)
    assert "60 rows of its shards had one in time, 0 had none" in told
    history = HistoryReader(world.log).read()
    assert f"{history.metric} of the answers" in page(history)


def test_answers_of_several_versions_are_scored_apart(memory_url: Any) -> None:
    world = World(memory_url)
    world.shard("a.parquet", 0, 60, 1)
    world.drain()
    first, second = world.rows(30, 5), world.rows(40, 6)
    shards = [
        asked(load_frozen(world.log, world.log.version(version)), version, rows.drop_columns("y"))
        for version, rows in enumerate((first, second))
    ]
    put(memory_url("inbox"), {"b.parquet": pa.concat_tables(shards)})
    keys = pa.concat_tables(shards)[REQUEST]
    put(memory_url("labels"), {"b.parquet": pa.table({REQUEST: keys, "y": pa.concat_tables([first, second])["y"]})})
    world.drain()
    assert [(each.version, each.rows) for each in world.consumed.served or ()] == [(0, 30), (1, 40)]
    mean = world.log.head().manifest.metrics["served"]["mae"]
    assert mean == pytest.approx(sum(each.rows * each.score["mae"] for each in world.consumed.served or ()) / 70)


def test_answers_change_no_bit(memory_url: Any) -> None:
    world, other = World(lambda name: memory_url(f"one/{name}")), World(lambda name: memory_url(f"two/{name}"))
    rows = world.shard("a.parquet", 0, 60, 1)
    world.drain()
    put(other.url("inbox"), {"a.parquet": rows})
    drain(other.url("inbox"), other.url("registry"), "model")
    assert world.log.head().manifest.blobs.weights.sha256 == other.log.head().manifest.blobs.weights.sha256


def test_answers_of_another_task_are_told_of_and_fail_nothing(
    memory_url: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(memory_url)
    rows = world.rows(20, 3)
    shard = asked(load_frozen(world.log, world.log.version(0)), 0, rows.drop_columns("y"))
    at = shard.schema.get_field_index(f"{PREFIX}prediction")
    put(memory_url("inbox"), {"a.parquet": shard.set_column(at, shard.schema.names[at], [["yes"] * 20])})
    put(memory_url("labels"), {"a.parquet": pa.table({REQUEST: shard[REQUEST], "y": rows["y"]})})
    assert world.drain().rows == 20
    assert world.consumed.served is None
    assert "cannot be scored: ColumnError" in caplog.text or "none of this model's" in caplog.text


def test_rows_without_an_answer_or_a_label_do_not_count(memory_url: Any) -> None:
    world = World(memory_url)
    rows = world.rows(20, 3)
    shard = asked(load_frozen(world.log, world.log.version(0)), 0, rows.drop_columns("y"))
    at = shard.schema.get_field_index(f"{PREFIX}prediction")
    holed = pa.array([None, *shard.column(at).to_pylist()[1:]], pa.float32())
    put(memory_url("inbox"), {"a.parquet": shard.set_column(at, shard.schema.names[at], holed)})
    y = pa.array([*rows["y"].to_pylist()[:-2], None, None])
    put(memory_url("labels"), {"a.parquet": pa.table({REQUEST: shard[REQUEST], "y": y})})
    world.drain()
    assert [each.rows for each in world.consumed.served or ()] == [17]


def test_a_dataset_of_requests_gives_no_feature_to_a_new_model(memory_url: Any) -> None:
    world = World(memory_url)
    rows = world.rows(60, 3)
    shard = asked(load_frozen(world.log, world.log.version(0)), 0, rows.drop_columns("y")).append_column("y", rows["y"])
    put(memory_url("archive"), {"a.parquet": shard})
    batch.train(memory_url("archive"), memory_url("registry"), "other", SPEC)
    manifest = open_log(memory_url("registry"), "other").head().manifest
    assert manifest.resolved_spec is not None
    assert [column["name"] for column in manifest.resolved_spec["features"]] == ["a", "b", "z"]

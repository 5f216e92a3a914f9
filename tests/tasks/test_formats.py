"""Registries of every format that was ever written are read, audited and gone on from.

`tests/storage/formats/1` was written by the last Tidemill before format 2.0, `2.0` to `2.4` by the first ones with these.
Each has a batch version, an online version that archived its shard, one that rejected, a rollback, and one with delayed labels
that the gate refused.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.data import put, rows
from tidemill.storage.audit import audit
from tidemill.storage.disposal import quarantined
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import FORMAT, Compared, decode, sha256
from tidemill.storage.refs import Segments
from tidemill.tasks.online.step import OnlineRun, Outcome, step
from tidemill.tasks.online.used import decoded
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.versions import load_learner

FORMATS = Path(__file__).parents[1] / "storage/formats"


@pytest.fixture(params=sorted(path.name for path in FORMATS.iterdir()))
def log(request: pytest.FixtureRequest, tmp_path: Path) -> VersionLog:
    shutil.copytree(FORMATS / request.param, tmp_path / "registry")
    return open_log(str(tmp_path / "registry"), "model")


def test_a_history_of_any_format_is_sound_and_says_what_it_said(log: VersionLog) -> None:
    found = audit(log)
    assert (found.findings, found.versions, found.consumed, found.rejected) == ([], 6, 3, 1)
    versions = [log.version(number).manifest for number in range(6)]
    assert [v.kind for v in versions] == ["batch", "online", "online", "online", "rollback", "online"]
    assert {v.format for v in versions} <= {"2.0", "2.1", "2.2", "2.3", FORMAT}, (
        "told as the newest major format tells it"
    )
    [debt] = versions[1].owed
    assert (debt.key, debt.action, debt.destination) == ("a.parquet", "archive", "memory://format-1/archive")
    [debt] = versions[2].owed
    assert (debt.key, debt.action, debt.reason is not None) == ("b.parquet", "quarantine", True)
    [features] = versions[5].consumed
    [labels] = features.labels
    assert (features.inbox, labels.inbox) == ("memory://format-1/features", "memory://format-1/labels")
    assert (features.key, labels.key, labels.column) == ("d.parquet", "d.parquet", "id")
    assert versions[5].gate is not None
    assert versions[5].gate.decision == "refused"
    assert isinstance(versions[5].gate.recent, Compared)
    assert versions[5].metrics["recent"]["shards"] == 1
    assert versions[0].metrics["best_epoch"] == len(versions[0].metrics["epoch_holdout"])
    assert list(quarantined(log)) == [versions[2].owed[0].destination.rpartition("/")[2]]


def test_what_format_2_1_has_more_is_there(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "2.1", tmp_path / "registry")
    first = open_log(str(tmp_path / "registry"), "model").version(0).manifest
    assert first.resolved_spec is not None
    assert [column["name"] for column in first.spec["features"]] == ["*", "!id"]
    assert [column["name"] for column in first.resolved_spec["features"]] == ["a", "b"]
    assert (first.spec["task"], first.resolved_spec["task"]) == (None, "regression")
    assert set(first.metrics["baseline"]) == {"loss", "mae", "rmse"}


def test_what_format_2_2_has_more_is_there(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "2.2", tmp_path / "registry")
    log = open_log(str(tmp_path / "registry"), "model")
    versions = [log.version(number).manifest for number in range(6)]
    (first,), (second,) = versions[1].consumed, versions[3].consumed
    assert [(each.key, each.rows, each.column) for each in first.joined or ()] == [("l.parquet", 30, "id")]
    assert [(each.key, each.rows) for each in second.joined or ()] == [("l.parquet", 20), ("m.parquet", 10)]
    assert [(each.version, each.rows) for each in first.served or ()] == [(0, 30)]
    for version in versions[1:3]:
        assert [decoded(each).tolist() for each in version.open_labels or ()] == [[True] * 30 + [False] * 20]
    assert [(each.key, each.rows, each.unmatched) for each in versions[3].done_labels or ()] == [
        ("l.parquet", 50, 0),
        ("m.parquet", 10, 0),
    ]


def test_what_format_2_3_has_more_is_there(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "2.3", tmp_path / "registry")
    ref = open_log(str(tmp_path / "registry"), "model").version(0).manifest.dataset
    assert ref is not None
    of = ref.chosen
    assert of is not None
    assert (of.where, of.last, of.time_column) == ("a < 2 AND b IS NOT NULL", "4d", "t")
    assert (of.of_files, of.read_files, of.of_rows) == (2, 2, 240)
    assert of.since is not None
    assert of.until is not None
    assert (of.until - of.since).days == 4
    assert 0 < ref.rows < 2 * 96


def test_what_format_2_4_has_more_is_there(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "2.4", tmp_path / "registry")
    log = open_log(str(tmp_path / "registry"), "model")
    files = [log.version(number).manifest.blobs.weights for number in range(6)]
    segments = [{each.name: each for each in file.segments} for file in files if isinstance(file, Segments)]
    assert [[*each] for each in segments] == [["", "bias", "weight"]] * 6
    assert len({each[""].key for each in segments}) == 1, "the header is that of version 0 in all of them"
    assert [len(each["weight"].changed or ()) for each in segments] == [0, 1, 1, 2, 3, 4]
    weights = [sha256(log.read_blob(file)) for file in files]
    before = open_log(str(shutil.copytree(FORMATS / "2.3", tmp_path / "before")), "model")
    assert weights == [before.version(number).manifest.blobs.weights.sha256 for number in range(6)]


def test_a_history_of_any_format_is_gone_on_from(log: VersionLog, tmp_path: Path) -> None:
    before = log.head()
    load_learner(log, before)
    inbox = str(tmp_path / "inbox")
    put(inbox, {"e.parquet": rows(30, 9)})
    run = OnlineRun(inbox, log.store.url, "model", OnlineSettings(grace_seconds=0))
    assert step(run).outcome is Outcome.COMMITTED
    back = log.rollback(log.version(1))
    assert back.number == before.number + 2
    assert audit(log).findings == []
    stored = json.loads(log.store.read("model/log/00000006.json"))
    assert stored["format"] == FORMAT
    assert stored["parent"]["sha256"] == before.sha256


def test_every_manifest_of_the_kept_registries_is_of_the_format_that_its_folder_names() -> None:
    for path in FORMATS.glob("*/model/log/*.json"):
        stated = json.loads(path.read_bytes())["format"]
        assert str(stated) == path.parents[2].name
        decode(path.read_bytes(), str(path))

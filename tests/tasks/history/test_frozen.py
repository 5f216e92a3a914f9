"""The batch model scored anew on the archive: as if nothing had been trained online."""

from pathlib import Path

import pytest

from tests.flows.data import SPEC, parquet
from tidemill.storage.dataset import snapshot
from tidemill.storage.log import VersionLog
from tidemill.storage.retention import collect_garbage
from tidemill.storage.urls import open_store
from tidemill.tasks.batch import train
from tidemill.tasks.history.frozen import score_frozen
from tidemill.tasks.history.reading import HistoryReader
from tidemill.tasks.online.doors import drain
from tidemill.tasks.settings import Archive, GateSettings, Limits, OnlineSettings
from tidemill.tasks.training.loop import score
from tidemill.tasks.versions import load_learner

pytestmark = pytest.mark.slow


class Place:
    """A model that was trained in batch, and on four shards since, which are archived."""

    def __init__(self, folder: Path) -> None:
        self.urls = {name: str(folder / name) for name in ("data", "inbox", "registry", "archive")}
        self.write("data", "part", 200)
        train(self.urls["data"], self.urls["registry"], "m", SPEC)
        self.drain("a", "b")
        self.drain("c", "d")
        self.log = VersionLog(open_store(self.urls["registry"]), "m")
        self.archive = open_store(self.urls["archive"])

    def write(self, where: str, name: str, rows: int = 50) -> None:
        folder = Path(self.urls[where])
        folder.mkdir(exist_ok=True)
        # the opposite of what the batch training has seen: frozen, the model stays bad
        (folder / f"{name}.parquet").write_bytes(parquet(rows, seed=name, sign=1 if where == "data" else -1))

    def drain(self, *names: str) -> None:
        for name in names:
            self.write("inbox", name)
        settings = OnlineSettings(
            after_commit=Archive(archive_to=self.urls["archive"]),
            limits=Limits(max_shards=1),
            gate=GateSettings(champion="ignore"),
        )
        drain(self.urls["inbox"], self.urls["registry"], "m", settings)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_scores_are_those_of_the_batch_version_on_the_archived_shards(place: Place) -> None:
    history = HistoryReader(place.log).read()
    frozen = score_frozen(place.log, history, [place.archive])
    batch = load_learner(place.log, place.log.version(0)).network()
    expected = {}
    for number, (_, shard) in enumerate(history.shards, start=1):
        (stored,) = [info.key for info in place.archive.list() if info.key.startswith(shard.key)]
        groups = snapshot(f"{place.urls['archive']}/{stored}", open_store, batch.features.types).row_groups
        expected[number] = score(batch, groups).finite["rmse"]
    assert frozen.scores == pytest.approx(expected)
    assert len(expected) == 4
    assert not frozen.notes
    assert frozen.scores[1] == pytest.approx(history.shards[0][1].score["rmse"])  # nothing was learned before it


def test_a_shard_that_is_in_no_archive_is_counted_and_named_as_missing(place: Place) -> None:
    history = HistoryReader(place.log).read()
    gone = next(info.key for info in place.archive.list() if info.key.startswith("b."))
    place.archive.delete(gone)
    frozen = score_frozen(place.log, history, [place.archive])
    assert sorted(frozen.scores) == [1, 3, 4]
    assert list(frozen.notes) == ["The frozen model has no score on 1 of 4 shards: they are in none of the archives."]


def test_a_batch_model_out_of_retention_is_said_to_be_gone(place: Place) -> None:
    history = HistoryReader(place.log).read()
    place.log.store.delete("m/aliases/champion.json")
    collect_garbage(place.log, keep=1)
    frozen = score_frozen(place.log, history, [place.archive])
    assert not frozen.scores
    assert list(frozen.notes) == [
        "The frozen model has no score on 4 of 4 shards: the weights of version 0 are out of retention."
    ]


def test_after_a_second_batch_training_that_one_is_frozen(place: Place) -> None:
    place.write("data", "more", 200)
    train(place.urls["data"], place.urls["registry"], "m", SPEC)
    place.drain("e")
    history = HistoryReader(place.log, last=2).read()
    frozen = score_frozen(place.log, history, [place.archive])
    assert frozen.scores == pytest.approx({1: history.shards[0][1].score["rmse"]})
    last = HistoryReader(place.log, last=1).read()
    assert last.batch is not None
    assert last.batch.version == 5
    assert score_frozen(place.log, last, [place.archive]).scores == pytest.approx(dict(frozen.scores))

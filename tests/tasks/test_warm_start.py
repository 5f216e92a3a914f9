"""A batch run begins with the weights of a version or of a file: which ones, what is stored of it, and how it is gone on with."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file

from tests.data import SPEC, put, rows
from tidemill.storage.aliases import all_aliases, promote
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import CorruptObject, InvalidURL, NotFound, UnknownAlias, UnknownModel, UnknownVersion
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.records import DatasetRef
from tidemill.storage.retention import collect_garbage
from tidemill.storage.runs import BatchProgress
from tidemill.tasks import batch
from tidemill.tasks.batch_run import BatchRun, run_key
from tidemill.tasks.online import step as online
from tidemill.tasks.online.step import OnlineRun, Outcome
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.sources import SourceRef, key_begun, key_with, look_for_source
from tidemill.tasks.training.errors import StateMismatch
from tidemill.tasks.training.spec import Column, Spec
from tidemill.tasks.versions import load_learner

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]


def with_c(count: int, seed: int) -> pa.Table:
    """y = 2 a - b + 3 c."""
    table = rows(count, seed)
    c = torch.randn(count, generator=torch.Generator().manual_seed(1000 + seed))
    y = torch.tensor(table["y"].to_pylist()) + 3 * c
    return table.append_column("c", pa.array(c.tolist())).set_column(2, "y", pa.array(y.tolist()))


def changed(**settings: Any) -> Spec:
    return Spec.model_validate(SPEC.model_dump() | settings)


WIDER = changed(features=["c", "a", "b"], epochs=2)


class Place:
    """A model that was trained on columns a and b, and a dataset that has c too."""

    def __init__(self, make_url: MakeUrl) -> None:
        self.url = make_url
        put(self.url("old"), {"part.parquet": rows(240, 0)})
        put(self.url("new"), {f"part-{i}.parquet": with_c(120, i) for i in range(2)})
        self.log = self.train("old", SPEC, init_from=None)
        self.champion = f"{self.url('registry')}/model@champion"

    def settings(self, **settings: Any) -> BatchSettings:
        return BatchSettings.model_validate({"init_from": getattr(self, "champion", None), "holdout": 0} | settings)

    def train(
        self, dataset: str = "new", spec: Spec = WIDER, registry: str = "registry", **settings: Any
    ) -> VersionLog:
        batch.train(self.url(dataset), self.url(registry), "model", spec, self.settings(**settings))
        return open_log(self.url(registry), "model")

    def open(self, registry: str = "registry", **settings: Any) -> BatchRun:
        taken = batch.take_snapshot(self.url("new"))
        return batch.open_run(taken, self.url(registry), "model", WIDER, self.settings(**settings))


@pytest.fixture
def place(memory_url: MakeUrl) -> Place:
    return Place(memory_url)


def weights(log: VersionLog, number: int) -> str:
    return log.version(number).manifest.blobs.weights.sha256


def test_what_was_taken_is_told_and_stored(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    info = batch.train(place.url("new"), place.url("registry"), "model", WIDER, place.settings())
    stored = place.log.head().manifest.init_from
    assert stored is not None
    assert (stored.url, stored.version, stored.kept_statistics) == (place.log.url, 0, False)
    assert stored.sha256 == weights(place.log, 0)
    assert stored.taken == ("output 'y' (regression)", "column 'a'", "column 'b'")
    assert stored.missing == ("column 'c'",)
    assert stored.left_over == ()
    told = (
        f"began with weights of version 0 of {place.log.url}: output 'y' (regression), column 'a', column 'b'; new: column 'c'; "
        "columns are scaled by new statistics"
    )
    assert info.chosen[-1] == told
    assert told in caplog.messages


def test_training_begins_where_the_source_has_ended(place: Place) -> None:
    slow = changed(epochs=1, learning_rate=1e-9)
    log = place.train("old", slow, "other", keep_statistics=True)
    before, after = load_learner(place.log, place.log.head()), load_learner(log, log.head())
    for old, new in zip(before.model.parameters(), after.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    manifest = log.head().manifest
    assert manifest.init_from is not None
    assert manifest.init_from.kept_statistics
    assert manifest.counters["epochs"] == 1, "counters begin anew"


@pytest.mark.parametrize("kept", [False, True])
def test_statistics_are_those_of_the_new_rows_unless_they_are_kept(place: Place, kept: bool) -> None:
    put(place.url("new"), {"part-2.parquet": with_c(60, 9)})
    log = place.train(keep_statistics=kept)
    features = [load_learner(log, log.version(number)).features.statistics for number in (0, 1)]
    before, after = features
    assert before is not None
    assert after is not None
    assert after.mean_F[1:].equal(before.mean_F) is kept
    assert after.std_F[1:].equal(before.std_F) is kept


# ---- which run it is -------------------------------------------------------------------------------------------------
def test_a_run_is_known_by_what_its_source_holds_and_not_by_its_name() -> None:
    dataset = Snapshot(DatasetRef(url="memory://d", fingerprint="f", files=1, rows=1), ())
    key = run_key(dataset, SPEC, BatchSettings())
    assert key == run_key(dataset, SPEC, BatchSettings(init_from="r/m@champion", keep_statistics=True))
    one, other = (SourceRef(url="r", name="m", version=0, sha256=(sha, "state")) for sha in ("1", "2"))
    moved = one.model_copy(update={"url": "elsewhere", "version": 7})
    assert key_with(key, one, keep_statistics=False) == key_with(key, moved, keep_statistics=False)
    keys = {key, *(key_with(key, source, keep_statistics=keep) for source in (one, other) for keep in (False, True))}
    assert len(keys) == 5


def test_the_same_command_finds_its_version_though_the_alias_has_moved_to_it(place: Place) -> None:
    assert place.train().head().number == 1
    assert all_aliases(place.log) == {"champion": 1}
    assert place.train().head().number == 1
    assert place.train(init_from=place.champion.replace("champion", "0")).head().number == 1, "it is the same source"
    assert place.train(again=True).head().number == 2, "asked to train again, it begins where the alias is"
    stored = place.log.head().manifest.init_from
    assert stored is not None
    assert stored.version == 1


def test_a_run_that_is_done_is_found_by_what_was_asked(place: Place) -> None:
    """As a window of time is renewed once its run is done."""
    log, taken = open_log(place.url("registry"), "model"), batch.take_snapshot(place.url("new"))
    key = run_key(taken, WIDER, place.settings())
    assert key_begun(log, key, place.champion, keep_statistics=False) is None
    place.train()
    begun = key_begun(log, key, place.champion, keep_statistics=False)
    assert begun is not None
    assert BatchProgress(log, begun).finished()
    assert key_begun(log, key, None, keep_statistics=False) == key


def test_another_version_behind_the_alias_is_another_run(place: Place) -> None:
    place.train()
    place.train("old", changed(seed=8), init_from=None)
    log = place.train()
    assert [log.version(n).manifest.init_from is not None for n in range(4)] == [False, True, False, True]
    assert log.head().manifest.run != log.version(1).manifest.run
    promote(log, "champion", log.version(0))
    assert place.train().head().number == 3, "it was trained from there already"


def test_a_run_that_was_killed_goes_on_with_its_source_though_the_alias_has_moved(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    reference = place.train(registry="reference")
    killed = place.open()
    batch.prepare(killed)
    batch.train_epoch(killed, 0)
    place.train("old", changed(seed=8), init_from=None)
    caplog.set_level(logging.INFO)
    log = place.train()
    assert weights(log, 2) == weights(reference, 0)
    assert log.head().manifest.init_from == reference.head().manifest.init_from
    assert (
        f"a run that began with version 0 of {log.url} goes on; to begin with another, name its number" in caplog.text
    )


def test_a_run_that_was_killed_after_its_alias_had_moved_trains_nothing_twice(place: Place) -> None:
    killed = place.open()
    batch.prepare(killed)
    while (epoch := killed.next_epoch()) is not None:
        batch.train_epoch(killed, epoch)
    version = batch.register(killed, batch.evaluate(killed))
    promote(killed.log, "champion", version)
    assert place.train().head().number == 1
    assert place.open().progress.finished()


def test_a_run_with_nothing_stored_yet_begins_where_the_alias_is_now(place: Place) -> None:
    batch.prepare(place.open())
    place.train("old", changed(seed=8), init_from=None)
    stored = place.train().head().manifest.init_from
    assert stored is not None
    assert stored.version == 1


@pytest.mark.parametrize("kill_after", [1, 2])
def test_a_search_begins_each_of_its_learners_there(place: Place, kill_after: int) -> None:
    spec = changed(features=["c", "a", "b"], epochs="auto")
    reference = place.train(spec=spec, registry="reference", holdout=None)
    run = batch.open_run(
        batch.take_snapshot(place.url("new")), place.url("registry"), "model", spec, place.settings(holdout=None)
    )
    run.clock.seconds = 0
    batch.prepare(run)
    for _ in range(kill_after):
        epoch = run.next_epoch()
        assert epoch is not None
        batch.train_epoch(run, epoch)
    log = place.train(spec=spec, holdout=None)
    assert weights(log, 1) == weights(reference, 0)


# ---- files -----------------------------------------------------------------------------------------------------------
def test_a_file_of_weights_is_known_by_its_bytes(place: Place, tmp_path: Path) -> None:
    learner = load_learner(place.log, place.log.head())
    file = tmp_path / "first.safetensors"
    save_file({name: t * 2 for name, t in learner.model.state_dict().items()}, file)
    same = changed(epochs=1, learning_rate=1e-9)
    log = place.train("old", same, "other", init_from=str(file))
    stored = log.head().manifest.init_from
    assert stored is not None
    assert (stored.url, stored.version, stored.taken) == (f"file://{file}", None, ("weight", "bias"))
    found = parse_tensors(log.read_blob(log.head().manifest.blobs.weights))
    torch.testing.assert_close(found["weight"], learner.model.state_dict()["weight"] * 2, rtol=0, atol=1e-6)
    file.rename(tmp_path / "second.safetensors")
    same_bytes = str(tmp_path / "second.safetensors")
    assert place.train("old", same, "other", init_from=same_bytes).head().number == 0
    save_file({name: t * 3 for name, t in learner.model.state_dict().items()}, file)
    assert place.train("old", same, "other", init_from=str(file)).head().number == 1


def test_a_file_that_is_no_safetensors_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(StateMismatch, match=r"w\.safetensors are not a safetensors file"):
        place.train(init_from=str(tmp_path / "w.safetensors"))


# ---- what is not there -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ("{registry}/model", InvalidURL, "names no version: write REGISTRY/MODEL@ALIAS"),
        ("model@champion", InvalidURL, "names no version"),
        ("{registry}/model@", InvalidURL, "names no version"),
        ("{registry}/other@champion", UnknownModel, "other"),
        ("{registry}/model@best", UnknownAlias, "has no alias 'best'"),
        ("{registry}/model@7", UnknownVersion, "7"),
        ("{registry}/w.safetensors", NotFound, "init_from: there is no file"),
    ],
)
def test_a_source_that_is_not_there_is_an_error_at_once(
    place: Place, named: str, error: type[Exception], message: str
) -> None:
    named = named.format(registry=place.url("registry"))
    with pytest.raises(error, match=message):
        look_for_source(named)
    with pytest.raises(error, match=message):
        place.open(init_from=named)


def test_a_version_whose_weights_retention_has_removed_is_an_error_that_says_so(place: Place) -> None:
    log = place.train("old", changed(seed=8), init_from=None)
    collect_garbage(log, keep=1)
    with pytest.raises(UnknownVersion, match="retention removed"):
        place.train(init_from=place.champion.replace("champion", "0"))


def test_a_damaged_record_of_the_source_says_what_to_do(place: Place) -> None:
    batch.prepare(place.open())
    [pinned] = [info.key for info in place.log.store.list("model/runs/") if info.key.endswith("source.json")]
    place.log.store.write(pinned, b"{}")
    with pytest.raises(CorruptObject, match="Delete it"):
        place.open()


def test_statistics_of_what_has_none_cannot_be_kept() -> None:
    for settings in ({}, {"init_from": "w.safetensors"}):
        with pytest.raises(ValueError, match="keep_statistics needs init_from with a version"):
            BatchSettings.model_validate({"keep_statistics": True} | settings)


# ---- a new column in a stream ----------------------------------------------------------------------------------------
def waves(count: int, seed: int) -> pa.Table:
    """y = 2 sin(2 a) + a b + c: most of it takes long to learn."""
    a, b, c = torch.randn(3, count, generator=torch.Generator().manual_seed(seed))
    return pa.table({"a": a.tolist(), "b": b.tolist(), "c": c.tolist(), "y": (2 * (2 * a).sin() + a * b + c).tolist()})


def test_a_stream_with_a_new_column_goes_on_without_losing_what_was_learned(memory_url: MakeUrl) -> None:
    """c comes with the seventh shard. The model that is begun for it, on the only two shards that have it, knows what was learned
    of a and b: at once it is better than before, and better than one that begins with nothing."""
    settings = OnlineSettings.model_validate({"grace_seconds": 0, "limits": {"max_shards": 1}})

    def drain(registry: str, shards: dict[str, pa.Table]) -> list[float]:
        """The error on each shard before it was trained on."""
        put(memory_url("inbox"), shards)
        run = OnlineRun(memory_url("inbox"), memory_url(registry), "model", settings)
        while online.step(run).outcome is not Outcome.IDLE:
            pass
        log = open_log(memory_url(registry), "model")
        versions = [log.version(n).manifest for n in range(log.head().number + 1)]
        return [shard.score["rmse"] for version in versions for shard in version.consumed][-len(shards) :]

    def train(dataset: str, registry: str, spec: Spec, **more: Any) -> None:
        given = BatchSettings.model_validate({"holdout": 0} | more)
        batch.train(memory_url(dataset), memory_url(registry), "model", spec, given)

    spec = Spec.model_validate(
        {
            "features": ["a", "b"],
            "target": "y",
            "model": {"factory": "mlp", "arguments": {"hidden": [32]}},
            "optimizer": {"name": "adam"},
            "learning_rate": 0.01,
            "batch_size": 16,
            "epochs": 25,
        }
    )
    put(memory_url("old"), {"part.parquet": waves(400, 0).drop_columns(["c"])})
    train("old", "registry", spec)
    with_c = {f"t{i}.parquet": waves(40, 110 + i) for i in range(2)}
    before = drain("registry", {f"s{i}.parquet": waves(40, 100 + i).drop_columns(["c"]) for i in range(6)} | with_c)
    assert open_log(memory_url("registry"), "model").head().manifest.new_columns == {"c": "double"}

    wider = spec.model_copy(
        update={"features": (Column(name="c"), *spec.features), "epochs": 12, "learning_rate": 0.003}
    )
    put(memory_url("recent"), with_c)
    train("recent", "registry", wider, init_from=f"{memory_url('registry')}/model@head", keep_statistics=True)
    train("recent", "cold", wider)
    later = {f"u{i}.parquet": waves(40, 120 + i) for i in range(4)}
    warm, cold = drain("registry", later), drain("cold", later)
    assert max(warm) < min(before), "it knows what c does, too"
    assert all(new < old / 2 for new, old in zip(warm, cold, strict=True))

"""The places of a run: none is made, none lies in another, and the same one is known under every spelling."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data import keys, put, rows
from tests.storage.faults import Counting, hooked
from tests.tasks.online.test_step import begin, drain, open_run
from tidemill.storage.audit import audit
from tidemill.storage.errors import InvalidURL, PlacesOverlap, StoreNotFound, UnknownModel
from tidemill.storage.log import open_log
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.online import step as online

MakeUrl = Callable[[str], str]


@pytest.fixture
def registry(make_url: MakeUrl) -> str:
    begin(make_url("registry"), make_url("dataset"))
    return make_url("registry")


@pytest.fixture
def memory_registry(memory_url: MakeUrl) -> str:
    begin(memory_url("registry"), memory_url("dataset"))
    return memory_url("registry")


def test_every_place_is_opened_once(memory_registry: str, memory_url: MakeUrl) -> None:
    """The holdout and what is owed too: what was found out about a store is kept, and an injected one reaches them all."""
    put(memory_url("holdout"), {"part-0.parquet": rows(30, 5)})
    put(memory_url("inbox"), {"a.parquet": rows(30, 1)})
    opened: list[str] = []

    def stores(url: str) -> Store:
        opened.append(url)
        return open_store(url)

    run = open_run(memory_url("inbox"), memory_registry, stores, gate={"holdout_dataset": memory_url("holdout")})
    assert drain(run).shards == 1
    assert sorted(opened) == sorted([memory_url("holdout"), memory_url("inbox"), memory_registry])


def test_an_inbox_that_does_not_exist_is_not_made(memory_registry: str, tmp_path) -> None:
    run = open_run(str(tmp_path / "typo"), memory_registry)
    with pytest.raises(StoreNotFound, match="typo"):
        online.step(run)
    assert not (tmp_path / "typo").exists()


INSIDE = {
    "after_commit.archive_to": lambda url: {"after_commit": {"archive_to": url}},
    "gate.holdout_dataset": lambda url: {"gate": {"holdout_dataset": url}},
    "gate.after_refusals.retrain_on": lambda url: {"gate": {"after_refusals": {"retrain_on": url}}},
}


@pytest.mark.parametrize("place", INSIDE)
def test_nothing_else_may_lie_inside_the_inbox(place: str, memory_registry: str, memory_url: MakeUrl) -> None:
    with pytest.raises(PlacesOverlap, match=rf"{place}, memory://.*/inbox/here, lies inside the inbox"):
        open_run(memory_url("inbox"), memory_registry, **INSIDE[place](memory_url("inbox") + "/here"))


def test_a_registry_inside_the_inbox_is_refused(memory_registry: str, memory_url: MakeUrl) -> None:
    before = keys(memory_registry)
    for inbox in (memory_registry, f"{memory_registry}/model/log", memory_registry.rpartition("/")[0]):
        with pytest.raises(PlacesOverlap, match=r"the registry, memory://.*, (is|holds|lies inside) the inbox"):
            open_run(inbox, memory_registry)
    assert keys(memory_registry) == before


def test_the_dataset_that_a_version_was_trained_on_is_no_inbox(registry: str, make_url: MakeUrl) -> None:
    begin(registry, make_url("newer"))
    for name, version in (("dataset", 0), ("newer", 1)):
        before = keys(make_url(name))
        with pytest.raises(PlacesOverlap, match=rf"the dataset of version {version}, .* is the inbox"):
            open_run(make_url(name), registry)
        with pytest.raises(PlacesOverlap, match=rf"the dataset of version {version}, .* holds the inbox"):
            open_run(f"{make_url(name)}/part=0", registry)
        assert keys(make_url(name)) == before


def test_an_archive_inside_a_dataset_is_wanted_but_not_of_delayed_labels(registry: str, make_url: MakeUrl) -> None:
    archive = {"after_commit": {"archive_to": make_url("dataset") + "/archive"}}
    open_run(make_url("inbox"), registry, **archive)
    with pytest.raises(PlacesOverlap, match=r"features and labels lie apart, .* lies inside the dataset of version 0"):
        open_run(make_url("inbox"), registry, **archive, labels={"inbox": make_url("labels"), "key": "id"})


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["link/inbox", "/", "file:////", "relative"])
def test_an_inbox_that_is_kept_is_not_trained_on_again_under_another_spelling(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin("registry", "dataset")
    os.symlink(".", "link")
    first = f"{tmp_path}/inbox"
    put(first, {"a.parquet": rows(20, 1)})
    assert drain(open_run(first, "registry", after_commit="keep")).shards == 1
    other = {"relative": "./inbox", "link/inbox": f"{tmp_path}/link/inbox"}.get(spelling, f"{spelling}{first[1:]}")
    put(first, {"b.parquet": rows(20, 2)})
    assert drain(open_run(other, "registry", after_commit="keep")).shards == 1
    assert drain(open_run(first, "registry", after_commit="keep")).shards == 0
    log = open_log("registry", "model")
    consumed = [shard.key for version in log.history(log.head()) for shard in version.manifest.consumed]
    assert sorted(consumed) == ["a.parquet", "b.parquet"]
    assert audit(log).findings == []
    assert drain(open_run(other, "registry", after_commit="delete")).duplicates == 2  # known, hence removed
    assert keys(first) == []


@pytest.mark.parametrize("meanwhile", ["nothing", "a commit", "begun anew", "removed"])
def test_the_head_of_the_opening_is_gone_on_from_only_if_nothing_has_happened_since(
    memory_registry: str, memory_url: MakeUrl, meanwhile: str
) -> None:
    put(memory_url("inbox"), {"a.parquet": rows(20, 1)})
    counting = Counting()
    run = open_run(memory_url("inbox"), memory_registry, hooked(counting))
    store = open_store(memory_registry)
    if meanwhile == "a commit":
        assert drain(open_run(memory_url("inbox"), memory_registry)).shards == 1
        put(memory_url("inbox"), {"b.parquet": rows(20, 2)})
    if meanwhile in ("begun anew", "removed"):
        for info in [*store.list("model/")]:
            store.delete(info.key)
    if meanwhile == "begun anew":
        begin(memory_registry, memory_url("again"))
    before = counting.calls.total()
    if meanwhile == "removed":
        with pytest.raises(UnknownModel):
            run.head()
        return
    head = run.head().version
    assert head.sha256 == open_log(memory_registry, "model").head().sha256
    assert head.number == (1 if meanwhile == "a commit" else 0)
    after = counting.calls.total()
    run.forget()
    run.head()
    assert (counting.calls.total() - after > after - before) == (meanwhile == "nothing")
    assert online.step(run).outcome is online.Outcome.COMMITTED


@pytest.mark.parametrize("name", ["in/*.parquet", "in/part-[01]", "in/part-0.parquet"])
@pytest.mark.parametrize("labels", [False, True])
def test_an_inbox_that_is_no_folder_is_refused(registry: str, make_url: MakeUrl, name: str, labels: bool) -> None:
    """Where a store has no folders, a follower would look there for ever. A local folder has to be there in any case."""
    put(make_url("in"), {"part-0.parquet": rows(20, 1)})
    url = f"{make_url('in').removesuffix('/in')}/{name}"
    inbox, settings = (url, {}) if not labels else (make_url("inbox"), {"labels": {"inbox": url, "key": "id"}})
    with pytest.raises(InvalidURL, match=r"(is a pattern|has the name of a file).*Name the folder"):
        open_run(inbox, registry, **settings)


@pytest.mark.parametrize("name", ["what[0]", "all.parquet"])
def test_a_folder_may_have_any_name(registry: str, make_url: MakeUrl, name: str) -> None:
    put(make_url(name), {"part-0.parquet": rows(20, 1)})
    assert drain(open_run(make_url(name), registry)).shards == 1

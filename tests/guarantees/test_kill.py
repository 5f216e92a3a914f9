"""SIGKILL before and after every storage call, then a rerun: the same bits as never having been killed."""

import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import polars
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from tests.conftest import AZURE, BUCKET, CLOUDS, GCS, MINIO_LIKE
from tests.data import parquet
from tests.guarantees.audit import audit, check_bits
from tests.guarantees.children import (
    BATCH,
    CLASSES,
    DATASET,
    ONLINE,
    REJECTED,
    ROWS,
    SHARDS,
    SPEC,
    Kill,
    MakeUrl,
    backtest_spec,
    bits,
    careless_drain,
    collect_garbage,
    compare_specs,
    copy,
    dated_drain,
    delta_options,
    drain,
    drain_in_segments,
    drain_pairs,
    fill,
    in_child,
    rollback,
    sample,
    start_server,
    table,
    train,
    train_by_recipe,
    train_while_written,
    waiting,
    watched_drain,
)
from tidemill.storage.aliases import all_aliases, promote
from tidemill.storage.dataset import snapshot
from tidemill.storage.log import VersionLog
from tidemill.storage.refs import Segment
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import (
    Archive,
    BatchSettings,
    GateSettings,
    LabelSettings,
    OnlineSettings,
    Retrain,
    Triggers,
)
from tidemill.tasks.tenants.pairs import Pair
from tidemill.tasks.training.spec import Spec

GATED = ONLINE.model_copy(
    update={"gate": GateSettings(tolerance=0.0, recent_shards=2, refusals=1, after_refusals="rollback")}
)
"""One version that is no better than the champion, and the run goes back to the champion."""


def retrained(dataset: str) -> OnlineSettings:
    """Two versions in a row that are no better than the champion, and a batch training on what was archived too."""
    gate = GATED.gate.model_copy(update={"refusals": 2, "after_refusals": Retrain(retrain_on=dataset)})
    return GATED.model_copy(update={"gate": gate, "after_commit": Archive(archive_to=f"{dataset}/archive")})


DELAYED = ONLINE.model_copy(
    update={
        "gate": GateSettings(),
        "train_when": Triggers(max_wait_seconds=1e-6, drift="adwin", score_drop=0.1),
    }
)
PATIENT = BatchSettings(holdout=0.3, patience=1)
MOMENTS = {"local": 7, "s3": 3, MINIO_LIKE: 3, GCS: 5, AZURE: 5}
"""How many moments of a sweep CI takes, spread over the run; more of an online run on local, fewer of what takes long."""
OF_MANY = {"local": 1, "s3": 1}
"""The same of a run of many models with one learner in memory, and with two; moments are calls by number."""
SAMPLE, FULL = {"local": 3, "s3": 2}, {"local": 1000, "s3": 100}
"""How many runs are killed again and again."""


@pytest.fixture(params=["local", "s3"])
def backend(request: pytest.FixtureRequest) -> str:
    """Child processes share no memory store."""
    return str(request.param)


@pytest.fixture
def make_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """URLs of roots that do not exist yet."""
    if backend == MINIO_LIKE:
        endpoint = request.getfixturevalue("minio_like")
        request.getfixturevalue("monkeypatch").setenv("AWS_ENDPOINT_URL_S3", endpoint)
    if backend in (GCS, AZURE):
        request.getfixturevalue(f"{backend}_server")
        scheme = {GCS: "gs", AZURE: "az"}[backend]
        return lambda name: f"{scheme}://{BUCKET}/{tmp_path.name}-{id(request):x}/{name}"
    if backend in ("s3", MINIO_LIKE):
        request.getfixturevalue("s3_server")
        return lambda name: f"s3://tidemill-tests/{tmp_path.name}-{id(request):x}/{name}"
    return lambda name: str(tmp_path / "stores" / name)


RunAndCheck = Callable[[Kill | None, str], list[str] | None]


class Sweep(Protocol):
    def __call__(self, run_and_check: RunAndCheck, times: float = 1) -> None: ...


@pytest.fixture
def sweep(backend: str, full: bool, piece: slice, record_property: Callable[[str, object], None]) -> Sweep:
    """Calls with no kill first, to learn where storage is called; then kills at each of these moments, or at a sample."""
    start_server()

    def run_all(run_and_check: RunAndCheck, times: float = 1) -> None:
        moments = run_and_check(None, "clean")
        assert moments is not None
        assert len(moments) > 10
        chosen = sample(moments, None if full else round(times * MOMENTS[backend]))[piece]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for moment, killed in zip(
                chosen, pool.map(run_and_check, map(Kill, chosen), map(str, range(len(chosen)))), strict=True
            ):
                assert killed is None, f"the kill did not happen: {moment}"
        record_property("killed at", f"{len(chosen)} of {len(moments)} moments")
        print(f"killed at {len(chosen)} of {len(moments)} moments")

    return run_all


@pytest.fixture
def base(make_url: MakeUrl, tmp_path: Path) -> str:
    """URL of a registry with version 0."""
    start_server()
    fill(make_url("dataset"), DATASET)
    in_child(train, make_url("dataset"), make_url("base"), SPEC, BATCH, kill=None, tmp_path=tmp_path)
    return make_url("base")


@pytest.mark.parametrize("backend", ["local", pytest.param("s3", marks=pytest.mark.prove)], indirect=True)
def test_many_models_in_one_process(
    backend: str, base: str, make_url: MakeUrl, tmp_path: Path, full: bool, piece: slice
) -> None:
    """Three take turns; the weights of the third are not as committed. Some runs keep two learners, one of them read ahead; the
    others keep one, and read nothing ahead.

    Which turn comes first is a matter of time, so that a moment is the number of a call, and may be another's in each run.
    """
    shards = {"a": SHARDS | REJECTED, "b": dict(list(SHARDS.items())[:3]), "rotten": dict(list(SHARDS.items())[:1])}
    alone: dict[str, tuple[str, str]] = {}
    for name in ("a", "b"):
        fill(make_url(f"alone/{name}/inbox"), shards[name])
        copy(base, make_url(f"alone/{name}/registry"))
        places = make_url(f"alone/{name}/inbox"), make_url(f"alone/{name}/registry")
        in_child(drain, *places, GATED, kill=None, tmp_path=tmp_path)
        alone[name] = bits(VersionLog(open_store(places[1]), "model"))

    def run_and_check(kill: Kill | None, name: str, learners: int) -> list[str] | None:
        pairs = []
        for tenant, own in shards.items():
            inbox, registry = make_url(f"{name}/{tenant}/inbox"), make_url(f"{name}/{tenant}/registry")
            fill(inbox, own)
            copy(base, registry)
            pairs.append(Pair(inbox=inbox, registry=registry, model="model", name=tenant))
        blob = VersionLog(open_store(pairs[-1].registry), "model").head().manifest.blobs.weights
        open_store(pairs[-1].registry).write(blob.key, bytes(blob.bytes))
        moments = in_child(drain_pairs, pairs, GATED, learners, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(drain_pairs, pairs, GATED, learners, kill=None, tmp_path=tmp_path)
        for pair in pairs[:-1]:
            log = VersionLog(open_store(pair.registry), "model")
            audit(log, shards[pair.name].items())
            assert bits(log) == alone[pair.name]
            assert waiting(pair.inbox) == []
        assert waiting(pairs[-1].inbox) == [*shards["rotten"]]
        return moments

    kills = list[tuple[int, int]]()
    count = 0
    for learners in (1, 2):
        calls = run_and_check(None, f"clean-{learners}", learners)
        assert calls is not None
        count += len(calls)
        kills += [(call, learners) for call in sample(range(len(calls)), None if full else OF_MANY[backend])]
    kills = kills[piece]

    def killed(number: int) -> bool:
        """Whether at this call of the clean run; else before it, since a run may be over by then."""
        first, learners = kills[number]
        call = first
        while run_and_check(Kill(call), f"{number}-{call}", learners) is not None:
            assert call, "no run is over before its first call"
            call = call * 3 // 4
        return call == first

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hits = sum(pool.map(killed, range(len(kills))))
    assert not full or hits >= 0.9 * len(kills)  # the few of a sample may all be late ones
    print(f"killed at {hits} of {count} moments, and before {len(kills) - hits} others")


@pytest.mark.parametrize("backend", ["local", "s3", MINIO_LIKE, *CLOUDS], indirect=True)
def test_online_run(sweep: Sweep, backend: str, base: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """6 good shards and a bad one, 2 to a commit; the first version is refused, and rolled back."""
    shards = SHARDS | REJECTED
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        inbox, registry = make_url(f"{name}/inbox"), make_url(f"{name}/registry")
        fill(inbox, shards)
        copy(base, registry)
        moments = in_child(drain, inbox, registry, GATED, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(drain, inbox, registry, GATED, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        history = audit(log, shards.items())
        assert [version.manifest.rolled_back_to for version in history] == [None, None, 0, None, None, None]
        assert all_aliases(log) == {"champion": 5}
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        assert waiting(inbox) == []
        return moments

    sweep(run_and_check, times=2 if backend == "local" else 1)


def test_online_run_whose_versions_name_blobs_of_older_ones(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """Files in segments: what has not changed is named again, of a table only changed rows are stored; collections in between.

    The first version is refused, and rolled back.
    """
    fill(make_url("dataset"), DATASET)
    in_child(train, make_url("dataset"), make_url("base"), ROWS, BATCH, kill=None, tmp_path=tmp_path)
    start = VersionLog(open_store(make_url("base")), "model")
    promote(start, "start", start.head())  # so that all can be trained again
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        inbox, registry = make_url(f"{name}/inbox"), make_url(f"{name}/registry")
        fill(inbox, SHARDS | REJECTED)
        copy(make_url("base"), registry)
        moments = in_child(drain_in_segments, inbox, registry, GATED, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(drain_in_segments, inbox, registry, GATED, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, (SHARDS | REJECTED).items())
        head = log.head()
        blobs = head.manifest.blobs
        for ref in blobs.refs:
            log.verify_blob(ref)
        own = f"model/blobs/{head.number:08d}-"
        assert any(not key.startswith(own) for key in blobs.weights.object_keys), "nothing was named again"
        if kill is None:
            tables = [
                each.name for ref in blobs.refs for each in ref.units if isinstance(each, Segment) and each.changed
            ]
            assert len(tables) == 3, "the rows of a table and of its two moments"
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.5)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_online_run_that_is_watched(sweep: Sweep, base: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """With a listener, a display, metrics and a page, the bits are those of a run that nobody watches."""

    def begin(name: str) -> tuple[str, str]:
        fill(make_url(f"{name}/inbox"), SHARDS | REJECTED)
        copy(base, make_url(f"{name}/registry"))
        return make_url(f"{name}/inbox"), make_url(f"{name}/registry")

    alone = begin("alone")
    in_child(drain, *alone, GATED, kill=None, tmp_path=tmp_path)
    reference = bits(VersionLog(open_store(alone[1]), "model"))

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        inbox, registry = begin(name)
        file = str(tmp_path / f"{name}.prom")
        moments = in_child(watched_drain, inbox, registry, GATED, file, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(watched_drain, inbox, registry, GATED, file, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, (SHARDS | REJECTED).items())
        assert bits(log) == reference
        assert 'tidemill_head_version{model="model"} 5.0' in Path(file).read_text()
        return moments

    sweep(run_and_check, times=0.5)


def test_killed_again_and_again(
    base: str,
    backend: str,
    make_url: MakeUrl,
    tmp_path: Path,
    full: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """At random moments, half of them in the middle of a call, as often as it takes until a run comes to its end."""
    shards = SHARDS | REJECTED
    runs = (FULL if full else SAMPLE)[backend]

    def begin(name: str) -> tuple[str, str]:
        inbox, registry = make_url(f"{name}/inbox"), make_url(f"{name}/registry")
        fill(inbox, shards)
        copy(base, registry)
        return inbox, registry

    def check(inbox: str, registry: str) -> tuple[str, str]:
        log = VersionLog(open_store(registry), "model")
        audit(log, shards.items())
        assert waiting(inbox) == []
        assert all_aliases(log) == {"champion": 5}
        return bits(log)

    clean = begin("clean")
    moments = in_child(drain, *clean, GATED, kill=None, tmp_path=tmp_path)
    assert moments is not None
    reference = check(*clean)

    def run_and_check(number: int) -> int:
        draw, kills, place = random.Random(number), 0, begin(str(number))
        while True:
            kill = Kill(draw.randrange(len(moments)), draw.choice([0.0, draw.uniform(0, 0.005)]))
            if in_child(drain, *place, GATED, kill=kill, tmp_path=tmp_path) is not None:
                break
            kills += 1
        assert check(*place) == reference
        return kills

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kills = list(pool.map(run_and_check, range(runs)))
    assert sum(kills) > runs, "most runs are killed several times"
    record_property("random kills", f"{sum(kills)} in {runs} runs, at most {max(kills)} in one")
    print(f"{sum(kills)} random kills in {runs} runs, at most {max(kills)} in one")


def test_batch_run(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """3 epochs with a checkpoint after each."""
    fill(make_url("dataset"), DATASET)
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        registry = make_url(f"{name}/registry")
        arguments = (make_url("dataset"), registry, SPEC, BATCH)
        moments = in_child(train, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train, *arguments, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        assert log.head().number == 0
        assert all_aliases(log) == {"champion": 0}
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check)


def test_batch_run_on_a_table_that_is_written(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """Meanwhile somebody appends, updates, deletes, optimizes, and vacuums what the pinned version does not need."""
    whole = make_url("table")
    for data in DATASET.values():
        write_deltalake(
            whole, pq.read_table(pa.BufferReader(data)), mode="append", storage_options=delta_options(whole)
        )
    DeltaTable(whole, storage_options=delta_options(whole)).delete("a > 1")
    pinned = DeltaTable(whole, storage_options=delta_options(whole)).version()
    held = polars.read_delta(whole, version=pinned, storage_options=delta_options(whole)).to_dicts()
    start_server()
    in_child(train, whole, make_url("whole"), SPEC, BATCH, kill=None, tmp_path=tmp_path)
    reference = bits(VersionLog(open_store(make_url("whole")), "model"))

    def rows_of(url: str) -> list[str]:
        found = snapshot(url, version=pinned)
        return sorted(repr(row) for group in found.row_groups for row in group.read(list(held[0])).to_pylist())

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        url, registry = make_url(f"{name}/table"), make_url(f"{name}/registry")
        copy(whole, url)
        arguments = (url, registry, SPEC, BATCH, pinned)
        moments = in_child(train_while_written, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train_while_written, *arguments, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        ref = log.head().manifest.dataset
        assert ref is not None
        assert ref.table is not None
        assert DeltaTable(url, storage_options=delta_options(url)).version() > pinned + 3
        assert rows_of(url) == sorted(map(repr, held)), "what the version holds is what it held"
        if ref.table.version == pinned:
            assert (bits(log), ref.rows) == (reference, len(held))
        else:  # it was killed before it had begun, and took a newer one
            assert kill is not None
            named = BATCH.model_copy(update={"table_version": ref.table.version})
            in_child(train, url, make_url(f"{name}/again"), SPEC, named, kill=None, tmp_path=tmp_path)
            assert bits(log) == bits(VersionLog(open_store(make_url(f"{name}/again")), "model"))
        return moments

    sweep(run_and_check, times=0.4)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_batch_run_with_checkpoints_inside_of_epochs(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """One after each third batch, written beside the steps."""
    fill(make_url("dataset"), DATASET)
    settings = BATCH.model_copy(update={"checkpoint_rows": 24})
    arguments = (make_url("dataset"), make_url("whole"), SPEC, BATCH)
    start_server()
    in_child(train, *arguments, kill=None, tmp_path=tmp_path)
    reference = bits(VersionLog(open_store(make_url("whole")), "model"))

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        registry = make_url(f"{name}/registry")
        arguments = (make_url("dataset"), registry, SPEC, settings)
        moments = in_child(train, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train, *arguments, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        assert bits(log) == reference
        return moments

    sweep(run_and_check, times=0.35)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_warm_start(sweep: Sweep, base: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """It begins with the champion, whose place its version takes: killed in between too, it trains nothing twice."""
    spec = Spec.model_validate(
        SPEC.model_dump() | {"epochs": 1, "features": [SPEC.features[1], SPEC.features[0], *SPEC.features[2:]]}
    )
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        registry = make_url(f"{name}/registry")
        copy(base, registry)
        settings = BATCH.model_copy(update={"init_from": f"{registry}/model@champion"})
        arguments = (make_url("dataset"), registry, spec, settings)
        moments = in_child(train, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train, *arguments, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        assert log.head().number == 1
        assert all_aliases(log) == {"champion": 1}
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.25)


def test_default_run(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """The recipe: two searches for the number of epochs, then a training on all rows, with some checkpoints in each."""
    fill(make_url("dataset"), DATASET)
    spec = Spec(features=["b", "c", "d"], target="w", recipe=1)  # nothing can be learned, which is soon found out
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        registry = make_url(f"{name}/registry")
        moments = in_child(train_by_recipe, make_url("dataset"), registry, spec, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train_by_recipe, make_url("dataset"), registry, spec, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        manifest = log.head().manifest
        assert manifest.metrics["search"]["best_epochs"] == manifest.counters["epochs"]
        assert all_aliases(log) == {"champion": 0}
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.5)


# ---- other ways to learn ---------------------------------------------------------------------------------------------
def test_early_stopping(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """At most 12 epochs; the best one is registered. Classes, a balanced memory, mixed precision."""
    fill(make_url("dataset"), {key: parquet(classified(data), 12) for key, data in DATASET.items()})
    spec = CLASSES.model_copy(update={"epochs": 12, "learning_rate": 0.3})
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> int | None:
        registry = make_url(f"{name}/registry")
        arguments = (make_url("dataset"), registry, spec, PATIENT)
        moments = in_child(train, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train, *arguments, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        manifest = log.head().manifest
        assert manifest.metrics["best_epoch"] == manifest.counters["epochs"] < len(manifest.metrics["epoch_loss"]) < 12
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.5)


def test_delayed_labels(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """Features and their labels in two inboxes, bad labels among them; triggers, a gate that moves the champion."""
    fill(make_url("dataset"), {key: parquet(classified(data), 12) for key, data in DATASET.items()})
    start_server()
    in_child(train, make_url("dataset"), make_url("base"), CLASSES, BATCH, kill=None, tmp_path=tmp_path)
    tables = {key: classified(data) for key, data in SHARDS.items()}
    features = {key: parquet(table.drop_columns("k"), 12) for key, table in tables.items()}
    labels = {key: parquet(table.select(["k", "id"]), 12) for key, table in tables.items()} | {"99.parquet": BAD_LABELS}
    features["99.parquet"] = parquet(tables["00.parquet"].drop_columns("k"), 12)
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> int | None:
        inbox, registry = make_url(f"{name}/inbox"), make_url(f"{name}/registry")
        settings = DELAYED.model_copy(update={"labels": LabelSettings(inbox=make_url(f"{name}/labels"), key="id")})
        settings = settings.model_copy(update={"after_commit": Archive(archive_to=make_url(f"{name}/archive"))})
        fill(inbox, features)
        fill(make_url(f"{name}/labels"), labels)
        copy(make_url("base"), registry)
        moments = in_child(drain, inbox, registry, settings, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(drain, inbox, registry, settings, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        check_bits(log, open_store(make_url(f"{name}/archive")))
        consumed = [shard.key for version in log.history(log.head()) for shard in version.manifest.consumed]
        assert sorted(consumed) == sorted(SHARDS)
        assert (waiting(inbox), waiting(make_url(f"{name}/labels"))) == (["99.parquet"], [])
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.5)


class RowByRow:
    """Six shards of features, and labels that come row by row, two or three shards of them for each; and what went wrong.

    In shard 0 one row has no label in time, shard 1 has none at all, some of shard 2 are corrected, labels of shard 3 came before
    it.
    There are labels too late, of rows that nobody knows, and bad ones.
    """

    def __init__(self) -> None:
        tables = {key: classified(data) for key, data in SHARDS.items()}
        for key, rows in tables.items():
            tables[key] = rows.drop_columns("id").append_column("id", [[f"{key}-{i}" for i in range(rows.num_rows)]])
        self.features = {key: parquet(rows.drop_columns("k"), 12) for key, rows in tables.items()}
        stream = pa.concat_tables([rows.select(["k", "id"]) for key, rows in tables.items() if key != "01.parquet"])
        cut = [(at, min(at + 19, stream.num_rows)) for at in range(1, stream.num_rows, 19)]
        wrong = stream.slice(30, 3)
        wrong = wrong.set_column(0, "k", pc.subtract(1, wrong["k"]))
        self.labels = {f"l{at:03}.parquet": parquet(stream.slice(at, end - at), 12) for at, end in cut} | {
            "corrected.parquet": parquet(wrong),
            "late.parquet": parquet(stream.slice(0, 1)),
            "unknown.parquet": parquet(pa.table({"id": ["nobody"], "k": [1]})),
            "bad.parquet": BAD_LABELS_OF_ROWS,
        }
        self.rejected = {"late.parquet", "unknown.parquet", "bad.parquet"}
        seconds = {key: 20_000.0 - 100 * i for i, key in enumerate(sorted(self.features))}
        self.inbox_seconds = seconds | {"03.parquet": 17_000.0}
        self.labels_seconds = dict.fromkeys(self.labels, 18_000.0)
        self.labels_seconds |= {"corrected.parquet": 18_500.0, "late.parquet": 9_000.0, "unknown.parquet": 18_100.0}

    def begin(self, place: Callable[[str], str]) -> dict[str, datetime]:
        """Fill the two inboxes. Returns when each shard was written: all is over by now."""
        now, dates = datetime.now(UTC), dict[str, datetime]()
        for name, shards, seconds in (
            ("inbox", self.features, self.inbox_seconds),
            ("labels", self.labels, self.labels_seconds),
        ):
            fill(place(name), shards)
            url = open_store(place(name)).url
            dates |= {f"{url}/{key}": now - timedelta(seconds=ago) for key, ago in seconds.items()}
        return dates

    def check(self, log: VersionLog) -> None:
        """Each shard of features and of labels was consumed or rejected once, and each row has had the label that it should."""
        history = [version.manifest for version in log.history(log.head())]
        consumed = [shard for version in history for shard in version.consumed]
        assert Counter(shard.key for shard in consumed) == Counter(self.features.keys())
        done = [labels.key for version in history for labels in version.done_labels or ()]
        rejected = [shard.key for version in history for shard in version.rejected]
        assert Counter(done) == Counter(self.labels.keys() - self.rejected)
        assert Counter(rejected) == Counter(self.rejected)
        unlabelled = {shard.key: shard.unlabelled for shard in consumed if shard.unlabelled}
        assert unlabelled == {"00.parquet": 1, "01.parquet": 21}
        assert {key for shard in consumed for key in [each.key for each in shard.joined or ()]} == {
            key for key in self.labels if key.startswith("l0") or key.startswith("l1")
        }


@pytest.fixture
def row_by_row(make_url: MakeUrl, tmp_path: Path) -> Callable[..., tuple[VersionLog, list[str] | None]]:
    """Runs on `RowByRow`, killed or not and then run again; tells the log that they leave, and the moments of one not killed."""
    rows = RowByRow()
    fill(make_url("dataset"), {key: parquet(classified(data), 12) for key, data in DATASET.items()})
    start_server()
    in_child(train, make_url("dataset"), make_url("base"), CLASSES, BATCH, kill=None, tmp_path=tmp_path)

    def run_all(run: Callable[..., None], kill: Kill | None, name: str) -> tuple[VersionLog, list[str] | None]:
        inbox, registry = make_url(f"{name}/inbox"), make_url(f"{name}/registry")
        labels = LabelSettings(inbox=make_url(f"{name}/labels"), key="id", wait_seconds=7200.0)
        settings = DELAYED.model_copy(
            update={"labels": labels, "after_commit": Archive(archive_to=make_url(f"{name}/archive"))}
        )
        arguments = (inbox, registry, settings, rows.begin(lambda place: make_url(f"{name}/{place}")))
        copy(make_url("base"), registry)
        moments = in_child(run, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(run, *arguments, kill=None, tmp_path=tmp_path)
        assert (waiting(inbox), waiting(labels.inbox)) == ([], [])
        return VersionLog(open_store(registry), "model"), moments

    return run_all


def test_labels_row_by_row(
    sweep: Sweep, row_by_row: Callable[..., tuple[VersionLog, list[str] | None]], make_url: MakeUrl
) -> None:
    """Killed anywhere, the rerun joins the same labels with the same rows; each shard of labels has one end."""
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        log, moments = row_by_row(dated_drain, kill, name)
        check_bits(log, open_store(make_url(f"{name}/archive")))
        RowByRow().check(log)
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.5)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_a_run_that_removes_labels_at_their_first_use_is_caught(
    row_by_row: Callable[..., tuple[VersionLog, list[str] | None]],
) -> None:
    """The control of the sweep: what the run has in memory hides that it lacks them, until it is killed."""
    product, _ = row_by_row(dated_drain, None, "product")
    careless, moments = row_by_row(careless_drain, None, "careless")
    assert moments is not None
    assert bits(careless) == bits(product)
    second = next(moment for moment in moments if "create" in moment and "log/00000002.json" in moment)
    killed, _ = row_by_row(careless_drain, Kill(second), "killed")
    with pytest.raises(AssertionError):
        RowByRow().check(killed)
    assert bits(killed) != bits(product)


def test_retraining(sweep: Sweep, base: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """Refused twice: a batch training on the dataset and the archive becomes the head, and the rest is trained on it."""
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill | None, name: str) -> int | None:
        inbox, registry, dataset = (make_url(f"{name}/{place}") for place in ("inbox", "registry", "dataset"))
        settings = retrained(dataset)
        fill(inbox, POISON)
        fill(dataset, DATASET)
        copy(base, registry)
        moments = in_child(drain, inbox, registry, settings, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(drain, inbox, registry, settings, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        history = [version.manifest for version in audit(log, POISON.items())]
        assert "batch" in [manifest.kind for manifest in history[1:]]
        assert waiting(inbox) == []
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.5)


def classified(data: bytes) -> pa.Table:
    """The rows of a shard, with a class and a key beside their columns."""
    rows = pq.read_table(io.BytesIO(data))
    k = pc.cast(pc.greater(rows["a"], 0.5), pa.int64())
    return rows.append_column("k", k).append_column("id", pa.array(range(rows.num_rows)))


BAD_LABELS_OF_ROWS = parquet(pa.table({"id": ["00.parquet-0"], "k": [7]}))
BAD_LABELS = parquet(pa.table({"id": [1, 1], "k": [0, 1]}))
POISON = {f"{i:02}.parquet": table(20 + i, 10 + i, sign=-1) for i in range(6)}


@pytest.fixture
def trained(base: str, make_url: MakeUrl, tmp_path: Path) -> str:
    """URL of a registry with versions 0 to 3."""
    fill(make_url("inbox"), SHARDS)
    in_child(drain, make_url("inbox"), base, ONLINE, kill=None, tmp_path=tmp_path)
    return base


def test_rollback(sweep: Sweep, trained: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """Killed anywhere and repeated, the head has the weights of the version gone back to."""
    wanted = VersionLog(open_store(trained), "model").version(1).manifest.blobs

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        registry = make_url(f"{name}/registry")
        copy(trained, registry)
        moments = in_child(rollback, registry, "1", kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(rollback, registry, "1", kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, SHARDS.items())
        assert log.head().manifest.rolled_back_to == 1
        assert bits(log) == (wanted.weights.sha256, wanted.state.sha256)
        assert all_aliases(log) == {"champion": 1}
        return moments

    sweep(run_and_check)


def test_garbage_collection(sweep: Sweep, trained: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """Killed anywhere, the blobs in retention are whole; repeated, only they are left."""

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        registry = make_url(f"{name}/registry")
        copy(trained, registry)
        log = VersionLog(open_store(registry), "model")
        log.write_blob(2, "safetensors", b"of an attempt that lost")
        log.write_blob(4, "safetensors", b"of an attempt that may still win")
        moments = in_child(collect_garbage, registry, 2, kill=kill, tmp_path=tmp_path)
        for again in (False, True):
            if again:
                in_child(collect_garbage, registry, 2, kill=None, tmp_path=tmp_path)
            audit(log, SHARDS.items())
            for number in (0, 2, 3):  # champion, and the last two
                blobs = log.version(number).manifest.blobs
                log.read_blob(blobs.weights)
                log.read_blob(blobs.state)
        left = {info.key.split("/")[-1][:8] for info in log.store.list("model/blobs/")}
        assert left == {"00000000", "00000002", "00000003", "00000004"}
        return moments

    sweep(run_and_check)


# ---- choosing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_compare(sweep: Sweep, make_url: MakeUrl, tmp_path: Path) -> None:
    """Two specs, each of some epochs; killed and started again, the table is the same."""
    fill(make_url("dataset"), DATASET)
    specs = {"one": SPEC, "other": SPEC.model_copy(update={"learning_rate": 0.001, "epochs": 2})}
    reference: list[str] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        result = tmp_path / f"{name}.json"
        arguments = (make_url("dataset"), make_url(f"{name}/to"), specs, str(result))
        moments = in_child(compare_specs, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(compare_specs, *arguments, kill=None, tmp_path=tmp_path)
        reference.append(result.read_text())
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.3)


def test_backtest(sweep: Sweep, base: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """The start trained anew, 6 shards, a rollback between them; killed and started again, the table is the same."""
    registry, archive = make_url("registry"), make_url("archive")
    fill(make_url("inbox"), SHARDS | REJECTED)
    copy(base, registry)
    settings = GATED.model_copy(update={"after_commit": Archive(archive_to=archive)})
    in_child(drain, make_url("inbox"), registry, settings, kill=None, tmp_path=tmp_path)
    before = {info.key: info.etag for info in open_store(registry).list()}
    other = SPEC.model_copy(update={"learning_rate": 0.001, "epochs": 2})
    reference: list[str] = []

    def run_and_check(kill: Kill | None, name: str) -> list[str] | None:
        result = tmp_path / f"{name}.json"
        arguments = (registry, archive, make_url(f"{name}/to"), other, str(result))
        moments = in_child(backtest_spec, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(backtest_spec, *arguments, kill=None, tmp_path=tmp_path)
        reference.append(result.read_text())
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check, times=0.3)
    assert {info.key: info.etag for info in open_store(registry).list()} == before
    in_child(
        backtest_spec, registry, archive, make_url("own"), SPEC, str(tmp_path / "own"), kill=None, tmp_path=tmp_path
    )
    assert json.loads((tmp_path / "own").read_text())["same"] == len(SHARDS)

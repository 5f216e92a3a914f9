"""SIGKILL before and after every storage call, then a rerun: the same bits as never having been killed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from storage.inbox import is_shard
from storage.log import VersionLog
from storage.urls import open_store
from tasks.settings import BatchSettings, OnlineSettings
from tasks.training.spec import Spec
from tests.guarantees.audit import audit
from tests.guarantees.children import Kill, collect_garbage, drain, in_child, rollback, start_server, train

MakeUrl = Callable[[str], str]

SPEC = Spec(
    features=("a", "b", {"name": "c", "kind": "category", "buckets": 8}),  # type: ignore[arg-type]  # pydantic converts
    target="y",
    model={"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.1}},  # type: ignore[arg-type]  # pydantic converts
    optimizer={"name": "adam", "arguments": {"amsgrad": True}},  # type: ignore[arg-type]  # pydantic converts
    batch_size=16,
    epochs=3,
    seed=5,
)
BATCH = BatchSettings(holdout=0.2)
ONLINE = OnlineSettings(max_shards=2, passes=2, grace_seconds=0)


@pytest.fixture(params=["local", "s3"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Child processes share no memory store."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return lambda name: f"s3://tidemill-tests/{tmp_path.name}-{id(request):x}/{name}"
    return lambda name: str(tmp_path / "stores" / name)


def table(rows: int, seed: int) -> bytes:
    """A small Parquet file of learnable rows, in row groups of 40."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    colours = [["red", "green", None][i] for i in torch.randint(3, (rows,), generator=generator).tolist()]
    sink = pa.BufferOutputStream()
    y = x[:, 0] * 2 - x[:, 1]
    columns = {"a": x[:, 0].tolist(), "b": x[:, 1].tolist(), "c": colours, "y": y.tolist()}
    pq.write_table(pa.table(columns), sink, row_group_size=40)
    return bytes(sink.getvalue())


DATASET = {f"part-{i}.parquet": table(100, i) for i in range(2)}
SHARDS = {f"{i:02}.parquet": table(70 + i, 10 + i) for i in range(6)}
REJECTED = {"03b.parquet": b"PAR1" + b"not a parquet file" * 10 + b"PAR1"}


def fill(url: str, objects: dict[str, bytes]) -> None:
    """Put objects one after the other, so that they have been written in the order of their keys."""
    store = open_store(url)
    for key in sorted(objects):
        store.write(key, objects[key])


def bits(log: VersionLog) -> tuple[str, str]:
    """What must not depend on kills: sha256 of the head's weights and of its state."""
    blobs = log.head().manifest.blobs
    return blobs.weights.sha256, blobs.state.sha256


def copy(source: str, target: str) -> None:
    store = open_store(source)
    fill(target, {info.key: store.read(info.key) for info in store.list()})


def sweep(run_and_check: Callable[[Kill, str], int | None]) -> None:
    """Call with no kill first, to learn where storage is called; then kill at each of these moments."""
    start_server()
    moments = run_and_check(None, "clean")
    assert moments is not None
    assert moments > 10
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for killed in pool.map(run_and_check, range(moments), map(str, range(moments))):
            assert killed is None, "the kill did not happen"


@pytest.mark.timeout(600)
def test_online_run(make_url: MakeUrl, tmp_path: Path) -> None:
    """6 good shards and a bad one, 2 to a commit."""
    fill(make_url("dataset"), DATASET)
    in_child(train, make_url("dataset"), make_url("base"), SPEC, BATCH, kill=None, tmp_path=tmp_path)
    shards = SHARDS | REJECTED
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill, name: str) -> int | None:
        inbox, registry = make_url(f"{name}/inbox"), make_url(f"{name}/registry")
        fill(inbox, shards)
        copy(make_url("base"), registry)
        moments = in_child(drain, inbox, registry, ONLINE, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(drain, inbox, registry, ONLINE, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, shards.items())
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        assert [info.key for info in open_store(inbox).list() if is_shard(info.key)] == []
        return moments

    sweep(run_and_check)


@pytest.mark.timeout(600)
def test_batch_run(make_url: MakeUrl, tmp_path: Path) -> None:
    """3 epochs with a checkpoint after each."""
    fill(make_url("dataset"), DATASET)
    reference: list[tuple[str, str]] = []

    def run_and_check(kill: Kill, name: str) -> int | None:
        registry = make_url(f"{name}/registry")
        arguments = (make_url("dataset"), registry, SPEC, BATCH)
        moments = in_child(train, *arguments, kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(train, *arguments, kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        audit(log, [])
        assert log.head().number == 0
        assert log.aliases() == {"champion": 0}
        reference.append(bits(log))
        assert reference[-1] == reference[0]
        return moments

    sweep(run_and_check)


@pytest.fixture
def trained(make_url: MakeUrl, tmp_path: Path) -> str:
    """URL of a registry with versions 0 to 3."""
    fill(make_url("dataset"), DATASET)
    fill(make_url("inbox"), SHARDS)
    registry = make_url("base")
    in_child(train, make_url("dataset"), registry, SPEC, BATCH, kill=None, tmp_path=tmp_path)
    in_child(drain, make_url("inbox"), registry, ONLINE, kill=None, tmp_path=tmp_path)
    return registry


def test_rollback(trained: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """Killed anywhere and repeated, the head has the weights of the version gone back to."""
    wanted = VersionLog(open_store(trained), "model").version(1).manifest.blobs.weights.sha256

    def run_and_check(kill: Kill, name: str) -> int | None:
        registry = make_url(f"{name}/registry")
        copy(trained, registry)
        moments = in_child(rollback, registry, "1", kill=kill, tmp_path=tmp_path)
        if kill is not None:
            in_child(rollback, registry, "1", kill=None, tmp_path=tmp_path)
        log = VersionLog(open_store(registry), "model")
        assert log.head().manifest.rolled_back_to == 1
        assert log.head().manifest.blobs.weights.sha256 == wanted
        assert log.aliases() == {"champion": 1}
        assert [v.number for v in log.history(log.head())] == list(range(log.head().number, -1, -1))
        return moments

    sweep(run_and_check)


def test_garbage_collection(trained: str, make_url: MakeUrl, tmp_path: Path) -> None:
    """Killed anywhere, the blobs in retention are whole; repeated, only they are left."""

    def run_and_check(kill: Kill, name: str) -> int | None:
        registry = make_url(f"{name}/registry")
        copy(trained, registry)
        log = VersionLog(open_store(registry), "model")
        log.write_blob(2, "safetensors", b"of an attempt that lost")
        log.write_blob(4, "safetensors", b"of an attempt that may still win")
        moments = in_child(collect_garbage, registry, 2, kill=kill, tmp_path=tmp_path)
        for again in (False, True):
            if again:
                in_child(collect_garbage, registry, 2, kill=None, tmp_path=tmp_path)
            for number in (0, 2, 3):  # champion, and the last two
                blobs = log.version(number).manifest.blobs
                log.read_blob(blobs.weights)
                log.read_blob(blobs.state)
        left = {info.key.split("/")[-1][:8] for info in log.store.list("model/blobs/")}
        assert left == {"00000000", "00000002", "00000003", "00000004"}
        return moments

    sweep(run_and_check)

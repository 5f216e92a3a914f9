"""Batch training by ranks: each reads the dataset by itself, the leader alone writes; killed, they go on in any number."""

import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.data import parquet
from tests.guarantees.children import (
    DATASET,
    DEADLINE,
    Kill,
    KillAt,
    MakeUrl,
    bits,
    fill,
    start_child,
    start_server,
    table,
)
from tests.ranks.crews import SECONDS, Ended, joined, lead
from tests.ranks.matrix import largest
from tests.ranks.test_commands import command, environment
from tests.storage.faults import hooked
from tests.training.rows import numbers_table
from tests.training.test_steps import furthest
from tidemill.storage.audit import audit
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.errors import RanksDiffer
from tidemill.tasks.ranks.crew import Crew, follow_orders
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

HERE = "tests.ranks.test_batch"
SPEC: dict[str, Any] = {
    "features": ["a", "b", {"name": "c", "kind": "category", "buckets": 8}],
    "target": "y",
    "model": {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.2}},
    "optimizer": {"name": "adam"},
    "ema_decay": 0.9,
    "replay": {"rows": 20},
    "batch_size": 16,
    "epochs": 3,
    "seed": 5,
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": ({}, {"holdout": 0.2}),
    "patience": ({"epochs": 4}, {"holdout": 0.2, "patience": 2}),
    "inside of epochs": ({"batch_size": 1, "epochs": 2}, {"holdout": 0.2, "checkpoint_rows": 10}),
    "a search": ({"epochs": "auto", "replay": None, "learning_rate": 0.3}, {}),
}
"""(more of the spec, settings)"""


@pytest.fixture(params=["local"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """URLs of roots that do not exist yet."""
    start_server()
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return lambda name: f"s3://tidemill-tests/{tmp_path.name}-{id(request):x}/{name}"
    return lambda name: str(tmp_path / "stores" / name)


def trained(
    size: int,
    dataset: str,
    registry: str,
    tmp_path: Path,
    *,
    kind: str = "epochs",
    kill: tuple[int, Kill] | None = None,
    after: Path | None = None,
    **spec: Any,
) -> list[Ended]:
    """Have so many ranks train, one of which is killed at a moment; what became of each.

    `after`: a file that is put into the dataset once the leader has listed it, and read it once.
    """
    store = str(tmp_path / uuid.uuid4().hex)
    results = [tmp_path / uuid.uuid4().hex for _ in range(size)]
    more, settings = KINDS[kind]
    places = dataset, registry, SPEC | more | spec, settings, after
    children = [
        start_child(
            train_as_rank, (rank, size, store), places, kill[1] if kill and kill[0] == rank else None, results[rank]
        )
        for rank in range(size)
    ]
    for child in children:
        child.join(DEADLINE)
        assert not child.is_alive(), "a rank hangs"
    found = []
    for result in results:
        moments, how = json.loads(result.read_text()) if result.exists() else ([], "lost")
        found.append(Ended(how, moments))
    return found


def train_as_rank(
    here: tuple[int, int, str],
    places: tuple[str, str, dict[str, Any], dict[str, Any], Path | None],
    kill: Kill | None,
    result: Path,
) -> None:
    """The body of a rank."""
    dataset, registry, spec, settings, after = places
    hook = KillAt(kill, result)
    os.environ["TEST_RANK"] = str(here[0])
    group = joined(*here, hook.moment)
    if group.rank:
        follow_orders(Crew(group))
    else:
        stores = hooked(hook)

        def run() -> None:
            run = batch.open_run(
                batch.take_snapshot(dataset, None, stores),
                registry,
                "model",
                Spec.model_validate(spec),
                BatchSettings.model_validate(settings),
                stores,
            )
            batch.prepare(run)
            if after is not None:
                fill(dataset, {after.name: after.read_bytes()})
            while (epoch := run.next_epoch()) is not None:
                try:
                    batch.train_epoch(run, epoch)
                except RanksDiffer:  # `PLAIN` waits a while before it tries again
                    hook.moment("ranks differ")
            batch.finish(run, batch.register(run, batch.evaluate(run)))

        lead(group, run, SECONDS)
    hook.done()


def done(ended: list[Ended]) -> bool:
    return all(each.how == "done" for each in ended)


def log_at(registry: str) -> VersionLog:
    return open_log(registry, "model")


@pytest.mark.parametrize(
    "kind", [kind if kind == "epochs" else pytest.param(kind, marks=pytest.mark.ranks) for kind in KINDS]
)
def test_with_parts_any_number_of_ranks_trains_the_same_bits(kind: str, make_url: MakeUrl, tmp_path: Path) -> None:
    fill(make_url("dataset"), DATASET)
    found, metrics = [], []
    sizes = (1, 2, 4) if kind == "epochs" else (1, 2)
    for size in sizes:
        registry = make_url(f"registry-{size}")
        assert done(trained(size, make_url("dataset"), registry, tmp_path, kind=kind, parts=4))
        log = log_at(registry)
        assert audit(log).findings == []
        found.append(bits(log))
        metrics.append(log.head().manifest.metrics)
    assert found == found[:1] * len(sizes)
    assert metrics == metrics[:1] * len(sizes)


@pytest.mark.ranks
def test_without_parts_ranks_come_near_to_one_process_and_the_manifest_says_how_many_they_were(
    make_url: MakeUrl, tmp_path: Path
) -> None:
    fill(make_url("dataset"), DATASET)
    learners = []
    for size in (1, 3):
        registry = make_url(f"registry-{size}")
        model = {"factory": "mlp", "arguments": {"hidden": [8]}}
        assert done(trained(size, make_url("dataset"), registry, tmp_path, model=model))
        head = log_at(registry).head()
        assert head.manifest.environment.get("ranks") == (None if size == 1 else 3)
        learners.append(load_learner(log_at(registry), head))
    assert furthest(*learners) < 1e-5 * largest(learners[0])


@pytest.mark.ranks
@pytest.mark.parametrize("make_url", ["local", "s3"], indirect=True)
def test_killed_at_any_rank_they_go_on_in_any_number_with_the_same_bits(make_url: MakeUrl, tmp_path: Path) -> None:
    dataset = make_url("dataset")
    fill(dataset, DATASET)
    assert done(trained(1, dataset, make_url("alone"), tmp_path, parts=4))
    clean = trained(2, dataset, make_url("clean"), tmp_path, parts=4)
    assert bits(log_at(make_url("clean"))) == bits(log_at(make_url("alone")))
    for number, (rank, share, then) in enumerate([(0, 0.4, 4), (0, 0.9, 1), (1, 0.5, 2)]):
        registry, moments = make_url(f"killed-{number}"), clean[rank].moments
        kill = Kill(moments[int(share * len(moments))])
        assert trained(2, dataset, registry, tmp_path, kill=(rank, kill), parts=4)[rank].how == "killed"
        assert done(trained(then, dataset, registry, tmp_path, parts=4))
        assert bits(log_at(registry)) == bits(log_at(make_url("alone")))


@pytest.mark.ranks
def test_from_a_checkpoint_inside_of_an_epoch_any_number_of_ranks_goes_on_with_the_same_bits(
    make_url: MakeUrl, tmp_path: Path
) -> None:
    dataset, kind = make_url("dataset"), "inside of epochs"
    fill(dataset, DATASET | {"part-2.parquet": table(60, 2)})
    assert done(trained(1, dataset, make_url("alone"), tmp_path, kind=kind, parts=4))
    for then in (1, 4):
        registry = make_url(f"killed-{then}")
        # The one in the second epoch is stored, and the one in the first is of no more use
        kill = 0, Kill("1 delete model/runs/*/00000000.000000000064.json 1")
        assert trained(2, dataset, registry, tmp_path, kind=kind, kill=kill, parts=4)[0].how == "killed"
        assert [key for info in open_store(registry).list() if (key := info.key).endswith("00000001.000000000064.json")]
        assert done(trained(then, dataset, registry, tmp_path, kind=kind, parts=4))
        assert bits(log_at(registry)) == bits(log_at(make_url("alone")))


@pytest.mark.ranks
def test_a_file_that_comes_after_the_leader_has_listed_is_no_part_of_the_training(
    make_url: MakeUrl, tmp_path: Path
) -> None:
    fill(make_url("dataset"), DATASET)
    late = tmp_path / "part-9.parquet"
    late.write_bytes(table(40, 9))
    assert done(trained(1, make_url("dataset"), make_url("alone"), tmp_path, parts=2))
    assert done(trained(2, make_url("dataset"), make_url("together"), tmp_path, parts=2, after=late))
    assert bits(log_at(make_url("together"))) == bits(log_at(make_url("alone")))


@pytest.mark.ranks
def test_a_file_that_is_replaced_ends_all_ranks_and_nothing_is_registered(make_url: MakeUrl, tmp_path: Path) -> None:
    fill(make_url("dataset"), DATASET)
    other = tmp_path / "part-0.parquet"
    other.write_bytes(table(40, 9))
    ended = trained(2, make_url("dataset"), make_url("registry"), tmp_path, parts=2, after=other)
    assert [each.how for each in ended] == ["lost", "lost"]
    assert not log_at(make_url("registry")).exists()


def test_a_rank_with_other_bits_is_found_out_before_its_epoch_is_stored_and_all_go_back(
    make_url: MakeUrl, tmp_path: Path
) -> None:
    fill(make_url("dataset"), {"part-0.parquet": parquet(numbers_table(64))})
    spec: dict[str, Any] = {
        **{"features": [f"x{i}" for i in range(10)], "ema_decay": None, "replay": None, "optimizer": {}},
        "model": {"factory": f"{HERE}:Flipped"},
    }
    assert done(trained(1, make_url("dataset"), make_url("alone"), tmp_path, parts=2, **spec))
    together = trained(2, make_url("dataset"), make_url("together"), tmp_path, parts=2, **spec)
    assert done(together)
    assert together[0].moments.count("ranks differ") == 1
    assert bits(log_at(make_url("together"))) == bits(log_at(make_url("alone")))


@pytest.mark.ranks
def test_the_command_trains_by_ranks(tmp_path: Path) -> None:
    """The recipe too, whose searches each rank makes of the rows that it has read."""
    fill(str(tmp_path / "dataset"), DATASET)
    found = []
    for size in (1, 2):
        registry = str(tmp_path / f"registry-{size}")
        flags = ["--target", "y", "--features", "a", "b", "--parts", "2", "--ranks", str(size)]
        words = ["train", str(tmp_path / "dataset"), registry, "model", *flags]
        subprocess.run(command(*words), env=environment(), check=True, timeout=DEADLINE)
        found.append(bits(log_at(registry)))
    assert found[0] == found[1]


class Flipped(nn.Linear):
    """Its weights are changed by one bit, once, on rank 1, in the middle of the training."""

    steps = 0

    def __init__(self) -> None:
        super().__init__(10, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        Flipped.steps += self.training
        if self.training and os.environ["TEST_RANK"] == "1" and Flipped.steps == 5:
            with torch.no_grad():
                self.weight.view(torch.int32)[0, 0] ^= 1
        return super().forward(x_BF)

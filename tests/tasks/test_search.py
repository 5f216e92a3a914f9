"""`epochs: auto`: how long to train, found on held-out rows."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.data import EveryNinth, put
from tidemill.storage.log import open_log
from tidemill.tasks import batch
from tidemill.tasks.batch_run import BatchRun
from tidemill.tasks.search import Clock, Plan, best_of, hold_out
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import Split, TableGroup
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import asked_of, load_learner

NEVER = Clock(1e9)
RECIPE = Spec(features=["a", "b", "c"], target="y", recipe=1)


def noisy(rows: int, seed: int = 0) -> pa.Table:
    """y follows a, b and c, with as much noise."""
    a, b, noise = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed))
    c = ["red" if i % 3 else None for i in range(rows)]
    y = a * b + torch.tensor([0.0 if v is None else 1.0 for v in c]) + noise
    return pa.table(
        {"a": a.tolist(), "b": [v if i % 7 else None for i, v in enumerate(b.tolist())], "c": c, "y": y.tolist()}
    )


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    url = str(tmp_path / "dataset")
    put(url, {f"part-{i}.parquet": noisy(60, i) for i in range(2)})
    return url


def begun(
    dataset: str, registry: Path, clock: Clock | None = None, spec: Spec = RECIPE, **settings: object
) -> BatchRun:
    run = batch.open_run(
        batch.take_snapshot(dataset), str(registry), "model", spec, BatchSettings.model_validate(settings)
    )
    run.clock = clock or NEVER
    return run


def ended(run: BatchRun, most: int = 10**6) -> bool:
    """Train at most so many stretches. True: nothing is left, and the version is registered."""
    for _ in range(most):
        if (stretch := run.next_epoch()) is None:
            batch.finish(run, batch.register(run, batch.evaluate(run)))
            return True
        batch.train_epoch(run, stretch)
    return False


# ---- what is planned -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "batch_size", "searches", "refit", "first", "last"),
    [
        (60, 32, 2, True, 12, 800),  # 2 steps an epoch: 25 steps at first, 1,600 at most
        (1_999, 64, 2, True, 1, 100),
        (19_999, 256, 1, True, 1, 100),
        (300_000, 512, 1, False, 1, 45),  # 25,600 steps
        (50_000_000, 512, 1, False, 1, 1),  # an epoch at least
    ],
)
def test_a_plan_follows_from_the_rows(
    rows: int, batch_size: int, searches: int, refit: bool, first: int, last: int
) -> None:
    plan = Plan.of(rows, batch_size)
    assert (plan.searches, plan.refit, plan.points[0]) == (searches, refit, first)
    assert last / 2**0.5 - 1 < plan.points[-1] <= last
    assert all(1 < after / before <= 2 for before, after in zip(plan.points, plan.points[1:], strict=False))


def test_the_best_is_looked_for_until_two_in_a_row_are_none() -> None:
    assert best_of([3, 2, 2.5, 1, 5, 5, 0], 2) == 3
    assert best_of([3, 2, 2.5, 1, 5, 5, 0], 3) == 6
    assert best_of([1, 1, 1, 1], 2) == 0


def test_two_searches_hold_out_other_rows_each_class_in_proportion() -> None:
    labels = [0] * 80 + [1] * 20 + [None] * 20
    table = pa.table({"a": [float(i) for i in range(120)], "y": labels})
    spec = Spec(features=["a"], target="y", task="binary")
    groups = [TableGroup("one", table.slice(0, 50)), TableGroup("two", table.slice(50))]
    features = Features.resolve(spec, table.schema).fit(groups)
    plan = Plan(2, 0.15, True, (1,))
    (train, held), (_, other) = hold_out(groups, features, None, plan, seed=0)
    for rows in (held, other):
        chosen = torch.cat([rows.rows(group) for group in groups])
        assert (int(chosen[:80].sum()), int(chosen[80:100].sum()), int(chosen[100:].sum())) == (12, 3, 0)
    assert not any(bool((held.rows(group) & other.rows(group)).any()) for group in groups)
    assert not any(bool((held.rows(group) & train.rows(group)).any()) for group in groups)
    outer = Split(0.5, side="train")
    [(train, held), _] = hold_out(groups, features, outer, plan, seed=0)
    assert all(bool((held.rows(g) <= outer.rows(g)).all() and (train.rows(g) <= outer.rows(g)).all()) for g in groups)


# ---- what comes of it ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_small_dataset_is_searched_twice_and_then_trained_on_whole(dataset: str, tmp_path: Path) -> None:
    assert ended(begun(dataset, tmp_path / "registry"))
    log = open_log(str(tmp_path / "registry"), "model")
    manifest = log.head().manifest
    search = manifest.metrics["search"]
    assert len(search["holdout_loss"]) == 2
    assert search["best_epochs"] == manifest.counters["epochs"] == len(manifest.metrics["epoch_loss"])
    assert manifest.counters["rows"] == 120 * manifest.counters["epochs"], "all rows are trained on"
    assert manifest.metrics["holdout_rows"] == 2 * 18
    assert manifest.metrics["holdout"]["rmse"] < 1.3
    learner = load_learner(log, log.head())
    assert (learner.spec.epochs, learner.spec.recipe) == (manifest.counters["epochs"], None)
    assert learner.features.indicated == ("b",)
    assert asked_of(log, log.head()) == RECIPE


@pytest.mark.slow
def test_stopped_anywhere_and_begun_again_it_ends_with_the_same_bits(dataset: str, tmp_path: Path) -> None:
    """In the searches, in the training on all rows; with checkpoints and without any."""
    assert ended(begun(dataset, tmp_path / "reference"))
    reference = open_log(str(tmp_path / "reference"), "model").head().manifest
    searched = sum(map(len, reference.metrics["search"]["holdout_loss"]))
    for stretches, clock in ((1, NEVER), (6, EveryNinth()), (searched - 2, EveryNinth()), (searched + 1, EveryNinth())):
        registry = tmp_path / f"stopped after {stretches}"
        assert not ended(begun(dataset, registry, clock), stretches)
        run = begun(dataset, registry)
        assert ((run.next_epoch() or 0) > 0) == (clock is not NEVER), "it goes on"
        assert ended(run)
        found = open_log(str(registry), "model").head().manifest
        assert [blob.sha256 for blob in found.blobs.refs] == [blob.sha256 for blob in reference.blobs.refs]
        assert found.metrics == reference.metrics


class Killed(BaseException):
    """As SIGKILL: nothing catches it for good."""


class EveryTimeUntil(Clock):
    """A checkpoint whenever one may be stored; then the process ends when another is due."""

    def __init__(self, checkpoints: int) -> None:
        super().__init__()
        self.left = checkpoints

    def due(self) -> bool:
        if not self.left:
            raise Killed
        self.left -= 1
        return True


@pytest.mark.slow
def test_a_checkpoint_just_before_a_score_or_just_after_it_leads_to_the_same_bits(dataset: str, tmp_path: Path) -> None:
    assert ended(begun(dataset, tmp_path / "reference"))
    reference = open_log(str(tmp_path / "reference"), "model").head().manifest
    first = reference.metrics["search"]["epochs"][0]
    for checkpoints in (first - 1, first, first + 1):
        registry = tmp_path / f"killed after {checkpoints}"
        with pytest.raises(Killed):
            ended(begun(dataset, registry, EveryTimeUntil(checkpoints)))
        assert ended(begun(dataset, registry))
        found = open_log(str(registry), "model").head().manifest
        assert [blob.sha256 for blob in found.blobs.refs] == [blob.sha256 for blob in reference.blobs.refs]
        assert found.metrics == reference.metrics


def test_of_many_rows_the_searchs_own_learner_at_its_best_is_registered(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 20_000, generator=generator)
    put(str(tmp_path / "dataset"), {"part.parquet": pa.table({"a": a.numpy(), "y": (a + noise).numpy()})})
    spec = Spec(features=["a"], target="y", learning_rate=0.3, batch_size=8192, epochs="auto", ema_decay=0.5)
    run = begun(str(tmp_path / "dataset"), tmp_path / "registry", spec=spec)
    assert ended(run)
    manifest = open_log(str(tmp_path / "registry"), "model").head().manifest
    search = manifest.metrics["search"]
    [losses] = search["holdout_loss"]
    best = search["epochs"].index(search["best_epochs"])
    assert losses[best] == min(losses)
    assert best < len(losses) - 1, "it went on for a while"
    assert manifest.counters["epochs"] == search["best_epochs"]
    assert manifest.metrics["holdout"]["loss"] == losses[best]
    assert manifest.counters["rows"] == search["best_epochs"] * (20_000 - manifest.metrics["holdout_rows"])


def test_rows_that_were_to_be_held_out_are_never_trained_on(dataset: str, tmp_path: Path) -> None:
    assert ended(begun(dataset, tmp_path / "registry", holdout=0.25))
    manifest = open_log(str(tmp_path / "registry"), "model").head().manifest
    held_out = manifest.metrics["holdout_rows"]
    assert 10 < held_out < 50
    assert manifest.counters["rows"] == (120 - held_out) * manifest.counters["epochs"]


def test_patience_is_for_epochs_that_are_given(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="patience"):
        begun(dataset, tmp_path / "registry", patience=2)

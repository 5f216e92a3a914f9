"""Another spec on what a model was trained on: with the log's own spec it is the log, with another it is an honest model."""

import copy
import importlib
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data import keys, parquet, put, rows
from tidemill.storage.audit import audit
from tidemill.storage.errors import CorruptObject, DatasetChanged, NotFound, PlacesOverlap
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Consumed
from tidemill.storage.retention import collect_garbage
from tidemill.storage.urls import open_store
from tidemill.tasks import batch, online
from tidemill.tasks.choosing.backtest import backtest
from tidemill.tasks.choosing.compare import compare
from tidemill.tasks.choosing.page import ShownBacktest
from tidemill.tasks.choosing.results import Backtest
from tidemill.tasks.code import StaleCode
from tidemill.tasks.predict import predict
from tidemill.tasks.settings import LabelSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError, NonFiniteLoss, SpecError
from tidemill.tasks.training.spec import Model, Spec

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]

OWN = Spec.model_validate(
    {
        "features": ["a", "b"],
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [4], "dropout": 0.2}},
        "optimizer": {"name": "adam"},
        "replay": {"rows": 40},
        "running_statistics": True,
        "batch_size": 16,
        "epochs": 2,
    }
)
OTHER = Spec(features=["a", "b"], target="y", learning_rate=0.1, batch_size=16, epochs=2)
BLIND = OTHER.model_copy(update={"features": OTHER.features[1:]})


class Place:
    """A model: 0 batch, 1 and 2 online (one shard rejected), 3 back to 1, 4 online, 5 batch on other data, 6 online."""

    def __init__(self, url: MakeUrl) -> None:
        self.url = url
        self.train("one", rows(100, 1))
        self.drain({"00.parquet": rows(30, 50), "01.parquet": rows(31, 51), "02.parquet": b"PAR1 no file PAR1"})
        self.drain({"03.parquet": rows(33, 53)})
        self.log = open_log(url("registry"), "model")
        self.log.rollback(self.log.version(1))
        self.drain({"04.parquet": rows(20, 54), "05.parquet": rows(10, 55)})
        self.train("two", rows(80, 2))
        self.drain({"06.parquet": rows(25, 56)})

    def train(self, dataset: str, table: pa.Table, spec: Spec = OWN) -> None:
        put(self.url(dataset), {"part.parquet": table})
        batch.train(self.url(dataset), self.url("registry"), "model", spec)

    def drain(self, shards: dict[str, pa.Table | bytes], **more: Any) -> None:
        put(self.url("inbox"), shards)
        settings = OnlineSettings(
            passes=2,
            grace_seconds=0,
            after_commit={"archive_to": self.url("archive")},
            gate={"champion": "score"},
            **more,
        )
        online.drain(self.url("inbox"), self.url("registry"), "model", settings)

    to = "to"
    """Where backtests are kept."""

    def backtest(self, spec: Spec, to: str | None = None, **more: Any) -> Backtest:
        return backtest(self.url("registry"), "model", spec, [self.url("archive")], self.url(to or self.to), **more)

    def kept(self, found: Backtest) -> VersionLog:
        return open_log(found.kept_in, found.kept_as)


@pytest.fixture
def place(memory_url: MakeUrl) -> Place:
    return Place(memory_url)


@pytest.fixture(scope="module")
def same_for_all() -> Place:
    unique = uuid.uuid4().hex
    return Place(lambda name: f"memory://{unique}/{name}")


@pytest.fixture
def shared(same_for_all: Place) -> Place:
    """The same, made once, for tests that only read it."""
    mine = copy.copy(same_for_all)
    mine.to = uuid.uuid4().hex
    return mine


def consumed(log: VersionLog) -> list[Consumed]:
    return [shard for version in list(log.history(log.head()))[::-1] for shard in version.manifest.consumed]


def test_with_the_logs_own_spec_the_scores_and_the_bits_are_the_logs(shared: Place) -> None:
    found = shared.backtest(OWN)
    assert found.same == found.total.shards == 6
    assert found.verdict == ["Every score of every shard is that of the log, exactly."]
    assert [shard.score for shard in consumed(shared.kept(found))] == [shard.score for shard in consumed(shared.log)]
    theirs, mine = shared.log.head().manifest.blobs, shared.kept(found).head().manifest.blobs
    assert (mine.weights.sha256, mine.state.sha256) == (theirs.weights.sha256, theirs.state.sha256)


def test_with_the_logs_own_spec_it_is_the_log_even_where_the_start_must_be_trained_again(place: Place) -> None:
    collect_garbage(place.log, keep=1)
    found = place.backtest(OWN)
    assert found.same == found.total.shards
    assert "trained anew" in found.notes[0]


def test_another_spec_is_scored_on_each_shard_before_it_is_trained_on_it(shared: Place) -> None:
    """As a model of that spec would have been, had it run in the place of the log's."""
    found = shared.backtest(OTHER)
    theirs = consumed(shared.log)
    assert [shard.key for shard in consumed(shared.kept(found))] == [shard.key for shard in theirs]
    batch.train(shared.url("one"), shared.url("really"), "model", OTHER)
    put(shared.url("again"), {f"0{i}.parquet": rows(30 + i, 50 + i) for i in (0, 1)})
    online.drain(shared.url("again"), shared.url("really"), "model", OnlineSettings(passes=2))
    really = consumed(open_log(shared.url("really"), "model"))
    assert [shard.score for shard in consumed(shared.kept(found))][:2] == [shard.score for shard in really]
    assert found.total.learner == pytest.approx(
        sum(shard.rows * shard.score["rmse"] for shard in theirs) / sum(shard.rows for shard in theirs)
    )
    assert found.total.champion is not None
    assert 0 < found.same + 1 <= found.total.shards


def test_a_spec_that_knows_less_is_found_to_be_worse(shared: Place) -> None:
    """And how sure that is: of 6 shards alone, by their standard error."""
    found = shared.backtest(BLIND)
    good = shared.backtest(OTHER)
    assert found.total.spec is not None
    assert good.total.spec is not None
    assert found.total.spec > 2 * good.total.spec
    assert found.kept_as != good.kept_as
    assert found.difference is not None
    assert found.standard_error is not None
    worse = found.difference > 2 * found.standard_error
    assert ("it is worse" if worse else "not told apart") in found.verdict[0]


def test_run_again_it_tells_the_same_and_trains_nothing(shared: Place) -> None:
    first = shared.backtest(OTHER)
    there, page = keys(shared.url(shared.to)), open_store(shared.url(shared.to)).read(f"{first.kept_as}.html")
    assert shared.backtest(OTHER) == first
    assert keys(shared.url(shared.to)) == there
    assert open_store(shared.url(shared.to)).read(f"{first.kept_as}.html") == page


def test_when_the_log_has_grown_it_goes_on_from_where_it_was(place: Place) -> None:
    early = place.backtest(OWN)
    before = place.kept(early).head().number
    place.drain({"07.parquet": rows(12, 57)})
    found = place.backtest(OWN)
    assert (found.same, found.total.shards) == (7, 7)
    assert place.kept(found).head().number == before + 1


def test_the_model_is_only_read(shared: Place) -> None:
    store = open_store(shared.url("registry"))
    before = {info.key: info.etag for info in store.list()}, keys(shared.url("archive")), keys(shared.url("inbox"))
    shared.backtest(OTHER)
    assert (
        {info.key: info.etag for info in store.list()},
        keys(shared.url("archive")),
        keys(shared.url("inbox")),
    ) == before


@pytest.mark.parametrize("spec", [OWN, OTHER])
def test_what_is_kept_is_a_sound_history_of_its_own(shared: Place, spec: Spec) -> None:
    found = audit(shared.kept(shared.backtest(spec)))
    assert found.findings == []
    assert found.consumed == 6


def test_what_is_kept_predicts_as_any_model_does(shared: Place) -> None:
    """By its last version, which had seen the whole stream."""
    found = shared.backtest(OWN)
    put(shared.url("new"), {"1.parquet": rows(5, 7)})
    out = shared.url(f"{shared.to}-predictions")
    mine = predict(found.kept_in, found.kept_as, shared.url("new"), out, "champion")
    assert mine.version == shared.kept(found).head().number
    predict(shared.url("registry"), "model", shared.url("new"), f"{out}-log", "head")
    assert open_store(out).read("1.parquet") == open_store(f"{out}-log").read("1.parquet")


def test_weights_that_nothing_goes_on_from_are_removed(shared: Place) -> None:
    """Those of batch trainings, of what the log went back to and of the head are kept."""
    log = shared.kept(shared.backtest(OTHER))
    numbers = {int(key.split("/")[2].split("-")[0]) for key in keys(shared.url(shared.to)) if "/blobs/" in key}
    assert [version.manifest.kind for version in log.history(log.head())][::-1] == [
        *("batch", "online", "online", "rollback", "online", "batch", "online")
    ]
    assert numbers == {0, 1, 5, 6}


def test_a_spec_that_names_its_users_own_code_needs_no_other_leave(shared: Place) -> None:
    own = OTHER.model_copy(update={"model": Model(factory="tests.tasks.own_models:Plain")})
    assert shared.backtest(own).total.spec is not None
    found = compare(shared.url("one"), {"own": own}, shared.url("compared"))
    assert found.best.failed is None


def test_edited_code_of_the_user_begins_another_backtest(
    shared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / f"own_{uuid.uuid4().hex}.py"
    module.write_text("import torch\nNet = lambda: torch.nn.Linear(2, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = OTHER.model_copy(update={"model": Model(factory=f"{module.stem}:Net")})
    first = shared.backtest(own)
    assert shared.backtest(own) == first
    module.write_text("import torch\nNet = lambda: torch.nn.Linear(2, 1, bias=False)\n")
    with pytest.raises(StaleCode, match="has changed since this process imported it"):
        shared.backtest(own)
    importlib.reload(sys.modules[module.stem])
    second = shared.backtest(own)
    assert second.kept_as != first.kept_as
    assert second.total.spec != first.total.spec


def test_labels_that_came_later_are_joined_as_they_were(memory_url: MakeUrl) -> None:
    place = Place.__new__(Place)
    place.url = memory_url
    place.train("one", rows(100, 1))
    table = rows(30, 5).append_column("id", pa.array(range(30)))
    put(memory_url("labels"), {"0.parquet": table.select(["id", "y"])})
    labels = LabelSettings(inbox=memory_url("labels"), key="id")
    place.drain({"0.parquet": table.drop_columns("y")}, labels=labels)
    found = place.backtest(OWN)
    assert (found.same, found.total.shards) == (1, 1)


def test_labels_that_came_row_by_row_are_joined_as_they_were(memory_url: MakeUrl) -> None:
    """Of two shards, and of one whose labels never came, which was counted alone."""
    place = Place.__new__(Place)
    place.url = memory_url
    place.train("one", rows(100, 1))
    table = rows(30, 5).append_column("id", pa.array(range(30)))
    both = table.select(["id", "y"])
    put(memory_url("labels"), {"x.parquet": both.slice(20), "y.parquet": both.slice(0, 20)})
    labels = LabelSettings(inbox=memory_url("labels"), key="id", wait_seconds=3600)
    place.drain({"0.parquet": table.drop_columns("y")}, labels=labels)
    never = rows(20, 6).append_column("id", pa.array(range(100, 120)))
    place.drain({"1.parquet": never.drop_columns("y")}, labels=labels.model_copy(update={"wait_seconds": 1e-6}))
    log = open_log(memory_url("registry"), "model")
    assert [shard.rows for shard in consumed(log)] == [30, 0]
    open_store(memory_url("archive")).delete("1.parquet")
    found = place.backtest(OWN)
    assert (found.same, found.total.shards) == (2, 2)
    assert place.kept(found).head().manifest.blobs.state.sha256 == log.head().manifest.blobs.state.sha256
    assert place.backtest(OTHER).total.rows == 30
    open_store(memory_url("archive")).delete("x.parquet")
    with pytest.raises(NotFound, match=r"lacks 1 of 3 shards \(x.parquet\)"):
        place.backtest(BLIND)


def test_classes_are_compared_by_the_loss_or_by_the_accuracy_where_the_losses_differ(memory_url: MakeUrl) -> None:
    def table(count: int, seed: int) -> pa.Table:
        found = rows(count, seed)
        return found.append_column("late", pa.array([value > 0 for value in found["y"].to_pylist()]))

    place = Place.__new__(Place)
    place.url = memory_url
    own = Spec(features=["a", "b"], target="late", epochs=10, learning_rate=0.5, batch_size=16)
    place.train("one", table(100, 1), own)
    place.drain({f"{i}.parquet": table(40, 10 + i) for i in range(3)})
    found = place.backtest(own.model_copy(update={"learning_rate": 0.1}))
    assert (found.metric, found.lower_is_better) == ("loss", True)
    found = place.backtest(
        Spec(features=["b"], target="late", task="binary", class_weights="balanced", learning_rate=0.1)
    )
    assert (found.metric, found.lower_is_better) == ("accuracy", False)
    assert found.total.spec is not None
    assert found.total.learner is not None
    assert found.total.spec < found.total.learner
    assert "better" not in found.verdict[0]
    with pytest.raises(SpecError, match="is for task 'binary' of target 'late', the other spec for task 'regression'"):
        place.backtest(Spec(features=["a"], target="late", task="regression"))


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_shards_that_the_archive_lacks_are_named_before_anything_is_trained(place: Place) -> None:
    for key in ("01.parquet", "04.parquet"):
        open_store(place.url("archive")).delete(key)
    with pytest.raises(NotFound, match=r"lacks 2 of 6 shards \(01.parquet, 04.parquet\): nothing was trained"):
        place.backtest(OTHER)
    assert keys(place.url("to")) == []


def test_a_shard_of_another_size_is_named_before_anything_is_trained(place: Place) -> None:
    open_store(place.url("archive")).write("01.parquet", parquet(rows(5, 1)))
    with pytest.raises(NotFound, match=r"holds other bytes for 1 of 6 shards \(01.parquet\)"):
        place.backtest(OTHER)
    assert keys(place.url("to")) == []


def test_a_shard_of_other_bytes_is_named_by_its_sha256(place: Place) -> None:
    archive = open_store(place.url("archive"))
    data = bytearray(archive.read("01.parquet"))
    data[10] ^= 1
    archive.write("01.parquet", bytes(data))
    with pytest.raises(
        NotFound, match=r"no shard '01.parquet' with sha256 \w+: .*/01.parquet holds other bytes, with sha256"
    ):
        place.backtest(OTHER)


def test_a_spec_of_another_target_or_task_is_refused(shared: Place) -> None:
    with pytest.raises(SpecError, match="task 'regression' of target 'y', the other spec for target 'b'"):
        shared.backtest(Spec(features=["a"], target="b"))
    with pytest.raises(SpecError, match="the other spec for task 'binary' of target 'y'"):
        shared.backtest(Spec(features=["a"], target="y", task="binary"))
    assert keys(shared.url(shared.to)) == []


def test_a_start_whose_dataset_has_changed_is_refused_unless_another_is_named(place: Place) -> None:
    put(place.url("one"), {"more.parquet": rows(10, 3)})
    with pytest.raises(DatasetChanged, match=r"when it had 1 files and 100 rows.*\(--dataset\)"):
        place.backtest(OTHER)
    put(place.url("three"), {"part.parquet": rows(100, 1)})
    named = place.backtest(OTHER, dataset=place.url("three"))
    assert place.url("three") in named.notes[0]
    assert place.backtest(OTHER, dataset=rows(100, 1)).total.shards == 6


def test_archived_shards_inside_of_the_dataset_are_no_part_of_the_start(memory_url: MakeUrl) -> None:
    place = Place.__new__(Place)
    place.url = lambda name: memory_url("one/archive" if name == "archive" else name)
    place.train("one", rows(100, 1))
    place.drain({"00.parquet": rows(30, 50)})
    assert place.backtest(OTHER).total.shards == 1


def test_a_later_batch_training_whose_dataset_is_gone_is_passed_over_and_told(place: Place) -> None:
    put(place.url("two"), {"more.parquet": rows(10, 3)})
    found = place.backtest(OTHER)
    assert any(
        "Version 5 of the log is a batch training whose dataset is no longer what it was" in n for n in found.notes
    )
    assert found.total.shards == 6
    assert place.backtest(OTHER) == found


def test_columns_that_the_shards_lack_and_a_training_that_diverges_are_told(shared: Place) -> None:
    put(shared.url("wide"), {"part.parquet": rows(100, 1).append_column("c", pa.array([1.0, 2.0] * 50))})
    with pytest.raises(ColumnError, match=r"'c' is missing from .*00.parquet"):
        shared.backtest(Spec(features=["a", "c"], target="y"), dataset=shared.url("wide"))
    with pytest.raises(NonFiniteLoss):
        shared.backtest(OTHER.model_copy(update={"learning_rate": 1e30}))


def test_results_may_not_lie_in_what_is_read(shared: Place) -> None:
    for to in ("registry", "registry/to", "archive/to", "inbox/to"):
        with pytest.raises(PlacesOverlap):
            shared.backtest(OTHER, to)


def test_a_history_that_was_replaced_is_not_mixed_with_what_was_kept(place: Place) -> None:
    place.backtest(OTHER)
    store, last = open_store(place.url("registry")), place.log.head().number
    for info in list(store.list(f"model/log/{last:08d}")):
        store.delete(info.key)
    for key in [info.key for info in store.list("model/head.json")]:
        store.delete(key)
    with pytest.raises(CorruptObject, match="not the one there now"):
        place.backtest(OTHER)


def test_a_model_that_was_never_trained_online_has_nothing_to_tell(memory_url: MakeUrl) -> None:
    place = Place.__new__(Place)
    place.url = memory_url
    place.train("one", rows(100, 1))
    put(memory_url("archive"), {"other.txt": b"-"})
    found = place.backtest(OWN)
    assert found.total.shards == 0
    assert found.verdict == ["No shard has a score of both."]
    assert isinstance(found, ShownBacktest)
    assert "No shard has a score of both." in found._repr_html_()

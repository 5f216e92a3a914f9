"""The rows that a batch run trains on: all, those of a condition, or the last ones, whose ends are pinned when it begins."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from pydantic import ValidationError
from pyiceberg.catalog.sql import SqlCatalog

from tests.data import SPEC, parquet, put, rows
from tests.storage.faults import Call, FaultStore, hooked
from tidemill.storage.audit import audit
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import CorruptObject, DatasetError, PlacesOverlap
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.records import IN_MEMORY
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.batch import BatchSteps
from tidemill.tasks.batch_run import NO_PART_OF_THE_KEY, run_key
from tidemill.tasks.choosing.compare import compare
from tidemill.tasks.choosing.places import dataset_of
from tidemill.tasks.predict import predict
from tidemill.tasks.settings import BatchSettings, RowSettings
from tidemill.tasks.snapshots import run_snapshot

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]
START = datetime(2024, 5, 1, tzinfo=UTC)
LAST = BatchSettings(last="2d", time_column="t")


def timed(day: int, count: int = 96) -> pa.Table:
    """The rows of one day, one each quarter of an hour."""
    times = [START + timedelta(days=day, minutes=15 * i) for i in range(count)]
    return rows(count, day).append_column("t", pa.array(times, pa.timestamp("us", "UTC")))


def chosen(table: pa.Table, condition: Callable[[dict[str, Any]], bool]) -> pa.Table:
    return pa.Table.from_pylist([row for row in table.to_pylist() if condition(row)], table.schema)


@pytest.fixture
def dataset(memory_url: MakeUrl) -> str:
    put(memory_url("dataset"), {f"{day}.parquet": timed(day) for day in range(4)})
    return memory_url("dataset")


class World:
    """Runs of one model over one dataset, at times that the test tells."""

    def __init__(self, dataset: str, registry: str) -> None:
        self.dataset, self.registry = dataset, registry

    def taken(
        self, at: datetime, settings: BatchSettings = LAST, stores: Callable[[str], Store] = open_store
    ) -> Snapshot:
        return run_snapshot(self.dataset, self.registry, "model", SPEC, settings, stores, lambda: at)

    def train(self, at: datetime, settings: BatchSettings = LAST, epochs: int | None = None) -> VersionLog:
        """A whole run, or one that is killed after some epochs."""
        run = batch.open_run(self.taken(at, settings), self.registry, "model", SPEC, settings)
        if run.registered is None:
            while (epoch := run.next_epoch()) is not None:
                if epoch == epochs:
                    return open_log(self.registry, "model")
                batch.train_epoch(run, epoch)
            batch.finish(run, batch.register(run, batch.evaluate(run)))
        return open_log(self.registry, "model")


@pytest.fixture
def world(dataset: str, memory_url: MakeUrl) -> World:
    return World(dataset, memory_url("registry"))


def ends(log: VersionLog) -> tuple[datetime, datetime]:
    ref = log.head().manifest.dataset
    assert ref is not None
    assert ref.chosen is not None
    assert ref.chosen.since is not None
    assert ref.chosen.until is not None
    return ref.chosen.since, ref.chosen.until


# ---- a condition -------------------------------------------------------------------------------------------------------
def test_the_bits_are_those_of_a_dataset_that_holds_just_these_rows(memory_url: MakeUrl) -> None:
    """What is not chosen may be anything: NaN, which would stop a training, or text where numbers are in other files."""
    first, second = timed(0), timed(1)
    values = zip(first.column("a").to_pylist(), first.column("b").to_pylist(), strict=True)
    spoiled = first.set_column(0, "a", pa.array([float("nan") if b > 0 else a for a, b in values]))
    other = pa.table({"a": ["text"], "b": [9.0], "y": [None], "t": [None]})
    some = [chosen(table, lambda row: row["b"] <= 0) for table in (first, second)]
    whole = [parquet(table, row_group_size=None) for table in (spoiled, second, *some)]
    put(memory_url("all"), {"0.parquet": whole[0], "1.parquet": whole[1], "day=9/a.parquet": other})
    put(memory_url("some"), {"0.parquet": whole[2], "1.parquet": whole[3]})
    info = batch.train(memory_url("all"), memory_url("r"), "model", SPEC, BatchSettings(where="b <= 0"))
    batch.train(memory_url("some"), memory_url("s"), "model", SPEC)
    one, two = (open_log(memory_url(name), "model").head().manifest for name in ("r", "s"))
    assert one.blobs.weights.sha256 == two.blobs.weights.sha256
    assert one.metrics["holdout"] == two.metrics["holdout"]
    assert one.dataset is not None
    assert two.dataset is not None
    assert (one.dataset.files, one.dataset.rows) == (two.dataset.files, two.dataset.rows)
    of = one.dataset.chosen
    assert of is not None
    assert (of.where, of.last, of.of_files, of.read_files, of.of_rows) == ("b <= 0", None, 3, 3, 193)
    assert info.chosen[0] == f"rows: {one.dataset.rows} of 193, in 2 of 3 files (3 were opened): b <= 0"
    assert two.dataset.chosen is None


def test_a_table_in_memory_has_chosen_rows_too(memory_url: MakeUrl) -> None:
    table = timed(0)
    put(memory_url("some"), {"a.parquet": chosen(table, lambda row: row["a"] > 0)})
    batch.train(table, memory_url("r"), "model", SPEC, BatchSettings(where="a > 0"))
    ref = open_log(memory_url("r"), "model").head().manifest.dataset
    assert ref is not None
    assert ref.chosen is not None
    assert (ref.url, ref.chosen.of_rows) == (IN_MEMORY, 96)
    assert ref.rows == sum(a > 0 for a in table.column("a").to_pylist())
    with pytest.raises(DatasetError, match="the table: it has no column 'x', by which rows are chosen"):
        batch.train(table, memory_url("r"), "model", SPEC, BatchSettings(where="x > 0"))


def test_a_run_without_chosen_rows_has_the_key_that_it_always_had(dataset: str) -> None:
    """The runs that an earlier Tidemill left go on, and those that it finished are found."""
    import hashlib
    import json

    from tidemill.tasks.training.batches import ORDER

    taken, settings = batch.take_snapshot(dataset), BatchSettings()
    asked = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if name not in (*RowSettings.model_fields, *NO_PART_OF_THE_KEY)
    }
    identity = [ORDER, dataset, taken.ref.fingerprint, SPEC.model_dump(mode="json"), asked, ""]
    assert (
        run_key(taken, SPEC, settings) == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    )
    other = BatchSettings(where="a > 0")
    assert run_key(taken, SPEC, other) != run_key(taken, SPEC, settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"where": "a >"}, "cannot be read as SQL"),
        ({"last": "90d"}, "last needs time_column"),
        ({"time_column": "t"}, "time_column needs last"),
        ({"last": "soon", "time_column": "t"}, "'soon' is no length of time"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_the_settings(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        BatchSettings.model_validate(settings)


# ---- the last rows -----------------------------------------------------------------------------------------------------
def test_the_last_rows_end_when_the_run_begins(world: World) -> None:
    at = START + timedelta(days=3, hours=1)
    log = world.train(at)
    assert ends(log) == (at - timedelta(days=2), at)
    ref = log.head().manifest.dataset
    assert ref is not None
    assert (ref.rows, ref.files) == (2 * 96, 3)


def test_an_unfinished_run_goes_on_with_its_own_instants(world: World, memory_url: MakeUrl) -> None:
    at, later = START + timedelta(days=3), START + timedelta(days=3, hours=5)
    reference = World(world.dataset, memory_url("reference")).train(at)
    world.train(at, epochs=1)
    put(world.dataset, {"9.parquet": timed(9)})  # beyond the window: nothing that it holds is chosen
    log = world.train(later)
    assert ends(log) == ends(reference)
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256
    assert [info.key for info in log.store.list("model/runs/") if info.key.endswith("done.json")] != []


def test_a_finished_run_is_found_where_no_chosen_row_is_in_another_file(world: World) -> None:
    at = START + timedelta(days=4)
    world.train(at)
    log = world.train(at + timedelta(hours=5))
    assert (log.head().number, ends(log)[1]) == (0, at)
    put(world.dataset, {"4.parquet": timed(4)})
    log = world.train(at + timedelta(days=1, hours=5))
    assert (log.head().number, ends(log)[1]) == (1, at + timedelta(days=1, hours=5))


def test_again_begins_anew_and_is_gone_on_with_itself(world: World) -> None:
    at, again = START + timedelta(days=3), LAST.model_copy(update={"again": True})
    world.train(at, epochs=1)
    log = world.train(at + timedelta(hours=1), again, epochs=1)
    log = world.train(at + timedelta(hours=2), again)
    assert ends(log)[1] == at + timedelta(hours=1), (
        "not with the run that was begun without it, and with its own once killed"
    )
    log = world.train(at + timedelta(hours=3), again)
    assert (log.head().number, ends(log)[1]) == (1, at + timedelta(hours=3))


def test_a_run_whose_files_have_changed_begins_anew(world: World) -> None:
    at = START + timedelta(days=3)
    world.train(at, epochs=1)
    put(world.dataset, {"2.parquet": timed(2, 50)})
    assert ends(world.train(at + timedelta(hours=1)))[1] == at + timedelta(hours=1)
    assert ends(world.train(at + timedelta(hours=1)))[1] == at + timedelta(hours=1)


def test_a_run_that_began_with_other_weights_is_done_when_it_is_done(world: World, dataset: str) -> None:
    batch.train(dataset, world.registry, "source", SPEC)
    at, warm = START + timedelta(days=4), LAST.model_copy(update={"init_from": f"{world.registry}/source@0"})
    world.train(at, warm, epochs=1)
    assert ends(world.train(at + timedelta(hours=1), warm))[1] == at
    assert world.train(at + timedelta(hours=2), warm).head().number == 0
    put(dataset, {"4.parquet": timed(4)})
    log = world.train(at + timedelta(days=1), warm)
    assert (log.head().number, ends(log)[1]) == (1, at + timedelta(days=1))


def test_other_settings_have_instants_of_their_own(world: World) -> None:
    at = START + timedelta(days=3)
    world.train(at, epochs=1)
    other = LAST.model_copy(update={"where": "b > 0"})
    assert world.taken(at + timedelta(hours=1), other).ref.chosen != world.taken(at + timedelta(hours=2)).ref.chosen
    assert ends(world.train(at + timedelta(hours=2)))[1] == at


def test_two_runs_that_begin_at_once_have_one_window(world: World) -> None:
    for day in (3, 4):  # the first of all, and one after another that is done
        at, others = START + timedelta(days=day), list[Snapshot]()

        def race(call: Call, at: datetime = at, others: list[Snapshot] = others) -> None:
            if call.phase == "before" and call.verb in ("create", "replace") and "window" in call.key and not others:
                others.append(world.taken(at + timedelta(hours=1)))

        mine = world.taken(at, stores=hooked(race))
        assert mine.ref == others[0].ref
        assert mine.ref.chosen is not None
        assert mine.ref.chosen.until == at + timedelta(hours=1)
        world.train(at + timedelta(hours=2))
        put(world.dataset, {"4.parquet": timed(4)})


def test_nothing_is_written_where_places_overlap(dataset: str) -> None:
    before = [info.key for info in open_store(dataset).list()]
    with pytest.raises(PlacesOverlap):
        World(dataset, f"{dataset}/registry").taken(START + timedelta(days=3))
    assert [info.key for info in open_store(dataset).list()] == before


def test_a_damaged_window_is_told(world: World) -> None:
    world.taken(START + timedelta(days=3))
    log = VersionLog(open_store(world.registry), "model")
    [key] = [info.key for info in log.store.list("model/runs/") if info.key.endswith("window.json")]
    log.store.write(key, b"{}")
    with pytest.raises(CorruptObject, match=r"window\.json is damaged: .* Delete it"):
        world.taken(START + timedelta(days=3))


@pytest.mark.parametrize("moment", range(0, 40, 3))
def test_killed_at_any_call_the_same_command_ends_with_the_bits_of_its_first_window(
    world: World, memory_url: MakeUrl, moment: int
) -> None:
    """A kill before the window was stored has begun nothing: the next run's window is its own."""

    class Killed(BaseException):
        pass

    at, calls = START + timedelta(days=3), list[str]()

    def kill(call: Call) -> None:
        if call.phase == "before" and call.url == world.registry:
            calls.append(call.name)
            if len(calls) > moment:
                raise Killed

    def stores(url: str) -> Store:
        return FaultStore(open_store(url), kill)

    def run(at: datetime, stores: Callable[[str], Store]) -> None:
        steps = BatchSteps.of(lambda step: partial(step, now=lambda: at) if step is run_snapshot else step)
        batch.train_by(steps, world.dataset, world.registry, "model", SPEC, LAST, stores)

    torch.manual_seed(moment)
    try:
        run(at, stores)
        killed = False
    except Killed:
        killed = True
    stored = any(info.key.endswith("window.json") for info in open_store(world.registry).list()) if killed else True
    run(at + timedelta(hours=7), open_store)
    log = open_log(world.registry, "model")
    began = at if stored else at + timedelta(hours=7)
    assert ends(log)[1] == began
    reference = World(world.dataset, memory_url("reference")).train(began)
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256


# ---- tables of Delta Lake ----------------------------------------------------------------------------------------------
ALL = BatchSettings()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_deltalake(tmp_path / "table", timed(0))
    write_deltalake(tmp_path / "table", timed(1), mode="append")
    return tmp_path / "table"


def of(log: VersionLog) -> tuple[int, int]:
    """The version of the table that the head was trained on, and how many rows."""
    ref = log.head().manifest.dataset
    assert ref is not None
    assert ref.table is not None
    return ref.table.version, ref.rows


def test_a_killed_run_goes_on_with_its_version_of_a_table_that_is_written(table: Path, memory_url: MakeUrl) -> None:
    reference = World(str(table), memory_url("reference")).train(START, ALL)
    world = World(str(table), memory_url("registry"))
    world.train(START, ALL, epochs=1)
    write_deltalake(table, timed(2), mode="append")
    DeltaTable(table).delete("a > 0")
    log = world.train(START, ALL)
    assert of(log) == of(reference) == (1, 192)
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256
    assert of(world.train(START, ALL))[0] == 3, "and once it is done, on the newest"
    assert world.train(START, ALL).head().number == 1


def test_a_version_that_is_named_is_trained_on_and_again_by_the_same_key(table: Path, memory_url: MakeUrl) -> None:
    world = World(str(table), memory_url("registry"))
    named = BatchSettings(table_version=0)
    assert of(world.train(START, named)) == (0, 96)
    write_deltalake(table, timed(2), mode="append")
    assert world.train(START, named).head().number == 0
    log = world.train(START, BatchSettings(table_version=2, where="b > 0"))
    assert log.head().number == 1
    assert dataset_of(log, log.head(), [], open_store).ref == log.head().manifest.dataset
    info = batch.train(str(table), memory_url("other"), "model", SPEC, named)
    assert info.chosen[0] == "version 0 of the Delta table"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # pyiceberg's own, and of its database
def test_a_killed_run_goes_on_with_the_columns_of_an_iceberg_table_as_they_were_called(
    tmp_path: Path, memory_url: MakeUrl
) -> None:
    with contextlib.closing(
        SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/warehouse")
    ) as catalog:
        catalog.create_namespace("n")
        days = pa.concat_tables([timed(0), timed(1)])
        table = catalog.create_table("n.t", days.schema)
        folder = Path(table.location().removeprefix("file://"))

        def hint() -> None:
            (folder / "metadata/version-hint.text").write_text(Path(table.metadata_location).name)

        table.append(days)
        hint()
        reference = World(str(folder), memory_url("reference")).train(START, ALL)
        world = World(str(folder), memory_url("registry"))
        world.train(START, ALL, epochs=1)
        with table.update_schema() as update:
            update.rename_column("a", "alpha")
        hint()
        log = world.train(START, ALL)
    assert of(log) == of(reference)
    assert log.head().number == 0
    assert log.head().manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256


def test_an_unfinished_run_whose_files_were_vacuumed_begins_anew(table: Path, memory_url: MakeUrl) -> None:
    world = World(str(table), memory_url("registry"))
    world.train(START, ALL, epochs=1)
    DeltaTable(table).delete("b > 0")
    DeltaTable(table).vacuum(0, dry_run=False, enforce_retention_duration=False)
    newest = DeltaTable(table).version()
    assert of(world.train(START, ALL))[0] == newest


@pytest.mark.parametrize("moment", range(0, 45, 8))
def test_killed_at_any_call_while_the_table_is_written_a_run_trains_what_its_version_holds(
    table: Path, memory_url: MakeUrl, moment: int
) -> None:
    class Killed(BaseException):
        pass

    registry, calls = memory_url("registry"), list[str]()

    def kill(call: Call) -> None:
        if call.phase == "before" and call.url == registry:
            calls.append(call.name)
            if len(calls) % 10 == 5:
                write_deltalake(table, timed(len(calls), 8), mode="append")
            if len(calls) > moment:
                raise Killed

    with contextlib.suppress(Killed):
        batch.train(str(table), registry, "model", SPEC, stores=lambda url: FaultStore(open_store(url), kill))
    write_deltalake(table, timed(3), mode="append")
    DeltaTable(table).optimize.compact()
    batch.train(str(table), registry, "model", SPEC)
    log = open_log(registry, "model")
    assert audit(log).findings == []
    version, count = of(log)
    assert count == DeltaTable(table, version=version).to_pyarrow_table().num_rows
    batch.train(str(table), memory_url("reference"), "model", SPEC, BatchSettings(table_version=version))
    reference = open_log(memory_url("reference"), "model")
    for number in range(log.head().number + 1):
        if of_version(log, number) == version:
            assert log.version(number).manifest.blobs.weights.sha256 == reference.head().manifest.blobs.weights.sha256


def of_version(log: VersionLog, number: int) -> int | None:
    ref = log.version(number).manifest.dataset
    return None if ref is None or ref.table is None else ref.table.version


def test_predictions_are_made_for_a_version_of_a_table(table: Path, memory_url: MakeUrl) -> None:
    batch.train(str(table), memory_url("registry"), "model", SPEC)
    done = predict(memory_url("registry"), "model", str(table), memory_url("out"), rows=RowSettings(table_version=0))
    assert (done.files, done.rows) == (1, 96)


# ---- other readers -------------------------------------------------------------------------------------------------------
def test_the_same_rows_are_found_again_by_what_a_version_says(world: World) -> None:
    at = START + timedelta(days=3)
    log = world.train(at, LAST.model_copy(update={"where": "b > 0"}))
    found = dataset_of(log, log.head(), [], open_store)
    assert found.ref == log.head().manifest.dataset


def test_predictions_are_made_for_the_chosen_rows(dataset: str, memory_url: MakeUrl) -> None:
    batch.train(dataset, memory_url("registry"), "model", SPEC)
    rows = RowSettings(where="a > 0 AND t < '2024-05-02'")
    done = predict(memory_url("registry"), "model", dataset, memory_url("out"), columns=["a"], rows=rows)
    expected = sum(a > 0 for a in timed(0).column("a").to_pylist())
    assert (done.files, done.rows) == (1, expected)
    whole = predict(memory_url("registry"), "model", dataset, memory_url("all"), columns=["a"])
    assert whole.rows == 4 * 96

    def by_a(out: str) -> dict[float, float]:
        tables = [group.read(["a", "prediction"]) for group in batch.take_snapshot(memory_url(out)).row_groups]
        return {row["a"]: row["prediction"] for table in tables for row in table.to_pylist()}

    assert by_a("out").items() <= by_a("all").items()


def test_specs_are_compared_on_the_chosen_rows(dataset: str, memory_url: MakeUrl) -> None:
    other = SPEC.model_copy(update={"epochs": 1})
    rows = RowSettings(last="36500d", time_column="t", where="b > 0")
    found = compare(dataset, {"one": SPEC, "two": other}, memory_url("to"), rows=rows)
    again = compare(dataset, {"one": SPEC, "two": other}, memory_url("to"), rows=rows)
    assert [row.scores for row in again.specs] == [row.scores for row in found.specs]
    assert [row.version for row in again.specs] == [0, 0]
    log = open_log(memory_url("to"), found.specs[0].model)
    ref = log.head().manifest.dataset
    assert ref is not None
    assert ref.chosen is not None
    assert ref.chosen.where == "b > 0"

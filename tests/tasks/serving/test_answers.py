"""The log of answers: what it holds, and what becomes of it while its store is away."""

import datetime as dt
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import keys, put, rows
from tests.s3_server import wait_until
from tests.storage.faults import Call, FaultStore, hooked
from tests.tasks.online.test_step import begin
from tests.tasks.serving.serving import Client, serving
from tidemill.storage.errors import Unavailable
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.serving.answers import AnswerLog
from tidemill.tasks.serving.loading import load
from tidemill.tasks.serving.metrics import Numbers
from tidemill.tasks.serving.predictor import Predictor
from tidemill.tasks.serving.tables import Answered, table_of_rows
from tidemill.tasks.settings import BatchSettings, ServeSettings
from tidemill.tasks.training.inputs import Input
from tidemill.tasks.training.request_log import PREDICTION, PROBABILITIES, REQUEST, TIME, TYPES, VERSION
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]
QUICK: Final = ServeSettings(log_to="set by the test", log_rows=1000, log_seconds=0.1, poll_seconds=0.05)


def shards(inbox: str) -> list[pa.Table]:
    """In the order of their names."""
    store = open_store(inbox)
    return [pq.read_table(io.BytesIO(store.read(key))) for key in keys(inbox)]


def logged(inbox: str) -> pa.Table:
    """All shards as one table."""
    return pa.concat_tables(shards(inbox))


def value(port: int, name: str) -> float:
    """Of one of the server's metrics."""
    with Client(port) as asking:
        lines = asking.get("/metrics").body.decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


# ---- what it holds ---------------------------------------------------------------------------------------------------
def zoo() -> pa.Table:
    """Columns of each family, with nulls."""
    day = dt.datetime(2026, 3, 1, 12, 30, 15, 250_000)
    return pa.table(
        {
            "flag": pa.array([True, None, False, True]),
            "half": pa.array([0.1, 2.5, None, -1.0], pa.float32()),
            "whole": pa.array([1, 2**40, None, -3], pa.int64()),
            "real": pa.array([0.1, None, 1e9, -2.25]),
            "when": pa.array([day, None, day + dt.timedelta(days=400), day], pa.timestamp("us")),
            "date": pa.array([day.date(), None, day.date(), day.date()], pa.date32()),
            "long": pa.array([dt.timedelta(seconds=90, microseconds=5), None, dt.timedelta(0), dt.timedelta(1)]),
            "text": pa.array(["ä", None, "", "long " * 100]),
            "city": pa.array([2**60 + 1, None, 5, 7], pa.int64()),
            "vector": pa.array([[1.0, 2.0], None, [0.5, None], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
            "words": pa.array([["a", "b"], None, [], ["c", None, "d"]]),
            "items": pa.array([[1, 2**60 + 1], None, [], [3]]),
            "y": pa.array([1.0, 2.0, 3.0, 4.0]),
        }
    )


ZOO: Final = Spec.model_validate(
    {
        "features": [
            *("flag", "half", "whole", "real", "when", "date", "long", "vector"),
            *({"name": name, "kind": "category", "buckets": 16} for name in ("text", "city")),
            *({"name": name, "length": 2, "buckets": 16} for name in ("words", "items")),
        ],
        "target": "y",
        "task": "regression",
        "epochs": 2,
    }
)


def as_json(table: pa.Table) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        if isinstance(value, dt.timedelta):
            return value.total_seconds()
        return value.isoformat() if isinstance(value, dt.date) else value

    names = [name for name in table.column_names if name != "y"]
    return [{name: plain(row[name]) for name in names} | {"more": 1} for row in table.to_pylist()]


@pytest.mark.slow
def test_the_log_holds_what_was_asked_and_answered_as_the_model_reads_it(memory_url: MakeUrl) -> None:
    """Of the rows of the log the version predicts what it answered, whatever the column and however they were sent."""
    table = zoo()
    put(memory_url("dataset"), {"part.parquet": pa.concat_tables([table] * 10)})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", ZOO, BatchSettings(holdout=0))
    began = time.time()
    with (
        serving(memory_url("registry"), QUICK.model_copy(update={"log_to": memory_url("inbox")})) as port,
        Client(port) as asking,
    ):
        answers = [
            asking.predict(as_json(table), x_request_id="one"),
            asking.predict(as_json(table)[2], x_request_id="two"),
            asking.predict_arrow(table.append_column("more", table.column("y"))),
            asking.predict_parquet(table),
        ]
    by_id = dict[str, Any]()
    for found in shards(memory_url("inbox")):
        assert set(found.column_names) == {*(set(table.column_names) - {"y"}), *TYPES, PREDICTION}
        for name, kind in (TYPES | {PREDICTION: pa.float32()}).items():
            assert found.schema.field(name).type == kind
        predicted = load(memory_url("registry"), "model").predict(found).column("prediction").to_pylist()
        assert found.column(PREDICTION).to_pylist() == pytest.approx(predicted, rel=1e-6)
        by_id |= {row[REQUEST]: row for row in found.to_pylist()}
    assert len(by_id) == 13
    for answer in answers:
        for place, prediction in enumerate(answer.json["predictions"]):
            row = by_id[f"{answer.json['request']}/{place}"]
            assert row[PREDICTION] == pytest.approx(prediction, rel=1e-6)
            assert row[VERSION] == answer.json["version"] == 0
            assert began - 1 < row[TIME].timestamp() < time.time() + 1
    assert by_id["one/3"]["words"] == ["c", None, "d"]
    assert by_id["one/0"]["city"] == 2**60 + 1


def test_labels_stand_in_the_log_with_their_probabilities(make_url: MakeUrl) -> None:
    table = rows(50, 0)
    kinds = pa.array(["yes" if y > 0 else "no" for y in table.column("y").to_pylist()])
    put(make_url("dataset"), {"part.parquet": table.set_column(2, "y", kinds)})
    batch.train(make_url("dataset"), make_url("registry"), "model", Spec(features=["a", "b"], target="y"))
    with (
        serving(make_url("registry"), QUICK.model_copy(update={"log_to": make_url("inbox")})) as port,
        Client(port) as asking,
    ):
        answer = asking.predict(table.select(["a", "b"]).slice(0, 5).to_pylist()).json
    found = logged(make_url("inbox"))
    assert found.column(PREDICTION).to_pylist() == answer["predictions"]
    probabilities = pa.array(answer["probabilities"], found.schema.field(PROBABILITIES).type)
    assert found.column(PROBABILITIES).to_pylist() == probabilities.to_pylist()
    assert found.schema.field(PROBABILITIES).metadata == {b"labels": b'["no", "yes"]'}


# ---- a store that is away --------------------------------------------------------------------------------------------
def test_a_store_that_is_away_slows_no_answer_and_gets_the_shards_later(memory_url: MakeUrl) -> None:
    begin(memory_url("registry"), memory_url("dataset"))
    away = threading.Event()
    away.set()

    def refuse(call: Call) -> None:
        if call.url == memory_url("inbox") and call.phase == "before" and away.is_set():
            raise Unavailable("the store is away")

    settings = QUICK.model_copy(update={"log_to": memory_url("inbox")})
    with serving(memory_url("registry"), settings, stores=hooked(refuse)) as port, Client(port) as asking:
        assert all(asking.predict({"a": 1, "b": 2}).status == 200 for _ in range(20))
        wait_until(lambda: value(port, "tidemill_served_log_waiting_rows") == 20, seconds=10, what="answers")
        assert keys(memory_url("inbox")) == []
        away.clear()
        wait_until(lambda: value(port, "tidemill_served_logged_rows_total") == 20, seconds=10, what="shards")
        assert value(port, "tidemill_served_log_waiting_rows") == 0
    assert logged(memory_url("inbox")).num_rows == 20


@pytest.fixture
def predictor(memory_url: MakeUrl) -> Predictor:
    begin(memory_url("registry"), memory_url("dataset"))
    return load(memory_url("registry"), "model")


def answered(predictor: Predictor, number: int) -> Answered:
    outputs = predictor.outputs([{"a": float(number), "b": 0.0}])
    return Answered(predictor, f"r{number}", time.time(), outputs, body=b'{"a": %d, "b": 0.0}' % number)


def test_beyond_the_bound_answers_are_dropped_counted_and_told(
    predictor: Predictor, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    away = threading.Event()
    away.set()

    def refuse(call: Call) -> None:
        if call.phase == "before" and away.is_set():
            raise Unavailable("the store is away")

    numbers = Numbers("model")
    size = answered(predictor, 0).size
    store = FaultStore(open_store(memory_url("inbox")), refuse)
    log = AnswerLog(store, 1000, 0.01, numbers, buffer_bytes=10 * size + 5)
    for number in range(10, 40):
        log.add(answered(predictor, number))
    assert [one.message for one in caplog.records if "dropped" in one.message] == [
        f"{store.url}: answers are dropped from the log, 1 rows so far"
    ]
    away.clear()
    log.close(10)
    found = logged(memory_url("inbox")).column(REQUEST).to_pylist()
    shown = numbers.shown("")[0].decode()
    kept = len(found)
    assert 9 <= kept <= 10
    assert found == [f"r{number}/0" for number in range(10, 10 + kept)]
    assert f'tidemill_served_log_dropped_rows_total{{model="model"}} {30 - kept}.0' in shown
    assert f'tidemill_served_logged_rows_total{{model="model"}} {kept}.0' in shown
    assert f"{30 - kept} rows of answers are in no shard" in caplog.messages[-1]


def test_what_a_closed_log_cannot_store_is_counted(predictor: Predictor, memory_url: MakeUrl) -> None:
    def refuse(call: Call) -> None:
        raise Unavailable("the store is away")

    numbers = Numbers("model")
    log = AnswerLog(FaultStore(open_store(memory_url("inbox")), refuse), 2, 60, numbers)
    for number in range(5):
        log.add(answered(predictor, number))
    log.close(0.3)
    log.add(answered(predictor, 5))
    assert 'tidemill_served_log_dropped_rows_total{model="model"} 6.0' in numbers.shown("")[0].decode()


@pytest.mark.slow
def test_a_lost_answer_of_the_store_makes_no_second_shard(predictor: Predictor, memory_url: MakeUrl) -> None:
    lost: list[str] = []

    def lose(call: Call) -> None:
        if call.verb == "create" and call.phase == "after" and not lost:
            lost.append(call.key)
            raise Unavailable("the answer was lost")

    log = AnswerLog(FaultStore(open_store(memory_url("inbox")), lose), 1000, 60, Numbers("model"))
    log.add(answered(predictor, 1))
    log.close(10)
    assert keys(memory_url("inbox")) == lost
    assert logged(memory_url("inbox")).num_rows == 1


def test_shards_are_cut_by_rows_and_by_time(predictor: Predictor, memory_url: MakeUrl) -> None:
    log = AnswerLog(open_store(memory_url("inbox")), 4, 1e300, Numbers("model"))  # longer than a thread can wait
    for number in range(10):
        log.add(answered(predictor, number))
    wait_until(lambda: len(keys(memory_url("inbox"))) == 2, seconds=10, what="two shards of four rows")
    log.close(10)
    assert logged(memory_url("inbox")).column(REQUEST).to_pylist() == [f"r{number}/0" for number in range(10)]

    timely = AnswerLog(open_store(memory_url("other")), 1000, 0.1, Numbers("model"))
    timely.add(answered(predictor, 1))
    wait_until(lambda: len(keys(memory_url("other"))) == 1, seconds=10, what="a shard of one row")
    timely.close(10)


def test_an_answer_that_makes_no_table_is_left_out_alone_and_counted(
    predictor: Predictor, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = Numbers("model")
    log = AnswerLog(open_store(memory_url("inbox")), 1000, 60, numbers)
    for number in range(3):
        log.add(answered(predictor, number))
    bad = answered(predictor, 9)
    log.add(Answered(bad.predictor, bad.request, bad.at, bad.outputs, body=b'{"a": "text", "b": 1}'))
    log.close(10)
    assert logged(memory_url("inbox")).column(REQUEST).to_pylist() == ["r0/0", "r1/0", "r2/0"]
    assert 'tidemill_served_log_dropped_rows_total{model="model"} 1.0' in numbers.shown("")[0].decode()
    assert any("cannot be logged" in message for message in caplog.messages)


def of_table(predictor: Predictor, name: str, table: pa.Table) -> Answered:
    return Answered(predictor, name, time.time(), predictor.outputs(table), body=b"", table=table)


def test_an_answer_that_parquet_cannot_hold_is_left_out_and_the_log_goes_on(
    memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    day = dt.datetime(2026, 3, 1)
    dataset = pa.table({"at": pa.array([day, day + dt.timedelta(1)], pa.timestamp("s")), "y": [0.0, 1.0]})
    put(memory_url("dataset"), {"part.parquet": pa.concat_tables([dataset] * 10)})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", Spec(target="y"), BatchSettings(holdout=0))
    predictor = load(memory_url("registry"), "model")
    log = AnswerLog(open_store(memory_url("inbox")), 2, 60, Numbers("model"))
    far = pa.table({"at": pa.array([2**62], pa.timestamp("s"))})  # Parquet has no seconds
    for name, table in (("far", far), ("near", dataset.slice(0, 1)), ("later", dataset)):
        log.add(of_table(predictor, name, table.select(["at"])))
    log.close(10)
    assert logged(memory_url("inbox")).column(REQUEST).to_pylist() == ["near/0", "later/0", "later/1"]
    assert any("cannot be logged" in message for message in caplog.messages)


def test_a_dictionary_with_null_among_its_entries_is_logged(memory_url: MakeUrl) -> None:
    dataset = pa.table({"city": ["a", "b"] * 10, "y": [0.0, 1.0] * 10})
    put(memory_url("dataset"), {"part.parquet": dataset})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", Spec(target="y"), BatchSettings(holdout=0))
    log = AnswerLog(open_store(memory_url("inbox")), 1000, 60, Numbers("model"))
    cities = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2], pa.int8()), pa.array(["a", None, "b"]))
    log.add(of_table(load(memory_url("registry"), "model"), "r", pa.table({"city": cities})))
    log.close(10)
    found = logged(memory_url("inbox")).column("city")
    assert found.to_pylist() == ["a", None, None, "b"]
    assert pa.types.is_dictionary(found.type)


def test_large_ids_are_not_rounded_by_fractions_that_others_ask_for(memory_url: MakeUrl) -> None:
    ids = pa.table({"id": pa.array([2**60 + 1, 5] * 10), "y": [0.0, 1.0] * 10})
    put(memory_url("dataset"), {"part.parquet": ids})
    spec = Spec.model_validate({"target": "y", "features": [{"name": "id", "kind": "category", "buckets": 16}]})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", spec, BatchSettings(holdout=0))
    predictor = load(memory_url("registry"), "model")
    log = AnswerLog(open_store(memory_url("inbox")), 1000, 60, Numbers("model"))
    for asked in (2**60 + 1, 3.5, 7):
        body = b'{"id": %s}' % str(asked).encode()
        log.add(Answered(predictor, f"{asked}", time.time(), predictor.outputs([{"id": asked}]), body=body))
    log.close(10)
    found = [table.column("id").to_pylist() for table in shards(memory_url("inbox"))]
    assert found == [[2**60 + 1, 7], [3.5]]


def test_a_request_with_a_large_id_beside_a_fraction_is_left_out_alone_and_counted(memory_url: MakeUrl) -> None:
    ids = pa.table({"id": pa.array([2**60 + 1, 5] * 10), "y": [0.0, 1.0] * 10})
    put(memory_url("dataset"), {"part.parquet": ids})
    spec = Spec.model_validate({"target": "y", "features": [{"name": "id", "kind": "category", "buckets": 16}]})
    batch.train(memory_url("dataset"), memory_url("registry"), "model", spec, BatchSettings(holdout=0))
    predictor, numbers = load(memory_url("registry"), "model"), Numbers("model")
    log = AnswerLog(open_store(memory_url("inbox")), 1000, 60, numbers)
    for name, asked in (("both", [{"id": 2**60 + 1}, {"id": 3.5}]), ("one", [{"id": 2**60 + 1}])):
        log.add(Answered(predictor, name, time.time(), predictor.outputs(asked), body=json.dumps(asked).encode()))
    log.close(10)
    assert logged(memory_url("inbox")).column(REQUEST).to_pylist() == ["one/0"]
    assert 'tidemill_served_log_dropped_rows_total{model="model"} 2.0' in numbers.shown("")[0].decode()


def test_nanoseconds_that_are_asked_for_are_logged_where_the_dataset_has_them() -> None:
    columns = [Input("at", "time"), Input("took", "duration")]
    asked = [{"at": "1970-01-01T00:00:01.000000123Z", "took": 1e-7}, {"at": None, "took": None}]
    types = {"at": "timestamp[ns]", "took": "duration[ns]"}
    table = table_of_rows(asked, columns, types)
    assert [column.cast(pa.int64()).to_pylist() for column in table.columns] == [[1_000_000_123, None], [100, None]]
    far = [{"at": "0001-01-01T00:00:00+14:00", "took": 1e14}]  # beyond what nanoseconds, and Python, can hold
    assert [str(kind) for kind in table_of_rows(far, columns, types).schema.types] == [
        "timestamp[us, tz=UTC]",
        "duration[ms]",
    ]


def test_a_fraction_that_is_asked_for_in_a_column_of_integers_is_logged_as_it_is() -> None:
    columns = [Input("age", "number"), Input("pair", "number", width=2)]
    asked = [{"age": 3.75, "pair": [1, -0.5]}, {"age": 2, "pair": None}, {"age": None, "pair": [4.0, None]}]
    types = {"age": "int8", "pair": "fixed_size_list<item: int64>[2]"}
    assert table_of_rows(asked, columns, types).to_pylist() == asked
    assert table_of_rows([{"age": -1}], columns[:1], {"age": "uint8"}).to_pylist() == [{"age": -1}]
    whole = table_of_rows([{"age": 3.0, "pair": [1, 2.0]}], columns, types)
    assert [str(kind) for kind in whole.schema.types] == ["int8", "fixed_size_list<item: int64>[2]"]

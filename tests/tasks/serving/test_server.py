"""The HTTP server: what it answers, what it refuses, and what it says of itself."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final

import jsonschema
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.data import put, rows
from tests.s3_server import wait_until
from tests.tasks.online.test_step import begin
from tests.tasks.serving.serving import Answer, Client, arrow, serving
from tidemill.storage.aliases import promote, resolve
from tidemill.storage.log import open_log
from tidemill.tasks.online import drain
from tidemill.tasks.serving.bodies import ARROW, JSON, PARQUET
from tidemill.tasks.serving.loading import load
from tidemill.tasks.serving.metrics import METRICS
from tidemill.tasks.settings import Limits, OnlineSettings, ServeSettings
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]
SMALL: Final = ServeSettings(max_body_bytes=300_000, max_rows=100, max_seconds=0.3, poll_seconds=0.02)
TOKEN: Final = "a token"
ROW: Final = {"a": 1.0, "b": -2.5}


@pytest.fixture
def registry(memory_url: MakeUrl) -> str:
    begin(memory_url("registry"), memory_url("dataset"))
    return memory_url("registry")


@pytest.fixture
def client(registry: str) -> Iterator[Client]:
    with serving(registry, SMALL) as port, Client(port) as asking:
        yield asking


def listed(table: pa.Table) -> list[dict[str, Any]]:
    return table.select(["a", "b"]).to_pylist()


# ---- predictions -----------------------------------------------------------------------------------------------------
def test_rows_as_json_arrow_and_parquet_get_the_predictions_of_the_version(client: Client, registry: str) -> None:
    table = rows(50, 1)
    expected = load(registry, "model").predict(table).column("prediction").to_pylist()
    for answer in (
        client.predict(listed(table)),
        client.predict_arrow(table),
        client.predict_parquet(table),
        client.predict_arrow(table.slice(0, 50).select(["b", "y", "a"])),
    ):
        assert answer.status == 200, answer.body
        assert answer.headers["x-tidemill-version"] == "0"
        assert answer.json["version"] == 0
        assert answer.json["request"] == answer.headers["x-request-id"]
        assert pa.array(answer.json["predictions"], pa.float32()).to_pylist() == pytest.approx(expected, rel=1e-6)
    one = client.predict(listed(table)[0])
    assert one.json["predictions"] == pytest.approx(expected[:1], rel=1e-6)


def test_labels_are_answered_with_the_probabilities_of_all(memory_url: MakeUrl) -> None:
    table = rows(200, 0)
    kinds = ["low" if y < -1 else "middle" if y < 1 else "high" for y in table.column("y").to_pylist()]
    labelled = table.set_column(2, "y", pa.array(kinds))
    put(memory_url("dataset"), {"part.parquet": labelled})
    from tidemill.tasks import batch

    batch.train(memory_url("dataset"), memory_url("registry"), "model", Spec(features=["a", "b"], target="y", epochs=2))
    with serving(memory_url("registry"), SMALL) as port, Client(port) as asking:
        answer = asking.predict(listed(table.slice(0, 20))).json
        expected = load(memory_url("registry"), "model").predict(table.slice(0, 20))
        assert answer["labels"] == ["high", "low", "middle"]
        assert answer["predictions"] == expected.column("prediction").to_pylist()
        for got, wanted in zip(answer["probabilities"], expected.column("probabilities").to_pylist(), strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
        described(asking, answer, listed(table.slice(0, 20)))


def test_a_request_keeps_its_id_or_is_given_one(client: Client) -> None:
    assert client.predict(ROW, x_request_id="order-17").headers["x-request-id"] == "order-17"
    made = [client.predict(ROW).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    assert made[0] != made[1]
    for bad in ("two words", "x" * 129):
        refused = client.predict(ROW, x_request_id=bad)
        assert refused.status == 400
        assert refused.headers["x-request-id"] != bad


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_what_a_row_cannot_hold_is_refused_with_its_row_and_column(client: Client) -> None:
    def refused(given: Any) -> tuple[int, Any, Any]:
        answer = client.predict(given)
        assert answer.headers["x-tidemill-version"] == "0"
        return answer.status, answer.json.get("row"), answer.json.get("column")

    assert refused([ROW, {"a": 1}]) == (422, 1, "b")
    assert refused([ROW, ROW, {"a": "much", "b": 1}]) == (422, 2, "a")
    assert refused([ROW, 17]) == (422, 1, None)
    assert refused({"a": 1e300, "b": 1}) == (422, 0, "a")
    assert refused([]) == (422, None, None)
    assert refused("rows") == (422, None, None)
    deep = b'{"a": 1, "b": ' + b"[" * 1020 + b"]" * 1020 + b"}"  # deeper than Python shows
    answer = client("POST", "/predict", deep, content_type=JSON)
    assert (answer.status, answer.json["column"]) == (422, "b")


def test_tables_are_refused_with_the_column_and_the_row_at_fault(client: Client) -> None:
    table = rows(5, 1)
    lacks = client.predict_arrow(table.drop_columns(["b"]))
    assert (lacks.status, "'b'" in lacks.json["detail"]) == (422, True)
    other = client.predict_parquet(table.set_column(0, "a", pa.array(["text"] * 5)))
    assert (other.status, "'a'" in other.json["detail"]) == (422, True)
    infinite = client.predict_arrow(table.set_column(1, "b", pa.array([0.0, 1.0, float("inf"), None, float("nan")])))
    assert infinite.status == 422
    assert (infinite.json["row"], infinite.json["column"]) == (2, "b")
    assert client.predict_arrow(table.slice(0, 0)).status == 422
    twice = table.append_column("b", table.column("a"))
    for answer in (client.predict_arrow(twice), client.predict_parquet(twice)):
        assert (answer.status, answer.json["column"]) == (422, "b")
        assert "occurs 2 times" in answer.json["detail"]


def test_each_limit_has_its_answer(registry: str) -> None:
    with serving(registry, SMALL, TOKEN) as port, Client(port) as asking:
        right = {"authorization": f"Bearer {TOKEN}"}
        assert asking.predict(ROW, **right).status == 200
        for wrong in ({}, {"authorization": "Bearer another"}, {"authorization": f"Basic {TOKEN}"}):
            answer = asking.predict(ROW, **wrong)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/metrics", "/openapi.json"):
            assert (asking.get(path).status, asking.get(path, **right).status) == (401, 200)
        assert (asking.get("/health").status, asking.get("/ready").status) == (200, 200)

        many = asking.predict([ROW] * 101, **right)
        assert (many.status, "100 rows" in many.json["detail"]) == (413, True)
        assert asking("POST", "/predict", arrow(rows(101, 1)), content_type=ARROW, **right).status == 413
        large = asking.predict([{"a": 1, "b": 2, "more": "x" * 300_000}], **right)
        assert (large.status, "300,000 bytes" in large.json["detail"]) == (413, True)
        assert large.headers["connection"] == "close"
        assert asking.predict(ROW, **right).status == 200


def test_a_body_that_is_longer_than_it_says_or_does_not_say_is_refused_while_it_comes(client: Client) -> None:
    parts = iter([b"[" + b" " * 100_000] * 4)
    answer = client("POST", "/predict", parts, content_type=JSON, transfer_encoding="chunked")
    assert answer.status == 413


def test_a_body_that_does_not_arrive_in_time_is_refused(registry: str) -> None:
    with serving(registry, SMALL) as port:
        for length in (10, 200_000):  # small; large
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n[" % length
                )
                answer = b"".join(iter(lambda: connection.recv(65536), b""))  # used at once
                assert answer.startswith(b"HTTP/1.1 408 "), answer
                assert b"0.3 seconds" in answer
        with Client(port) as asking:
            assert asking.predict(ROW).status == 200


def test_a_client_that_goes_away_in_the_midst_of_its_body_is_counted(registry: str) -> None:
    with serving(registry, SMALL.model_copy(update={"max_seconds": 60})) as port, Client(port) as asking:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n["
            )
        wait_until(lambda: b'code="499"' in asking.get("/metrics").body, seconds=30, what="the end of the request")
        assert asking.predict(ROW).status == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", JSON, 400),
        (b'{"a": NaN, "b": 1}', JSON, 400),
        (b"[" * 5000, JSON, 400),
        (b"PAR1 and more PAR1", PARQUET, 400),
        (b"no stream", ARROW, 400),
        (arrow(rows(5, 1))[:-100], ARROW, 400),
        (arrow(rows(5, 1), compression="zstd"), ARROW, 400),
        (b"a=1&b=2", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 415),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:20],
)
def test_a_body_that_is_not_what_it_says_is_refused(client: Client, body: bytes, kind: str, status: int) -> None:
    answer = client("POST", "/predict", body, content_type=kind)
    assert answer.status == status, answer.body
    assert answer.json["detail"]
    assert client.predict(ROW).status == 200


def test_an_arrow_stream_that_lies_about_itself_is_refused(client: Client) -> None:
    text = pa.table({"a": rows(5, 1).column("a"), "b": rows(5, 1).column("b")})
    data = bytearray(arrow(text))
    honest = client("POST", "/predict", bytes(data), content_type=ARROW)
    assert honest.status == 200
    for at in range(0, len(data), 7):  # a bit is flipped here and there
        broken = bytearray(data)
        broken[at] ^= 0x10
        assert client("POST", "/predict", bytes(broken), content_type=ARROW).status in (200, 400, 413, 422)


def test_what_is_not_there_is_not_found(client: Client) -> None:
    assert client.get("/").status == 404
    assert client.get("/predict").status == 405


# ---- the version -----------------------------------------------------------------------------------------------------
def test_it_is_ready_once_there_is_a_version(memory_url: MakeUrl, caplog: pytest.LogCaptureFixture) -> None:
    with serving(memory_url("registry"), SMALL) as port, Client(port) as asking:
        assert asking.get("/health").status == 200
        assert asking.get("/ready").status == 503
        assert asking.predict(ROW).status == 503
        assert asking.get("/openapi.json").status == 200
        assert len([one for one in caplog.records if "no version to serve yet" in one.message]) == 1
        begin(memory_url("registry"), memory_url("dataset"))
        wait_until(lambda: asking.get("/ready").status == 200, seconds=30, what="a version")
        assert asking.predict(ROW).json["version"] == 0


@pytest.mark.slow
def test_fifty_champions_are_swapped_under_load_without_an_error_or_a_step_back(
    memory_url: MakeUrl, registry: str
) -> None:
    put(memory_url("inbox"), {f"{i:02}.parquet": rows(16, i) for i in range(50)})
    one_each = OnlineSettings(limits=Limits(max_shards=1), gate={"champion": "ignore"})
    drain(memory_url("inbox"), registry, "model", one_each)
    log = open_log(registry, "model", writable=True)
    with serving(registry, SMALL.model_copy(update={"poll_seconds": 0.001})) as port, Client(port) as asking:
        over, seen = threading.Event(), [list[Answer]() for _ in range(4)]

        def ask(answers: list[Answer]) -> None:
            with Client(port) as one:
                while not over.is_set():
                    answers.append(one.predict(ROW))

        threads = [threading.Thread(target=ask, args=(answers,)) for answers in seen]
        for thread in threads:
            thread.start()
        for number in range(1, 51):
            promote(log, "champion", resolve(log, str(number)))
            wait_until(lambda: asking.predict(ROW).json["version"] == number, seconds=30, what="the swap")  # noqa: B023
        over.set()
        for thread in threads:
            thread.join()
    for answers in seen:
        assert {answer.status for answer in answers} == {200}
        versions = [answer.json["version"] for answer in answers]
        assert all(before <= after for before, after in pairwise(versions))
        assert versions[-1] > 40
        assert all(answer.headers["x-tidemill-version"] == str(answer.json["version"]) for answer in answers)
    by_version: dict[int, set[float]] = {}
    for answer in (one for answers in seen for one in answers):
        by_version.setdefault(answer.json["version"], set()).add(answer.json["predictions"][0])
    assert all(len(predictions) == 1 for predictions in by_version.values())  # none is of two versions


# ---- what it says of itself ------------------------------------------------------------------------------------------
def described(asking: Client, answer: Any, given: list[dict[str, Any]]) -> None:
    """The document has what was asked, what was answered, and would not have something else."""
    document = asking.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"

    def fits(value: Any, name: str) -> bool:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        return jsonschema.Draft202012Validator(schema).is_valid(value)

    for row in given:
        assert fits(row, "Row")
        assert fits({**row, "more": 1}, "Row")
        for name in row:
            assert fits({**row, name: None}, "Row")
            assert not fits({**row, name: {"no": "value"}}, "Row")
            assert not fits({key: value for key, value in row.items() if key != name}, "Row")
    assert fits(answer, "Answer")
    assert not fits({**answer, "predictions": ["neither"]}, "Answer")
    assert fits(asking.predict([{}]).json, "Refusal")


def test_the_document_describes_rows_and_answers(client: Client) -> None:
    described(client, client.predict([ROW]).json, [ROW])


def test_the_metrics_count_what_was_answered(client: Client) -> None:
    client.predict([ROW] * 3)
    client.predict([{}])
    shown = {}
    families = list(text_string_to_metric_families(client.get("/metrics").body.decode()))
    for family in families:
        for sample in family.samples:
            assert sample.labels.pop("model") == "model"
            shown[sample.name, *sample.labels.values()] = sample.value
    assert shown["tidemill_served_requests_total", "200"] == 1
    assert shown["tidemill_served_requests_total", "422"] == 1
    assert shown["tidemill_served_rows_total",] == 3
    assert shown["tidemill_served_request_seconds_count",] == 2
    assert shown["tidemill_served_version",] == 0
    assert time.time() - shown["tidemill_served_last_look_timestamp_seconds",] < 60
    assert {family.name for family in families} >= METRICS.keys()

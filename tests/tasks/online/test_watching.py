"""Who watches a run: metrics in a file, pages on a port. They are right, and whatever becomes of them, the run goes on."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from tests.data import keys, put, rows
from tests.storage.faults import Call, hooked
from tests.tasks.online.test_step import begin, days
from tidemill.progress import Activity, listening
from tidemill.storage.audit import audit
from tidemill.storage.errors import UnknownModel
from tidemill.storage.inbox import open_inbox
from tidemill.storage.log import open_log
from tidemill.storage.status import ProblemName
from tidemill.storage.urls import open_store
from tidemill.tasks.online import drain, follow, metrics, web
from tidemill.tasks.online.events import Committed, Looked, Stepped
from tidemill.tasks.online.metrics import METRICS, Numbers
from tidemill.tasks.predict import predict
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.serving import metrics as serving
from tidemill.tasks.settings import Archive, Limits, OnlineSettings

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]
T = TypeVar("T")
ROOT: Final = Path(__file__).parents[3]
PATIENT: Final = OnlineSettings(poll_seconds=0.01, grace_seconds=0, limits=Limits(max_shards=1))


@pytest.fixture(autouse=True)
def _nothing_is_counted_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process whose earlier tests have trained models of the same name."""
    monkeypatch.setattr(metrics._collector, "models", {})


@pytest.fixture
def registry(memory_url: MakeUrl) -> str:
    begin(memory_url("registry"), memory_url("dataset"))
    return memory_url("registry")


def values(text: str) -> dict[str, float]:
    """`name` or `name{label=value}` -> value, of Tidemill's metrics."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model"}
            if sample.name.startswith("tidemill_"):
                assert sample.labels["model"] == "model"
                found[sample.name + "".join(f"{{{name}={value}}}" for name, value in sorted(labels.items()))] = (
                    sample.value
                )
    return found


# ---- who listens changes nothing -------------------------------------------------------------------------------------
class Listener:
    """Remembers what it hears, or fails at once."""

    def __init__(self, *, fails: bool = False) -> None:
        self.activities: dict[str, Activity] = {}
        self.events: list[object] = []
        self._fails = fails

    def on_activity(self, activity: Activity) -> None:
        if self._fails:
            raise RuntimeError("no")
        self.activities[activity.what] = activity
        if activity.loss is not None:
            activity.loss()

    def on_event(self, event: object) -> None:
        if self._fails:
            raise RuntimeError("no")
        self.events.append(event)


def trained(memory_url: MakeUrl, name: str) -> list[tuple[str, str]]:
    """The sha256 of weights and state of each version of a small history."""
    begin(memory_url(f"{name}/registry"), memory_url(f"{name}/dataset"))
    put(memory_url(f"{name}/inbox"), days(3) | {"bad.parquet": b"bad"})
    drain(memory_url(f"{name}/inbox"), memory_url(f"{name}/registry"), "model", PATIENT)
    log = open_log(memory_url(f"{name}/registry"), "model")
    blobs = [version.manifest.blobs for version in log.history(log.head())]
    return [(each.weights.sha256, each.state.sha256) for each in blobs]


def test_who_listens_hears_of_all_passes_and_changes_no_bit(memory_url: MakeUrl) -> None:
    alone, listener = trained(memory_url, "alone"), Listener()
    with listening(listener), listening(Listener(fails=True)):
        assert trained(memory_url, "heard") == alone
    passes = {what: (activity.done, activity.total, activity.ended) for what, activity in listener.activities.items()}
    assert passes["statistics of the columns"] == (200, 200, True)
    held_out = 200 - passes["epoch 1 of 3"][0]
    assert 0 < held_out < 50
    assert passes["epoch 3 of 3"] == (200 - held_out, 200 - held_out, True)
    assert passes["drain model"] == (3, 3, True)
    assert listener.activities["drain model"].rows == 40 + 41 + 42
    kinds = [type(event) for event in listener.events]
    assert (kinds.count(Committed), kinds.count(Stepped)) == (4, 4)
    assert kinds[0] is Looked
    rejected = [
        shard.key for event in listener.events if isinstance(event, Committed) for shard in event.manifest.rejected
    ]
    assert rejected == ["bad.parquet"]


def test_predictions_and_audits_are_told_too(registry: str, memory_url: MakeUrl) -> None:
    put(memory_url("inbox"), days(2))
    archived = PATIENT.model_copy(update={"after_commit": Archive(archive_to=memory_url("archive"))})
    drain(memory_url("inbox"), registry, "model", archived)
    log, listener = open_log(registry, "model"), Listener()
    with listening(listener):
        predict(registry, "model", memory_url("dataset"), memory_url("predictions"))
        assert audit(log).findings == reproduce(log, [open_store(memory_url("archive"))]).findings == []
    told = {what: (activity.done, activity.total, activity.ended) for what, activity in listener.activities.items()}
    assert told == {
        "predictions of version 2": (200, 200, True),
        "audit": (3, 3, True),
        "training again": (3, 3, True),
    }


def test_each_rejected_shard_is_told_at_once_with_its_reason(
    registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    put(memory_url("inbox"), {f"{i:02}.parquet": b"bad" for i in range(22)} | {"good\n.parquet": rows(10, 1)})
    drain(memory_url("inbox"), registry, "model", OnlineSettings(grace_seconds=0))
    told = [r.getMessage() for r in caplog.records if "is rejected, to quarantine: " in r.getMessage()]
    assert len(told) == 20
    assert told[0].startswith(f"{memory_url('inbox')}/00.parquet is rejected, to quarantine: ")
    assert "2 more shards are rejected by version 1 (see tidemill requeue)" in caplog.text


def test_a_run_that_waits_tells_now_and_then_that_it_is_alive(
    registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidemill.tasks.online.report.ALIVE_SECONDS", 0.05)
    caplog.set_level("INFO")
    put(memory_url("inbox"), {"large.parquet": rows(100, 1)})
    small = PATIENT.model_copy(update={"limits": Limits(max_shard_bytes=10), "stop_after_seconds": 0.5})
    follow(memory_url("inbox"), registry, "model", small)
    alive = [r.getMessage() for r in caplog.records if r.getMessage().startswith("alive: ")]
    assert 1 < len(alive) < 12
    assert re.fullmatch(
        r"alive: head of model is version 0; 1 waiting, the oldest since 20.* UTC, 1 passed over", alive[0]
    )


# ---- the file --------------------------------------------------------------------------------------------------------
def test_the_metrics_of_a_drain(registry: str, memory_url: MakeUrl, tmp_path: Path) -> None:
    file = tmp_path / "textfile" / "tidemill.prom"
    settings = PATIENT.model_copy(update={"metrics_file": str(file)})
    put(memory_url("inbox"), days(2) | {"bad.parquet": b"bad"})
    drain(memory_url("inbox"), registry, "model", settings)
    found = values(file.read_text())
    assert found["tidemill_head_version"] == 3
    assert found["tidemill_inbox_waiting_shards"] == found["tidemill_inbox_oldest_timestamp_seconds"] == 0
    assert found["tidemill_versions_total{kind=online}"] == 3
    assert found["tidemill_rows_total"] == 81
    assert found["tidemill_rejected_shards_total"] == 1
    assert found["tidemill_commit_lag_seconds_count"] == found["tidemill_commit_lag_seconds_bucket{le=+Inf}"] == 2
    assert found["tidemill_step_seconds_count"] == 3
    assert found["tidemill_score{metric=mae}{who=learner}"] > 0
    assert found["tidemill_last_look_timestamp_seconds"] >= found["tidemill_last_commit_timestamp_seconds"] > 1e9
    bare = {name.partition("{")[0] for name in found}
    shown = {name for name in METRICS if bare & {name, f"{name}_total", f"{name}_count"}}
    assert METRICS.keys() - shown == set()
    # Of no other collector: node exporter refuses a file with the metrics of its own process
    assert {line.split("_")[0] for line in file.read_text().splitlines() if line[0] != "#"} == {"tidemill"}
    assert os.listdir(file.parent) == ["tidemill.prom"]


def test_a_drain_that_finds_nothing_writes_the_scores_of_the_last_commit(
    registry: str, memory_url: MakeUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tidemill.prom"
    settings = PATIENT.model_copy(update={"metrics_file": str(file)})
    put(memory_url("inbox"), days(1))
    scores = []
    for _ in range(2):
        monkeypatch.setattr(metrics._collector, "models", {})  # as in a process of its own
        drain(memory_url("inbox"), registry, "model", settings)
        scores.append({name: value for name, value in values(file.read_text()).items() if "_score{" in name})
    assert scores[0]
    assert scores[1] == scores[0]


def test_counters_of_scheduled_drains_go_on_where_the_last_process_ended(tmp_path: Path) -> None:
    file = tmp_path / "tidemill.prom"
    before = Numbers("model")
    before.on_event(Stepped(2.0))
    with metrics.written_to(file, before):
        pass
    for number in (2, 3):
        after = Numbers("model")
        with metrics.written_to(file, after):
            after.on_event(Stepped(1.0))
        assert values(file.read_text())["tidemill_step_seconds_count"] == number
    assert values(file.read_text())["tidemill_step_seconds_sum"] == 4.0


def test_a_file_that_cannot_be_read_or_written_costs_a_line(
    registry: str, memory_url: MakeUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("tidemill_rows_total{ what is this")
    (tmp_path / "folder.prom").mkdir()
    for path, words in (
        (tmp_path / "file" / "tidemill.prom", "metrics cannot be written to"),
        (tmp_path / "file", "cannot be read, and are counted anew"),
        (tmp_path / "folder.prom", "metrics cannot be written to"),
    ):
        caplog.clear()
        put(memory_url("inbox"), {f"{path.name}.parquet": rows(20, 1)})
        report = drain(memory_url("inbox"), registry, "model", PATIENT.model_copy(update={"metrics_file": str(path)}))
        assert report.shards == 1
        assert caplog.text.count(words) == 1


# ---- the port --------------------------------------------------------------------------------------------------------
Answer = tuple[int, str, str]


def ask(url: str, accept: str = "*/*", method: str = "GET", host: str | None = None) -> Answer:
    """(status, content type, body)."""
    named = {} if host is None else {"Host": host}
    request = urllib.request.Request(url, headers={"Accept": accept, **named}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def looked_at(registry: str, inbox: str, caplog: pytest.LogCaptureFixture, look: Callable[[str], T], **more: Any) -> T:
    """Follow with a page until the inbox is empty; then `look` at its URL, from inside of the run."""
    caplog.set_level("INFO")
    seen: list[T] = []

    def hook(call: Call) -> None:
        here = threading.current_thread() is threading.main_thread()  # the pages read the store too
        if here and (call.phase, call.verb, call.key) == ("after", "list", "") and not keys(inbox) and not seen:
            (url,) = re.findall(r"(http://127.0.0.1:\d+)/ shows the report", caplog.text)
            seen.append(look(url))
            signal.raise_signal(signal.SIGTERM)

    settings = PATIENT.model_copy(update={"port": 0, **more})
    follow(inbox, registry, "model", settings, stores=hooked(hook, concurrency=1))
    return seen[0]


def test_a_run_answers_with_its_report_its_health_and_its_metrics(
    registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    put(memory_url("inbox"), days(2))

    def look(url: str) -> dict[str, Answer]:
        openmetrics = ask(f"{url}/metrics", accept="application/openmetrics-text; version=1.0.0")
        assert openmetrics[1].startswith("application/openmetrics-text; version=1.0.0")
        assert openmetrics[2].endswith("# EOF\n")
        assert ask(f"{url}/", method="HEAD")[2] == ""
        return {path: ask(f"{url}{path}") for path in ("/", "/?x", "/health", "/metrics", "/other")}

    seen = looked_at(registry, memory_url("inbox"), caplog, look)
    code, content_type, page = seen["/"]
    assert (code, content_type) == (200, "text/html; charset=utf-8")
    assert "<title>model: version 2</title>" in page
    assert 'http-equiv="refresh" content="10"' in page
    assert seen["/?x"][0] == 200
    code, content_type, body = seen["/health"]
    assert (code, content_type) == (200, "application/json")
    health = json.loads(body)
    assert (health["alive"], health["status"]["head"], health["status"]["problems"]) == (True, 2, [])
    assert health["status"]["waiting"] == 0
    code, content_type, body = seen["/metrics"]
    assert (code, content_type.partition(";")[0]) == (200, "text/plain")
    assert values(body)["tidemill_head_version"] == 2
    assert "python_info" in body  # the default registry, with all that is there
    assert (seen["/other"][0], seen["/other"][2]) == (404, "There are: / (the report), /health, /metrics\n")


def test_a_page_elsewhere_cannot_read_it_by_a_name_of_its_own(
    registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    """DNS rebinding: a stranger's name leads to 127.0.0.1."""
    put(memory_url("inbox"), days(1))

    def look(url: str) -> list[int]:
        port = url.rpartition(":")[2]
        hosts = (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"evil.example:{port}", "evil.example")
        return [ask(f"{url}/metrics", host=host)[0] for host in hosts]

    assert looked_at(registry, memory_url("inbox"), caplog, look) == [200, 200, 200, 403, 403]


def test_metrics_stand_beside_prefects_own_where_its_client_serves_them(
    registry: str, memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_CLIENT_METRICS_ENABLED", "true")
    put(memory_url("inbox"), days(2))
    drain(memory_url("inbox"), registry, "model", PATIENT)
    assert REGISTRY.get_sample_value("tidemill_rows_total", {"model": "model"}) == 81


def test_a_taken_port_costs_a_line(registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture) -> None:
    put(memory_url("inbox"), days(1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = drain(memory_url("inbox"), registry, "model", PATIENT.model_copy(update={"port": port}))
    assert report.shards == 1
    assert re.search(rf"no page at port {port}: .*in use. The run goes on", caplog.text)


def test_a_thousand_looks_make_the_report_a_few_times(
    registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    original = web.Pages._make_report

    def counted(pages: web.Pages) -> bytes:
        began = time.monotonic()
        page = original(pages)
        made.append(time.monotonic() - began)
        return page

    monkeypatch.setattr(web.Pages, "_make_report", counted)
    put(memory_url("inbox"), days(2))

    def look(url: str) -> float:
        began = time.monotonic()
        for _ in range(1000):
            assert ask(f"{url}/")[0] == 200
        return time.monotonic() - began

    spent = looked_at(registry, memory_url("inbox"), caplog, look)
    assert sum(made) < max(0.2 * spent, 2 * made[0])


def test_slow_readers_do_not_hold_up_the_run(
    registry: str, memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    """They never ask, or never read the answer: so many as are answered at once, and more."""
    put(memory_url("inbox"), days(1))
    with contextlib.ExitStack() as stack:

        def look(url: str) -> None:
            for number in range(2 * web.AT_ONCE):
                reader = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10))
                if number % 2:
                    with contextlib.suppress(OSError):  # sent away at once
                        reader.sendall(b"GET / HTTP/1.1\r\n\r\n")

        looked_at(registry, memory_url("inbox"), caplog, look)


def test_a_store_that_is_away_is_told_to_who_asks(memory_url: MakeUrl) -> None:
    log, inbox = open_log(memory_url("nowhere"), "model"), open_inbox(memory_url("inbox"))
    pages = web.Pages(log, inbox, 900.0, web.Pulse())
    code, _, body = pages.answer("/health", "")
    assert (code, "holds no model" in json.loads(body)["status"]["error"]) == (200, True)
    with pytest.raises(UnknownModel):
        pages.answer("/", "")


def test_a_run_that_does_nothing_for_too_long_is_not_alive(memory_url: MakeUrl) -> None:
    log, inbox = open_log(memory_url("nowhere"), "model"), open_inbox(memory_url("inbox"))
    pulse = web.Pulse()
    code, _, body = web.Pages(log, inbox, 1e-9, pulse).answer("/health", "")
    assert (code, json.loads(body)["alive"]) == (503, False)
    pages = web.Pages(log, inbox, 60.0, pulse)
    assert pages.answer("/health", "")[0] == 200


def test_what_is_asked_for_is_made_anew_unless_that_takes_too_much_of_the_time() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    slowly = web.Fresh(make, share=1e-9)
    assert [slowly.get() for _ in range(3)] == [0, 0, 0]
    at_once = web.Fresh(make, share=1.0)
    assert [at_once.get() for _ in range(3)] == [1, 2, 3]


# ---- names and documents ---------------------------------------------------------------------------------------------
OPERATIONS: Final = (ROOT / "docs/operations.md").read_text()
RULES: Final = ROOT / "examples/prometheus/tidemill.rules.yml"


def test_every_metric_problem_and_event_has_its_entry() -> None:
    both = METRICS | serving.METRICS
    shown = {name if told.kind != "counter" else f"{name}_total" for name, told in both.items()}
    assert set(re.findall(r"^\| `(tidemill_\w+)` \|", OPERATIONS, re.MULTILINE)) == shown
    problems = OPERATIONS.partition("## Problems")[2].partition("\n## ")[0]
    assert re.findall(r"^### (\w+)$", problems, re.MULTILINE) == list(get_args(ProblemName))
    for problem in get_args(ProblemName):
        assert "Do: " in problems.partition(f"### {problem}\n")[2].partition("\n### ")[0], problem
    events = {f"tidemill.{name}" for name in (
        "version.committed", "champion.moved", "version.refused", "shard.rejected", "inbox.behind",
    )}  # fmt: skip
    assert set(re.findall(r"^\| `(tidemill\.[\w.]+)` \|", OPERATIONS, re.MULTILINE)) == events


def test_every_alert_is_of_metrics_that_exist_and_has_its_entry() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    shown = {f"{name}_total" if told.kind == "counter" else name for name, told in METRICS.items()}
    alarms = re.findall(r"^### (\w+)$", OPERATIONS.partition("## Alarms")[2], re.MULTILINE)
    assert [rule["alert"] for rule in group["rules"]] == alarms
    for rule in group["rules"]:
        assert set(re.findall(r"tidemill_\w+", rule["expr"])) <= shown
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_the_metrics_are_in_the_default_registry_once() -> None:
    metrics.numbers_of("model")
    metrics.numbers_of("other")
    names = [family.name for family in REGISTRY.collect() if family.name.startswith("tidemill_")]
    assert sorted(names) == sorted(METRICS)

"""Many models in one process: each has what a run of its own would have given it, and what one fails of is its own."""

import itertools
import json
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from tests.data import SPEC, keys, put, rows
from tests.storage.faults import Call, Hook, hooked, together
from tests.tasks.online.test_step import days
from tidemill.storage.aliases import all_aliases
from tidemill.storage.audit import audit
from tidemill.storage.errors import PermissionDenied, Unavailable
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks import batch, online
from tidemill.tasks.settings import Archive, BatchSettings, GateSettings, Limits, OnlineSettings, Retrain
from tidemill.tasks.tenants import doors, rota, tenant
from tidemill.tasks.tenants.pairs import Pair
from tidemill.tasks.training.imports import ALLOWED_MODULES
from tidemill.tasks.training.models import Inputs
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]
ONE_A_COMMIT = OnlineSettings(limits=Limits(max_shards=1), grace_seconds=0, poll_seconds=0.01)


class Town:
    """Models in one registry, each with an inbox."""

    def __init__(self, make_url: MakeUrl, names: str, spec: Spec = SPEC) -> None:
        self._make_url = make_url
        self.registry = make_url("registry")
        for name in names:
            put(make_url(f"dataset/{name}"), {"part-0.parquet": rows(60, ord(name))})
            batch.train(make_url(f"dataset/{name}"), self.registry, name, spec.model_copy(update={"seed": ord(name)}))
        self.pairs = [self.pair(name) for name in names]

    def inbox(self, name: str) -> str:
        return self._make_url(f"inbox/{name}")

    def pair(self, name: str, **more: object) -> Pair:
        return Pair.model_validate({"inbox": self.inbox(name), "registry": self.registry, "model": name, **more})

    def fill(self, name: str, count: int) -> None:
        put(self.inbox(name), days(count))

    def bits(self, name: str) -> tuple[str, str]:
        blobs = open_log(self.registry, name).head().manifest.blobs
        return blobs.weights.sha256, blobs.state.sha256

    def head(self, name: str) -> int:
        return open_log(self.registry, name).head().number

    def rot(self, name: str) -> None:
        """The weights of the head are others than were committed."""
        blob = open_log(self.registry, name).head().manifest.blobs.weights
        open_store(self.registry).write(blob.key, bytes(blob.bytes))


def _below(make_url: MakeUrl, folder: str, name: str) -> str:
    return make_url(f"{folder}/{name}")


def stop_after(shards: int) -> Hook:
    """SIGTERM once so many shards are removed."""
    left = [shards]

    def stop(call: Call) -> None:
        if (call.verb, call.phase) == ("delete", "after") and call.key.endswith(".parquet"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    return stop


@pytest.fixture
def town(make_url: MakeUrl) -> Town:
    return Town(make_url, "abc")


@pytest.fixture
def small(memory_url: MakeUrl) -> Town:
    return Town(memory_url, "ab")


def test_each_has_the_bits_of_a_run_of_its_own_and_the_poisoned_one_stops_nobody(
    town: Town, make_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    """One learner stays in memory, so that the others are read again and again."""
    alone = Town(lambda name: make_url(f"alone/{name}"), "ac")
    for name, count in (("a", 3), ("b", 2), ("c", 1)):
        town.fill(name, count)
        if name != "b":
            alone.fill(name, count)
            online.drain(alone.inbox(name), alone.registry, name, ONE_A_COMMIT)
    town.rot("b")
    report = doors.drain(town.pairs, ONE_A_COMMIT, learners=1)
    assert {name: found.versions for name, found in report.models.items()} == {"a": 3, "b": 0, "c": 1}
    assert (report.versions, report.shards, report.rows) == (4, 4, 40 + 41 + 42 + 40)
    assert [*report.failing] == ["b"]
    assert "is not what was committed" in report.failing["b"]
    assert [town.bits(name) for name in "ac"] == [alone.bits(name) for name in "ac"]
    assert keys(town.inbox("a")) == keys(town.inbox("c")) == []
    assert keys(town.inbox("b")) == ["00.parquet", "01.parquet"]
    assert caplog.text.count("b failed") == 1


def test_learners_are_read_in_the_threads_that_look_ahead_and_the_bits_are_those_of_a_run_of_its_own(
    memory_url: MakeUrl,
) -> None:
    """With dropout, whose random numbers are the whole process's."""
    spec = Spec.model_validate({**SPEC.model_dump(), "model": {"factory": "mlp", "arguments": {"dropout": 0.5}}})
    towns = [Town(partial(_below, memory_url, at), "abc", spec) for at in ("together", "alone")]
    for town, name in itertools.product(towns, "abc"):
        town.fill(name, 3)
    for name in "abc":
        online.drain(towns[1].inbox(name), towns[1].registry, name, ONE_A_COMMIT)
    readers: set[str] = set()

    def hook(call: Call) -> None:
        if call.verb == "read" and "/blobs/" in call.key:
            readers.add(threading.current_thread().name.rpartition("-")[0])

    report = doors.drain(towns[0].pairs, ONE_A_COMMIT, learners=2, stores=hooked(hook))
    assert (readers, report.failing, report.shards) == ({"tidemill-lookout"}, {}, 9)
    assert [towns[0].bits(name) for name in "abc"] == [towns[1].bits(name) for name in "abc"]


built_in: list[str] = []


def own_net(inputs: Inputs) -> nn.Module:
    """A model of the user's own code, which takes down in which thread it is made."""
    built_in.append(threading.current_thread().name)
    return nn.Linear(inputs.numbers, 1)


@pytest.mark.parametrize("whose", ["learner", "champion"])
def test_the_users_own_code_runs_in_the_thread_that_trains_and_in_no_other(
    memory_url: MakeUrl, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """It may change what belongs to the whole process, such as torch's default type, while another model is trained."""
    monkeypatch.setenv(ALLOWED_MODULES, __name__)
    own = Spec.model_validate({**SPEC.model_dump(), "model": {"factory": f"{__name__}:own_net"}})
    town = Town(memory_url, "ab", own)
    for name in "ab":
        town.fill(name, 3)
        if whose == "champion":  # and the head is of a batch training by another spec
            other = BatchSettings(alias="candidate")
            batch.train(memory_url(f"dataset/{name}"), town.registry, name, SPEC, other)
            assert (town.head(name), all_aliases(open_log(town.registry, name))["champion"]) == (1, 0)
    built_in.clear()
    report = doors.drain(town.pairs, ONE_A_COMMIT, learners=2)
    assert (report.failing, report.shards) == ({}, 6)
    assert {*built_in} == {threading.current_thread().name}


def test_log_lines_say_whose_they_are(small: Town, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = logging.getLogRecordFactory()
    small.fill("a", 1)
    put(small.inbox("b"), {"bad.parquet": b"bad"})
    doors.drain(small.pairs, ONE_A_COMMIT)
    logging.getLogger("tidemill").info("%s of nobody", "100%")
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("a: version 1: shards 1") for line in said)
    assert any(line.startswith("b: ") and "is rejected, to quarantine" in line for line in said)
    assert said[-1] == "100% of nobody"
    assert logging.getLogRecordFactory() is before


def test_places_that_cannot_be_opened_are_that_pairs_alone(small: Town, memory_url: MakeUrl) -> None:
    small.fill("a", 1)
    nobody = Pair(inbox=memory_url("inbox/z"), registry=small.registry, model="z")
    report = doors.drain([nobody, *small.pairs], ONE_A_COMMIT)
    assert [*report.failing] == ["z"]
    assert "holds no model 'z'" in report.failing["z"]
    assert (report.shards, [*report.models]) == (1, ["a", "b"])


def test_a_store_that_is_away_for_one_of_them_holds_up_no_other(small: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again once the others are done: nothing sleeps in between."""
    monkeypatch.setattr(rota, "BACKOFF_SECONDS", 0.01)
    for name in "ab":
        small.fill(name, 2)
    order: list[str] = []
    left = [Unavailable("away")] * 2

    def away(call: Call) -> None:
        if (call.verb, call.phase) != ("create", "before") or "/log/" not in call.key:
            return
        if call.key.startswith("a/") and left:
            raise left.pop()
        order.append(call.key[0])

    report = doors.drain(small.pairs, ONE_A_COMMIT, stores=hooked(away))
    assert (report.shards, report.failing, order.count("a"), order.count("b")) == (4, {}, 2, 2)
    assert order[0] == "b"


def test_follow_trains_each_on_what_arrives_until_a_signal_and_ends_between_two_commits(small: Town) -> None:
    small.fill("a", 1)
    arrived: list[str] = []

    def hook(call: Call) -> None:
        if (call.verb, call.phase) != ("delete", "after") or not call.key.endswith(".parquet"):
            return
        arrived.append(call.url)
        if len(arrived) == 1:
            small.fill("b", 2)
        if len(arrived) == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    report = doors.follow(small.pairs, ONE_A_COMMIT, stores=hooked(hook, concurrency=1))
    assert [(report.models[name].shards, small.head(name)) for name in "ab"] == [(1, 1), (1, 1)]
    assert keys(small.inbox("b")) == ["01.parquet"]
    assert signal.getsignal(signal.SIGTERM) is before


DENIED: dict[str, tuple[str, str]] = {
    "its inbox": ("list", "inbox/a"),
    "reading its shards": ("read", "inbox/a"),
    "removing its shards": ("delete", "inbox/a"),
    "its part of the registry": ("", "registry/a/"),
    "its versions": ("create", "registry/a/log/"),
    "its alias": ("replace", "registry/a/aliases/"),
}
"""What one of several models may not do in the bucket that they share: a verb, any if empty, and where."""


@pytest.mark.parametrize("what", DENIED)
def test_what_is_denied_to_one_in_the_bucket_of_all_is_its_own_trouble(small: Town, what: str) -> None:
    verb, where = DENIED[what]
    asked: list[str] = []

    def deny(call: Call) -> None:
        if call.phase == "before" and verb in ("", call.verb) and where in f"{call.url}/{call.key}":
            asked.append(call.name)
            raise PermissionDenied(f"{call.verb} of {call.url}/{call.key} is not allowed")

    for name in "ab":
        small.fill(name, 2)
    report = doors.drain(small.pairs, ONE_A_COMMIT, stores=hooked(deny))
    assert asked
    assert (report.models["b"].shards, small.head("b"), keys(small.inbox("b"))) == (2, 2, [])
    told = report.failing.get("a", "")
    assert ("is not allowed" in told) == (what not in ("reading its shards", "removing its shards"))
    if what == "reading its shards":
        assert report.models["a"].passed_over == 2
    if what == "removing its shards":
        assert (report.models["a"].shards, report.models["a"].owed) == (2, 2)


@pytest.mark.parametrize("learners", [1, 3])
def test_a_registry_that_is_removed_while_others_have_their_turns_ends_nobody_else(
    small: Town, memory_url: MakeUrl, learners: int
) -> None:
    """At the first commit of another: before its own first turn, after it, or while it prepares."""
    other = Town(partial(_below, memory_url, "other"), "z")
    for town, name, count in ((small, "a", 3), (small, "b", 3), (other, "z", 12)):
        town.fill(name, count)
    commits: list[str] = []

    def remove(call: Call) -> None:
        if (call.verb, call.phase) == ("create", "after") and "/log/" in call.key:
            commits.append(call.key[0])
            if commits.count("z") == len(commits) - 1 and call.key[0] != "z":
                store = open_store(other.registry)
                for info in [*store.list()]:
                    store.delete(info.key)

    report = doors.drain([*other.pairs, *small.pairs], ONE_A_COMMIT, learners=learners, stores=hooked(remove))
    assert {name: report.models[name].shards for name in "ab"} == {"a": 3, "b": 3}
    assert [*report.failing] == ["z"]
    assert len(keys(other.inbox("z"))) == 12 - commits.count("z")


def test_two_runs_at_the_same_time_with_the_same_pairs_train_each_shard_once(small: Town) -> None:
    """Two of one process, each with lookouts of its own."""
    for name in "ab":
        small.fill(name, 6)
    reports: list[doors.TenantsReport] = []
    both = [
        threading.Thread(target=lambda: reports.append(doors.drain(small.pairs, ONE_A_COMMIT, learners=2)))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [report.failing for report in reports] == [{}, {}]
    for name in "ab":
        found = audit(open_log(small.registry, name))
        assert (found.findings, found.consumed) == ([], 6)
        assert sum(report.models[name].shards for report in reports) == 6
        assert keys(small.inbox(name)) == []


def test_who_could_not_be_opened_before_the_end_is_named(small: Town) -> None:
    """Its store does not answer; nobody waits for the lookout that waits for it."""
    small.fill("b", 1)
    opened = threading.Event()

    def silent(call: Call) -> None:
        if call.key.startswith("a/"):
            opened.wait(60)

    report = doors.follow(small.pairs, ONE_A_COMMIT, stores=hooked(together(silent, stop_after(1))))
    opened.set()
    assert ([*report.models], report.not_opened, report.failing, report.shards) == (["b"], ["a"], {}, 1)


def test_who_failed_is_well_again_once_the_reason_is_gone(small: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is mended when its failure is told."""
    monkeypatch.setattr(rota, "BACKOFF_SECONDS", 0.01)
    small.fill("a", 1)
    blob = open_log(small.registry, "a").head().manifest.blobs.weights
    good = open_store(small.registry).read(blob.key)
    small.rot("a")

    class Mends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "a failed" in record.getMessage():
                open_store(small.registry).write(blob.key, good)

    handler = Mends()
    logging.getLogger("tidemill.tenants").addHandler(handler)
    try:
        report = doors.follow(small.pairs, ONE_A_COMMIT, stores=hooked(stop_after(1)))
    finally:
        logging.getLogger("tidemill.tenants").removeHandler(handler)
    assert (report.failing, report.shards, small.head("a")) == ({}, 1, 1)


def test_what_stays_in_an_inbox_costs_no_learner_at_each_look(small: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept shards: once a turn has found nothing new, only another listing makes another turn."""
    monkeypatch.setattr(rota, "IDLE_MOST", 1)
    small.fill("a", 2)
    turns: list[str] = []
    original = tenant.Tenant.turn

    def counted(one: tenant.Tenant) -> object:
        turns.append(one.name)
        return original(one)

    monkeypatch.setattr(tenant.Tenant, "turn", counted)
    looks: list[str] = []

    def stop(call: Call) -> None:
        if (call.verb, call.phase, call.url) == ("list", "before", open_store(small.inbox("a")).url):
            looks.append(call.key)
            if len(looks) == 40:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = ONE_A_COMMIT.model_copy(update={"after_commit": "keep"})
    report = doors.follow(small.pairs, settings, learners=1, stores=hooked(stop))
    assert report.models["a"].shards == 2
    assert turns.count("a") <= 5
    assert "b" not in turns


def test_where_nothing_waits_what_a_killed_run_left_is_finished_without_a_learner(
    small: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed when its shards were removed, and before the alias moved."""
    small.fill("a", 1)
    left = [PermissionDenied("killed")]

    def killed(call: Call) -> None:
        if left and call.phase == "before" and call.verb == "replace" and "a/aliases/" in call.key:
            raise left.pop()

    assert [*doors.drain(small.pairs, ONE_A_COMMIT, stores=hooked(killed)).failing] == ["a"]
    assert (keys(small.inbox("a")), all_aliases(open_log(small.registry, "a"))["champion"]) == ([], 0)
    monkeypatch.setattr(tenant.Tenant, "turn", None)
    report = doors.drain(small.pairs, ONE_A_COMMIT)
    assert (report.failing, report.models["a"].head) == ({}, 1)
    assert all_aliases(open_log(small.registry, "a"))["champion"] == 1


def test_too_many_refusals_of_one_retrain_that_one(small: Town, memory_url: MakeUrl) -> None:
    put(small.inbox("a"), {f"{i}.parquet": rows(40, i, slope=-50.0) for i in range(3)})
    put(memory_url("holdout"), {"part-0.parquet": rows(100, 9)})
    small.fill("b", 2)
    gate = GateSettings(
        holdout_dataset=memory_url("holdout"),
        refusals=2,
        tolerance=0.0,
        after_refusals=Retrain(retrain_on=memory_url("dataset/a")),
    )
    own = {"gate": gate.model_dump(), "after_commit": Archive(archive_to=memory_url("dataset/a/old")).model_dump()}
    report = doors.drain([small.pair("a", settings=own), small.pair("b")], ONE_A_COMMIT)
    kinds = [
        version.manifest.kind for version in open_log(small.registry, "a").history(open_log(small.registry, "a").head())
    ]
    assert kinds.count("batch") == 2
    assert (report.failing, report.models["a"].shards, report.models["b"].shards) == ({}, 3, 2)


# ---- who watches -----------------------------------------------------------------------------------------------------
def test_metrics_of_all_are_in_one_file_with_who_fails(small: Town, tmp_path: Path) -> None:
    small.fill("a", 1)
    small.fill("b", 2)
    small.rot("a")
    file = tmp_path / "tidemill.prom"
    settings = ONE_A_COMMIT.model_copy(update={"metrics_file": str(file)})
    for total in (2, 3):
        doors.drain(small.pairs, settings)
        lines = dict(line.rsplit(" ", 1) for line in file.read_text().splitlines() if line[0] != "#")
        assert lines['tidemill_failing{model="a"}'] == "1.0"
        assert lines['tidemill_failing{model="b"}'] == "0.0"
        assert float(lines['tidemill_versions_total{kind="online",model="b"}']) >= total
        put(small.inbox("b"), days(1, start=5))


def test_the_port_shows_all_of_them_and_the_report_of_each(small: Town, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    small.rot("a")
    small.fill("a", 1)
    small.fill("b", 1)
    seen: dict[str, str] = {}

    def ask(call: Call) -> None:
        """While the last shard is removed."""
        if seen or (call.verb, call.phase) != ("delete", "after") or not call.key.endswith(".parquet"):
            return
        start = next(record.getMessage() for record in caplog.records if "shows the report" in record.getMessage())
        base = start[start.index("http") : start.index(" shows")]
        for path in ("", "health", "b", "metrics"):
            with urllib.request.urlopen(f"{base}{path}", timeout=30) as answer:
                seen[path] = answer.read().decode()

    settings = ONE_A_COMMIT.model_copy(update={"port": 0})
    doors.drain(small.pairs, settings, stores=hooked(ask, concurrency=1))
    assert "2 models" in seen[""]
    assert '<a href="/b">b</a>' in seen[""]
    assert json.loads(seen["health"])["models"] == 2
    assert "<title>b: version 1</title>" in seen["b"]
    assert 'tidemill_head_version{model="b"}' in seen["metrics"]

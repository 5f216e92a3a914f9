"""The state of a model at a glance: what is there, what is wrong, and what can be done about it."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.storage.faults import Call, FaultStore, fails
from tests.storage.histories import append, grow
from tests.storage.shards import owe, parquet
from tidemill.storage.aliases import promote
from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject, PermissionDenied, UnknownModel
from tidemill.storage.inbox import Inbox, open_inbox
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Compared, Consumed, Gate, checked
from tidemill.storage.rejected import MANY, NEWEST, rejected
from tidemill.storage.status import LATELY, Problem, ProblemName, Status, look
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.urls import open_store

MakeUrl = Callable[[str], str]
HOUR = timedelta(hours=1)


@pytest.fixture
def log(make_url: MakeUrl) -> VersionLog:
    return VersionLog(open_store(make_url("registry")), "taxi")


@pytest.fixture
def inbox(make_url: MakeUrl) -> Inbox:
    return open_inbox(make_url("inbox"))


memory = pytest.mark.parametrize("make_url", ["memory"], indirect=True)
"""For what no backend can change."""


def names(found: Status) -> list[str]:
    return [problem.name for problem in found.problems]


def only(found: Status) -> Problem:
    (problem,) = found.problems
    assert "\n" not in str(problem)
    return problem


def consumed(inbox: Inbox, key: str) -> Consumed:
    debt, info = owe(inbox, key, "delete"), inbox.store.stat(key)
    return Consumed(
        inbox=inbox.url, key=key, sha256=debt.sha256, etag=info.etag, size=info.size, last_modified=info.last_modified,
        ordinal=0, rows=1, unlabelled=0, score={},
    )  # fmt: skip


def quarantine(log: VersionLog, version: int, number: int, reason: str = "no rows") -> str:
    """One shard in quarantine; its name there."""
    name = f"{version:08d}-{number:032x}"
    log.store.write(f"{log.model}/quarantine/{name}", b"bad")
    about = {"inbox": "s3://in", "key": f"{number}.parquet", "sha256": "0", "etag": "e", "reason": reason}
    log.store.write(f"{log.model}/quarantine/{name}.json", checked(about))
    return name


# ---- what is there ---------------------------------------------------------------------------------------------------
def test_a_model_that_is_well(log: VersionLog, inbox: Inbox) -> None:
    inbox.store.write("a.parquet", parquet(1))
    shard, debt = consumed(inbox, "a.parquet"), owe(inbox, "a.parquet", "delete")
    head = append(log, grow(log, 2), consumed=(shard,), owed=(debt,), counters={"rows": 7})
    promote(log, "champion", head)
    inbox.store.write("b.parquet", parquet(1, 2))
    found = look(log, inbox, behind_seconds=900, ask_store=True)
    assert (found.model, found.head, found.champion, found.aliases) == ("taxi", 2, 2, {"champion": 2})
    assert (found.kind, found.counters, found.created) == ("online", {"rows": 7}, head.manifest.created)
    assert (found.waiting, found.consumed_in_inbox, found.passed_over) == (1, 1, {})
    assert found.waiting_bytes == len(parquet(1, 2))
    assert found.oldest_waiting == inbox.store.stat("b.parquet").last_modified
    assert (found.problems, found.notes) == ([], [])
    assert Status.model_validate_json(found.model_dump_json()) == found


@memory
def test_without_an_inbox_nothing_is_said_of_one(log: VersionLog) -> None:
    grow(log, 1)
    found = look(log, behind_seconds=900)
    assert (found.inbox, found.waiting, found.oldest_waiting, found.problems) == (None, None, None, [])


@memory
def test_a_model_that_is_not_there_is_an_error(log: VersionLog) -> None:
    with pytest.raises(UnknownModel):
        look(log, behind_seconds=900)


# ---- what is wrong ---------------------------------------------------------------------------------------------------
class Older(FaultStore):
    """A store whose objects were written an hour earlier than it says."""

    def list(self, *given: Any, **named: Any) -> Iterator[ObjectInfo]:
        for info in super().list(*given, **named):
            yield ObjectInfo(info.key, info.size, info.etag, info.last_modified - HOUR)


@memory
def test_shards_that_wait_for_too_long(log: VersionLog, inbox: Inbox) -> None:
    grow(log, 1)
    inbox.store.write("a.parquet", parquet(1))
    old = Inbox(Older(inbox.store, lambda call: None))
    problem = only(look(log, old, behind_seconds=900))  # the head is new
    assert (problem.name, problem.what) == (
        "behind",
        "1 shard waiting, the oldest for 60 minutes, though versions are committed",
    )
    problem = only(look(log, old, behind_seconds=1e-6))
    assert problem.name == "stalled"
    assert re.search("1 shard waiting, the oldest for 60 minutes, and no version was committed for 0 ", problem.what)
    assert f"tidemill follow {inbox.url} {log.store.url} taxi" in problem.remedy
    assert look(log, old, behind_seconds=86_400).problems == []


def test_a_remedy_can_be_pasted_whatever_folders_are_called(tmp_path: Path) -> None:
    log = VersionLog(open_store(f"{tmp_path}/my registry"), "taxi")
    grow(log, 1)
    quarantine(log, 0, 0, "0.parquet: no column y")
    remedy = only(look(log, behind_seconds=900)).remedy
    command = shlex.split(re.findall("`(.*)`", remedy)[0])
    assert command == ["tidemill", "requeue", log.store.url, "taxi", "--all", "--inbox", "INBOX"]


def test_rejected_shards_are_counted_and_the_newest_named(log: VersionLog) -> None:
    grow(log, 3)
    for number in range(8):
        last = quarantine(log, number // 3, number, f"{number}.parquet: no column y{number}")
    found = look(log, behind_seconds=900)
    assert (found.quarantined, found.rejected_lately, len(found.rejected)) == (8, 8, NEWEST)
    newest = found.rejected[0]
    assert (newest.name, newest.version, newest.key, newest.reason) == (last, 2, "7.parquet", "no column y7")
    problem = only(found)
    assert problem.name == "rejected"
    assert "8 shards rejected within a day, the last by version 2: 7.parquet: no column y7" in problem.what
    assert f"tidemill requeue {log.store.url} taxi --all" in problem.remedy


@memory
def test_only_the_newest_reasons_are_read(log: VersionLog) -> None:
    """Each would cost a request: of 50,000 it took half a minute."""
    grow(log, 1)
    for number in range(50):
        quarantine(log, 0, number)
    reads: list[str] = []

    def count(call: Call) -> None:
        if call.phase == "before" and call.verb == "read" and "/quarantine/" in call.key:
            reads.append(call.key)

    found = look(VersionLog(FaultStore(log.store, count), "taxi"), behind_seconds=900)
    assert (found.quarantined, len(reads)) == (50, NEWEST)


@memory
@pytest.mark.parametrize(("head", "listings"), [(49_999, 5), (3, 4), (7, 8), (10**8 + 9, 1)])
def test_many_rejected_shards_are_counted_in_parts_at_once_each_in_one_of_them(
    log: VersionLog, head: int, listings: int
) -> None:
    first = 0 if head < 10**8 else 10**8  # names of more digits sort in another way
    for number in range(MANY):
        name = f"{first + number * (head + 1 - first) // MANY:08d}-{number:032x}.json"
        log.store.write(f"taxi/quarantine/{name}", b"{}")  # the newest alone are read
    last = [
        quarantine(log, head + later, MANY + later) for later in (0, 1, 7)
    ]  # two of them since the head was looked up
    log.store.write("taxi/quarantine/what.json", b"of nobody")
    prefixes: list[str] = []

    def note(call: Call) -> None:
        if call.phase == "before" and call.verb == "list":
            prefixes.append(call.key)

    several = VersionLog(FaultStore(log.store, note, concurrency=9), "taxi")
    found = rejected(several, head, datetime.now(UTC) - LATELY)
    assert (found.kept, found.lately) == (MANY + 4, MANY + 4)
    assert [shard.name for shard in found.newest[1:4]] == last[::-1]
    assert len(prefixes) == (1 if listings == 1 else 1 + listings + 1)


@memory
def test_a_damaged_reason_does_not_hide_the_rest(log: VersionLog) -> None:
    grow(log, 1)
    quarantine(log, 0, 1)
    log.store.write(f"taxi/quarantine/{quarantine(log, 0, 2)}.json", b"{}")
    found = look(log, behind_seconds=900)
    assert "is no reason of a rejection" in found.rejected[0].reason
    assert (found.rejected[1].reason, found.quarantined) == ("no rows", 2)


@memory
def test_what_was_rejected_long_ago_is_no_problem(log: VersionLog) -> None:
    grow(log, 1)
    quarantine(log, 0, 1)
    old = Older(log.store, lambda call: None)
    for _ in range(24):
        old = Older(old, lambda call: None)
    found = look(VersionLog(old, "taxi"), behind_seconds=900)
    assert (found.quarantined, found.rejected_lately, found.problems) == (1, 0, [])


@memory
@pytest.mark.parametrize(("refusals", "expected"), [(2, []), (3, ["refused"])])
def test_versions_refused_in_a_row(log: VersionLog, refusals: int, expected: list[str]) -> None:
    gate = Gate(
        champion=0, moves=0, metric="mae", decision="refused", tolerance=0.05, refusals=refusals,
        recent=Compared(rows=10, learner=2.0, champion=1.0),
    )  # fmt: skip
    append(log, grow(log, 1), gate=gate)
    found = look(log, behind_seconds=900)
    assert names(found) == expected
    for problem in found.problems:
        assert "mae 2 against 1" in problem.what
        assert f"tidemill rollback {log.store.url} taxi 0" in problem.remedy


def carrying(log: VersionLog, inbox: Inbox) -> Version:
    """A head that carries on the debt for `a.parquet` of the version before it."""
    inbox.store.write("a.parquet", parquet(1))
    debt = owe(inbox, "a.parquet", "delete")
    first = append(log, grow(log, 1), consumed=(consumed(inbox, "a.parquet"),), owed=(debt,))
    return append(log, first, owed=(debt,))


def test_debts_that_could_not_be_paid(log: VersionLog, inbox: Inbox) -> None:
    carrying(log, inbox)
    problem = only(look(log, inbox, behind_seconds=900))
    assert problem.name == "owed"
    assert f"1 consumed shard could not be removed, such as {inbox.url}/a.parquet" in problem.what
    inbox.store.delete("a.parquet")
    assert look(log, inbox, behind_seconds=900).problems == []


@memory
def test_debts_of_an_inbox_that_cannot_be_looked_into_may_be_there(log: VersionLog, inbox: Inbox) -> None:
    carrying(log, inbox)

    def denied(url: str) -> Store:
        return FaultStore(open_store(url), fails("stat", PermissionDenied("no")))

    assert names(look(log, behind_seconds=900, stores=denied)) == ["owed"]


@memory
def test_debts_of_the_heads_own_shards_are_being_paid(log: VersionLog, inbox: Inbox) -> None:
    """As a run leaves it that is killed just after its commit: the next one pays."""
    inbox.store.write("a.parquet", parquet(1))
    shard, debt = consumed(inbox, "a.parquet"), owe(inbox, "a.parquet", "delete")
    append(log, grow(log, 1), consumed=(shard,), owed=(debt,))
    assert look(log, inbox, behind_seconds=900).problems == []


def test_an_alias_of_a_version_whose_blobs_are_gone(log: VersionLog) -> None:
    head = grow(log, 3)
    promote(log, "champion", log.version(0))
    log.store.delete(log.version(0).manifest.blobs.weights.key)
    problem = only(look(log, behind_seconds=900))
    assert problem.name == "retired"
    assert problem.what == "alias champion is version 0, whose weights or state are gone"
    assert "VERSION --alias champion" in problem.remedy
    promote(log, "champion", head)
    assert look(log, behind_seconds=900).problems == []
    log.store.write("taxi/aliases/champion.json", json.dumps({"version": 9, "moves": 1}).encode())
    found = look(log, behind_seconds=900)
    assert "alias champion is version 9, which does not exist" in [problem.what for problem in found.problems]


@memory
def test_a_head_whose_blobs_are_gone(log: VersionLog) -> None:
    head = grow(log, 1)
    log.store.delete(head.manifest.blobs.state.key)
    problem = only(look(log, behind_seconds=900))
    assert (problem.name, problem.what) == ("retired", "the head is version 0, whose weights or state are gone")
    assert "tidemill rollback" in problem.remedy


@pytest.mark.parametrize("make_url", ["local"], indirect=True)
def test_objects_that_can_be_no_shards(log: VersionLog, inbox: Inbox, tmp_path: Any) -> None:
    grow(log, 1)
    (tmp_path / "inbox" / "link.parquet").symlink_to(tmp_path / "nowhere")
    found = look(log, inbox, behind_seconds=900)
    problem = only(found)
    assert (problem.name, list(found.passed_over or {})) == ("passed_over", ["link.parquet"])
    assert "such as link.parquet (a symbolic link that leads nowhere)" in problem.what


@memory
def test_versions_that_are_lost(log: VersionLog) -> None:
    grow(log, 2)
    quarantine(log, 7, 1)  # of a version that rejected a shard
    found = look(log, behind_seconds=900)
    assert names(found) == ["rejected", "lost"]
    assert "but there were more" in found.problems[1].what
    assert found.problems[1].remedy.startswith("restore the manifests")


@memory
def test_a_registry_that_ignores_put_if_absent(log: VersionLog) -> None:
    class Ignores(FaultStore):
        def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
            return self.write(key, data, mode=mode)

    grow(log, 1)
    problem = only(look(VersionLog(Ignores(log.store, lambda call: None), "taxi"), behind_seconds=900, ask_store=True))
    assert problem.name == "store"
    assert "ignores put-if-absent" in problem.what
    assert problem.remedy.startswith("Use ")


@memory
def test_a_registry_that_may_not_be_written_to_is_not_asked(log: VersionLog) -> None:
    grow(log, 1)
    store = FaultStore(log.store, fails("create", PermissionDenied("no")))
    found = look(VersionLog(store, "taxi"), behind_seconds=900, ask_store=True)
    assert (found.problems, found.notes) == ([], []), "nothing is known of its deletes"


def test_to_look_changes_nothing(log: VersionLog, inbox: Inbox) -> None:
    carrying(log, inbox)
    quarantine(log, 1, 1)
    calls: list[str] = []

    def watch(call: Call) -> None:
        if call.verb not in ("list", "stat", "read", "mode"):
            calls.append(call.verb)

    look(VersionLog(FaultStore(log.store, watch), "taxi"), Inbox(FaultStore(inbox.store, watch)), behind_seconds=900)
    assert calls == []


@memory
def test_a_log_that_cannot_be_read_is_an_error(log: VersionLog) -> None:
    grow(log, 2)
    log.store.write("taxi/log/00000001.json", b"{}")
    with pytest.raises(CorruptObject):
        look(log, behind_seconds=900)


def test_every_problem_is_made_somewhere_in_these_tests() -> None:
    """So that one that is new has its test."""
    from pathlib import Path
    from typing import get_args

    text = Path(__file__).read_text()
    assert [name for name in get_args(ProblemName) if f'"{name}"' not in text] == []

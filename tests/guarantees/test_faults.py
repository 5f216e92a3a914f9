"""Errors, lost answers, denials, producers and other runs at every storage call: the same bits, each shard once, none lost.

All in one process, by hooks around the stores. What a fault interrupts is called again: the task alone, with what the run has
in memory, as Prefect does; or a new run, as a schedule does. The calls of all stores of a run are numbered together.

    the run           step ──► store.verb(key)
                                 │
    a hook, before    call k ────┤  error: not applied          denied          a producer or another run acts here
                                 ▼
    the real store             applied, or not
                                 │
    a hook, after     call k ────┤  error: the answer is lost   the verb meets what its own first request did
                                 ▼
    again             the task, or a new run ──► to the end ──► audit: same bits, each shard once, none lost
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tests.guarantees.audit import audit
from tests.guarantees.children import (
    BATCH,
    DATASET,
    ONLINE,
    REJECTED,
    SHARDS,
    SPEC,
    Caller,
    MakeUrl,
    OnlyConsumed,
    Stores,
    T,
    at_once,
    bits,
    collect_garbage,
    copy,
    drain,
    fill,
    rollback,
    sample,
    table,
    train,
    waiting,
)
from tests.storage.faults import MEETS_ITSELF, Call, Deny, Hook, act_at, fail_at, hooked, meet_itself_at, together
from tidemill.storage.aliases import all_aliases
from tidemill.storage.errors import Unavailable
from tidemill.storage.log import VersionLog
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.online.step import OnlineRun, Outcome, step

ALL = SHARDS | REJECTED
ONE_PASS = ONLINE.model_copy(update={"passes": 1})
MOVING = ONE_PASS.model_copy(update={"gate": ONE_PASS.gate.model_copy(update={"champion": "move", "tolerance": 10.0})})
SAMPLE = {"memory": 3, "local": 1, "s3": 1}
"""How many moments of each sweep CI takes, spread over the run. With --full it takes all."""


@pytest.fixture(params=SAMPLE)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """URLs of empty roots. In memory each is a bucket of its own: listing one looks at the objects of all of its bucket."""
    unique = uuid.uuid4().hex
    if backend == "memory":
        return lambda name: f"memory://{unique}-{name.replace('/', '-')}"
    if backend == "s3":
        request.getfixturevalue("s3_server")
        return lambda name: f"s3://tidemill-tests/{unique}/{name}"

    def folder(name: str) -> str:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    return folder


@dataclass(frozen=True)
class Clean:
    """URLs, in memory, of what no fault has touched."""

    base: str
    """A registry with version 0."""
    drained: str
    """The same after an online run."""


@pytest.fixture(scope="module")
def clean() -> Clean:
    url = f"memory://{uuid.uuid4().hex}-"
    fill(f"{url}dataset", DATASET)
    train(open_store, f"{url}dataset", f"{url}base", SPEC, BATCH)
    copy(f"{url}base", f"{url}drained")
    fill(f"{url}inbox", ALL)
    drain(open_store, f"{url}inbox", f"{url}drained", ONE_PASS)
    return Clean(f"{url}base", f"{url}drained")


def log_of(registry: str) -> VersionLog:
    return VersionLog(open_store(registry), "model")


# ---- moments ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Moment:
    """One run of a sweep, and the call at which something happens to it."""

    inbox: str
    registry: str
    call: Call | None
    """None for the first run, which is undisturbed and shows which calls there are."""
    seen: list[Call]

    def stores(self, fault: Callable[[Call], Hook], *watchers: Hook, concurrency: int | None = None) -> Stores:
        """Opens stores for the run, with the fault at its call."""
        hooks = [*watchers, self.seen.append]
        return hooked(together(*hooks, *([] if self.call is None else [fault(self.call)])), concurrency)


class Moments(Protocol):
    """First an undisturbed run, then one for each of its calls that fits; or for a sample, crucial ones first."""

    def __call__(self, fits: Callable[[Call], bool], crucial: Callable[[Call], bool] = ...) -> Iterator[Moment]: ...


@pytest.fixture
def moments(make_url: MakeUrl, backend: str, full: bool, record_property: Callable[[str, object], None]) -> Moments:
    def sweep(fits: Callable[[Call], bool], crucial: Callable[[Call], bool] = lambda call: False) -> Iterator[Moment]:
        def place(name: str, call: Call | None) -> Moment:
            return Moment(make_url(f"{name}/inbox"), make_url(f"{name}/registry"), call, [])

        yield (undisturbed := place("undisturbed", None))
        fitting = [call for call in undisturbed.seen if fits(call)]
        chosen = fitting
        if not full:
            chosen = sample([call for call in fitting if crucial(call)], SAMPLE[backend])
            chosen += sample([call for call in fitting if not crucial(call)], SAMPLE[backend] - len(chosen))
        assert chosen
        for number, call in enumerate(chosen):
            yield (moment := place(str(number), call))
            assert (call.name, call.phase) in {(c.name, c.phase) for c in moment.seen}, "it did not come to this call"
        record_property("moments", f"{len(chosen)} of {len(fitting)}")
        print(f"{len(chosen)} of {len(fitting)} moments")

    return sweep


# ---- the store fails at a call, once ---------------------------------------------------------------------------------
class Again:
    """Calls a second time what ended because the store was away."""

    def __init__(self) -> None:
        self._failed = False

    def __call__(self, task: Callable[[], T], /) -> T:
        try:
            return task()
        except Unavailable:
            assert not self._failed, "one fault, two failures"
            self._failed = True
            return task()


Driver = Callable[[Stores, Caller], None]


def retry_the_task(driver: Driver, stores: Stores) -> None:
    """As Prefect does: what the run holds in memory stays."""
    driver(stores, Again())


def start_again(driver: Driver, stores: Stores) -> None:
    """As a schedule does: a new run."""
    Again()(lambda: driver(stores, at_once))


def go_on(driver: Driver, stores: Stores) -> None:
    """Nobody but the verb has noticed."""
    driver(stores, at_once)


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a call, at which calls it can, and what is done about it."""

    hook: Callable[[Call], Hook]
    fits: Callable[[Call], bool]
    recover: Callable[[Driver, Stores], None]


def no_answer(call: Call) -> Hook:
    """An error before the call, or a lost answer after it: the caller cannot tell."""
    return fail_at(call.name, call.phase, Unavailable("no answer"))


FAULTS = {
    "retry the task": Fault(no_answer, lambda call: True, retry_the_task),
    "new run": Fault(no_answer, lambda call: True, start_again),
    "retry in the verb": Fault(
        lambda call: meet_itself_at(call.name), lambda c: c.phase == "after" and c.verb in MEETS_ITSELF, go_on
    ),
}


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    return FAULTS[request.param]


any_fault = pytest.mark.parametrize("fault", FAULTS, indirect=True)
a_command = pytest.mark.parametrize("fault", ["new run", "retry in the verb"], indirect=True)


@any_fault
def test_online_run(fault: Fault, moments: Moments, clean: Clean) -> None:
    """6 good shards and a bad one, 2 to a commit."""
    for m in moments(fault.fits):
        fill(m.inbox, ALL)
        copy(clean.base, m.registry)

        def run(stores: Stores, call: Caller, m: Moment = m) -> None:
            drain(stores, m.inbox, m.registry, MOVING, call)

        fault.recover(run, m.stores(fault.hook, OnlyConsumed(m.inbox, m.registry)))
        audit(log_of(m.registry), ALL.items())
        assert bits(log_of(m.registry)) == bits(log_of(clean.drained))
        assert waiting(m.inbox) == []
        log = log_of(m.registry)
        assert all_aliases(log) == {"champion": log.head().number}


@any_fault
def test_batch_run(fault: Fault, moments: Moments, clean: Clean, make_url: MakeUrl) -> None:
    """3 epochs with a checkpoint after each. However often it is called, it registers one version."""
    fill(make_url("dataset"), DATASET)

    def lasting(call: Call) -> bool:
        """A checkpoint, or the commit, that is there though nobody was told."""
        put = call.phase == "after" and call.verb in ("create", "write")
        return put and call.key.endswith(("/00000001.json", "/log/00000000.json"))

    for m in moments(fault.fits, crucial=lasting):

        def run(stores: Stores, call: Caller, m: Moment = m) -> None:
            train(stores, make_url("dataset"), m.registry, SPEC, BATCH, call)

        fault.recover(run, m.stores(fault.hook))
        log = log_of(m.registry)
        audit(log, [])
        assert bits(log) == bits(log_of(clean.base)), m.call
        assert (log.head().number, all_aliases(log)) == (0, {"champion": 0}), m.call


@a_command
def test_rollback(fault: Fault, moments: Moments, clean: Clean) -> None:
    """Repeated, it may append a second version with the same weights; the alias is where it was asked for."""
    wanted = log_of(clean.drained).version(1).manifest.blobs
    for m in moments(fault.fits):
        copy(clean.drained, m.registry)

        def run(stores: Stores, _: Caller, m: Moment = m) -> None:
            rollback(stores, m.registry, "1")

        fault.recover(run, m.stores(fault.hook))
        log = log_of(m.registry)
        audit(log, ALL.items())
        assert bits(log) == (wanted.weights.sha256, wanted.state.sha256)
        assert (log.head().manifest.rolled_back_to, all_aliases(log)) == (1, {"champion": 1})


@a_command
def test_garbage_collection(fault: Fault, moments: Moments, clean: Clean) -> None:
    """What is left are the blobs of the last two versions and of the aliased one, and of a number that may yet be committed."""
    for m in moments(fault.fits):
        copy(clean.drained, m.registry)
        log = log_of(m.registry)
        head = log.head().number
        log.write_blob(head, "safetensors", b"of an attempt that lost")
        coming = log.write_blob(head + 1, "safetensors", b"of an attempt that may still win")

        def run(stores: Stores, _: Caller, m: Moment = m) -> None:
            collect_garbage(stores, m.registry, 2)

        fault.recover(run, m.stores(fault.hook))
        audit(log, ALL.items())
        kept = [ref.key for number in (0, head - 1, head) for ref in log.version(number).manifest.blobs.refs]
        assert {info.key for info in log.store.list("model/blobs/")} == {*kept, coming.key}


def test_deletes_are_denied_and_later_allowed(make_url: MakeUrl, clean: Clean) -> None:
    """Meanwhile nothing is trained again, by the same run or by others; afterwards all is removed."""
    inbox, registry = make_url("inbox"), make_url("registry")
    fill(inbox, ALL)
    copy(clean.base, registry)
    deny = Deny(open_store(inbox).url, "delete")
    stores = hooked(together(deny, OnlyConsumed(inbox, registry)))
    run = OnlineRun(inbox, registry, "model", ONE_PASS, stores)
    while step(run).outcome is not Outcome.IDLE:
        pass
    assert step(run).outcome is Outcome.IDLE
    drain(stores, inbox, registry, ONE_PASS)
    assert waiting(inbox) == sorted(ALL)
    assert sorted(debt.key for debt in log_of(registry).head().manifest.owed) == sorted(ALL)
    assert bits(log_of(registry)) == bits(log_of(clean.drained))

    deny.denied = False
    drain(stores, inbox, registry, ONE_PASS)
    assert waiting(inbox) == []
    audit(log_of(registry), ALL.items())
    assert bits(log_of(registry)) == bits(log_of(clean.drained))


# ---- somebody else acts at a call ------------------------------------------------------------------------------------
# In the thread of the run, which meanwhile does nothing else: what is seen before and after a call is then certain, and no two
# trainings draw from torch's global generator at once.
def any_call(call: Call) -> bool:
    """The moment before a call is also the one after the call before."""
    return call.phase == "before"


@pytest.mark.parametrize(
    ("victim", "sent"),
    [("02.parquet", SHARDS["02.parquet"]), ("02.parquet", table(25, 99)), ("03b.parquet", table(25, 99))],
    ids=["the same bytes", "other bytes", "over the bad shard"],
)
def test_a_producer_overwrites_a_shard(victim: str, sent: bytes, moments: Moments, clean: Clean) -> None:
    """Before it is listed, between list and read, between read and delete, after the delete, and anywhere else.

    Other bytes are other data: they are consumed, and so are those before them if they had been read. The same bytes are
    consumed once, however often they come.
    """
    for m in moments(any_call, crucial=lambda call: call.key == victim):
        fill(m.inbox, ALL)
        copy(clean.base, m.registry)
        producer, read_before = open_store(m.inbox), []

        def overwrite(m: Moment = m, producer: Store = producer, read_before: list[Call] = read_before) -> None:
            read_before += [
                c for c in m.seen if (c.url, c.verb, c.key, c.phase) == (producer.url, "read", victim, "after")
            ]
            producer.write(victim, sent)

        only_consumed = OnlyConsumed(m.inbox, m.registry)
        stores = m.stores(lambda call: act_at(call.name, call.phase, overwrite), only_consumed, concurrency=1)
        drain(stores, m.inbox, m.registry, ONE_PASS)
        drain(hooked(only_consumed), m.inbox, m.registry, ONE_PASS)  # what came after the last listing
        put = {*ALL.items()} if m.call is None else {*ALL.items(), (victim, sent)}
        if m.call is not None and not read_before and sent != ALL[victim]:
            put.remove((victim, ALL[victim]))
        audit(log_of(m.registry), put)
        assert waiting(m.inbox) == []


@pytest.mark.parametrize(
    ("steps_before", "collects"), [(0, False), (1, True)], ids=["new", "with a memory, and garbage is collected"]
)
def test_another_run_makes_a_step(steps_before: int, collects: bool, moments: Moments, clean: Clean) -> None:
    """One of the two wins each version, the other drops its work and deletes nothing that is not committed."""
    for m in moments(any_call):
        fill(m.inbox, ALL)
        copy(clean.base, m.registry)
        watch = OnlyConsumed(m.inbox, m.registry)
        other = OnlineRun(m.inbox, m.registry, "model", ONE_PASS, hooked(watch))
        won = [step(other).version for _ in range(steps_before)]

        def act(m: Moment = m, other: OnlineRun = other, won: list[int | None] = won) -> None:
            won.append(step(other).version)
            if collects:
                collect_garbage(open_store, m.registry, 1)

        run = OnlineRun(
            m.inbox,
            m.registry,
            "model",
            ONE_PASS,
            m.stores(lambda call: act_at(call.name, call.phase, act), watch, concurrency=1),
        )
        for each in (run, other):
            while (made := step(each)).outcome is not Outcome.IDLE:
                won.append(made.version)
        log = log_of(m.registry)
        audit(log, ALL.items())
        assert sorted(version for version in won if version is not None) == list(range(1, log.head().number + 1))
        assert bits(log) == bits(log_of(clean.drained))
        assert waiting(m.inbox) == []

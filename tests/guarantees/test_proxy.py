"""A network that fails in every way, between Tidemill and a real S3 server: every verb keeps its promises, every run its bits."""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from botocore.client import BaseClient

from tests.conftest import BUCKET
from tests.guarantees.audit import audit
from tests.guarantees.children import Stores, bits, copy, drain, fill, sample, table, train, waiting
from tests.guarantees.proxy import Asked, Fault, FaultProxy, Plan
from tests.s3_server import S3, running_server
from tests.storage.faults import Call, FaultStore, Hook, Numbering, act_at, hooked
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    HeadMoved,
    NotFound,
    PreconditionFailed,
    StorageError,
    Unavailable,
)
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Entry
from tidemill.storage.probe import check_preconditions
from tidemill.storage.s3 import S3Store
from tidemill.storage.store import Promises, Store
from tidemill.storage.urls import open_store
from tidemill.tasks.online.step import OnlineRun, Outcome, step
from tidemill.tasks.settings import Archive, BatchSettings, OnlineSettings
from tidemill.tasks.training.spec import Spec

SPEC = Spec(
    features=("a", "b"),
    target="y",
    model={"factory": "linear"},  # type: ignore[arg-type]  # pydantic converts
    optimizer={"name": "adam"},  # type: ignore[arg-type]  # pydantic converts
    batch_size=16,
    epochs=1,
    seed=5,
)
SHARDS = {f"{i}.parquet": table(40 + i, 10 + i) for i in range(3)}
REJECTED = {"1b.parquet": b"PAR1" + b"not a parquet file" * 10 + b"PAR1"}
ONLINE = OnlineSettings(limits={"max_shards": 2}, grace_seconds=0)

APPLIED = {Fault.DROPPED, Fault.LATE}
"""The server does what was asked, though no answer comes."""
BROKEN = {Fault.TRUNCATED, Fault.SHORT, Fault.EMPTY, Fault.FLIPPED}
"""An answer comes, with another body."""


@pytest.fixture(scope="module")
def _proxy(s3_server: S3) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


@pytest.fixture
def proxy(_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """The proxy before the S3 server, without a plan; every client of the test goes through it."""
    yield _proxy
    _proxy.use()


@pytest.fixture
def place(proxy: FaultProxy) -> str:
    """URL of an empty prefix behind the proxy."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def impatient(url: str, fault: Fault | None = None, *, retry_seconds: float = 60.0) -> Store:
    """The S3 store at `url`, asked what it promises; if the fault is a stall (None: it may be), it is noticed early."""
    store = open_store(url)
    assert isinstance(store, S3Store)
    store.promises = Promises(compares_on_delete=True)
    store.retry_seconds = retry_seconds
    if fault in (None, Fault.STALLED, Fault.LATE):
        store.stall_seconds = 0.5
    return store


def contents(url: str) -> dict[str, bytes]:
    """All that is stored below `url`."""
    store = open_store(url)
    return {info.key: store.read(info.key) for info in store.list()}


def at(number: int, fault: Fault) -> Plan:
    """The fault happens to that request alone."""
    return lambda asked: fault if asked.number == number and fault in asked.possible else None


# ---- each fault, each verb -----------------------------------------------------------------------------------------------
OLD, NEW = b"old" * 100, b"new" * 100


@dataclass(frozen=True)
class Verb:
    """A call of a store that holds `a`, and what must come of it."""

    call: Callable[[Store, str], object]
    """With the store and the etag of `a`."""
    methods: tuple[str, ...]
    """Of the requests it makes when all goes well."""
    answer: object
    after: dict[str, bytes]
    after_lost_answer: type[StorageError] | None = None
    """What it may raise, though it was applied, when its answer was lost: so says `tidemill.storage.store`."""
    conditional: bool = False

    def asked(self, number: int) -> Asked:
        listing = self.methods[number] == "LIST"
        path = f"/{BUCKET}" if listing else f"/{BUCKET}/key"
        return Asked(number, "GET" if listing else self.methods[number], path, self.conditional)


VERBS = {
    "list": Verb(lambda s, _: [i.key for i in s.list()], ("LIST",), ["a"], {"a": OLD}),
    "stat": Verb(lambda s, _: s.stat("a").size, ("HEAD",), len(OLD), {"a": OLD}),
    "read": Verb(lambda s, etag: s.read("a", if_match=etag), ("GET",), OLD, {"a": OLD}),
    "read-range": Verb(
        lambda s, etag: s.read("a", if_match=etag, start=9, length=99), ("GET",), OLD[9:108], {"a": OLD}
    ),
    "write": Verb(lambda s, _: s.write("a", NEW).size, ("PUT",), len(NEW), {"a": NEW}),
    "create": Verb(
        lambda s, _: s.create("b", NEW).size, ("PUT",), len(NEW), {"a": OLD, "b": NEW}, AlreadyExists, conditional=True
    ),
    "replace": Verb(
        lambda s, etag: s.replace("a", NEW, if_match=etag).size,
        ("PUT",),
        len(NEW),
        {"a": NEW},
        PreconditionFailed,
        conditional=True,
    ),
    "delete": Verb(lambda s, _: s.delete("a"), ("HEAD", "DELETE"), None, {}),
    "delete-if-match": Verb(
        lambda s, etag: s.delete("a", if_match=etag), ("DELETE",), None, {}, NotFound, conditional=True
    ),
}
FAULTS_OF_VERBS = [
    pytest.param(VERBS[name], number, fault, id=f"{name}-{number}-{fault.name}")
    for name, verb in VERBS.items()
    for number in range(len(verb.methods))
    for fault in verb.asked(number).possible
    if (name, fault) != ("read-range", Fault.FLIPPED)  # no checksum of S3's covers a range: those of Parquet pages do
]


@pytest.mark.parametrize(("verb", "number", "fault"), FAULTS_OF_VERBS)
def test_a_fault_that_goes_away(verb: Verb, number: int, fault: Fault, proxy: FaultProxy, place: str) -> None:
    """The verb does what it promises, and asks again once."""
    store = impatient(place, fault)
    etag = open_store(place).write("a", OLD).etag
    proxy.use(at(number, fault))

    answer: object
    try:
        answer = verb.call(store, etag)
    except (AlreadyExists, PreconditionFailed, NotFound) as lost:
        answer = type(lost)

    asked = proxy.asked
    assert asked[number][1] is fault
    assert answer == verb.answer or (fault in APPLIED and answer is verb.after_lost_answer)
    # Once more after the fault; where an answer was lost, a delete also asks what is there, and if there is a bucket
    assert len(asked) - len(verb.methods) in ({0} if fault is Fault.SLOW else {1, 2, 3} if fault in APPLIED else {1})
    proxy.use()
    assert contents(place) == verb.after


@pytest.mark.parametrize(
    ("verb", "number", "fault"), [case for case in FAULTS_OF_VERBS if case.values[2] is not Fault.SLOW]
)
def test_a_fault_that_stays(verb: Verb, number: int, fault: Fault, proxy: FaultProxy, place: str) -> None:
    """The verb says so, when its time is over and not long after; what was never applied has changed nothing."""
    store = impatient(place, fault, retry_seconds=0.1)
    etag = open_store(place).write("a", OLD).etag
    proxy.use(lambda asked: fault if asked.number >= number and fault in asked.possible else None)

    errors = (CorruptObject, Unavailable) if fault in BROKEN else Unavailable
    started = time.monotonic()
    with pytest.raises(errors, match=r"at http://127\.0\.0\.1:\d+ failed for \d+ s: "):
        verb.call(store, etag)

    assert time.monotonic() - started < 5
    assert 1 <= len(proxy.asked) - number <= 30
    proxy.use()
    applied = fault in APPLIED and number == len(verb.methods) - 1
    assert contents(place) == (verb.after if applied else {"a": OLD})


CONDITIONAL = [name for name, verb in VERBS.items() if verb.conditional]
NOT_APPLIED = [Fault.RESET, Fault.STALLED, Fault.ERROR_500, Fault.ERROR_503, Fault.ERROR_409]


@pytest.mark.parametrize("fault", [Fault.ERROR_409, Fault.RESET])
@pytest.mark.parametrize("name", CONDITIONAL)
def test_another_writer_between_a_fault_and_the_next_attempt(
    name: str, fault: Fault, proxy: FaultProxy, place: str, s3_client: BaseClient
) -> None:
    """The attempt that is answered decides: the verb has lost, and the other writer's bytes stay."""
    store = impatient(place, fault)
    etag = store.write("a", OLD).etag
    key = "b" if name == "create" else "a"
    proxy.use(meanwhile(fault, lambda: put(s3_client, place, key, b"another's")))

    with pytest.raises(AlreadyExists if name == "create" else PreconditionFailed):
        VERBS[name].call(store, etag)

    proxy.use()
    assert contents(place) == {"a": OLD, key: b"another's"}


def put(client: BaseClient, place: str, key: str, data: bytes) -> None:
    """Put an object past the proxy."""
    client.put_object(Bucket=BUCKET, Key=f"{place.removeprefix(f's3://{BUCKET}/')}/{key}", Body=data)


def meanwhile(fault: Fault, act: Callable[[], object]) -> Plan:
    """The fault happens to the first conditional request, and `act` before the client knows."""
    done = False

    def plan(asked: Asked) -> Fault | None:
        nonlocal done
        if done or not asked.conditional or asked.method == "GET":
            return None
        done = True
        act()
        return fault

    return plan


@pytest.mark.parametrize("fault", [*NOT_APPLIED, *sorted(APPLIED, key=lambda fault: fault.name)])
def test_the_probe_takes_no_fault_for_an_answer(fault: Fault, proxy: FaultProxy, place: str) -> None:
    """Every other request of the probe fails; what the store promises is found out all the same."""
    undisturbed = impatient(f"{place}/undisturbed")
    check_preconditions(undisturbed)
    store = impatient(place, fault)
    proxy.use(lambda asked: fault if asked.number % 2 == 0 and fault in asked.possible else None)

    check_preconditions(store)

    assert store.promises == undisturbed.promises
    assert fault in [happened for _, happened in proxy.asked]
    proxy.use()
    assert contents(place) == {}


# ---- commits -------------------------------------------------------------------------------------------------------------
def first_version(log: VersionLog) -> Entry:
    """A batch version as a run would register it; its blobs are stored."""
    blobs = Blobs(weights=log.write_blob(0, "safetensors", b"w"), state=log.write_blob(0, "state.safetensors", b"s"))
    return Entry(kind="batch", spec={}, blobs=blobs)


@pytest.mark.parametrize("fault", [*NOT_APPLIED, Fault.DROPPED, Fault.LATE, Fault.SLOW])
def test_a_commit_resolves_its_own_lost_answer(fault: Fault, proxy: FaultProxy, place: str) -> None:
    """Whatever happens to the one PUT that decides, the run learns that it has won."""
    log = VersionLog(impatient(place, fault), "model")
    entry = first_version(log)
    proxy.use(meanwhile(fault, lambda: None))

    version = log.commit(None, entry)

    assert [happened for _, happened in proxy.asked].count(fault) == 1
    proxy.use()
    assert log.head() == version


@pytest.mark.parametrize("fault", NOT_APPLIED)
def test_a_commit_that_another_run_overtakes_during_a_fault(
    fault: Fault, proxy: FaultProxy, place: str, s3_client: BaseClient
) -> None:
    """The other run's manifest comes between two attempts: the commit has lost, and says so."""
    elsewhere = VersionLog(open_store(f"{place}-other"), "model")
    other = elsewhere.commit(None, first_version(elsewhere))
    key = "model/log/00000000.json"
    data = elsewhere.store.read(key)
    log = VersionLog(impatient(place, fault), "model")
    entry = first_version(log)
    proxy.use(meanwhile(fault, lambda: put(s3_client, place, key, data)))

    with pytest.raises(HeadMoved):
        log.commit(None, entry)

    proxy.use()
    assert log.head() == other


# ---- whole runs ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Undisturbed:
    registry: str
    """URL of a registry with version 0 alone, without the checkpoints of its run."""
    bits: tuple[str, str]
    """Of the head, once a run that nothing disturbs has drained the inbox."""
    calls: int
    """Of the stores, in that run."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """On local folders: the bits do not depend on the store."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    dataset, registry, inbox, after = (str(folder / name) for name in ("dataset", "registry", "inbox", "after"))
    fill(dataset, {"part.parquet": table(100, 1)})
    train(open_store, dataset, registry, SPEC, BatchSettings(holdout=0.2))
    store = open_store(registry)
    for info in store.list("model/runs/"):
        store.delete(info.key)
    copy(registry, after)
    fill(inbox, SHARDS | REJECTED)
    calls: list[Call] = []
    drain(hooked(calls.append), inbox, after, ONLINE)
    log = VersionLog(open_store(after), "model")
    audit(log, (SHARDS | REJECTED).items())
    return Undisturbed(registry, bits(log), 1 + max(call.index for call in calls))


def prepare(place: str, base: Undisturbed) -> tuple[str, str]:
    """(inbox, registry) below `place`: all shards, and version 0."""
    inbox, registry = f"{place}/inbox", f"{place}/registry"
    copy(base.registry, registry)
    fill(inbox, SHARDS | REJECTED)
    return inbox, registry


def persevere(inbox: str, registry: str, stores: Stores, settings: OnlineSettings = ONLINE) -> list[StorageError]:
    """Drain the inbox; after an error take the next step, or begin anew, in turns. Returns the errors.

    An error is one by which a verb gives up: its store did not answer, or with broken bodies only, for `retry_seconds`.
    """
    errors: list[StorageError] = []
    run: OnlineRun | None = None
    while True:
        try:
            run = run or OnlineRun(inbox, registry, "model", settings, stores)
            while step(run).outcome is not Outcome.IDLE:
                pass
        except (Unavailable, CorruptObject) as error:
            errors.append(error)
            assert len(errors) < 1000, errors[-3:]
            if len(errors) % 2:
                run = None
        else:
            return errors


def check(inbox: str, registry: str, base: Undisturbed) -> None:
    """Everything is as if nothing had happened."""
    log = VersionLog(open_store(registry), "model")
    audit(log, (SHARDS | REJECTED).items())
    assert bits(log) == base.bits
    assert waiting(inbox) == []
    kept = [log.store.read(info.key) for info in log.store.list("model/quarantine/") if not info.key.endswith(".json")]
    assert kept == list(REJECTED.values())


def mixed(seed: int) -> Plan:
    """One request in six meets a fault; whether and which follows from the seed and the request's number."""

    def plan(asked: Asked) -> Fault | None:
        draw = Random(f"{seed}/{asked.number}")
        return draw.choice(asked.possible) if draw.random() < 1 / 6 else None

    return plan


@pytest.mark.timeout(1800)  # of --full
def test_a_run_through_a_mix_of_faults(
    full: bool, proxy: FaultProxy, place: str, undisturbed: Undisturbed, record_property: Callable[[str, object], None]
) -> None:
    """Verbs give up early here, so that steps and whole runs are begun again too. Every other server keeps no checksums."""
    seeds = 120 if full else 2
    happened: Counter[Fault] = Counter()
    errors = requests = 0
    for seed in range(seeds):
        inbox, registry = prepare(f"{place}/{seed}", undisturbed)
        proxy.use(mixed(seed), checksums=seed % 2 == 0)
        errors += len(persevere(inbox, registry, lambda url: impatient(url, retry_seconds=0.2)))
        happened.update(fault for _, fault in proxy.asked if fault is not None)
        requests += len(proxy.asked)
        proxy.use()
        check(inbox, registry, undisturbed)
    figures = {"seeds": seeds, "requests": requests, "faults": happened.total(), "begun again": errors}
    for name, figure in figures.items():
        record_property(name, figure)
    print(figures, {fault.name: count for fault, count in happened.items()})
    assert errors
    if full:
        assert set(happened) == set(Fault)


@pytest.mark.parametrize(
    ("fault", "checksums"),
    [
        (Fault.TRUNCATED, True),
        (Fault.FLIPPED, True),
        (Fault.FLIPPED, False),
        (Fault.SHORT, False),
        (Fault.EMPTY, False),
    ],
)
def test_a_broken_body_is_never_taken_for_the_object(
    fault: Fault, checksums: bool, proxy: FaultProxy, place: str, undisturbed: Undisturbed
) -> None:
    """Every other body of each object is broken, the first one too: shards on their way into training and into the archive,
    manifests, blobs. The run reads again; nobody has to begin anew.
    """
    inbox, registry = prepare(place, undisturbed)
    settings = ONLINE.model_copy(update={"after_commit": Archive(archive_to=f"{place}/archive")})
    bodies: Counter[str] = Counter()

    def plan(asked: Asked) -> Fault | None:
        if Fault.FLIPPED not in asked.possible:  # no body of an object
            return None
        bodies[asked.path] += 1
        return fault if bodies[asked.path] % 2 else None

    proxy.use(plan, checksums=checksums)
    errors = persevere(inbox, registry, lambda url: impatient(url, fault), settings)

    assert len(bodies) > len(SHARDS) + 4  # a manifest, the hint, the weights, the state at least
    assert errors == []
    proxy.use()
    check(inbox, registry, undisturbed)
    assert contents(f"{place}/archive") == SHARDS


@pytest.mark.timeout(900)  # of --full
def test_a_server_that_is_killed_and_restarted_in_the_middle_of_a_run(
    full: bool,
    tmp_path: Path,
    undisturbed: Undisturbed,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL before a call of a store. Either the verbs wait for its return, or they give up and the run is begun again."""
    begun_again = 0
    moments = sample(range(undisturbed.calls), 12 if full else 2)
    # A server ends with the thread that has started it, and a call of a store may be made in a thread that soon ends.
    with running_server(tmp_path) as server, ThreadPoolExecutor(1) as keeper:
        for name, value in server.s3.environment().items():
            monkeypatch.setenv(name, value)

        def restart() -> None:
            server.kill()
            keeper.submit(server.start, wait=False).result()

        for number, moment in enumerate(moments):
            inbox, registry = prepare(f"s3://ready/{moment}", undisturbed)
            patience = 90.0 if number % 2 else 0.3
            stores = stores_with(act_at(moment, "before", restart), patience)
            errors = persevere(inbox, registry, stores)
            assert bool(errors) == (number % 2 == 0)
            begun_again += len(errors)
            server.wait_until_ready()
            check(inbox, registry, undisturbed)
    figures = {"restarts": len(moments), "begun again": begun_again}
    for name, figure in figures.items():
        record_property(name, figure)
    print(figures)


def stores_with(hook: Hook, retry_seconds: float) -> Stores:
    """Opens S3 stores with one numbering of their calls, that retry for so long."""
    numbering = Numbering()

    def opened(url: str) -> Store:
        store = open_store(url)
        assert isinstance(store, S3Store)
        store.retry_seconds = retry_seconds
        return FaultStore(store, hook, numbering)

    return opened

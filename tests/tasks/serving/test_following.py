"""A predictor that follows its alias: swapped without an error or a mixture, and kept whatever becomes of the store."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tidemill
from tests.data import SPEC, put, rows
from tests.storage.faults import Call, hooked
from tidemill.storage.aliases import promote
from tidemill.storage.errors import Unavailable, UnknownAlias
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.retention import collect_garbage
from tidemill.tasks import batch
from tidemill.tasks.serving.following import Following
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.slow

MakeUrl = Callable[[str], str]
EVERY = 0.002
ASKED: list[dict[str, Any]] = rows(5, 3).select(["a", "b"]).to_pylist()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.001)


class World:
    """A model with several versions, its champion the first one, and what each of them answers."""

    def __init__(self, url: MakeUrl, versions: int) -> None:
        self.url = url
        put(url("dataset"), {"a.parquet": rows(60, 0)})
        for seed in range(versions):
            spec = Spec.model_validate(SPEC.model_dump() | {"seed": seed, "epochs": 1})
            batch.train(url("dataset"), url("registry"), "model", spec, BatchSettings(holdout=0))
        self.log: VersionLog = open_log(url("registry"), "model")
        self.promote(0)
        self.answers = [tidemill.load(url("registry"), "model", str(n)).predict(ASKED) for n in range(versions)]
        assert len({str(answer) for answer in self.answers}) == versions

    def promote(self, number: int) -> None:
        promote(self.log, "champion", self.log.version(number))

    def follow(self, hook: Callable[[Call], None] = lambda call: None) -> Following:
        return tidemill.load(self.url("registry"), "model", follow=EVERY, stores=hooked(hook))

    def damage(self, number: int) -> None:
        key = self.log.version(number).manifest.blobs.weights.key
        data = bytearray(self.log.store.read(key))
        data[-1] ^= 1
        self.log.store.write(key, bytes(data))


class Looks:
    """A hook: counts what is read, and fails the looks at the alias while it is told to."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failing = False

    def __call__(self, call: Call) -> None:
        if call.phase == "before":
            self.counts["alias" if "aliases/" in call.key else "blob" if "blobs/" in call.key else "other"] += 1
            if self.failing and "aliases/" in call.key:
                raise Unavailable(f"away at look {self.counts['alias']}")

    def more(self, looks: int = 5) -> None:
        """Wait until the alias was looked at some times more, the last of them answered."""
        until(lambda goal=self.counts["alias"] + looks + 1: self.counts["alias"] >= goal)  # type: ignore[misc]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("tidemill-follow")])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- swaps -----------------------------------------------------------------------------------------------------------
def test_threads_that_ask_without_pause_get_whole_answers_of_ever_newer_versions(make_url: MakeUrl) -> None:
    """Each answer has the numbers of the version that it names, and none is of an older one than the answer before."""
    world = World(make_url, 8)
    with world.follow() as following:
        stop = threading.Event()
        wrong: list[object] = []
        seen: list[set[int]] = [set() for _ in range(4)]

        def ask(mine: set[int]) -> None:
            last = 0
            while not stop.is_set():
                now = following.now
                try:
                    answer = now.predict(ASKED)
                except Exception as error:  # noqa: BLE001  # any of them is one too many
                    wrong.append(error)
                    return
                number = now.version.number
                if answer != world.answers[number] or number < last:
                    wrong.append((number, last, answer))
                last = number
                mine.add(number)

        threads = [threading.Thread(target=ask, args=(mine,)) for mine in seen]
        for thread in threads:
            thread.start()
        for number in range(1, 8):
            world.promote(number)
            until(lambda number=number: all(number in mine for mine in seen))  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert all(mine >= set(range(1, 8)) for mine in seen)


def test_a_request_goes_on_with_the_version_that_it_began_with(memory_url: MakeUrl) -> None:
    world = World(memory_url, 2)
    with world.follow() as following:
        begun = following.now
        world.promote(1)
        until(lambda: following.now.version.number == 1)
        assert begun.predict(ASKED) == world.answers[0]
        assert following.now.predict(ASKED) == world.answers[1]


def test_it_goes_back_when_the_alias_does(memory_url: MakeUrl) -> None:
    world = World(memory_url, 2)
    world.promote(1)
    with world.follow() as following:
        assert following.now.version.number == 1
        world.promote(0)
        until(lambda: following.now.version.number == 0)
        assert following.now.predict(ASKED) == world.answers[0]


def test_a_look_costs_one_small_request_and_loads_nothing_anew(memory_url: MakeUrl) -> None:
    world, looks = World(memory_url, 1), Looks()
    with world.follow(looks) as following:
        looks.more(2)  # the first look makes sure that the version is the one of the alias
        first, before = following.now, Counter(looks.counts)
        looks.more(20)
        assert looks.counts["blob"] == before["blob"]
        assert looks.counts["other"] == before["other"]
        assert following.now is first


def test_the_version_that_is_served_may_be_collected(memory_url: MakeUrl) -> None:
    world, looks = World(memory_url, 3), Looks()
    with world.follow(looks) as following:
        looks.more(1)
        looks.failing = True
        looks.more(1)
        world.promote(2)
        assert collect_garbage(world.log, keep=1)
        assert following.now.predict(ASKED) == world.answers[0]
        looks.failing = False
        until(lambda: following.now.version.number == 2)


# ---- what goes wrong -------------------------------------------------------------------------------------------------
def test_a_store_that_is_away_is_told_of_once_and_the_old_version_serves_on(
    memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    world, looks = World(memory_url, 2), Looks()
    with world.follow(looks) as following:
        for outage in (1, 2, 3):
            looks.failing = True
            looks.more()
            assert following.now.predict(ASKED) == world.answers[0]
            assert len(warnings_of(caplog)) == outage
            looks.failing = False
            looks.more(2)
        assert "champion cannot be followed; version 0 goes on serving: Unavailable: away" in warnings_of(caplog)[0]
        world.promote(1)
        until(lambda: following.now.version.number == 1)
    assert len(warnings_of(caplog)) == 3


def test_a_damaged_version_is_told_of_once_not_read_all_the_time_and_the_next_one_is_taken(
    memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    world, looks = World(memory_url, 3), Looks()
    world.damage(1)
    tidemill.load(world.url("registry"), "model", "0")
    with world.follow(looks) as following:
        world.promote(1)
        until(lambda: bool(warnings_of(caplog)))
        read = looks.counts["blob"]
        looks.more(20)
        assert looks.counts["blob"] == read
        assert following.now.predict(ASKED) == world.answers[0]
        [said] = warnings_of(caplog)
        assert "champion cannot be followed to version 1; version 0 goes on serving: CorruptObject" in said
        world.promote(2)
        until(lambda: following.now.version.number == 2)
    assert len(warnings_of(caplog)) == 1


def test_an_alias_that_is_gone_keeps_its_last_version(memory_url: MakeUrl, caplog: pytest.LogCaptureFixture) -> None:
    world, looks = World(memory_url, 2), Looks()
    with world.follow(looks) as following:
        world.log.store.delete("model/aliases/champion.json")
        looks.more()
        assert following.now.predict(ASKED) == world.answers[0]
        [said] = warnings_of(caplog)
        assert "has no alias 'champion' any more" in said
        world.promote(1)
        until(lambda: following.now.version.number == 1)


def test_a_registry_that_is_begun_anew_is_noticed_though_its_alias_reads_the_same(memory_url: MakeUrl) -> None:
    world, looks = World(memory_url, 1), Looks()
    with world.follow(looks) as following:
        looks.more(2)
        alias = world.log.store.read("model/aliases/champion.json")
        for info in list(world.log.store.list()):
            world.log.store.delete(info.key)
        spec = Spec.model_validate(SPEC.model_dump() | {"seed": 7, "epochs": 1})
        batch.train(world.url("dataset"), world.url("registry"), "model", spec, BatchSettings(holdout=0))
        assert world.log.store.read("model/aliases/champion.json") == alias
        until(lambda: following.now.version.sha256 == open_log(world.url("registry"), "model").head().sha256)
        assert following.now.predict(ASKED) != world.answers[0]


def test_a_version_that_is_collected_while_it_is_loaded_is_passed_over_for_the_next(
    memory_url: MakeUrl, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(memory_url, 3)
    done = threading.Event()

    def overtake(call: Call) -> None:
        first = world.log.version(1).manifest.blobs.weights.key
        if (call.verb, call.phase, call.key) == ("stat", "before", first) and not done.is_set():
            done.set()
            world.promote(2)
            collect_garbage(world.log, keep=1)

    with world.follow(overtake) as following:
        world.promote(1)
        until(lambda: following.now.version.number == 2)
        assert done.is_set()
    assert warnings_of(caplog) == []


# ---- the end ---------------------------------------------------------------------------------------------------------
def test_after_close_nothing_is_swapped_and_the_predictor_can_be_used(memory_url: MakeUrl) -> None:
    world, loading, going_on = World(memory_url, 2), threading.Event(), threading.Event()

    def wait(call: Call) -> None:
        if call.phase == "after" and call.key == world.log.version(1).manifest.blobs.state.key:
            loading.set()
            assert going_on.wait(30)

    following = world.follow(wait)
    world.promote(1)
    assert loading.wait(30)
    closing = threading.Thread(target=following.close)
    closing.start()
    until(lambda: following._closed.is_set())
    going_on.set()
    closing.join()
    until(lambda: not following._thread.is_alive())
    assert following.now.predict(ASKED) == world.answers[0]


@pytest.mark.parametrize("name", ["head", "0"])
def test_only_an_alias_can_be_followed(memory_url: MakeUrl, name: str) -> None:
    with pytest.raises(UnknownAlias, match=f"'{name}' is no alias, and cannot be followed"):
        tidemill.load(memory_url("registry"), "model", name, follow=1.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_there_is_time_between_two_looks(memory_url: MakeUrl, seconds: float) -> None:
    with pytest.raises(ValueError, match="give seconds between two looks"):
        tidemill.load(memory_url("registry"), "model", follow=seconds)

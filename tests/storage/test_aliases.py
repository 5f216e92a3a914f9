"""Aliases: what a name means, and how the champion moves without a lock."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from tests.storage.faults import Call, Counting, FaultStore, act_once
from tests.storage.histories import grow, keys
from tidemill.storage.aliases import Alias, aliased, all_aliases, find_alias, promote, resolve
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    UnknownAlias,
    UnknownVersion,
)
from tidemill.storage.log import VersionLog
from tidemill.storage.memory import MemoryStore
from tidemill.storage.retention import collect_garbage
from tidemill.storage.store import Store


@pytest.fixture
def log(store: Store) -> VersionLog:
    return VersionLog(store, "taxi")


@pytest.fixture
def memory() -> MemoryStore:
    """For what does not depend on the backend."""
    return MemoryStore(uuid.uuid4().hex)


def test_a_version_is_named_by_head_number_or_alias(log: VersionLog) -> None:
    head = grow(log, 3)
    promote(log, "champion", log.version(1))
    assert resolve(log, "head") == head
    assert resolve(log, "2") == resolve(log, "00002") == resolve(log, 2) == head
    assert resolve(log, "champion").number == 1


@pytest.mark.parametrize("name", ["3", "99999999", "123456789012345678901234567890"])
def test_a_number_that_does_not_exist_is_an_unknown_version(log: VersionLog, name: str) -> None:
    grow(log, 2)
    with pytest.raises(UnknownVersion, match=f"has no version {name}"):
        resolve(log, name)


@pytest.mark.parametrize("name", ["-1", "1.5", "latest", "", "../head", "a/b", "Champion "])
def test_any_other_name_is_an_unknown_alias(log: VersionLog, name: str) -> None:
    promote(log, "champion", grow(log, 2))
    with pytest.raises(UnknownAlias, match=r"there are: champion\).*tidemill promote"):
        resolve(log, name)


# ---- aliases -------------------------------------------------------------------------------------------------------------


def test_an_alias_moves(log: VersionLog) -> None:
    grow(log, 3)
    for number in (1, 2, 2, 0):
        promote(log, "champion", log.version(number))
        assert aliased(log, "champion").number == number
    promote(log, "candidate-2.b", log.version(2))
    assert all_aliases(log) == {"candidate-2.b": 2, "champion": 0}


@pytest.mark.parametrize("name", ["", "head", "7", "00", "a/b", "../x", ".x", "a b", "x" * 101, "ü", "x\n"])
def test_some_words_cannot_be_an_alias(log: VersionLog, name: str) -> None:
    head = grow(log, 1)
    before = keys(log.store)
    with pytest.raises(UnknownAlias, match="cannot be an alias"):
        promote(log, name, head)
    assert keys(log.store) == before


def test_racing_promoters_leave_one_of_their_versions(log: VersionLog) -> None:
    grow(log, 8)
    barrier = Barrier(8)

    def race(number: int) -> None:
        version = log.version(number)
        barrier.wait()
        promote(log, "champion", version)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(race, range(8)))
    assert aliased(log, "champion").number in range(8)
    assert all_aliases(log).keys() == {"champion"}


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_a_promotion_that_loses_the_swap_is_done_again(store: Store, verb: str) -> None:
    plain = VersionLog(store, "taxi")
    grow(plain, 3)
    if verb == "replace":
        promote(plain, "champion", plain.version(0))
    move = act_once(verb, "champion", "before", lambda: promote(plain, "champion", plain.version(1)))
    count = Counting()

    def hook(call: Call) -> None:
        count(call)
        move(call)

    promote(VersionLog(FaultStore(store, hook), "taxi"), "champion", plain.version(2))
    assert count.calls["create"] + count.calls["replace"] == 2  # the first was refused, not blindly applied
    assert aliased(plain, "champion").number == 2


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_a_promotion_whose_answer_was_lost_is_recognised(memory: MemoryStore, verb: str) -> None:
    plain = VersionLog(memory, "taxi")
    grow(plain, 3)
    if verb == "replace":
        promote(plain, "champion", plain.version(0))
    count = Counting()

    def hook(call: Call) -> None:
        count(call)
        if (call.verb, call.phase) == (verb, "after"):
            raise AlreadyExists("412")

    promote(VersionLog(FaultStore(memory, hook), "taxi"), "champion", plain.version(2))
    assert count.calls[verb] == 1
    assert aliased(plain, "champion").number == 2


def test_an_alias_deleted_while_it_moves_is_made_anew(memory: MemoryStore) -> None:
    plain = VersionLog(memory, "taxi")
    grow(plain, 2)
    promote(plain, "champion", plain.version(0))
    hook = act_once("replace", "champion", "before", lambda: memory.delete("taxi/aliases/champion.json"))
    promote(VersionLog(FaultStore(memory, hook), "taxi"), "champion", plain.version(1))
    assert aliased(plain, "champion").number == 1


def test_where_an_alias_stands_costs_one_request(memory: MemoryStore) -> None:
    plain, counting = VersionLog(memory, "taxi"), Counting()
    promote(plain, "champion", grow(plain, 1))
    assert find_alias(VersionLog(FaultStore(memory, counting), "taxi"), "champion") == Alias(0, 0)
    assert counting.calls == {"read": 1}


def test_an_alias_that_moves_while_it_is_looked_at_is_looked_at_again(memory: MemoryStore) -> None:
    plain = VersionLog(memory, "taxi")
    grow(plain, 3)
    promote(plain, "champion", plain.version(0))
    hook = act_once("stat", "champion", "after", lambda: promote(plain, "champion", plain.version(1)))
    promote(VersionLog(FaultStore(memory, hook), "taxi"), "champion", plain.version(2))
    assert find_alias(plain, "champion") == Alias(2, 2)


def test_an_alias_to_nowhere_is_named(log: VersionLog) -> None:
    grow(log, 1)
    log.store.write("taxi/aliases/champion.json", b'{"version": 7, "moves": 0}')
    with pytest.raises(UnknownAlias, match="'champion' names version 7, which does not exist"):
        resolve(log, "champion")


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"[]", b"null", b"\xff", b'{"version": "x"}', b'{"version": 1e999}', b"[" * 99_999]
)
def test_a_damaged_alias_is_corrupt(memory: MemoryStore, garbage: bytes) -> None:
    log = VersionLog(memory, "taxi")
    head = grow(log, 1)
    memory.write("taxi/aliases/champion.json", garbage)
    for use in (lambda: aliased(log, "champion"), lambda: all_aliases(log), lambda: promote(log, "champion", head)):
        with pytest.raises(CorruptObject, match=r"champion.json is no alias.*promote again"):
            use()


def test_other_objects_beside_the_aliases_are_no_aliases(memory: MemoryStore) -> None:
    log = VersionLog(memory, "taxi")
    promote(log, "champion", grow(log, 1))
    for name in ("README.txt", ".tmp.json", "a/b.json", "notes"):
        memory.write(f"taxi/aliases/{name}", b"x")
    assert all_aliases(log) == {"champion": 0}


def test_a_version_without_blobs_cannot_be_promoted(log: VersionLog) -> None:
    grow(log, 3)
    collect_garbage(log, keep=1)
    with pytest.raises(UnknownVersion, match="blobs of version 0 were removed"):
        promote(log, "champion", log.version(0))
    assert all_aliases(log) == {}

"""Whose turn it is, on a clock that jumps."""

import itertools
import logging

import pytest

from tests.tasks.tenants.turns import Clock, Looks, One
from tidemill.storage.errors import CorruptObject, Unavailable
from tidemill.tasks.online.step import Outcome
from tidemill.tasks.retrying import BACKOFF_SECONDS, RETRIES
from tidemill.tasks.stopping import Stop
from tidemill.tasks.tenants.rota import FAILED_MOST_SECONDS, IDLE_MOST, Member, Rota


class Until(Stop):
    """Stops at a moment of the clock that jumps."""

    def __init__(self, clock: Clock, ends: float) -> None:
        super().__init__()
        self._clock, self._end = clock, ends

    def __bool__(self) -> bool:
        return self._clock.now >= self._end


def drained(*members: One, learners: int = 8) -> tuple[list[str], Rota]:
    """What was done, in order, until all were done."""
    clock = Clock()
    rota = Rota(members, Looks(clock), drains=True, learners=learners, now=clock)
    rota.go(Stop())
    return members[0].events, rota


def turns(events: list[str]) -> str:
    return "".join(event.removeprefix("turn ") for event in events if event.startswith("turn "))


def test_members_take_turns_of_one_commit_each_however_much_one_of_them_has_to_do() -> None:
    events: list[str] = []
    done, _ = drained(One("a", 4, events), One("b", 1, events), One("c", 2, events))
    assert turns(done) == "abc" + "abc" + "ac" + "a" + "a"  # the last turn of each finds nothing


def test_no_more_learners_are_kept_than_the_bound_and_the_one_used_longest_ago_goes_first() -> None:
    events: list[str] = []
    members = [One(name, 2, events) for name in "abc"]
    kept: list[str] = []
    clock = Clock()

    def count(member: Member, outcome: Outcome) -> None:
        kept.append("".join(one.name for one in members if one.warm))

    Rota(members, Looks(clock), drains=True, learners=2, now=clock, after_turn=count).go(Stop())
    assert kept[:4] == ["ab", "bc", "ac", "ab"]  # who had the turn, and who has prepared for the next one
    assert max(map(len, kept)) == 2
    assert not any(one.warm for one in members)  # who is done keeps none


def test_a_learner_that_is_gone_is_not_read_again_to_find_that_nothing_is_left() -> None:
    events: list[str] = []
    done, _ = drained(*(One(name, 1, events) for name in "abc"), learners=1)
    assert turns(done) == "abc" + "c"  # c still had its learner
    done, _ = drained(*(One(name, 1, []) for name in "a"), learners=1)
    assert done == ["look a", "turn a", "turn a", "let go a"]


def test_whose_turns_come_next_prepare_before_the_turn_of_another_as_far_as_the_bound_leaves_room() -> None:
    done, _ = drained(*(One(name, 1, events) for name in "abcde" for events in [[]]), learners=1)
    assert not [event for event in done if "prepare" in event]
    for learners, prepared in ((2, "ab"), (3, "abc"), (9, "abcd")):
        events: list[str] = []
        drained(*(One(name, 1, events) for name in "abcde"), learners=learners)
        first = events.index("turn a")
        assert [event for event in events[:first] if "prepare" in event] == [f"prepare {name}" for name in prepared]
        assert turns(events)[:5] == "abcde"


def test_who_is_slow_to_prepare_is_overtaken_and_is_given_its_turn_then() -> None:
    clock, events = Clock(), list[str]()

    class Slow(One):
        def prepare(self) -> None:
            super().prepare()
            slow.append(self.name)

    slow: list[str] = []
    looks = Looks(clock, seconds=lambda place: 90.0 if slow and slow.pop() else 0.0)
    members = [Slow("s", 2, events), *(One(name, 3, events) for name in "bc")]
    Rota(members, looks, drains=True, learners=3, now=clock).go(Stop())
    assert turns(events) == "bcbcbcbc" + "sss"


def test_who_cannot_prepare_fails_alone_and_its_learner_is_given_up() -> None:
    events: list[str] = []
    done, rota = drained(One("a", 1, events, [CorruptObject("rotten")], at="prepare"), One("b", 1, events), learners=2)
    assert turns(done) == "bb"
    assert rota.failing == {"a": "rotten"}
    assert "let go a" in done


def test_the_end_waits_for_who_prepares_so_that_no_thread_ends_inside_of_torch() -> None:
    clock, stop = Clock(), Stop()

    class Signalled(One):
        def turn(self) -> Outcome:
            stop._ask(15, None)
            return super().turn()

    class Slow(One):
        def prepare(self) -> None:
            slow.append(self.name)

    slow: list[str] = []
    looks = Looks(clock, seconds=lambda place: 2.0 if slow and slow.pop() else 0.0)
    Rota([Signalled("a", 3, []), Slow("s", 3, [])], looks, drains=True, learners=2, now=clock).go(stop)
    assert (clock.now, looks.back()) == (2.0, [])


def test_what_went_wrong_with_who_prepares_at_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clock, stop = Clock(), Stop()

    class Signalled(One):
        def turn(self) -> Outcome:
            stop._ask(15, None)
            return super().turn()

    class Slow(One):
        def prepare(self) -> None:
            slow.append(self.name)
            super().prepare()

    slow: list[str] = []
    looks = Looks(clock, seconds=lambda place: 2.0 if slow and slow.pop() else 0.0)
    rotten = Slow("s", 3, [], [CorruptObject("rotten.")], at="prepare")
    rota = Rota([Signalled("a", 3, []), rotten], looks, drains=True, learners=2, now=clock)
    rota.go(stop)
    assert (rota.failing, rotten.told) == ({"s": "rotten."}, ["rotten."])
    assert "s failed: rotten. The run ends" in caplog.text


def test_who_has_nothing_to_do_is_looked_at_after_pauses_that_double_up_to_a_bound() -> None:
    clock, seen = Clock(), list[float]()

    class Idle(One):
        def look(self) -> bool:
            seen.append(clock.now)
            if clock.now >= 60:
                self.left = 1  # a shard has arrived
            return super().look()

    member = Idle("a", 0, [])
    rota = Rota([member], Looks(clock), drains=False, learners=1, now=clock)
    rota.go(Until(clock, 70.0))
    pauses = [after - before for before, after in itertools.pairwise(seen)]
    assert pauses[:8] == [1, 2, 4, 8, IDLE_MOST, IDLE_MOST, IDLE_MOST, IDLE_MOST]
    assert member.left == 0
    found = next(at for at in seen if at >= 60)
    assert seen[seen.index(found) + 1] - found == 1  # after a commit it begins anew


def test_a_failure_stops_nobody_else_and_is_tried_again_after_pauses_that_double(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, events = Clock(), list[str]()
    tried: list[float] = []

    class Poisoned(One):
        def turn(self) -> Outcome:
            tried.append(clock.now)
            return super().turn()

    poisoned = Poisoned("bad", 1, events, [CorruptObject("rotten")] * 9)
    other = One("good", 3, events)
    rota = Rota([poisoned, other], Looks(clock), drains=False, learners=2, now=clock)
    rota.go(Until(clock, 25.0))
    assert other.left == 0
    assert rota.failing == {"bad": "rotten"}
    assert poisoned.told == ["rotten"] * len(tried)
    rota.go(Until(clock, 10_000.0))
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    doubled = [min(BACKOFF_SECONDS * 2.0**i, FAILED_MOST_SECONDS) for i in range(8)]
    assert pauses[:8] == doubled
    assert poisoned.left == 0
    assert rota.failing == {}
    assert poisoned.told[-1] is None
    assert caplog.text.count("bad failed: rotten. The others go on") == 1  # said once
    assert "good" not in caplog.text.replace("others go on", "")


def test_a_look_may_fail_too_and_what_is_no_error_of_ours_is_told_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[str] = []
    done, rota = drained(One("a", 1, events, [ValueError("a bug")], at="look"), One("b", 1, events))
    assert turns(done) == "bb"
    assert rota.failing == {"a": "a bug"}
    assert "Traceback" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("times", [RETRIES, RETRIES + 1])
def test_a_drain_tries_a_store_that_is_away_again_and_gives_up_in_the_end(times: int) -> None:
    clock, events = Clock(), list[str]()
    away = One("a", 1, events, [Unavailable("away")] * times)
    rota = Rota([away, One("b", 2, events)], Looks(clock), drains=True, learners=2, now=clock)
    rota.go(Stop())
    assert turns(events)[:3] == "abb"
    assert (away.left, rota.failing) == ((0, {}) if times == RETRIES else (1, {"a": "away"}))
    assert clock.now == sum(BACKOFF_SECONDS * 2.0**i for i in range(RETRIES))


def test_a_drain_does_not_try_again_what_waiting_cannot_mend() -> None:
    events: list[str] = []
    done, rota = drained(One("a", 5, events, [CorruptObject("rotten")]), One("b", 1, events))
    assert turns(done) == "abb"
    assert rota.failing == {"a": "rotten"}


def test_code_of_a_model_that_would_end_the_program_ends_its_turn_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Exits(One):
        def turn(self) -> Outcome:
            super().turn()
            raise SystemExit(7)

    done, rota = drained(Exits("a", 5, events := list[str]()), One("b", 2, events))
    assert turns(done) == "abbb"
    assert rota.failing == {"a": "its code wants to end the program, with SystemExit: 7"}
    assert "raise SystemExit(7)" in caplog.text, "where that is"


def test_it_ends_between_two_turns() -> None:
    clock, events, stop = Clock(), list[str](), Stop()

    class Signalled(One):
        def turn(self) -> Outcome:
            stop._ask(15, None)
            return super().turn()

    Rota([Signalled("a", 3, events), One("b", 3, events)], Looks(clock), drains=True, learners=2, now=clock).go(stop)
    assert turns(events) == "a"


def test_a_slow_look_at_one_holds_up_no_turn_of_another() -> None:
    clock, events = Clock(), list[str]()
    looks = Looks(clock, seconds=lambda place: 90.0 if place.member.name == "slow" else 0.0)
    Rota([One("slow", 1, events), One("b", 3, events)], looks, drains=True, learners=2, now=clock).go(Stop())
    assert turns(events) == "bbbb" + "slowslow"

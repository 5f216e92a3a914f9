"""What is under way is told to whoever listens, and nobody who listens can fail a run."""

import logging
import threading
from collections.abc import Callable

import pytest

from tidemill.progress import NOBODY, Activity, current, each, happened, listening, under_way


class Recorder:
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, int | None, bool]] = []
        self.events: list[object] = []

    def on_activity(self, activity: Activity) -> None:
        self.heard.append((activity.what, activity.done, activity.total, activity.ended))

    def on_event(self, event: object) -> None:
        self.events.append(event)


def test_nobody_listens_by_default() -> None:
    with under_way("a pass", total=2) as activity:
        activity.advance(1)
        activity.expect(3)
        assert activity is NOBODY
        assert current() is NOBODY
    happened("something")
    assert (NOBODY.done, NOBODY.total) == (0, None)


def test_a_listener_hears_how_something_begins_goes_on_and_ends() -> None:
    recorder = Recorder()
    with listening(recorder), under_way("a pass", total=3) as activity:
        activity.advance(2, loss=lambda: 0.5)
        assert current() is activity
        assert activity.loss is not None
        assert activity.loss() == 0.5
        activity.expect(5)
        happened("something")
    assert recorder.heard == [
        ("a pass", 0, 3, False),
        ("a pass", 2, 3, False),
        ("a pass", 2, 5, False),
        ("a pass", 2, 5, True),
    ]
    assert recorder.events == ["something"]
    assert current() is NOBODY
    happened("something else")
    assert recorder.events == ["something"]


def test_what_fails_has_ended_too() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="no"), listening(recorder), under_way("a pass"):
        raise ValueError("no")
    assert recorder.heard[-1] == ("a pass", 0, None, True)


def test_the_innermost_activity_is_the_current_one() -> None:
    with listening(Recorder()), under_way("outer", unit="shards") as outer:
        with under_way("inner") as inner:
            assert current() is inner
        assert current() is outer


def test_items_one_after_the_other_are_an_activity() -> None:
    recorder = Recorder()
    with listening(recorder):
        assert list(each("audit", [7, 8], unit="versions")) == [7, 8]
    assert [(done, ended) for _, done, _, ended in recorder.heard] == [(0, False), (1, False), (2, False), (2, True)]


@pytest.mark.parametrize("tell", [lambda: happened("something"), lambda: current().advance(1)])
def test_a_listener_that_fails_hears_nothing_more_and_the_others_do(
    tell: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def on_activity(self, activity: Activity) -> None:
            if activity.done:
                self.on_event(None)

        def on_event(self, event: object) -> None:
            Broken.calls += 1
            raise OSError("the terminal is gone")

    recorder = Recorder()
    with caplog.at_level(logging.WARNING), listening(Broken()), listening(recorder), under_way("a pass"):
        tell()
        tell()
    assert Broken.calls == 1
    assert len(recorder.heard) + len(recorder.events) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "Broken is told nothing more of this run: OSError('the terminal is gone')"
    ]


def test_two_runs_in_two_threads_have_listeners_of_their_own() -> None:
    both = threading.Barrier(2, timeout=60)
    recorders = {name: Recorder() for name in ("a", "b")}

    def run(name: str) -> None:
        with listening(recorders[name]):
            both.wait()
            with under_way(name):
                both.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, recorder in recorders.items():
        assert [what for what, *_ in recorder.heard] == [name, name]

"""SIGTERM and Ctrl-C as requests: what waits wakes, a second Ctrl-C interrupts."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tidemill.tasks.stopping import stop_on_signals


@contextmanager
def signal_later(number: signal.Signals) -> Iterator[None]:
    timer = threading.Timer(0.2, os.kill, [os.getpid(), number])
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_waiting(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop, signal_later(number):
        assert not stop
        began = time.monotonic()
        stop.wait(60)
        assert time.monotonic() - began < 30
        assert stop
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_off_the_main_thread_only_the_time_ends_it() -> None:
    done = []

    def run() -> None:
        with stop_on_signals(after_seconds=0.1) as stop:
            stop.wait(60)
            done.append(bool(stop))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert done == [True]

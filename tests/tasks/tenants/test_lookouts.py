"""Threads that look ahead: whatever a look ends with comes back."""

import pytest

from tidemill.tasks.stopping import Stop
from tidemill.tasks.tenants.lookouts import Lookouts


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit("some package's"), KeyboardInterrupt()])
def test_a_look_that_ends_with_any_error_comes_back_and_its_thread_goes_on(error: BaseException) -> None:
    def fail() -> bool:
        raise error

    looks: Lookouts[str] = Lookouts(1)
    looks.send("a", fail)
    looks.send("b", lambda: True)
    found: dict[str, bool | Exception] = {}
    ends = Stop(30)
    while len(found) < 2 and not ends:
        looks.wait(30, ends)
        found |= dict(looks.back())
    looks.close()
    assert isinstance(found["a"], Exception)
    assert str(error) in str(found["a"])
    assert found["b"] is True

"""What the options of the suite leave out, and what they refuse."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import _piece, pytest_collection_modifyitems


class Item(SimpleNamespace):
    """What stands for a test; each is another."""

    __hash__ = object.__hash__


def item(file: str, *markers: str) -> Any:
    return Item(path=Path(file), get_closest_marker={name: name for name in markers}.get)


POWER = item("tests/guarantees/test_power.py")
OTHER = item("tests/guarantees/test_kill.py")
MINUTES = item("tests/guarantees/test_workers.py", "prove")


def collected(*items: Any, power: bool = False, full: bool = False) -> list[Any]:
    """What is left of these items with or without --power and --full."""
    left = list(items)
    config = SimpleNamespace(
        getoption={"--power": power, "--full": full, "--quick": False}.get,
        hook=SimpleNamespace(pytest_deselected=lambda items: None),
    )
    pytest_collection_modifyitems(cast(pytest.Config, config), cast(list[pytest.Item], left))
    return left


def test_make_prove_refuses_without_root_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power-loss test is not left out in silence: whoever asks for all figures would think that they have them."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.UsageError, match="run it as root"):
        collected(POWER, OTHER, power=True)
    assert collected(OTHER, power=True) == [OTHER], "other figures need no root"


def test_root_runs_the_power_loss_test_and_make_test_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert collected(POWER, OTHER, power=True) == [POWER, OTHER]
    assert collected(POWER, OTHER, power=False) == [OTHER]


def test_what_takes_minutes_is_left_to_make_prove() -> None:
    assert collected(MINUTES, OTHER) == [OTHER]
    assert collected(MINUTES, OTHER, full=True) == [MINUTES, OTHER]


def test_the_pieces_of_a_sweep_are_all_of_it_and_none_twice() -> None:
    moments = list(range(20))
    assert sorted(moment for number in "123456" for moment in moments[_piece(f"{number}/6")]) == moments
    for wrong in ("0/6", "7/6", "6", "1/0", "one/6"):
        with pytest.raises(ValueError):
            _piece(wrong)

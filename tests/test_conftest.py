"""What the options of the suite leave out, and what they refuse."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import pytest_collection_modifyitems

POWER = SimpleNamespace(path=Path("tests/guarantees/test_power.py"))
OTHER = SimpleNamespace(path=Path("tests/guarantees/test_kill.py"))


def collected(*items: Any, power: bool) -> list[Any]:
    """What is left of these items with or without --power."""
    left = list(items)
    config = SimpleNamespace(
        getoption=lambda name: power and name == "--power",
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

"""What every test of the guarantees shares."""

import pytest

from tests.guarantees.children import WHOLE_VERSIONS
from tidemill.storage import tombstones
from tidemill.storage.overlap import PLACES


@pytest.fixture(autouse=True)
def tombstones_are_stored_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "WHOLE_VERSIONS", WHOLE_VERSIONS)


@pytest.fixture(autouse=True)
def places_are_those_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test lets TIDEMILL_PLACES name, it ends with the test."""
    monkeypatch.setenv(PLACES, "")

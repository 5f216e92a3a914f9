"""What every test of the guarantees shares."""

import pytest

from tests.guarantees.children import WHOLE_VERSIONS
from tidemill.storage import tombstones


@pytest.fixture(autouse=True)
def tombstones_are_stored_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "WHOLE_VERSIONS", WHOLE_VERSIONS)

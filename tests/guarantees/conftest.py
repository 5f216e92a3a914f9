"""What every test of the guarantees shares."""

import pytest

from storage import tombstones
from tests.guarantees.children import WHOLE_VERSIONS


@pytest.fixture(autouse=True)
def tombstones_are_stored_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "WHOLE_VERSIONS", WHOLE_VERSIONS)

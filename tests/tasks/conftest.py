"""Fixtures for the tests of tasks."""

import uuid
from collections.abc import Callable

import pytest


@pytest.fixture
def memory_url() -> Callable[[str], str]:
    """Like `make_url`, in memory alone: for what no backend can change."""
    unique = uuid.uuid4().hex
    return lambda name: f"memory://{unique}/{name}"

"""Versions to export, trained once for all tests."""

import uuid

import pytest

from tests.tasks.exporting import zoo


@pytest.fixture(scope="session")
def place() -> str:
    """`registry` below it has the model `model`, of regression and of all columns; `dataset` has its rows."""
    where = f"memory://{uuid.uuid4().hex}"
    zoo.trained(where, zoo.spec("regression"), zoo.table(300))
    return where

"""What the tests of Keras models share."""

from collections.abc import Iterator

import pytest

from tidemill.tasks.training.imports import ALLOWED_MODULES

NETWORKS = "tests.keras.networks"


@pytest.fixture(autouse=True, scope="session")
def keras_on_torch() -> Iterator[None]:
    """Before anything imports Keras, here or in a process of a test; and these tests' factories may come from a registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        patch.setenv(ALLOWED_MODULES, NETWORKS)
        yield

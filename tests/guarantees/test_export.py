"""An exported model predicts what the version does: ONNX Runtime and torch's program, on rows of every kind of column."""

import uuid
from typing import Final

import pytest

from tests.data import put
from tests.tasks.exporting import zoo
from tidemill.tasks.exporting import checking
from tidemill.tasks.exporting.export import export
from tidemill.tasks.exporting.formats import Format

pytestmark = [pytest.mark.xdist_group("export"), pytest.mark.timeout(3600)]
TRAINED = 2_000
ROWS = 2_000
ALL_ROWS = 100_000
FORMATS: Final[tuple[Format, ...]] = ("onnx", "torch")  # keras is for Keras models alone: tests/keras


@pytest.mark.parametrize("task", list(zoo.TARGETS))
def test_an_exported_model_predicts_what_the_version_does(
    task: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full: 100,000 rows, of all columns together, and for regression of each kind of column alone."""
    count = ALL_ROWS if full else ROWS
    monkeypatch.setattr(checking, "CHECKED_ROWS", count)
    alone = [[name] for name in zoo.FEATURES] if full and task == "regression" else []
    where = f"memory://{uuid.uuid4().hex}"
    put(f"{where}/tried", {"a.parquet": zoo.table(count, seed=1)})
    trained_on = zoo.table(TRAINED)
    for features in (list(zoo.FEATURES), *alone):
        registry = zoo.trained(where, zoo.spec(task, features), trained_on, f"of-{len(features)}-{features[0]}")
        for kind in FORMATS:
            done = export(registry, f"of-{len(features)}-{features[0]}", f"{where}/out", kind, rows=f"{where}/tried")
            assert done.rows == count + checking.MADE_UP_ROWS, (features, kind)
            assert done.difference <= checking.TOLERANCE, (features, kind, done.difference)

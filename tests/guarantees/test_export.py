"""An exported model predicts what the version does: ONNX Runtime and torch's program, on rows of every kind of column."""

import uuid
from typing import get_args

import pytest

from tests.tasks.exporting import zoo
from tidemill.tasks.exporting import checking
from tidemill.tasks.exporting.export import export
from tidemill.tasks.exporting.formats import Format

pytestmark = [pytest.mark.xdist_group("export"), pytest.mark.timeout(3600)]
ROWS = 2_000
ALL_ROWS = 100_000


@pytest.mark.parametrize("task", list(zoo.TARGETS))
def test_an_exported_model_predicts_what_the_version_does(
    task: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full: 100,000 rows, of all columns together, and of each kind of column alone."""
    count = ALL_ROWS if full else ROWS
    monkeypatch.setattr(checking, "CHECKED_ROWS", count)
    table = zoo.table(count)
    for features in (list(zoo.FEATURES), *([name] for name in zoo.FEATURES if full)):
        where = f"memory://{uuid.uuid4().hex}"
        registry = zoo.trained(where, zoo.spec(task, features), table)
        for kind in get_args(Format):
            done = export(registry, "model", f"{where}/out/model", kind)
            assert done.rows == count + checking.MADE_UP_ROWS, (features, kind)
            assert done.difference <= checking.TOLERANCE, (features, kind, done.difference)

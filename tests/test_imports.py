"""What importing a package must not bring along: other rooms, and seconds of start-up."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tidemill.storage", ["prefect", "torch"]),
        (
            "tidemill.storage.log, tidemill.storage.inbox, tidemill.storage.audit, tidemill.storage.retention",
            ["prefect", "torch", "pyarrow", "s3fs"],
        ),
        ("tidemill.storage.dataset, tidemill.storage.s3", ["prefect", "torch"]),
        ("tidemill.tasks.training", ["prefect", "tidemill.storage"]),
        ("tidemill.tasks.training.loop, tidemill.tasks.training.learner", ["prefect", "tidemill.storage", "s3fs"]),
        ("tidemill.tasks.training.spec, tidemill.tasks.settings", ["prefect", "torch", "pyarrow"]),
        (
            "tidemill.tasks.batch, tidemill.tasks.online.step, tidemill.tasks.predict, tidemill.tasks.maintenance",
            ["prefect"],
        ),
        ("tidemill.flows.cli", ["prefect", "torch", "s3fs", "pyarrow"]),
    ],
)
def test_imports(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

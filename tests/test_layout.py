"""What importing a package must not bring along: other rooms, and seconds of start-up."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("storage", ["prefect", "torch"]),
        ("storage.log, storage.inbox, storage.audit, storage.retention", ["prefect", "torch", "pyarrow", "s3fs"]),
        ("storage.dataset, storage.s3", ["prefect", "torch"]),
        ("tasks.training", ["prefect", "storage"]),
        ("tasks.training.loop, tasks.training.learner", ["prefect", "storage", "s3fs"]),
        ("tasks.training.spec, tasks.settings", ["prefect", "torch", "pyarrow"]),
        ("tasks.batch, tasks.online, tasks.predict, tasks.maintenance", ["prefect"]),
        ("flows.cli", ["prefect", "torch", "s3fs", "pyarrow"]),
    ],
)
def test_imports(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

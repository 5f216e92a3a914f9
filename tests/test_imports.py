"""What importing a package must not bring along: other rooms, and seconds of start-up."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
NOT_PREFECT: Final = ", ".join(
    ".".join(("tidemill", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted((ROOT / "tasks").rglob("*.py"))
    if path.name not in ("__init__.py", "wrappers.py")
)
"""Everything in tasks but the one file that wraps it for Prefect."""

UNWANTED: Final[list[tuple[str, list[str]]]] = [
    ("tidemill", ["prefect", "torch", "pyarrow", "pydantic"]),
    ("tidemill.storage", ["prefect", "torch"]),
    (
        "tidemill.storage.log, tidemill.storage.inbox, tidemill.storage.audit, tidemill.storage.retention",
        ["prefect", "torch", "pyarrow", "s3fs"],
    ),
    (
        "tidemill.storage.certify.run",
        ["prefect", "torch", "pyarrow", "botocore", "google.cloud.storage", "azure.storage.blob"],
    ),
    ("tidemill.storage.gcs, tidemill.storage.azure", ["prefect", "torch", "pyarrow", "botocore", "azure.identity"]),
    ("tidemill.storage.dataset, tidemill.storage.s3", ["prefect", "torch"]),
    ("tidemill.tasks.training", ["prefect", "tidemill.storage"]),
    ("tidemill.tasks.training.loop, tidemill.tasks.training.learner", ["prefect", "tidemill.storage", "s3fs"]),
    ("tidemill.tasks.training.spec, tidemill.tasks.settings", ["prefect", "torch", "pyarrow"]),
    (NOT_PREFECT, ["prefect", "torchmetrics"]),
    ("tidemill.flows.calls", ["prefect", "torch", "s3fs", "pyarrow"]),
    (
        "tidemill.flows.cli",
        ["prefect", "torch", "s3fs", "pyarrow", "tidemill.tasks"],
    ),
    (
        "tidemill.flows.cli, tidemill.flows.commands.reading",
        ["tidemill.tasks.settings", "tidemill.tasks.training", "tidemill.tasks.choosing", "tidemill.tasks.history"],
    ),
]
"""(modules, what must not be loaded once they are)."""


def brought_along(modules: str, unwanted: Sequence[str], folder: Path = ROOT) -> list[str]:
    """Which of the unwanted modules are loaded once the modules of the tree in this folder are, in a process of its own."""
    code = f"import sys, {modules}; print(*[name for name in {list(unwanted)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(("modules", "unwanted"), UNWANTED)
def test_imports(modules: str, unwanted: list[str]) -> None:
    assert brought_along(modules, unwanted) == []

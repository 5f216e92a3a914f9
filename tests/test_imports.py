"""What importing a package must not bring along: other rooms, and seconds of start-up."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.data import put, rows

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
    ("tidemill.storage.dataset, tidemill.storage.s3", ["prefect", "torch"]),
    ("tidemill.tasks.training", ["prefect", "tidemill.storage"]),
    ("tidemill.tasks.training.loop, tidemill.tasks.training.learner", ["prefect", "tidemill.storage", "s3fs"]),
    ("tidemill.tasks.training.spec, tidemill.tasks.settings", ["prefect", "torch", "pyarrow"]),
    (NOT_PREFECT, ["prefect", "torchmetrics"]),
    ("tidemill.flows.calls", ["prefect", "torch", "s3fs", "pyarrow"]),
    ("tidemill.flows.cli", ["prefect", "torch", "s3fs", "pyarrow"]),
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


TRAINED: Final = """
import sys
from tests.data import SPEC
from tidemill.tasks import batch, online
from tidemill.tasks.settings import BatchSettings, OnlineSettings
data, inbox, registry = sys.argv[1:]
batch.train(data, registry, "m", SPEC, BatchSettings())
assert online.drain(inbox, registry, "m", OnlineSettings()).shards == 1
print(*[name for name in ("torch._dynamo", "sympy", "pandas", "torchmetrics", "prefect") if name in sys.modules])
"""


def test_a_training_and_a_drain_import_nothing_that_they_do_not_use(tmp_path: Path) -> None:
    """torch's compiler and pandas take two seconds, and libraries import them at the first call of something else."""
    places = [str(tmp_path / name) for name in ("data", "inbox", "registry")]
    for url in places[:2]:
        put(url, {"0.parquet": rows(100, seed=0)})
    code = [sys.executable, "-c", TRAINED, *places]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

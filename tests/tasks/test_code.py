"""The code that trains is the code that is recorded: edited modules, reloads, helpers, classes of a notebook."""

import importlib
import os
import subprocess
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data import SPEC, keys, put, rows
from tidemill.storage.log import open_log
from tidemill.tasks import batch
from tidemill.tasks.code import Code, StaleCode, code_of
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.slow
MakeUrl = Callable[[str], str]
ROOT = Path(__file__).parents[2]

NET = """
import torch
from . import parts
from .parts import block
WIDTH = 3

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Sequential(block(), torch.nn.Linear(WIDTH, 1))
    def forward(self, x):
        return self.l(x)
"""
PARTS = """
import torch
def block():
    return torch.nn.Linear(2, 3, bias=True)
def loss(output, target):
    return (output - target) ** 2
"""


class Package:
    """A package of the user's own, with a model in `net.py` that uses `parts.py`, which also holds a loss."""

    def __init__(self, folder: Path) -> None:
        self.name = f"own_{uuid.uuid4().hex[:8]}"
        self.folder = folder / self.name
        self.folder.mkdir()
        self.write("__init__", "")
        self.write("net", NET)
        self.write("parts", PARTS)

    def write(self, module: str, text: str) -> None:
        path = self.folder / f"{module}.py"
        path.write_text(text)
        importlib.invalidate_caches()
        for cached in self.folder.glob("__pycache__/*"):  # its own check is of whole seconds and the size
            cached.unlink()

    def module(self, module: str) -> types.ModuleType:
        return importlib.import_module(f"{self.name}.{module}")

    @property
    def spec(self) -> Spec:
        settings = {"model": {"factory": f"{self.name}.net:Net"}, "loss": f"{self.name}.parts:loss", "epochs": 1}
        return Spec.model_validate(SPEC.model_dump() | settings)

    @property
    def code(self) -> Code:
        return code_of(self.spec)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    monkeypatch.syspath_prepend(tmp_path)
    package = Package(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def train(spec: Spec, url: MakeUrl, registry: str = "registry") -> batch.VersionInfo:
    if not keys(url("dataset")):
        put(url("dataset"), {"x.parquet": rows(60, 0)})
    return batch.train(url("dataset"), url(registry), "model", spec)


def test_a_run_is_known_by_all_of_the_users_code_that_the_spec_names(own: Package) -> None:
    name = own.name
    assert list(dict(own.code.identity)) == [name, f"{name}.net", f"{name}.parts"]
    for module, text in (
        ("net", NET.replace("= 3", "= 3  ")),
        ("parts", PARTS.replace("** 2", "** 4")),
        ("__init__", "#"),
    ):
        before = own.code.identity
        own.write(module, text)
        assert own.code.identity != before


def test_installed_modules_do_not_count_and_what_is_built_in_has_no_code() -> None:
    assert code_of(SPEC).identity == []
    linear = {"model": {"factory": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 1}}}
    assert code_of(Spec.model_validate(SPEC.model_dump() | linear)).identity == []


def test_asking_which_code_it_is_imports_nothing(own: Package) -> None:
    own.write("__init__", "raise AssertionError('imported')")
    assert len(own.code.identity) == 3
    assert own.name not in sys.modules


@pytest.mark.parametrize("module", ["net", "parts"])
@pytest.mark.parametrize("imported_by", ["tidemill", "the user"])
def test_a_module_that_was_edited_after_its_import_is_refused(
    module: str, imported_by: str, own: Package, memory_url: MakeUrl
) -> None:
    if imported_by == "tidemill":
        assert train(own.spec, memory_url).version == 0
    else:
        own.module("net")
    own.write(
        module,
        {"net": NET.replace("WIDTH, 1)", "WIDTH, 1, bias=False)"), "parts": PARTS.replace("True", "False")}[module],
    )
    with pytest.raises(StaleCode, match=rf"{module}\.py has changed since this process imported it.*importlib\.reload"):
        train(own.spec, memory_url)
    log = open_log(memory_url("registry"), "model", writable=False)
    assert not log.exists() or log.head().number == 0
    importlib.reload(own.module("parts"))
    importlib.reload(own.module("net"))
    train(own.spec, memory_url)
    weights = open_log(memory_url("registry"), "model").head().manifest.blobs.weights.bytes
    reference = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, own.spec.model_dump_json(), str(own.folder.parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert weights == int(reference.stdout), "what is recorded under the new code has the weights of the new code"


ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.data import put, rows
from tidemill.storage.log import open_log
from tidemill.tasks import batch
from tidemill.tasks.training.spec import Spec
put("memory://m/dataset", {"x.parquet": rows(60, 0)})
batch.train("memory://m/dataset", "memory://m/registry", "model", Spec.model_validate_json(sys.argv[1]))
print(open_log("memory://m/registry", "model").head().manifest.blobs.weights.bytes)
"""


def test_a_constant_that_was_edited_after_its_import_is_refused(own: Package, memory_url: MakeUrl) -> None:
    own.module("net")
    own.write("net", NET.replace("WIDTH = 3", "WIDTH = 4"))
    with pytest.raises(StaleCode, match=r"net\.py has changed"):
        train(own.spec, memory_url)


def test_a_module_that_was_written_and_imported_in_this_process_is_trained(own: Package, memory_url: MakeUrl) -> None:
    """As in a notebook: written by a cell, imported by the next."""
    own.write("net", NET.replace("WIDTH = 3", "WIDTH = 3\nUNUSED = [1, {'a': None}]"))
    own.module("net")
    assert train(own.spec, memory_url).trained


def test_a_module_that_holds_what_another_was_before_its_reload_is_refused(own: Package, memory_url: MakeUrl) -> None:
    own.module("net")
    own.write("parts", PARTS.replace("True", "False"))
    importlib.reload(own.module("parts"))
    with pytest.raises(
        StaleCode, match=rf"'{own.name}.net' holds 'block' as it was before '{own.name}.parts' was reloaded"
    ):
        train(own.spec, memory_url)
    importlib.reload(own.module("net"))
    assert train(own.spec, memory_url).trained


def test_a_run_goes_on_with_the_code_it_began_with_while_the_file_is_edited(own: Package, memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"x.parquet": rows(60, 0)})
    run = batch.open_run(
        batch.take_snapshot(memory_url("dataset")), memory_url("registry"), "model", own.spec, batch.BatchSettings()
    )
    batch.prepare(run)
    own.write("net", NET.replace("WIDTH = 3", "WIDTH = 4"))
    run.forget()
    batch.train_epoch(run, 0)
    assert batch.register(run, batch.evaluate(run)).number == 0


NOTEBOOK = """
import os, sys, torch
from tests.data import SPEC, put, rows
from tidemill.tasks import batch
from tidemill.tasks.training.spec import Spec

SPEC = Spec.model_validate(SPEC.model_dump() | {"model": {"factory": "__main__:Net"}, "epochs": 1})
put("dataset", {"x.parquet": rows(60, 0)}) if not os.path.exists("dataset") else None

CELL = '''
SCALE = 1.0
def helper(x):
    return x * SCALE

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(2, 1)
    def forward(self, x):
        return self.l(helper(x))
'''
for edit in sys.argv[1:]:
    exec(CELL.replace(*edit.split("|")), globals())
    made = batch.train("dataset", "registry", "model", SPEC)
    print(made.version, made.trained)
"""


def test_a_class_of_a_notebook_that_is_defined_anew_is_another_run(tmp_path: Path) -> None:
    """Its methods, what they call, and the values that those use; the same text is the same run, in any process."""

    def cells(*edits: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", NOTEBOOK, *edits],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(len(edits))},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    assert cells("|", "|", "2, 1)|2, 1, bias=False)", "SCALE = 1.0|SCALE = 2.0") == [
        "0 True",
        "0 False",
        "1 True",
        "2 True",
    ]
    assert cells("|", "x * SCALE|x * SCALE + 0", "SCALE = 1.0|SCALE = 2.0") == ["0 False", "3 True", "2 False"]

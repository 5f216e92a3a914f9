"""The package as others have it: a wheel, installed beside a project that has `flows/`, `tasks/` and `storage.py` of its own."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from tests.flows.conftest import Place
from tests.flows.data import SPEC_FIELDS, parquet
from tests.test_imports import UNWANTED, brought_along
from tidemill.storage.log import open_log

pytestmark = pytest.mark.xdist_group("flows")  # one worker, one server

ROOT = Path(__file__).parents[2]
ROOMS = ("flows", "tasks", "storage")
POOL = "packaging"

local = pytest.mark.parametrize("make_url", ["local"], indirect=True)


def copy_sources(target: Path, *, links: bool = True) -> Path:
    """What a wheel is made of. Without links it is as a zip file, or a checkout on Windows, has it: text files in their place."""
    target.mkdir()
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in ("tidemill", *ROOMS):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    for room in ROOMS:
        link = target / "tidemill" / room
        assert link.is_symlink()
        if not links:
            link.unlink()
            link.write_text(f"../{room}")
    return target


def built(sources: Path, target: Path) -> Path:
    """The wheel of a source tree, built without a network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", target, sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return built(copy_sources(folder / "sources"), folder)


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the wheel, before whatever else is installed here."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return os.environ | {"PYTHONPATH": str(site)}


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that the wheel was installed into. Its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python"]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )  # only now: pip would take the checkout for installed
    return folder / "bin"


def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


# ---- the wheel -------------------------------------------------------------------------------------------------------
def test_the_wheel_holds_tidemill_alone_and_all_of_it(wheel: Path) -> None:
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    expected = {f"tidemill/{path.relative_to(ROOT).as_posix()}" for path in modules}
    expected |= {f"tidemill/{path.name}" for path in (ROOT / "tidemill").glob("*.py")} | {"tidemill/py.typed"}
    found = files(wheel)
    assert {name for name in found if ".dist-info/" not in name} == expected
    assert len(found) == len(set(found))
    dist_info = "-".join(wheel.stem.split("-")[:2]) + ".dist-info"
    assert {name.partition("/")[0] for name in found} == {"tidemill", dist_info}
    assert f"{dist_info}/licenses/LICENSE" in found


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        stated = email.message_from_bytes(archive.read(name))
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert (stated["License-Expression"], stated["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    minors = {found[1] for line in stated.get_all("Classifier") if (found := re.search(r":: 3\.(\d+)$", line))}
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["checks"]["strategy"]["matrix"]
    assert minors == {version.removeprefix("3.") for version in matrix["python"]}
    assert "Typing :: Typed" in stated.get_all("Classifier")


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """What `python -m build` does: first the one, then the other out of it."""
    sources = copy_sources(tmp_path / "sources")
    shutil.copytree(
        ROOT / "tests/flows", sources / "tests/flows"
    )  # a checkout has them; nobody who installs needs them
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tidemill/py.typed"} <= held
    assert not [name for name in held if name.startswith("tests/")]
    (tmp_path / "again").mkdir()
    assert files(built(folder, tmp_path / "again")) == files(wheel)


def test_a_fresh_environment_runs_tidemill_from_any_folder(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/part.parquet").write_bytes(parquet(100, seed="packaging"))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [fresh / "tidemill", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"{importlib.metadata.version('tidemill')}\n"
    where = "import tidemill.storage.log as log; print(log.__file__)"
    found = subprocess.run([fresh / "python", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(fresh.parent)
    run("train", "./data", "./registry", "m", "--features", "a", "b", "--target", "y", "--epochs", "1")
    assert "100 predictions" in run("predict", "./registry", "m", "./data", "./predictions")


def test_every_folder_of_modules_is_a_package_that_is_installed() -> None:
    """The list in pyproject.toml is made by hand, and a folder without an `__init__.py` would be missing from a wheel."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    names = {".".join(("tidemill", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(stated) == names | {"tidemill"}


def test_a_checkout_without_links_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert files(built(copy_sources(tmp_path / "sources", links=False), tmp_path)) == files(wheel)


# ---- imports ---------------------------------------------------------------------------------------------------------
EVERYTHING = """
import collections, importlib, os, pkgutil, sys
import tidemill
for module in pkgutil.walk_packages(tidemill.__path__, "tidemill."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
homes = collections.defaultdict(list)
for name, module in [*sys.modules.items()]:
    file = getattr(module, "__file__", None)
    if file and name != "__main__":
        homes[os.path.realpath(file)].append(name)
ours = {file: names for file, names in homes.items() if any(name.split(".")[0] == "tidemill" for name in names)}
twice = [names for names in ours.values() if len(names) > 1]
print(len(ours), twice)
"""


def imported(cwd: Path, environment: dict[str, str], preamble: str = "") -> str:
    """How many modules of ours a process has once it has imported all, and the names of those that it has twice."""
    done = subprocess.run(
        [sys.executable, "-c", preamble + EVERYTHING],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MODULES = [*(ROOT / "tidemill").glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
ALL_ONCE = f"{sum(path.name != '__main__.py' for path in MODULES)} []"


def test_no_file_is_imported_twice_in_the_checkout() -> None:
    assert imported(ROOT, dict(os.environ)) == f"{ALL_ONCE}\n"


def test_the_public_names_are_there_and_typed(installed: dict[str, str], tmp_path: Path) -> None:
    """`import tidemill` alone loads nothing heavy; each of its names is what it says, and has its type for a type checker."""
    code = """
import sys, tidemill
light = [name for name in ("torch", "prefect", "pyarrow", "pydantic") if name in sys.modules]
names = {name: getattr(tidemill, name).__module__ for name in tidemill.__all__}
assert set(tidemill.__all__) <= set(dir(tidemill))
assert set(tidemill.__all__) == set(tidemill._HOME)
print(light, "prefect" in sys.modules, sorted(names))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=installed, capture_output=True, text=True, check=True
    )
    loaded, prefect, names = re.fullmatch(r"(\[.*?\]) (\w+) (\[.*\])\n", done.stdout).groups()
    assert (loaded, prefect) == ("[]", "False")
    source = (ROOT / "tidemill/__init__.py").read_text()
    for name in json.loads(names.replace("'", '"')):
        assert re.search(rf"import {name} as {name}$", source, re.MULTILINE), name


# ---- contracts bite --------------------------------------------------------------------------------------------------
OFFENCES = {
    "storage/urls.py": "import torch",
    "tasks/training/spec.py": "from tidemill.storage import errors",
    "tasks/scores.py": "import tidemill.flows.views",
    "flows/maintenance.py": "import tidemill.storage.log",
    "tasks/versions.py": "import prefect",
    "tasks/predict.py": "import tidemill.tasks.wrappers",
}
"""One for each contract: a file, and a line in it that breaks the contract."""


def test_each_contract_fails_on_an_offence(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    contracts = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert len(contracts) == len(OFFENCES)
    assert broken(tree) == set()
    for file, line in OFFENCES.items():
        (tree / file).write_text(f"{line}\n{(tree / file).read_text()}")
    assert broken(tree) == {contract["name"] for contract in contracts}


def broken(tree: Path) -> set[str]:
    """The contracts that a tree breaks."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tree,
        env=os.environ | {"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )
    names = set(re.findall(r"^(.*) BROKEN\b", done.stdout, re.MULTILINE))
    assert bool(names) == bool(done.returncode), done.stdout + done.stderr
    return names


def test_the_checks_of_imports_fail_on_an_offence(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    for file, line in (("storage/log.py", "import pyarrow"), ("tasks/settings.py", "import prefect.flows")):
        (tree / file).write_text(f"{line}\n{(tree / file).read_text()}")
    assert brought_along("tidemill.storage.log", ["prefect", "pyarrow"], tree) == ["pyarrow"]
    assert brought_along("tidemill.tasks.settings", ["prefect", "torch"], tree) == ["prefect"]
    assert {"pyarrow", "prefect"} <= {name for _, unwanted in UNWANTED for name in unwanted}


# ---- beside a project with the same names ----------------------------------------------------------------------------
FLOW = """
from pathlib import Path
from prefect import flow

@flow
def mine(target: str) -> None:
    import storage
    from tasks import helpers
    Path(target).write_text(f"{storage.MINE} {helpers.MINE}")
"""


def project(folder: Path, *, packages: bool) -> Path:
    """A Prefect project of somebody else's, with every name that our checkout has at its top."""
    for name, text in {
        "flows/batch.py": FLOW,
        "flows/mine.py": FLOW,
        "tasks/helpers.py": "MINE = 'their tasks'",
        "storage.py": "MINE = 'their storage'",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if packages:
        for name in ("flows", "tasks"):
            (folder / name / "__init__.py").touch()
    return folder


@pytest.mark.parametrize("packages", [True, False])
def test_in_a_project_with_the_same_names(packages: bool, installed: dict[str, str], tmp_path: Path) -> None:
    """The command line works, and what both import is their own."""
    folder = project(tmp_path / "project", packages=packages)

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=folder, env=installed, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Train MODEL from a Parquet DATASET" in run("-m", "tidemill", "train", "--help")
    (folder / "registry").mkdir()
    assert run("-m", "tidemill", "status", "./registry") == "no models\n"
    theirs = """
import flows.mine, flows.batch, storage, tasks.helpers
print(storage.MINE, tasks.helpers.MINE, flows.batch.mine.name)
"""
    assert imported(folder, installed, theirs) == f"their storage their tasks mine\n{ALL_ONCE}\n"


@local
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("prefect_api")
def test_a_worker_runs_our_flows_and_theirs(place: Place, installed: dict[str, str], tmp_path: Path) -> None:
    """Deployed from such a project: with packages, their flow by its module; without, by its file; ours always by module."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        # The worker asks again when the database of its server is locked, whatever this process has learned of its own runs
        environment = installed | {"PREFECT_API_URL": str(client.api_url), "PREFECT_CLIENT_MAX_RETRIES": "5"}
        runs = {}
        for name, packages in (("packages", True), ("folders", False)):
            folder = project(tmp_path / name, packages=packages)
            parameters = {"dataset": place.dataset, "registry": place.registry, "model": name, "spec": SPEC_FIELDS}
            theirs = "flows.batch.mine" if packages else "flows/batch.py:mine"
            entrypoints = {
                "theirs": (theirs, {"target": f"{folder}/written"}),
                "ours": ("tidemill.flows.batch.batch_training", parameters),
            }
            deployments = [
                {"name": f"{name}-{key}", "entrypoint": entrypoint, "parameters": given, "work_pool": {"name": POOL}}
                for key, (entrypoint, given) in entrypoints.items()
            ]
            (folder / "prefect.yaml").write_text(yaml.safe_dump({"name": name, "deployments": deployments}))
            prefect(folder, environment, "--no-prompt", "deploy", "--all")
            for key in entrypoints:
                flow = "batch-training" if key == "ours" else "mine"
                deployment = client.read_deployment_by_name(f"{flow}/{name}-{key}")
                runs[name, key] = client.create_flow_run_from_deployment(deployment.id).id
        output = prefect(tmp_path, environment, "worker", "start", "--pool", POOL, "--run-once")
        states = {key: client.read_flow_run(run).state_name for key, run in runs.items()}
        assert set(states.values()) == {"Completed"}, f"{states}\n{output}"
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
    for name in ("packages", "folders"):
        assert open_log(place.registry, name).head().number == 0
        assert (tmp_path / name / "written").read_text() == "their storage their tasks"


def prefect(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr

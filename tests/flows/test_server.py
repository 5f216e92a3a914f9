"""Whether a Prefect server is set up: the answer is Prefect's own, which is asked for beside it."""

import sys
from pathlib import Path

import pytest
from prefect.settings import Settings, sources

from tidemill.flows.server import is_set_up

URL = "http://127.0.0.1:4200/api"
PROFILES = f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{URL}"\n[profiles.other]\nPREFECT_API_KEY = "x"\n'


@pytest.mark.parametrize(
    ("environment", "files", "expected"),
    [
        ({}, {}, False),
        ({"PREFECT_API_URL": URL}, {}, True),
        ({"PREFECT_API_URL": ""}, {}, False),
        ({}, {".env": f"PREFECT_API_URL={URL}\n"}, True),
        ({"PREFECT_API_URL": ""}, {".env": f"PREFECT_API_URL={URL}\n"}, False),
        ({}, {"prefect.toml": f'[api]\nurl = "{URL}"\n'}, True),
        ({}, {"prefect.toml": '[logging]\nextra_loggers = "tidemill"\n'}, False),
        ({}, {"pyproject.toml": f'[tool.prefect.api]\nurl = "{URL}"\n'}, True),
        ({}, {"pyproject.toml": '[project]\nname = "mine"\n'}, False),
        ({}, {"home/.prefect/profiles.toml": PROFILES}, True),
        ({"PREFECT_API_URL": ""}, {"home/.prefect/profiles.toml": PROFILES}, False),
        ({"PREFECT_PROFILE": "other"}, {"home/.prefect/profiles.toml": PROFILES}, False),
        ({"PREFECT_PROFILE": "gone"}, {"home/.prefect/profiles.toml": PROFILES}, False),
        ({"PREFECT_PROFILE": "local"}, {}, True),
        ({"PREFECT_HOME": "elsewhere"}, {"home/.prefect/profiles.toml": PROFILES}, False),
        ({"PREFECT_HOME": "elsewhere"}, {"elsewhere/profiles.toml": PROFILES}, True),
        ({"PREFECT_PROFILES_PATH": "p.toml"}, {"p.toml": PROFILES}, True),
        ({}, {".env": "PREFECT_PROFILES_PATH=p.toml\n", "p.toml": PROFILES}, True),
        ({}, {"prefect.toml": 'profiles_path = "p.toml"\n', "p.toml": PROFILES}, True),
        ({}, {"pyproject.toml": '[tool.prefect]\nprofiles_path = "p.toml"\n', "p.toml": PROFILES}, True),
        ({}, {"home/.prefect/profiles.toml": PROFILES.replace('active = "mine"\n', "")}, False),
    ],
)
def test_a_server_is_set_up_where_prefect_would_find_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    files: dict[str, str],
    expected: bool,
) -> None:
    elsewhere(tmp_path, monkeypatch, environment, files)
    assert bool(Settings().api.url) is expected
    monkeypatch.delitem(sys.modules, "prefect.settings")
    assert is_set_up() is expected


@pytest.mark.parametrize("file", ["home/.prefect/profiles.toml", "prefect.toml", "pyproject.toml"])
def test_a_broken_file_names_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    elsewhere(tmp_path, monkeypatch, {}, {file: "active = ["})
    monkeypatch.delitem(sys.modules, "prefect.settings")
    assert is_set_up() is False


def elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], files: dict[str, str]
) -> None:
    """In this folder, with its own home, these files and only these variables of Prefect."""
    for name in [name for name in sources.os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    home = folder / "home"
    for name, value in (environment | {"HOME": str(home)}).items():
        monkeypatch.setenv(name, value)
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sources, "DEFAULT_PREFECT_HOME", home / ".prefect")  # read when Prefect was imported

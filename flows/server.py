"""Whether a Prefect server is set up: asked without importing Prefect, whose settings alone take a second of CPU time.

The places and their order are those of Prefect 3 (`prefect.settings`): the environment, `.env`, `prefect.toml`, `pyproject.toml`,
then the active profile.
"""

import os
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_URL: Final = "PREFECT_API_URL"


def is_set_up() -> bool:
    """True if Prefect's settings name a server: a flow run would be recorded there, not on a temporary server."""
    if "prefect.settings" in sys.modules:
        from prefect.settings import PREFECT_API_URL

        return bool(PREFECT_API_URL.value())
    if (url := _variable(_URL)) is not None:
        return bool(url)
    for file, table in (("prefect.toml", ("api",)), ("pyproject.toml", ("tool", "prefect", "api"))):
        if (url := _in(_toml(Path(file)), *table, "url")) is not None:
            return bool(url)
    return bool(_active_profile().get(_URL))


def _variable(name: str) -> str | None:
    """Of the environment, or of the file `.env` in the current folder."""
    if (value := os.environ.get(name)) is not None:
        return value
    if not Path(".env").is_file():
        return None
    from dotenv import dotenv_values

    return dotenv_values(".env").get(name)


def _active_profile() -> dict[str, Any]:
    """The settings of the profile in use; those of Prefect's own file where the user has none."""
    own = _toml(_profiles())
    name = os.environ.get("PREFECT_PROFILE") or own.get("active")
    if name in (profiles := own.get("profiles", {})):
        return dict(profiles[name])
    shipped = _toml(_shipped_profiles())
    return dict(shipped.get("profiles", {}).get(shipped.get("active"), {}))


def _profiles() -> Path:
    named = _variable("PREFECT_PROFILES_PATH")
    for file, table in (("prefect.toml", ()), ("pyproject.toml", ("tool", "prefect"))):
        named = named or _in(_toml(Path(file)), *table, "profiles_path")
    if named:
        return Path(named)
    if home := os.environ.get("PREFECT_HOME"):
        return Path(home) / "profiles.toml"
    own = Path.home() / ".prefect" / "profiles.toml"
    return own if own.exists() else _shipped_profiles()


def _shipped_profiles() -> Path:
    found = find_spec("prefect")  # which does not import it
    assert found is not None, "Tidemill depends on it"
    assert found.origin is not None, "it is a package with a file"
    return Path(found.origin).parent / "settings" / "profiles.toml"


def _toml(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there or broken, which Prefect tells once it is asked for."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _in(tree: dict[str, Any], *keys: str) -> Any:
    """What lies under these keys; None if one of them is missing."""
    found: Any = tree
    for key in keys:
        if not isinstance(found, dict):
            return None
        found = found.get(key)
    return found

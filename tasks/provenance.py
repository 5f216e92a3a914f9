"""Where a version's code came from."""

import functools
import subprocess
from importlib.metadata import version


@functools.cache
def code_revision() -> str:
    """Tidemill's version, and the git revision of the working directory where there is one."""
    own = f"tidemill {version('tidemill')}"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return own
    return f"{own}, git {done.stdout.strip()}" if done.returncode == 0 else own

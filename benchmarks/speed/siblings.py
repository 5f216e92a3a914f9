"""The suites that are scripts of their own beside this package. Each prints one line of JSON for each measurement."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from benchmarks.speed.processes import ROOT, environment

SCRIPTS: Final = {"online": "online.py", "s3": "s3.py", "startup": "startup.py"}


def measurements(suite: str, arguments: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Each line that the script prints, as `line`; `error` if it fails."""
    script = ROOT / "benchmarks" / SCRIPTS[suite]
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("{"):
            yield {"suite": suite, "line": json.loads(text)}
    if process.wait():
        yield {"suite": suite, "error": f"{script.name} ended with exit code {process.returncode}"}

"""The `tidemill` command in a process of its own, and what came of it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIDEMILL = Path(sys.executable).with_name("tidemill")


@dataclass(frozen=True)
class Result:
    code: object
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def start(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """The console script, in a folder."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([TIDEMILL, *arguments], cwd=cwd, env=environment or dict(os.environ), **pipes)


def ended(process: "subprocess.Popen[str]") -> Result:
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


def in_process(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> Result:
    return ended(start(*arguments, cwd=cwd, environment=environment))

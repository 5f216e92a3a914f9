"""One page read by somebody who types every block: in one folder, with one shell and one Python."""

import codecs
import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.docs.pages import Block

SECONDS: Final = 120.0
"""What one block may take on a busy machine."""
_OF_THE_SHELL: Final = {"_", "SHLVL", "PWD", "OLDPWD"}


class Session:
    """Runs blocks of `bash` and `python`. What is exported, and the folder gone to, stay for the next block of either kind.

    Args:
        folder: Where the reader stands at first. Everything that the page makes should lie below it.
        environment: Of all its processes, and of the Python blocks.
        stand_ins: Text of the page -> what is run in its place, such as the address of a server.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], stand_ins: Mapping[str, str]) -> None:
        self.output = ""
        """What the last block that was run has printed, with the page's own names for places."""
        self._home = self._folder = folder
        self._environment = dict(environment)
        self._stand_ins = stand_ins
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._modules = set(sys.modules)

    def close(self) -> None:
        """Forget the page's own modules: the next page may have others of the same names."""
        for name in set(sys.modules) - self._modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(self._home):
                del sys.modules[name]

    def run(self, block: Block) -> None:
        """Run one block, or save it if its marker names a file.

        Raises:
            AssertionError: it ends otherwise than its page says.
        """
        text = block.text
        for name, stand_in in self._stand_ins.items():
            text = text.replace(name, stand_in)
        if block.directive == "file":
            (self._folder / block.argument).write_text(text)
        elif block.language == "bash":
            self._bash(block, text)
        else:
            self._python(block, text)
        for name, stand_in in (*self._stand_ins.items(), (".", str(self._home))):
            self.output = self.output.replace(stand_in, name)

    def _bash(self, block: Block, text: str) -> None:
        state = self._home / ".state"
        process = subprocess.Popen(
            ["bash", "-c", f"set -euo pipefail\ntrap 'env -0 >{state}; pwd >{state}.folder' EXIT\n{text}"],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ends, told = time.monotonic() + SECONDS, False
        self.output = ""
        try:
            for piece in _pieces(process, ends):
                self.output += piece
                if block.directive == "until" and block.argument in self.output and not told:
                    told = True
                    os.killpg(process.pid, signal.SIGTERM)
            code = process.wait(max(0.1, ends - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            pytest.fail(f"{block.where}: not done within {SECONDS:.0f} s\n{self.output}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the block has left in the background
            process.wait()
        if block.directive == "until":
            assert told, f"{block.where} ended ({code}) before it said {block.argument!r}:\n{self.output}"
            return
        wanted = "another exit code than 0" if block.directive == "fails" else "exit code 0"
        assert (code != 0) == (block.directive == "fails"), f"{block.where}: {code}, not {wanted}:\n{self.output}"
        variables = (pair.partition("=") for pair in state.read_text().split("\0") if pair)
        self._environment = {name: value for name, _, value in variables if name not in _OF_THE_SHELL}
        self._folder = Path(Path(f"{state}.folder").read_text().strip())

    def _python(self, block: Block, text: str) -> None:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.chdir(self._folder)
            patch.setattr(sys, "path", [str(self._folder), *sys.path])
            for name, value in self._environment.items():
                patch.setenv(name, value)
            try:
                exec(compile("\n" * block.line + text, block.page, "exec"), self._names)
            except Exception as error:
                raise AssertionError(f"{block.where}: {type(error).__name__}: {error}") from error
        self.output = said.getvalue()


def _pieces(process: "subprocess.Popen[bytes]", ends: float) -> Iterator[str]:
    """What a process and its children print, as it comes, until the last of them has closed the pipe."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    assert process.stdout is not None
    with process.stdout as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(pipe.fileno(), 65536)
            if not data:
                return
            yield decoder.decode(data)


def not_printed(shown: str, printed: str) -> str | None:
    """The first line of a page's output that its block did not print in this order, whatever the numbers; None if all were."""
    lines = iter([_plain(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() not in ("", "...") and not any(_plain(line) == found for found in lines):
            return line
    return None


def _plain(line: str) -> str:
    """A line without its numbers and hashes, and without the width of its gaps."""
    return " ".join(re.sub(r"\b[0-9a-f]{16,}\b|[-+]?\d[\d,.:-]*", "#", line).split())

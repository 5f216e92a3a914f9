"""What is under way, as a person before a terminal sees it: a real pseudo terminal, and a screen made of what came."""

import logging
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast

import pexpect
import pyte
import pytest

from tests.s3_server import wait_until
from tidemill.flows import display
from tidemill.flows.display import Shown, duration
from tidemill.progress import NOBODY, Activity, under_way

ROOT: Final = Path(__file__).parents[2]
WAITS: Final = 60
"""Seconds within which something must be seen."""

CHILD: Final = """
import logging, os, sys, time
from pathlib import Path
from tidemill.flows import display, terminal
from tidemill.progress import under_way

display.PATIENCE_SECONDS = display.DRAW_SECONDS
display.LINE_SECONDS = display.Lines.every = 0.2
folder = Path(sys.argv[1])

def until(name, activity):
    for _ in range(6000):
        if (folder / name).exists():
            return
        activity.advance(1, loss=lambda: 0.125)
        time.sleep(0.01)
    raise SystemExit("nobody came")

with terminal.attached("train", lambda error: None):
    with under_way("epoch 1 of 2", total=10_000, ahead=10_000) as activity:
        until("seen", activity)
        logging.getLogger("tidemill").warning("a warning in the middle")
        print("a print in the middle", flush=True)
        until("over", activity)
    terminal.out('{"version": 0}')
"""


class Terminal:
    """A child on a pseudo terminal, and what its screen shows."""

    def __init__(self, arguments: list[str], columns: int = 100, lines: int = 24, **environment: str) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.child = pexpect.spawn(
            sys.executable,
            arguments,
            dimensions=(lines, columns),
            env={**inherited, "TERM": "xterm-256color", **environment},
            cwd=str(ROOT),
            timeout=WAITS,
        )

    def read(self) -> bool:
        """Take in what has come; False once the child has closed its terminal."""
        try:
            data = self.child.read_nonblocking(65_536, timeout=1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def wait_for(self, seen: Callable[[list[str]], bool]) -> list[str]:
        """The lines of the screen once they are as they should be."""

        def is_there() -> bool:
            assert self.read() or seen(self.lines), f"the child has ended:\n{self.text}"
            return seen(self.lines)

        wait_until(is_there, seconds=WAITS, what="what the screen should show")
        return self.lines

    def end(self) -> int:
        """Read all that is left; the exit code, or minus the signal."""
        while self.read():
            pass
        self.child.wait()
        return -self.child.signalstatus if self.child.signalstatus else self.child.exitstatus

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, from the top."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    @property
    def text(self) -> str:
        """All that was ever scrolled out of the top, and the screen."""
        above = ["".join(c.data for _, c in sorted(line.items())).rstrip() for line in self.screen.history.top]
        return "\n".join([*above, *self.lines])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start the child on a terminal."""
    started: list[Terminal] = []

    def on_terminal(**named: Any) -> Terminal:
        started.append(Terminal(["-c", CHILD, str(tmp_path)], **named))
        return started[-1]

    yield on_terminal
    for terminal in started:
        terminal.child.close(force=True)


def bars(lines: list[str]) -> list[str]:
    return [line for line in lines if "epoch 1 of 2" in line]


def test_a_bar_stands_below_the_log_lines_and_leaves_nothing_behind(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = start()
    (bar,) = bars(terminal.wait_for(lambda lines: bool(bars(lines))))
    assert "━" in bar
    assert "rows/s, loss 0.125, " in bar
    assert " left  [" in bar
    (tmp_path / "seen").touch()
    lines = terminal.wait_for(lambda lines: "a print in the middle" in lines and bool(bars(lines)))
    assert [line[9:] if line.endswith("a warning in the middle") else line for line in lines[:2]] == [
        "a warning in the middle",
        "a print in the middle",
    ]
    assert len(bars(lines)) == 1
    assert "epoch 1 of 2" in lines[-1]
    (tmp_path / "over").touch()
    assert terminal.end() == 0
    assert terminal.text.splitlines()[1:] == ["a print in the middle", '{"version": 0}']
    assert not terminal.screen.cursor.hidden


def test_a_bar_fits_into_a_narrow_terminal(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start(columns=32)
    lines = terminal.wait_for(lambda lines: bool(bars(lines)))
    assert len(lines) == 1  # it does not go on in a second line
    (tmp_path / "seen").touch()
    (tmp_path / "over").touch()
    assert terminal.end() == 0
    assert bars(terminal.text.splitlines()) == []


def test_ctrl_c_ends_it_in_one_line_with_the_cursor_there(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.wait_for(lambda lines: bool(bars(lines)))
    terminal.child.sendintr()
    assert terminal.end() == 130
    text = terminal.text
    assert text.removeprefix("^C").startswith("tidemill: stopped by Ctrl-C; what checkpoints hold is kept"), text
    assert bars(text.splitlines()) == []
    assert not terminal.screen.cursor.hidden


def test_a_run_that_is_killed_leaves_the_cursor_there(start: Callable[..., Terminal]) -> None:
    """It has no last word: so the cursor is never hidden."""
    terminal = start()
    terminal.wait_for(lambda lines: bool(bars(lines)))
    terminal.child.kill(9)
    assert terminal.end() == -9
    assert not terminal.screen.cursor.hidden


def test_a_terminal_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    master, slave = os.openpty()
    result = tmp_path / "result"
    with result.open("wb") as out, subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=out, stderr=slave, cwd=ROOT
    ) as child:  # fmt: skip
        os.close(slave)
        seen = b""
        while b"epoch 1 of 2" not in seen:
            seen += os.read(master, 65_536)
        os.close(master)
        (tmp_path / "seen").touch()
        (tmp_path / "over").touch()
        assert child.wait(WAITS) == 0
    assert result.read_text() == 'a print in the middle\n{"version": 0}\n'


def test_a_dumb_terminal_gets_plain_lines(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start(TERM="dumb")
    terminal.wait_for(lambda lines: len(bars(lines)) > 1)
    (tmp_path / "seen").touch()
    (tmp_path / "over").touch()
    assert terminal.end() == 0
    assert b"\x1b" not in terminal.raw


def test_without_a_terminal_there_is_a_line_now_and_then_and_results_alone_on_stdout(tmp_path: Path) -> None:
    result, told = tmp_path / "result", tmp_path / "told"
    with result.open("wb") as out, told.open("wb") as err, subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=out, stderr=err, cwd=ROOT
    ) as child:  # fmt: skip
        wait_until(lambda: len(bars(told.read_text().splitlines())) > 1, seconds=WAITS, what="lines")
        (tmp_path / "seen").touch()
        (tmp_path / "over").touch()
        assert child.wait(WAITS) == 0
    assert result.read_text() == 'a print in the middle\n{"version": 0}\n'
    lines = told.read_text().splitlines()
    assert all(
        re.fullmatch(r"\d\d:\d\d:\d\d (epoch 1 of 2: \d+%, .* rows/s, loss 0.125, .* left|a warning .*)", line)
        for line in lines
    )


# ---- in this process -------------------------------------------------------------------------------------------------
def test_what_takes_no_time_is_not_shown_and_rich_is_not_imported() -> None:
    code = (
        "import sys; from tidemill.flows import display; from tidemill.progress import under_way\n"
        "with display.shown(), under_way('a pass', total=2) as activity: activity.advance(2)\n"
        "assert 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def words(unit: str, total: int | None, **advanced: Any) -> str:
    """How an activity is told that has advanced for 10 seconds."""
    activity = Activity("x", unit, total, ears=(cast(Any, Silent()),))
    activity.began -= 10
    activity.advance(**advanced)
    seen = Shown(activity)
    seen.look(time.monotonic())
    return seen.words


class Silent:
    def on_activity(self, activity: Activity) -> None:
        pass


def test_a_pass_is_told_by_its_share_its_pace_and_the_time_left() -> None:
    assert words("rows", 1000, done=250, loss=lambda: 0.5) == "25%, 25 rows/s, loss 0.5, 30 s left"
    assert words("rows", None, done=250) == "250 rows, 25 rows/s"
    assert words("versions", 10, done=5, rows=0) == "50%, 10 s left"


def test_a_drain_is_told_by_its_shards_what_waits_and_how_far_behind_it_is() -> None:
    written = datetime.now(UTC) - timedelta(minutes=2)
    assert words("shards", 12, done=4, rows=1000, newest=written) == "4 shards, 100 rows/s, 8 waiting, 2:00 behind"
    assert words("shards", 4, done=4, rows=1000, newest=written) == "4 shards, 100 rows/s, nothing waits"
    assert words("shards", None, done=0) == "looking for shards"  # what waits is not known yet


def test_a_notebook_has_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(("update", data["text/plain"]))

    def display_it(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(("display", data["text/plain"]))
        return Handle()

    class ZMQInteractiveShell:
        """As a kernel of Jupyter names it."""

    python = types.ModuleType("IPython")
    python.__dict__.update(get_ipython=ZMQInteractiveShell)
    displays = types.ModuleType("IPython.display")
    displays.__dict__.update(display=display_it)
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", displays)
    monkeypatch.setattr(display, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(display.Notebook, "every", 0.0)
    monkeypatch.setattr(logging.getLogger("tidemill"), "hasHandlers", lambda: False)  # pytest has some
    with display.in_notebook(), under_way("epoch 1 of 2", total=10) as activity:
        assert logging.getLogger("tidemill").isEnabledFor(logging.INFO)
        activity.advance(5)
        activity.advance(5)
    assert [kind for kind, _ in shown] == ["display", "update", "update"]
    assert shown[-1][1].startswith("epoch 1 of 2: 100%, ")


def test_outside_of_a_notebook_a_call_from_python_shows_nothing() -> None:
    with display.in_notebook(), under_way("a pass") as activity:
        assert activity is NOBODY


# ---- words -----------------------------------------------------------------------------------------------------------
def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (-1, 0, 59.4, 60, 3599, 3723)] == [
        "0 s", "0 s", "59 s", "1:00", "59:59", "1:02:03",
    ]  # fmt: skip

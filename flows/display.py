"""What is under way, shown to whoever sits before it: a bar on a terminal, else a line now and then; in a notebook, one line.

It listens to `tidemill.progress`, and writes to stderr alone. In the first second nothing is shown, and rich is not imported.
"""

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TextIO

from tidemill.progress import Activity, listening

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

logger = logging.getLogger("tidemill.progress")

PATIENCE_SECONDS: Final = 1.0
"""What takes less than this is not shown."""
DRAW_SECONDS: Final = 0.2
"""How often a bar, or the line of a notebook, changes."""
LINE_SECONDS: Final = 10.0
"""How often there is a line where there is no terminal."""
PACE_SECONDS: Final = 30.0
"""Rates are of the last so many seconds."""
BAR: Final = (10, 30)
"""A bar has at least and at most so many columns; where there is no room for it, it is left out."""


class StderrHandler(logging.StreamHandler[TextIO]):
    """Log lines to whatever `sys.stderr` is at that moment: above a bar where there is one."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # an attribute there
        return sys.stderr


# ---- words -----------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Shown:
    """An activity, and its pace."""

    activity: Activity
    seen: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(moment, units done, rows), oldest first."""
    words: str = ""
    share: float | None = None
    """How much of it is done, from 0 to 1; None: that cannot be known."""

    def look(self, now: float) -> None:
        """Find the words for how things are."""
        activity = self.activity
        self.seen.append((now, activity.done, activity.rows))
        while now - self.seen[0][0] > PACE_SECONDS:
            self.seen.popleft()
        began, done, rows = self.seen[0] if len(self.seen) > 1 else (activity.began, 0, 0)
        spent = max(now - began, 1e-9)
        units_a_second, rows_a_second = (activity.done - done) / spent, (activity.rows - rows) / spent
        self.share = min(1.0, activity.done / activity.total) if activity.total else None
        self.words = ", ".join(self._facts(units_a_second, rows_a_second))

    def _facts(self, units_a_second: float, rows_a_second: float) -> Iterator[str]:
        activity, left = self.activity, 0
        if activity.unit == "shards" and activity.total is None:
            yield "looking for shards"
            return
        if activity.total is not None:
            left = max(0, activity.total - activity.done)
        if activity.unit == "shards":  # the total grows while shards arrive
            yield f"{activity.done:,} shards"
        elif self.share is not None:
            yield f"{self.share:.0%}"
        else:
            yield f"{activity.done:,} {activity.unit}"
        if activity.rows:
            yield f"{rows_a_second:,.0f} rows/s"
        if activity.unit == "shards":
            yield f"{left:,} waiting" if left else "nothing waits"
            if left and activity.newest is not None:
                yield f"{duration((datetime.now(UTC) - activity.newest).total_seconds())} behind"
            return
        if activity.loss is not None:
            yield f"loss {activity.loss():.4g}"
        if units_a_second > 0 and (left or activity.ahead):
            yield f"{duration((left + activity.ahead) / units_a_second)} left"


def duration(seconds: float) -> str:
    """`8 s`, `4:05`, `1:02:03`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


# ---- what all displays do --------------------------------------------------------------------------------------------
class Display:
    """Follows what is under way."""

    every = DRAW_SECONDS

    def __init__(self) -> None:
        self.shown: tuple[Shown, ...] = ()
        """What is under way, the outermost first; replaced as a whole, as another thread may draw it."""
        self._due = time.monotonic() + max(PATIENCE_SECONDS, self.every)

    def on_activity(self, activity: Activity) -> None:
        known = next((each for each in self.shown if each.activity is activity), None)
        if activity.ended:
            self.shown = tuple(each for each in self.shown if each is not known)
            return
        if known is None:
            known = Shown(activity)
            self.shown = (*self.shown, known)
        if (now := time.monotonic()) >= self._due:
            self._due = now + self.every
            known.look(now)
            self.draw(known)

    def on_event(self, event: object) -> None:
        """Nothing: what happens has its log lines."""

    def draw(self, innermost: Shown) -> None:
        """Show what has just been looked at."""

    def close(self) -> None:
        """Leave nothing behind."""


class Lines(Display):
    """Where there is no terminal: a log line now and then, if anything was done since the last one."""

    every = LINE_SECONDS

    def __init__(self) -> None:
        super().__init__()
        self._told: tuple[Activity | None, int] = (None, 0)

    def draw(self, innermost: Shown) -> None:
        now = (innermost.activity, innermost.activity.done)
        if now != self._told and innermost.activity.done:
            self._told = now
            logger.info("%s: %s", innermost.activity.what, innermost.words)


class Bar(Display):
    """A bar at the foot of a terminal, for each thing under way; log lines and prints stand above it."""

    def __init__(self) -> None:
        super().__init__()
        self._live: Live | None = None

    def draw(self, innermost: Shown) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(
                get_renderable=lambda: self,
                console=console,
                transient=True,
                refresh_per_second=1 / DRAW_SECONDS,
                redirect_stdout=sys.stdout.isatty(),  # results that go into a file stay results
            )
            self._live.start()
            console.show_cursor(True)  # a run that is killed could not bring it back

    def close(self) -> None:
        self.shown = ()
        if (live := self._live) is not None:
            self._live = None
            with contextlib.suppress(OSError):  # the terminal has gone
                live.stop()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        for each in self.shown:
            if each.words:
                yield Text.assemble(*_line(each, options.max_width, ascii_only=options.ascii_only))


def _line(shown: Shown, width: int, *, ascii_only: bool) -> list[tuple[str, str]]:
    """(text, style) of the parts of one line, which is no wider than `width`."""
    spent = duration(time.monotonic() - shown.activity.began)
    what, words = shown.activity.what, f"{shown.words}  [{spent}]"
    room = width - len(what) - len(words) - 3
    if shown.share is None or room < BAR[0]:
        return [(f"{what}  {words}"[: width - 1], "")]
    size = min(room, BAR[1])
    full = round(size * shown.share)
    done, left = ("#", "-") if ascii_only else ("━", "━")
    return [(f"{what} ", ""), (done * full, "green"), (left * (size - full), "bright_black"), (f" {words}", "")]


class Notebook(Display):
    """One line below a cell, that changes."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None

    def draw(self, innermost: Shown) -> None:
        data = {"text/plain": f"{innermost.activity.what}: {innermost.words}"}
        if self._handle is None:
            self._handle = import_module("IPython.display").display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


# ---- which one -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def shown() -> Iterator[None]:
    """While the context is open, what is under way in it is shown on stderr."""
    display = Bar() if is_terminal(sys.stderr) else Lines()
    with listening(display):
        try:
            yield
        finally:
            display.close()


@contextlib.contextmanager
def in_notebook() -> Iterator[None]:
    """In a notebook, what is under way is shown below the cell, and log lines too; elsewhere nothing is."""
    if not is_notebook():
        yield
        return
    handler, tidemill = StderrHandler(), logging.getLogger("tidemill")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    is_seen = tidemill.hasHandlers()
    level = tidemill.level
    if not is_seen:
        tidemill.addHandler(handler)
        tidemill.setLevel(logging.INFO)
    try:
        with listening(Notebook()):
            yield
    finally:
        if not is_seen:
            tidemill.removeHandler(handler)
            tidemill.setLevel(level)


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn there."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def is_notebook() -> bool:
    """Whether this is a kernel of Jupyter: it runs code without a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return any(base.__name__ == "ZMQInteractiveShell" for base in type(shell).__mro__)  # Colab's is derived from it

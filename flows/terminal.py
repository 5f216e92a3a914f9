"""What a terminal sees of a command: results on stdout; log lines, progress and one line for an error on stderr; an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C, 141 whoever read the output has gone, 143 SIGTERM.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Final, NoReturn

from tidemill.flows import torchrun
from tidemill.flows.display import StderrHandler, shown
from tidemill.progress import IN_RESULT


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


_display: Final = contextlib.ExitStack()
"""Shows what is under way, until a result or an error is printed."""


def out(words: str) -> None:
    """Print a result. A reader that has had enough, such as `head`, ends the command without a word."""
    _display.close()
    try:
        print(words, flush=True)
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        _to_nowhere(sys.stdout)
        fail(f"tidemill: the result cannot be written: {error.strerror}. What the command was to do is done", 1)


def clear() -> None:
    """Make room for what is printed again: an empty screen, or where there is none an empty line."""
    out("\x1b[H\x1b[2J" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else "")


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message on stderr."""
    _display.close()
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _to_nowhere(stream: IO[str]) -> None:
    """Let what is still in a stream's buffer go nowhere, or Python complains when it ends."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


_KEPT: Final = {
    "train": "what checkpoints hold is kept, and the same command goes on from the last of them",
    "check": "what it had written is removed, unless a line above says otherwise",
    "follow": "every version that was committed stays, and the same command goes on from there",
}
"""What a signal leaves, by command."""


@contextlib.contextmanager
def attached(command: str, translate: Callable[[Exception], str | None]) -> Iterator[None]:
    """While a command runs: log lines and what is under way go to stderr, a signal or an error ends it in one line, and any name
    can be printed.

    Args:
        command: Its name, for the word of what a signal leaves.
        translate: What errors of Prefect mean; None of those that are bugs, which keep their traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process (`2>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_for_terminal)
    if command == "train":
        handler.addFilter(lambda record: not hasattr(record, IN_RESULT))
    logging.getLogger().addHandler(handler)
    logging.getLogger("tidemill").setLevel(logging.INFO)
    came: list[KeyboardInterrupt] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise came[-1]

    # Off the main thread signals cannot be had. A handler that is there already belongs to whoever called us; a process that
    # a shell started in the background ignores SIGINT, and goes on doing so
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if here}
    ours = [number for number, is_now in before.items() if is_now in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:
        signal.signal(number, interrupt)
    kept = _KEPT.get(command, "the same command may be run again, and finds what was done")
    try:
        _display.enter_context(shown())
        yield
    except KeyboardInterrupt as signalled:
        _stopped(signalled, kept)
    except Exception as error:
        if came or _was_terminated(error):  # what a signal interrupts may end in any error
            _stopped(came[0] if came else Terminated(), kept)
        if (words := _message(error) or translate(error)) is None:
            raise
        fail(f"tidemill: {words}", 1)
    finally:
        _display.close()
        for number in ours:
            signal.signal(number, before[number])
        logging.getLogger().removeHandler(handler)


def end_quietly() -> None:
    """Let a Ctrl-C that comes from now on, while the interpreter ends, end it at once: all is done and told, and a
    KeyboardInterrupt would be a traceback out of whatever is torn down then."""
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _for_terminal(record: logging.LogRecord) -> bool:
    """Of Prefect's own records, only what is meant for the terminal: the others tell of states, which the UI shows, and of
    errors and of a server that has gone, which are told once, at the end. So is what the clouds' clients warn of."""
    if record.name.startswith(("prefect.events", "EventsWorker", "APILogWorker", "azure.", "google.")):
        return False
    if record.name.startswith("prefect.") and record.getMessage().startswith("Crash detected!"):
        return False
    return not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")) or not getattr(
        record, "send_to_api", True
    )


def _was_terminated(error: BaseException) -> bool:
    """Whether an error came while Prefect, which takes SIGTERM itself during a flow run, let it end the run: where a task is only
    about to start, Prefect fails of that."""
    if (exceptions := sys.modules.get("prefect.exceptions")) is None:
        return False
    before: BaseException | None = error
    while before is not None and not isinstance(before, exceptions.TerminationSignal):
        before = before.__cause__ or before.__context__
    return before is not None


def _stopped(by: KeyboardInterrupt, kept: str) -> NoReturn:
    """End a command that a signal ended; `kept` says what is not lost, and how to go on."""
    number, name = (signal.SIGTERM, "SIGTERM") if isinstance(by, Terminated) else (signal.SIGINT, "Ctrl-C")
    if torchrun.starts_again():
        fail(
            "tidemill: this rank ends, as where another one has died: then all are started again and go on from what is stored",
            128 + number,
        )
    fail(f"tidemill: stopped by {name}; {kept}", 128 + number)


def _message(error: Exception) -> str | None:
    """All that a user needs to know of an error of ours; None for other errors."""
    from tidemill.storage.errors import StorageError
    from tidemill.tasks.errors import (
        CannotExport,
        CannotPublish,
        CannotServe,
        GateClosed,
        MissingExtra,
        RanksDiffer,
        RanksRefused,
    )
    from tidemill.tasks.training.errors import TrainingError

    ours = StorageError | TrainingError | GateClosed | CannotExport | CannotPublish | CannotServe | MissingExtra
    ours |= RanksDiffer | RanksRefused
    if isinstance(error, ours):
        return str(error)
    if isinstance(error, FileNotFoundError) and not _folder_is_there():
        return "the current folder has been removed: go to another one, and run the command again"
    return None


def _folder_is_there() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True

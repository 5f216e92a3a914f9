"""`--ranks N`: a command by N processes of this machine, which torchrun starts, and starts again when one of them dies.

Light commands import this. As a program (`python -m tidemill.flows.torchrun`) it is torchrun itself, told to end with whoever
started it, and quiet where torchrun would print a traceback of its own.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from subprocess import Popen

    from tidemill.tasks.ranks.launched import Backend, Place

MAX_RESTARTS: Final = 10
"""How often the ranks are started again after one has died."""
ENDING_SECONDS: Final = 600
"""How long the step in hand may take after a signal; then torchrun kills."""
CREW_SECONDS: Final = 30.0
"""How long the crew may take to end after the leader."""
_LOOK_SECONDS: Final = 0.5
RESULT: Final = "TIDEMILL_RANK_RESULT"
"""The variable that names the file in which the leader leaves the exit code of the command."""


def entered(ranks: int, backend: "Backend") -> "Place | None":
    """The place of this process among those that a launcher has started; None: none has.

    Raises:
        RanksRefused: it has started another number of them than `--ranks` says, or in a way in which they cannot work; or they
            could not, were `--ranks` to start them.
    """
    from tidemill.tasks.errors import RanksRefused
    from tidemill.tasks.ranks import launched

    if ranks > 1 and backend == "horovod":
        raise RanksRefused(
            "--ranks starts torchrun: with --backend horovod let horovodrun start this command, without it"
        )
    place = launched.enter(backend)
    if place is None and ranks > 1:
        launched.timeout_seconds()  # else each of them would fail of it, again and again
    if place is not None and ranks not in (1, place.size):
        raise RanksRefused(
            f"--ranks is {ranks}, and the launcher has started {place.size} processes: leave --ranks out"
        )
    return place


def run(ranks: int, arguments: Sequence[str]) -> int:
    """Run the command with these arguments as so many ranks. Returns its exit code: the leader's.

    The first SIGTERM or Ctrl-C asks the leader to stop after the step in hand; the second kills all ranks, which is safe too.
    If this process dies, torchrun and the ranks end as well.
    """
    import subprocess  # here, because light commands import this module
    import tempfile

    # -P: modules of the current folder must not stand before those of Python and torch
    python = [sys.executable, "-P", "-m"]
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={MAX_RESTARTS}", "--no-python"]
    with tempfile.TemporaryDirectory(prefix="tidemill-") as folder:
        result = Path(folder) / "exit-code"
        process = subprocess.Popen(
            [*python, "tidemill.flows.torchrun", *options, *python, "tidemill", *arguments],
            env=_environment() | {RESULT: str(result)},
            start_new_session=True,  # Ctrl-C is for this process alone, which passes it on
        )
        asked = 0  # the signal that has asked the command to stop

        def pass_on(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            if asked:
                _kill(process.pid)
            else:
                was_asked(result).touch()
                process.send_signal(signal.SIGTERM)
            asked = number

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = _awaited(process, result)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if result.exists():
            return int(result.read_text())
        return 128 + asked if asked else code or 1


def _awaited(process: "Popen[bytes]", result: Path) -> int:
    """The exit code of torchrun. A crew that does not hear of the leader's end, as one that still waits for it, is killed."""
    from subprocess import TimeoutExpired

    ended: float | None = None
    while True:
        with suppress(TimeoutExpired):
            return process.wait(_LOOK_SECONDS)
        if ended is None and result.exists():
            ended = time.monotonic()
        if ended is not None and time.monotonic() - ended > CREW_SECONDS:
            _kill(process.pid)


def _environment() -> dict[str, str]:
    from tidemill.tasks.ranks import launched

    found = dict(os.environ)
    found[launched.SHARED_STORE] = "1"
    # As torchrun does by itself, with a warning. Bits depend on it: with `parts` they are those of one process with one thread
    found.setdefault("OMP_NUM_THREADS", "1")
    found.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(ENDING_SECONDS))
    return found


def _kill(launcher: int) -> None:
    """Kill a launcher, so that it starts nobody again, and the ranks, each of which has a session of its own."""
    with suppress(FileNotFoundError):
        ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for process in (launcher, *map(int, ranks)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def starts_again() -> bool:
    """Whether a signal that ends this process is torchrun's, which ends all ranks when one has died: nobody has asked `run`,
    which has started them, to stop."""
    if (file := os.environ.get(RESULT)) is None:
        return False
    from tidemill.tasks.ranks import launched

    return launched.place() is not None and not was_asked(Path(file)).exists()


def was_asked(result: Path) -> Path:
    """The file beside that of the exit code that is there once somebody has asked the command to stop."""
    return result.with_name("asked-to-stop")


def left_for_launcher(code: int) -> int:
    """The exit code with which a process ends whose command ends with this one.

    A leader that `run` has started leaves the code to it, and ends without one: torchrun takes any for a death, and would start
    the command again, which would fail again. A leader that is ended to be started again leaves none.
    """
    if (file := os.environ.get(RESULT)) is None:
        return code
    from tidemill.tasks.ranks import launched

    if (place := launched.place()) is None or not place.leads:
        return code
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT) and starts_again():
        return code
    Path(file).write_text(str(code))
    return 0


def main() -> None:
    """Be torchrun."""
    from tidemill.tasks.ranks import launched

    launched.end_with_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except SignalException as signalled:
        raise SystemExit(128 + signalled.sigval) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
        raise SystemExit(f"tidemill: ranks have died {MAX_RESTARTS + 1} times, at last rank {rank} by {how}") from None


if __name__ == "__main__":
    main()

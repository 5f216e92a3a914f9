"""The `tidemill` command: the list of its commands, which live in `commands/`, and its entry point.

Imports of torch, Prefect and the stores stand inside the commands: `tidemill --help` answers at once. Results go to stdout,
progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import atexit
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from gc import freeze
from typing import Final

from cyclopts import App, Parameter

from tidemill.flows import launch, terminal, torchrun
from tidemill.flows.usage import called

app = App(
    name="tidemill",
    version=lambda: importlib.metadata.version("tidemill"),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
    help="""Train a PyTorch model from Parquet on object storage: in batch, then online, exactly once.

    REGISTRY, DATASET and INBOX are URLs: a local folder (./x, /x, file:///x), s3://bucket/prefix, gs://bucket/prefix or
    az://container/prefix. S3 is configured by the standard AWS variables and profiles (AWS_ENDPOINT_URL_S3, AWS_PROFILE,
    AWS_ACCESS_KEY_ID, ...), the others by Google's and Azure's.

    A first session:

        tidemill train ./data ./registry flights --spec spec.yaml
        tidemill follow ./inbox ./registry flights --mode drain
        tidemill status ./registry flights --inbox ./inbox
    """,
)
# By import path: a command is imported when it is called, so that `log` does not wait for what `compare` needs.
_COMMANDS: Final = "tidemill.flows.commands"
app.command(
    f"{_COMMANDS}.running:train",
    usage="Usage: tidemill train DATASET REGISTRY MODEL (--target COLUMN | --spec FILE) [--features COLUMN...] [OPTIONS]",
)
app.command(
    f"{_COMMANDS}.running:follow",
    usage="Usage: tidemill follow INBOX REGISTRY MODEL [OPTIONS] | tidemill follow --pairs FILE [OPTIONS]",
)
app.command(
    f"{_COMMANDS}.reading:status",
    usage="Usage: tidemill status REGISTRY [MODEL] [OPTIONS] | tidemill status --pairs FILE [OPTIONS]",
)
app.command(f"{_COMMANDS}.reading:history", name="log")
app.command(f"{_COMMANDS}.reading:show")
app.command(f"{_COMMANDS}.running:predict")
app.command(f"{_COMMANDS}.serving:serve")
app.command(f"{_COMMANDS}.exporting:export")
app.command(f"{_COMMANDS}.publishing:publish")
app.command(f"{_COMMANDS}.reading:report")
app.command(f"{_COMMANDS}.reading:audit")
app.command(f"{_COMMANDS}.checking:check")
app.command(f"{_COMMANDS}.choosing:compare")
app.command(f"{_COMMANDS}.choosing:backtest")
app.command(f"{_COMMANDS}.changing:promote")
app.command(f"{_COMMANDS}.changing:rollback")
app.command(f"{_COMMANDS}.changing:requeue")
app.command(f"{_COMMANDS}.changing:gc")


def main(tokens: Iterable[str] | None = None) -> None:
    """Entry point of `tidemill` and of `python -m tidemill`."""
    # Else the interpreter, when it ends, searches all that torch and Prefect have made for cycles: more than a second.
    # Registered before Prefect registers what it sends at exit, this runs after it
    atexit.register(freeze)
    # Before torch is loaded. Else its threads spin while they wait for each other: on a busy machine a small net then takes
    # many times the CPU. How they wait changes no bit
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = list(sys.argv[1:] if tokens is None else tokens)
    try:
        with terminal.attached(arguments[0] if arguments else "", launch.explained):
            called(app, arguments)
    except SystemExit as end:
        code = torchrun.left_for_launcher(end.code if isinstance(end.code, int) else 0)
        launch.part(code)
        raise SystemExit(code) from None
    finally:
        if tokens is None:  # nothing comes after this but the end, which first waits for threads
            terminal.end_quietly()
        else:
            atexit.register(terminal.end_quietly)  # the last that is registered runs first

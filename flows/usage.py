"""What a command line and the file behind `train --spec` ask for, and what is wrong with them.

The settings are imported where something is wrong: a light command does not wait for them.
"""

import difflib
import itertools
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError
from cyclopts.config import Dict as ConfigDict
from cyclopts.help import format_usage

from tidemill.flows import terminal

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class UsageError(Exception):
    """The command line asks for something that cannot be."""


def spec_file(tokens: Sequence[str]) -> list[Callable[..., Any]]:
    """What the file behind `train --spec` says, as defaults of the flags: a configuration for cyclopts.

    Raises:
        UsageError: it cannot be read, or is no mapping.
    """
    if not tokens or tokens[0] != "train":
        return []
    for token in tokens:
        if token.startswith(("--model.arguments.", "--optimizer.arguments.", "--schedule.arguments.")):
            flag, _, name = token.partition("=")[0].rpartition(".")
            raise UsageError(f"""{token}: give all arguments as one JSON object: {flag} '{{"{name}": ...}}'""")
    path = next((value for flag, value in itertools.pairwise(tokens) if flag == "--spec"), None)
    path = next((token.removeprefix("--spec=") for token in tokens if token.startswith("--spec=")), path)
    if path is None:
        return []
    from tidemill.flows.specfile import read

    try:
        fields = read(path)
    except ValueError as error:
        raise UsageError(f"--spec {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"--spec {path} must hold one mapping of settings: features: [...], target: ..., and so on")
    fields = {str(name): value for name, value in fields.items() if value is not None}
    for part in ("model", "optimizer", "schedule"):
        if isinstance(inner := fields.get(part), dict) and "arguments" in inner:
            try:
                # cyclopts would make flags out of a mapping
                fields[part] = inner | {"arguments": json.dumps(inner["arguments"])}
            except TypeError as error:
                raise UsageError(f"--spec {path}: {part}.arguments cannot be written as JSON: {error}") from error
    return [ConfigDict({"train": fields}, source=path)]


given: ContextVar[tuple[str, ...]] = ContextVar("given")
"""The command line, for a command that is run by other processes."""


def called(app: App, arguments: list[str]) -> None:
    """Run the command that a command line asks for. What is wrong with it is told, with how it should look: exit code 2."""
    given.set(tuple(arguments))
    try:
        app.config = spec_file(arguments)
        app(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        terminal.fail(explain(app, error), 2)
    except UsageError as error:
        terminal.fail(f"tidemill: {error}", 2)


def explain(app: App, error: CycloptsError) -> str:
    """What is wrong with a command line, by the names of its flags, and how it should look."""
    from pydantic import ValidationError

    chain = list(error.command_chain or ())
    program = " ".join(["tidemill", *chain])
    if isinstance(error.__cause__, ValidationError):
        found = error.__cause__.errors()
        # A list whose parts are wrong is then said to be too short as well
        parts = {details["loc"][:at] for details in found for at in range(1, len(details["loc"]))}
        problems = [
            _problem(details) for details in found if details["type"] != "too_short" or details["loc"] not in parts
        ]
    elif isinstance(error, MissingArgumentError) and error.argument is not None:
        problems = [_missing(error.argument.name)]
    elif isinstance(error, UnknownOptionError) and error.token.source not in ("", "cli"):
        problems = [_unknown(error.token.source, error.token.keyword or error.token.value)]
    elif isinstance(error, UnusedCliTokensError):
        more = " ".join(error.unused_tokens or ())
        hint = "A shell makes many arguments of a pattern such as *.parquet: give the folder"
        problems = [f"{more} is more than it takes. ({hint})"]
    else:
        problems = [str(error)]
    usage = (app[chain[0]].usage if chain else None) or format_usage(app, chain).plain.strip()
    lines = [f"{program}: {problem}" for problem in problems]
    return "\n".join([*lines, f"Usage: {usage.removeprefix('Usage: ')}", f"`{program} --help` explains it."])


def _missing(name: str) -> str:
    from tidemill.tasks.training.spec import Spec

    of_spec = name.startswith("--") and name.partition(".")[0].removeprefix("--").replace("-", "_") in Spec.model_fields
    if of_spec:
        return f"{name} is missing: give it as a flag, or in the file that --spec names"
    return f"{name} must be given, with a value" if name.startswith("--") else f"{name} is missing"


def _unknown(file: str, keys: str) -> str:
    """A setting that the spec does not have; keys such as `[model][factry]`."""
    from tidemill.tasks.training.spec import Spec

    name = keys.strip("[]").replace("][", ".")
    nearest = difflib.get_close_matches(
        name, [*Spec.model_fields, "model.factory", "model.arguments", "optimizer.name", "schedule.name"]
    )
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{file} holds {name!r}, which is no setting{hint}"


def _problem(details: "ErrorDetails") -> str:
    """One of pydantic's complaints, by the name of its flag."""
    from tidemill.tasks.settings import TAGS
    from tidemill.tasks.training.spec import EPOCHS_TAGS

    message = details["msg"].removeprefix("Value error, ")
    if not (
        loc := [str(part) for part in details["loc"] if part not in (*TAGS, *EPOCHS_TAGS)]
    ):  # of the settings together
        return message
    flag = "--" + ".".join(loc).replace("_", "-")
    if details["type"] == "missing":
        return _missing(flag)
    if details["type"] == "value_error":
        return f"{flag}: {message}"
    if flag in (
        parts := {"--model": "--model.factory", "--optimizer": "--optimizer.name", "--schedule": "--schedule.name"}
    ):
        return f"{flag} is set by its parts, such as {parts[flag]}"
    return f"{flag}: {message[:1].lower()}{message[1:]}, not {details['input']!r}"

"""The settings of the flows as flags of the command line, and the file behind `train --spec`."""

import difflib
import itertools
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownOptionError, UnusedCliTokensError
from cyclopts.config import Dict as ConfigDict
from cyclopts.help import format_usage
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError

from tidemill.flows import terminal
from tidemill.tasks.settings import TAGS, OnlineSettings
from tidemill.tasks.training.spec import BY_RECIPE, EPOCHS_TAGS, RECIPE, FeatureList, Model, Optimizer, Schedule, Spec

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class UsageError(Exception):
    """The command line asks for something that cannot be."""


def _mapping(given: object) -> object:
    if not isinstance(given, dict):  # cyclopts has parsed text that starts with {
        raise ValueError(  # noqa: TRY004  # pydantic reports no TypeError
            f'give one JSON object, such as {{"name": 1}}, not {given}'
        )
    return given


def _listed(given: object) -> object:
    return (given,) if isinstance(given, str) else given


def _weights(given: tuple[object, ...] | None) -> object:
    """A list of flags as the spec has it: the word, or numbers."""
    if given is not None and len(given) > 1 and "balanced" in given:
        raise ValueError("balanced stands alone: give it, or a number for each class")
    return "balanced" if given == ("balanced",) else given


def _weight(given: object) -> object:
    if given == "balanced":
        return given
    try:
        weight = float(given)  # type: ignore[arg-type]  # whatever it is
    except (TypeError, ValueError):
        weight = -1.0
    if not weight >= 0:
        raise ValueError(f"give balanced, or a number of at least 0 for each class, not {given}")
    return weight


# cyclopts takes Any as one JSON value. Of dict[str, JsonValue] it would make flags out of the insides of JsonValue.
_Json = Annotated[Any, BeforeValidator(_mapping)]


class _ModelFlags(Model):
    arguments: _Json = Field(
        default_factory=dict, description="""Keyword arguments of the factory, as JSON: '{"hidden": [64, 32]}'."""
    )


class _OptimizerFlags(Optimizer):
    arguments: _Json = Field(
        default_factory=dict,
        description="""Its keyword arguments other than the learning rate, as JSON: '{"momentum": 0.9}'.""",
    )


class _ScheduleFlags(Schedule):
    arguments: _Json = Field(
        default_factory=dict,
        description="""Its keyword arguments, in gradient steps, as JSON: '{"T_max": 1000}'.""",
    )


class SpecFlags(Spec):
    """The spec, with what is hard to say in flags as JSON."""

    features: Annotated[FeatureList, Parameter(show_default=lambda _: "*")] = Field(
        default=Spec.model_fields["features"].default,
        min_length=1,
        description=Spec.model_fields["features"].description,
    )
    target: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)] = Field(
        min_length=1, description=Spec.model_fields["target"].description
    )
    class_weights: Annotated[
        tuple[Annotated[Any, BeforeValidator(_weight)], ...] | None,
        BeforeValidator(_listed),
        AfterValidator(_weights),
        PlainSerializer(lambda given: given),
        Parameter(metavar="balanced|NUMBER"),
    ] = Field(default=None, description=Spec.model_fields["class_weights"].description)
    model: _ModelFlags = Field(default_factory=_ModelFlags)
    optimizer: _OptimizerFlags = Field(default_factory=_OptimizerFlags)
    schedule: _ScheduleFlags | None = Field(default=None)

    def spec(self, *, from_file: bool = True) -> Spec:
        """What was asked for, as Python and files say it: a single target is a word.

        Where no file stands behind it and nothing is said of what a recipe chooses, the recipe is asked for.
        """
        asked = self.model_dump() | {"target": self.target[0] if len(self.target) == 1 else self.target}
        if not from_file and self.recipe is None and not self.model_fields_set & set(BY_RECIPE):
            asked["recipe"] = RECIPE
        return Spec.model_validate(asked)


class FollowFlags(OnlineSettings):
    """The online settings, following by default."""

    mode: Literal["drain", "follow"] = Field(
        default="follow", description="drain: train on all shards that are there, then stop. follow: go on polling."
    )

    def settings(self) -> OnlineSettings:
        return OnlineSettings.model_validate(self.model_dump())


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
    chain = list(error.command_chain or ())
    program = " ".join(["tidemill", *chain])
    if isinstance(error.__cause__, ValidationError):
        problems = [_problem(details) for details in error.__cause__.errors()]
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
    of_spec = name.startswith("--") and name.partition(".")[0].removeprefix("--").replace("-", "_") in Spec.model_fields
    if of_spec:
        return f"{name} is missing: give it as a flag, or in the file that --spec names"
    return f"{name} must be given, with a value" if name.startswith("--") else f"{name} is missing"


def _unknown(file: str, keys: str) -> str:
    """A setting that the spec does not have; keys such as `[model][factry]`."""
    name = keys.strip("[]").replace("][", ".")
    nearest = difflib.get_close_matches(
        name, [*Spec.model_fields, "model.factory", "model.arguments", "optimizer.name", "schedule.name"]
    )
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{file} holds {name!r}, which is no setting{hint}"


def _problem(details: "ErrorDetails") -> str:
    """One of pydantic's complaints, by the name of its flag."""
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

"""What commands share: their arguments, the log that they read, and how they print."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter, Token
from cyclopts.validators import Number
from pydantic import BaseModel

from tidemill.flows import terminal, views
from tidemill.flows.usage import UsageError

if TYPE_CHECKING:
    from tidemill.storage.log import VersionLog
    from tidemill.tasks.tenants.pairs import Pair


def _whole(hint: object, tokens: Sequence[Token]) -> int:
    """cyclopts would round 2.5 to 2."""
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        raise ValueError(f"{token.value!r} is no whole number") from None


AT_LEAST_ONE: Final = Parameter(converter=_whole, validator=Number(gte=1))
"""Of a whole number."""
AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON document instead of text.")]
Registry = Annotated[str, Parameter(help="URL below which models live.")]
Dataset = Annotated[str, Parameter(help="URL of a folder of Parquet files, or of a single one.")]
Inbox = Annotated[str, Parameter(help="URL where producers drop Parquet shards.")]
Name = Annotated[str, Parameter(help="Name of the model in the registry.")]
Which = Annotated[str, Parameter(help="A version's number, an alias such as champion, or head.")]
PairsFile = Annotated[
    Path | None,
    Parameter(
        "--pairs", help="YAML or JSON file with a list of pairs of inbox, registry and model, in place of one of each."
    ),
]
Alias = Annotated[str, Parameter(help="The alias to move.")]


def opened(registry: str, model: str, *, writable: bool = False) -> "VersionLog":
    """The version log of a model; with `writable`, one that may be written."""
    from tidemill.storage.log import open_log

    return open_log(registry, model, writable=writable)


def tell(view: views.View, as_json: bool) -> None:
    """Print what a command found, in words or as one JSON document."""
    facts, words = view
    if as_json:
        words = facts.model_dump_json() if isinstance(facts, BaseModel) else json.dumps(facts)
    terminal.out(words)


def read_pairs(file: Path) -> "tuple[Pair, ...]":
    """The pairs of the file behind `--pairs`.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    from tidemill.flows.specfile import read
    from tidemill.tasks.tenants.pairs import pairs_of

    try:
        return pairs_of(read(str(file)), str(file))
    except ValueError as error:
        raise UsageError(f"--pairs {error}") from error

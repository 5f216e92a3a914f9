"""Who there is: pairs of an inbox and a model, as a file says them, and what may not be between two of them."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tidemill.storage.chain import NAME
from tidemill.storage.crowding import crowded
from tidemill.storage.errors import InvalidURL, PlacesOverlap
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings

OF_ALL: Final = ("mode", "stop_after_seconds", "metrics_file", "port")
"""Settings of the process, which no pair can have for itself."""
PAGES: Final = ("health", "metrics")
"""What `/NAME` of a run's port answers for the whole run."""
_PYTHON: Final = re.compile(r" or instance of \w+")
"""What pydantic says of mappings, and who writes a file cannot do."""


class Pair(BaseModel):
    """An inbox, and the model that is trained on what arrives there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inbox: str
    """URL where producers drop Parquet shards."""
    registry: str
    """URL below which the model lives."""
    model: str = Field(pattern=f"^{NAME.pattern}$")
    """Its name there. It must exist."""
    name: str = Field(default="", pattern=f"^({NAME.pattern})?$")
    """What it is called in log lines, metrics and reports, where two have models of one name; by default as its model."""
    settings: dict[str, Any] = {}
    """Its own settings, in place of those for all: fields of `OnlineSettings`, such as
    `{"after_commit": {"archive_to": "s3://bucket/archive/a"}}`."""

    @property
    def called(self) -> str:
        """`name`, or the name of its model."""
        return self.name or self.model

    @model_validator(mode="after")
    def _settings(self) -> Self:
        if of_all := [name for name in OF_ALL if name in self.settings]:
            raise ValueError(f"{', '.join(of_all)} can only be set for all pairs together: give it beside the file")
        self.among(OnlineSettings())
        return self

    def among(self, settings: OnlineSettings) -> OnlineSettings:
        """The settings of its run, where these are those of all.

        Raises:
            ValidationError: its own settings are none, or do not go with those of all.
        """
        return OnlineSettings.model_validate(_merged(settings.model_dump(), self.settings))


_PAIRS: Final = TypeAdapter(tuple[Pair, ...])


class PairsError(ValueError):
    """A list of pairs cannot be used. The message is one line."""


def pairs_of(given: object, where: str) -> tuple[Pair, ...]:
    """The pairs that a file holds: a list of mappings with the fields of `Pair`. `where` names the file in messages.

    Raises:
        PairsError: it is none, or two pairs have one name.
    """
    if not isinstance(given, list) or not given:
        raise PairsError(f"{where} must hold one list of pairs, each with inbox, registry and model")
    try:
        pairs = _PAIRS.validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        at = "".join(f", {part}" for part in first["loc"][1:])
        message = _PYTHON.sub("", first["msg"].removeprefix("Value error, ").splitlines()[0])
        raise PairsError(f"{where}, pair {int(first['loc'][0]) + 1}{at}: {message}") from error
    try:
        _check_names(pairs)
    except PairsError as error:
        raise PairsError(f"{where}: {error}") from error
    return pairs


def _check_names(pairs: Sequence[Pair]) -> None:
    """Raises PairsError: two are called the same."""
    names = set[str]()
    for pair in pairs:
        if pair.called in names:
            raise PairsError(f"two pairs are called {pair.called!r}: give one of them another name (the field `name`)")
        names.add(pair.called)


def check(pairs: Sequence[Pair], settings: OnlineSettings) -> dict[str, OnlineSettings]:
    """Make sure that no pair can do harm to another; nothing is read but folders. Returns the settings of each, by its name.

    Raises:
        PairsError: two have one name, or are the same model; or settings do not go together, or a name with the port.
        PlacesOverlap: what arrives for one would be taken for another's: an inbox is, holds or lies in a place of another.
        InvalidURL: a URL names no store.
    """
    _check_names(pairs)
    own: dict[str, OnlineSettings] = {}
    inboxes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    places: dict[str, list[tuple[str, str]]] = {}
    models: dict[tuple[str, str], str] = {}
    for pair in pairs:
        name = pair.called
        if settings.port is not None and name in PAGES:
            raise PairsError(
                f"a pair is called {name!r}, and /{name} of the port is of all pairs: give it another name (the field `name`)"
            )
        try:
            own[name] = pair.among(settings)
        except ValidationError as error:
            raise PairsError(f"pair {name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        registry = _url(name, "the registry", pair.registry)
        if (twin := models.setdefault((registry, pair.model), name)) != name:
            raise PairsError(
                f"{twin} and {name} are one model, {registry}/{pair.model}: they would only race each other"
            )
        inbox = _url(name, "the inbox", pair.inbox)
        inboxes[inbox].append((name, "the inbox"))
        places[name] = [("the registry", registry), *_others(name, own[name])]
        if (labels := own[name].labels) is not None:
            url = _url(name, "the labels inbox", labels.inbox)
            if url == inbox:
                raise PlacesOverlap(
                    f"the labels inbox of {name} is its inbox, {inbox}: choose places that lie beside each other."
                )
            inboxes[url].append((name, "the labels inbox"))
    for url, readers in inboxes.items():
        if len(readers) > 1 and any(own[name].after_commit != "keep" for name, _ in readers):
            raise PlacesOverlap(
                f"{readers[0][0]} and {readers[1][0]} have one inbox, {url}: the first to train on a shard removes it. Give each "
                "an inbox of its own, or let all that share it keep what they have trained on (after_commit: keep)."
            )
    _keep_apart(inboxes, places)
    return own


def _keep_apart(
    inboxes: Mapping[str, Sequence[tuple[str, str]]], places: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Raises PlacesOverlap: an inbox is, holds or lies in another place, which may be another's."""
    others: dict[str, tuple[str, str]] = {}
    for name, named in places.items():
        for what, url in named:
            others.setdefault(url, (name, what))
    for inbox, lies, url in crowded(list(inboxes), list(others)):
        (name, what), (whose, place) = inboxes[inbox][0], others.get(url) or inboxes[url][0]
        raise PlacesOverlap(
            f"{what} of {name}, {inbox}, {lies.value} {place} of {whose}, {url}: whatever "
            "lies below an inbox is taken for shards and removed; choose places that lie beside each other."
        )


def _url(name: str, what: str, given: str) -> str:
    """The URL of the store of a place of the pair of this name. Raises InvalidURL: it names none."""
    try:
        return open_store(given).url
    except InvalidURL as error:
        raise InvalidURL(f"{what} of {name}: {error}") from error


def _others(name: str, settings: OnlineSettings) -> list[tuple[str, str]]:
    """(what it is, URL) of the places that the settings of a pair name beside the inboxes."""
    named = {
        "the archive": settings.archive_to,
        "the holdout": settings.gate.holdout_dataset,
        "the dataset": settings.gate.retrain_on,
    }
    return [(what, _url(name, what, url)) for what, url in named.items() if url is not None]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged

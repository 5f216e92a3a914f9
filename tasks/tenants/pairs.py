"""Who there is: pairs of an inbox and a model, as a file says them, and what may not be between two of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tidemill.storage.chain import NAME
from tidemill.storage.crowding import crowded
from tidemill.storage.errors import PlacesOverlap
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings

OF_ALL: Final = ("mode", "stop_after_seconds", "metrics_file", "port")
"""Settings of the process, which no pair can have for itself."""


class Pair(BaseModel):
    """An inbox, and the model that is trained on what arrives there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inbox: str
    """URL where producers drop Parquet shards."""
    registry: str
    """URL below which the model lives."""
    model: str
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
        PairsError: it is none, or two pairs may not stand beside each other.
    """
    if not isinstance(given, list) or not given:
        raise PairsError(f"{where} must hold one list of pairs, each with inbox, registry and model")
    try:
        pairs = _PAIRS.validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        at = "".join(f", {part}" for part in first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ").splitlines()[0]
        raise PairsError(f"{where}, pair {int(first['loc'][0]) + 1}{at}: {message}") from error
    return pairs


def check(pairs: Sequence[Pair], settings: OnlineSettings) -> dict[str, OnlineSettings]:
    """Make sure that no pair can do harm to another; nothing is read but folders. Returns the settings of each, by its name.

    Raises:
        PairsError: two have one name, or are the same model; or settings do not go together.
        PlacesOverlap: what arrives for one would be taken for another's: an inbox is, holds or lies in a place of another.
        InvalidURL: a URL names no store.
    """
    own: dict[str, OnlineSettings] = {}
    inboxes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    places: dict[str, list[tuple[str, str]]] = {}
    models: dict[tuple[str, str], str] = {}
    for pair in pairs:
        name = pair.called
        if name in own:
            raise PairsError(f"two pairs are called {name!r}: give one of them another name (the field `name`)")
        try:
            own[name] = pair.among(settings)
        except ValidationError as error:
            raise PairsError(f"pair {name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        registry = open_store(pair.registry).url
        if (twin := models.setdefault((registry, pair.model), name)) != name:
            raise PairsError(
                f"{twin} and {name} are one model, {registry}/{pair.model}: they would only race each other"
            )
        inbox = open_store(pair.inbox).url
        inboxes[inbox].append((name, "the inbox"))
        places[name] = [("the registry", registry), *_others(own[name])]
        if (labels := own[name].labels) is not None:
            inboxes[open_store(labels.inbox).url].append((name, "the labels inbox"))
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


def _others(settings: OnlineSettings) -> list[tuple[str, str]]:
    """(what it is, URL) of the places that settings name beside the inboxes."""
    named = {
        "the archive": settings.archive_to,
        "the holdout": settings.gate.holdout_dataset,
        "the dataset": settings.gate.retrain_on,
    }
    return [(what, open_store(url).url) for what, url in named.items() if url is not None]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged

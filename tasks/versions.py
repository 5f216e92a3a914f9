"""From a version in the log to a learner in memory."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject
from tidemill.storage.log import VersionLog
from tidemill.tasks.training.imports import ALLOWED_MODULES, check_allowed
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.spec import Spec

T = TypeVar("T")

READ_AS: Final = ("family", "width")
"""What `resolved_spec` says of each feature beside its settings."""
LABELS: Final = "labels"
"""What `resolved_spec` says of the target beside the settings: its labels, in the order of their class numbers."""


def load_learner(log: VersionLog, version: Version, device: str = "cpu", *, allowed: Sequence[str] = ()) -> Learner:
    """The learner exactly as it was committed, on a device as in `Learner.create`; blobs are verified before they are parsed.

    What the spec names by import path must be below `allowed`, or below what the environment allows.

    Raises:
        UnknownVersion: retention has removed the blobs.
        CorruptObject: a blob's bytes are not those that were committed.
        FactoryError: the spec names a factory outside of the modules that the environment allows, or one that fails.
        StateMismatch: the model's code no longer fits its weights.
    """
    return _loaded(log, version, allowed, Learner.load, device)


def load_frozen(log: VersionLog, version: Version, device: str = "cpu", *, allowed: Sequence[str] = ()) -> Network:
    """What a version serves, without what only training needs.

    What the spec names by import path must be below `allowed`, or below what the environment allows.

    Raises:
        UnknownVersion, CorruptObject, FactoryError, StateMismatch: as `load_learner`.
    """
    return _loaded(log, version, allowed, Network.load, device)


def _loaded(log: VersionLog, version: Version, allowed: Sequence[str], load: Callable[..., T], device: str) -> T:
    """What `load` makes of (spec, weights, state, device), all of it verified."""
    spec = spec_of(log, version)
    check_environment_allows(spec, allowed)
    blobs = version.manifest.blobs
    return log.read_blobs((blobs.weights, blobs.state), lambda weights, state: load(spec, weights, state, device))


def check_environment_allows(spec: Spec, allowed: Sequence[str] = ()) -> None:
    """Raises FactoryError: the spec names code that is neither below `allowed` nor below what the environment allows."""
    named = (part.strip() for part in os.environ.get(ALLOWED_MODULES, "").split(","))
    check_allowed(spec, [*allowed, *filter(None, named)])


def resolved_spec(learner: Learner) -> dict[str, Any]:
    """The learner's spec with what it leaves to defaults and to the data filled in: the loss, how features are read, labels."""
    resolved = learner.spec.model_dump(mode="json") | {"loss": learner.spec.loss_name}
    read_as = [{"family": column.family, "width": column.width} for column in learner.features.columns]
    resolved["features"] = [asked | read for asked, read in zip(resolved["features"], read_as, strict=True)]
    labels = learner.features.labels
    return resolved if labels is None else resolved | {LABELS: list(labels)}


def spec_of(log: VersionLog, version: Version) -> Spec:
    """The spec that a version is trained by: the resolved one.

    Raises:
        CorruptObject: it is no spec.
    """
    try:
        return resolved_of(version)
    except ValidationError as error:
        raise _corrupt(log, version, error) from error


def resolved_of(version: Version) -> Spec:
    """The same. Raises ValidationError."""
    resolved = version.manifest.resolved_spec
    if resolved is None:  # of format 1
        return Spec.model_validate(version.manifest.spec)
    asked = {name: value for name, value in resolved.items() if name != LABELS}
    if isinstance(columns := asked.get("features"), list):
        asked["features"] = [_asked(column) if isinstance(column, dict) else column for column in columns]
    return Spec.model_validate(asked)


def asked_of(log: VersionLog, version: Version) -> Spec:
    """The spec of a version as it was asked for. A batch training by it decides anew what it leaves open.

    Raises:
        CorruptObject: it is no spec.
    """
    try:
        return Spec.model_validate(version.manifest.spec)
    except ValidationError as error:
        raise _corrupt(log, version, error) from error


def _asked(column: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in column.items() if name not in READ_AS}


def _corrupt(log: VersionLog, version: Version, error: ValidationError) -> CorruptObject:
    return CorruptObject(f"{log.url}: the spec of version {version.number} is not valid: {error}")

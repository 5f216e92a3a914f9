"""From a version in the log to a learner in memory."""

import os
from typing import Any, Final

from pydantic import ValidationError

from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject
from tidemill.storage.log import VersionLog
from tidemill.tasks.training.imports import ALLOWED_MODULES, check_allowed
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.spec import Spec

READ_AS: Final = ("family", "width")
"""What `resolved_spec` says of each feature beside its settings."""


def load_learner(log: VersionLog, version: Version, device: str = "cpu") -> Learner:
    """The learner exactly as it was committed, on a device as in `Learner.create`; blobs are verified before they are parsed.

    Raises:
        UnknownVersion: retention has removed the blobs.
        CorruptObject: a blob's bytes are not those that were committed.
        FactoryError: the spec names a factory outside of the modules that the environment allows, or one that fails.
        StateMismatch: the model's code no longer fits its weights.
    """
    manifest = version.manifest
    spec = spec_of(log, version)
    check_allowed(spec, [name for part in os.environ.get(ALLOWED_MODULES, "").split(",") if (name := part.strip())])
    weights, state = log.read_blob(manifest.blobs.weights), log.read_blob(manifest.blobs.state)
    return Learner.load(spec, weights, state, device)


def resolved_spec(learner: Learner) -> dict[str, Any]:
    """The learner's spec with what it leaves to defaults and to the data filled in: the loss, and how each feature is read."""
    resolved = learner.spec.model_dump(mode="json") | {"loss": learner.spec.loss_name}
    read_as = [{"family": column.family, "width": column.width} for column in learner.features.columns]
    resolved["features"] = [asked | read for asked, read in zip(resolved["features"], read_as, strict=True)]
    return resolved


def spec_of(log: VersionLog, version: Version) -> Spec:
    """The spec that a version is trained by: the resolved one.

    Raises:
        CorruptObject: it is no spec.
    """
    resolved = version.manifest.resolved_spec
    if resolved is None:  # of format 1
        return asked_of(log, version)
    features = resolved.get("features")
    if isinstance(features, list):
        features = [_asked(column) if isinstance(column, dict) else column for column in features]
    return _valid(resolved | {"features": features}, log, version)


def asked_of(log: VersionLog, version: Version) -> Spec:
    """The spec of a version as it was asked for. A batch training by it decides anew what it leaves open.

    Raises:
        CorruptObject: it is no spec.
    """
    return _valid(version.manifest.spec, log, version)


def _asked(column: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in column.items() if name not in READ_AS}


def _valid(fields: dict[str, Any], log: VersionLog, version: Version) -> Spec:
    try:
        return Spec.model_validate(fields)
    except ValidationError as error:
        raise CorruptObject(f"{log.url}: the spec of version {version.number} is not valid: {error}") from error

"""From a version in the log to a learner in memory."""

from storage.log import Version, VersionLog
from tasks.training.learner import Learner
from tasks.training.spec import Spec


def load_learner(log: VersionLog, version: Version) -> Learner:
    """The learner exactly as it was committed; its blobs are verified before they are parsed.

    Raises:
        UnknownVersion: retention has removed the blobs.
        CorruptObject: a blob's bytes are not those that were committed.
        StateMismatch, FactoryError: the model's code no longer fits its weights.
    """
    manifest = version.manifest
    weights, state = log.read_blob(manifest.blobs.weights), log.read_blob(manifest.blobs.state)
    return Learner.load(Spec.model_validate(manifest.spec), weights, state)

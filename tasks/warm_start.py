"""A learner begins with what a source holds: read, taken, and told."""

from collections.abc import Callable

from tidemill.storage.errors import CorruptObject
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import sha256
from tidemill.storage.records import WarmStart
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.sources import SourceRef
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.stored import parsed
from tidemill.tasks.training.tensors import TensorFile
from tidemill.tasks.training.warm import Source, begin
from tidemill.tasks.versions import spec_of


def read(ref: SourceRef, stores: Callable[[str], Store] = open_store) -> Source:
    """What a warm start begins with. No code of the user's is imported.

    Raises:
        UnknownVersion: retention has removed the blobs.
        CorruptObject: the bytes are not those that were found before.
        StateMismatch: they are not what Tidemill writes, or no safetensors file.
    """
    store = stores(ref.url)
    if ref.version is None:
        data = store.read(ref.name)
        if sha256(data) != ref.sha256[0]:
            raise CorruptObject(f"init_from: {ref.told} has changed since the run began: start the command again")
        return Source(ref.told, TensorFile(data, f"bytes of {ref.told}").rest())
    log = VersionLog(store, ref.name)
    version = log.version(ref.version)
    blobs, spec = version.manifest.blobs, spec_of(log, version)
    features, weights = log.read_blobs((blobs.weights, blobs.state), lambda *stored: parsed(spec, *stored))
    return Source(ref.told, weights, spec.model.factory, features)


def started(learner: Learner, ref: SourceRef, source: Source, *, kept_statistics: bool) -> WarmStart:
    """Give a learner that is not trained yet what fits of a source. Returns what a manifest says of it.

    Raises:
        SpecError: nothing fits.
    """
    found = begin(learner, source)
    return WarmStart(
        url=f"{ref.url}/{ref.name}",
        version=ref.version,
        sha256=ref.sha256[0],
        kept_statistics=kept_statistics,
        taken=found.taken,
        missing=found.missing,
        left_over=found.left_over,
    )

"""`tidemill publish`: what MLflow lacks of a model's log is put there, in the order of the log, then the aliases.

Called again after whatever has happened, it goes on: each thing that it makes carries the sha256 of the version's manifest, and
is looked for by that before it is made. It reads the log, and writes to MLflow alone.
"""

from collections.abc import Callable, Iterator
from typing import Final

from pydantic import BaseModel

from tidemill.storage.aliases import all_aliases
from tidemill.storage.chain import Version
from tidemill.storage.log import VersionLog
from tidemill.storage.parallel import concurrently
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.errors import of_extra
from tidemill.tasks.publishing.telling import Input, Publication, Value, measured, trained_on

_AT_ONCE: Final = 64
"""So many manifests are in memory as a whole."""


class Published(BaseModel):
    """What `publish` has done."""

    model: str
    name: str
    """Of the registered model in MLflow."""
    uri: str
    made: dict[int, int]
    """Number of a version -> its number in MLflow, of those that were not there."""
    present: int
    """Versions that were there already."""
    gone: tuple[int, ...]
    """Versions that cannot be published any more: retention has removed their weights."""
    aliases: dict[str, int]
    """Every alias and its version, as MLflow has them now. One that names a version of `gone` is missing."""


def publish(
    registry: str, model: str, to: str, name: str | None = None, *, stores: Callable[[str], Store] = open_store
) -> Published:
    """Bring MLflow up to date with a model: the versions that it lacks, their metrics and lineage, and every alias.

    Published are the versions of batch trainings, those that the gate promoted, and those that an alias names. Two that publish
    the same model at the same time may make a version twice; of those, the lower number in MLflow counts from then on.

    Args:
        registry: URL below which models live. It is only read.
        model: Name of the model.
        to: URI of an MLflow tracking server, which has a model registry too.
        name: Of the registered model and of the experiment in MLflow; None: the model's.
        stores: Opens the store at a URL.

    Raises:
        UnknownModel: there is no such model.
        CorruptObject: what is stored is not what was committed.
        CannotPublish: MLflow refuses, cannot be reached, or has a model of this name that is not this one.
        MissingExtra: the packages of the extra `mlflow` are not installed.
    """
    with of_extra("mlflow", "publish"):
        from tidemill.tasks.publishing.mirror import Mirror
    log = VersionLog(stores(registry), model)
    head = log.head()
    mirror = Mirror(to, name or model, log.url, log.older(0).sha256)
    known = mirror.published()
    # The newest that is there and of this history, which a restore may have cut: what follows it is lacking.
    newest_first = sorted(known, reverse=True)
    last = next((number for number, sha256 in newest_first if _is_version(log, number, sha256)), -1)
    made, present, gone = dict[int, int](), len(known), list[int]()

    def put(publication: Publication) -> None:
        number = publication.version.number
        if _is_gone(log, publication.version):
            gone.append(number)
        else:
            made[number] = mirror.put(log, publication)
            known[number, publication.version.sha256] = made[number]

    for publication in _publications(log, last + 1, head.number):
        put(publication)
    named = {alias: log.older(number) for alias, number in all_aliases(log).items() if log.has(number)}
    for version in sorted(named.values(), key=lambda named: named.number):
        if (version.number, version.sha256) not in known and version.number not in gone:
            put(Publication(version, measured(version), trained_on(version)))
    wanted = {
        alias: known[version.number, version.sha256]
        for alias, version in named.items()
        if (version.number, version.sha256) in known
    }
    mirror.point(wanted)
    return Published(
        model=model,
        name=mirror.name,
        uri=to,
        made=made,
        present=present,
        gone=tuple(gone),
        aliases={alias: named[alias].number for alias in wanted},
    )


def _publications(log: VersionLog, first: int, last: int) -> Iterator[Publication]:
    """The versions from `first` to `last` that are to be published, oldest first, each with what came since the one before."""
    values, inputs = list[Value](), list[Input]()
    for begin in range(first, last + 1, _AT_ONCE):
        numbers = range(begin, min(begin + _AT_ONCE, last + 1))
        for version in concurrently(log.older, numbers, log.store.concurrency):
            values += measured(version)
            inputs += trained_on(version)
            gate = version.manifest.gate
            if version.manifest.kind == "batch" or (gate is not None and gate.decision == "promoted"):
                yield Publication(version, values, inputs)
                values, inputs = [], []


def _is_version(log: VersionLog, number: int, sha256: str) -> bool:
    return log.has(number) and log.older(number).sha256 == sha256


def _is_gone(log: VersionLog, version: Version) -> bool:
    return log.missing(version.manifest.blobs.learner_keys) is not None

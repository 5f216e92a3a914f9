"""`tidemill.load`: the version that an alias names now, or always."""

from collections.abc import Callable
from typing import overload

from tidemill.storage.aliases import resolve
from tidemill.storage.errors import UnknownAlias, UnknownVersion
from tidemill.storage.log import VersionLog
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.serving.following import Following
from tidemill.tasks.serving.predictor import Predictor, predictor_of


@overload
def load(
    registry: str,
    model: str,
    alias: str | int = "champion",
    *,
    follow: None = None,
    stores: Callable[[str], Store] = open_store,
) -> Predictor: ...


@overload
def load(
    registry: str,
    model: str,
    alias: str | int = "champion",
    *,
    follow: float,
    stores: Callable[[str], Store] = open_store,
) -> Following: ...


def load(
    registry: str,
    model: str,
    alias: str | int = "champion",
    *,
    follow: float | None = None,
    stores: Callable[[str], Store] = open_store,
) -> Predictor | Following:
    """A version of a model, ready to predict. Its weights are compared with their sha256 before they are used.

    A version is read once in a process, however often it is loaded.

    Args:
        registry: URL below which models live: a local path, `file://` or `s3://bucket/prefix`.
        model: Name of the model.
        alias: An alias, a version's number, or `head`.
        follow: Seconds between two looks at the alias. With it, a `Following` is returned, whose `now` is a `Predictor` of the
            version that the alias names at this moment.
        stores: Opens the store at a URL.

    Raises:
        UnknownAlias: there is no such alias; or `follow` is given and this is a number, or `head`.
        UnknownVersion, UnknownModel: there is no such version, or retention has removed its weights.
        CorruptObject: what is stored is not what was committed.
        FactoryError: the model is of the user's own code, which the environment does not allow (`TIDEMILL_FACTORIES`), or which
            fails.
        StateMismatch: the model's code no longer fits its weights.
    """
    alias = str(alias)
    if follow is not None and (alias == "head" or alias.isdecimal()):
        raise UnknownAlias(f"{alias!r} is no alias, and cannot be followed: name one, such as 'champion'.")
    if follow is not None and not follow > 0:
        raise ValueError(f"follow is {follow}: give seconds between two looks at the alias, more than 0")
    log = VersionLog(stores(registry), model)
    first = _first(log, alias)
    return first if follow is None else Following(log, alias, first, follow)


def _first(log: VersionLog, alias: str) -> Predictor:
    version = resolve(log, alias)
    while True:
        try:
            return predictor_of(log, version)
        except UnknownVersion:
            if (now := resolve(log, alias)).sha256 == version.sha256:
                raise
            version = now  # the alias moved on, and retention took what it had named

"""Aliases: names of versions, such as `champion`, moved by compare-and-swap. The one object of a model that changes."""

import json
from dataclasses import asdict, dataclass

from tidemill.storage.chain import NAME, Version
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StoreNotFound,
    UnknownAlias,
    UnknownVersion,
)
from tidemill.storage.log import VersionLog
from tidemill.storage.store import ObjectInfo


@dataclass(frozen=True)
class Alias:
    """Where an alias stands."""

    version: int
    moves: int
    """How often it has been moved: tells an alias that never moved from one that moved away and back."""


def resolve(log: VersionLog, name: str | int) -> Version:
    """The version that `name` means: `head`, a version's number, or an alias.

    Raises:
        UnknownVersion, UnknownAlias, UnknownModel.
    """
    name = str(name)
    if name == "head":
        return log.head()
    if name.isdecimal():
        return log.version(int(name))
    return aliased(log, name)


def all_aliases(log: VersionLog) -> dict[str, int]:
    """Every alias and the version that it names."""
    prefix = f"{log.model}/aliases/"
    keys = (info.key.removeprefix(prefix) for info in log.store.list(prefix))
    names = sorted(key.removesuffix(".json") for key in keys if key.endswith(".json"))
    return {name: alias.version for name in names if (alias := find_alias(log, name)) is not None}


def find_alias(log: VersionLog, name: str) -> Alias | None:
    """Where an alias stands, or None if there is no such alias. Costs one small request."""
    if not NAME.fullmatch(name):
        return None
    try:
        return _parsed(log.store.read(_key(log, name)), f"{log.store.url}/{_key(log, name)}")
    except (NotFound, StoreNotFound):
        return None


def object_of(log: VersionLog, name: str) -> ObjectInfo | None:
    """The object of an alias, or None if there is no such alias. Costs one small request.

    It is another one after each move, and in a registry that was begun anew.
    """
    if not NAME.fullmatch(name):
        return None
    try:
        return log.store.stat(_key(log, name))
    except (NotFound, StoreNotFound):
        return None


def aliased(log: VersionLog, name: str) -> Version:
    """The version that an alias names.

    Raises:
        UnknownAlias: no such alias, or it names a version that does not exist.
        UnknownModel: the model does not exist.
    """
    if (alias := find_alias(log, name)) is None:
        if not log.exists():
            raise log.unknown()
        known = ", ".join(all_aliases(log)) or "none yet"
        raise UnknownAlias(f"{log.url} has no alias {name!r} (there are: {known}). `tidemill promote` makes one.")
    try:
        return log.version(alias.version)
    except UnknownVersion:
        raise UnknownAlias(
            f"{log.url}: alias {name!r} names version {alias.version}, which does not exist. Set it with `tidemill promote`."
        ) from None


def check_name(alias: str) -> None:
    """Raises UnknownAlias: this cannot be an alias's name."""
    if not NAME.fullmatch(alias) or alias == "head" or alias.isdecimal():
        raise UnknownAlias(f"{alias!r} cannot be an alias: use a word such as 'champion' (not 'head', not a number).")


def promote(log: VersionLog, alias: str, version: Version, only_from: Alias | None = None) -> Alias | None:
    """Let `alias` name `version`, whose blobs must still be there. Compare-and-swap: of two at once, the last one holds.

    With `only_from`, an alias that stands elsewhere stays, and None is returned: whoever moved it decided later.
    Otherwise returns where the alias stands now.

    Raises:
        UnknownVersion: retention has removed the version's blobs.
        UnknownAlias: this cannot be an alias's name.
    """
    check_name(alias)
    if log.missing(version.manifest.blobs.learner_keys) is not None:
        raise UnknownVersion(
            f"{log.url}: the blobs of version {version.number} were removed by retention; it cannot be served."
        )
    key = _key(log, alias)
    while True:
        try:
            stands, etag = _stored(log, alias)
            if stands is not None and stands.version == version.number:
                return stands
            if only_from is not None and stands != only_from:
                return None
            moved = Alias(version.number, 0 if stands is None else stands.moves + 1)
            data = json.dumps(asdict(moved)).encode()
            if etag is None:
                log.store.create(key, data)
            else:
                log.store.replace(key, data, if_match=etag)
        except (AlreadyExists, PreconditionFailed, NotFound):
            continue  # somebody moved it in between, or our own answer was lost: look again
        return moved


def _stored(log: VersionLog, name: str) -> tuple[Alias | None, str | None]:
    """(where the alias stands, etag of its object), or (None, None)."""
    key = _key(log, name)
    while True:
        try:
            info = log.store.stat(key)
            return _parsed(log.store.read(key, if_match=info.etag), f"{log.store.url}/{key}"), info.etag
        except (NotFound, StoreNotFound):
            return None, None
        except PreconditionFailed:
            continue  # replaced between the two calls


def _key(log: VersionLog, name: str) -> str:
    return f"{log.model}/aliases/{name}.json"


def _parsed(data: bytes, where: str) -> Alias:
    try:
        fields = json.loads(data)
        alias = Alias(fields["version"], fields["moves"])
        for number in (alias.version, alias.moves):
            if type(number) is not int or number < 0:
                raise TypeError(f"{str(number)[:20]} is no version or count")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptObject(f"{where} is no alias: {error}. Delete it and promote again.") from error
    return alias

"""Where a warm start takes its weights from: what `init_from` names, found and pinned. Without torch.

A version is known by the sha256 of its weights and state, a file by that of its bytes: that is part of a run's key. An alias may
move while a run is under way, not least to the version that the run itself makes. So what it named when the run began is stored,
and a run that was killed goes on with that.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from pydantic import BaseModel, ConfigDict

from tidemill.storage.aliases import resolve
from tidemill.storage.errors import InvalidURL, NotFound, StoreNotFound
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import sha256
from tidemill.storage.runs import BatchProgress, pin_source, pinned_source
from tidemill.storage.store import Store
from tidemill.storage.urls import open_object, open_store

FILE: Final = ".safetensors"
"""How the name of a file of weights ends."""

logger = logging.getLogger("tidemill.batch")


class SourceRef(BaseModel):
    """A version, or a file of weights, as it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    """Of the registry, or of the folder that the file lies in."""
    name: str
    """Of the model, or the key of the file."""
    version: int | None = None
    """None: it is a file."""
    sha256: tuple[str, ...]
    """Of the bytes of the weights; of a version, of its state too."""

    @property
    def told(self) -> str:
        """In words."""
        where = f"{self.url}/{self.name}"
        return where if self.version is None else f"version {self.version} of {where}"


def find(named: str, stores: Callable[[str], Store] = open_store) -> SourceRef:
    """What `init_from` names, as it is now: `REGISTRY/MODEL@ALIAS` (or a number, or `head`), or a file of weights.

    Raises:
        InvalidURL: it names neither.
        StorageError: there is no such registry, model, version, alias or file.
    """
    if named.endswith(FILE):
        store, key = open_object(named, stores)
        with _named_by_init_from(store, key):
            return SourceRef(url=store.url, name=key, sha256=(sha256(store.read(key)),))
    log, which = _model(named, stores)
    version = resolve(log, which)
    blobs = version.manifest.blobs
    shas = blobs.weights.sha256, blobs.state.sha256
    return SourceRef(url=log.store.url, name=log.model, version=version.number, sha256=shas)


def look_for_source(named: str, stores: Callable[[str], Store] = open_store) -> None:
    """Whether `find` would find something: a few small requests. Raises as it does."""
    if not named.endswith(FILE):
        find(named, stores)
        return
    store, key = open_object(named, stores)
    with _named_by_init_from(store, key):
        store.stat(key)


@contextmanager
def _named_by_init_from(store: Store, key: str) -> Iterator[None]:
    try:
        yield
    except (NotFound, StoreNotFound) as error:
        raise NotFound(f"init_from: there is no file {store.url}/{key}") from error


def _model(named: str, stores: Callable[[str], Store]) -> tuple[VersionLog, str]:
    place, at, which = named.rpartition("@")
    registry, slash, model = place.rpartition("/")
    if not (at and slash and which and model) or registry.endswith(":/"):
        raise InvalidURL(
            f"init_from: {named!r} names no version: write REGISTRY/MODEL@ALIAS, as in ./registry/flights@champion (or "
            f"@head, or a number), or a file that ends in {FILE}"
        )
    return VersionLog(stores(registry or "/"), model), which


# ---- which run it is -------------------------------------------------------------------------------------------------
def key_with(key: str, source: SourceRef, *, keep_statistics: bool) -> str:
    """The key of a run that begins with a source; `key` is what it would have without one."""
    return _hash([key, *source.sha256, keep_statistics])


def key_begun(log: VersionLog, key: str, named: str | None, *, keep_statistics: bool) -> str | None:
    """The key of the run that was begun last with what is asked; `key` and `named` as of `source_of_run`. None: none was."""
    if named is None:
        return key
    begun = pinned_source(log, _asked(key, named))
    return None if begun is None else key_with(key, SourceRef.model_validate(begun), keep_statistics=keep_statistics)


def source_of_run(
    named: str,
    log: VersionLog,
    key: str,
    attempt: Callable[[str], BatchProgress],
    stores: Callable[[str], Store] = open_store,
    *,
    keep_statistics: bool,
) -> SourceRef:
    """The source of the run that is asked for: that of an attempt that is not finished, if there is one; else as it is now.

    Args:
        named: What `init_from` says.
        log: Of the model that is trained.
        key: What the run is known by, but for the source.
        attempt: The attempt at the run of a key that would go on.
        stores: Opens the store at a URL.
        keep_statistics: As in the settings.

    Raises:
        InvalidURL, StorageError: as `find`.
    """
    begun, now = pinned_source(log, _asked(key, named)), None
    moves = (
        not named.endswith(FILE) and not named.rpartition("@")[2].isdecimal()
    )  # all else is always the same, or another
    if begun is not None and moves:
        source = SourceRef.model_validate(begun)
        progress = attempt(key_with(key, source, keep_statistics=keep_statistics))
        if not progress.finished() and progress.has_checkpoint():
            logger.info("a run that began with %s goes on; to begin with another, name its number", source.told)
            return source
        now = find(named, stores)
        # What has moved since is only the alias, and to what came of it: nothing has changed.
        if progress.finished() and (now.url, now.name, now.version) == (log.store.url, log.model, progress.done()):
            return source
    now = now or find(named, stores)
    pin_source(log, _asked(key, named), now.model_dump(mode="json"))
    return now


def _asked(key: str, named: str) -> str:
    """Where the source of a run is stored that is asked for."""
    return _hash([key, named])


def _hash(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

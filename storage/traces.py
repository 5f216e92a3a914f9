"""Traces of versions that a log does not have: what tells a damaged or restored registry from one where nothing was lost.

Whatever is written after a commit (aliases, quarantine, `head.json`, `done.json`), or only on top of one (blobs of the
next version), shows that the commit had happened.
"""

import json
import re
from collections.abc import Iterator

from tidemill.storage.errors import CorruptObject, NotFound
from tidemill.storage.store import Store

_NUMBERED = re.compile(r"(\d{8,})-[0-9a-f]{32}.*")


def traces_above(store: Store, model: str, head: int) -> Iterator[str]:
    """What shows that versions above `head` (-1: no version at all) were committed: of each kind the first trace, in words.

    Manifests themselves are not looked at. What cannot be parsed shows nothing, except below `head` -1: there even a
    damaged alias does. A run that is committing `head` + 1 leaves no trace.
    """
    for find in (_hint, _aliases, _blobs, _quarantine, _runs):
        yield from find(store, model, head)


def _hint(store: Store, model: str, head: int) -> Iterator[str]:
    key = f"{model}/head.json"
    if (number := _number(store, key, "version")) is not None and number > head:
        yield f"{key} names version {number}"


def _aliases(store: Store, model: str, head: int) -> Iterator[str]:
    for info in store.list(f"{model}/aliases/"):
        if not info.key.endswith(".json"):
            continue
        number = _number(store, info.key, "version")
        if head < 0 or (number is not None and number > head):
            yield f"{info.key} names version {'?' if number is None else number}"
            return


def _blobs(store: Store, model: str, head: int) -> Iterator[str]:
    """Those of the version after the head may be of a run that has not committed yet."""
    number = _first(store, f"{model}/blobs/", head + 2)
    if number is not None:
        yield f"{model}/blobs/ has blobs of version {number}, which was made on top of version {number - 1}"


def _quarantine(store: Store, model: str, head: int) -> Iterator[str]:
    if (number := _first(store, f"{model}/quarantine/", head + 1)) is not None:
        yield f"{model}/quarantine/ has a shard that version {number} rejected"


def _runs(store: Store, model: str, head: int) -> Iterator[str]:
    fields = {"done.json": ("version", "has registered version"), "run.json": ("after", "began on top of version")}
    for info in store.list(f"{model}/runs/"):
        if (field := fields.get(info.key.rpartition("/")[2])) is None:
            continue
        if (number := _number(store, info.key, field[0])) is not None and number > head:
            yield f"the batch run of {info.key} {field[1]} {number}"
            return


def _first(store: Store, prefix: str, least: int) -> int | None:
    """The number of a key below `prefix` that is at least `least`."""
    for info in store.list(prefix, after=f"{prefix}{least:08d}"):
        found = _NUMBERED.fullmatch(info.key.removeprefix(prefix))
        if found is not None and int(found[1]) >= least:
            return int(found[1])
    return None


def _number(store: Store, key: str, field: str) -> int | None:
    """A number in a JSON object; None if it is not there or makes no sense."""
    try:
        number = json.loads(store.read(key))[field]
    except (NotFound, CorruptObject, ValueError, KeyError, TypeError, RecursionError):
        return None
    return number if type(number) is int else None

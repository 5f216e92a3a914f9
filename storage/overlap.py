"""How two places lie to each other, decided by what they are and not by how their URLs are spelled.

Two local URLs are one folder if they lead to one device and inode: symbolic links, bind mounts, names that differ only in
case where the file system ignores it, `//`, and relative paths are all seen. A folder that does not exist yet is known by the
nearest one above it that does. Two S3 or memory URLs are compared by bucket and by segments of the prefix; all S3 stores of a
process have the one endpoint of the AWS variables.
"""

import enum
import functools
import itertools
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tidemill.storage.errors import (
    CorruptObject,
    InvalidURL,
    NotFound,
    PlacesOverlap,
    StoreNotFound,
    UnknownModel,
    UnknownVersion,
    UnsupportedFormat,
)
from tidemill.storage.manifest import verified
from tidemill.storage.parallel import concurrently
from tidemill.storage.records import IN_MEMORY
from tidemill.storage.urls import open_store

if TYPE_CHECKING:
    from tidemill.storage.chain import Version
    from tidemill.storage.log import VersionLog

logger = logging.getLogger("tidemill.storage")

PLACES: Final = "TIDEMILL_PLACES"
"""Environment variable: URLs, separated by commas, below which a record of a registry may make a run write, move or delete."""

_BATCH_RUNS: Final = 64
"""The datasets of this many finished batch runs are looked up, from the newest back."""


class Relation(enum.Enum):
    """How one place lies to another. The value is the verb of a message."""

    SAME = "is"
    INSIDE = "lies inside"
    HOLDS = "holds"
    APART = "lies apart from"


def relation(one: str, other: str) -> Relation:
    """How `one` lies to `other`. Both are the `url` of a store; neither needs to exist, and nothing is made there."""
    scheme, _, path = one.partition("://")
    other_scheme, _, other_path = other.partition("://")
    if scheme != other_scheme:
        return Relation.APART
    if scheme == "file":
        return _between(LocalPlace.at(path), LocalPlace.at(other_path))
    mine, theirs = path.rstrip("/").split("/"), other_path.rstrip("/").split("/")
    if mine == theirs:
        return Relation.SAME
    if mine[: len(theirs)] == theirs:
        return Relation.INSIDE
    return Relation.HOLDS if theirs[: len(mine)] == mine else Relation.APART


def inside(outer: str, inner: str) -> Callable[[str], bool]:
    """Whether a key of the store `outer` is an object of the place `inner`, which may lie inside `outer`."""
    if relation(inner, outer) is not Relation.INSIDE:
        return lambda key: False
    if not outer.startswith("file://"):
        below = inner[len(outer) + 1 :]
        return lambda key: key == below or key.startswith(f"{below}/")
    root, wanted = outer.removeprefix("file://"), _identity(inner.removeprefix("file://"))
    known: dict[str, bool] = {"": False}

    def is_inside(key: str) -> bool:
        if (answer := known.get(key)) is None:
            folder = key.rpartition("/")[0]
            answer = is_inside(folder) or (wanted is not None and _identity(f"{root}/{key}") == wanted)
            known[key] = answer
        return answer

    return is_inside


def spelled_as(*urls: str) -> Callable[[str], str]:
    """A function from the URL of a place to that of `urls` which is the same place; any other URL stays as it is."""

    @functools.cache
    def spelled(url: str) -> str:
        return next((one for one in urls if relation(url, one) is Relation.SAME), url)

    return spelled


# ---- what may not overlap --------------------------------------------------------------------------------------------
def keep_out_of_inbox(inbox: str, others: Iterable[tuple[str, str]], called: str = "the inbox") -> None:
    """Every object below an inbox is a shard, to be consumed and removed: no other place may be, hold or lie in it.

    Args:
        inbox: URL of the inbox's store.
        others: (what it is called in a message, URL of its store) of each other place.
        called: What the inbox is called in a message.

    Raises:
        PlacesOverlap: the first place that overlaps with the inbox, and what to do.
    """
    for name, url in others:
        if (lies := relation(url, inbox)) is not Relation.APART:
            raise PlacesOverlap(
                f"{name}, {_shown(url)}, {lies.value} {called} {_shown(inbox)}, whose objects are taken for shards and removed; "
                "choose places that lie beside each other."
            )


def keep_out_of_dataset(dataset: str, others: Iterable[tuple[str, str]], called: str = "the dataset") -> None:
    """What is written to a place in a dataset would be trained on as data: neither registry nor predictions may lie in one.

    Raises:
        PlacesOverlap: the first place that is the dataset or lies in it, and what to do.
    """
    for name, url in others:
        if (lies := relation(url, dataset)) in (Relation.SAME, Relation.INSIDE):
            raise PlacesOverlap(
                f"{name}, {_shown(url)}, {lies.value} {called} {_shown(dataset)}: what is written there would be read as data, "
                "or replace it; choose a place outside."
            )


def keep_out_of_registry(model: str, name: str, place: str) -> None:
    """Copies of shards keep the keys that producers chose: below `model`, the URL of a model's log, they could forge versions.

    Raises:
        PlacesOverlap: the place is the model's, holds it, or lies in it.
    """
    if (lies := relation(place, model)) is not Relation.APART:
        raise PlacesOverlap(
            f"{name}, {_shown(place)}, {lies.value} {_shown(model)}, where the registry keeps this model; choose a place outside."
        )


def check_holdout(dataset: str, holdout: str) -> None:
    """A holdout may lie inside of the dataset, which is then read without it; nothing would be left the other way round.

    Raises:
        PlacesOverlap: the dataset is its own holdout, or lies inside of it.
    """
    if (lies := relation(dataset, holdout)) in (Relation.SAME, Relation.INSIDE):
        raise PlacesOverlap(
            f"the dataset, {_shown(dataset)}, {lies.value} holdout_dataset {_shown(holdout)}: nothing would be left to train on. "
            "Hold out a share of its rows (holdout=0.1), or give a holdout_dataset beside it or inside of it."
        )


# ---- what a registry knows of places ---------------------------------------------------------------------------------
def named_datasets(log: "VersionLog", head: "Version | None" = None) -> dict[str, int]:
    """URL of each dataset that a batch version was trained on -> the oldest such version that was looked at.

    Those are version 0, the head, and the versions of the newest `_BATCH_RUNS` finished batch runs. A manifest that cannot be
    read is passed over with a warning: what it names is not known. `head` is the model's head as it was read a moment ago, if
    it was.
    """
    prefix = f"{log.model}/runs/"
    done = [info for info in log.store.list(prefix) if info.key.endswith("/done.json")]
    newest = sorted(done, key=lambda info: info.last_modified)[-_BATCH_RUNS:]

    def number(key: str) -> list[int]:
        try:
            return [int(verified(log.store.read(key))["version"])]
        except (NotFound, AttributeError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return []  # the batch run itself says that it is damaged, if it ever starts again

    def dataset(version: int) -> list[tuple[int, str]]:
        try:
            read = known if known.number == version else log.version(version)
            ref = read.manifest.dataset
        except (UnknownVersion, CorruptObject, UnsupportedFormat) as error:
            logger.warning("which dataset version %d was trained on is not known: %s", version, error)
            return []
        return [] if ref is None or ref.url == IN_MEMORY else [(version, ref.url)]

    workers = log.store.concurrency
    try:
        known = head or log.head()
    except UnknownModel:
        return {}
    numbers = {0, known.number, *itertools.chain(*concurrently(number, [info.key for info in newest], workers))}
    found = itertools.chain(*concurrently(dataset, sorted(numbers), workers))
    return {url: version for version, url in sorted(found, reverse=True)}


def named_inboxes(log: "VersionLog") -> set[str]:
    """URLs of the inboxes that the head's manifest names: of what it consumed, rejected or still owes."""
    try:
        manifest = log.head().manifest
    except (UnknownModel, StoreNotFound):  # a registry on a disk begins with its first object
        return set()
    consumed = {shard.inbox for shard in (*manifest.consumed_objects, *(manifest.open_labels or ()))}
    return consumed | {shard.inbox for shard in manifest.rejected} | {debt.inbox for debt in manifest.owed}


def keep_batch_apart(log: "VersionLog", dataset: str | None, holdout: str | None) -> None:
    """What a batch run reads (`url` of the stores; None: nothing) is no place where the model's registry or an inbox of it lies.

    Raises:
        PlacesOverlap: before anything is written.
    """
    read = {"the dataset": dataset, "holdout_dataset": holdout}
    datasets = {name: url for name, url in read.items() if url is not None}
    for name, url in datasets.items():
        keep_out_of_dataset(url, [("the registry", log.url)], name)
    if dataset is not None and holdout is not None:
        check_holdout(dataset, holdout)
    for inbox in sorted(named_inboxes(log)):
        keep_out_of_inbox(inbox, datasets.items(), "an inbox of the model,")


def keep_apart(log: "VersionLog", name: str, place: str) -> None:
    """What is made of a model is written outside of what the model is made of: its registry, datasets and inboxes.

    Args:
        log: Of the model.
        name: What the place is called in a message.
        place: URL of its store, or of an object.

    Raises:
        PlacesOverlap: the place is one of them or lies in it; or it holds the registry or an inbox.
    """
    keep_out_of_registry(log.url, name, place)
    for dataset, number in named_datasets(log).items():
        keep_out_of_dataset(dataset, [(name, place)], f"the dataset of version {number}")
    for inbox in sorted(named_inboxes(log)):
        keep_out_of_inbox(inbox, [(name, place)], "an inbox of the model,")


# ---- where a record of a registry may reach --------------------------------------------------------------------------
def allowed_places() -> tuple[str, ...]:
    """URLs of the stores that `TIDEMILL_PLACES` names, beside those of a run itself.

    Raises:
        InvalidURL: one of them names no store.
    """
    places = []
    for part in os.environ.get(PLACES, "").split(","):
        if url := part.strip():
            try:
                places.append(open_store(url).url)
            except InvalidURL as error:
                raise InvalidURL(f"{PLACES}, URLs separated by commas: {error}") from error
    return tuple(places)


def allowed(url: str, places: Iterable[str]) -> bool:
    """Whether the store at `url` is one of these places, or lies inside of one."""
    return any(relation(url, place) in (Relation.SAME, Relation.INSIDE) for place in places)


# ---- local folders ---------------------------------------------------------------------------------------------------
_Identity = tuple[int, int] | str
"""Device and inode; the path where a file system has no inodes."""


@dataclass(frozen=True)
class LocalPlace:
    """A local place: the nearest folder that exists, and the names below it that do not."""

    nearest: _Identity | None
    above: frozenset[_Identity]
    """The nearest folder and every folder that holds it, by whatever mount."""
    missing: tuple[str, ...]

    @classmethod
    def at(cls, path: str) -> "LocalPlace":
        path, missing = os.path.realpath(path), list[str]()
        while (nearest := _identity(path)) is None and path != "/":
            path, _, name = path.rpartition("/")
            path = path or "/"
            missing.insert(0, name)
        if missing and _ignores_case(path):
            missing = [unicodedata.normalize("NFC", name).casefold() for name in missing]
        return cls(nearest, frozenset(_holders(path)), tuple(missing))


def _between(one: LocalPlace, other: LocalPlace) -> Relation:
    if (one.nearest, one.missing) == (other.nearest, other.missing):
        return Relation.SAME
    if _is_inside(one, other):
        return Relation.INSIDE
    return Relation.HOLDS if _is_inside(other, one) else Relation.APART


def _is_inside(inner: LocalPlace, outer: LocalPlace) -> bool:
    if not outer.missing:
        return outer.nearest in inner.above
    return inner.nearest == outer.nearest and inner.missing[: len(outer.missing)] == outer.missing


def _identity(path: str) -> _Identity | None:
    """None if nothing is there, as far as this process may see."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _holders(path: str) -> Iterator[_Identity]:
    """The folder at this real path and all that hold it: those above it, and those above wherever else it is mounted."""
    mounts = _mounts()
    waiting, seen = [path], set[str]()
    while waiting:
        if (path := waiting.pop()) in seen:
            continue
        seen.add(path)
        if (identity := _identity(path)) is not None:
            yield identity
            waiting += [other for other in _elsewhere(path, mounts) if _identity(other) == identity]
        waiting.append(os.path.dirname(path))


@dataclass(frozen=True)
class _Mount:
    device: str
    """`major:minor`."""
    root: str
    """The folder of the file system that is mounted."""
    point: str
    """Where."""


def _mounts() -> list[_Mount]:
    """What is mounted where; nothing on a system that does not tell."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split(" ") for line in file]
    except OSError:
        return []
    return [_Mount(fields[2], _unescaped(fields[3]), _unescaped(fields[4])) for fields in lines if len(fields) > 4]


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _elsewhere(path: str, mounts: list[_Mount]) -> Iterator[str]:
    """Other paths that may lead to the folder at `path`: to be compared, since another mount may cover them."""
    try:
        device = os.stat(path).st_dev
    except OSError:
        return
    near = [mount for mount in mounts if mount.device == f"{os.major(device)}:{os.minor(device)}"]
    for mount in near:
        if mount.point != path:
            yield mount.point  # the folder may be mounted there
            continue
        for other in near:  # and where it was mounted from
            below = mount.root.removeprefix(other.root.rstrip("/"))
            if below != mount.root or other.root == "/":
                yield os.path.normpath(f"{other.point}/{below}")


def _ignores_case(folder: str) -> bool:
    """Whether names in this folder that differ in case alone are one name: tried on those that are there, or on its own."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, 100)]
        for name in names:
            if (other := name.swapcase()) != name:
                return other not in names and _same_entry(f"{folder}/{name}", f"{folder}/{other}")
    except OSError:
        pass  # not to be listed
    parent, name = os.path.split(folder)
    other = name.swapcase()
    return other != name and _same_entry(folder, f"{parent}/{other}")


def _same_entry(path: str, other: str) -> bool:
    try:
        one, two = os.lstat(path), os.lstat(other)
    except OSError:
        return False
    # A file of two names may have two that differ in case alone.
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino) and (stat.S_ISDIR(one.st_mode) or one.st_nlink == 1)


def _shown(url: str) -> str:
    """The URL, with the folder that it leads to where that is another."""
    path = url.removeprefix("file://")
    if path == url or (real := os.path.realpath(path)) == path:
        return url
    return f"{url} (that is {real})"

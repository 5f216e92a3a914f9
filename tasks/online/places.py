"""The stores of an online run: opened once, asked what they promise, and none of them inside another one's inbox."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Final

from tidemill.storage.chain import Version
from tidemill.storage.disposal import dispose
from tidemill.storage.errors import InvalidURL, UnknownModel, UnknownVersion
from tidemill.storage.inbox import Inbox
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Owed
from tidemill.storage.overlap import (
    allowed,
    allowed_places,
    check_holdout,
    keep_out_of_dataset,
    keep_out_of_inbox,
    keep_out_of_registry,
    named_datasets,
    spelled_as,
)
from tidemill.storage.probe import check_inbox, check_preconditions
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings

_ARCHIVE: Final = "after_commit.archive_to"
_HOLDOUT: Final = "gate.holdout_dataset"
_RETRAIN: Final = "gate.after_refusals.retrain_on"


class Places:
    """Where a run reads and writes."""

    def __init__(
        self,
        inbox: str,
        registry: str,
        model: str,
        settings: OnlineSettings,
        stores: Callable[[str], Store] = open_store,
    ) -> None:
        """Open the places; nothing is written but what `check_preconditions` tries out.

        Raises:
            UnknownModel: the registry holds no such model, or the name cannot be a model's name.
            UnsupportedStore: the registry ignores put-if-absent.
            PlacesOverlap: one place is, holds or lies in another's way.
            InvalidURL: an inbox is no folder.
        """
        self._open = stores
        self._opened: dict[str, Store] = {}
        self.log = VersionLog(self.store(registry), model)
        self.inbox = Inbox(self.store(inbox))
        self.labels = None if settings.labels is None else Inbox(self.store(settings.labels.inbox))
        """Where labels arrive that come later than their features."""
        self.spelled = spelled_as(*(inbox.url for inbox in self.inboxes))
        """The URL by which this run knows an inbox, however an earlier run spelled it."""
        inboxes = [each.url for each in self.inboxes]
        try:
            head = self.log.head()
        except UnknownModel:
            keep_apart(self.log, inboxes, settings, self.store)  # which would be the reason
            raise
        self.head: Version | None = head
        """As it was when these were opened. To be set to None when nobody needs it: a manifest may be large."""
        self._seen: tuple[int, str] | None = None
        """Number and sha256 of the newest version, where it was found a moment ago."""
        self.remember(head)
        keep_apart(self.log, inboxes, settings, self.store, head)
        archive = [] if settings.archive_to is None else [self.store(settings.archive_to).url]
        self._allowed = (*(each.url for each in self.inboxes), *archive, *allowed_places())
        self._may = dict.fromkeys(self._allowed, True)
        for each in self.inboxes:
            each.refuse_no_folder()
        check_preconditions(self.log.store)
        for each in self.inboxes:
            check_inbox(each.store)

    @property
    def inboxes(self) -> list[Inbox]:
        """That of the shards, and that of the labels if there is one."""
        return [self.inbox] if self.labels is None else [self.inbox, self.labels]

    def newest(self) -> Version:
        """The head, as `VersionLog.head` finds it. One that is remembered, as that of the opening is, is not searched for again
        if none was committed since: its manifest is read, and must be the same. Raises as `VersionLog.head`."""
        seen, self._seen, self.head = self._seen, None, None
        if seen is not None and not self.log.has(seen[0] + 1):
            with suppress(UnknownVersion):
                version = self.log.version(seen[0])
                if version.sha256 == seen[1]:
                    return version
        return self.log.head()

    def remember(self, head: Version) -> None:
        """It was found a moment ago: `newest` begins there, once."""
        self._seen = head.number, head.sha256

    def store(self, url: str) -> Store:
        """The store at this URL, opened once: what was found out about it is kept."""
        if url not in self._opened:
            store = self._open(url)
            self._opened[url] = self._opened.setdefault(store.url, store)
        return self._opened[url]

    def dispose(self, owed: Collection[Owed]) -> tuple[Owed, ...]:
        """Remove what a committed version is done with. Returns the debts that could not be paid now.

        They may be of other inboxes than this run's: of a run before it.
        """
        for url in {debt.inbox for debt in owed}:
            if self.may_touch(url):
                check_inbox(self.store(url))
        return dispose(self.log, owed, self.may_touch, self.store)

    def may_touch(self, url: str) -> bool:
        """Whether a record of the registry may make this run delete and write there: its inboxes, its archive, and what
        `TIDEMILL_PLACES` names."""
        if (may := self._may.get(url)) is None:
            try:
                may = allowed(self.store(url).url, self._allowed)
            except InvalidURL:
                may = False
            self._may[url] = may
        return may


def keep_apart(
    log: VersionLog,
    inboxes: Sequence[str],
    settings: OnlineSettings,
    stores: Callable[[str], Store] = open_store,
    head: Version | None = None,
) -> None:
    """Every object below an inbox is a shard, to be consumed and removed: no other place may be, hold or lie in one.

    Args:
        log: Of the model; its manifests name the datasets that it was trained on.
        inboxes: URL of the store of the inbox, and of that of the labels if there is one.
        settings: They name the other places.
        stores: Opens the store at a URL.
        head: Of the model, if it was read a moment ago.

    Raises:
        PlacesOverlap: before anything is written.
    """
    given = {
        _ARCHIVE: settings.archive_to,
        _HOLDOUT: settings.gate.holdout_dataset,
        _RETRAIN: settings.gate.retrain_on,
    }
    places = {name: stores(url).url for name, url in given.items() if url is not None}
    named = dict(zip(("the inbox", "the labels inbox"), inboxes, strict=False))
    others = [("the registry", log.store.url), *places.items()]
    for name, inbox in named.items():
        keep_out_of_inbox(inbox, others, name)
        others.append((name, inbox))
    trained_on = {f"the dataset of version {number}": url for url, number in named_datasets(log, head).items()}
    for name, inbox in named.items():
        keep_out_of_inbox(inbox, trained_on.items(), name)
    if (archive := places.get(_ARCHIVE)) is not None:
        keep_out_of_registry(log.url, _ARCHIVE, archive)
        if settings.labels is not None:  # features and labels lie there apart, under one name each
            datasets = trained_on | {name: url for name, url in places.items() if name == _RETRAIN}
            for name, url in datasets.items():
                keep_out_of_dataset(url, [(f"{_ARCHIVE}, where features and labels lie apart", archive)], name)
    if (retrain_on := places.get(_RETRAIN)) is not None:
        keep_out_of_dataset(retrain_on, [("the registry", log.url)], _RETRAIN)
        if (holdout := places.get(_HOLDOUT)) is not None:
            check_holdout(retrain_on, holdout)

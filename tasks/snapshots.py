"""The dataset of a batch run as it is when the run begins: all of its rows, or those that the settings ask for.

A window, such as the last 90 days, is pinned to two instants when a run begins; of a table of Delta Lake or Iceberg, so is the
newest version. What was asked for (`90d` of a column) is the identity of the run; what it came to is kept beside its checkpoints:

    runs/<key of what was asked>/window.json    {"until", "table_version", "table_metadata", "again", "run": key of the run,
                                                 "files": fingerprint}

A run that was killed goes on with its own. Once it is done, the same command looks again: chosen rows in other files are another
run. Where they lie in the same files as before, nothing is trained, unless `again` is set.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa

from tidemill.storage.choice import Choice, Window
from tidemill.storage.dataset import Snapshot, snapshot
from tidemill.storage.errors import CorruptObject, DatasetError, NotFound, PreconditionFailed, StoreNotFound
from tidemill.storage.lakehouse import metadata_of
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import checked, verified
from tidemill.storage.overlap import check_holdout, keep_batch_apart
from tidemill.storage.probe import check_preconditions
from tidemill.storage.records import IN_MEMORY, Record
from tidemill.storage.runs import BatchProgress
from tidemill.storage.sql import duration
from tidemill.storage.store import Store, create_or_same
from tidemill.storage.urls import open_store
from tidemill.tasks.batch_run import asked_key, run_key
from tidemill.tasks.code import code_of
from tidemill.tasks.settings import BatchSettings, RowSettings
from tidemill.tasks.sources import key_begun
from tidemill.tasks.table import table_snapshot
from tidemill.tasks.training.spec import Spec

logger = logging.getLogger("tidemill.batch")


def take_snapshot(
    dataset: str | pa.Table,
    holdout: str | None = None,
    stores: Callable[[str], Store] = open_store,
    choice: Choice | None = None,
    version: int | None = None,
) -> Snapshot:
    """The dataset as it is now, without a holdout that lies inside of it; see `tidemill.storage.dataset.snapshot`.

    A table in memory is one too; see `tidemill.tasks.table`. Of either, `choice` says which rows are asked for; of a table of
    Delta Lake or Iceberg, `version` which one.

    Raises:
        PlacesOverlap: the dataset is its own holdout, or lies inside of it.
    """
    if isinstance(dataset, pa.Table):
        if version is not None:
            raise DatasetError("a table in memory has no versions, and table_version says one.")
        return table_snapshot(dataset, choice)
    without = None
    if holdout is not None:
        without = stores(holdout).url
        check_holdout(stores(dataset).url, without)
    taken = snapshot(dataset, stores, without=without, choice=choice, version=version)
    logger.info("%s: %d files, %d rows", taken.ref.url, taken.ref.files, taken.ref.rows)
    if (told := taken.ref.told) is not None:
        logger.info("%s", told)
    return taken


def run_snapshot(
    dataset: str | pa.Table,
    registry: str,
    model: str,
    spec: Spec,
    settings: BatchSettings,
    stores: Callable[[str], Store] = open_store,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Snapshot:
    """The rows of a dataset that the settings of a batch run ask for.

    A window, and the version of a table, are those of a run that was begun with what is asked here and is not done; or else the
    window ends `now`, and the version is the newest.

    Raises:
        PlacesOverlap: the dataset is its own holdout, or lies inside of it; with a window or a table also if registry and dataset
            lie inside each other. Nothing was written.
        StorageError: see `tidemill.storage.dataset.snapshot`.
    """

    def take(until: datetime, version: int | None, metadata: str | None = None) -> Snapshot:
        place = dataset
        if isinstance(dataset, str) and metadata is not None and metadata_of(dataset) is None:
            place = f"{stores(dataset).url}/{metadata}"  # what the folder's own hint named then
        return take_snapshot(place, settings.holdout_dataset, stores, choice_of(settings, until), version)

    def of_before(pinned: _Pinned) -> Snapshot | None:
        """The rows of the run that was begun before, if its files are what they were."""
        try:
            found = take(pinned.until, pinned.table_version, pinned.table_metadata)
        except DatasetError:  # what is wrong with the dataset now, the new snapshot says
            return None
        return found if run_key(found, spec, settings, code) == pinned.run else None

    until, taken = now(), None
    if settings.last is None:
        taken = take(until, settings.table_version)
        if taken.ref.table is None or settings.table_version is not None:
            return taken  # nothing depends on the moment when the run begins
    url, log = IN_MEMORY if isinstance(dataset, pa.Table) else stores(dataset).url, VersionLog(stores(registry), model)
    check_places(log, None if url == IN_MEMORY else url, settings, stores)
    code = code_of(spec)
    kept = _Kept(log, asked_key(url, spec, settings, code))
    while True:
        pinned = kept.read()
        done = pinned is not None and _is_done(log, pinned.run, settings)
        going_on = not done and pinned is not None and (pinned.again or not settings.again)
        if pinned is not None and going_on and (found := of_before(pinned)) is not None:
            logger.info("going on with the rows of the run that began at %s", pinned.until.isoformat())
            return found
        taken = taken or take(until, settings.table_version)
        same = done and not settings.again and pinned is not None and pinned.files == taken.standing
        if pinned is not None and same and (found := of_before(pinned)) is not None:
            return found
        table, run = taken.ref.table, run_key(taken, spec, settings, code)
        pinned = _Pinned(
            until=until,
            table_version=None if table is None else table.version,
            table_metadata=None if table is None else table.metadata,
            again=settings.again,
            run=run,
            files=taken.standing,
        )
        if kept.write(pinned):
            return taken


def _is_done(log: VersionLog, key: str, settings: BatchSettings) -> bool:
    """Whether the run of a key is done, with the weights that it was begun with."""
    begun = key_begun(log, key, settings.init_from, keep_statistics=settings.keep_statistics)
    return begun is not None and BatchProgress(log, begun).finished()


def choice_of(rows: RowSettings, until: datetime) -> Choice | None:
    """What settings ask of each row, where a window ends at `until`; None: nothing."""
    if rows.last is None or rows.time_column is None:
        return None if rows.where is None else Choice(rows.where)
    return Choice(rows.where, Window(rows.last, rows.time_column, until - duration(rows.last), until))


def check_places(log: VersionLog, dataset: str | None, settings: BatchSettings, stores: Callable[[str], Store]) -> None:
    """Whether a batch run may write to its registry; `dataset` is the `url` of a store, None of a table in memory.

    Raises:
        PlacesOverlap: registry, dataset, holdout or an inbox of the model lie inside each other. Nothing was written.
        UnsupportedStore: the registry's store cannot keep versions safe.
    """
    holdout = None if settings.holdout_dataset is None else stores(settings.holdout_dataset).url
    keep_batch_apart(log, dataset, holdout)
    check_preconditions(log.store)


# ---- which window a run has --------------------------------------------------------------------------------------------
class _Pinned(Record):
    """The window of the run that was begun last with what was asked."""

    until: datetime
    """Its end: when the run began."""
    table_version: int | None = None
    """Of a table of Delta Lake or Iceberg."""
    table_metadata: str | None = None
    """Of Iceberg: as `TableRef.metadata`, for they say what the columns are called."""
    again: bool
    """Whether it was begun by `again`."""
    run: str
    """Its key."""
    files: str
    """`Snapshot.standing`: which files its rows are in."""


class _Kept:
    """Where that is stored. It is replaced by compare-and-swap: two runs that begin at once have one window."""

    def __init__(self, log: VersionLog, key: str) -> None:
        self._store, self._key = log.store, f"{log.model}/runs/{key}/window.json"
        self._etag: str | None = None

    def read(self) -> _Pinned | None:
        """None: nothing was begun."""
        try:
            self._etag = self._store.stat(self._key).etag
            return _Pinned.model_validate(verified(self._store.read(self._key, if_match=self._etag)))
        except (NotFound, StoreNotFound):
            self._etag = None
            return None
        except PreconditionFailed:
            return self.read()
        except (AttributeError, ValueError, TypeError, RecursionError) as error:
            raise CorruptObject(
                f"{self._store.url}/{self._key} is damaged: {error!r}. Delete it; at worst the batch run begins anew."
            ) from error

    def write(self, pinned: _Pinned) -> bool:
        """Store it in place of what was read; False if another run was faster."""
        data = checked(pinned.model_dump(mode="json"))
        if self._etag is None:
            return create_or_same(self._store, self._key, data)
        try:
            self._store.replace(self._key, data, if_match=self._etag)
        except (PreconditionFailed, NotFound):
            return False
        return True

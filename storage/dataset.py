"""A dataset: Parquet files at rest, a folder of them (optionally hive-partitioned) or a single one, read many times and pinned by
etags.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from tidemill.storage.choice import Choice, OfFile, Picks, digest
from tidemill.storage.errors import (
    DatasetChanged,
    DatasetError,
    InvalidKey,
    NotFound,
    PermissionDenied,
    StoreNotFound,
    UnsupportedTable,
    on_one_line,
)
from tidemill.storage.groups import Group
from tidemill.storage.lakehouse import (
    READ,
    look_for_table,
    metadata_of,
    open_table,
    refuse_parts_of_tables,
    refuse_tables,
)
from tidemill.storage.opening import FOOTER_READERS, OPEN_FILES, Opener
from tidemill.storage.overlap import inside
from tidemill.storage.parquet import row_groups
from tidemill.storage.partitions import is_hidden
from tidemill.storage.records import DatasetRef
from tidemill.storage.store import ObjectInfo, Store
from tidemill.storage.tables import Table
from tidemill.storage.urls import looks_like_a_pattern, open_store

logger = logging.getLogger("tidemill.storage")

SUFFIXES: Final = (".parquet", ".parq", ".pq")

_NAME_THE_FOLDER: Final = "Name the folder: all Parquet files below it are read, at any depth. Or name a single file."
_NAMED: Final = 3
"""Names that are told of each kind of object that is passed over."""
_HIDDEN: Final = "hidden Parquet files, whose name or folder begins with . or _"
_FOREIGN: Final = f"files that do not end in {', '.join(SUFFIXES)}"
_HOLDOUT: Final = "files of the holdout"
_WRITERS: Final = "other hidden files"


@dataclass(frozen=True)
class LeftOut:
    """Objects below a dataset's URL that are no part of it, of one kind."""

    reason: str
    count: int
    names: tuple[str, ...]
    """The first few keys, in order."""

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.names) else ""
        return f"{self.count} {self.reason} ({', '.join(map(on_one_line, self.names))}{more})"


@dataclass(frozen=True)
class Snapshot:
    """The files of a dataset as they were at one moment. Reading any other bytes later is an error, never a mixture."""

    ref: DatasetRef
    row_groups: Sequence[Group]
    """In order of (key, index)."""
    passed_over: tuple[LeftOut, ...] = ()
    """What lies below the URL and is not read, by reason."""
    folder: str = ""
    """URL of the folder that the names of the row groups are relative to."""
    files: tuple[ObjectInfo, ...] = ()
    """In order of their keys; none of a table in memory. Where rows are chosen, those without any are here too."""
    standing: str = ""
    """Where rows are chosen: a fingerprint as that of `ref`, but for the ends of a window. Empty: that of `ref`."""

    @property
    def schemas(self) -> list[tuple[str, pa.Schema]]:
        """Each distinct schema, with the whole name of the first row group that has it."""
        seen: list[tuple[str, pa.Schema]] = []
        for group in self.row_groups:
            if not any(group.schema is schema or group.schema.equals(schema) for _, schema in seen):
                seen.append((f"{self.folder}/{group.name}", group.schema))
        return seen

    @property
    def schema(self) -> pa.Schema:
        """Each column of any file once, with the type of the first file that has a type for it: null is none.

        A column that occurs twice in the first file stays so, for whoever reads it to refuse.
        """
        (_, merged), *others = self.schemas
        for _, schema in others:
            for field in schema:
                place = merged.get_field_index(field.name)  # -1 too if the name occurs twice
                if field.name not in merged.names:
                    merged = merged.append(field)
                elif place >= 0 and _has_no_type(merged.field(place).type):
                    merged = merged.set(place, field)
        return merged


def _has_no_type(kind: Any) -> bool:
    """True where a file has no value to take a type from: of nulls, or of empty lists."""
    nested = pa.types.is_nested(kind)
    return any(_has_no_type(kind.field(i).type) for i in range(kind.num_fields)) if nested else pa.types.is_null(kind)


def snapshot(
    url: str,
    stores: Callable[[str], Store] = open_store,
    types: Mapping[str, pa.DataType] | None = None,
    without: str | None = None,
    choice: Choice | None = None,
    version: int | None = None,
) -> Snapshot:
    """List a dataset and read all its footers. What is passed over is counted, and told by one line of the log.

    In a folder those files count that end in one of `SUFFIXES` and are not hidden (`is_hidden`). Of a table of Delta Lake or
    Iceberg those count that its log names.

    Args:
        url: A folder, or a single file, whose name may be any. Of an Iceberg table also its metadata, `.../v3.metadata.json`.
        stores: Opens the store at a URL.
        types: Types of partition columns, as a model knows them. Of others, the values of this dataset decide.
        without: `url` of the store of a holdout. Where it lies inside of the dataset, its objects are no part of that.
        choice: Which rows are asked for; None: all. What is asked of them is read of the row groups that may have some.
        version: Of a table the version, or the id of the snapshot; None: the newest.

    Raises:
        StoreNotFound: no such folder or bucket.
        DatasetError: no Parquet file, no rows, none that is chosen, or a file that cannot be read or lacks what is asked of its
            rows.
        UnsupportedTable: a table that cannot be read whole, one of Hudi, or a folder that holds a table or is a part of one.
        DatasetChanged: a file changed between listing and reading.
    """
    if (named := metadata_of(url)) is not None:
        there = stores(named[0])
        return _of_table(there, "Iceberg", version, named[1], choice)
    there = stores(url)
    try:
        store, infos, passed_over = _listed(there, stores, without)
    except UnsupportedTable as found:
        if found.url != there.url or found.system not in READ:
            raise
        return _of_table(there, found.system, version, None, choice)
    if version is not None:
        raise DatasetError(
            f"{there.url} is no table of Delta Lake or Iceberg: it has no versions, and table_version says one."
        )
    refuse_parts_of_tables(store.url, stores)
    _tell(store.url, passed_over)
    return _opened(there.url, store, infos, types or {}, passed_over, choice)


def _of_table(store: Store, system: str, version: int | None, metadata: str | None, choice: Choice | None) -> Snapshot:
    table, infos = open_table(store, system, version, metadata)
    logger.info("%s: %s, %d files", store.url, table.ref.told, len(infos))
    return _opened(store.url, store, infos, {}, (), choice, table)


def pinned(
    ref: DatasetRef, folder: str, files: Sequence[ObjectInfo], stores: Callable[[str], Store] = open_store
) -> Snapshot:
    """The snapshot that another process has taken, of these files in this folder: nothing is listed, all footers are read.

    Raises:
        DatasetChanged: a file is no longer what it was then.
        DatasetError: a file cannot be read.
    """
    store, table = stores(folder), None
    if ref.table is not None:
        table, _ = open_table(store, ref.table.system, ref.table.version, ref.table.metadata)
    found = _opened(ref.url, store, list(files), {}, (), Choice.of(ref.chosen), table)
    if found.ref != ref:
        raise DatasetChanged(
            f"{ref.url}: its {len(files)} files are not those that another process has read there. Nothing was registered; run "
            "again when its writer has finished, and let writers add files instead of replacing them."
        )
    return found


def _opened(
    url: str,
    store: Store,
    infos: list[ObjectInfo],
    types: Mapping[str, pa.DataType],
    passed_over: tuple[LeftOut, ...],
    choice: Choice | None = None,
    table: Table | None = None,
) -> Snapshot:
    """The snapshot of these files. Raises as `snapshot`."""
    opener = Opener(store, infos, types, table)
    picks = None if choice is None else Picks(choice, opener.types, opener.error, table)
    wanted: Sequence[int] = range(len(infos))
    if picks is not None:
        live = [None] * len(infos) if table is None else table.files
        wanted = [n for n in wanted if picks.may_hold(infos[n].key, live[n])]
    groups: list[Group] = []
    schemas: list[pa.Schema] = []
    identity: list[list[Any]] = []
    open_file = opener.cached if len(wanted) <= OPEN_FILES else opener.open  # all can stay open, or none would last
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        for number, file in zip(wanted, pool.map(open_file, wanted), strict=True):
            # One schema object for all equal files: 100,000 row groups must not hold 100,000 schemas.
            schema = next((s for s in schemas if s.equals(file.schema)), None)
            if schema is None:
                schemas.append(schema := file.schema)
            file.schema = schema
            info, found = infos[number], row_groups(file, functools.partial(opener.cached, number))
            # Not the etags, locally, where `chmod` and hard links change them: a run that is resumed would begin anew.
            identity.append([info.key, info.size, info.fingerprint_etag, file.footer_sha256])
            seen: Sequence[OfFile] = found
            if table is not None:
                seen = table.seen(table.files[number], file, found)
                identity[-1] += table.files[number].identity
            groups += seen if picks is None else []
            if picks is not None:
                picks.add(file, seen)
    ref = DatasetRef(url=url, fingerprint="", files=len(infos), rows=0, table=None if table is None else table.ref)
    if picks is not None:
        ref, groups, standing = picks.taken(ref, identity)
    else:
        # Of a table, what stands whatever its version is, and that version.
        standing = "" if table is None else digest([identity, table.columns])
        fingerprint = digest(identity if table is None else [standing, table.ref.version])
        ref = ref.model_copy(update={"fingerprint": fingerprint, "rows": sum(group.num_rows for group in groups)})
    if not groups:
        raise DatasetError(f"{url}: its {len(infos)} Parquet files hold no rows.")
    return Snapshot(ref, groups, passed_over, store.url, tuple(infos), standing)


def peek(url: str, stores: Callable[[str], Store] = open_store, version: int | None = None) -> tuple[str, pa.Schema]:
    """(name, schema) of the first file of a dataset that a listing gives: a few requests, however large the dataset is.

    Of a table, its own schema.

    Raises:
        StoreNotFound, DatasetError, UnsupportedTable, DatasetChanged: as `snapshot` does.
    """
    named = metadata_of(url)
    store = stores(url if named is None else named[0])
    try:
        if named is not None:
            raise UnsupportedTable(url, "Iceberg", store.url)
        look_for_table(store)  # a listing may begin with its data
        infos = refuse_tables(store.url, store.list(passed_over=lambda *_: None))
        first = next((i for i in infos if i.key.lower().endswith(SUFFIXES) and not is_hidden(i.key)), None)
    except UnsupportedTable as found:
        if found.url != store.url or found.system not in READ:
            raise
        return store.url, open_table(store, found.system, version, None if named is None else named[1])[0].schema
    except StoreNotFound:
        first = None
    if first is None:  # a single file, or an error
        store, (first, *_), _ = _listed(store, stores, None)
    return f"{store.url}/{first.key}", Opener(store, [first], {}).open(0).schema


def look_for(url: str, stores: Callable[[str], Store] = open_store) -> str:
    """The `url` of the store of a dataset, which is there: as far as one request tells, or a few.

    Raises:
        StoreNotFound, DatasetError: no such folder, bucket or file; see `snapshot`.
    """
    store = stores(url)
    try:
        next(iter(store.list(passed_over=lambda *_: None)), None)
    except StoreNotFound:
        _listed(store, stores, None)
    return store.url


def _listed(
    store: Store, stores: Callable[[str], Store], without: str | None
) -> tuple[Store, list[ObjectInfo], tuple[LeftOut, ...]]:
    """The store that has the files, the files in order of their keys, and what is passed over."""
    url = store.url
    try:
        infos, passed_over = _sorted_out(store, without)
    except StoreNotFound as error:
        if (found := _single_file(url, stores)) is not None:
            return *found, ()
        if looks_like_a_pattern(url):
            raise DatasetError(f"{url} is a pattern, which is not expanded. {_NAME_THE_FOLDER}") from error
        raise
    if infos:
        return store, infos, passed_over
    if (found := _single_file(url, stores)) is not None:
        return *found, ()
    if looks_like_a_pattern(url):
        raise DatasetError(f"{url} is a pattern, which is not expanded. {_NAME_THE_FOLDER}")
    found_there = f" Passed over: {'; '.join(map(str, passed_over))}." if passed_over else ""
    raise DatasetError(
        f"{url} holds no Parquet file (a name that ends in {', '.join(SUFFIXES)}). Check the URL.{found_there}"
    )


def _single_file(url: str, stores: Callable[[str], Store]) -> tuple[Store, list[ObjectInfo]] | None:
    """Its folder's store, and the file itself, if there is one at the URL."""
    folder, _, name = url.rpartition("/")
    if not folder.partition("://")[2] and folder != "file://":
        return None
    store = stores("file:///" if folder == "file://" else folder)
    try:
        return store, [store.stat(name)]
    except (NotFound, StoreNotFound, InvalidKey, PermissionDenied):
        return None


def _sorted_out(store: Store, without: str | None) -> tuple[list[ObjectInfo], tuple[LeftOut, ...]]:
    """The files that count, in order of their keys; and the other objects, by what keeps them out."""
    counted: list[ObjectInfo] = []
    others: dict[str, list[str]] = {reason: [] for reason in (_HIDDEN, _FOREIGN)}

    def leave_out(key: str, reason: str) -> None:
        others.setdefault(reason, []).append(key)

    is_holdout = (lambda key: False) if without is None else inside(store.url, without)
    for info in refuse_tables(store.url, store.list(passed_over=leave_out)):
        if is_holdout(info.key):
            leave_out(info.key, _HOLDOUT)
            continue
        is_parquet, hidden = info.key.lower().endswith(SUFFIXES), is_hidden(info.key)
        if is_parquet and not hidden:
            counted.append(info)
        elif not info.key.endswith("/"):  # an empty object by which some tools mark a folder
            leave_out(info.key, _HIDDEN if is_parquet else _WRITERS if hidden else _FOREIGN)
    counted.sort(key=lambda info: info.key)
    return counted, tuple(
        LeftOut(reason, len(keys), tuple(sorted(keys)[:_NAMED])) for reason, keys in others.items() if keys
    )


def _tell(url: str, passed_over: Sequence[LeftOut]) -> None:
    """One line: a warning if what is passed over may be data, as hidden markers of writers (`_SUCCESS`) are not."""
    if passed_over:
        data = any(kind.reason not in (_WRITERS, _HOLDOUT) for kind in passed_over)
        level = logging.WARNING if data else logging.INFO
        logger.log(level, "%s: passed over, and no part of the dataset: %s", url, "; ".join(map(str, passed_over)))

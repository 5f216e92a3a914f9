"""Prediction: a version's outputs for every row of a dataset, file by file, with the preprocessing that it was trained with."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from tidemill.progress import under_way
from tidemill.storage.aliases import resolve
from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import (
    DatasetError,
    NotFound,
    PermissionDenied,
    PlacesOverlap,
    PreconditionFailed,
    StoreNotFound,
    on_one_line,
)
from tidemill.storage.groups import Group
from tidemill.storage.log import VersionLog
from tidemill.storage.overlap import inside, keep_apart, keep_out_of_dataset
from tidemill.storage.records import ChosenRows
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import RowSettings
from tidemill.tasks.snapshots import choice_of
from tidemill.tasks.training.classes import PREDICTED, Label, predicted_columns
from tidemill.tasks.training.loop import predict as predict_groups
from tidemill.tasks.versions import load_frozen

logger = logging.getLogger("tidemill.predict")

_OUTPUT: Final = "the output of predictions"


class Predicted(BaseModel):
    """What `predict` wrote."""

    model: str
    version: int
    files: int
    rows: int
    output: str


def predict(
    registry: str,
    model: str,
    dataset: str,
    output: str,
    version: str = "champion",
    columns: Sequence[str] = (),
    rows: RowSettings = RowSettings(),
    *,
    stores: Callable[[str], Store] = open_store,
) -> Predicted:
    """Write one Parquet file of predictions for each file of a dataset, under the same key, rows in the same order.

    The column `prediction` is float32: the value in the target's unit (regression), the probability of 1 (binary), or a
    fixed-size list of class probabilities (multiclass). Where the target holds labels, it is the most probable label instead, as
    text, boolean or int64, and `probabilities` is a fixed-size list of those of all labels, whose order stands in the metadata of
    that column and in `_SUCCESS`. Memory: row groups and their inputs as in training, without a shuffle
    window, and the file that is being written, twice while it is stored.

    The result is whole while `_SUCCESS` is there, which is removed before the first file is written and comes back after the last
    one. Files of an earlier result that the dataset no longer has are removed then.

    Args:
        registry: URL below which models live.
        model: Name of the model.
        dataset: URL of the rows; the target column is not needed.
        output: URL of a folder; objects of the same keys are replaced.
        version: An alias, a version's number, or `head`.
        columns: Columns of the dataset to copy beside the prediction.
        rows: Which rows to predict for; by default all. A file without any of them has no file of predictions.
        stores: Opens the store at a URL.

    Raises:
        UnknownAlias, UnknownVersion, UnknownModel: there is no such version.
        PlacesOverlap: the predictions would be written into a dataset, an inbox or the registry of the model. Nothing was
            written.
        DatasetError: the dataset cannot be read, or lacks a column to copy, or has several of its name; or a column to copy is
            named twice, or as one that is written.
        ColumnError: the dataset lacks a column that the model needs, or has one that it cannot use.
    """
    log, target = VersionLog(stores(registry), model), stores(output)
    chosen = resolve(log, version)
    keep_out_of_dataset(stores(dataset).url, [(_OUTPUT, target.url)])
    keep_apart(log, _OUTPUT, target.url)
    frozen = load_frozen(log, chosen)
    if twice := [name for name in columns if name in PREDICTED]:
        raise DatasetError(f"{twice[0]!r} is the name of a column of predictions: it cannot be copied beside them.")
    if len(set(columns)) < len(columns):
        raise DatasetError(
            f"columns to copy are {', '.join(map(repr, columns))}: name each once, or nobody can tell them apart."
        )
    taken = snapshot(
        dataset, stores, frozen.features.types, choice=choice_of(rows, datetime.now(UTC)), version=rows.table_version
    )
    for name, schema in taken.schemas:
        frozen.features.check(schema, name, labelled=False)
        if missing := [c for c in columns if c not in schema.names]:
            raise DatasetError(f"{name} has no column {missing[0]!r} to copy; it has {schema.names}.")
        if several := [c for c in columns if len(schema.get_all_field_indices(c)) > 1]:
            raise DatasetError(f"{name} has several columns {several[0]!r}: which one to copy cannot be told.")
    files: dict[str, list[_Copied]] = {}
    for one in taken.row_groups:
        files.setdefault(one.file, []).append(_Copied(one, columns))
    labels = frozen.features.labels
    repeated = [*columns, *(["prediction"] if labels else [])]
    into_dataset = inside(target.url, taken.ref.url)
    if (replaced := next((file for file in files if into_dataset(file)), None)) is not None:
        raise PlacesOverlap(
            f"{target.url}/{replaced}, a file of predictions, would be a file of the dataset {taken.ref.url}: choose another "
            "output."
        )
    about = Record(
        model=model,
        version=chosen.number,
        dataset=taken.ref.url,
        rows=taken.ref.rows,
        labels=labels,
        chosen=taken.ref.chosen,
    )
    result = _Result(target, about)
    result.begin(files)
    # Of all files at once, so that those to come are read while one is written.
    with (
        closing(predict_groups(frozen, [group for groups in files.values() for group in groups])) as predicted,
        under_way(f"predictions of version {chosen.number}", total=taken.ref.rows) as activity,
    ):
        for number, (file, groups) in enumerate(files.items(), 1):
            sink = pa.BufferOutputStream()
            writer: pq.ParquetWriter | None = None
            for group in groups:
                outputs = next(predicted)
                table = group.taken()
                for field, values in predicted_columns(outputs, labels):
                    table = table.append_column(field, values)
                # Hardly two predictions are alike: a dictionary of them takes longer to make than all the rest of the file.
                writer = writer or pq.ParquetWriter(sink, table.schema, use_dictionary=repeated)  # type: ignore[arg-type]  # names too
                writer.write_table(table)
                activity.advance(table.num_rows)
            assert writer is not None
            writer.close()
            result.write(file, sink.getvalue().to_pybytes())
            logger.info("%s/%s (%d of %d files)", target.url, file, number, len(files))
    result.end()
    return Predicted(model=model, version=chosen.number, files=len(files), rows=taken.ref.rows, output=target.url)


# ---- when a result is whole ------------------------------------------------------------------------------------------
SUCCESS: Final = "_SUCCESS"
"""There while the result is whole, as other writers of Parquet have it; holds a `Record`."""
UNFINISHED: Final = "_UNFINISHED"
"""There while a result is being written, or if that was cut short; holds a `Record` of what may be there."""


class Record(BaseModel):
    """What was predicted, and which files hold it."""

    model: str
    version: int
    dataset: str
    rows: int
    labels: tuple[Label, ...] | None = None
    """In the order of their probabilities; None: `prediction` is a number."""
    chosen: ChosenRows | None = None
    """Which rows of the dataset; None: all."""
    files: dict[str, str] = Field(default_factory=dict)
    """Key -> etag when it was written. Empty in `UNFINISHED` for a key that was free and is to be written."""


class _Result:
    """The files of one call, and what an earlier call has left."""

    def __init__(self, target: Store, record: Record) -> None:
        self._target, self._record = target, record
        self._earlier: dict[str, str] = {}

    def begin(self, keys: Iterable[str]) -> None:
        """Nothing below the output looks whole from here on, until the end."""
        present: set[str] = set()
        with suppress(StoreNotFound):  # a folder begins with its first object
            present = {info.key for info in self._target.list()}
        for name in (UNFINISHED, SUCCESS):
            if name in present:
                self._earlier |= self._files(name)
        may_be_there = self._earlier | {key: "" for key in keys if key not in present}
        self._put(UNFINISHED, self._record.model_copy(update={"files": may_be_there}))
        if SUCCESS in present:
            self._target.delete(SUCCESS)

    def write(self, key: str, data: bytes) -> None:
        self._record.files[key] = self._target.write(key, data).etag

    def end(self) -> None:
        """Remove what only an earlier result had, then say that this one is whole."""
        for key, etag in self._earlier.items():
            if key not in self._record.files:
                self._delete(key, etag or None)
        self._put(SUCCESS, self._record)
        self._delete(UNFINISHED, None)

    def _files(self, name: str) -> dict[str, str]:
        try:
            return Record.model_validate_json(self._target.read(name)).files
        except (NotFound, ValueError):  # another program's, or none by now
            return {}

    def _put(self, name: str, record: Record) -> None:
        self._target.write(name, record.model_dump_json(indent=2).encode())

    def _delete(self, key: str, etag: str | None) -> None:
        try:
            self._target.delete(key, if_match=etag)
        except (NotFound, PreconditionFailed):  # gone, or somebody else's by now
            return
        except PermissionDenied as error:
            logger.warning("%s/%s, of an earlier result, stays: %s", self._target.url, on_one_line(key), error)


class _Copied:
    """A row group that keeps some columns when it is read: one read for the inputs and for what is copied."""

    __slots__ = ("_columns", "_group", "_kept", "name", "num_rows", "readers", "schema")  # there may be 100,000

    def __init__(self, group: Group, columns: Sequence[str]) -> None:
        self.name, self.num_rows, self.schema, self.readers = group.name, group.num_rows, group.schema, group.readers
        self._group, self._columns = group, columns
        self._kept: pa.Table | None = None

    def read(self, columns: Sequence[str]) -> pa.Table:
        table = self._group.read(list(dict.fromkeys([*columns, *self._columns])))
        self._kept = table.select(list(self._columns))
        return table.select(list(columns))

    def taken(self) -> pa.Table:
        """What was kept; no longer here."""
        assert self._kept is not None, "it has been read"
        kept, self._kept = self._kept, None
        return kept

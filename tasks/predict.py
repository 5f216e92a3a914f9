"""Prediction: a version's outputs for every row of a dataset, file by file, with the preprocessing that it was trained with."""

import logging
from collections.abc import Sequence
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from tidemill.storage.aliases import resolve
from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import DatasetError
from tidemill.storage.log import open_log
from tidemill.storage.parquet import RowGroup
from tidemill.storage.urls import open_store
from tidemill.tasks.training.loop import predict as predict_groups
from tidemill.tasks.versions import load_learner

logger = logging.getLogger("tidemill.predict")


class Predicted(BaseModel):
    """What `predict` wrote."""

    model: str
    version: int
    files: int
    rows: int
    output: str


def predict(
    registry: str, model: str, dataset: str, output: str, version: str = "champion", columns: Sequence[str] = ()
) -> Predicted:
    """Write one Parquet file of predictions for each file of a dataset, under the same key, rows in the same order.

    The column `prediction` is float32: the value in the target's unit (regression), the probability of 1 (binary), or a
    fixed-size list of class probabilities (multiclass). Memory: row groups and their inputs as in training, without a shuffle
    window, and the file that is being written, twice while it is stored.

    Args:
        registry, model: Where the version is.
        dataset: URL of the rows; the target column is not needed.
        output: URL of a folder; objects of the same keys are replaced.
        version: An alias, a version's number, or `head`.
        columns: Columns of the dataset to copy beside the prediction.

    Raises:
        UnknownAlias, UnknownVersion, UnknownModel, DatasetError, ColumnError.
    """
    log = open_log(registry, model, writable=False)
    found = resolve(log, version)
    learner = load_learner(log, found)
    taken, target = snapshot(dataset, types=learner.features.types), open_store(output)
    for name, schema in taken.schemas:
        learner.features.check(schema, name, labelled=False)
        if missing := [c for c in columns if c not in schema.names]:
            raise DatasetError(f"{name} has no column {missing[0]!r} to copy; it has {schema.names}.")
    files: dict[str, list[_Copied]] = {}
    for one in taken.row_groups:
        files.setdefault(one.file, []).append(_Copied(one, columns))
    # Of all files at once, so that those to come are read while one is written.
    with closing(predict_groups(learner, [group for groups in files.values() for group in groups])) as predicted:
        for number, (file, groups) in enumerate(files.items(), 1):
            sink = pa.BufferOutputStream()
            writer: pq.ParquetWriter | None = None
            for group in groups:
                outputs = next(predicted)
                values = pa.array(outputs.reshape(-1).numpy())
                if outputs.ndim == 2:
                    values = pa.FixedSizeListArray.from_arrays(values, outputs.shape[1])
                table = group.taken().append_column("prediction", values)
                writer = writer or pq.ParquetWriter(sink, table.schema)
                writer.write_table(table)
            assert writer is not None
            writer.close()
            target.write(file, sink.getvalue().to_pybytes())
            logger.info("%s/%s (%d of %d files)", target.url, file, number, len(files))
    return Predicted(model=model, version=found.number, files=len(files), rows=taken.ref.rows, output=target.url)


class _Copied:
    """A row group of which some columns are kept when it is read: one read for the inputs and for what is copied."""

    __slots__ = ("_columns", "_group", "_kept", "name", "num_rows", "readers", "schema")  # there may be 100,000

    def __init__(self, group: RowGroup, columns: Sequence[str]) -> None:
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

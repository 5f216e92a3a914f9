"""A version of a model in memory, ready to predict.

The network and the preprocessing of a version are read once in a process, however often it is loaded: they are kept while
somebody uses them, and in any case those of the version that was loaded last, of each of the last `MODELS` models.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, overload
from weakref import WeakValueDictionary

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.storage.chain import Version
from tidemill.storage.log import VersionLog
from tidemill.tasks.serving.rows import Row, RowEncoder
from tidemill.tasks.training.classes import PREDICTED, Label, predicted_columns
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.loop import predicted
from tidemill.tasks.training.spec import BUILT_IN_MODELS, Spec
from tidemill.tasks.versions import load_frozen

MODELS: Final = 4
"""Models whose last version stays in memory though nobody uses it."""
_REQUEST: Final = "the table"
"""What messages call a table that was given."""


class _Ready:
    """What is read of a version. Threads and predictors share it."""

    def __init__(self, version: Version, network: Network) -> None:
        self.network = network
        self.network.served.eval()
        self.is_built_in = network.spec.model.factory in BUILT_IN_MODELS
        self.encoder = RowEncoder(self.network.features, version.manifest.columns)


@dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """One version of a model, in memory and ready to predict: it never changes, and threads may share it. `load` makes it."""

    version: Version
    """Its `number`, its `manifest`, and that one's `sha256`, which tells it from a version of the same number elsewhere."""
    _ready: _Ready

    @classmethod
    def of(cls, version: Version, network: Network) -> Self:
        """A predictor of a network that was loaded already, and is not used otherwise from here on."""
        return cls(version, _Ready(version, network))

    def __repr__(self) -> str:
        return f"<Predictor of {self.version.manifest.model!r}, version {self.version.number}>"

    @property
    def spec(self) -> Spec:
        """What the version was trained by, with what it leaves to defaults and to the data filled in."""
        return self._ready.network.spec

    @property
    def network(self) -> Network:
        """The network in evaluation mode, on the CPU, and its preprocessing. Not to be changed: others are given the same one."""
        return self._ready.network

    @property
    def labels(self) -> tuple[Label, ...] | None:
        """What `probabilities` are of, in their order. None: the target holds no labels, and there is no such column."""
        return self._ready.network.features.labels

    @overload
    def predict(self, rows: pa.Table) -> pa.Table: ...

    @overload
    def predict(self, rows: Sequence[Row]) -> list[dict[str, Any]]: ...

    def predict(self, rows: pa.Table | Sequence[Row]) -> pa.Table | list[dict[str, Any]]:
        """Predict for each row, in order: the columns that `tidemill predict` writes, as a table for a table, as dicts for dicts.

        `prediction` is float32 in a table and a float in a dict: the value in the target's unit (regression), the probability of
        1 (binary), or a list, of the probabilities of all classes (multiclass) or of the values of several targets. Where the
        target holds labels, it is the most probable label, and `probabilities` is a list of those of all, in the order of
        `labels`.

        Args:
            rows: A table with a column for each feature, of the type that it was trained on or another of the same family, as
                int32 for int64. Or dicts with a value or None for each feature: numbers, text, bytes, datetimes, lists; from JSON
                also times as ISO 8601 text and durations as seconds. What else a table or a dict holds is not looked at.

        Raises:
            ColumnError: a column is missing, is of another family, or holds NaN or infinity. Of dicts it is a `RowError`, which
                has the number of the row, from 0, and the column.
            ModelError: the user's own model raised.
        """
        if isinstance(rows, pa.Table):
            fields, arrays = zip(*predicted_columns(self.outputs(rows), self.labels), strict=True)
            return pa.Table.from_arrays(list(arrays), schema=pa.schema(fields))
        if not isinstance(rows, Sequence):
            raise TypeError(
                f"rows are a pyarrow.Table or a list of dicts, not {type(rows).__name__}: a frame of pandas becomes a table by "
                "pyarrow.Table.from_pandas, one of polars by its to_arrow()"
            )
        if not rows:
            return []
        outputs = self.outputs(rows)
        if self.labels is None:
            return [{PREDICTED[0]: value} for value in outputs.tolist()]
        labels, probabilities = (array.to_pylist() for _, array in predicted_columns(outputs, self.labels))
        return [dict(zip(PREDICTED, values, strict=True)) for values in zip(labels, probabilities, strict=True)]

    def outputs(self, rows: pa.Table | Sequence[Row]) -> Tensor:
        """Values or probabilities for one or more rows, as `predict` takes them: float32 [N] or [N, O]. Raises the same."""
        if not self._ready.is_built_in:  # the user's may ask for gradients, or keep tensors for whoever takes `network`
            return self._outputs(rows)
        with torch.inference_mode():  # each operation takes less time
            outputs = self._outputs(rows)
        return outputs.clone()  # one that may be changed, and be a part of what is trained

    def _outputs(self, rows: pa.Table | Sequence[Row]) -> Tensor:
        if isinstance(rows, pa.Table):
            return self._of_table(rows)
        return predicted(self.network, self._ready.encoder.encode(rows))

    def _of_table(self, table: pa.Table) -> Tensor:
        """As `loop.predict` has them of a row group: encoded in slices of at most `window_bytes`."""
        features = self.network.features
        features.check(table.schema, _REQUEST, labelled=False)
        table = table.select(features.names(labelled=False))
        size = max(1, self.spec.window_bytes // features.row_bytes)
        pieces = (table.slice(at, size) for at in range(0, max(table.num_rows, 1), size))
        return torch.cat([predicted(self.network, features.encode(piece, _REQUEST)) for piece in pieces])


# ---- in memory -------------------------------------------------------------------------------------------------------
_in_use: Final = WeakValueDictionary[str, _Ready]()
"""By the sha256 of the manifest, which names the blobs by theirs."""
_last: Final = dict[str, _Ready]()
"""Of a model, by its URL; the one that was loaded last comes last."""
_locks: Final = dict[str, threading.Lock]()
"""One for each model: whoever comes second waits for what the first one reads."""
_keeping: Final = threading.Lock()


def predictor_of(log: VersionLog, version: Version) -> Predictor:
    """A version ready to predict, read and verified unless it is in memory. Raises what `load` raises."""
    with _locks.setdefault(log.url, threading.Lock()):
        ready = _in_use.get(version.sha256)
        if ready is None:
            ready = _in_use[version.sha256] = _Ready(version, load_frozen(log, version))
        with _keeping:
            _last.pop(log.url, None)
            _last[log.url] = ready
            while len(_last) > MODELS:
                del _last[next(iter(_last))]
    return Predictor(version, ready)

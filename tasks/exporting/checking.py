"""Whether an exported version predicts what `tidemill predict` does: found out before it is written.

Shape legend: N rows, O outputs, T targets.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.storage.dataset import snapshot
from tidemill.storage.errors import StorageError
from tidemill.storage.log import VersionLog
from tidemill.storage.overlap import named_datasets
from tidemill.storage.store import Store
from tidemill.tasks.errors import CannotExport
from tidemill.tasks.exporting.formats import Run
from tidemill.tasks.exporting.layout import as_trained, inputs_of
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup, TableGroup
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.loop import predict
from tidemill.tasks.training.made_up import made_up

TOLERANCE: Final = 1e-5
"""Of |a - b| / max(1, |b|), in units of the standardised target."""
CHECKED_ROWS: Final = 10_000
"""Of a dataset, at most: the first ones."""
MADE_UP_ROWS: Final = 256
_NULL_EACH: Final = 5
"""Of the made-up rows, each column is null in each fifth one, and all are in the first."""

logger = logging.getLogger("tidemill.export")


@dataclass(frozen=True)
class Rows:
    """What a version is tried on."""

    name: str
    """In words."""
    tables: Sequence[pa.Table]

    @property
    def count(self) -> int:
        return sum(table.num_rows for table in self.tables)


# ---- rows ------------------------------------------------------------------------------------------------------------
def rows_of_dataset(url: str, features: Features, stores: Callable[[str], Store]) -> Rows:
    """The first rows of a dataset.

    Raises:
        StorageError: the dataset cannot be read.
        ColumnError: it has not the columns of the model.
    """
    taken = snapshot(url, stores, features.types)
    groups: list[RowGroup] = []
    wanted = CHECKED_ROWS
    for group in taken.row_groups:
        if wanted > 0 and group.num_rows:
            groups.append(group)
            wanted -= group.num_rows
    tables: list[pa.Table] = []
    with closing(features.tables(groups, labelled=False)) as read:
        tables += (table.slice(0, CHECKED_ROWS - sum(t.num_rows for t in tables)) for table in read)
    rows = Rows(taken.ref.url, tables)
    for table in tables:
        features.encode(table, rows.name)  # here, since the caller may do without them
    return rows


def rows_of_lineage(log: VersionLog, number: int, features: Features, stores: Callable[[str], Store]) -> Rows | None:
    """The first rows of the dataset of the last batch training that version `number` goes back to, as far as the log tells.

    None, with a warning, where there is none that can be read.
    """
    before = {version: url for url, version in named_datasets(log).items() if version <= number}
    if not before:
        logger.warning(
            "the registry names no dataset that version %d goes back to: only made-up rows are tried", number
        )
        return None
    url = before[max(before)]
    try:
        return rows_of_dataset(url, features, stores)
    except (StorageError, ColumnError) as error:
        logger.warning(
            "the dataset that version %d goes back to cannot be read: only made-up rows are tried: %s", number, error
        )
        return None


def made_up_rows(features: Features) -> Rows:
    """Rows that nobody has measured, with nulls in all columns: what a dataset may not have."""
    table = made_up(features, MADE_UP_ROWS).table.select(features.names(labelled=False))
    for i, name in enumerate(table.column_names):
        kept = [None if not row or (row + i) % _NULL_EACH == 0 else row for row in range(MADE_UP_ROWS)]
        table = table.set_column(i, name, table.column(i).take(pa.array(kept, pa.int64())))
    return Rows("made-up rows", [table])


# ---- comparing -------------------------------------------------------------------------------------------------------
def check(run: Run, network: Network, types: Mapping[str, str], sets: Iterable[Rows]) -> float:
    """Compare what `run` gives with what the version predicts, for batches and for a single row.

    Args:
        run: The exported version.
        network: The version itself, in evaluation mode.
        types: Of the columns it was trained on: the rows are taken as these (`layout.as_trained`).
        sets: Rows.

    Returns:
        The largest difference (`differences`).

    Raises:
        CannotExport: a row's difference is larger than `TOLERANCE`. The worst one is named.
    """
    features, worst = network.features, 0.0
    for rows in sets:
        tables = [as_trained(features, types, table) for table in rows.tables]
        with closing(predict(network, [TableGroup(rows.name, table) for table in tables])) as predicted:
            for table, want in zip(tables, predicted, strict=True):
                inputs = inputs_of(features, table, rows.name)
                found = run(inputs)
                alone = run({name: tensor[:1] for name, tensor in inputs.items()})
                for got, expected in ((found, want), (alone, want[:1])):
                    worst = max(worst, _compared(got, expected, features, rows.name))
    return worst


def _compared(got: Tensor, want: Tensor, features: Features, where: str) -> float:
    if got.shape != want.shape:
        raise CannotExport(
            f"the exported model gives {list(got.shape)} for {where}, where predict gives {list(want.shape)}: nothing was written"
        )
    if not want.numel():
        return 0.0
    apart, allowed = differences(got, want, features)
    excess = (apart - allowed).flatten()
    if float(excess.max()) > 0:
        at = int(excess.argmax())
        row = at // (want.numel() // len(want))
        raise CannotExport(
            f"the exported model gives {got.flatten()[at]:.9g} for row {row} of {where}, where predict gives "
            f"{want.flatten()[at]:.9g}: {apart.flatten()[at]:.2g} apart, in units of the standardised target, where "
            f"{allowed.flatten()[at]:.2g} is allowed; of {len(want)} rows this is the worst, and nothing was written"
        )
    return float(apart.max())


def differences(got: Tensor, want: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """(|a - b| / max(1, |b|), how much of it is allowed), float64: in units of the standardised target, or of probabilities.

    Allowed is `TOLERANCE`, and what two neighbouring float32 are apart: of a target whose mean lies far from 0 for its deviation
    that is more. NaN equals NaN.

    Args:
        got: Predictions, float32 [N] or [N, O].
        want: Others, of the same shape.
        features: Of the version: the target's mean and deviation.
    """
    a, b = got.double(), want.double()
    grain = b.abs() * torch.finfo(torch.float32).eps
    seen = features.statistics
    if features.task == "regression" and seen is not None:
        a, b = (a - seen.target_mean) / seen.target_std, (b - seen.target_mean) / seen.target_std
        grain = grain / seen.target_std
    large = b.abs().clamp(min=1)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, ((a - b).abs() / large).nan_to_num(nan=torch.inf))
    return apart, (TOLERANCE + grain / large).nan_to_num()

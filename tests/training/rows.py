"""Row groups in memory, and the small pieces that the training tests share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup, TableGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.spec import Spec

WHERE: Final = "part-0.parquet row group 0"
VECTORS: Final = pa.array([[1, 2], None, [3, None], [5, 6]], pa.list_(pa.int32(), 2))


@dataclass(eq=False)
class Noted(TableGroup):
    """Remembers which columns were read."""

    reads: list[list[str]] = field(default_factory=list)

    def read(self, columns: Sequence[str]) -> pa.Table:
        self.reads.append(list(columns))
        return super().read(columns)


def cut(table: pa.Table, *sizes: int) -> list[Noted]:
    """The table as row groups of these sizes and one of what is left."""
    groups, at = [], 0
    for size in (*sizes, table.num_rows - sum(sizes)):
        groups.append(Noted(f"part-0.parquet row group {len(groups)}", table.slice(at, size)))
        at += size
    return groups


def numbers_table(rows: int, columns: int = 10, seed: int = 0) -> pa.Table:
    """float32 columns x0, x1, ... and y, which depends on them linearly."""
    x_FN = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed))
    y_N = torch.linspace(-1, 1, columns) @ x_FN + 0.5
    return pa.table({**{f"x{i}": x_N.numpy() for i, x_N in enumerate(x_FN)}, "y": y_N.numpy()})


def plain_spec(columns: int = 10, **settings: Any) -> Spec:
    """Nothing standardised, nothing shuffled: what a plain script would do."""
    defaults: dict[str, Any] = {"shuffle": False, "standardize_features": False, "target": "y"}
    return Spec(**(defaults | {"features": [f"x{i}" for i in range(columns)]} | settings))


def spec_of(*features: Any, **settings: Any) -> Spec:
    """A spec of these features, nothing standardised."""
    return Spec(**({"features": features, "target": "y", "standardize_features": False} | settings))


def table_of(array: pa.Array) -> pa.Table:
    """The array as column a, with a target."""
    return pa.table({"a": array, "y": pa.array([0.0] * len(array), pa.float32())})


def begin(spec: Spec, groups: Sequence[RowGroup]) -> Learner:
    return Learner.create(spec, Features.resolve(spec, groups[0].schema).fit(groups))


class Rows(NamedTuple):
    """All that is made of a table."""

    x_NF: Tensor
    ids_NC: Tensor | None
    y_N: Tensor
    labelled_N: Tensor | None
    w_N: Tensor | None


def encoded(features: Features, table: pa.Table, where: str = WHERE) -> Rows:
    y_N, labelled_N = features.target(table, where)
    w_N = features.weights(table, where)
    return Rows(*features.encode(table, where), y_N, labelled_N, w_N)


def encode(spec: Spec, table: pa.Table) -> Rows:
    """The table encoded with statistics of its own."""
    return encoded(Features.resolve(spec, table.schema).fit([TableGroup(WHERE, table)]), table)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


class Net(nn.Module):
    """The example network: Linear(10, 20), then Linear(20, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(10, 20)
        self.output = nn.Linear(20, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.output(self.hidden(x_BF))


class DropoutNet(nn.Module):
    """Draws random numbers in training and keeps buffers."""

    def __init__(self, size: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layers(x_BF)


class TiedNet(nn.Module):
    """One weight under two names, and another that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 10)
        self.b = nn.Linear(10, 10)
        self.b.weight = self.a.weight
        self.transposed = nn.Parameter(torch.randn(1, 10).t())

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.b(self.a(x_BF)) @ self.transposed


class FlatNet(nn.Linear):
    """Returns [B]."""

    def __init__(self) -> None:
        super().__init__(10, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return super().forward(x_BF).squeeze(1)


class WideNet(nn.Linear):
    """Returns [B, 2]: wrong for regression."""

    def __init__(self) -> None:
        super().__init__(10, 2)

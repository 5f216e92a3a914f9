"""What many tests are made of: rows that a model can learn, as tables and as Parquet files, put into stores and listed."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tidemill.storage.urls import open_store
from tidemill.tasks.search import Clock
from tidemill.tasks.training.spec import Spec

SPEC = Spec.model_validate(
    {"features": ["a", "b"], "target": "y", "learning_rate": 0.05, "batch_size": 16, "epochs": 3, "seed": 7}
)


def rows(count: int, seed: int, slope: float = 2.0) -> pa.Table:
    """y = slope * a - b, without noise."""
    a, b = torch.randn(2, count, generator=torch.Generator().manual_seed(seed))
    return pa.table({"a": a.tolist(), "b": b.tolist(), "y": (slope * a - b).tolist()})


def parquet(table: pa.Table, row_group_size: int | None = 50, **options: Any) -> bytes:
    """The table as a Parquet file; further options are those of `pq.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size, **options)
    return bytes(sink.getvalue())


def put(url: str, objects: Mapping[str, pa.Table | bytes]) -> None:
    """Put tables, or raw bytes, one after the other in the order of their keys."""
    store = open_store(url)
    for key in sorted(objects):
        value = objects[key]
        store.write(key, parquet(value) if isinstance(value, pa.Table) else value)


def keys(url: str) -> list[str]:
    """Everything visible below a URL."""
    return sorted(info.key for info in open_store(url).list() if not info.key.startswith(".tidemill"))


class EveryNinth(Clock):
    """A checkpoint is due at each ninth time that is asked, in place of some seconds after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def due(self) -> bool:
        self._asked += 1
        return self._asked % 9 == 0

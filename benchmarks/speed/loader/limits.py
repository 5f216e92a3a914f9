"""What the machine allows a loader: plain Arrow and torch with nothing in between."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.speed.loader import LOADERS, Passes
from benchmarks.speed.work import Work

Rows = tuple[Tensor, Tensor]  # x float32 [N, F], row-major; y float32 [N]


def tables(work: Work) -> Iterator[pa.Table]:
    """Each row group, decoded by Arrow's own threads; one file open at a time."""
    for name in work.files:
        file = pq.ParquetFile(name, pre_buffer=False)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def row_major(table: pa.Table, features: list[str]) -> Rows:
    """Columns as tensors."""
    batch = table.combine_chunks().to_batches()[0]
    x = batch.select(features).to_tensor(row_major=True).to_numpy()
    return torch.from_numpy(x), torch.from_dlpack(batch.column("y"))  # column.to_numpy() would import pandas


def permuted(rows: Rows) -> Rows:
    """Rows in a random order; `index_select` is the fastest gather that torch has."""
    order = torch.randperm(len(rows[0]))
    return rows[0].index_select(0, order), rows[1].index_select(0, order)


def views(rows: Rows, batch: int) -> Iterator[Rows]:
    """Batches without a copy."""
    return zip(rows[0].split(batch), rows[1].split(batch), strict=True)


def all_rows(work: Work) -> Rows:
    """The whole dataset in memory."""
    x, y, at = torch.empty(work.rows, len(work.features)), torch.empty(work.rows), 0
    for table in tables(work):
        end = at + len(table)
        x[at:end], y[at:end] = row_major(table, work.features)
        at = end
    return x, y


def ahead(work: Work) -> Generator[Rows]:
    """Permuted row groups, each made in a thread while the one before it is used."""
    coming = (permuted(row_major(table, work.features)) for table in tables(work))
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(next, coming, None)
        while (block := future.result()) is not None:
            future = executor.submit(next, coming, None)
            yield block


@LOADERS.case("limit")
def streaming(work: Work) -> Passes:
    """Streaming limit: row groups decoded, made row-major, permuted, sliced; one group ahead in a thread."""
    return lambda number: (batch for block in ahead(work) for batch in views(block, work.batch))


@LOADERS.case("limit")
def streaming_alone(work: Work) -> Passes:
    """The same without a thread."""
    return lambda number: (
        batch for table in tables(work) for batch in views(permuted(row_major(table, work.features)), work.batch)
    )


@LOADERS.case("limit")
def in_memory(work: Work) -> Passes:
    """Views of tensors that hold the whole dataset, permuted once."""
    rows = permuted(all_rows(work))
    return lambda number: views(rows, work.batch)

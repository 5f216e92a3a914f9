"""What the machine allows a loader: plain Arrow and torch with nothing in between."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.speed.loader import LOADERS, Passes
from benchmarks.speed.work import Work

Rows = tuple[Tensor, Tensor]  # x float32 [N, F], row-major; y float32 [N]
BLOCK_NUMBERS: Final = 262_144  # 1 MB, which stays in the cache
T = TypeVar("T")


def tables(work: Work) -> Generator[pa.Table]:
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


def scattered(table: pa.Table, features: list[str]) -> Rows:
    """Rows in a random order without a gather: columns fill a block in the cache, whose rows go to their places as they are."""
    batch = table.combine_chunks().to_batches()[0]
    columns = [torch.from_dlpack(batch.column(name)).numpy() for name in features]
    places = torch.randperm(len(batch)).numpy()
    x, y = torch.empty(len(batch), len(features)), torch.empty(len(batch))
    y.numpy()[places] = torch.from_dlpack(batch.column("y")).numpy()
    room = np.empty((max(1, BLOCK_NUMBERS // len(features)), len(features)), np.float32)
    opaque = f"V{room[0].nbytes}"
    for at in range(0, len(batch), len(room)):
        block = room[: len(batch) - at]
        for number, column in enumerate(columns):
            block[:, number] = column[at : at + len(room)]
        np.put(x.numpy().view(opaque), places[at : at + len(room)], block.view(opaque), mode="clip")
    return x, y


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


def ahead(items: Generator[T]) -> Generator[T]:
    """The same items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(next, items, None)
        while (item := future.result()) is not None:
            future = executor.submit(next, items, None)
            yield item


@LOADERS.case("limit")
def streaming(work: Work) -> Passes:
    """Streaming limit: row groups decoded, made row-major, permuted, sliced; one group ahead in a thread."""

    def blocks() -> Generator[Rows]:
        return ahead(permuted(row_major(table, work.features)) for table in tables(work))

    return lambda number: (batch for block in blocks() for batch in views(block, work.batch))


@LOADERS.case("limit")
def streaming_scattered(work: Work) -> Passes:
    """Another: rows put in their random places while they are made row-major; decoding and that in a thread each."""

    def blocks() -> Generator[Rows]:
        return ahead(scattered(table, work.features) for table in ahead(tables(work)))

    return lambda number: (batch for block in blocks() for batch in views(block, work.batch))


@LOADERS.case("limit")
def streaming_alone(work: Work) -> Passes:
    """The first without a thread."""
    return lambda number: (
        batch for table in tables(work) for batch in views(permuted(row_major(table, work.features)), work.batch)
    )


@LOADERS.case("limit")
def in_memory(work: Work) -> Passes:
    """Views of tensors that hold the whole dataset, permuted once."""
    rows = permuted(all_rows(work))
    return lambda number: views(rows, work.batch)

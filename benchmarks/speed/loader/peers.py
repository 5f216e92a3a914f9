"""What people use to load Parquet into PyTorch. Each is imported when it is measured; one that is missing is skipped.

Where a peer hands out columns, they are stacked into x: part of the work, since every model here takes one matrix.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.loader import LOADERS, Passes
from benchmarks.speed.loader.limits import row_major
from benchmarks.speed.work import Work

SHUFFLE_ROWS = 10_000  # of HuggingFace's buffer, whose default is 1,000


def frame_in_memory(work: Work) -> Any:
    """All rows as a TensorDataset, read with pandas: what tutorials begin with."""
    import pandas as pd
    from torch.utils.data import TensorDataset

    frame = pd.read_parquet(work.folder)
    return TensorDataset(torch.tensor(frame[work.features].values), torch.tensor(frame["y"].values))


def stacked(batches: Iterable[dict[str, Any]], features: list[str]) -> Iterator[Any]:
    """{column: [B]} as (x [B, F], y [B])."""
    for batch in batches:
        yield torch.stack([batch[name] for name in features], 1), batch["y"]


@LOADERS.case("peer")
def seed(work: Work) -> Passes:
    """Plain DataLoader over pandas: one row at a time."""
    from torch.utils.data import DataLoader

    loader = DataLoader(frame_in_memory(work), batch_size=work.batch, shuffle=True)
    return lambda number: iter(loader)


@LOADERS.case("peer")
def batch_sampler(work: Work) -> Passes:
    """DataLoader over pandas that indexes whole batches."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    rows = frame_in_memory(work)
    loader = DataLoader(rows, batch_size=None, sampler=BatchSampler(RandomSampler(rows), work.batch, drop_last=False))
    return lambda number: iter(loader)


@LOADERS.case("peer")
def torchdata(work: Work) -> Passes:
    """torchdata's StatefulDataLoader over pandas."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(frame_in_memory(work), batch_size=work.batch, shuffle=True)
    return lambda number: iter(loader)


def hugging_face(work: Work, kind: str) -> Any:
    """A streaming dataset."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=work.files, split="train", streaming=True, cache_dir=work.scratch)
    return rows.with_format(kind)


@LOADERS.case("peer")
def huggingface_streaming(work: Work) -> Passes:
    """HuggingFace datasets, streaming, shuffled in a buffer of 10,000 rows."""
    rows = hugging_face(work, "torch")

    def one_pass(number: int) -> Iterator[Any]:
        mixed = rows.shuffle(seed=number, buffer_size=SHUFFLE_ROWS)
        return stacked(mixed.iter(batch_size=work.batch), work.features)

    return one_pass


@LOADERS.case("peer")
def huggingface_arrow(work: Work) -> Passes:
    """HuggingFace datasets, Arrow batches converted by hand, not shuffled: an expert's way."""
    rows = hugging_face(work, "arrow")
    return lambda number: (row_major(table, work.features) for table in rows.iter(batch_size=work.batch))


@LOADERS.case("peer")
def litdata(work: Work) -> Passes:
    """LitData streaming over the Parquet files, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset, index_parquet_dataset
    from litdata.streaming.item_loader import ParquetLoader

    folder = Path(work.scratch) / "litdata" / Path(work.folder).name
    folder.mkdir(parents=True, exist_ok=True)  # its index lies beside the files
    for file in work.files:
        link = folder / Path(file).name
        if not link.exists():
            link.symlink_to(Path(file).resolve())
    index_parquet_dataset(str(folder))
    rows = StreamingDataset(str(folder), item_loader=ParquetLoader(), shuffle=True)
    loader = StreamingDataLoader(rows, batch_size=work.batch, num_workers=0)
    names = [*work.features, "y"]

    def one_pass(number: int) -> Iterator[Any]:
        return stacked((b if isinstance(b, dict) else dict(zip(names, b, strict=True)) for b in loader), work.features)

    return one_pass


@LOADERS.case("peer")
def ray_data(work: Work) -> Passes:
    """Ray Data, shuffled in a local buffer of one row group."""
    import ray

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, _node_ip_address="127.0.0.1"
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(work.files)

    def one_pass(number: int) -> Iterator[Any]:
        batches = rows.iter_torch_batches(batch_size=work.batch, local_shuffle_buffer_size=work.group_rows)
        return stacked(batches, work.features)

    return one_pass

"""Rows from S3: how fast Tidemill's stream of batches is, beside the limit of s3fs's client. And what one request costs.

    .venv/bin/python benchmarks/s3.py                       # 512 MB in files of 32 MB, 11 and 100 columns
    .venv/bin/python benchmarks/s3.py --megabytes 64 --repeat 1
    .venv/bin/python benchmarks/s3.py --requests            # GET, PUT, HEAD, DELETE of 30 KB, a listing of 5,000 keys

With `--requests` two stores take turns at each verb: one asks through `storage/s3_client.py`, as `S3Store` does, the other asks
s3fs's client the same, as it did for everything up to 583fb7b. CPU is this process's own; the ratio is ours to theirs.

The limit GETs the bytes of the column chunks of each row group, known beforehand, pinned by etag, with an s3fs client
from several threads, and decodes them with pyarrow alone; it is given the number of threads at which it is fastest. The shuffled
limit goes on as the streaming limit of `benchmarks.speed` does: row-major, permuted, sliced. Ours is what training iterates
over, `Stream` in batches of 1024, in order and shuffled, with its default window: it bounds what a row group may decode to,
checks page headers, encodes and permutes. `reading` is its reading alone. `projected` reads one column in four. The server is
started here and shares the machine's cores.

The cases of a round take turns, in this process. Megabytes are those of the values, 4 bytes each. Prints one JSON line for each
measurement, then medians, and ratios to the limit: within a round, median over the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import truediv
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
BUCKET = "benchmark"
OURS = 0  # threads of what chooses them itself
T = TypeVar("T")
R = TypeVar("R")


def file_of(megabytes: int, columns: int, group_rows: int, seed: int) -> bytes:
    """Random float32 columns c0, c1, ... as Parquet."""
    rows = megabytes * 2**20 // (4 * columns)
    values = np.random.default_rng(seed).standard_normal((columns, rows), dtype=np.float32)
    sink = pa.BufferOutputStream()
    table = pa.table({f"c{i}": column for i, column in enumerate(values)})
    pq.write_table(table, sink, row_group_size=group_rows, use_dictionary=False)
    return bytes(sink.getvalue())


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`function` of each item, in order, by so many threads; no more results than threads wait to be used."""
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future[R]] = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class Limit:
    """The bytes of each row group by ranged GETs, decoded by pyarrow."""

    def __init__(self, url: str, columns: Sequence[str]) -> None:
        import s3fs

        from tidemill.storage.urls import open_store

        self.columns, store = list(columns), open_store(url)
        self.fs = s3fs.S3FileSystem(use_listings_cache=False)
        self.prefix = url.removeprefix(f"s3://{BUCKET}/")
        self.groups: list[tuple[str, str, int, pq.FileMetaData, int, list[tuple[int, int]]]] = []
        for info in sorted(store.list(), key=lambda info: info.key):
            metadata = pq.read_metadata(pa.BufferReader(store.read(info.key)))
            for index in range(metadata.num_row_groups):
                ranges: list[tuple[int, int]] = []
                group = metadata.row_group(index)
                for i in range(group.num_columns):
                    chunk = group.column(i)
                    if chunk.path_in_schema not in self.columns:
                        continue
                    start, size = chunk.data_page_offset, chunk.total_compressed_size
                    if ranges and start - ranges[-1][1] <= 256 * 1024:
                        ranges[-1] = (ranges[-1][0], start + size)
                    else:
                        ranges.append((start, start + size))
                self.groups.append((info.key, info.etag, info.size, metadata, index, ranges))

    async def _get(self, key: str, etag: str, start: int, stop: int) -> bytes:
        answer = await self.fs._call_s3(
            *("get_object",),
            **{
                "Bucket": BUCKET,
                "Key": f"{self.prefix}/{key}",
                "IfMatch": f'"{etag}"',
                "Range": f"bytes={start}-{stop - 1}",
            },
        )
        async with answer["Body"] as body:
            return await body.read()  # type: ignore[no-any-return]

    def read(self, number: int) -> pa.Table:
        from fsspec.asyn import sync

        from tidemill.storage.ranges import RangesFile

        key, etag, size, metadata, index, ranges = self.groups[number]
        file = RangesFile(size, lambda start, length: b"")
        for start, stop in ranges:
            file.hold(start, sync(self.fs.loop, self._get, key, etag, start, stop))
        return pq.ParquetFile(file, metadata=metadata).read_row_group(index, columns=self.columns)

    def __len__(self) -> int:
        return len(self.groups)


def tables(read: Callable[[int], pa.Table], count: int, threads: int) -> int:
    """Read all row groups; the number of rows."""
    return sum(table.num_rows for table in in_order(read, range(count), threads))


def batches(read: Callable[[int], pa.Table], count: int, threads: int, names: Sequence[str]) -> int:
    """The same, each row group permuted in a thread and sliced, as the streaming limit does."""
    from benchmarks.speed.loader.limits import permuted, row_major, views

    def block(table: pa.Table) -> Any:
        return permuted(row_major(table.rename_columns([*names[:-1], "y"]), [*names[:-1]]))

    blocks = in_order(block, in_order(read, range(count), threads), 1)
    return sum(len(y) for x_y in blocks for _, y in views(x_y, 1024))


def reading(groups: Sequence[Any], names: Sequence[str]) -> Callable[[int], int]:
    """Takes the tables that the stream of batches is made of; the number of rows."""
    features = features_of(groups, names)
    return lambda _: sum(table.num_rows for table in features.tables(groups))


def features_of(groups: Sequence[Any], names: Sequence[str]) -> Any:
    """The last column is the target."""
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.spec import Spec

    spec = Spec(features=[*names[:-1]], target=names[-1], standardize_features=False)
    return Features.resolve(spec, groups[0].schema)


def passes(groups: Sequence[Any], names: Sequence[str], *, shuffled: bool) -> Callable[[int], int]:
    """Takes all batches of a pass of training, by its number; the number of rows."""
    from tidemill.tasks.training.batches import Stream
    from tidemill.tasks.training.spec import Spec

    features = features_of(groups, names)
    default = Spec(features=["x"], target="y")
    settings = {"batch_size": 1024, "window_bytes": default.window_bytes}

    def one(number: int) -> int:
        seed = (default.seed, "epoch", number) if shuffled else None
        return sum(len(batch.y_B) for batch in Stream(groups, features, **settings, shuffle_seed=seed))

    return one


def measured(work: Callable[[int], int], number: int, columns: int) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    megabytes = 4 * columns * work(number) / 2**20
    seconds = time.perf_counter() - started
    return {
        **{"megabytes": round(megabytes, 1), "seconds": round(seconds, 3)},
        **{"mb_a_second": round(megabytes / seconds, 1), "cpu_seconds": round(time.process_time() - cpu, 3)},
    }


def say(case: str, **about: Any) -> None:
    print(json.dumps({"suite": "s3", "case": case, **about}), flush=True)


def main() -> None:
    import torch

    from tests.s3_server import running_server
    from tidemill.storage.urls import open_store

    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512, help="of each dataset")
    parser.add_argument("--file-megabytes", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", action="store_true", help="what one request costs, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(os.cpu_count() or 1)  # whatever OMP_NUM_THREADS is
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        os.environ |= server.s3.environment()
        with server.s3.client() as client:
            client.create_bucket(Bucket=BUCKET)
        if options.requests:
            compare_requests(options.repeat)
            return
        for columns, group_rows in ((11, 131_072), (100, 16_384)):
            url = f"s3://{BUCKET}/{columns}"
            for number in range(max(1, options.megabytes // options.file_megabytes)):
                data = file_of(options.file_megabytes, columns, group_rows, number)
                open_store(url).write(f"{number:05}.parquet", data)
            for case, step in (("all", 1), ("projected", 4)):
                compare(url, [f"c{i}" for i in range(0, columns, step)], options, columns=columns, reads=case)


def compare(url: str, names: Sequence[str], options: argparse.Namespace, **about: Any) -> None:
    """All cases on some columns of one dataset, round after round."""
    from tidemill.storage.dataset import snapshot

    limit, groups = Limit(url, names), snapshot(url).row_groups
    cases: dict[tuple[str, int], Callable[[int], int]] = {}  # by name and threads: does one round, gives its rows
    for threads in options.threads:
        cases["limit", threads] = lambda _, n=threads: tables(limit.read, len(limit), n)
        cases["shuffled limit", threads] = lambda _, n=threads: batches(limit.read, len(limit), n, names)
    cases["reading", OURS] = reading(groups, names)
    for name, shuffled in (("stream", False), ("shuffled stream", True)):
        cases[name, OURS] = passes(groups, names, shuffled=shuffled)
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for number in range(options.repeat):
        for case in list(cases)[:: 1 if number % 2 == 0 else -1]:
            one = measured(cases[case], number, len(names))
            rates[case].append(one["mb_a_second"])
            say(case[0], **about, **({} if case[1] == OURS else {"threads": case[1]}), **one)
    medians = {case: statistics.median(found) for case, found in rates.items()}
    best = {name: max((case for case in cases if case[0] == name), key=medians.__getitem__) for name, _ in cases}
    say(
        "summary",
        **about,
        megabytes=one["megabytes"],
        mb_a_second={name: medians[case] for name, case in best.items()},
        threads={name: threads for name, threads in best.values() if threads != OURS},
        to_limit={name: ratio(rates[case], rates[best["limit"]]) for name, case in best.items() if name != "limit"},
        to_shuffled_limit=ratio(rates["shuffled stream", OURS], rates[best["shuffled limit"]]),
    )


def compare_requests(repeat: int, calls: int = 200, keys: int = 5000) -> None:
    """Each verb in turns of both clients, by one thread and by eight."""
    from tidemill.storage import s3_others
    from tidemill.storage.parallel import concurrently
    from tidemill.storage.s3 import S3Store
    from tidemill.storage.store import Promises

    class ThroughS3fs(S3Store):
        def _asked(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
            return s3_others.ask(self._aws_variables, method, params, self.stall_seconds, anonymous=False)

    data, folder = os.urandom(30_000), f"folder-{keys}"
    stores = {"theirs": ThroughS3fs(BUCKET, "x"), "ours": S3Store(BUCKET, "x")}
    for store in stores.values():
        store.promises = Promises(compares_on_delete=True)  # as a run finds out: one request
    etags = [stores["ours"].write(f"{i}", data).etag for i in range(calls)]
    concurrently(lambda i: stores["ours"].write(f"{folder}/{i:05}.parquet", b""), range(keys), 8)
    verbs: dict[str, tuple[int, Callable[[S3Store, int], object]]] = {  # how often, and what
        "PUT": (calls, lambda store, i: store.write(f"{i}", data)),
        "GET": (calls, lambda store, i: store.read(f"{i}")),
        "HEAD": (calls, lambda store, i: store.stat(f"{i}")),
        "DELETE": (calls, lambda store, i: store.delete(f"{i}", if_match=etags[i])),
        f"LIST of {keys}": (1, lambda store, i: [*store.list(f"{folder}/")]),
    }

    def turn(store: S3Store, count: int, call: Callable[[S3Store, int], object], threads: int) -> tuple[float, float]:
        """Milliseconds of this process's CPU, and of the clock, for each call."""
        started, cpu = time.perf_counter(), time.process_time()
        concurrently(lambda i: call(store, i), range(count), threads)
        return 1000 * (time.process_time() - cpu) / count, 1000 * (time.perf_counter() - started) / count

    for threads in (1, 8):
        spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(repeat + 1):
            for client in [*stores][
                :: 1 if number % 2 else -1
            ]:  # all verbs of one, then of the other: a DELETE needs its PUT
                for verb, (count, call) in verbs.items():
                    spent.setdefault((verb, client), []).append(turn(stores[client], count, call, threads))
        for verb in verbs:
            cpu = {
                client: [one[0] for one in spent[verb, client][1:]] for client in stores
            }  # the first made connections
            wall = {client: [one[1] for one in spent[verb, client][1:]] for client in stores}
            say(
                verb,
                threads=threads,
                cpu_ms={client: round(statistics.median(found), 3) for client, found in cpu.items()},
                wall_ms={client: round(statistics.median(found), 3) for client, found in wall.items()},
                cpu_ratio=ratio(cpu["ours"], cpu["theirs"]),
            )


def ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Of the same round, the median."""
    return round(statistics.median(map(truediv, ours, others)), 3)


if __name__ == "__main__":
    main()

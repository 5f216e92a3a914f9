"""Online training beside a bare script: backlogs of small and of large shards, freshness while following, cost of a long history.

    .venv/bin/python benchmarks/online.py                              # everything, in the sizes of docs/performance.md
    .venv/bin/python benchmarks/online.py small --shards 500 --repeat 1
    .venv/bin/python benchmarks/online.py freshness --seconds 20
    .venv/bin/python benchmarks/online.py history --versions 2000 --runs 3

The bare script does what one would write by hand, with the same S3 client: it lists, then gets, decodes, trains on
(`examples/net.py`, batches of 64, SGD) and deletes one shard after the other. It keeps no history, and nothing of it survives a
kill. Ours and bare take turns, each in a process of its own, on an S3 server that is started here (`tests/s3_server.py`). Prints
one JSON line for each measurement, then the medians and their ratio.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TIDEMILL_FACTORIES"] = "examples.net"
BUCKET = "benchmark"
NAMES = [f"x{i}" for i in range(10)]
SPEC = {
    "features": NAMES,
    "target": "y",
    "model": {"factory": "examples.net:Net"},
    "epochs": 1,
    "standardize_features": False,
}


# ---- data ------------------------------------------------------------------------------------------------------------
def shard(rows: int, seed: int, group_rows: int = 131_072) -> bytes:
    """x0 to x9 and y, float32, as Parquet."""
    x = np.random.default_rng(seed).standard_normal((10, rows), dtype=np.float32)
    columns = dict(zip(NAMES, x, strict=True)) | {"y": x.sum(0)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=group_rows, use_dictionary=False)
    return bytes(sink.getvalue())


def fill(url: str, contents: list[bytes], count: int) -> None:
    """Put so many shards; the contents take turns, each made another object by its key."""
    from tidemill.storage.urls import open_store

    store = open_store(url)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: store.write(f"{i:06}.parquet", contents[i % len(contents)]), range(count)))


def begin(registry: str) -> None:
    """Version 0 of the model, trained on one small file."""
    from tidemill.storage.urls import open_store
    from tidemill.tasks import batch
    from tidemill.tasks.settings import BatchSettings
    from tidemill.tasks.training.spec import Spec

    dataset = f"{registry}-dataset"
    open_store(dataset).write("part.parquet", shard(1000, 0))
    batch.train(dataset, registry, "net", Spec.model_validate(SPEC), BatchSettings(holdout=0))


# ---- what is measured, each in a process of its own ------------------------------------------------------------------
def bare(inbox: str) -> dict[str, float]:
    """List, then get, decode, train and delete, one shard after the other."""
    import s3fs
    import torch
    from fsspec.asyn import sync

    from examples.net import Net

    bucket, _, prefix = inbox.removeprefix("s3://").partition("/")
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    net, loss_function = Net(), torch.nn.MSELoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    async def get(key: str) -> bytes:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read()  # type: ignore[no-any-return]

    def keys() -> Iterator[str]:
        more: dict[str, str] = {}
        while True:
            page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", **more)
            yield from (entry["Key"] for entry in page.get("Contents", ()))
            if not page["IsTruncated"]:
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    started, cpu, rows, shards = time.perf_counter(), time.process_time(), 0, 0
    for key in list(keys()):
        table = pq.read_table(pa.BufferReader(sync(fs.loop, get, key)))
        x = torch.stack([torch.from_dlpack(table[name].combine_chunks()) for name in NAMES], 1)
        y = torch.from_dlpack(table["y"].combine_chunks()).unsqueeze(1)
        order = torch.randperm(len(y))
        for x_BF, y_B in zip(x[order].split(64), y[order].split(64), strict=True):
            loss = loss_function(net(x_BF), y_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fs.call_s3("delete_object", Bucket=bucket, Key=key)
        rows, shards = rows + table.num_rows, shards + 1
    return _spent(started, cpu, shards, rows)


def ours(inbox: str, registry: str, settings: dict[str, Any]) -> dict[str, float]:
    """An online run until the inbox is empty, without Prefect."""
    from tidemill.tasks.online import drain
    from tidemill.tasks.settings import OnlineSettings

    started, cpu = time.perf_counter(), time.process_time()
    report = drain(inbox, registry, "net", OnlineSettings.model_validate(settings))
    return _spent(started, cpu, report.shards, report.rows) | {"versions": report.versions}


def _spent(started: float, cpu: float, shards: int, rows: int) -> dict[str, float]:
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"shards": shards, "rows": rows, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1, _one_thread) as pool:
        return pool.apply(function, arguments)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


# ---- suites ----------------------------------------------------------------------------------------------------------
@contextmanager
def s3() -> Iterator[str]:
    """URL of a bucket of a server of our own; the AWS variables of this process and its children point to it."""
    from tests.s3_server import running_server

    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        os.environ |= server.s3.environment()
        with server.s3.client() as client:
            client.create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"


def say(suite: str, case: str, **measured: object) -> None:
    print(json.dumps({"suite": suite, "case": case, **measured}), flush=True)


def backlog(suite: str, contents: list[bytes], count: int, repeat: int, settings: dict[str, Any]) -> None:
    """A backlog drained by ours and by the bare script in turn. Each pair has its own server: one has no room for several."""
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    cpu: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(repeat):
        with s3() as bucket:
            for case in ("bare", "ours") if number % 2 == 0 else ("ours", "bare"):
                place = f"{bucket}/{uuid.uuid4().hex}"
                fill(f"{place}/inbox", contents, count)
                if case == "ours":
                    in_process(begin, f"{place}/registry")
                    measured = in_process(ours, f"{place}/inbox", f"{place}/registry", settings)
                else:
                    measured = in_process(bare, f"{place}/inbox")
                assert measured["shards"] == count
                rates[case].append(count / measured["seconds"])
                cpu[case].append(measured["cpu_seconds"] / count)
                say(suite, case, **measured)
    median = {case: round(statistics.median(found), 3) for case, found in rates.items()}
    median_cpu = {case: round(1000 * statistics.median(found), 2) for case, found in cpu.items()}
    pairs = [a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)]
    say(
        *(suite, "summary"),
        **{"shards_a_second": median, "cpu_ms_a_shard": median_cpu, "ours_to_bare": round(statistics.median(pairs), 3)},
    )


def small(options: argparse.Namespace) -> None:
    contents = [shard(options.rows, seed) for seed in range(50)]
    backlog("small", contents, options.shards, options.repeat, json.loads(options.settings))


def large(options: argparse.Namespace) -> None:
    rows = options.megabytes * 2**20 // 44
    backlog("large", [shard(rows, 0)], options.large_shards, options.repeat, json.loads(options.settings))


def follow(inbox: str, registry: str, seconds: float) -> None:
    """The flow, as a user runs it."""
    os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "300"
    from tidemill.flows.online import online_training
    from tidemill.tasks.settings import OnlineSettings

    settings = OnlineSettings(mode="follow", poll_seconds=0.5, stop_after_seconds=seconds)
    online_training(inbox, registry, "net", settings)


def freshness(options: argparse.Namespace) -> None:
    """One shard a second is put; when is it seen, by another process, in a committed version?"""
    from tests.s3_server import wait_until
    from tidemill.storage.errors import UnknownVersion
    from tidemill.storage.log import VersionLog
    from tidemill.storage.urls import open_store

    contents = [shard(10_000, seed) for seed in range(10)]
    with s3() as bucket:
        inbox, registry = f"{bucket}/inbox", f"{bucket}/registry"
        in_process(begin, registry)
        store, log = open_store(inbox), VersionLog(open_store(registry), "net")
        put: dict[str, float] = {}
        waited: list[float] = []

        def see(number: int) -> bool:
            """True if the version is there; then its shards are fresh."""
            try:
                version = log.version(number)
            except UnknownVersion:
                return False
            now = time.time()
            for each in version.manifest.consumed:
                waited.append(now - put[each.key])
                say("freshness", "shard", key=each.key, version=number, seconds=round(waited[-1], 3))
            return True

        context = multiprocessing.get_context("spawn")
        follower = context.Process(target=follow, args=(inbox, registry, options.seconds + 60), daemon=True)
        follower.start()
        store.write("first.parquet", contents[0])
        put["first.parquet"] = time.time()
        wait_until(lambda: see(1), seconds=600, what="the follower starts")
        waited.clear()
        newest, begun = 1, time.monotonic()
        for number in range(options.seconds):
            while time.monotonic() < begun + number:
                newest += see(newest + 1)
                time.sleep(0.02)  # how exactly a version's time is seen
            key = f"{number:06}.parquet"
            store.write(key, contents[number % len(contents)])
            put[key] = time.time()
        while len(waited) < options.seconds:
            newest += see(newest + 1)
            time.sleep(0.02)
        follower.terminate()  # SIGTERM: it ends after the step in hand
        follower.join()
    waited.sort()
    say(
        *("freshness", "summary"),
        shards=len(waited),
        versions=newest - 1,
        median_seconds=round(statistics.median(waited), 3),
        p99_seconds=round(waited[-1 - len(waited) // 100], 3),
    )


def history(options: argparse.Namespace) -> None:
    """The time of a step, and of opening and taking one, with few and with many versions behind it, on a local folder."""
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = (10, options.versions)
        for size in sizes:
            begin(f"{folder}/{size}")
            lengthen(f"{folder}/{size}", size, f"{folder}/inbox-{size}")
        for number in range(options.runs):
            for size in sizes if number % 2 == 0 else sizes[::-1]:
                inbox, registry = f"{folder}/inbox-{size}", f"{folder}/copy"
                shutil.copytree(f"{folder}/{size}", registry, copy_function=os.link)  # a run lengthens the copy only
                measured = in_process(steps, inbox, registry, options.steps)
                shutil.rmtree(registry)
                for case, seconds in measured.items():
                    times.setdefault((case, size), []).append(seconds)
                say("history", "steps", versions=size, **{case: round(s, 5) for case, s in measured.items()})
    for case in dict.fromkeys(case for case, _ in times):
        medians = [round(statistics.median(times[case, size]), 5) for size in sizes]
        pairs = [long / short for short, long in zip(*(times[case, size] for size in sizes), strict=True)]
        ratio = round(statistics.median(pairs), 3)
        say(*("history", "summary"), of=case, versions=sizes, steps=options.steps, seconds=medians, ratio=ratio)


def lengthen(registry: str, versions: int, inbox: str) -> None:
    """Give a model so many more versions with one shard each: valid manifests, of which only the last has blobs of its own."""
    from datetime import UTC, datetime

    from tidemill.storage.log import VersionLog
    from tidemill.storage.manifest import Blobs, Consumed, Manifest, Parent, encode, sha256
    from tidemill.storage.tombstones import WINDOW, Tombstones
    from tidemill.storage.urls import open_store

    log, tombstones = VersionLog(open_store(registry), "net"), Tombstones()
    head, url = log.head(), open_store(inbox).url
    begun, fields, digest, now = head.manifest, dict(head.manifest), head.sha256, datetime.now(UTC)
    rows = begun.counters["rows"]
    for number in range(1, versions + 1):
        shard_digest = sha256(b"%d" % number)
        consumed = Consumed(
            **{"inbox": url, "key": f"{number:08}.parquet", "sha256": shard_digest, "etag": shard_digest[:32]},
            **{"size": 47_000, "last_modified": now, "ordinal": number - 1, "rows": 1000, "unlabelled": 0},
            **{"score": {"loss": 1.0, "mae": 1.0, "rmse": 1.0}, "champion": {"loss": 1.0, "mae": 1.0, "rmse": 1.0}},
        )
        if number > versions - WINDOW:
            tombstones.add(consumed.inbox, consumed.key, consumed.sha256, consumed.etag)
        if number == versions:
            remembered = log.write_blob(number, "tombstones.jsonl", tombstones.encode())
            fields["blobs"] = Blobs.model_validate({**dict(begun.blobs), "tombstones": dict(remembered)})
        counters = begun.counters | {"shards": number, "rows": rows + 1000 * number}
        of_this = {"kind": "online", "version": number, "parent": Parent(version=number - 1, sha256=digest)}
        of_this |= {"nonce": uuid.uuid4().hex, "created": now, "consumed": (consumed,), "counters": counters}
        data = encode(Manifest(**{**fields, "dataset": None, "run": None, "metrics": {}, **of_this}))
        # Past the store, which would wait for the disk each time.
        Path(registry, "net", "log", f"{number:08}.json").write_bytes(data)
        digest = sha256(data)
    log.store.write("net/head.json", json.dumps({"version": versions - versions % 16}).encode())
    # The counters of the blobs are those of version 0, which the log does not compare.


def steps(inbox: str, registry: str, count: int) -> dict[str, float]:
    """Open a run and take its first step, with the head to load; then so many more: what is done once in many steps counts."""
    from tidemill.storage.urls import open_store
    from tidemill.tasks.online import step as online
    from tidemill.tasks.settings import OnlineSettings

    store = open_store(inbox)
    for i in range(count + 1):
        store.write(f"{i}.parquet", shard(1000, i))
    os.sync()  # or the steps that are measured would wait for what was written before
    started = time.perf_counter()
    run = online.open_run(inbox, registry, "net", OnlineSettings(limits={"max_shards": 1}))
    online.step(run)
    opened, each, cpu = time.perf_counter() - started, [], time.process_time()
    for _ in range(count):
        started = time.perf_counter()
        assert online.step(run).outcome is online.Outcome.COMMITTED
        each.append(time.perf_counter() - started)
    return {
        "open_seconds": opened,
        "step_mean_seconds": statistics.mean(each),
        "step_median_seconds": statistics.median(each),
        "step_mean_cpu_seconds": (time.process_time() - cpu) / count,
    }


SUITES = {"small": small, "large": large, "freshness": freshness, "history": history}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", nargs="*", choices=[*SUITES, []], help="all of them if none is named")
    parser.add_argument("--repeat", type=int, default=5, help="how often ours and bare take turns (small, large)")
    parser.add_argument("--settings", default="{}", help="JSON of OnlineSettings (small, large)")
    parser.add_argument("--shards", type=int, default=10_000, help="small: how many")
    parser.add_argument("--rows", type=int, default=1000, help="small: rows of a shard")
    parser.add_argument("--large-shards", type=int, default=10, help="large: how many")
    parser.add_argument("--megabytes", type=int, default=64, help="large: size of a shard")
    parser.add_argument("--seconds", type=int, default=120, help="freshness: for how long shards are put")
    parser.add_argument("--versions", type=int, default=100_000, help="history: the long one")
    parser.add_argument("--runs", type=int, default=10, help="history: how often the two take turns")
    parser.add_argument("--steps", type=int, default=200, help="history: steps of a run after its first")
    options = parser.parse_args()
    for suite in options.suite or SUITES:
        SUITES[suite](options)


if __name__ == "__main__":
    main()

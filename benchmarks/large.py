"""A model of gigabytes: peak memory of `train` and `drain`, and the time of a full commit beside the same bytes written bare.

    .venv/bin/python benchmarks/large.py                      # an embedding of 1.6 GB with Adam, on a local folder
    .venv/bin/python benchmarks/large.py --bytes 200000000    # a small one
    .venv/bin/python benchmarks/large.py --s3                 # on an S3 server that is started here (`tests/s3_server.py`)
    .venv/bin/python benchmarks/large.py --sparse --bytes 1000000000    # sparse gradients, SparseAdam, shards of 0.1% of the rows

Each of `train` and `drain` runs in a process of its own: a training of 2,000 rows, then three shards of 64 rows, each a commit.
`weights` are the bytes of the embedding; a learner has four times as many: its weights, their gradients and the two moments of
Adam. A commit stores three quarters of that. `bare` is what the disk, or the server, does with as many bytes: on a disk one file
written and flushed from one buffer; on a server objects of 32 MiB put by eight threads with presigned URLs, which hash nothing.
Bare and ours take turns. With `--sparse` a learner has three times the embedding, since its gradients are small, and a commit
stores the rows that have changed. `commit_bytes` is what each commit has written. Prints one JSON line for each measurement,
then one with the medians.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
EMBEDDING = 64
SHARDS = 3
BUCKET = "benchmark"
BLOCK = 32 * 2**20


# ---- ours, in a process of its own -----------------------------------------------------------------------------------
def spec(buckets: int, sparse: bool) -> Any:
    from tidemill.tasks.training.spec import Spec

    return Spec.model_validate(
        {
            "features": [{"name": "c", "kind": "category", "buckets": buckets}, "x"],
            "target": "y",
            "model": {
                "factory": "mlp",
                "arguments": {"embedding": EMBEDDING} | ({"sparse": True} if sparse else {}),
            },
            "optimizer": {"name": "sparse_adam" if sparse else "adam"},
            "learning_rate": 0.01,
            "batch_size": 256,
            "epochs": 1,
        }
    )


def table(rows: int, named: str = "") -> Any:
    import pyarrow as pa

    numbers = [i / rows for i in range(rows)]
    return pa.table({"c": [f"id {named}{i}" for i in range(rows)], "x": numbers, "y": numbers})


def train(root: str, buckets: int, sparse: bool) -> None:
    from tidemill.tasks import batch
    from tidemill.tasks.settings import BatchSettings

    settings = BatchSettings(device="cpu", holdout=0.1)
    batch.train(table(2000), f"{root}/registry", "large", spec(buckets, sparse), settings)


def drain(root: str, buckets: int, sparse: bool) -> None:
    from tidemill.tasks import online
    from tidemill.tasks.settings import OnlineSettings

    settings = OnlineSettings.model_validate({"grace_seconds": 0, "device": "cpu", "limits": {"max_shards": 1}})
    report = online.drain(f"{root}/inbox", f"{root}/registry", "large", settings)
    assert report.shards == SHARDS, report


@contextmanager
def timed_commits(times: list[float]) -> Iterator[None]:
    """Notes the seconds from the first blob of a commit to its manifest."""
    from tidemill.tasks.online import step

    commit = step.commit

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        made = commit(*args)
        times.append(time.perf_counter() - began)
        return made

    step.commit = timed
    try:
        yield
    finally:
        step.commit = commit


def child(what: str, root: str, buckets: int, sparse: bool) -> None:
    times: list[float] = []
    began = time.perf_counter()
    with timed_commits(times):
        {"train": train, "drain": drain}[what](root, buckets, sparse)
    seconds = time.perf_counter() - began
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    print(json.dumps({"peak_bytes": int(found[1]) * 1024, "seconds": round(seconds, 2), "commits": times}))


# ---- bare ------------------------------------------------------------------------------------------------------------
def bare_disk(root: str, count: int) -> float:
    """Seconds to write and flush a file of so many bytes."""
    block = memoryview(os.urandom(BLOCK))
    path = Path(root) / "bare"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for at in range(0, count, BLOCK):
            file.write(block[: count - at])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def bare_server(root: str, count: int) -> float:
    """Seconds to put so many bytes with the least that a client can do."""
    import botocore.session
    import urllib3

    client = botocore.session.get_session().create_client("s3")
    block = os.urandom(BLOCK)
    numbers = range(-(-count // BLOCK))
    urls = [
        client.generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": f"bare/{number}"}) for number in numbers
    ]
    pool = urllib3.PoolManager(maxsize=8)

    def put(number: int) -> int:
        return pool.request("PUT", urls[number], body=block[: count - number * BLOCK]).status

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(put, numbers)) == {200}
    seconds = time.perf_counter() - began
    for number in numbers:
        client.delete_object(Bucket=BUCKET, Key=f"bare/{number}")
    return seconds


# ---- side by side ----------------------------------------------------------------------------------------------------
def run(what: str, root: str, buckets: int, sparse: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--root", root, "--buckets", str(buckets)]
    command += ["--sparse"] if sparse else []
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def written(root: str) -> list[int]:
    """Bytes of the blobs that each version after the first has stored, and that it names."""
    from tidemill.storage.log import open_log

    log = open_log(f"{root}/registry", "large")
    sizes = {info.key: info.size for info in log.store.list("large/blobs/")}
    manifests = [version.manifest for version in log.history(log.head())][:-1]
    own = [(f"large/blobs/{each.version:08d}-", each.blobs.object_keys) for each in manifests]
    return [sum(sizes[key] for key in keys if key.startswith(mine)) for mine, keys in own][::-1]


def measure(root: str, weights: int, sparse: bool, bare: Callable[[str, int], float], bare_root: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tidemill.storage.urls import open_store

    buckets = weights // (4 * EMBEDDING) - 1
    inbox = open_store(f"{root}/inbox")
    for number in range(SHARDS):
        sink = pa.BufferOutputStream()
        pq.write_table(table(buckets // 1000 if sparse else 64, f"of {number} "), sink)
        inbox.write(f"{number}.parquet", bytes(sink.getvalue()))
    stored = 3 * weights // (1000 if sparse else 1)
    alone = [bare(bare_root, stored)]
    result: dict[str, Any] = {"weights_bytes": weights, "stored_bytes": stored}
    for what in ("train", "drain"):
        found = run(what, root, buckets, sparse)
        print(json.dumps({"what": what, **found}), flush=True)
        result[f"{what}_peak_to_learner"] = round(found["peak_bytes"] / ((3 if sparse else 4) * weights), 3)
        alone.append(bare(bare_root, stored))
    print(json.dumps({"what": "bare", "seconds": [round(seconds, 2) for seconds in alone]}))
    result["commit_bytes"] = written(root)
    commit, least = statistics.median(found["commits"]), statistics.median(alone)
    print(
        json.dumps(result | {"commit_s": round(commit, 2), "bare_s": round(least, 2), "rate": round(least / commit, 3)})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_600_000_000, help="of the embedding")
    parser.add_argument("--s3", action="store_true", help="on an S3 server in place of a folder")
    parser.add_argument(
        "--sparse", action="store_true", help="gradients of rows alone, and an optimizer that goes by them"
    )
    parser.add_argument("--folder", type=Path, help="where the files go, on the disk that is measured")
    parser.add_argument("--child", choices=["train", "drain"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--buckets", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.root, given.buckets, given.sparse)
        return
    folder = Path(tempfile.mkdtemp(prefix="tidemill-large-", dir=given.folder))
    try:
        with ExitStack() as stack:
            if not given.s3:
                measure(str(folder), given.bytes, given.sparse, bare_disk, str(folder))
                return
            from tests.s3_server import running_server

            (folder / "server").mkdir()
            server = stack.enter_context(running_server(folder / "server")).s3
            os.environ |= server.environment()
            stack.enter_context(server.client()).create_bucket(Bucket=BUCKET)
            measure(f"s3://{BUCKET}/tidemill", given.bytes, given.sparse, bare_server, "")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

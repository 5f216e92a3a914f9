"""Memory does not grow with the data. Coarse, so that it cannot fail by chance; `make bench ARGS=memory` has the fine figures."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.training.rows import numbers_table

ROOT = Path(__file__).parents[2]
FILE_ROWS, TIMES = 500_000, 16
ROW_BYTES = 11 * 4
EPOCH = """
import re, sys
from pathlib import Path
from tidemill.tasks import batch
from tidemill.tasks.settings import BatchSettings
from tests.training.rows import plain_spec

spec = plain_spec(batch_size=4096, epochs=1, shuffle=True, shuffle_bytes=24 * 2**20)
run = batch.open_run(batch.take_snapshot(sys.argv[1]), "memory://memory/registry", "net", spec, BatchSettings(holdout=0))
batch.train_epoch(run, 0)
print(run.load_or_fit().counters.rows, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(dataset: Path) -> tuple[int, float]:
    """Rows trained on by a process of its own, and its peak resident memory in MiB."""
    answer = subprocess.run(
        [sys.executable, "-c", EPOCH, str(dataset)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows, kilobytes = answer.stdout.split()
    return int(rows), int(kilobytes) / 1024


def test_many_times_the_rows_need_no_more_memory(tmp_path: Path) -> None:
    """Holding the rows that come on top would take 315 MiB; the growth must stay below a quarter of that."""
    few, many = tmp_path / "few", tmp_path / "many"
    for folder in (few, many):
        folder.mkdir()
    pq.write_table(numbers_table(FILE_ROWS), few / "0.parquet", row_group_size=131_072)
    for number in range(TIMES):
        os.link(few / "0.parquet", many / f"{number}.parquet")
    (fewer_rows, fewer), (more_rows, more) = peak(few), peak(many)
    assert (fewer_rows, more_rows) == (FILE_ROWS, TIMES * FILE_ROWS)
    assert more - fewer < (TIMES - 1) * FILE_ROWS * ROW_BYTES / 2**20 / 4


LARGE_ROWS = 400_000
"""Of an embedding of 64 float32: 102 MB."""
LARGE = """
import re, sys
from pathlib import Path
import pyarrow as pa
from tidemill.tasks import batch
from tidemill.tasks.online import drain
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.spec import Spec

what, root, buckets = sys.argv[1], sys.argv[2], int(sys.argv[3])

def spec(buckets):
    return Spec.model_validate({
        "features": [{"name": "c", "buckets": buckets}, "x"], "target": "y", "epochs": 2, "batch_size": 256,
        "model": {"factory": "mlp", "arguments": {"embedding": 64}}, "optimizer": {"name": "adam"}, "learning_rate": 0.01,
    })

def table(rows):
    return pa.table({
        "c": [f"id {i}" for i in range(rows)], "x": [i / rows for i in range(rows)], "y": [i % 7 / 7 for i in range(rows)],
    })

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

settings = BatchSettings(device="cpu", holdout=0.1)
online = OnlineSettings.model_validate({"grace_seconds": 0, "device": "cpu", "limits": {"max_shards": 1}})
batch.train(table(1000), f"{root}/warm {what}", "small", spec(100), settings)
before = peak()
if what == "train":
    batch.train(table(1000), f"{root}/registry", "large", spec(buckets), settings)
else:
    report = drain(f"{root}/inbox", f"{root}/registry", "large", online)
    assert report.shards == 2, report
print(before, peak())
"""


def peaks(what: str, root: Path) -> tuple[int, int]:
    """Peak resident memory of a process of its own, in bytes: before there is a large model in it, and in the end."""
    answer = subprocess.run(
        [sys.executable, "-c", LARGE, what, str(root), str(LARGE_ROWS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    before, after = answer.stdout.split()
    return int(before), int(after)


def test_a_large_model_needs_little_more_memory_than_it_has_numbers(tmp_path: Path) -> None:
    """Weights, gradients and the two moments of Adam; online beside them the champion's weights, while both are scored."""
    weights = LARGE_ROWS * 64 * 4
    (tmp_path / "inbox").mkdir()
    ids, fractions = [f"id {i}" for i in range(64)], [i / 64 for i in range(64)]
    for number in range(2):
        pq.write_table(pa.table({"c": ids, "x": fractions, "y": fractions}), tmp_path / "inbox" / f"{number}.parquet")
    learner = 4 * weights
    beside = 150 * 2**20  # of blocks, ranges and the heaps of threads, whatever the size of the model is
    before, after = peaks("train", tmp_path)
    assert after - before < 1.2 * learner + beside
    before, after = peaks("drain", tmp_path)
    assert after - before < 1.2 * learner + weights + beside

"""Memory does not grow with the data. Coarse, so that it cannot fail by chance; `make bench ARGS=memory` has the fine figures."""

import os
import subprocess
import sys
from pathlib import Path

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

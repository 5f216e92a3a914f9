"""Memory does not grow with the data. Coarse, so that it cannot fail by chance; `benchmarks/memory.py` has the fine figures."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
FEWER, MORE = 1_000_000, 8_000_000
ROW_BYTES = 11 * 4


def test_eight_times_the_rows_need_no_more_memory() -> None:
    """Holding the rows that come on top would take 308 MB; the growth must stay below a quarter of that."""
    command = [
        sys.executable,
        str(BENCHMARK),
        "--repeat",
        "1",
        "--window-bytes",
        str(8 * 2**20),
        "--rows",
        str(FEWER),
        str(MORE),
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    fewer, more = json.loads(lines[0]), json.loads(lines[1])
    assert (fewer["rows"], more["rows"]) == (FEWER, MORE)
    assert more["peak_mb"] - fewer["peak_mb"] < (MORE - FEWER) * ROW_BYTES / 2**20 / 4

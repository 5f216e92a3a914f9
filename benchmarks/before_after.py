"""Whether a change has made Tidemill slower: an older commit beside this checkout, in processes that take turns.

    .venv/bin/python benchmarks/before_after.py 583fb7b                                   # half an hour
    .venv/bin/python benchmarks/before_after.py main --rows loader train-64 --pairs 25
    .venv/bin/python benchmarks/before_after.py HEAD --pairs 2 --small                    # that it runs

The commit is checked out into a folder of its own (`git worktree`), which is removed in the end. Of each row (see
`before_after_rows.py`) the two checkouts are measured in turn, each time in a process of its own; every other pair begins with
the new one. A pair gives one ratio: CPU seconds a row of data, old / new, so that above 1 the new checkout is faster. CPU seconds
and not the clock, because machines are shared.

Printed are the median of the ratios and its interval of at least 95%: the k-th smallest and the k-th largest ratio, with the
largest k for which n tosses of a fair coin give fewer than k heads with a probability of at most 2.5%. It asks nothing of how the
ratios are distributed, but that pairs are independent (W. J. Conover, Practical Nonparametric Statistics, 3rd ed.,
1999, section 3.2). It needs six pairs.

A row fails if its whole interval lies below 0.97: the exit code is then 1, and the last line names the rows.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SCRIPT: Final = Path(__file__).with_name("before_after_rows.py")
ROWS: Final = (
    *("loader", "train-64", "train-1024", "train-compiled"),
    *("online-small", "online-large", "predict", "startup"),
)
SLOWER: Final = 0.97
CONFIDENCE: Final = 0.95


# ---- the interval ----------------------------------------------------------------------------------------------------
def interval(ratios: Sequence[float]) -> tuple[float, float] | None:
    """The exact interval of the median, by order statistics; None if there are too few ratios for one of 95%."""
    count, k, tail = len(ratios), 0, 0.0
    while k < count // 2 and tail + math.comb(count, k) / 2**count <= (1 - CONFIDENCE) / 2:
        tail += math.comb(count, k) / 2**count
        k += 1
    if not k:
        return None
    ordered = sorted(ratios)
    return ordered[k - 1], ordered[-k]


def is_slower(ratios: Sequence[float]) -> bool:
    """Whether the whole interval lies below what is allowed."""
    found = interval(ratios)
    return found is not None and found[1] < SLOWER


# ---- processes -------------------------------------------------------------------------------------------------------
@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the commit's files, for as long as the context is open."""
    with tempfile.TemporaryDirectory(prefix="tidemill-before-") as folder:
        place = Path(folder, "checkout")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def script(place: Path, *arguments: str, scratch: Path) -> str:
    """What the script of the rows prints for a checkout. Its errors go to our standard error."""
    ours = ("TIDEMILL_", "PREFECT_", "PYTHONDONTWRITEBYTECODE")  # with the last, each process compiles all modules anew
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "PYTHONPATH": str(place),
        "TIDEMILL_FACTORIES": "examples.net",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "PREFECT_HOME": str(scratch / "prefect"),
        **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DO_NOT_TRACK": "1"},
    }
    # Without the script's folder on the path (-P), and far from any checkout.
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    return subprocess.run(
        command, cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    ).stdout


def seconds_a_row(
    place: Path, rows: Sequence[str], data: Path, small: Sequence[str], scratch: Path
) -> dict[str, float]:
    """CPU seconds of one row of data, for each row that is measured."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        printed = script(place, ",".join(rows), str(data), folder, *small, scratch=scratch)
    measured = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line["row"] for line in measured] == list(rows), printed
    return {line["row"]: line["cpu_seconds"] / line["rows"] for line in measured}


@dataclass(frozen=True)
class Pair:
    """CPU seconds a row of data."""

    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.old / self.new


def measured(
    old: Path, new: Path, rows: Sequence[str], data: Path, pairs: int, small: Sequence[str], scratch: Path
) -> dict[str, list[Pair]]:
    """The pairs of rows that share their processes."""
    found: dict[str, list[Pair]] = {row: [] for row in rows}
    for number in range(pairs):
        turns = (old, new) if number % 2 == 0 else (new, old)
        taken = {place: seconds_a_row(place, rows, data, small, scratch) for place in turns}
        for row in rows:
            found[row].append(Pair(taken[old][row], taken[new][row]))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commit", help="the older one")
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    options.add_argument("--pairs", type=int, default=15, help="of each row; at least six for an interval")
    options.add_argument(
        "--small", action="store_true", help="to try the benchmark itself: tiny data, all rows in one process"
    )
    chosen = options.parse_args()
    small = ["--small"] if chosen.small else []
    failed = []
    with checkout(chosen.commit) as old, tempfile.TemporaryDirectory(prefix="tidemill-before-") as folder:
        scratch = Path(folder)
        data = scratch / "data"
        data.mkdir()
        script(ROOT, "data", str(data), *small, scratch=scratch)
        for place in (old, ROOT):  # what is imported first is compiled first
            seconds_a_row(place, ["startup"], data, small, scratch)
        print(f"{'row':16} {'old / new':>9}  {'95% interval':16} pairs   new: CPU us a row", flush=True)
        for rows in [chosen.rows] if chosen.small else [[row] for row in chosen.rows]:
            for row, pairs in measured(old, ROOT, rows, data, chosen.pairs, small, scratch).items():
                ratios = [pair.ratio for pair in pairs]
                between = interval(ratios)
                said = "six pairs needed" if between is None else f"{between[0]:.3f} to {between[1]:.3f}"
                verdict = "  SLOWER" if is_slower(ratios) else ""
                each = 1e6 * median(pair.new for pair in pairs)
                print(f"{row:16} {median(ratios):9.3f}  {said:16} {len(pairs):5}   {each:.4g}{verdict}", flush=True)
                failed += [row] if is_slower(ratios) else []
    if failed:
        sys.exit(f"slower than {chosen.commit}: {', '.join(failed)} (the whole interval lies below {SLOWER})")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the old checkout is removed
    main()

"""That the benchmark runs, in about a minute: no figure of it means anything.

    make bench-quick

Each suite measures ours and its references once, on small data. Every line must have the fields that the report reads, and the
page, of which a copy is filled, all of its tables. Cases run in this process, since starting others would take longer than
measuring; the scripts run beside it, one process in which two cases take turns, and `before_after.py` on HEAD itself.
"""

import copy
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.before_after import interval, is_slower
from benchmarks.speed import child, claims, data, machine, report, rounds, siblings, summary
from benchmarks.speed.processes import ROOT
from benchmarks.speed.suites import SUITES, Setup
from benchmarks.speed.training.limits import hand_written
from benchmarks.speed.training.nets import eager
from benchmarks.speed.work import Work

RATE: Final = ("startup_s", "steady_rows_s", "rows_per_cpu_s", "peak_mb", "rows")
FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "loader": RATE,
    "training": (*RATE, "first_step_s"),
    "memory": ("before_mb", "peak_mb"),
    "profile": ("samples",),
}
OURS: Final = (
    ("loader", Setup("narrow", 64), "tidemill"),
    ("training", Setup("narrow", 64, net="net"), "tidemill"),
    ("training", Setup("narrow", 64, net="linear"), "tidemill_compiled"),  # compiles fastest, and that in 20 s
)
SCRIPTS: Final = {
    "online": "small history --shards 4 --rows 200 --repeat 1 --versions 20 --runs 1 --steps 3",
    "s3": "--megabytes 2 --file-megabytes 1 --threads 2 --repeat 1",
    "startup": "--only log 'follow, no Prefect' --repeat 1",
}
# The claims of which something was measured.
CLAIMED: Final = (
    "Loader to the streaming limit, 11 columns, batch 64",
    "Loader to the streaming limit, 11 columns, batch 1024",
    "Training to the eager loop in memory, example Net, batch 64",
    "Peak memory",
    "Memory for each byte of `shuffle_bytes`, at least",
    "Memory for each byte of `shuffle_bytes`, at most",
    "Reading from S3 to raw ranged GETs and decoding, 11 columns",
    "Loader from S3 to raw ranged GETs, decoding, permuting, 100 columns",
    "Online to a bare script on S3, small",
    "Mean time of an online step",
)


def main() -> None:
    same_arithmetic()
    with tempfile.TemporaryDirectory(prefix="tidemill-bench-") as scratch, ThreadPoolExecutor(2) as beside:
        place = data.made(data.dataset("narrow", small=True), Path(scratch))
        others = [*(beside.submit(script, name) for name in SCRIPTS), beside.submit(turns, place, scratch)]
        compared = beside.submit(before_after)
        lines = [machine.about(), *measurements(place, scratch)]
        lines += [line for future in others for line in future.result()]
        compared.result()
        lines = [{"run": "quick", **line} for line in lines]
        for line in lines:
            print(json.dumps(line))
        check(lines)
        check_page(lines, Path(scratch))
    print(summary.text(lines), claims.text(lines), sep="\n\n")


def script(name: str) -> list[dict[str, Any]]:
    """What one of the scripts prints in its smallest size."""
    return list(siblings.measurements(name, shlex.split(SCRIPTS[name])))


def before_after() -> None:
    """Every row of the comparison with an older commit, in its smallest size; its interval by the tables of the sign test."""
    assert [interval(range(1, 1 + count)) for count in (5, 6, 15, 25)] == [None, (1, 6), (4, 12), (8, 18)]
    assert is_slower([0.9] * 6)
    assert not is_slower([0.9] * 5 + [0.98])
    command = [sys.executable, str(ROOT / "benchmarks" / "before_after.py"), "HEAD", "--pairs", "2", "--small"]
    subprocess.run(command, cwd=ROOT, check=True)


def turns(folder: Path, scratch: str) -> list[dict[str, Any]]:
    """Two rounds of ours and the streaming limit by turns in one process."""
    setup, cases = Setup("narrow", 1024), ["tidemill", "streaming"]
    return list(
        rounds.measurements(
            SUITES["loader"],
            setup,
            cases,
            folder,
            repetitions=2,
            seconds=0.1,
            timeout=120,
            shuffle_bytes=None,
            scratch=scratch,
            one_process=True,
        )
    )


def check(lines: list[dict[str, Any]]) -> None:
    """Every line is whole, every ratio and claim was computed."""
    for line in lines:
        assert "error" not in line, line["error"]
        nobodys = rounds.OF_A_PROCESS if line.get("one_process") else ()
        for field in set(FIELDS.get(line["suite"], ())).difference(nobodys):
            assert math.isfinite(line[field]), f"{field} is {line[field]} in {line}"
    for table in summary.tables(lines):
        for case in table.cases():
            assert table.ratio(case) is not None, f"{case} is compared with nothing"
    found = {claim.what: claim.measured for claim in claims.claims(lines) if claim.measured is not None}
    for what in CLAIMED:
        measured = [value for name, value in found.items() if name.startswith(what)]
        assert any(map(math.isfinite, measured)), f"{what}: measured {measured}"


def check_page(lines: list[dict[str, Any]], folder: Path) -> None:
    """A copy of the page is filled, each section with rows of a table.

    Its pictures are drawn where matplotlib is installed. `.venv` is without: torchmetrics imports it where it can, at a cost to
    every process of the tests.
    """
    results, page = folder / "results.jsonl", folder / report.PAGE.name
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(report.PAGE, page)
    if find_spec("matplotlib"):
        report.write(results, page)
        for picture in ("loader", "training", "memory", "profile"):
            assert (folder / f"performance-{picture}.png").stat().st_size > 10_000, picture
    else:
        report.fill(lines, page)
    text = page.read_text()
    for name in report.SECTIONS:
        section = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
        assert ("torch" if name == "machine" else "| --- |") in section, f"section {name} lacks its table"
        assert "Not measured." not in section, f"a table of section {name} is empty"
    assert "Line by line, `follow`" in text, "section startup lacks the lines of a run"


def same_arithmetic() -> None:
    """The steps written by hand end at the weights of the eager ones."""
    x, y = torch.randn(64, 10), torch.randn(64)
    for build in (
        lambda: [nn.Linear(10, 1)],
        lambda: [nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 1)],
    ):
        by_hand = nn.Sequential(*build())
        by_autograd = copy.deepcopy(by_hand)
        for step in (hand_written(by_hand), eager(by_autograd)):
            for _ in range(10):
                step(x, y)
        torch.testing.assert_close(dict(by_hand.named_parameters()), dict(by_autograd.named_parameters()))


def measurements(place: Path, scratch: str) -> Iterator[dict[str, Any]]:
    """One line for each suite and case."""
    work = Work(str(place), 64, 0.2, 1, scratch=scratch, shuffle_bytes=2 * 2**18)
    for suite, setup, ours in OURS:
        for case in (ours, *SUITES[suite].references):
            about = {"suite": suite, "case": case, "kind": SUITES[suite].cases[case].kind, **asdict(setup)}
            about |= {"data": place.name, "repetition": 0}
            yield about | child.measured(suite, case, asdict(replace(work, net=setup.net or "net")))
    for by, rows, megabytes in (("rows", 1, None), ("rows", 2, None), ("shuffle", 1, 1), ("shuffle", 1, 2)):
        about = {"suite": "memory", "by": by, "rows": rows * work.rows, "shuffle_mb": megabytes}
        yield about | child.measured("memory", "tidemill", asdict(work))
    about = {"suite": "profile", "case": "tidemill", "net": "net", "batch": 64}
    yield about | child.measured("profile", "tidemill", asdict(work))


if __name__ == "__main__":
    main()

"""How fast Tidemill is, beside what the machine allows and what others reach.

    make bench                                                          # everything, hours
    .venv/bin/python -m benchmarks.speed loader training --reps 5       # suites, into bench-data/results.jsonl
    .venv/bin/python -m benchmarks.speed training --net net --batch 64 --cases tidemill,limits --seconds 4
    .venv/bin/python -m benchmarks.speed training --turns --cases tidemill,eager_in_memory,eager_in_memory_fused --reps 15
    .venv/bin/python -m benchmarks.speed report                         # docs/performance.md from the results

Compare ratios of one run, not figures of two: machines differ, and shared ones differ from minute to minute.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.speed import claims, data, machine, memory, profile, report, siblings, summary
from benchmarks.speed.rounds import measurements
from benchmarks.speed.suites import SUITES, Setup, Suite


def main() -> None:
    chosen = arguments()
    if suites := [name for name in chosen.suites if name != "report"]:
        measure(suites, chosen)
    if "report" in chosen.suites:
        report.write(chosen.results)


def measure(suites: Sequence[str], chosen: argparse.Namespace) -> None:
    """Adds a line to the results for each measurement, and prints it; tables in the end."""
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    run = datetime.now(UTC).isoformat(timespec="seconds")
    lines = []
    with chosen.results.open("a") as file, TemporaryDirectory(prefix="tidemill-bench-") as scratch:
        for line in chain([machine.about()], measured(suites, chosen, scratch)):
            line = {"run": run, **line}
            lines.append(line)
            print(json.dumps(line), flush=True)
            file.write(json.dumps(line) + "\n")
            file.flush()
    print(summary.text(lines), claims.text(lines), sep="\n\n")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    names = [*SUITES, "memory", "profile", *siblings.SCRIPTS, "data", "report"]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("suites", nargs="+", choices=names, metavar="SUITE", help=", ".join(names))
    options.add_argument("--cases", default="all", help="names of cases, or ours, limits, peers; separated by commas")
    options.add_argument("--width", choices=["narrow", "wide"], help="only this dataset")
    options.add_argument("--batch", type=int, help="only this batch size")
    options.add_argument("--net", choices=["net", "mlp", "linear"], help="only this net")
    options.add_argument("--threads", type=int, help="only this number of torch threads")
    options.add_argument("--reps", type=int, default=5)
    options.add_argument("--seconds", type=float, default=6, help="about how long a measurement takes")
    options.add_argument("--timeout", type=float, default=600, help="seconds after which a measurement is given up")
    options.add_argument("--shuffle-bytes", type=int, help="of Tidemill's shuffle, other than its default")
    options.add_argument("--script", default="", help="arguments of the scripts online, s3 and startup")
    options.add_argument(
        "--turns", action="store_true", help="cases of the loader and of training take turns in one process"
    )
    options.add_argument("--small", action="store_true", help="small datasets, to try the benchmark itself")
    options.add_argument("--folder", type=Path, default=data.FOLDER, help="of the datasets")
    options.add_argument("--results", type=Path, default=data.FOLDER / "results.jsonl", help="where lines are added")
    chosen = options.parse_args()
    known = {"all", "ours", "limits", "peers"}.union(*(suite.cases for suite in SUITES.values()))
    if unknown := set(chosen.cases.split(",")) - known:
        options.error(f"no such cases: {', '.join(sorted(unknown))}")
    return chosen


def measured(suites: Sequence[str], chosen: argparse.Namespace, scratch: str) -> Iterator[dict[str, Any]]:
    """A line for each measurement of the suites that were chosen."""
    for name in suites:
        if name == "data":
            for wanted in data.SMALL if chosen.small else data.FULL:
                data.made(wanted, chosen.folder)
        elif name in siblings.SCRIPTS:
            yield from siblings.measurements(name, shlex.split(chosen.script))
        elif name == "memory":
            yield from memory.measurements(
                chosen.folder, repetitions=chosen.reps, timeout=chosen.timeout, scratch=scratch, small=chosen.small
            )
        elif name == "profile":
            yield from profile.measurements(
                chosen.folder, seconds=chosen.seconds, timeout=chosen.timeout, scratch=scratch, small=chosen.small
            )
        else:
            yield from _side_by_side(SUITES[name], chosen, scratch)


def _side_by_side(suite: Suite, chosen: argparse.Namespace, scratch: str) -> Iterator[dict[str, Any]]:
    for setup in filter(lambda setup: _wanted(setup, chosen), suite.setups):
        yield from measurements(
            suite,
            setup,
            _cases(suite, setup, chosen.cases),
            data.made(data.dataset(setup.width, small=chosen.small), chosen.folder),
            repetitions=chosen.reps,
            seconds=chosen.seconds,
            timeout=chosen.timeout,
            shuffle_bytes=chosen.shuffle_bytes,
            scratch=scratch,
            one_process=chosen.turns,
        )


def _wanted(setup: Setup, chosen: argparse.Namespace) -> bool:
    asked = {name: getattr(chosen, name) for name in ("width", "batch", "net", "threads")}
    return all(value is None or getattr(setup, name) == value for name, value in asked.items())


def _cases(suite: Suite, setup: Setup, wanted: str) -> list[str]:
    """Names of the cases that were asked for, as far as the suite has them and they can do the work."""
    words = [{"limits": "limit", "peers": "peer"}.get(word, word) for word in wanted.split(",")]
    return [
        name
        for name, case in suite.cases.items()
        if {"all", name, case.kind}.intersection(words)
        and (setup.net is None or not case.only or setup.net in case.only)
    ]


if __name__ == "__main__":
    main()

"""What a model, a commit and a shard cost: measured, priced, simulated; and the simulation checked by a run ten times the size.

    .venv/bin/python -m benchmarks.cost measure --where s3 > s3.json    # requests, bytes and seconds of each part
    .venv/bin/python -m benchmarks.cost check --where s3                # calibrated on 10 models, simulated and run with 100
    .venv/bin/python -m benchmarks.cost tell s3.json                    # what that says of 10^3, 10^6 and 10^9 rows a day

`measure` takes one part after the other in this process: opening, reading a learner, commits of different sizes, looks. Requests
are counted where they are sent. `check` fits the seconds of the parts to the turns of a small run, lets the product's own rota
(`tidemill/tasks/tenants/rota.py`) take the turns of the large one on a clock that jumps, and then runs it: processes of their
own, from their start to their end, by the clock and by the CPU, which counts on a busy machine. What is done once in a process
counts as its start: the small run drains another model before. Prices are the list prices of S3 and EC2 in us-east-1:
see `PRICES`.
"""

import argparse
import heapq
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.online import fill, shard
from benchmarks.tenants import ROWS, begin, pairs_of, places

PRICES = {"write": 0.005 / 1000, "read": 0.0004 / 1000, "delete": 0.0, "core second": 0.0446 / 3600, "GB month": 0.023}
"""US dollars: a PUT or LIST, a GET or HEAD, a DELETE; a second of one vCPU of a c7i.large; storage."""
KINDS = {"put_object": "write", "list_objects_v2": "write", "delete_object": "delete"}
"""Of requests; all others read."""
DAY = 86_400


# ---- the parts, one by one -------------------------------------------------------------------------------------------
@dataclass
class Cost:
    """Of one part, once."""

    seconds: float
    cpu_seconds: float
    requests: dict[str, float]
    bytes_written: float
    bytes_read: float

    @property
    def dollars(self) -> float:
        asked = sum(PRICES[kind] * count for kind, count in self.requests.items())
        return asked + PRICES["core second"] * self.cpu_seconds


class Counted:
    """The requests of this process to S3, counted where they are sent. A local folder has none."""

    def __init__(self) -> None:
        from tidemill.storage.s3 import S3Store

        self.requests, self.written, self.read = Counter[str](), 0, 0
        asked = S3Store._asked

        def counting(store: S3Store, method: str, params: dict[str, Any]) -> dict[str, Any]:
            self.requests[KINDS.get(method, "read")] += 1  # refusals have their price too
            self.written += len(params.get("Body", b""))
            answer = asked(store, method, params)
            body = answer.get("Body", b"")
            self.read += len(body) if isinstance(body, bytes) else 0
            return answer

        S3Store._asked = counting  # type: ignore[method-assign]

    @contextmanager
    def part(self, costs: dict[str, list[Cost]], name: str, times: int = 1) -> Iterator[None]:
        """What happens in this context is one `times`-th of a part."""
        before, written, read = Counter(self.requests), self.written, self.read
        began, cpu = time.perf_counter(), time.process_time()
        yield
        seconds, spent = time.perf_counter() - began, time.process_time() - cpu
        asked = {kind: count / times for kind, count in (self.requests - before).items()}
        costs.setdefault(name, []).append(
            Cost(seconds / times, spent / times, asked, (self.written - written) / times, (self.read - read) / times)
        )


def measure(where: str, models: int, rounds: int) -> dict[str, Any]:
    """Each part of the work of a few models, `rounds` times each; the median of each."""
    import torch

    from tidemill.storage.log import open_log
    from tidemill.storage.urls import open_store
    from tidemill.tasks.online.step import OnlineRun, Outcome, step
    from tidemill.tasks.settings import OnlineSettings
    from tidemill.tasks.tenants.entries import entries

    torch.set_num_threads(1)
    counted, costs = Counted(), dict[str, list[Cost]]()
    small, seeds = [shard(ROWS, seed) for seed in range(4)], itertools.count(100)
    with tempfile.TemporaryDirectory() as folder, places(where, Path(folder)) as base:
        names = [f"m{number}" for number in range(models)]
        begin(f"{base}/registry", names)
        for pair in pairs_of(base, names):
            settings = OnlineSettings()
            fill(pair["inbox"], small, 2)
            with counted.part(costs, "open"):
                run = OnlineRun(pair["inbox"], pair["registry"], pair["model"], settings)
            with counted.part(costs, "learner"):
                run.head()
            step(run)
            for number in range(rounds):
                for size, rows, count in (("one", ROWS, 1), ("many", ROWS, 21), ("large", 10 * ROWS, 21)):
                    fill(pair["inbox"], [shard(rows, next(seeds)) for _ in range(count)], count)
                    with counted.part(costs, f"commit of {size}"):
                        done = step(run)
                    assert done.outcome is Outcome.COMMITTED, (number, done)
                with counted.part(costs, "look"):
                    assert not list(entries(run.places.inbox))
        waiting = open_store(f"{base}/waiting")
        listed = 2000
        fill(waiting.url, small, listed)
        for _ in range(rounds):
            with counted.part(costs, "listing of 1,000", listed // 1000):
                assert len(list(waiting.list())) == listed
        blobs = open_log(f"{base}/registry", names[0]).head().manifest.blobs
    found = {name: middle(parts) for name, parts in costs.items()}
    shards = 20
    found["shard"] = scaled(less(found["commit of many"], found["commit of one"]), 1 / shards)
    found["1,000 more rows"] = scaled(less(found["commit of large"], found["commit of many"]), 1 / (9 * (shards + 1)))
    found["commit"] = less(found["commit of one"], found["shard"])
    return {
        "where": where,
        "rows": ROWS,
        "shard_bytes": len(small[0]),
        "version_bytes": blobs.weights.bytes + blobs.state.bytes,
        "parts": {name: asdict(found[name]) | {"dollars": found[name].dollars} for name in found if " of " not in name}
        | {"listing of 1,000": asdict(found["listing of 1,000"])},
    }


def middle(costs: list[Cost]) -> Cost:
    """The median of each number."""

    def of(number: Callable[[Cost], float]) -> float:
        return statistics.median(map(number, costs))

    kinds = {kind for cost in costs for kind in cost.requests}
    return Cost(
        of(lambda cost: cost.seconds),
        of(lambda cost: cost.cpu_seconds),
        {kind: of(lambda cost, kind=kind: cost.requests.get(kind, 0.0)) for kind in sorted(kinds)},  # type: ignore[misc]
        of(lambda cost: cost.bytes_written),
        of(lambda cost: cost.bytes_read),
    )


def less(one: Cost, other: Cost) -> Cost:
    """One less the other."""
    kinds = {*one.requests, *other.requests}
    return Cost(
        one.seconds - other.seconds,
        one.cpu_seconds - other.cpu_seconds,
        {kind: one.requests.get(kind, 0.0) - other.requests.get(kind, 0.0) for kind in sorted(kinds)},
        one.bytes_written - other.bytes_written,
        one.bytes_read - other.bytes_read,
    )


def scaled(one: Cost, factor: float) -> Cost:
    return Cost(
        one.seconds * factor,
        one.cpu_seconds * factor,
        {kind: count * factor for kind, count in one.requests.items()},
        one.bytes_written * factor,
        one.bytes_read * factor,
    )


# ---- what it says ----------------------------------------------------------------------------------------------------
LOADS = ((10**3, 1000, 1), (10**6, 1000, 1), (10**6, 1000, 256), (10**9, 1000, 256), (10**9, 100_000, 10))
"""Rows a day, rows of a shard, shards of a commit."""


def tell(measured: dict[str, Any]) -> None:
    """Tables for docs/scale.md, from what `measure` has printed."""
    parts = {
        name: Cost(**{field: value for field, value in cost.items() if field != "dollars"})
        for name, cost in measured["parts"].items()
    }
    rows = []
    for name, cost in parts.items():
        asked = ", ".join(f"{cost.requests.get(kind, 0.0):.3g}" for kind in ("write", "read", "delete"))
        kib = f"{cost.bytes_written / 1024:.3g}, {cost.bytes_read / 1024:.3g}"
        milliseconds = f"{1000 * cost.seconds:.2f}", f"{1000 * cost.cpu_seconds:.2f}"
        rows.append((name, asked, *milliseconds, kib, f"{1e6 * cost.dollars:.2f}"))
    print(table(("part", "requests: write, read, delete", "ms", "CPU ms", "KiB written, read", "$ a million"), rows))
    rows = []
    for many, of_shard, of_commit in LOADS:
        shards = many / of_shard
        commits = shards / of_commit
        work = (
            (parts["commit"], commits),
            (parts["shard"], shards),
            (parts["1,000 more rows"], (many - ROWS * shards) / 1000),
        )
        seconds = sum(cost.cpu_seconds * count for cost, count in work)
        asked = sum(PRICES[kind] * number * count for cost, count in work for kind, number in cost.requests.items())
        core = PRICES["core second"] * seconds
        what = f"{many:,} in shards of {of_shard:,}, {of_commit} a commit"
        a_million = (asked + core) * 1e6 / many
        rows.append((what, f"{seconds:,.1f}", f"{asked:,.4f}", f"{core:,.4f}", f"{a_million:.4f}"))
    print("\n" + table(("rows a day", "CPU seconds", "$ for requests", "$ for the core", "$ a million rows"), rows))


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """As Markdown."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- a simulation, and what it simulates -----------------------------------------------------------------------------
CLOCKS = ("clock", "cpu")
READ_AHEAD = {"s3": 16, "local": 8}
"""Shards that a run reads ahead, and drops if its learner is dropped."""
CALLS = {"s3": 8, "local": 4}
"""Requests that are under way at once."""
LOOKS = ("open", "look", "prepare")
"""What lookouts do."""


def simulated(costs: dict[str, float], shards: list[int], settings: dict[str, int], clock: str) -> float:
    """Seconds of a drain of so many shards of each model, by the product's rota on a clock that jumps.

    By the clock, lookouts look and prepare while others have their turns. By the CPU, what they take is taken at once, and nobody
    waits.
    """
    from tidemill.storage.tombstones import due
    from tidemill.tasks.online.step import Outcome
    from tidemill.tasks.stopping import Stop
    from tidemill.tasks.tenants.doors import LOOKOUTS
    from tidemill.tasks.tenants.rota import Rota

    now = [costs["start"]]

    class Model:
        poll_seconds = 5.0

        def __init__(self, name: str, left: int) -> None:
            self.name, self.left, self.opened, self.took = name, left, False, 0.0
            self.since = (
                0  # versions whose shards are in no blob of tombstones: their manifests are read with the learner
            )

        def look(self) -> bool:
            self.took = costs["look"] if self.opened else costs["open"]
            self.opened = True
            return self.left > 0

        def prepare(self) -> None:
            self.took = costs["prepare"] + costs["manifest"] * self.since

        def turn(self) -> Outcome:
            now[0] += costs["turn"]
            taken = min(self.left, settings["max_shards"])
            if not taken:
                return Outcome.IDLE
            now[0] += costs["commit"] + taken * costs["shard"]
            self.left -= taken
            self.since = 0 if due(self.since + 1, 0) else self.since + 1
            return Outcome.COMMITTED

        def nothing_new(self) -> None: ...

        def let_go(self) -> None:
            now[0] += costs["dropped"] * min(self.left, settings["read_ahead"])

        def failed(self, reason: str | None) -> None: ...

    class Looks:
        """As many at once as there are lookouts."""

        def __init__(self) -> None:
            self._free = [now[0]] * LOOKOUTS
            self._back: list[tuple[float, int, Any, bool]] = []
            self._number = itertools.count()

        def send(self, who: Any, look: Callable[[], bool]) -> None:
            found = look()
            seconds = who.member.took
            if clock == "cpu":
                now[0], seconds = now[0] + seconds, 0.0
            ends = max(now[0], heapq.heappop(self._free)) + seconds
            heapq.heappush(self._free, ends)
            heapq.heappush(self._back, (ends, next(self._number), who, found))

        def back(self) -> list[tuple[Any, bool | Exception]]:
            found: list[tuple[Any, bool | Exception]] = []
            while self._back and self._back[0][0] <= now[0]:
                _, _, who, what = heapq.heappop(self._back)
                found.append((who, what))
            return found

        def wait(self, seconds: float, stop: Stop) -> None:
            now[0] = min([now[0] + seconds, *(back[0] for back in self._back[:1])])

    members = [Model(f"m{number}", left) for number, left in enumerate(shards)]
    Rota(members, Looks(), drains=True, learners=settings["learners"], now=lambda: now[0]).go(Stop())
    return now[0] + costs["end"]


RUN = """
import json, os, sys, time
began = float(os.environ["BEGAN"])
from tidemill.storage.log import VersionLog
from tidemill.tasks.settings import Limits, OnlineSettings
from tidemill.tasks.tenants import doors, tenant
from tidemill.tasks.tenants.pairs import Pair
pairs, warm_up, settings, learners = json.loads(sys.stdin.read())
settings = OnlineSettings(limits=Limits(**settings))
if warm_up:
    doors.drain([Pair(**pair) for pair in warm_up], settings)
turns, looks, manifests, dropped = [], [], [], [0]
older = VersionLog.older
turn, look, prepare, let_go = tenant.Tenant.turn, tenant.Tenant.look, tenant.Tenant.prepare, tenant.Tenant.let_go
ready, last = time.time(), [time.perf_counter(), time.process_time(), 0]
start_cpu = time.process_time()
def timed_turn(one):
    shards = one.report.shards
    at, went = time.perf_counter(), last[2]
    outcome = turn(one)
    cpu = time.process_time() - last[1] - sum(look[1] for look in looks[went:])  # all but that of lookouts
    turns.append((time.perf_counter() - at, cpu, outcome.value, one.report.shards - shards, dropped[0]))
    last[1:], dropped[0] = [time.process_time(), len(looks)], 0
    return outcome
def timed(what, do, one):
    at, cpu = time.perf_counter(), time.thread_time()
    found = do(one)
    looks.append((time.perf_counter() - at, time.thread_time() - cpu, what))
    return found
def timed_older(log, number):
    at, cpu = time.perf_counter(), time.thread_time()
    found = older(log, number)
    manifests.append((time.perf_counter() - at, time.thread_time() - cpu))
    return found
def timed_look(one):
    return timed("open" if one._run is None else "look", look, one)
def timed_prepare(one):
    return timed("prepare", prepare, one)
def counted_let_go(one):
    selection = None if one._run is None else one._run._selection
    dropped[0] += 0 if selection is None else len(selection.reader._coming)
    let_go(one)
tenant.Tenant.turn, tenant.Tenant.let_go = timed_turn, counted_let_go
tenant.Tenant.look, tenant.Tenant.prepare, VersionLog.older = timed_look, timed_prepare, timed_older
report = doors.drain([Pair(**pair) for pair in pairs], settings, learners=learners)
print(json.dumps({"start": (ready - began, start_cpu), "drained": (time.time() - ready, time.process_time() - start_cpu),
                  "turns": turns, "looks": looks, "manifests": manifests, "shards": report.shards, "failing": report.failing}))
"""
Both = tuple[float, float]
"""Seconds by the clock, and of the CPU."""


def run(
    base: str, shards: list[int], settings: dict[str, int], *, calibrates: bool = False
) -> tuple[Both, dict[str, Any]]:
    """(seconds from the start of a process to its end, what it told) of a real drain.

    One that calibrates drains a model of two shards before: what is done once in a process (imports, connections, the first calls
    of torch) then counts as its start.
    """
    pairs = filled(base, shards)
    warm_up = filled(f"{base}-warm-up", [2]) if calibrates else []
    given = json.dumps([pairs, warm_up, {"max_shards": settings["max_shards"]}, settings["learners"]])
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"BEGAN": str(began)},
    )
    seconds, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    told = json.loads(done.stdout)
    assert (told["shards"], told["failing"]) == (sum(shards), {}), told["failing"]
    return (seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), told


def filled(base: str, shards: list[int]) -> list[dict[str, str]]:
    """Pairs of models with so many shards each."""
    names = [f"m{number:04}" for number in range(len(shards))]
    begin(f"{base}/registry", names)
    contents = [shard(ROWS, seed) for seed in range(8)]
    pairs = pairs_of(base, names)
    for pair, count in zip(pairs, shards, strict=True):
        fill(pair["inbox"], contents, count)
    return pairs


def fitted(told: dict[str, Any], seconds: Both, which: int, calls: int) -> dict[str, float]:
    """Seconds of the parts, by least squares over the turns of a run: a turn, a commit, a shard, one dropped.

    `which` is 0 by the clock, 1 of the CPU. A look or a preparation takes the mean of its kind. So does each manifest that is
    read with a learner; `calls` of them are read at once.
    """
    turns = told["turns"]
    known = np.array([[1.0, what == "committed", shards, dropped] for _, _, what, shards, dropped in turns])
    spent = np.array([turn[which] for turn in turns])
    parts = least_squares(known, spent)
    start = told["start"][which]
    end = max(0.0, seconds[which] - start - told["drained"][which])
    looks = {what: [look[which] for look in told["looks"] if look[2] == what] or [0.0] for what in LOOKS}
    means = {what: statistics.mean(took) for what, took in looks.items()}
    manifest = statistics.mean(read[which] for read in told["manifests"]) / (1 if which else calls)
    outside = {"start": start, "end": end, "manifest": manifest, **means}
    return outside | dict(zip(("turn", "commit", "shard", "dropped"), map(float, parts), strict=True))


def least_squares(known: Any, spent: Any) -> Any:
    """Seconds of each part. None takes less than nothing: those that would are left out, and the others fitted again."""
    left, parts = [*range(known.shape[1])], np.zeros(known.shape[1])
    while left:
        solved = np.linalg.lstsq(known[:, left], spent, rcond=None)[0]
        if (solved >= 0).all():
            parts[left] = solved
            break
        left.remove(left[int(solved.argmin())])
    return parts


def check(where: str, models: int, times: int) -> None:
    """Calibrate on `models`, simulate and run `times` as many; and the same models with `times` as many shards.

    Each run has a calibration before and after it, of which the mean counts: the load of the machine may change.
    """
    settings = {"max_shards": 8, "learners": 4, "read_ahead": READ_AHEAD[where]}
    small = [10 + 4 * number for number in range(models)]
    with tempfile.TemporaryDirectory() as folder, places(where, Path(folder)) as base:

        def calibrated(name: str) -> dict[str, dict[str, float]]:
            seconds, told = run(f"{base}/{name}", small, settings, calibrates=True)
            costs = {clock: fitted(told, seconds, which, CALLS[where]) for which, clock in enumerate(CLOCKS)}
            say(where, "calibration", seconds, parts=costs)
            return costs

        sizes = {"models": small * times, "shards": [count * times for count in small]}
        before = calibrated("small")
        for more, shards in sizes.items():
            seconds, _ = run(f"{base}/{more}", shards, settings)
            after = calibrated(f"small-{more}")
            costs = {c: {part: (cost + after[c][part]) / 2 for part, cost in before[c].items()} for c in CLOCKS}
            wanted = [simulated(costs[clock], shards, settings, clock) for clock in CLOCKS]
            ratios = {clock: round(wanted[i] / seconds[i], 3) for i, clock in enumerate(CLOCKS)}
            say(where, f"{times} times the {more}", seconds, simulated=[round(one, 2) for one in wanted], ratios=ratios)
            before = after


def say(where: str, case: str, seconds: Both, **more: Any) -> None:
    real = [round(one, 2) for one in seconds]
    print(json.dumps({"suite": "cost", "where": where, "case": case, "real": real, **more}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["measure", "check", "tell"])
    parser.add_argument("file", nargs="?", type=Path, help="for tell")
    parser.add_argument("--where", choices=["local", "s3"], default="s3")
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.what == "measure":
        print(json.dumps(measure(options.where, options.models, options.rounds), indent=1))
    elif options.what == "check":
        check(options.where, options.models, options.times)
    else:
        tell(json.loads(options.file.read_text()))


if __name__ == "__main__":
    main()

"""What Tidemill claims of its speed and memory, and whether the results of a run bear it out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.speed import memory
from benchmarks.speed.suites import Setup
from benchmarks.speed.summary import Table, tables

Line = dict[str, Any]
NETS = {"net": "example Net", "mlp": "MLP 10-256-256-1", "linear": "linear model"}


@dataclass(frozen=True)
class Claim:
    """One line: what, the bound, and what was measured (None: not in the results)."""

    what: str
    sign: Literal[">=", "<="]
    bound: float
    measured: float | None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.sign == ">=" else self.measured <= self.bound


def claims(lines: Sequence[Line]) -> Iterator[Claim]:
    """All of them, with what the results say."""
    found = {(table.suite, table.setup): table for table in tables(lines)}
    yield from _loader(found)
    yield from _training(found)
    yield from _compiled(found)
    yield from _peers(found)
    yield from _memory(lines)
    yield from _s3(lines)
    yield from _online(lines)


def text(lines: Sequence[Line]) -> str:
    """The claims of which something was measured, as a table for the terminal."""
    rows = [claim for claim in claims(lines) if claim.measured is not None]
    answers = {True: "holds", False: "DOES NOT HOLD", None: ""}
    return "\n".join(
        f"{c.what:92} {c.sign} {c.bound:<7g} measured {c.measured:<8.3g} {answers[c.holds]}  {c.note}" for c in rows
    )


def _ratio(table: Table | None, case: str, to: str | None = None) -> float | None:
    """To the reference of the table unless to another case."""
    return None if table is None else table.ratio(case, to or table.reference)


def _loader(found: dict[Any, Table]) -> Iterator[Claim]:
    for width, columns in (("narrow", 11), ("wide", 100)):
        for batch in (64, 1024):
            ratio = _ratio(found.get(("loader", Setup(width, batch))), "tidemill")
            yield Claim(f"Loader to the streaming limit, {columns} columns, batch {batch}", ">=", 0.90, ratio)


def _training(found: dict[Any, Table]) -> Iterator[Claim]:
    for net, batch, threads in (("net", 64, 1), ("net", 1024, 1), ("mlp", 64, 1), ("mlp", 1024, 1), ("mlp", 1024, 2)):
        table = found.get(("training", Setup("narrow", batch, threads, net)))
        title = f"{NETS[net]}, batch {batch}, {threads} thread{'' if threads == 1 else 's'}"
        yield Claim(f"Training to the eager loop in memory, {title}", ">=", 0.97, _ratio(table, "tidemill"))
    for batch, bound in ((64, 2.0), (1024, 15.0)):
        table = found.get(("training", Setup("narrow", batch, 1, "net")))
        ratio = _ratio(table, "tidemill", "seed_loop")
        yield Claim(f"Training to the plain DataLoader loop, {NETS['net']}, batch {batch}", ">=", bound, ratio)


def _compiled(found: dict[Any, Table]) -> Iterator[Claim]:
    for net, batch, bound in (("net", 64, 8.0), ("net", 1024, 2.0), ("mlp", 64, 1.5)):
        table = found.get(("training", Setup("narrow", batch, 1, net)))
        ratio = _ratio(table, "tidemill_compiled")
        note = (
            "" if table is None or ratio is None else f"once: {table.median('tidemill_compiled', 'first_step_s'):.1f} s"
        )
        yield Claim(f"Compiled to the eager loop in memory, {NETS[net]}, batch {batch}", ">=", bound, ratio, note)


def _peers(found: dict[Any, Table]) -> Iterator[Claim]:
    """On each row, ours as it is by default, to the fastest peer; a second line with compiled steps."""
    for (suite, setup), table in found.items():
        peers = {case: table.median(case) for case in table.cases("peer")}
        known = {case: rate for case, rate in peers.items() if rate is not None}
        if not known:
            continue
        best = max(known, key=known.__getitem__)
        net = "" if setup.net is None else f"{NETS[setup.net]}, "
        width = "" if suite == "training" else f"{setup.width}, "
        title = f"{net}{width}batch {setup.batch}, {setup.threads} thread{'' if setup.threads == 1 else 's'}"
        for case, how in (("tidemill", ""), ("tidemill_compiled", ", compiled")):
            if (ratio := table.ratio(case, best)) is not None:
                yield Claim(
                    f"{suite.capitalize()}{how} to the fastest peer, {title}", ">=", 1.0, ratio, f"peer: {best}"
                )


def _memory(lines: Sequence[Line]) -> Iterator[Claim]:
    by_rows = memory.medians(lines, "rows")
    span = f", {min(by_rows) / 2**20:g} to {max(by_rows) / 2**20:g} million (2^20) rows" if len(by_rows) > 1 else ""
    yield Claim(f"Peak memory, largest to smallest{span}", "<=", 1.05, memory.growth(by_rows))
    found = memory.line_of(memory.medians(lines, "window"))
    note = "" if found is None else f"base {found[0]:.0f} MiB; at most {found[2]:.1f} MiB from that line"
    slope = None if found is None else found[1]
    yield Claim("Memory for each byte of the window, at least", ">=", 0.90, slope, note)
    yield Claim("Memory for each byte of the window, at most", "<=", 1.10, slope, note)


def _script(lines: Sequence[Line], script: str, **about: Any) -> Line | None:
    """The newest line of a script with these fields."""
    for line in reversed(lines):
        if line["suite"] == script and "line" in line and about.items() <= line["line"].items():
            inner: Line = line["line"]
            return inner
    return None


def _s3(lines: Sequence[Line]) -> Iterator[Claim]:
    for columns in (11, 100):
        line = _script(lines, "s3", case="summary", columns=columns, reads="all")
        ratio = None if line is None else line["ours_to_limit"]
        yield Claim(f"Row groups from S3 to raw ranged GETs and decoding, {columns} columns", ">=", 0.85, ratio)


def _online(lines: Sequence[Line]) -> Iterator[Claim]:
    for part, what, bound in (("small", "10,000 shards of 1,000 rows", 0.7), ("large", "10 shards of 64 MB", 0.9)):
        line = _script(lines, "online", suite=part, case="summary")
        ratio = None if line is None else line["ours_to_bare"]
        yield Claim(f"Online to a bare script, {what} on S3", ">=", bound, ratio)
    line = _script(lines, "online", suite="freshness", case="summary")
    for field, what, bound in (("median_seconds", "median", 1.5), ("p99_seconds", "99th percentile", 4.0)):
        seconds = None if line is None else line[field]
        yield Claim(f"Upload to committed version at 1 shard/s, {what} in seconds", "<=", bound, seconds)
    line = _script(lines, "online", suite="history", case="summary", of="step_seconds")
    ratio = None if line is None else line["ratio"]
    versions = "" if line is None else f", {line['versions'][1]:,} versions to {line['versions'][0]:,}"
    yield Claim(f"Time of an online step{versions}", "<=", 1.10, ratio)

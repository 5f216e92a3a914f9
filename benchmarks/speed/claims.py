"""What Tidemill claims of its speed and memory, and whether the results of a run bear it out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.speed import memory
from benchmarks.speed.suites import Setup
from benchmarks.speed.summary import Table, runs

Line = dict[str, Any]
Runs = Mapping[tuple[str, Setup], Sequence[Table]]
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
    found = runs(lines)
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


def _of(what: str, bound: float, found: Sequence[Table], case: str, to: str | None = None) -> Claim:
    """A claim that a case is so many times as fast as another, or as the reference.

    Of the run that is shown, unless another one has more rounds of it.
    """
    able = [table for table in found if table.ratio(case, to) is not None]
    if not able:
        return Claim(what, ">=", bound, None)
    best = max(able, key=lambda table: table.rounds(case, to))  # the first of equals: that which is shown
    notes = [] if best is found[0] else [f"{best.rounds(case, to)} rounds of another run"]
    return Claim(what, ">=", bound, best.ratio(case, to), ", ".join(notes + _caveats(best, case, to)))


def _caveats(table: Table, case: str, to: str | None) -> list[str]:
    """What makes a ratio worth less than it seems."""
    few = _few(table.rounds(case, to))
    turns = "by turns in one process" if table.is_of_one_process else ""
    return [text for text in (few, turns, "small data: means nothing" if table.is_small else "") if text]


def _few(rounds: int) -> str:
    return f"only {rounds} round{'' if rounds == 1 else 's'}" if rounds < 5 else ""


def _loader(found: Runs) -> Iterator[Claim]:
    for width, columns in (("narrow", 11), ("wide", 100)):
        for batch in (64, 1024):
            what = f"Loader to the streaming limit, {columns} columns, batch {batch}"
            yield _of(what, 0.90, found.get(("loader", Setup(width, batch)), ()), "tidemill")


def _training(found: Runs) -> Iterator[Claim]:
    for net, batch, threads in (("net", 64, 1), ("net", 1024, 1), ("mlp", 64, 1), ("mlp", 1024, 1), ("mlp", 1024, 2)):
        setup = Setup("narrow", batch, threads, net)
        what = f"Training to the eager loop in memory, {_named(setup)}"
        yield _of(what, 0.97, found.get(("training", setup), ()), "tidemill")
    for batch, bound in ((64, 2.0), (1024, 15.0)):
        setup = Setup("narrow", batch, 1, "net")
        what = f"Training to the plain DataLoader loop, {_named(setup)}"
        yield _of(what, bound, found.get(("training", setup), ()), "tidemill", "seed_loop")


def _compiled(found: Runs) -> Iterator[Claim]:
    for net, batch, bound in (("net", 64, 8.0), ("net", 1024, 2.0), ("mlp", 64, 1.5)):
        setup = Setup("narrow", batch, 1, net)
        what = f"Compiled steps to the eager loop in memory, {_named(setup)}"
        yield _of(what, bound, found.get(("training", setup), ()), "tidemill_compiled")


def _peers(found: Runs) -> Iterator[Claim]:
    """Ours to the fastest of the peers that are shown, eager and with compiled steps."""
    for (suite, setup), (table, *_) in found.items():
        for case, how in (("tidemill", ""), ("tidemill_compiled", ", compiled steps")):
            ratios = {peer: ratio for peer in table.cases("peer") if (ratio := table.ratio(case, peer)) is not None}
            if ratios:
                best = min(ratios, key=ratios.__getitem__)
                what = f"{suite.capitalize()}{how} to the fastest peer, {_named(setup)}"
                yield Claim(what, ">=", 1.0, ratios[best], ", ".join([f"peer: {best}", *_caveats(table, case, best)]))


def _named(setup: Setup) -> str:
    what = {"narrow": "11 columns", "wide": "100 columns"}[setup.width] if setup.net is None else NETS[setup.net]
    return f"{what}, batch {setup.batch}, {setup.threads} thread{'' if setup.threads == 1 else 's'}"


def _memory(lines: Sequence[Line]) -> Iterator[Claim]:
    by_rows = memory.medians(lines, "rows")
    span = f", {min(by_rows) / 2**20:g} to {max(by_rows) / 2**20:g} million (2^20) rows" if len(by_rows) > 1 else ""
    yield Claim(f"Peak memory, largest to smallest{span}", "<=", 1.05, memory.growth(by_rows))
    found = memory.line_of(memory.medians(lines, "shuffle"))
    note = "" if found is None else f"base {found[0]:.0f} MiB; at most {found[2]:.1f} MiB from that line"
    slope = None if found is None else found[1]
    yield Claim("Memory for each byte of `shuffle_bytes`, at least", ">=", 0.90, slope, note)
    yield Claim("Memory for each byte of `shuffle_bytes`, at most", "<=", 1.10, slope, note)


def _script(lines: Sequence[Line], script: str, **about: Any) -> Line | None:
    """The newest line of a script with these fields."""
    found = _printed(lines, script, about)
    return found[-1]["line"] if found else None


def _rounds(lines: Sequence[Line], script: str, **about: Any) -> int:
    """How many lines with these fields the newest run of a script that has some printed."""
    found = _printed(lines, script, about)
    return sum(line["run"] == found[-1]["run"] for line in found)


def _printed(lines: Sequence[Line], script: str, about: Line) -> list[Line]:
    return [
        line for line in lines if line["suite"] == script and "line" in line and about.items() <= line["line"].items()
    ]


def _s3(lines: Sequence[Line]) -> Iterator[Claim]:
    for columns in (11, 100):
        line = _script(lines, "s3", case="summary", columns=columns, reads="all")
        few = "" if line is None else _few(_rounds(lines, "s3", case="shuffled stream", columns=columns, reads="all"))
        ratio = None if line is None else line["to_limit"]["reading"]
        yield Claim(f"Reading from S3 to raw ranged GETs and decoding, {columns} columns", ">=", 0.85, ratio, few)
        ratio = None if line is None else line["to_shuffled_limit"]
        yield Claim(
            f"Loader from S3 to raw ranged GETs, decoding, permuting, {columns} columns", ">=", 0.85, ratio, few
        )


def _online(lines: Sequence[Line]) -> Iterator[Claim]:
    for part, bound in (("small", 0.7), ("large", 0.9)):
        line, one = (_script(lines, "online", suite=part, case=case) for case in ("summary", "ours"))
        size = "" if one is None else f", {one['shards']:,} shards of {one['rows'] // one['shards']:,} rows"
        ratio = None if line is None else line["ours_to_bare"]
        few = "" if line is None else _few(_rounds(lines, "online", suite=part, case="ours"))
        yield Claim(f"Online to a bare script on S3, {part}{size}", ">=", bound, ratio, few)
    line = _script(lines, "online", suite="freshness", case="summary")
    for field, what, bound in (("median_seconds", "median", 1.5), ("p99_seconds", "99th percentile", 4.0)):
        seconds = None if line is None else line[field]
        yield Claim(f"Upload to committed version at 1 shard/s, {what} in seconds", "<=", bound, seconds)
    line = _script(lines, "online", suite="history", case="summary", of="step_mean_seconds")
    ratio = None if line is None else line["ratio"]
    few = "" if line is None else _few(_rounds(lines, "online", suite="history", case="steps") // 2)
    versions = "" if line is None else f", {line['versions'][1]:,} versions to {line['versions'][0]:,}"
    yield Claim(f"Mean time of an online step{versions}", "<=", 1.10, ratio, few)

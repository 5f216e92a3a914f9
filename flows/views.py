"""What the commands print: for each, the facts for `--json` and the same in words for people."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tidemill.storage.audit import Audit
    from tidemill.storage.certify.run import Certificate
    from tidemill.storage.chain import Version
    from tidemill.storage.manifest import Manifest
    from tidemill.storage.status import Status
    from tidemill.tasks.batch import VersionInfo
    from tidemill.tasks.choosing.results import Backtest, Comparison
    from tidemill.tasks.online.report import OnlineReport
    from tidemill.tasks.reproduce import Reproduction
    from tidemill.tasks.tenants.report import TenantsReport

View = tuple[Any, str]
"""(facts, words)."""
_NAMED: Final = 5
"""How many models a line names."""


# ---- the flows -------------------------------------------------------------------------------------------------------
def trained(info: "VersionInfo") -> View:
    """The end of a batch run. What was decided for it, its log has said before it was trained."""
    made = (
        "trained"
        if info.trained
        else "made before, from the same data, spec and code; nothing to do (--again trains it anew)"
    )
    said = "".join(f"\n  {told}" for told in (*([] if info.trained else info.chosen), *info.notes))
    return info, f"version {info.version} of {info.model}: {made}\nscore: {_measured(info.metrics)}{said}"


def followed(report: "OnlineReport") -> View:
    """The end of an online run."""
    from tidemill.storage.errors import on_one_line

    lines = []
    if report.score:
        lines.append(("score", f"{_numbers(report.score)} on these shards, each before it was trained on"))
    if report.champion:
        lines.append(("champion", f"{_numbers(report.champion)} on the same shards"))
    if report.served:
        lines.append(("answers", f"{_numbers(report.served)}: what was answered when these rows were asked"))
    if report.unlabelled or report.unmatched:
        unknown = f", {count(report.unmatched, 'label')} of no rows that came in time" if report.unmatched else ""
        lines.append(("labels", f"{count(report.unlabelled, 'row')} without one, not trained on{unknown}"))
    if report.recent:
        lines.append(("recent", f"{_numbers(report.recent)} on the last shards, earlier runs included"))
    if report.promoted or report.refused:
        refused = f", {count(report.refused, 'version')} refused as worse" if report.refused else ""
        lines.append(("gate", f"champion moved {count(report.promoted, 'time')}{refused}"))
    if report.rejected:
        lines.append(("rejected", f"{count(report.rejected, 'shard')}, moved to quarantine (see tidemill requeue)"))
        lines += [
            ("", on_one_line(f"{key}: {reason.removeprefix(f'{key}: ')}"))
            for key, reason in report.last_rejected.items()
        ]
    if report.duplicates:
        lines.append(("duplicates", f"{count(report.duplicates, 'shard')} sent again, removed without training"))
    if report.owed:
        lines.append(("not deleted", f"{count(report.owed, 'consumed shard')}; the next run tries again"))
    if report.oldest_waiting is not None:
        since = f"{_when(report.oldest_waiting)} UTC"
        lines.append(("waiting", f"{count(report.waiting, 'shard')} when last looked, the oldest since {since}"))
    if report.passed_over:
        lines.append(
            ("passed over", f"{count(report.passed_over, 'object')} that stay in the inbox until somebody acts")
        )
        lines += [("", on_one_line(f"{url}: {reason}")) for url, reason in report.last_passed_over.items()]
    done = "unchanged, no shard to train on"
    if report.versions:
        shards, rows = count(report.shards, "shard"), count(report.rows, "row")
        done = f"{count(report.versions, 'new version')} from {shards}, {rows}"
    return report, _facts(f"head of {report.model} is version {report.head}: {done}", lines)


def followed_many(report: "TenantsReport") -> View:
    """The end of an online run of many models. What each has done, `--json` tells."""
    from tidemill.storage.errors import on_one_line

    lines = []
    if report.failing:
        lines.append(("failing", f"{count(len(report.failing), 'model')}, whose shards are where they were"))
        lines += [("", on_one_line(f"{name}: {reason}")) for name, reason in report.failing.items()]
    if report.not_opened:
        lines.append(("not opened", f"{_some(report.not_opened)}, when the run was stopped"))
    refused = {name: each.refused for name, each in report.models.items() if each.refused}
    if refused:
        lines.append(("gate", f"{count(sum(refused.values()), 'version')} of {_some(refused)} refused as worse"))
    rejected = {name: each.rejected for name, each in report.models.items() if each.rejected}
    if rejected:
        lines.append(("rejected", f"{count(report.rejected, 'shard')} of {_some(rejected)} (see tidemill requeue)"))
    if owed := {name: each.owed for name, each in report.models.items() if each.owed}:
        lines.append(
            ("not deleted", f"{count(sum(owed.values()), 'consumed shard')} of {_some(owed)}; the next run tries again")
        )
    if waiting := {name: each.waiting for name, each in report.models.items() if each.waiting}:
        lines.append(("waiting", f"{count(report.waiting, 'shard')} of {_some(waiting)} when last looked"))
    done = "unchanged, no shard to train on"
    if report.versions:
        shards, rows = count(report.shards, "shard"), count(report.rows, "row")
        done = f"{count(report.versions, 'new version')} from {shards}, {rows}"
    return report, _facts(
        f"{count(len({*report.models, *report.failing, *report.not_opened}), 'model')}: {done}", lines
    )


def _some(named: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(named)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {count(more, 'other')}" if more > 0 else "")


# ---- the registry ----------------------------------------------------------------------------------------------------
def models(found: "Sequence[Status]", others: Mapping[str, str] = {}, *, state: str = "damaged") -> View:
    """All models of a registry, or of pairs, and what is wrong with each; `others`: why no more can be said of a model, whose
    state has this name."""
    facts: dict[str, Any] = {"models": [status.model_dump(mode="json") for status in found]}
    if others:
        facts[state] = dict(others)
    rows = [
        (each.model, str(each.head), each.kind, _when(each.created), _aliases(each.aliases) or "-", _state(each))
        for each in found
    ]
    rows += [(name, "?", "?", "?", "?", state) for name in others]
    table = _table(("MODEL", "HEAD", "KIND", "CREATED (UTC)", "ALIASES", "STATE"), rows) if rows else "no models"
    problems = [f"{each.model}: {problem}" for each in found for problem in each.problems]
    problems += [f"{name}: {reason}" for name, reason in others.items()]
    return facts, "\n".join([table, *problems])


def _state(found: "Status") -> str:
    return count(len(found.problems), "problem") if found.problems else "well"


def status(found: "Status") -> View:
    """The state of one model, and what waits in the inbox for it; first, whether anything is wrong."""
    from tidemill.storage.errors import on_one_line

    since = f"{_when(found.created)} UTC ({_ago(found.created)})"
    lines = [("problem", str(problem)) for problem in found.problems]
    lines += [
        ("head", f"version {found.head}, {found.kind}, {since}"),
        ("score", _measured(found.metrics)),
        *_late(found.metrics),
        ("aliases", _aliases(found.aliases) or "none"),
        ("trained on", _counted(found.counters)),
    ]
    if (gate := found.gate) is not None:
        row = f" ({gate.refusals} in a row)" if gate.refusals > 1 else ""
        lines.append(("gate", f"{gate.decision}{row}: {gate.numbers} (champion {gate.champion})"))
    if found.new_columns:
        names = ", ".join(f"{name} ({kind})" for name, kind in found.new_columns.items())
        lines.append(("new columns", f"{names}: in shards since the last batch training, not used by the model"))
    if found.quarantined:
        lines.append(("quarantine", f"{count(found.quarantined, 'shard')} (see tidemill requeue), the newest:"))
        lines += [
            ("", on_one_line(f"version {shard.version}, {shard.key}: {shard.reason}")) for shard in found.rejected
        ]
    # What the head itself is done with is usually gone by now: its manifest was written before.
    lines += [
        ("owed", f"{count(objects, 'removal')} in {on_one_line(url)}, by the next run with that inbox")
        for url, objects in found.owed_elsewhere.items()
    ]
    lines += [*_waiting(found), *(("note", note) for note in found.notes)]
    title = f"{found.model} in {found.url.removesuffix(f'/{found.model}')}: {_state(found)}"
    return found, _facts(title, lines)


def _waiting(found: "Status") -> list[tuple[str, str]]:
    """What waits in an inbox, and how much is still in it though the model has consumed it."""
    from tidemill.storage.errors import on_one_line

    if found.inbox is None:
        return []
    since = ""
    if found.oldest_waiting is not None:
        oldest = f"{_when(found.oldest_waiting)} UTC ({_ago(found.oldest_waiting)})"
        since = f", {_size(found.waiting_bytes or 0)}, the oldest since {oldest}"
    lines = [("inbox", f"{count(found.waiting or 0, 'shard')} waiting{since}")]
    if found.consumed_in_inbox:
        shards = count(found.consumed_in_inbox, "consumed shard")
        lines.append(("", f"{shards} still there; unless kept, the next run removes them"))
    if passed_over := found.passed_over:
        lines.append(("", f"passed over: {count(len(passed_over), 'entry', 'entries')} that can be no shards"))
        lines += [("", on_one_line(f"{key}: {why}")) for key, why in islice(passed_over.items(), 20)]
    return lines


def history(versions: "Sequence[Version]", aliases: Mapping[str, int]) -> View:
    """Versions, one a line."""
    facts = [
        {
            **v.manifest.model_dump(
                mode="json", include={"version", "kind", "created", "metrics", "counters", "dataset"}
            ),
            "shards": [shard.key for shard in v.manifest.consumed],
            "rows": sum(shard.rows for shard in v.manifest.consumed),
            "rejected": {shard.key: shard.reason for shard in v.manifest.rejected},
            "rolled_back_to": v.manifest.rolled_back_to,
            "aliases": [name for name, number in aliases.items() if number == v.number],
        }
        for v in versions
    ]
    rows = [
        (
            str(v.number),
            _when(v.manifest.created),
            v.manifest.kind,
            _made_from(v.manifest),
            _numbers(v.manifest.metrics.get("holdout", v.manifest.metrics)),
            ", ".join(name for name, number in aliases.items() if number == v.number),
        )
        for v in versions
    ]
    return facts, _table(("VERSION", "CREATED (UTC)", "KIND", "MADE FROM", "SCORE", "ALIASES"), rows)


def audited(found: "Audit", again: "Reproduction | None") -> View:
    """What an audit found."""
    lines = [
        ("versions", f"{found.versions:,}, each made from the one before it"),
        ("shards", f"{found.consumed:,} consumed, {count(found.rows, 'row')}; {found.rejected:,} rejected"),
        ("blobs", f"{found.blobs:,} are what was committed; those of {count(found.removed, 'version')} are retired"),
    ]
    findings = found.findings
    facts: dict[str, Any] = found.model_dump()
    if again is not None:
        made = f"{count(again.reproduced, 'version')} made again from {count(again.shards, 'shard')}: the same bits"
        if again.skipped:
            made += f"; {again.skipped:,} could not be: their start is retired, or ranks trained them without parts"
        lines.append(("reproduced", made))
        findings = [*findings, *again.findings]
        facts |= {"reproduced": again.model_dump()}
    if findings:
        lines = [("finding", finding) for finding in findings]
    return facts, _facts(f"{found.model}: {count(len(findings), 'finding') if findings else 'sound'}", lines)


def certified(found: "Certificate") -> View:
    """What a place promises, and how fast it is."""
    from tidemill.storage.errors import on_one_line

    limits = sum(not one.holds for one in found.promises if not one.needed)
    fit = "not fit: it lacks what Tidemill needs"
    if found.fit:
        fit = f"fit for Tidemill, with {count(limits, 'limit')}" if limits else "fit for Tidemill"
    rows = []
    for one in found.promises:
        holds = "yes" if one.holds else "NO" if one.needed else "no"
        rows.append((one.promise, holds, on_one_line(one.seen if one.holds else f"{one.seen}: {one.follows}")))
    times = [
        (each.verb, f"{each.p50_ms:,.1f}", f"{each.p99_ms:,.1f}")
        for each in found.latencies
        if each.p50_ms is not None and each.p99_ms is not None
    ]
    failed = [on_one_line(f"{each.verb} was not timed: {each.failed}") for each in found.latencies if each.failed]
    calls = ", ".join(f"{verb} {rate:,.0f}" for verb, rate in found.per_second.items())
    large = ", ".join(f"{verb} {rate / 1e6:,.0f}" for verb, rate in found.bytes_per_second.items())
    lines = [
        f"{found.url}: {fit}",
        "",
        _table(("PROMISE", "HOLDS", "SEEN, AND WHAT FOLLOWS IF IT DOES NOT HOLD"), rows),
        "",
        _table(("OBJECTS OF 30 KB", "P50 MS", "P99 MS"), times),
        *failed,
        f"calls a second, {found.in_flight} at once: {calls}",
        *([f"MB a second, one large object: {large}"] if large else []),
        *(f"left: {url}; remove it, if no other check is running there" for url in found.left),
    ]
    return found, "\n".join(lines)


def compared(result: "Comparison") -> View:
    """Specs beside each other, and what follows from it."""
    from tidemill.tasks.choosing.page import comparison_table

    title = f"{count(len(result.specs), 'spec')} on {count(result.held_out, 'held-out row')} of {result.dataset}"
    failed = [f"{spec.name} failed: {spec.failed}" for spec in result.specs if spec.failed is not None]
    lines = [title, _table(*comparison_table(result)), *failed, *result.verdict, f"report: {result.page}"]
    return result, "\n".join(lines)


def backtested(result: "Backtest") -> View:
    """Another spec beside what really ran."""
    from tidemill.tasks.choosing.page import backtest_table

    title = f"{result.model} up to version {result.head}, {result.metric} before training on each shard"
    kept = f"kept as {result.kept_as} in {result.kept_in}"
    lines = [title, _table(*backtest_table(result)), *result.verdict, *result.notes, kept, f"report: {result.page}"]
    return result, "\n".join(lines)


# ---- words -----------------------------------------------------------------------------------------------------------
def count(number: int, noun: str, several: str | None = None) -> str:
    """`count(1, "shard") == "1 shard"`, `count(2000, "row") == "2,000 rows"`."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def _numbers(metrics: Mapping[str, Any]) -> str:
    """`loss 0.01234, mae 0.5`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)) or "-"


def _counted(counters: Mapping[str, int]) -> str:
    """What a learner has been trained on."""
    plain = {name: number for name, number in counters.items() if name != "compiled_steps"}
    compiled = counters.get("compiled_steps", 0)
    told = ", ".join(f"{number:,} {name}" for name, number in plain.items())
    return f"{told} ({compiled:,} of them compiled)" if compiled else told


def _late(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the head says of answers that were given, and of labels that came row by row."""
    if served := metrics.get("served"):
        yield "answers", f"{_numbers(served)} on its shards: what was answered when these rows were asked"
    if labels := metrics.get("labels"):
        said = f"{count(labels['rows'], 'row')} of its shards had one in time, {labels['unlabelled']:,} had none"
        unmatched = labels["unmatched"]
        yield "labels", said + (f"; {count(unmatched, 'label')} of no rows that came in time" if unmatched else "")


def _measured(metrics: Mapping[str, Any]) -> str:
    """The numbers that tell how good a version is, and on what they were measured."""
    if "holdout" not in metrics:
        numbers = _numbers(metrics)  # none where all of them were rejected
        if not metrics:
            return numbers
        return "none of its shards" if numbers == "-" else f"{numbers} on its shards, each before it was trained on"
    rows = metrics.get("holdout_rows", 0)  # made by batch training
    return f"{_numbers(metrics['holdout'])} on {count(rows, 'held-out row')}" if rows else "no rows were held out"


def _aliases(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {number}" for name, number in aliases.items())


def _made_from(manifest: "Manifest") -> str:
    """Where a version's weights came from."""
    if manifest.kind == "rollback":
        return f"version {manifest.rolled_back_to}"
    if manifest.dataset is not None:
        return f"{count(manifest.dataset.files, 'file')}, {count(manifest.dataset.rows, 'row')}"
    rejected = f", {len(manifest.rejected):,} rejected" if manifest.rejected else ""
    rows = sum(shard.rows for shard in manifest.consumed)
    return f"{count(len(manifest.consumed), 'shard')}, {count(rows, 'row')}{rejected}"


def _when(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _ago(moment: datetime) -> str:
    """`3 minutes ago`, in the largest unit that gives at least 1."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{count(seconds // size, unit)} ago"
    return f"{count(seconds, 'second')} ago"


def _size(number: int) -> str:
    """`1.5 KB`, `2.0 GB`."""
    size, unit = number / 1000, "KB"
    for larger in ("MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.1f} {unit}"


def _facts(title: str, lines: Iterable[tuple[str, str]]) -> str:
    """A title, and named facts below it."""
    return "\n".join([title, *(f"  {name:<12} {value}" for name, value in lines)])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be; numbers stand to the right."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(row[i].isdecimal() for row in cells[1:]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )

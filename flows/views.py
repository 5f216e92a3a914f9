"""What the commands print: for each, the facts for `--json` and the same in words for people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidemill.storage.audit import Audit
    from tidemill.storage.chain import Version
    from tidemill.storage.inbox import Inbox
    from tidemill.storage.log import VersionLog
    from tidemill.storage.manifest import Manifest
    from tidemill.storage.store import ObjectInfo
    from tidemill.tasks.batch import VersionInfo
    from tidemill.tasks.online.report import OnlineReport
    from tidemill.tasks.reproduce import Reproduction

View = tuple[Any, str]
"""(facts, words)."""


# ---- the flows -------------------------------------------------------------------------------------------------------
def trained(info: "VersionInfo") -> View:
    """The end of a batch run."""
    made = (
        "trained"
        if info.trained
        else "made before, from the same data, spec and code; nothing to do (--again trains it anew)"
    )
    return info, f"version {info.version} of {info.model}: {made}\nscore: {_measured(info.metrics)}"


def followed(report: "OnlineReport") -> View:
    """The end of an online run."""
    from tidemill.storage.errors import on_one_line

    lines = []
    if report.score:
        lines.append(("score", f"{_numbers(report.score)} on these shards, each before it was trained on"))
    if report.champion:
        lines.append(("champion", f"{_numbers(report.champion)} on the same shards"))
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


# ---- the registry ----------------------------------------------------------------------------------------------------
def models(logs: "Iterable[VersionLog]") -> View:
    """All models of a registry."""
    from tidemill.storage.aliases import all_aliases

    found: list[dict[str, Any]] = []
    rows = []
    for log in logs:
        head, aliases = log.head(), all_aliases(log)
        created, kind = head.manifest.created, head.manifest.kind
        found.append(
            {
                "model": log.model,
                "head": head.number,
                "kind": kind,
                "created": created.isoformat(),
                "aliases": aliases,
            }
        )
        rows.append((log.model, str(head.number), kind, _when(created), _aliases(aliases)))
    words = _table(("MODEL", "HEAD", "KIND", "CREATED (UTC)", "ALIASES"), rows) if rows else "no models"
    return {"models": found}, words


def model(log: "VersionLog", inbox: "Inbox | None", quarantined: int) -> View:
    """The state of one model, and what waits in the inbox for it."""
    from tidemill.storage.aliases import all_aliases
    from tidemill.storage.audit import lost_versions
    from tidemill.storage.errors import on_one_line
    from tidemill.storage.manifest import consumed_objects

    head, aliases = log.head(), all_aliases(log)
    manifest = head.manifest
    facts: dict[str, Any] = {
        "model": log.model,
        "url": log.url,
        "head": head.number,
        "kind": manifest.kind,
        "created": manifest.created.isoformat(),
        "aliases": aliases,
        "counters": manifest.counters,
        "metrics": manifest.metrics,
        "gate": None if manifest.gate is None else manifest.gate.model_dump(mode="json"),
        "new_columns": manifest.new_columns,
        "owed": len(manifest.owed),
        "owed_in": dict(Counter(debt.inbox for debt in manifest.owed)),
        "quarantined": quarantined,
    }
    lines = [
        ("head", f"version {head.number}, {manifest.kind}, {_when(manifest.created)} UTC ({_ago(manifest.created)})"),
        ("score", _measured(manifest.metrics)),
        ("aliases", _aliases(aliases) or "none"),
        ("trained on", _counted(manifest.counters)),
    ]
    if (gate := manifest.gate) is not None:
        row = f" ({gate.refusals} in a row)" if gate.refusals > 1 else ""
        lines.append(("gate", f"{gate.decision}{row}: {gate.numbers} (champion {gate.champion})"))
    if manifest.new_columns:
        names = ", ".join(f"{name} ({kind})" for name, kind in manifest.new_columns.items())
        lines.append(("new columns", f"{names}: in shards since the last batch training, not used by the model"))
    if quarantined:
        lines.append(("quarantine", f"{count(quarantined, 'shard')} (see tidemill requeue)"))
    # What the head itself is done with is usually gone by now: its manifest was written before.
    own = {shard.inbox for shard in (*consumed_objects(manifest.consumed), *manifest.rejected)}
    lines += [
        ("owed", f"{count(objects, 'removal')} in {on_one_line(url)}, by the next run with that inbox")
        for url, objects in facts["owed_in"].items()
        if url not in own
    ]
    facts["lost_versions"] = lost_versions(log)
    lines += [("warning", lost) for lost in facts["lost_versions"]]
    if inbox is not None:
        waiting, inbox_lines = _waiting(log, head, inbox)
        facts, lines = facts | waiting, lines + inbox_lines
    return facts, _facts(f"{log.model} in {log.store.url}", lines)


def _waiting(log: "VersionLog", head: "Version", inbox: "Inbox") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What waits in an inbox, and how much is still in it though the model has consumed it."""
    from tidemill.storage.errors import on_one_line
    from tidemill.storage.overlap import spelled_as
    from tidemill.storage.tombstones import Seen

    tombstones, spelled = log.tombstones(head), spelled_as(inbox.url)
    tombstones.respell(spelled)
    seen = Seen(tombstones, head.manifest.owed, spelled)
    consumed = 0

    def known(info: "ObjectInfo") -> bool:
        nonlocal consumed
        was = seen.consumed(inbox.url, info)
        consumed += was
        return was

    listing = inbox.list(1, known)
    since = "" if listing.oldest is None else f", the oldest since {_when(listing.oldest)} UTC"
    lines = [("inbox", f"{count(listing.waiting, 'shard')} waiting{since}")]
    if consumed:
        lines.append(("", f"{count(consumed, 'consumed shard')} still there; unless kept, the next run removes them"))
    if listing.passed_over:
        lines.append(("", f"passed over: {count(len(listing.passed_over), 'entry', 'entries')} that can be no shards"))
        lines += [("", on_one_line(f"{key}: {why}")) for key, why in islice(listing.passed_over.items(), 20)]
    facts = {
        "waiting": listing.waiting,
        "oldest_waiting": None if listing.oldest is None else listing.oldest.isoformat(),
        "consumed_in_inbox": consumed,
        "passed_over": listing.passed_over,
    }
    return facts, lines


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
        lines.append(("reproduced", f"{made}; {again.skipped:,} could not be, their start is retired"))
        findings = [*findings, *again.findings]
        facts |= {"reproduced": again.model_dump()}
    if findings:
        lines = [("finding", finding) for finding in findings]
    return facts, _facts(f"{found.model}: {count(len(findings), 'finding') if findings else 'sound'}", lines)


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


def _measured(metrics: Mapping[str, Any]) -> str:
    """The numbers that tell how good a version is, and on what they were measured."""
    if "holdout" not in metrics:
        return _numbers(metrics) + (" on its shards, each before it was trained on" if metrics else "")
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

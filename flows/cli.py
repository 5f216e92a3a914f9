"""The command line. `train` and `follow` run the flows; everything else reads the registry, without Prefect.

Imports of torch, Prefect and the stores stand inside the commands: `tidemill --help` answers at once.
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.config import Dict as ConfigDict
from pydantic import BaseModel, Field, ValidationError

from tasks.settings import BatchSettings, OnlineSettings
from tasks.training.spec import Spec

if TYPE_CHECKING:
    from storage.log import Version, VersionLog

app = App(
    name="tidemill",
    version_flags=["--version"],
    help="""Train a PyTorch model from Parquet on object storage: in batch, then online, exactly once.

    REGISTRY, DATASET and INBOX are URLs: a local folder (./x, /x, file:///x) or s3://bucket/prefix. S3 is configured by the
    standard AWS variables and profiles (AWS_ENDPOINT_URL_S3, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...).

    A first session:

        tidemill train ./data ./registry flights --spec spec.json
        tidemill follow ./inbox ./registry flights
        tidemill status ./registry flights --inbox ./inbox
    """,
)

AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON document instead of text.")]
Name = Annotated[str, Parameter(help="Name of the model in the registry.")]
Which = Annotated[str, Parameter(help="A version's number, an alias such as champion, or head.")]


class FollowSettings(OnlineSettings):
    """The online settings, following by default."""

    mode: Literal["drain", "follow"] = Field(
        default="follow", description="drain: train on all shards that are there, then stop. follow: go on polling."
    )


# ---- the flows -------------------------------------------------------------------------------------------------------
@app.command
def train(
    dataset: str,
    registry: str,
    model: Name,
    /,
    *,
    spec: Annotated[Spec, Parameter(name="*")],
    settings: Annotated[BatchSettings, Parameter(name="*")] = BatchSettings(),
    spec_file: Annotated[
        Path | None, Parameter("--spec", help="JSON or YAML file of the settings below; flags override it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train MODEL from a Parquet DATASET, register it as the new head, and move the alias to it.

    Killed and started again with the same arguments, it continues after its last checkpoint and ends with the same bits.
    """
    _prepare_prefect()
    from flows.batch import batch_training

    info = batch_training(dataset, registry, model, spec, settings)
    made = "trained" if info.trained else "unchanged: this data and spec had already given"
    _print(info, as_json, f"{made} version {info.version} of {model}\n{_metrics(info.metrics.get('holdout'))}")


@app.command
def follow(
    inbox: str,
    registry: str,
    model: Name,
    /,
    *,
    settings: Annotated[FollowSettings, Parameter(name="*")] = FollowSettings(),
    as_json: AsJson = False,
) -> None:
    """Train MODEL on the shards that arrive in INBOX; commit new versions; remove what they contain.

    SIGTERM (or the time given) ends it after the step in hand is committed. SIGKILL at any moment loses no shard and trains
    none twice: start it again.
    """
    _prepare_prefect()
    from flows.online import online_training

    report = online_training(inbox, registry, model, OnlineSettings(**settings.model_dump()))
    left = f", {report.waiting} waiting since {_when(report.oldest_waiting)}" if report.oldest_waiting else ""
    _print(
        report,
        as_json,
        f"{report.versions} versions of {model} (head {report.head}): {report.shards} shards, {report.rows:,} rows, "
        f"{report.rejected} rejected, {report.owed} owed{left}\n{_metrics(report.score, 'score before training')}"
        + "".join(f"\nrejected {key}: {reason}" for key, reason in report.last_rejected.items()),
    )


# ---- reading ---------------------------------------------------------------------------------------------------------
@app.command
def status(registry: str, model: Name | None = None, /, *, inbox: str | None = None, as_json: AsJson = False) -> None:
    """The state of one model, or the list of all models. With --inbox also what waits there."""
    from storage.inbox import open_inbox, quarantined
    from storage.log import list_models

    if model is None:
        names = list_models(registry)
        _print({"models": names}, as_json, "\n".join(names) or "no models")
        return
    log = _open(registry, model)
    head = log.head()
    manifest = head.manifest
    facts: dict[str, Any] = {
        "model": model,
        "head": head.number,
        "kind": manifest.kind,
        "created": manifest.created.isoformat(),
        "aliases": log.aliases(),
        "counters": manifest.counters,
        "metrics": manifest.metrics,
        "owed": len(manifest.owed),
        "quarantined": len(quarantined(log)),
    }
    lines = [
        f"{log.url}",
        f"  head         {head.number} ({manifest.kind}, {_when(manifest.created)})",
        f"  aliases      {', '.join(f'{name} -> {number}' for name, number in facts['aliases'].items()) or 'none'}",
        f"  has seen     {', '.join(f'{count:,} {name}' for name, count in manifest.counters.items())}",
        f"  {_metrics(manifest.metrics.get('holdout', manifest.metrics))}",
        f"  owed         {facts['owed']} shards of the head's commit (deleted, or to be deleted by the next run)",
        f"  quarantined  {facts['quarantined']}",
    ]
    if inbox is not None:
        tombstones, opened = log.tombstones(head), open_inbox(inbox)
        owed = {(debt.inbox, debt.key, debt.etag) for debt in manifest.owed}
        listing = opened.list(
            1, lambda i: (opened.url, i.key, i.etag) in owed or tombstones.has_etag(opened.url, i.key, i.etag)
        )
        facts["waiting"] = listing.waiting
        facts["oldest_waiting"] = None if listing.oldest is None else listing.oldest.isoformat()
        lines.append(f"  waiting      {listing.waiting} shards, the oldest since {_when(listing.oldest)}")
    _print(facts, as_json, "\n".join(lines))


@app.command
def log(
    registry: str,
    model: Name,
    /,
    *,
    last: Annotated[int, Parameter(["--last", "-n"], help="How many versions, from the newest back.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The history of MODEL, newest first: what each version was made from."""
    opened = _open(registry, model)
    versions = list(opened.history(opened.head(), last))
    aliases = {number: name for name, number in opened.aliases().items()}
    lines = [
        f"{v.number:>8}  {_when(v.manifest.created)}  {v.manifest.kind:<8}  {_made_from(v):<34}  "
        f"{_metrics(v.manifest.metrics.get('holdout', v.manifest.metrics), '')}  {aliases.get(v.number, '')}".rstrip()
        for v in versions
    ]
    _print([_summary(v) for v in versions], as_json, "\n".join(lines))


@app.command
def show(registry: str, model: Name, version: Which = "head", /) -> None:
    """The whole manifest of one version, as JSON: lineage, exact shards, blobs with their sha256, metrics."""
    print(_open(registry, model).resolve(version).manifest.model_dump_json(indent=2, exclude_none=True))


@app.command
def predict(
    registry: str,
    model: Name,
    dataset: str,
    output: str,
    /,
    *,
    version: Which = "champion",
    columns: Annotated[list[str] | None, Parameter(consume_multiple=True, help="Columns to copy beside.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the predictions of a version for every row of DATASET below OUTPUT, one file for each of its files."""
    from tasks.predict import predict as run

    done = run(registry, model, dataset, output, version, columns or [])
    _print(
        done, as_json, f"{done.rows:,} predictions of version {done.version} in {done.files} files below {done.output}"
    )


# ---- changing --------------------------------------------------------------------------------------------------------
@app.command
def promote(registry: str, model: Name, version: Which, /, *, alias: str = "champion", as_json: AsJson = False) -> None:
    """Let an alias name a version: serving follows it."""
    opened = _open(registry, model, writable=True)
    found = opened.resolve(version)
    opened.promote(alias, found)
    _print({"alias": alias, "version": found.number}, as_json, f"{alias} -> version {found.number}")


@app.command
def rollback(
    registry: str, model: Name, version: Which, /, *, alias: str = "champion", as_json: AsJson = False
) -> None:
    """Go back: a new head with the weights and state of an older version, and the alias on that version.

    Training continues from the new head. History is never rewritten, and shards consumed since stay consumed.
    """
    opened = _open(registry, model, writable=True)
    target = opened.resolve(version)
    head = opened.rollback(version)
    opened.promote(alias, target)
    _print(
        {"head": head.number, "rolled_back_to": target.number, "alias": alias},
        as_json,
        f"head is version {head.number} with the weights and state of version {target.number}; {alias} -> {target.number}",
    )


@app.command
def requeue(
    registry: str,
    model: Name,
    names: Annotated[list[str] | None, Parameter(help="Names in quarantine; none: list what is there.")] = None,
    /,
    *,
    all_: Annotated[bool, Parameter("--all", negative="", help="Send everything back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send rejected shards back to their inbox, once the reason for the rejection is gone."""
    from storage import inbox

    opened = _open(registry, model, writable=True)
    kept = inbox.quarantined(opened)
    if not names and not all_:
        lines = [f"{name}  {reason['inbox']}/{reason['key']}\n    {reason['reason']}" for name, reason in kept.items()]
        _print(kept, as_json, "\n".join(lines) or "quarantine is empty")
        return
    back = {name: inbox.requeue(opened, name) for name in (kept if all_ else names or ())}
    _print(back, as_json, "\n".join(f"{name} -> {key}" for name, key in back.items()) or "quarantine is empty")


@app.command
def gc(
    registry: str,
    model: Name,
    /,
    *,
    keep: Annotated[int, Parameter(help="How many of the newest versions keep their weights and state.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Remove the blobs of versions out of retention and of attempts that were never committed. Manifests stay."""
    deleted = _open(registry, model, writable=True).collect_garbage(keep)
    _print({"deleted": deleted}, as_json, f"{len(deleted)} blobs removed")


# ---- plumbing --------------------------------------------------------------------------------------------------------
def _open(registry: str, model: str, *, writable: bool = False) -> "VersionLog":
    from storage.log import open_log

    return open_log(registry, model, writable=writable)


def _prepare_prefect() -> None:
    """Before Prefect is imported: our own log lines reach its UI, and a slow machine may take its time to start a server."""
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "tidemill")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if not os.environ.get("PREFECT_API_URL"):
        logging.getLogger("tidemill").info(
            "starting a temporary Prefect server, unless a profile names one (about 20 s) ..."
        )


def _print(result: Any, as_json: bool, text: str) -> None:
    if as_json:
        print(result.model_dump_json() if isinstance(result, BaseModel) else json.dumps(result, default=str))
    else:
        print(text.rstrip())


def _summary(version: "Version") -> dict[str, Any]:
    manifest = version.manifest
    return {
        **manifest.model_dump(mode="json", include={"version", "kind", "created", "metrics", "counters", "dataset"}),
        "shards": [shard.key for shard in manifest.consumed],
        "rows": sum(shard.rows for shard in manifest.consumed),
        "rejected": {shard.key: shard.reason for shard in manifest.rejected},
        "rolled_back_to": manifest.rolled_back_to,
    }


def _made_from(version: "Version") -> str:
    manifest = version.manifest
    if manifest.kind == "rollback":
        return f"weights of version {manifest.rolled_back_to}"
    if manifest.dataset is not None:
        return f"{manifest.dataset.files} files, {manifest.dataset.rows:,} rows"
    rejected = f", {len(manifest.rejected)} rejected" if manifest.rejected else ""
    return f"{len(manifest.consumed)} shards, {sum(s.rows for s in manifest.consumed):,} rows{rejected}"


def _metrics(metrics: object, label: str = "score") -> str:
    numbers = metrics.items() if isinstance(metrics, dict) else ()
    shown = ", ".join(f"{name} {value:.6g}" for name, value in numbers if isinstance(value, int | float))
    return f"{label:<12} {shown or 'none'}".strip()


def _when(moment: datetime | None) -> str:
    return "-" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _spec_file(tokens: list[str]) -> list[Callable[..., Any]]:
    """The file behind `--spec` as defaults of `train`'s flags; what flags say goes first."""
    path = next((b for a, b in itertools.pairwise(tokens) if a == "--spec"), None)
    path = next((t.removeprefix("--spec=") for t in tokens if t.startswith("--spec=")), path)
    if path is None or tokens[0] != "train":
        return []
    import yaml  # reads JSON too

    try:
        fields = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _Usage(f"--spec {path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise _Usage(f"--spec {path} must hold one mapping of settings, such as {{features: [...], target: ...}}")
    for part in ("model", "optimizer"):
        if isinstance(inner := fields.get(part), dict) and "arguments" in inner:
            inner["arguments"] = json.dumps(
                inner["arguments"]
            )  # cyclopts parses a JSON string, but not a mapping, as one
    return [ConfigDict({"train": fields}, source=path)]


class _Usage(Exception):
    """The command line asks for something that cannot be."""


def main(tokens: Iterable[str] | None = None) -> None:
    """Entry point of `tidemill` and of `python -m flows`."""
    arguments = list(sys.argv[1:] if tokens is None else tokens)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tidemill").setLevel(logging.INFO)
    try:
        app.config = _spec_file(arguments)
        app(arguments)
    except (_Usage, ValidationError) as error:
        print(f"tidemill: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not _ours(error):
            raise
        print(f"tidemill: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _ours(error: Exception) -> bool:
    """True for errors whose message says all that a user needs; others are bugs and keep their traceback."""
    from storage.errors import StorageError

    return isinstance(error, StorageError) or any(c.__name__ == "TrainingError" for c in type(error).__mro__)

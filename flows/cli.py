"""The command line. `train` and `follow` run the flows; everything else reads the registry, without Prefect.

Imports of torch, Prefect and the stores stand inside the commands: `tidemill --help` answers at once. Results go to stdout,
progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import atexit
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from gc import freeze
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number
from pydantic import BaseModel

from tidemill.flows import launch, terminal, views
from tidemill.flows.flags import FollowFlags, SpecFlags, UsageError, called
from tidemill.tasks.settings import BatchSettings

if TYPE_CHECKING:
    from tidemill.storage.log import VersionLog

app = App(
    name="tidemill",
    version=lambda: importlib.metadata.version("tidemill"),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
    help="""Train a PyTorch model from Parquet on object storage: in batch, then online, exactly once.

    REGISTRY, DATASET and INBOX are URLs: a local folder (./x, /x, file:///x) or s3://bucket/prefix. S3 is configured by the
    standard AWS variables and profiles (AWS_ENDPOINT_URL_S3, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...).

    A first session:

        tidemill train ./data ./registry flights --spec spec.yaml
        tidemill follow ./inbox ./registry flights --mode drain
        tidemill status ./registry flights --inbox ./inbox
    """,
)

AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON document instead of text.")]
Registry = Annotated[str, Parameter(help="URL below which models live.")]
Dataset = Annotated[str, Parameter(help="URL of a folder of Parquet files, or of a single one.")]
Inbox = Annotated[str, Parameter(help="URL where producers drop Parquet shards.")]
Name = Annotated[str, Parameter(help="Name of the model in the registry.")]
Which = Annotated[str, Parameter(help="A version's number, an alias such as champion, or head.")]
Alias = Annotated[str, Parameter(help="The alias to move.")]
_FOLLOWING = FollowFlags()


# ---- the flows -------------------------------------------------------------------------------------------------------
@app.command(
    usage="Usage: tidemill train DATASET REGISTRY MODEL (--spec FILE | --features COLUMN... --target COLUMN) [OPTIONS]"
)
def train(
    dataset: Dataset,
    registry: Registry,
    model: Name,
    /,
    *,
    spec: Annotated[SpecFlags, Parameter(name="*")],
    settings: Annotated[BatchSettings, Parameter(name="*")] = BatchSettings(),
    file: Annotated[
        Path | None, Parameter("--spec", help="JSON or YAML file of the spec's settings; flags override it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train MODEL from a Parquet DATASET, register it as the new head, and move the alias to it.

    Killed and started again with the same arguments, it continues after its last checkpoint and ends with the same bits.
    A feature is a column's name, or JSON for more. Models of your own are found in the current folder.

    For example:

        tidemill train ./data ./registry flights --spec spec.yaml --epochs 20
        tidemill train ./data ./registry flights --features a b --target y
        tidemill train ./data ./registry flights --target delay \\
            --features distance '{"name": "carrier", "kind": "category"}' \\
            --model.factory mymodels:Net --model.arguments '{"width": 32}'
    """
    launch.before_training(dataset, registry, model, settings)
    launch.prepare()
    from tidemill.flows.batch import batch_training

    _print(views.trained(launch.run(batch_training, dataset, registry, model, spec.spec(), settings)), as_json)


@app.command
def follow(
    inbox: Inbox,
    registry: Registry,
    model: Name,
    /,
    *,
    settings: Annotated[FollowFlags, Parameter(name="*")] = _FOLLOWING,
    as_json: AsJson = False,
) -> None:
    """Train MODEL on the shards that arrive in INBOX; commit new versions; remove what they contain.

    SIGTERM, Ctrl-C or --stop-after-seconds ends the run after the commit in hand. After SIGKILL, at any moment, start it again:
    no shard is lost, and none is trained on twice.

    For example:

        tidemill follow ./inbox ./registry flights
        tidemill follow ./inbox ./registry flights --mode drain --limits.max-shards 8
        tidemill follow s3://bucket/inbox s3://bucket/registry flights \\
            --after-commit.archive-to s3://bucket/data/archive
    """
    given = settings.settings()
    launch.before_following(inbox, registry, model, given)
    launch.prepare()
    from tidemill.flows.online import online_training

    _print(views.followed(launch.run(online_training, inbox, registry, model, given)), as_json)


# ---- reading ---------------------------------------------------------------------------------------------------------
@app.command
def status(
    registry: Registry,
    model: Name | None = None,
    /,
    *,
    inbox: Annotated[str | None, Parameter(help="URL of an inbox to look into as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the state of one model, or the list of all models. With --inbox, print what waits there too.

    For example:

        tidemill status ./registry
        tidemill status ./registry flights --inbox ./inbox
        tidemill status s3://bucket/registry flights --inbox s3://bucket/inbox --json
    """
    from tidemill.storage.disposal import quarantined
    from tidemill.storage.inbox import open_inbox
    from tidemill.storage.log import list_models

    if model is not None:
        log = _open(registry, model)
        opened = None if inbox is None else open_inbox(inbox)
        _print(views.model(log, opened, len(quarantined(log))), as_json)
    elif inbox is None:
        _print(views.models(_open(registry, name) for name in list_models(registry)), as_json)
    else:
        raise UsageError("--inbox needs the name of a model: what waits depends on what it has consumed")


@app.command(name="log")
def history(
    registry: Registry,
    model: Name,
    /,
    *,
    last: Annotated[
        int, Parameter(["--last", "-n"], validator=Number(gte=1), help="How many versions, from the newest back.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Print the history of MODEL, newest first: what each version was made from.

    For example:

        tidemill log ./registry flights -n 5
    """
    from tidemill.storage import aliases

    log = _open(registry, model)
    _print(views.history(list(log.history(log.head(), last)), aliases.all_aliases(log)), as_json)


@app.command
def show(registry: Registry, model: Name, version: Which = "head", /, *, as_json: AsJson = True) -> None:
    """Print the whole manifest of one version, always as JSON: its parent, its shards, its blobs with their sha256, its scores.

    For example:

        tidemill show ./registry flights
        tidemill show ./registry flights champion | jq .spec > spec.json
    """
    from tidemill.storage import aliases

    found = aliases.resolve(_open(registry, model), version)
    terminal.out(found.manifest.model_dump_json(indent=2, exclude_none=True))


@app.command
def predict(
    registry: Registry,
    model: Name,
    dataset: Dataset,
    output: Annotated[str, Parameter(help="URL of a folder for the predictions. An earlier result there is replaced.")],
    /,
    *,
    version: Which = "champion",
    columns: Annotated[list[str] | None, Parameter(help="Columns to copy beside the prediction.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the predictions of a version for every row of DATASET below OUTPUT, one file for each of its files.

    For example:

        tidemill predict ./registry flights ./data ./predictions
        tidemill predict ./registry flights ./data ./predictions --version 12 --columns date carrier
    """
    from tidemill.storage import aliases

    launch.must_exist(dataset)
    aliases.resolve(_open(registry, model), version)
    launch.find_own_modules()
    from tidemill.tasks.predict import predict as run

    done = run(registry, model, dataset, output, version, columns or [])
    rows, files = views.count(done.rows, "prediction"), views.count(done.files, "file")
    _print((done, f"{rows} of version {done.version} in {files} below {done.output}"), as_json)


@app.command
def audit(
    registry: Registry,
    model: Name,
    /,
    *,
    reproduce: Annotated[
        bool, Parameter(negative="", help="Also train again on the archived shards, and compare the bits.")
    ] = False,
    archive: Annotated[list[str] | None, Parameter(help="URLs where consumed shards were archived, or kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the whole history of MODEL: every link, every blob, every shard consumed or rejected once. Changes nothing.

    With --reproduce, each version whose parent's weights still exist is trained again, on the archived shards and in the order
    that the log names, and must have the same bits. Exit code 1 if anything is found.

    For example:

        tidemill audit ./registry flights
        tidemill audit ./registry flights --reproduce --archive ./data/archive
    """
    from tidemill.storage.audit import audit as run

    if reproduce != bool(archive):
        raise UsageError("--reproduce needs --archive URL, and --archive is for --reproduce: give both or neither")
    log = _open(registry, model)
    found, again = run(log), None
    if archive:
        launch.find_own_modules()
        from tidemill.storage.urls import open_store
        from tidemill.tasks.reproduce import reproduce as train_again

        again = train_again(log, [open_store(url) for url in archive])
    _print(views.audited(found, again), as_json)
    if found.findings or (again is not None and again.findings):
        raise SystemExit(1)


# ---- changing --------------------------------------------------------------------------------------------------------
@app.command
def promote(
    registry: Registry, model: Name, version: Which, /, *, alias: Alias = "champion", as_json: AsJson = False
) -> None:
    """Point an alias at a version. What you serve follows the alias.

    For example:

        tidemill promote ./registry flights 12
        tidemill promote ./registry flights champion --alias previous
    """
    from tidemill.storage import aliases

    log = _open(registry, model, writable=True)
    found = aliases.resolve(log, version)
    aliases.promote(log, alias, found)
    _print(({"alias": alias, "version": found.number}, f"{alias} is version {found.number}"), as_json)


@app.command
def rollback(
    registry: Registry, model: Name, version: Which, /, *, alias: Alias = "champion", as_json: AsJson = False
) -> None:
    """Go back: a new head with the weights and state of an older version, and the alias on that version.

    Training continues from the new head. History is never rewritten, and shards consumed since stay consumed.

    For example:

        tidemill rollback ./registry flights 11
    """
    from tidemill.storage import aliases

    log = _open(registry, model, writable=True)
    target = aliases.resolve(log, version)
    head = log.rollback(target)
    aliases.promote(log, alias, target)
    facts = {"head": head.number, "rolled_back_to": target.number, "alias": alias}
    words = f"head is version {head.number}, with the weights and state of version {target.number}"
    _print((facts, f"{words}; {alias} is version {target.number}"), as_json)


@app.command
def requeue(
    registry: Registry,
    model: Name,
    names: Annotated[list[str] | None, Parameter(help="Names in quarantine; none: list what is there.")] = None,
    /,
    *,
    inbox: Annotated[
        list[str] | None, Parameter(help="URL of the inbox that they came from; TIDEMILL_PLACES may name it too.")
    ] = None,
    everything: Annotated[bool, Parameter("--all", negative="", help="Send everything back.")] = False,
    as_json: AsJson = False,
) -> None:
    """List rejected shards, or send them back to their inbox once the reason for the rejection is gone.

    A registry alone does not decide where files are written: the inbox is named here.

    For example:

        tidemill requeue ./registry flights
        tidemill requeue ./registry flights 00000012-6dea53e0e1c6c2dbf2b1d8f3c8fb1d4e --inbox ./inbox
        tidemill requeue ./registry flights --all --inbox ./inbox
    """
    from tidemill.storage import disposal, overlap
    from tidemill.storage.errors import on_one_line
    from tidemill.storage.urls import open_store

    if names and everything:
        raise UsageError("give either names or --all, not both")
    log = _open(registry, model, writable=True)
    log.head()  # a wrong name or URL must not look like an empty quarantine
    if not names and not everything:
        kept = disposal.quarantined(log)
        lines = [
            f"{name}  {reason['inbox']}/{on_one_line(reason['key'])}\n  {on_one_line(reason['reason'])}"
            for name, reason in kept.items()
        ]
        _print((kept, "\n".join(lines) or "quarantine is empty"), as_json)
        return
    places = [*(open_store(url).url for url in inbox or ()), *overlap.allowed_places()]

    def may_touch(url: str) -> bool:
        return overlap.allowed(open_store(url).url, places)

    back = {name: disposal.requeue(log, name, may_touch) for name in names or disposal.quarantined(log)}
    words = "\n".join(f"{name} is {on_one_line(key)} again" for name, key in back.items()) or "quarantine is empty"
    _print((back, words), as_json)


@app.command
def gc(
    registry: Registry,
    model: Name,
    /,
    *,
    keep: Annotated[
        int, Parameter(validator=Number(gte=1), help="How many of the newest versions keep their weights and state.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Remove the blobs of versions out of retention and of attempts that were never committed. Manifests stay.

    Versions that an alias names keep theirs.

    For example:

        tidemill gc ./registry flights --keep 100
    """
    from tidemill.storage.retention import collect_garbage

    deleted = collect_garbage(_open(registry, model, writable=True), keep)
    _print(({"deleted": deleted}, f"{views.count(len(deleted), 'blob')} removed"), as_json)


# ---- plumbing --------------------------------------------------------------------------------------------------------
def _open(registry: str, model: str, *, writable: bool = False) -> "VersionLog":
    from tidemill.storage.log import open_log

    return open_log(registry, model, writable=writable)


def _print(view: views.View, as_json: bool) -> None:
    facts, words = view
    if as_json:
        words = facts.model_dump_json() if isinstance(facts, BaseModel) else json.dumps(facts)
    terminal.out(words)


def main(tokens: Iterable[str] | None = None) -> None:
    """Entry point of `tidemill` and of `python -m tidemill`."""
    # Else the interpreter, when it ends, searches all that torch and Prefect have made for cycles: more than a second.
    # Registered before Prefect registers what it sends at exit, this runs after it
    atexit.register(freeze)
    arguments = list(sys.argv[1:] if tokens is None else tokens)
    try:
        with terminal.attached(arguments[0] if arguments else "", launch.explained):
            called(app, arguments)
    except SystemExit as end:
        launch.part(end.code if isinstance(end.code, int) else 0)
        raise

"""The commands that look at what is there, and change nothing."""

import time
from collections.abc import Callable, Sequence
from gc import freeze
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from tidemill.flows import launch, terminal, views
from tidemill.flows.commands.shared import (
    AT_LEAST_ONE,
    AsJson,
    Name,
    PairsFile,
    Registry,
    Which,
    opened,
    read_pairs,
    tell,
)
from tidemill.flows.usage import UsageError
from tidemill.tasks.defaults import BEHIND_SECONDS

if TYPE_CHECKING:
    from tidemill.tasks.tenants.pairs import Pair

PROBLEMS: Final = 3
"""Exit code of `status` if it found one."""
_PAIRS_AT_ONCE: Final = 8
"""How many of the pairs of a file are looked at at once."""
WATCH_SECONDS: Final = 5.0
"""How often `status --watch` looks."""


def status(
    registry: Registry | None = None,
    model: Name | None = None,
    /,
    *,
    inbox: Annotated[str | None, Parameter(help="URL of an inbox to look into as well.")] = None,
    pairs: PairsFile = None,
    behind_seconds: Annotated[
        float, Parameter(validator=Number(gt=0), help="A shard that waits for longer than this is a problem.")
    ] = BEHIND_SECONDS,
    watch: Annotated[bool, Parameter(negative="", help="Look again every 5 seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the state of one model, or of all models, and what is wrong: one line a problem, with the remedy.

    With --inbox, what waits there is looked at too. Exit codes: 0 nothing is wrong, 3 something is, 1 it could not be found
    out. What each problem means, and what to do, is in docs/operations.md.

    For example:

        tidemill status ./registry
        tidemill status ./registry flights --inbox ./inbox --watch
        tidemill status s3://bucket/registry flights --inbox s3://bucket/inbox --json
        tidemill status --pairs pairs.yaml
    """
    from tidemill.storage.errors import CorruptObject, UnsupportedFormat
    from tidemill.storage.inbox import open_inbox
    from tidemill.storage.log import list_models
    from tidemill.storage.status import look

    if model is None and inbox is not None:
        raise UsageError("--inbox needs the name of a model: what waits depends on what it has consumed")
    if (registry is None) == (pairs is None):
        raise UsageError("status needs REGISTRY, or --pairs FILE in its place")

    given = () if pairs is None else read_pairs(pairs)

    def once() -> bool:
        """Whether anything is wrong."""
        if registry is None:
            return _of_pairs(given, behind_seconds, as_json)
        names = list_models(registry) if model is None else [model]
        looked_into = None if inbox is None else open_inbox(inbox)
        found, damaged = [], dict[str, str]()
        for name in names:
            try:
                log = opened(registry, name)
                if not watch:  # else Python searches what was imported, again and again, while it reads long listings
                    freeze()
                found.append(look(log, looked_into, behind_seconds=behind_seconds, ask_store=True))
            except (CorruptObject, UnsupportedFormat) as error:
                if model is not None:
                    raise
                damaged[name] = str(error)  # which must not hide the others
        tell(views.models(found, damaged) if model is None else views.status(found[0]), as_json)
        return bool(damaged) or any(each.problems for each in found)

    wrong = once()
    if watch:
        wrong = _again_and_again(once, wrong)
    if wrong:
        raise SystemExit(PROBLEMS)


def _of_pairs(pairs: "Sequence[Pair]", behind_seconds: float, as_json: bool) -> bool:
    """Print how all of them stand; whether anything is wrong."""
    from tidemill.storage.errors import StorageError
    from tidemill.storage.inbox import open_inbox
    from tidemill.storage.parallel import concurrently
    from tidemill.storage.status import Status, look

    def one(pair: "Pair") -> Status | str:
        try:
            log = opened(pair.registry, pair.model)
            found = look(log, open_inbox(pair.inbox), behind_seconds=behind_seconds)
        except StorageError as error:  # which must not hide the others
            return str(error)
        return found.model_copy(update={"model": pair.called})

    looked = dict(zip((pair.called for pair in pairs), concurrently(one, pairs, _PAIRS_AT_ONCE), strict=True))
    found = [each for each in looked.values() if isinstance(each, Status)]
    unknown = {name: each for name, each in looked.items() if isinstance(each, str)}
    tell(views.models(found, unknown, state="unknown"), as_json)
    return bool(unknown) or any(each.problems for each in found)


def _again_and_again(once: Callable[[], bool], wrong: bool) -> bool:
    """Look every few seconds until Ctrl-C; what the last look has found. A store that is away is told, and looked at again."""
    from tidemill.storage.errors import StorageError

    try:
        while True:
            time.sleep(WATCH_SECONDS)
            terminal.clear()
            try:
                wrong = once()
            except StorageError as error:
                terminal.out(f"tidemill: {error}")
    except terminal.Terminated:
        raise
    except KeyboardInterrupt:
        return wrong


def history(
    registry: Registry,
    model: Name,
    /,
    *,
    last: Annotated[
        int, AT_LEAST_ONE, Parameter(["--last", "-n"], help="How many versions, from the newest back.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Print the history of MODEL, newest first: what each version was made from.

    For example:

        tidemill log ./registry flights -n 5
    """
    from tidemill.storage import aliases

    log = opened(registry, model)
    tell(views.history(list(log.history(log.head(), last)), aliases.all_aliases(log)), as_json)


def show(registry: Registry, model: Name, version: Which = "head", /, *, as_json: AsJson = True) -> None:
    """Print the whole manifest of one version, always as JSON: its parent, its shards, its blobs with their sha256, its scores.

    For example:

        tidemill show ./registry flights
        tidemill show ./registry flights champion | jq .spec > spec.json
    """
    from tidemill.storage import aliases

    found = aliases.resolve(opened(registry, model), version)
    terminal.out(found.manifest.model_dump_json(indent=2, exclude_none=True))


def report(
    registry: Registry,
    model: Name,
    output: Annotated[Path, Parameter(help="The file to write. An earlier one is replaced.")],
    /,
    *,
    frozen: Annotated[
        bool,
        Parameter(
            negative="", help="Also score the batch model, as it was left, on the archived shards that came after it."
        ),
    ] = False,
    archive: Annotated[list[str] | None, Parameter(help="URLs where consumed shards were archived, or kept.")] = None,
    last: Annotated[
        int, AT_LEAST_ONE, Parameter(["--last", "-n"], help="How many versions, from the newest back.")
    ] = 1000,
    as_json: AsJson = False,
) -> None:
    """Write a page about MODEL: its errors as they came, its champions, what it is made of, what was rejected.

    The page is one file of HTML that needs nothing else. It is made from the manifests alone; --frozen reads the archived shards
    too.

    For example:

        tidemill report ./registry flights report.html
        tidemill report ./registry flights report.html --frozen --archive ./data/archive
    """
    from tidemill.tasks.history import writing
    from tidemill.tasks.history.charts import NOT_SCORED
    from tidemill.tasks.history.page import page
    from tidemill.tasks.history.reading import HistoryReader

    if frozen != bool(archive):
        raise UsageError("--frozen needs --archive URL, and --archive is for --frozen: give both or neither")
    writing.check_place(output)
    launch.must_exist(*archive or ())
    log = opened(registry, model)
    found, scored = HistoryReader(log, last).read(), NOT_SCORED
    if archive:
        launch.find_own_modules()
        from tidemill.storage.urls import open_store
        from tidemill.tasks.history.frozen import score_frozen

        scored = score_frozen(log, found, [open_store(url) for url in archive])
    size = writing.write(output, page(found, scored))
    facts = {"file": str(output), "bytes": size, "versions": len(found.versions), "shards": len(found.shards)}
    versions, shards = views.count(len(found.versions), "version"), views.count(len(found.shards), "shard")
    tell((facts, f"{output}: version {found.head.version} of {model}, made from {versions} with {shards}"), as_json)


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
    launch.must_exist(*archive or ())
    log = opened(registry, model)
    found, again = run(log), None
    if archive:
        launch.find_own_modules()
        from tidemill.storage.urls import open_store
        from tidemill.tasks.reproduce import reproduce as train_again

        again = train_again(log, [open_store(url) for url in archive])
    tell(views.audited(found, again), as_json)
    if found.findings or (again is not None and again.findings):
        raise SystemExit(1)

"""The commands that change what a registry holds, without training."""

from typing import Annotated

from cyclopts import Parameter

from tidemill.flows import views
from tidemill.flows.commands.shared import AT_LEAST_ONE, Alias, AsJson, Name, Registry, Which, opened, tell
from tidemill.flows.usage import UsageError


def promote(
    registry: Registry, model: Name, version: Which, /, *, alias: Alias = "champion", as_json: AsJson = False
) -> None:
    """Point an alias at a version. What you serve follows the alias.

    For example:

        tidemill promote ./registry flights 12
        tidemill promote ./registry flights champion --alias previous
    """
    from tidemill.storage import aliases

    log = opened(registry, model, writable=True)
    found = aliases.resolve(log, version)
    aliases.promote(log, alias, found)
    tell(({"alias": alias, "version": found.number}, f"{alias} is version {found.number}"), as_json)


def rollback(
    registry: Registry, model: Name, version: Which, /, *, alias: Alias = "champion", as_json: AsJson = False
) -> None:
    """Go back: a new head with the weights and state of an older version, and the alias on that version.

    Training continues from the new head. History is never rewritten, and shards consumed since stay consumed.

    For example:

        tidemill rollback ./registry flights 11
    """
    from tidemill.storage import aliases

    aliases.check_name(alias)
    log = opened(registry, model, writable=True)
    target = aliases.resolve(log, version)
    head = log.rollback(target)
    aliases.promote(log, alias, target)
    facts = {"head": head.number, "rolled_back_to": target.number, "alias": alias}
    words = f"head is version {head.number}, with the weights and state of version {target.number}"
    tell((facts, f"{words}; {alias} is version {target.number}"), as_json)


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
    log = opened(registry, model, writable=True)
    log.head()  # a wrong name or URL must not look like an empty quarantine
    if not names and not everything:
        kept = disposal.quarantined(log)
        lines = [
            f"{name}  {reason['inbox']}/{on_one_line(reason['key'])}\n  {on_one_line(reason['reason'])}"
            for name, reason in kept.items()
        ]
        tell((kept, "\n".join(lines) or "quarantine is empty"), as_json)
        return
    places = [*(open_store(url).url for url in inbox or ()), *overlap.allowed_places()]

    def may_touch(url: str) -> bool:
        return overlap.allowed(open_store(url).url, places)

    back = {name: disposal.requeue(log, name, may_touch) for name in names or disposal.quarantined(log)}
    words = "\n".join(f"{name} is {on_one_line(key)} again" for name, key in back.items()) or "quarantine is empty"
    tell((back, words), as_json)


def gc(
    registry: Registry,
    model: Name,
    /,
    *,
    keep: Annotated[
        int, AT_LEAST_ONE, Parameter(help="How many of the newest versions keep their weights and state.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Remove the blobs of versions out of retention and of attempts that were never committed. Manifests stay.

    Versions that an alias names keep theirs.

    For example:

        tidemill gc ./registry flights --keep 100
    """
    from tidemill.storage.retention import collect_garbage

    deleted = collect_garbage(opened(registry, model, writable=True), keep)
    tell(({"deleted": deleted}, f"{views.count(len(deleted), 'blob')} removed"), as_json)

"""What happens in a run as Prefect's events, with the model as their resource: what automations react to.

An event is handed to Prefect's own thread for events. Without a server that runs there are none.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from prefect.events import emit_event

from tidemill.progress import Activity
from tidemill.storage.errors import on_one_line
from tidemill.storage.manifest import Manifest
from tidemill.tasks.online.events import Committed, Looked

COMMITTED: Final = "tidemill.version.committed"
MOVED: Final = "tidemill.champion.moved"
REFUSED: Final = "tidemill.version.refused"
REJECTED: Final = "tidemill.shard.rejected"
BEHIND: Final = "tidemill.inbox.behind"
UPLOADED: Final = "tidemill.shard.uploaded"
"""Not sent by Tidemill: by whoever puts a shard into an inbox, to wake a run (`automations.py`)."""

NAMED: Final = 20
"""So many rejected shards of one version have an event each; the last of these says how many more there are."""


def resource(registry: str, model: str) -> dict[str, str]:
    """What the events of a model are about."""
    return {
        "prefect.resource.id": f"tidemill.model.{model}",
        "prefect.resource.name": model,
        "tidemill.registry": registry,
    }


class Emitter:
    """Listens to a run (`tidemill.progress`), and emits an event for what happened to a version or a shard."""

    def __init__(self, registry: str, model: str, behind_seconds: float) -> None:
        """`behind_seconds`: a shard that waits longer is an event, and again each time as long passes."""
        self._resource, self._behind = resource(registry, model), timedelta(seconds=behind_seconds)
        self._quiet_until = datetime.min.replace(tzinfo=UTC)

    def on_activity(self, activity: Activity) -> None:
        """How far things are is no event."""

    def on_event(self, event: object) -> None:
        """Emit what there is to say of it."""
        if isinstance(event, Committed):
            for name, payload in of_version(event.manifest, event.champion):
                self._emit(name, payload)
        elif isinstance(event, Looked):
            self._looked(event)

    def registered(self, version: int, metrics: Mapping[str, Any], alias: str) -> None:
        """A batch training has made a version, and moved an alias to it."""
        self._emit(COMMITTED, {"version": version, "kind": "batch", "scores": finite(metrics.get("holdout"))})
        self._emit(MOVED, {"alias": alias, "to": version})

    def _looked(self, looked: Looked) -> None:
        now = datetime.now(UTC)
        if looked.oldest is None or now - looked.oldest <= self._behind or now < self._quiet_until:
            return
        self._quiet_until = now + self._behind
        waits = int((now - looked.oldest).total_seconds())
        self._emit(BEHIND, {"waiting": looked.waiting, "oldest": looked.oldest.isoformat(), "oldest_seconds": waits})

    def _emit(self, name: str, payload: dict[str, Any]) -> None:
        emit_event(event=name, resource=self._resource, payload=payload)


def of_version(manifest: Manifest, champion: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, payload) of each event that a committed version is; `champion`: the version that the alias names since."""
    version, gate, rejected = manifest.version, manifest.gate, manifest.rejected
    rows = sum(shard.rows for shard in manifest.consumed)
    facts = {"shards": len(manifest.consumed), "rows": rows, "rejected": len(rejected)}
    yield COMMITTED, {"version": version, "kind": manifest.kind, **facts, "scores": finite(manifest.metrics)}
    if gate is not None:
        scores = {"metric": gate.metric, "learner": gate.recent.learner, "champion": gate.recent.champion}
        if gate.decision == "promoted" and champion == version:
            yield MOVED, {"from": gate.champion, "to": version, **scores}
        elif gate.decision == "refused":
            in_a_row = {"refusals": gate.refusals, "champion_version": gate.champion}
            yield REFUSED, {"version": version, **in_a_row, **scores, "why": gate.numbers}
    for number, shard in enumerate(rejected[:NAMED], start=1):
        more = len(rejected) - NAMED if number == NAMED else 0
        about = {"inbox": on_one_line(shard.inbox), "key": on_one_line(shard.key), "reason": on_one_line(shard.reason)}
        yield REJECTED, {"version": version, **about, **({"more": more} if more > 0 else {})}


def finite(metrics: Any) -> dict[str, float]:
    """The numbers among a version's metrics."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)} if metrics else {}

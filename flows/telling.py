"""What Prefect is told of a run while its flow's body runs: events and artifacts. Nothing of it can fail or hold up the run."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL

from tidemill.flows.artifacts import Artifacts
from tidemill.flows.events import Emitter
from tidemill.progress import listening
from tidemill.tasks.batch import VersionInfo


class Told:
    """Who listens to a run; of a run that no server records, nobody."""

    def __init__(self, artifacts: Artifacts | None = None, emitter: Emitter | None = None) -> None:
        self._artifacts, self._emitter = artifacts, emitter

    def registered(self, made: VersionInfo, alias: str) -> None:
        """A batch training has ended with this version."""
        if made.trained and self._artifacts is not None and self._emitter is not None:
            self._artifacts.registered()
            self._emitter.registered(made.version, made.metrics, alias)


@contextmanager
def telling(registry: str, model: str, behind_seconds: float = 0.0) -> Iterator[Told]:
    """Tell the server of the flow run around this call what happens inside.

    A temporary server, which Prefect starts where none is set up, is told nothing: nobody looks at it.

    Args:
        registry: URL below which models live.
        model: Name of the model that is trained.
        behind_seconds: A shard that waits for longer is an event; of no use where no inbox is looked into.
    """
    here = FlowRunContext.get()
    if here is None or here.flow_run is None or not PREFECT_API_URL.value():
        yield Told()
        return
    artifacts, emitter = Artifacts(registry, model, here.flow_run.id), Emitter(registry, model, behind_seconds)
    artifacts.open()
    try:
        with listening(artifacts), listening(emitter):
            yield Told(artifacts, emitter)
    finally:
        artifacts.close()

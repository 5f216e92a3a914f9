"""What happens in an online run, as it is told to whoever listens (`tidemill.progress`): metrics, Prefect's events, a page."""

from dataclasses import dataclass
from datetime import datetime

from tidemill.storage.manifest import Manifest


@dataclass(frozen=True)
class Looked:
    """The inbox was listed."""

    model: str
    head: int
    """The newest version."""
    waiting: int
    """Shards that no version contains."""
    oldest: datetime | None
    """When the oldest of them was written."""
    passed_over: int
    """Objects that stay in the inbox until a person acts."""
    owed: int
    """Removals that the head still owes."""


@dataclass(frozen=True)
class Committed:
    """A version was committed by this run, and what it owes was disposed of as far as it could be."""

    manifest: Manifest
    """What it was made from, its scores, the shards that it rejected, and the decision of the gate."""
    champion: int | None
    """The version that the champion's alias names now; None: there is no such alias, or nobody looks at it."""
    owed: int
    """Removals that it still owes."""


@dataclass(frozen=True)
class Stepped:
    """A step has committed a version."""

    seconds: float
    """From its start to the end of its commit."""

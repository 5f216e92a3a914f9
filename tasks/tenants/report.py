"""What a run of many models tells when it ends."""

from pydantic import BaseModel

from tidemill.tasks.online.report import OnlineReport


class TenantsReport(BaseModel):
    """What a run of many models did, and what it left."""

    models: dict[str, OnlineReport] = {}
    """Of each that could be opened, by its name."""
    failing: dict[str, str] = {}
    """Whose last turn failed -> why. Nothing of that turn counts, and its shards are where they were."""

    not_opened: list[str] = []
    """Those that had not been opened yet, nor failed, when the run was stopped."""

    def _sum(self, name: str) -> int:
        return sum(getattr(report, name) for report in self.models.values())

    @property
    def versions(self) -> int:
        """That were committed, of all models."""
        return self._sum("versions")

    @property
    def shards(self) -> int:
        """That were trained on."""
        return self._sum("shards")

    @property
    def rows(self) -> int:
        """That were trained on."""
        return self._sum("rows")

    @property
    def rejected(self) -> int:
        """Shards that went to quarantine."""
        return self._sum("rejected")

    @property
    def waiting(self) -> int:
        """Shards in the inboxes at the last looks."""
        return self._sum("waiting")

"""What a run of many models answers on a port of this machine: `/` all, `/NAME` the report of one, `/metrics`, `/health`."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

from tidemill.tasks.history.drawing import escaped
from tidemill.tasks.history.page import framed
from tidemill.tasks.history.style import PAGE
from tidemill.tasks.online.web import HTML, JSON, REFRESH_SECONDS, TEXT, Fresh, Pages, Pulse, all_metrics
from tidemill.tasks.tenants.tenant import Tenant

_REPORTS: Final = 16
"""Of so many models, those that were looked at last, the history stays in memory."""
_THERE_ARE: Final = b"There are: / (all models), /NAME (the report of one), /health, /metrics\n"


class TenantPages:
    """What there is to be seen of a run of many models."""

    def __init__(self, tenants: Sequence[Tenant], behind_seconds: float, pulse: Pulse) -> None:
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._behind, self._pulse = behind_seconds, pulse
        self._all = Fresh(self._make_all)
        self._pages = lru_cache(_REPORTS)(self._pages_of)

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """(status, content type, body) for a path."""
        match path.partition("?")[0]:
            case "/":
                return 200, HTML, self._all.get()
            case "/health":
                return self._health()
            case "/metrics":
                return all_metrics(accept)
            case name if name[1:] in self._tenants:
                if self._tenants[name[1:]].places is None:
                    return 503, TEXT, f"{name[1:]} is not open: {self._tenants[name[1:]].failure or 'yet'}\n".encode()
                return self._pages(name[1:]).answer("/", accept)
        return 404, TEXT, _THERE_ARE

    def _pages_of(self, name: str) -> Pages:
        places = self._tenants[name].places
        assert places is not None
        return Pages(places.log, places.inbox, self._behind, self._pulse)

    def _make_all(self) -> bytes:
        failing = sum(tenant.failure is not None for tenant in self._tenants.values())
        title = f"{len(self._tenants):,} models, {failing:,} failing"
        head = "<tr><th>model<th>version<th>shards<th>rows<th>rejected<th>waiting<th></tr>"
        table = f"<table>{head}{''.join(self._rows())}</table>"
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}"><title>{title}</title>'
            f"<style>{PAGE}</style>{framed([f'<h1>{title}</h1>', table])}</html>\n"
        ).encode()

    def _rows(self) -> Iterator[str]:
        """Those that fail first."""
        for tenant in sorted(self._tenants.values(), key=lambda tenant: tenant.failure is None):
            name, report = escaped(tenant.name), tenant.report
            numbers = [""] * 5
            if report is not None:
                counts = report.head, report.shards, report.rows, report.rejected, report.waiting
                numbers = [f"{count:,}" for count in counts]
            cells = "".join(f"<td>{number}" for number in numbers)
            yield f'<tr><td><a href="/{name}">{name}</a>{cells}<td>{escaped(tenant.failure or "")}</tr>'

    def _health(self) -> tuple[int, str, bytes]:
        """503 if nothing was done for longer than `behind_seconds`. Models that fail are told: no reason to end the others."""
        age = self._pulse.age
        alive = age < self._behind
        reports = [tenant.report for tenant in self._tenants.values() if tenant.report is not None]
        facts = {
            "alive": alive,
            "seconds_since_it_did_anything": round(age, 1),
            "models": len(self._tenants),
            "failing": {name: tenant.failure for name, tenant in self._tenants.items() if tenant.failure is not None},
            "waiting_shards": sum(report.waiting for report in reports),
        }
        return 200 if alive else 503, JSON, json.dumps(facts).encode()

"""The doors to many models in one process: trained until their inboxes are empty (`drain`), or until told to stop (`follow`)."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from tidemill.progress import Activity, under_way
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.online.report import ALIVE_SECONDS
from tidemill.tasks.online.step import Outcome
from tidemill.tasks.settings import LEARNERS, OnlineSettings
from tidemill.tasks.stopping import stop_on_signals
from tidemill.tasks.tenants.lookouts import Lookouts
from tidemill.tasks.tenants.naming import named_in_logs
from tidemill.tasks.tenants.pairs import Pair, check
from tidemill.tasks.tenants.report import TenantsReport
from tidemill.tasks.tenants.rota import Member, Rota
from tidemill.tasks.tenants.tenant import Tenant
from tidemill.tasks.tenants.watching import numbers_for, watched

logger = logging.getLogger("tidemill.tenants")

LOOKOUTS: Final = 8
"""How many places are looked at at once. So many stores that are away hold up the looks at others, never the turns."""


def drain(
    pairs: Sequence[Pair],
    settings: OnlineSettings = OnlineSettings(),
    *,
    learners: int = LEARNERS,
    stores: Callable[[str], Store] = open_store,
) -> TenantsReport:
    """Train many registered models, each on the shards that are in an inbox of its own, then stop.

    They take turns: one commit each, round and round. What one of them fails of is told, and the others go on: it is tried
    again if its store was away, else given up, and its shards stay where they were. Each has the bits that a run of its own
    would have given it. SIGTERM or Ctrl-C ends the run once the step in hand is committed, if this is the main thread.

    Args:
        pairs: Who there is.
        settings: Of all of them, where a pair has none of its own. `mode` is not looked at.
        learners: The most models of which learner and champion stay in memory between two turns; others are read again.
        stores: Opens the store at a URL.

    Raises:
        PairsError, PlacesOverlap, InvalidURL: two pairs may not stand beside each other. Nothing was begun.
    """
    return _run(pairs, settings.model_copy(update={"mode": "drain"}), learners, stores)


def follow(
    pairs: Sequence[Pair],
    settings: OnlineSettings = OnlineSettings(),
    *,
    learners: int = LEARNERS,
    stores: Callable[[str], Store] = open_store,
) -> TenantsReport:
    """As `drain`, but go on looking into the inboxes until a signal or `stop_after_seconds` ends it.

    An inbox where nothing waits is looked at after `poll_seconds`, then after pauses that double. Who fails is tried again,
    after pauses that double too.
    """
    return _run(pairs, settings.model_copy(update={"mode": "follow"}), learners, stores)


def _run(
    pairs: Sequence[Pair], settings: OnlineSettings, learners: int, stores: Callable[[str], Store]
) -> TenantsReport:
    own = check(pairs, settings)
    numbers = numbers_for(list(own), settings)
    tenants = [Tenant(pair, own[pair.called], stores, numbers.get(pair.called)) for pair in pairs]
    looks: Lookouts[object] = Lookouts(min(LOOKOUTS, len(tenants)))
    drains = settings.mode == "drain"
    what = f"{settings.mode} {len(tenants):,} model{'' if len(tenants) == 1 else 's'}"
    with (
        stop_on_signals(settings.stop_after_seconds) as stop,
        named_in_logs(),
        watched(tenants, list(numbers.values()), settings),
        under_way(what, unit="shards") as activity,
    ):
        tally = _Tally(tenants, activity)
        rota = Rota(
            tenants,
            looks,
            drains=drains,
            learners=learners,
            now=time.monotonic,
            after_turn=tally.add,
            alive=tally.alive,
        )
        try:
            rota.go(stop)
        finally:
            looks.close()
    reports = {tenant.name: tenant.report for tenant in tenants if tenant.report is not None}
    unheard = [name for name in own if name not in reports and name not in rota.failing]
    return TenantsReport(models=reports, failing=rota.failing, not_opened=unheard)


class _Tally:
    """What all of them have done together, for whoever looks on."""

    def __init__(self, tenants: Sequence[Tenant], activity: Activity) -> None:
        self._activity, self._tenants = activity, tenants
        self._counted: dict[str, tuple[int, int, int]] = {}
        """Name -> its shards, rows and waiting shards, as they stood after its last turn."""
        self._waiting = 0
        self._told_at = time.monotonic()

    def add(self, member: Member, outcome: Outcome) -> None:
        """A turn has ended."""
        assert isinstance(member, Tenant)
        assert member.report is not None
        report = member.report
        shards, rows, waiting = self._counted.get(member.name, (0, 0, 0))
        self._counted[member.name] = report.shards, report.rows, report.waiting
        self._waiting += report.waiting - waiting
        if outcome is not Outcome.IDLE:
            self._told_at = time.monotonic()
        self._activity.advance(report.shards - shards, rows=report.rows - rows)
        self._activity.expect(self._activity.done + self._waiting)

    def alive(self, failing: int) -> None:
        """Now and then, where nobody commits, log that the run is alive."""
        if time.monotonic() - self._told_at < ALIVE_SECONDS:
            return
        self._told_at = time.monotonic()
        waiting = sum(tenant.report.waiting for tenant in self._tenants if tenant.report is not None)
        logger.info("alive: %d models, %d of them failing; %s waiting", len(self._tenants), failing, f"{waiting:,}")

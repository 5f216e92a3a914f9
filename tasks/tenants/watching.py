"""Who watches a run of many models: as `tidemill.tasks.online.watching`, for all of them at once."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tidemill.progress import listening
from tidemill.tasks.online import metrics
from tidemill.tasks.online.metrics import Numbers
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.tenants.tenant import Tenant

logger = logging.getLogger("tidemill.tenants")


def numbers_for(names: Sequence[str], settings: OnlineSettings) -> dict[str, Numbers]:
    """The numbers of each model, by its name; empty if nobody asks for any."""
    if settings.metrics_file is None and settings.port is None and not metrics.wanted_by_prefect():
        return {}
    return {name: metrics.numbers_of(name) for name in names}


@contextlib.contextmanager
def watched(tenants: Sequence[Tenant], numbers: Sequence[Numbers], settings: OnlineSettings) -> Iterator[None]:
    """While the context is open, the run has the metrics and the pages that its settings ask for."""
    with contextlib.ExitStack() as stack:
        try:
            _begin(stack, tenants, numbers, settings)
        except Exception as error:  # noqa: BLE001  # of whatever class: a run is not there to be watched
            logger.warning("this run is not watched as was asked: %r. It goes on", error)
        yield


def _begin(
    stack: contextlib.ExitStack, tenants: Sequence[Tenant], numbers: Sequence[Numbers], settings: OnlineSettings
) -> None:
    if settings.metrics_file is not None:
        stack.enter_context(metrics.written_to(Path(settings.metrics_file), *numbers))
    if settings.port is not None:
        from tidemill.tasks.online import web  # here, because Python's server takes a while to import
        from tidemill.tasks.tenants.web import TenantPages

        pulse = web.Pulse()
        stack.enter_context(listening(pulse))
        stack.enter_context(web.served_at(settings.port, TenantPages(tenants, settings.behind_seconds, pulse)))

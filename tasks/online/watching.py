"""Who watches a run: the listeners and doors that its settings ask for. None of them can fail or slow it."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from tidemill.progress import listening
from tidemill.storage.aliases import find_alias
from tidemill.storage.inbox import Inbox
from tidemill.storage.log import VersionLog
from tidemill.tasks.online import metrics
from tidemill.tasks.settings import OnlineSettings

logger = logging.getLogger("tidemill.online")


@contextlib.contextmanager
def watched(log: VersionLog, inbox: Inbox, settings: OnlineSettings) -> Iterator[None]:
    """While the context is open, the run of this model has the metrics and the pages that its settings ask for."""
    with contextlib.ExitStack() as stack:
        try:
            _begin(stack, log, inbox, settings)
        except Exception as error:  # noqa: BLE001  # of whatever class: a run is not there to be watched
            logger.warning("this run is not watched as was asked: %r. It goes on", error)
        yield


def _begin(stack: contextlib.ExitStack, log: VersionLog, inbox: Inbox, settings: OnlineSettings) -> None:
    file, port = settings.metrics_file, settings.port
    if file is None and port is None and not metrics.wanted_by_prefect():
        return
    numbers = metrics.numbers_of(log.model)
    stack.enter_context(listening(numbers))
    if file is not None:
        stack.enter_context(metrics.written_to(Path(file), numbers))
    if port is not None:
        from tidemill.tasks.online import web  # here, because Python's server takes a while to import

        pulse = web.Pulse()
        stack.enter_context(listening(pulse))
        stack.enter_context(web.served_at(port, web.Pages(log, inbox, settings.behind_seconds, pulse)))
    numbers.begin(log.head().manifest, find_alias(log, settings.gate.alias))  # last, as it may fail

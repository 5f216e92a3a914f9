"""Who watches a run: the listeners that its settings ask for. None of them can fail or slow it."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from tidemill.progress import listening
from tidemill.storage.aliases import find_alias
from tidemill.storage.log import VersionLog
from tidemill.tasks.online import metrics
from tidemill.tasks.settings import OnlineSettings

logger = logging.getLogger("tidemill.online")


@contextlib.contextmanager
def watched(log: VersionLog, settings: OnlineSettings) -> Iterator[None]:
    """While the context is open, the run of this model has the metrics that its settings ask for."""
    with contextlib.ExitStack() as stack:
        try:
            _begin(stack, log, settings)
        except Exception as error:  # noqa: BLE001  # of whatever class: a run is not there to be watched
            logger.warning("this run is not watched as was asked: %r. It goes on", error)
        yield


def _begin(stack: contextlib.ExitStack, log: VersionLog, settings: OnlineSettings) -> None:
    file = settings.metrics_file
    if file is None and not metrics.wanted_by_prefect():
        return
    numbers = metrics.numbers_of(log.model)
    stack.enter_context(listening(numbers))
    if file is not None:
        stack.enter_context(metrics.written_to(Path(file), numbers))
    numbers.begin(log.head().manifest, find_alias(log, settings.gate.alias))  # last, as it may fail

"""A step that finds a store away, or a rank with other bits, is tried again: the one policy of the plain functions and of
Prefect's tasks."""

import logging
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from tenacity import RetryCallState, retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from tidemill.storage.errors import Unavailable
from tidemill.tasks.errors import RanksDiffer

logger = logging.getLogger("tidemill")

RETRIES: Final = 3
"""How often a step is tried again."""
BACKOFF_SECONDS: Final = 10
"""The wait before the first retry; each further one is twice as long."""

PASSING: Final = (Unavailable, RanksDiffer)
"""What another try may mend."""

P = ParamSpec("P")
R = TypeVar("R")


def retried(step: Callable[P, R]) -> Callable[P, R]:
    """The step, called again after an error that another try may mend; every other error comes back the same.

    A step can be called again: it reloads what is committed, and finds out what its earlier call has done.
    """
    return retry(
        retry=retry_if_exception_type(PASSING),
        stop=stop_after_attempt(1 + RETRIES),
        wait=wait_exponential(multiplier=BACKOFF_SECONDS),
        before_sleep=_tell,
        reraise=True,
    )(step)


def _tell(state: RetryCallState) -> None:
    assert state.outcome is not None, "the attempt has ended"
    logger.warning("to be tried again: %s", state.outcome.exception())

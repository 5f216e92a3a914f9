"""What Prefect sees of the tasks: thin wrappers that add names and retries, and nothing else.

Nothing is cached or persisted: arguments are live objects, and results live in the registry. Retries save time and are
never the safety: every function here reloads what is committed when it is called again.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, TaskRunNameValueOrCallable, exponential_backoff

from tidemill.storage import retention
from tidemill.tasks import batch
from tidemill.tasks.batch_run import BatchRun
from tidemill.tasks.online import step as online
from tidemill.tasks.online.doors import OnlineSteps
from tidemill.tasks.retrying import BACKOFF_SECONDS, PASSING, RETRIES
from tidemill.tasks.snapshots import run_snapshot

logger = logging.getLogger("tidemill")
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)  # a flow's progress; Prefect leaves the root logger at WARNING

P = ParamSpec("P")
R = TypeVar("R")


def _may_pass(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only what another try may mend; every other error comes back the same."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, PASSING):
        logger.warning("to be tried again: %s", error)
        return True
    return False


def _epoch(parameters: dict[str, Any]) -> str:
    run: BatchRun = parameters["run"]
    return f"{run.log.model}: epoch {parameters['epoch'] + 1} of {run.spec.epochs}"


def _step(parameters: dict[str, Any]) -> str:
    """The version that a step makes if it finds anything to train on."""
    run: online.OnlineRun = parameters["run"]
    return f"{run.report.model}: to version {run.report.head + 1}"


def _task(function: Callable[P, R], name: str, run_name: str | Callable[[dict[str, Any]], str]) -> Task[P, R]:
    """A task whose runs are named by their parameters: by a pattern, or by a function of all of them."""
    return task(
        name=name,
        task_run_name=cast(TaskRunNameValueOrCallable, run_name),
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(backoff_factor=BACKOFF_SECONDS),
        retry_condition_fn=_may_pass,
    )(function)


batch_steps = batch.BatchSteps(
    take_snapshot=_task(run_snapshot, "snapshot", "snapshot"),
    open_run=_task(batch.open_run, "open-run", "{model}: open run"),
    prepare=_task(batch.prepare, "fit", "{run.log.model}: fit"),
    train_epoch=_task(batch.train_epoch, "epoch", _epoch),
    evaluate=_task(batch.evaluate, "evaluate", "{run.log.model}: evaluate"),
    register=_task(batch.register, "register", "{run.log.model}: register"),
    finish=_task(batch.finish, "promote", "{run.log.model}: promote version {version.number}"),
)

online_steps = OnlineSteps(
    open_run=_task(online.open_run, "open-inbox", "{model}: open inbox"),
    step=_task(online.step, "step", _step),
    retrain=partial(batch.train_by, batch_steps),
)

collect_garbage = _task(retention.maintain, "garbage-collection", "{model}: garbage collection")

"""What Prefect sees of the tasks: thin wrappers that add names and retries, and nothing else.

Nothing is cached or persisted: arguments are live objects, and results live in the registry. Retries are a saving of time,
never the safety: every function here reloads what is committed when it is called again.
"""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from storage.errors import Unavailable
from tasks import batch, maintenance, online


def _store_was_away(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only what waiting can mend; every other error comes back the same."""
    return isinstance(state.result(raise_on_failure=False), Unavailable)


_settings: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=10),
    "retry_condition_fn": _store_was_away,
}

take_snapshot = task(batch.take_snapshot, name="snapshot", **_settings)
open_run = task(batch.open_run, name="open", **_settings)
train_epoch = task(batch.train_epoch, name="epoch", task_run_name="epoch-{epoch}", **_settings)
evaluate = task(batch.evaluate, name="evaluate", **_settings)
register = task(batch.register, name="register", **_settings)
finish = task(batch.finish, name="promote", **_settings)

open_online = task(online.open_run, name="open-inbox", **_settings)
step = task(online.step, name="step", **_settings)

collect_garbage = task(maintenance.collect_garbage, name="garbage-collection", **_settings)

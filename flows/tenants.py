"""Many models in Prefect: one deployment looks into all inboxes, and starts a run for each model that has something to do.

Each run is one of `online_training`, in a process of its own: nothing that one does can touch another. Composition only.
"""

import logging
from typing import Any, Final

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment

from tidemill.storage.parallel import concurrently
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.tenants.entries import anything_in
from tidemill.tasks.tenants.pairs import Pair, PairsError, check

logger = logging.getLogger("tidemill.tenants")

TAG: Final = "tidemill-tenant:"
"""Before the name of a pair, the tag of its runs."""
_NOT_OVER: Final = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
_PAGE: Final = 200
"""How many runs Prefect tells of at once."""
_LOOKS: Final = 8
"""How many inboxes are looked into at once: one whose store is away takes as long as its requests are repeated."""


class NotStarted(Exception):
    """Some models could not be looked after. The others were."""


@flow(name="online-training-of-many", flow_run_name="fan-out", validate_parameters=True)
def fan_out(
    pairs: list[Pair], deployment: str = "online-training/tenant", settings: OnlineSettings = OnlineSettings()
) -> list[str]:
    """Start a run of a deployment for each pair in whose inbox anything waits, unless one is under way.

    Two runs of one model at once would be safe; they would only waste work.

    Args:
        pairs: Inbox, registry and model of each, and settings of its own where it has some.
        deployment: Flow and name of a deployment of `online_training`. How many of its runs are at work at once, its
            concurrency limit or that of its work pool says.
        settings: Of all of them, where a pair has none of its own.

    Returns:
        The names of those for which a run was started.

    Raises:
        PairsError, PlacesOverlap: two pairs may not stand beside each other, or each run would write over the metrics file of
            the others. Nothing was started.
        NotStarted: the inbox of some could not be looked into, or no run be made. The others were started.
    """
    own = check(pairs, settings)
    if settings.metrics_file is not None and len(pairs) > 1:
        raise PairsError(
            f"metrics_file {settings.metrics_file}: each of these runs would write its own numbers over those of the others: "
            "leave it out; `tidemill status --pairs` tells how all of them stand"
        )
    busy, started, failed = _busy(deployment), list[str](), dict[str, str]()
    idle = [pair for pair in pairs if pair.called not in busy]
    for pair, found in zip(idle, concurrently(_looked, idle, _LOOKS), strict=True):
        name = pair.called
        try:
            if isinstance(found, Exception):
                raise found
            if found:
                _start(deployment, pair, own[name])
                started.append(name)
        except Exception as error:  # of whatever class: the others shall be started
            failed[name] = str(error)
            logger.exception("%s is not started", name)
    logger.info(
        "%d of %d models have a run now, %d of them a new one", len(busy) + len(started), len(pairs), len(started)
    )
    if failed:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:5])
        raise NotStarted(f"{len(failed)} of {len(pairs)} models could not be looked after: {some}")
    return started


def _looked(pair: Pair) -> bool | Exception:
    """Whether anything waits; or why that cannot be told, which must not keep the others from their runs."""
    try:
        return anything_in(pair.inbox)
    except Exception as error:  # noqa: BLE001  # of whatever class: it is told
        return error


def _busy(deployment: str) -> set[str]:
    """The names of the pairs with a run that is not over."""
    busy, told = set[str](), 0
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_flow_runs(
                deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment.rpartition("/")[2]])),
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_NOT_OVER))),
                limit=_PAGE,
                offset=told,
            )
            busy |= {tag.removeprefix(TAG) for run in runs for tag in run.tags if tag.startswith(TAG)}
            told += len(runs)
            if len(runs) < _PAGE:
                return busy


def _start(deployment: str, pair: Pair, settings: OnlineSettings) -> None:
    parameters: dict[str, Any] = {
        **{"inbox": pair.inbox, "registry": pair.registry, "model": pair.model},
        "settings": settings.model_dump(mode="json"),
    }
    run_deployment(
        name=deployment,
        parameters=parameters,
        timeout=0,
        as_subflow=False,
        tags=["tidemill", f"{TAG}{pair.called}"],
        flow_run_name=f"online-{pair.called}",
    )

"""The online flow: one step after the other until there is nothing left, or until told to stop. Composition only."""

from dataclasses import replace
from typing import cast

from prefect import flow
from prefect.states import Completed

from tidemill.flows.batch import batch_training
from tidemill.flows.telling import telling
from tidemill.tasks import wrappers
from tidemill.tasks.online.doors import run_by
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.settings import OnlineSettings


@flow(name="online-training", flow_run_name="online-{model}", validate_parameters=True)
def online_training(inbox: str, registry: str, model: str, settings: OnlineSettings = OnlineSettings()) -> OnlineReport:
    """Train a registered model on the shards in an inbox, commit new versions, and remove what they contain.

    The spec comes from the model's head version. SIGTERM or Ctrl-C ends the run once the step in hand is committed; SIGKILL
    at any moment costs only the work since the last commit. Overlapping runs are safe: one of them wins each version.

    Args:
        inbox: URL where producers drop Parquet shards: a local path, `file://` or `s3://bucket/prefix`.
        registry: URL below which models live.
        model: Name of a model that `batch_training` has registered.
        settings: Drain or follow, limits of one commit, what becomes of consumed shards, when the champion moves.
    """
    steps = replace(wrappers.online_steps, retrain=batch_training)
    with telling(registry, model, settings.behind_seconds):
        report = run_by(steps, inbox, registry, model, settings)
    if report.versions == 0:
        # Prefect shows the state's name, and hands its data to the caller.
        return cast(OnlineReport, Completed(name="Skipped", message="no shard to train on", data=report))
    return report

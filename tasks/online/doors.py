"""The plain doors to online training: step after step, until nothing is left (`drain`) or until told to stop (`follow`)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tidemill.progress import happened, under_way
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.batch import VersionInfo
from tidemill.tasks.online import step as protocol
from tidemill.tasks.online.events import Stepped
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.online.step import OnlineRun, Outcome, Step, retrained, retraining
from tidemill.tasks.online.watching import watched
from tidemill.tasks.ranks.leader import leading
from tidemill.tasks.retrying import retried
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.stopping import stop_on_signals
from tidemill.tasks.training.spec import Spec


def drain(
    inbox: str,
    registry: str,
    model: str,
    settings: OnlineSettings = OnlineSettings(),
    *,
    stores: Callable[[str], Store] = open_store,
) -> OnlineReport:
    """Train a registered model on the shards that are in an inbox, then stop. Needs no Prefect.

    Each commit makes a new version and removes what it contains. SIGTERM or Ctrl-C ends the run once the step in hand is
    committed, if this is the main thread; SIGKILL at any moment costs only the work since the last commit. A step that finds
    a store away is tried again for about a minute.

    Args:
        inbox: URL where producers drop Parquet shards: a local path, `file://` or `s3://bucket/prefix`.
        registry: URL below which models live.
        model: Name of a model that `tidemill.tasks.batch.train` has registered; its spec comes from the head version.
        settings: Limits of one commit, what becomes of consumed shards, when the champion moves. `mode` is not looked at.
        stores: Opens the store at a URL.

    Raises:
        StorageError: a place cannot be used, or the history is damaged; the classes below it say why.
        TrainingError: the model cannot be built, or fails on whatever it is trained on.
        GateClosed: too many versions in a row were refused, and the settings say that a person must decide.
    """
    return run_by(_plain(stores), inbox, registry, model, settings.model_copy(update={"mode": "drain"}), stores)


def follow(
    inbox: str,
    registry: str,
    model: str,
    settings: OnlineSettings = OnlineSettings(),
    *,
    stores: Callable[[str], Store] = open_store,
) -> OnlineReport:
    """As `drain`, but go on looking into the inbox every `poll_seconds`, until a signal or `stop_after_seconds` ends it."""
    return run_by(_plain(stores), inbox, registry, model, settings.model_copy(update={"mode": "follow"}), stores)


@dataclass(frozen=True)
class OnlineSteps:
    """The steps of an online run, as `run_by` takes them: plain functions that try again, or Prefect's tasks."""

    open_run: Callable[[str, str, str, OnlineSettings, Callable[[str], Store]], OnlineRun]
    step: Callable[[OnlineRun], Step]
    retrain: Callable[[str, str, str, Spec, BatchSettings], VersionInfo]
    """Dataset, registry, model, spec and settings of a batch training -> the version that it ends with."""


def _plain(stores: Callable[[str], Store]) -> OnlineSteps:
    return OnlineSteps(retried(protocol.open_run), retried(protocol.step), partial(batch.train, stores=stores))


def run_by(
    steps: OnlineSteps,
    inbox: str,
    registry: str,
    model: str,
    settings: OnlineSettings,
    stores: Callable[[str], Store] = open_store,
) -> OnlineReport:
    """One body for `drain`, `follow` and the flow: whoever runs the steps, their order is this."""
    with leading():
        return _run_alone(steps, inbox, registry, model, settings, stores)


def _run_alone(
    steps: OnlineSteps,
    inbox: str,
    registry: str,
    model: str,
    settings: OnlineSettings,
    stores: Callable[[str], Store],
) -> OnlineReport:
    """The same, of one process or of a leader."""
    run = steps.open_run(inbox, registry, model, settings, stores)
    with (
        stop_on_signals(settings.stop_after_seconds) as stop,
        watched(run.places.log, run.places.inbox, settings),
        under_way(f"{settings.mode} {model}", unit="shards"),
    ):
        while not stop:
            began = time.monotonic()
            done = steps.step(run)
            if done.outcome is Outcome.COMMITTED:
                happened(Stepped(time.monotonic() - began))
            match done.outcome:
                case Outcome.RETRAIN:
                    retrained(run, steps.retrain(*retraining(run)))
                case Outcome.IDLE:
                    if settings.mode == "drain":
                        break
                    stop.wait(settings.poll_seconds)
                    # No step: a follower looks all day, and Prefect keeps every task run
                    while not stop and not run.poll():
                        run.report.tell_alive()
                        stop.wait(settings.poll_seconds)
    return run.report

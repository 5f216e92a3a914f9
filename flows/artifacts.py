"""What a run shows of itself in Prefect's UI: how far it is while it runs, what happened to the model when it ends.

All of it is sent by a thread of its own that gives up at the first request which fails or takes too long. The run waits for it
at its end, for `PARTING_SECONDS` at most.
"""

import hashlib
import json
import logging
import re
import threading
import time
from contextlib import ExitStack, suppress
from contextvars import copy_context
from datetime import UTC
from functools import partial
from typing import Any, Final, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tidemill.progress import Activity
from tidemill.tasks.history.markdown import rows, summary
from tidemill.tasks.history.notebook import history
from tidemill.tasks.online.events import Committed, Looked

logger = logging.getLogger("tidemill.prefect")

EVERY_SECONDS: Final = 2.0
"""Progress is written at most this often: a request takes some milliseconds of CPU time."""
UNTOLD_SECONDS: Final = 2.0
"""A run that is over sooner shows no progress."""
REFRESH_SECONDS: Final = 600.0
"""The summary of a run that goes on is made anew this often, if there is anything new."""
REQUEST_SECONDS: Final = 5.0
"""How long the server may take for one request."""
PARTING_SECONDS: Final = 10.0
"""How long the end of a run waits for what is still to be sent."""
KEPT: Final = 20
"""So many artifacts of one kind are kept of a model: those of its last runs. Prefect itself would keep all, for ever."""
VERSIONS: Final = 100
"""How many of the newest versions a summary is made from."""


class Artifacts:
    """Listens to a run (`tidemill.progress`), and shows it. To be opened where the run begins, and closed where it ends."""

    def __init__(self, registry: str, model: str, flow_run: UUID) -> None:
        """The model that is trained, and the flow run that trains it."""
        self._registry, self._model, self._flow_run = registry, model, flow_run
        self._ends = threading.Event()
        in_this_context = partial(copy_context().run, self._send_all)  # Prefect's settings are those of a context
        self._thread = threading.Thread(target=in_this_context, name="tidemill-artifacts", daemon=True)
        self._progress: tuple[float, str] | None = None
        """Percent and words, to be sent."""
        self._whole = 0
        self._next = time.monotonic() + UNTOLD_SECONDS
        self._backlog: str | None = None
        self._news = 0
        """How much there was to tell of."""
        self._kept: dict[str, UUID] = {}
        """Artifacts of this run, by key."""

    def open(self) -> None:
        """Begin to send."""
        self._thread.start()

    def close(self) -> None:
        """Send what is left, if that can be done in time."""
        self._ends.set()
        self._thread.join(PARTING_SECONDS)
        if self._thread.is_alive():
            logger.warning("the Prefect server is too slow: the artifacts of this run are not all there")

    # ---- listening: in the thread of the run -------------------------------------------------------------------------
    def on_activity(self, activity: Activity) -> None:
        """Note how far things are, now and then."""
        whole = activity.ahead + (activity.total or 0)
        self._whole = max(self._whole, whole)
        if (now := time.monotonic()) < self._next or not whole:
            return
        self._next = now + EVERY_SECONDS
        done = self._whole - whole + activity.done
        self._progress = min(100.0, 100.0 * done / self._whole), _told(activity, now)

    def on_event(self, event: object) -> None:
        """Note what the summary will tell."""
        if isinstance(event, Committed):
            self._news += 1
        elif isinstance(event, Looked):
            self._backlog = _waiting(event)

    def registered(self) -> None:
        """A batch training has made a version."""
        self._news += 1

    # ---- sending: in a thread of its own -----------------------------------------------------------------------------
    def _send_all(self) -> None:
        try:
            # Prefect would try each request for a minute
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), ExitStack() as opened:
                self._send_until_the_end(opened)
        except Exception as error:  # noqa: BLE001  # of whatever class: nothing that is shown may end a run
            logger.info("no more artifacts of this run: %s: %s", type(error).__name__, str(error)[:300])

    def _send_until_the_end(self, opened: ExitStack) -> None:
        client: SyncPrefectClient | None = None
        told, sent, refresh = 0, None, time.monotonic() + REFRESH_SECONDS
        goes_on = True
        while goes_on:
            goes_on = not self._ends.wait(EVERY_SECONDS)
            progress, news = self._progress, self._news
            is_due = news > told and (not goes_on or time.monotonic() >= refresh)
            if progress == sent and not is_due:
                continue
            if client is None:
                client = opened.enter_context(get_client({"timeout": REQUEST_SECONDS}, sync_client=True))
            if progress is not None and progress != sent:
                self._put(client, "progress", "progress", *progress)
                sent = progress
            if is_due:
                self._summarise(client)
                told, refresh = news, time.monotonic() + REFRESH_SECONDS

    def _summarise(self, client: SyncPrefectClient) -> None:
        found = history(self._registry, self._model, VERSIONS)
        words = f"{self._model}: version {found.head.version}"
        self._put(client, "summary", "markdown", summary(found, self._backlog), words)
        if table := rows(found):
            self._put(client, "shards", "table", json.dumps(table), f"{words}: the last shards and rejections")

    def _put(
        self,
        client: SyncPrefectClient,
        kind: Literal["summary", "shards", "progress"],
        type_: str,
        data: Any,
        description: str,
    ) -> None:
        """Make an artifact of this run, or bring it up to date."""
        key = key_of(self._model, kind)
        if (known := self._kept.get(key)) is not None:
            client.update_artifact(known, ArtifactUpdate(data=data, description=description))
            return
        made = client.create_artifact(
            ArtifactCreate(key=key, type=type_, data=data, description=description, flow_run_id=self._flow_run)
        )
        self._kept[key] = made.id
        of_this_key = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        for old in client.read_artifacts(artifact_filter=of_this_key, sort=ArtifactSort.CREATED_DESC, offset=KEPT):
            with suppress(ObjectNotFound):  # another run was faster
                client.delete_artifact(old.id)


def key_of(model: str, kind: Literal["summary", "shards", "progress"]) -> str:
    """The key of an artifact: Prefect takes lower case, digits and dashes. Models of different names have different keys."""
    plain = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    told_apart = "" if plain == model else f"-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    return f"tidemill-{kind}-{plain}{told_apart}"


def _told(activity: Activity, now: float) -> str:
    """How far an activity is, in words."""
    of = "" if activity.total is None else f" of {activity.total:,}"
    seconds = max(now - activity.began, 1e-3)
    words = f"{activity.what}: {activity.done:,}{of} {activity.unit}, {activity.rows / seconds:,.0f} rows a second"
    return words if activity.loss is None else f"{words}, loss {activity.loss():.5g}"


def _waiting(looked: Looked) -> str:
    oldest = (
        "" if looked.oldest is None else f", the oldest since {looked.oldest.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    )
    stays = f"; {looked.passed_over:,} objects are passed over" if looked.passed_over else ""
    owed = f"; {looked.owed:,} removals are owed" if looked.owed else ""
    return f"{looked.waiting:,} shards{oldest}{stays}{owed}"

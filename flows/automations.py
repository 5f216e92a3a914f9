"""Automations of Prefect that react to Tidemill's events: a script, which may be run again.

    python -m tidemill.flows.automations --webhook https://example.com/hook
    python -m tidemill.flows.automations --notify slack-webhook/on-call --quiet-minutes 60
    python -m tidemill.flows.automations --wake online-training/online

They are known by their names: what is there is brought up to date. PREFECT_API_URL or a profile names the server.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Final
from uuid import UUID

from cyclopts import Parameter, run
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import ActionTypes, CallWebhook, RunDeployment, SendNotification
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from tidemill.flows import events

BLOCK: Final = "tidemill-alerts"
"""The name of the block that holds the webhook's URL."""
WAKE_SECONDS: Final = 10
"""However many shards are uploaded within this time, one run is woken."""
_MODELS: Final[dict[str, str | list[str]]] = {"prefect.resource.id": "tidemill.model.*"}
_EACH: Final = {"prefect.resource.id", "tidemill.registry"}

ALERTS: Final = (
    ("shard rejected", events.REJECTED, "{{ event.payload.key }}: {{ event.payload.reason }}"),
    ("version refused", events.REFUSED, "version {{ event.payload.version }}: {{ event.payload.why }}"),
    (
        "inbox behind",
        events.BEHIND,
        "{{ event.payload.waiting }} shards wait, the oldest since {{ event.payload.oldest }}",
    ),
)
"""(what happened, the event, how it is told) of what needs a person."""


def create(
    *,
    webhook: Annotated[str | None, Parameter(help="URL to which JSON is posted for each alert.")] = None,
    notify: Annotated[
        str | None, Parameter(help="TYPE/NAME of a notification block of Prefect, which gets each alert as text.")
    ] = None,
    quiet_minutes: Annotated[
        int | None, Parameter(help="Also alert if a model that has committed commits nothing for so long.")
    ] = None,
    wake: Annotated[
        str | None, Parameter(help="FLOW/DEPLOYMENT of the online flow, which an upload event begins a run of.")
    ] = None,
) -> list[str]:
    """Create the automations that are asked for. Returns their names.

    Raises:
        ValueError: nothing was asked for, or no such block or deployment is there.
    """
    if not (webhook or notify or wake):
        raise ValueError("nothing to do: give --webhook URL, --notify TYPE/NAME or --wake FLOW/DEPLOYMENT")
    with get_client(sync_client=True) as client:
        wanted = [*_alerts(client, webhook, notify, quiet_minutes), *_waking(client, wake)]
        for automation in wanted:
            there = client.read_automations_by_name(automation.name)
            if there:
                client.update_automation(there[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in wanted]


def _alerts(
    client: SyncPrefectClient, webhook: str | None, notify: str | None, quiet_minutes: int | None
) -> Iterator[AutomationCore]:
    if not (webhook or notify):
        return
    block = _webhook(webhook) if webhook else None
    notification = _notification(client, notify) if notify else None

    def actions(what: str, words: str) -> list[ActionTypes]:
        found: list[ActionTypes] = []
        if block is not None:
            found.append(CallWebhook(block_document_id=block, payload=_PAYLOAD))
        if notification is not None:
            subject = f"{{{{ event.resource.name }}}}: {what}"
            found.append(SendNotification(block_document_id=notification, subject=subject, body=words))
        return found

    for what, event, words in ALERTS:
        trigger = EventTrigger(expect={event}, match=_MODELS, for_each=_EACH, posture=Posture.Reactive, threshold=1)
        yield AutomationCore(name=f"tidemill: {what}", trigger=trigger, actions=actions(what, words))
    if quiet_minutes is not None:
        what = f"no commit for {quiet_minutes} minutes"
        yield AutomationCore(
            name="tidemill: no commit",
            description=what,
            # After a commit: without that it would fire again and again
            trigger=EventTrigger(
                after={events.COMMITTED},
                expect={events.COMMITTED},
                match=_MODELS,
                for_each=_EACH,
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(minutes=quiet_minutes),
            ),
            actions=actions(what, what),
        )


_PAYLOAD: Final = (
    '{"automation": {{ automation.name | tojson }}, "model": {{ labels["prefect.resource.id"] | tojson }}, '
    '"event": {{ (event.event if event else none) | tojson }}, "payload": {{ (event.payload if event else none) | tojson }}}'
)
"""JSON, by Prefect's templates. Without an event, where one did not come."""


def _waking(client: SyncPrefectClient, wake: str | None) -> Iterator[AutomationCore]:
    if wake is None:
        return
    try:
        deployment = client.read_deployment_by_name(wake)
    except ObjectNotFound:
        raise ValueError(f"there is no deployment {wake}: `prefect deployment ls` lists them") from None
    yield AutomationCore(
        name=f"tidemill: wake {wake}",
        description="An uploaded shard begins a drain.",
        trigger=EventTrigger(
            expect={events.UPLOADED},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(seconds=WAKE_SECONDS),
        ),
        actions=[RunDeployment.model_validate({"source": "selected", "deployment_id": deployment.id})],
    )


def _webhook(url: str) -> UUID:
    saved = Webhook(url=SecretStr(url)).save(BLOCK, overwrite=True)
    assert isinstance(saved, UUID), "no event loop runs here"
    return saved


def _notification(client: SyncPrefectClient, name: str) -> UUID:
    kind, _, block = name.partition("/")
    try:
        return client.read_block_document_by_name(block, kind).id
    except ObjectNotFound:
        raise ValueError(f"there is no block {name}: `prefect block ls` lists them") from None


def main() -> None:
    """Create what the flags ask for, and say what there is now."""
    try:
        for name in run(create):
            print(name)
    except ValueError as error:
        raise SystemExit(f"tidemill: {error}") from None


if __name__ == "__main__":
    main()

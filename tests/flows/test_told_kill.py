"""SIGKILL at any moment of a run that tells Prefect all there is to tell: the bits are those of a run that tells nobody."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guarantees.audit import audit
from tests.guarantees.children import (
    BATCH,
    DATASET,
    ONLINE,
    REJECTED,
    SHARDS,
    SPEC,
    Kill,
    Stores,
    bits,
    copy,
    drain,
    fill,
    in_child,
    sample,
    start_server,
    train,
    waiting,
)
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store

pytestmark = pytest.mark.xdist_group("flows")

MOMENTS = 2
"""How many moments CI takes of a run."""


def told_train(stores: Stores, dataset: str, registry: str, environment: dict[str, str]) -> None:
    """A batch run as a flow run, with artifacts and events."""
    os.environ.update(environment)
    from prefect import flow

    from tidemill.flows.telling import telling
    from tidemill.tasks import batch, wrappers

    @flow(name="told-batch", validate_parameters=False)
    def run() -> None:
        with telling(registry, "model") as told:
            made = batch.train_by(wrappers.batch_steps, dataset, registry, "model", SPEC, BATCH, stores)
            told.registered(made, "champion")

    run()


def told_drain(stores: Stores, inbox: str, registry: str, environment: dict[str, str]) -> None:
    """An online run as a flow run, with artifacts and events."""
    os.environ.update(environment)
    from prefect import flow

    from tidemill.flows.telling import telling
    from tidemill.tasks import wrappers
    from tidemill.tasks.online.doors import run_by

    @flow(name="told-online", validate_parameters=False)
    def run() -> None:
        with telling(registry, "model", 1e-6):
            run_by(wrappers.online_steps, inbox, registry, "model", ONLINE, stores)

    run()


@pytest.fixture
def environment(prefect_api: str) -> dict[str, str]:
    """What a child needs to find the server."""
    start_server()
    return {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}


@pytest.mark.timeout(600)
def test_killed_anywhere_with_artifacts_and_events_on(
    environment: dict[str, str], tmp_path: Path, full: bool, record_property: Callable[[str, object], None]
) -> None:
    urls = {name: str(tmp_path / name) for name in ("dataset", "base", "inbox", "plain")}
    fill(urls["dataset"], DATASET)
    in_child(train, urls["dataset"], urls["base"], SPEC, BATCH, kill=None, tmp_path=tmp_path)
    copy(urls["base"], urls["plain"])
    fill(urls["inbox"], SHARDS | REJECTED)
    in_child(drain, urls["inbox"], urls["plain"], ONLINE, kill=None, tmp_path=tmp_path)
    expected = [bits(VersionLog(open_store(urls[name]), "model")) for name in ("base", "plain")]

    def run(name: str, kill: Kill | None) -> list[str] | None:
        registry, inbox = str(tmp_path / name / "registry"), str(tmp_path / name / "inbox")
        fill(inbox, SHARDS | REJECTED)
        both: list[str] = []
        for target, places in ((told_train, (urls["dataset"], registry)), (told_drain, (inbox, registry))):
            moments = in_child(target, *places, environment, kill=kill, tmp_path=tmp_path)
            if moments is None:  # killed; again, to the end
                moments, kill = in_child(target, *places, environment, kill=None, tmp_path=tmp_path), None
            both += moments or []
            log = VersionLog(open_store(registry), "model")
            assert bits(log) == expected[target is told_drain]
        audit(log, (SHARDS | REJECTED).items())
        assert waiting(inbox) == []
        return both

    moments = run("clean", None)
    assert moments is not None
    chosen = sample(sorted(set(moments)), None if full else MOMENTS)
    for number, moment in enumerate(chosen):
        run(str(number), Kill(moment))
    record_property("killed at", f"{len(chosen)} of {len(moments)} moments")

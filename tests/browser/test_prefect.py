"""Prefect's UI after a run, in a real browser."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Literal

import httpx
import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Look
from tests.flows.data import NOT_PARQUET, SPEC, parquet
from tidemill.flows.artifacts import key_of
from tidemill.flows.batch import batch_training
from tidemill.flows.online import online_training
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings

pytestmark = pytest.mark.browser

MODEL = "delays"


@pytest.fixture(scope="module")
def ui(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(URL of the UI, id of a flow run): a model was trained, then drained an inbox of good, opposite and broken shards."""
    # In a thread of its own, in which Playwright's event loop does not run
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(copy_context().run, train_and_drain, tmp_path_factory.mktemp("place")).result()
    return prefect_api.removesuffix("/api"), run


def train_and_drain(folder: Path) -> str:
    """The id of the flow run that drained the inbox."""
    dataset, inbox, registry = (str(folder / name) for name in ("dataset", "inbox", "registry"))
    Path(dataset).mkdir()
    Path(inbox).mkdir()
    Path(dataset, "part.parquet").write_bytes(parquet(400, seed="part"))
    batch_training(dataset, registry, MODEL, SPEC)
    for number in range(60):
        sign = -1 if 30 <= number < 33 else 1
        open_store(inbox).write(f"{number:03d}.parquet", parquet(60, seed=str(number), sign=sign))
    open_store(inbox).write("045-broken.parquet", NOT_PARQUET)
    settings = OnlineSettings(limits={"max_shards": 3}, grace_seconds=0)
    state = online_training(inbox, registry, MODEL, settings, return_state=True)
    return str(state.state_details.flow_run_id)


def page_of(ui: str, kind: Literal["summary", "shards"]) -> str:
    """The URL of the model's newest artifact of a kind."""
    query = {"artifacts": {"key": {"any_": [key_of(MODEL, kind)]}}, "sort": "CREATED_DESC", "limit": 1}
    (newest,) = httpx.post(f"{ui}/api/artifacts/filter", json=query, timeout=30).json()
    return f"{ui}/artifacts/artifact/{newest['id']}"


def test_the_summary_shows_its_pictures(ui: tuple[str, str], look: Look, keep: Callable[[Page, str], None]) -> None:
    seen = look(page_of(ui[0], "summary"), ours=False, width=860, height=760)
    seen.get_by_role("heading", name="rmse on each shard before it was trained on").wait_for(timeout=60_000)
    pictures = seen.locator("img[src^='data:image/svg+xml']")
    assert pictures.count() == 2
    for picture in pictures.all():
        assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth; }") > 300
    assert "045-broken.parquet" in seen.inner_text("body")
    assert seen.get_by_text("promoted", exact=True).count() > 0
    keep(seen, "prefect-summary")


def test_the_table_shows_shards_and_rejections(ui: tuple[str, str], look: Look) -> None:
    seen = look(page_of(ui[0], "shards"), ours=False)
    seen.get_by_text("059.parquet").first.wait_for(timeout=60_000)
    assert seen.get_by_text("its footer cannot be read").count() > 0


def test_the_flow_run_names_the_versions_that_its_steps_made(
    ui: tuple[str, str], look: Look, keep: Callable[[Page, str], None]
) -> None:
    seen = look(f"{ui[0]}/runs/flow-run/{ui[1]}", ours=False, width=860, height=760)
    seen.get_by_text(f"{MODEL}: to version 2", exact=True).first.wait_for(timeout=60_000)
    keep(seen, "prefect-run")

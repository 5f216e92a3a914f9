"""A real Chromium, by Playwright: what is shown is looked at, light and dark.

`make test-browser` and `make test-notebook` run these tests; `make test` does not. With TIDEMILL_PICTURES=folder, what was seen
is kept there as PNG.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.flows.conftest import prefect_api as prefect_api  # the server whose UI is looked at


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium: Playwright's own cannot be had everywhere."""
    found = shutil.which("chromium")
    assert found is not None, "no chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


Look = Callable[..., Page]


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """`look(url, dark=True, width=400)` opens a page. At the end none may have complained or asked for what is not there, unless
    it is another's page (`ours=False`)."""
    complaints: list[str] = []
    contexts = []

    def opened(url: str, *, dark: bool = False, width: int = 1280, height: int = 900, ours: bool = True) -> Page:
        scheme: Any = "dark" if dark else "light"
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        if ours:
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        page.goto(url, wait_until="load")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def keep() -> Callable[[Page, str], None]:
    """`keep(page, name)` keeps a picture, if a folder is named."""

    def kept(page: Page, name: str) -> None:
        if folder := os.environ.get("TIDEMILL_PICTURES"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=f"{folder}/{name}.png")

    return kept

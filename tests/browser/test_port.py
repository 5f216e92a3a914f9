"""What a run shows at its port, in a real browser and to Prometheus's own tools. These need what `make system` installs."""

import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Look
from tests.data import put
from tests.s3_server import wait_until
from tests.tasks.online.test_step import begin, days

pytestmark = pytest.mark.browser

ROOT: Final = Path(__file__).parents[2]
FOLLOW: Final = """
import logging, sys
from tidemill.tasks.online import follow
from tidemill.tasks.settings import OnlineSettings

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
follow(*sys.argv[1:], "model", OnlineSettings(poll_seconds=0.1, grace_seconds=0, port=0))
"""


@pytest.fixture
def inbox(tmp_path: Path) -> str:
    return str(tmp_path / "inbox")


@pytest.fixture
def url(tmp_path: Path, inbox: str) -> Iterator[str]:
    """Where a run without Prefect shows itself that follows an empty inbox, in a process of its own."""
    begin(str(tmp_path / "registry"), str(tmp_path / "dataset"))
    Path(inbox).mkdir()
    told = tmp_path / "told"
    with told.open("wb") as err, subprocess.Popen(
        [sys.executable, "-c", FOLLOW, inbox, str(tmp_path / "registry")], stderr=err, cwd=ROOT
    ) as run:  # fmt: skip
        try:
            found = re.compile(r"(http://127.0.0.1:\d+)/ shows the report")
            wait_until(lambda: bool(found.search(told.read_text())), seconds=60, what="the run")
            yield found.findall(told.read_text())[0]
            run.terminate()
            assert run.wait(60) == 0, told.read_text()
        finally:
            run.kill()


def test_a_run_without_prefect_has_a_page_that_is_made_anew_at_each_look(
    look: Look, keep: Callable[[Page, str], None], url: str, inbox: str
) -> None:
    seen = look(f"{url}/")
    assert seen.title() == "model: version 0"
    put(inbox, days(4) | {"bad.parquet": b"bad"})

    def is_shown() -> bool:
        seen.reload()
        return seen.title() == "model: version 2" or "bad.parquet" in seen.inner_text("body")

    wait_until(is_shown, seconds=60, what="the commits")
    keep(seen, "port")
    assert seen.locator("svg").count() >= 2
    assert "bad.parquet" in seen.inner_text("body")
    seen.wait_for_event("load", timeout=30_000)  # nobody has touched it: the page asks for itself again


def test_health_is_shown_in_a_browser_too(look: Look, url: str) -> None:
    assert '"alive": true' in look(f"{url}/health").inner_text("body")


def test_promtool_takes_the_metrics_of_a_run(url: str) -> None:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        metrics = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, check=False)
    assert (done.returncode, b"tidemill" in done.stderr + done.stdout) == (0, False), done


@pytest.mark.parametrize(
    "arguments", [("check", "rules", "tidemill.rules.yml"), ("test", "rules", "tidemill.test.yml")]
)
def test_promtool_takes_the_sample_alerts_and_they_fire_when_they_should(arguments: tuple[str, ...]) -> None:
    assert shutil.which("promtool") is not None, "no promtool on the PATH: make system"
    done = subprocess.run(
        ["promtool", *arguments], cwd=ROOT / "examples/prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

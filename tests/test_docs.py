"""What the documents name must be there."""

import re
import runpy
from pathlib import Path

import pytest

import tidemill
from tests.docs.pages import pages
from tidemill.flows.cli import app
from tidemill.storage import tombstones
from tidemill.tasks import retrying, telling
from tidemill.tasks.exporting import checking
from tidemill.tasks.online import delayed, reading, selection
from tidemill.tasks.settings import BatchSettings, GateSettings, Limits, OnlineSettings
from tidemill.tasks.tenants import rota
from tidemill.tasks.training import classes, resolving, survey
from tidemill.tasks.training.spec import Spec

ROOT = Path(__file__).parents[1]


def named_tests() -> list[tuple[str, str]]:
    """(file, test) of each test that the table of faults names."""
    found = []
    for line in (ROOT / "docs/guarantees.md").read_text().splitlines():
        file = ""
        for name in re.findall(r"`([^`]+)`", line):
            if name.endswith(".py") and "/test_" in name:
                file = name
            elif file and re.fullmatch(r"test_\w+", name):
                found.append((file, name))
    return found


def test_every_test_that_the_guarantees_name_exists() -> None:
    named = named_tests()
    assert len(named) > 80  # the table is read at all
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing


PAGES = pages()


def anchors(page: Path) -> set[str]:
    """Where links with a # may lead, by the rule of the common Markdown hosts."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_the_documents_lead_somewhere(page: str) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(path))):
            broken.append(f"{target}#{anchor}")
    assert not broken


MIB = 2**20
NUMBERS = [
    ("docs/guarantees.md", f"hands out up to {selection.LISTED_AHEAD:,} shards"),
    ("docs/guarantees.md", f"up to {reading.AHEAD_BYTES // MIB} MiB with"),
    ("docs/guarantees.md", f"(the last {tombstones.WINDOW:,} shards)"),
    ("docs/learning.md", f"a backlog of {selection.LISTED_AHEAD:,} shards"),
    ("docs/learning.md", f"The {delayed.LISTED:,} oldest shards of labels"),
    ("docs/format.md", f"every {tombstones.WHOLE_VERSIONS + 1} versions or {tombstones.WHOLE_SHARDS:,} shards"),
    ("docs/format.md", f"`backlog` ({selection.LISTED_AHEAD:,} shards wait)"),
    ("docs/format.md", f"At least the last {tombstones.WINDOW:,} consumed shards"),
    ("docs/data-and-models.md", f"whole numbers of 3 to {resolving.WHOLE_NUMBERS} distinct values"),
    ("docs/data-and-models.md", f"More than {classes.MOST:,} labels"),
    ("docs/data-and-models.md", f"text of at most {classes.LONGEST} characters"),
    (
        "docs/data-and-models.md",
        f"of at least {survey.LEAST_NUMBERED}. The first {survey.JUDGED_ROWS:,} rows are judged.",
    ),
    ("docs/how-to/many-models.md", f"from `--poll-seconds` up to {rota.IDLE_MOST} times that"),
    (
        "docs/how-to/many-models.md",
        f"from {retrying.BACKOFF_SECONDS} seconds up to {rota.FAILED_MOST_SECONDS / 60:.0f} minutes",
    ),
    ("docs/how-to/export.md", f"on {checking.MADE_UP_ROWS} made-up rows"),
    ("docs/how-to/export.md", f"the first {checking.CHECKED_ROWS:,} rows of a dataset"),
    ("docs/learning.md", f"fell by more than {telling.SETTLED:.0%} in the last epoch"),
    ("docs/deployment.md", f"each of the last {tombstones.WINDOW:,} shards once"),
]
"""(page, what it says): each number of the code that stands in prose."""


@pytest.mark.parametrize(("page", "words"), NUMBERS)
def test_numbers_in_prose_are_those_of_the_code(page: str, words: str) -> None:
    assert words in " ".join((ROOT / page).read_text().split())


def test_no_default_of_a_setting_is_repeated_in_prose() -> None:
    """`--help` and the reference, which is made from the code, have them all; elsewhere they would only grow old."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES if page not in ("docs/log.md", "docs/reference.md"))
    limits, gate = Limits(), GateSettings()
    told = [f"{limits.max_shards} shards", f"{limits.max_bytes // MIB} MiB", f"{limits.max_shard_bytes // MIB} MiB"]
    told += [
        f"in a row ({gate.refusals})",
        f"(a share; {gate.tolerance:.0%})",
        f"`grace_seconds` ({OnlineSettings().grace_seconds:.0f})",
    ]
    assert not [words for words in told if words in text]


def test_the_reference_says_what_the_code_says() -> None:
    made = runpy.run_path(str(ROOT / "docs/reference.py"))["page"]()
    stated = (ROOT / "docs/reference.md").read_text()
    assert stated == made, (
        "a flag, a setting or a public docstring has changed: `make reference` (python docs/reference.py)"
    )


def test_the_reference_has_every_command_setting_and_name() -> None:
    text = (ROOT / "docs/reference.md").read_text()
    for command in app:
        assert command.startswith("-") or f"### tidemill {command}\n" in text
    for name in (
        *Spec.model_fields,
        *BatchSettings.model_fields,
        *OnlineSettings.model_fields,
        "model.factory",
        "gate.tolerance",
    ):
        assert f"| `{name}` |" in text, name
    for name in tidemill.__all__:
        assert f"### {name}\n" in text

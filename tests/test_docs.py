"""What the documents name must be there."""

import re
from pathlib import Path

import pytest

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


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


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

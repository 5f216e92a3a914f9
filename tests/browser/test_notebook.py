"""The example notebook, run from its first cell to its last, and what its cells show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import nbformat
import pytest
from nbclient import NotebookClient
from playwright.sync_api import Page

from tests.browser.conftest import Look

pytestmark = pytest.mark.notebook

NOTEBOOK: Final = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_the_notebook_in_git_has_no_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_notebook_trains_drains_plots_and_loads(
    look: Look, keep: Callable[[Page, str], None], tmp_path: Path
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, told = list[str](), ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            if "text/html" in output.get("data", {}):
                shown.append(output.data["text/html"])
            told += output.get("text", "")
    assert len(shown) == 3  # the end of the training, that of the drain, and the history
    assert "epoch 6 of 6" in told
    assert "version 20: shards 2" in told
    assert notebook.cells[-1].outputs[-1].data["text/plain"].startswith("{'km':")
    file = tmp_path / "shown.html"
    file.write_text("<!doctype html><meta charset=utf-8>" + "<hr>".join(shown))
    seen = look(file.as_uri())
    assert seen.locator("svg").count() == 5
    keep(seen, "notebook")

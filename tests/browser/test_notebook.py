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


def test_what_is_under_way_is_one_line_that_changes_and_log_lines_stand_below_the_cell(tmp_path: Path) -> None:
    """Of a call from Python, in a notebook that has set up nothing."""
    cell = """
import logging
from tidemill.flows import display, launch
from tidemill.progress import under_way
display.PATIENCE_SECONDS = display.Notebook.every = 0.0

def trained(*given, **named):
    with under_way("epoch 1 of 2", total=4) as activity:
        for _ in range(4):
            activity.advance(1)
    logging.getLogger("tidemill.batch").info("epoch 1 of 2: done")

launch.train = trained
import tidemill
tidemill.train("data", "registry", "m", tidemill.Spec(target="y"))
tidemill.train("data", "registry", "m", tidemill.Spec(target="y"))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    lines = [output["data"]["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert len(lines) == 2
    assert all(line.startswith("epoch 1 of 2: 100%, ") for line in lines)
    told = "".join(output.get("text", "") for output in outputs)
    assert told.count("epoch 1 of 2: done\n") == 2


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

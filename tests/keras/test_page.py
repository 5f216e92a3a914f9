"""docs/how-to/keras.md, block by block."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import put
from tests.docs.pages import blocks
from tests.docs.test_blocks import flights

pytestmark = pytest.mark.keras


def test_the_page_on_keras_does_what_it_says(tmp_path: Path) -> None:
    network, commands, loads = blocks("docs/how-to/keras.md")
    put(str(tmp_path / "data"), {"a.parquet": flights(300, seed=0)})
    put(str(tmp_path / "inbox"), {f"{i}.parquet": flights(100, seed=1 + i) for i in range(2)})
    (tmp_path / "mykeras.py").write_text(network.text)
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def printed(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "keras.keras: version 1 of keras as keras" in printed("bash", "-e", "-c", commands.text)
    assert printed(sys.executable, "-c", loads.text).splitlines()[:2] == [
        "['distance', 'dep_delay', 'carrier']",
        "(2,)",
    ]
    assert (tmp_path / "saved_model" / "saved_model.pb").exists()

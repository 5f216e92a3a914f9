"""`tidemill export` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch

from tests.flows.conftest import Place
from tidemill.flows.cli import main
from tidemill.tasks.batch import train

pytestmark = pytest.mark.xdist_group("export")
local = pytest.mark.parametrize("make_url", ["local"], indirect=True)


def run(*tokens: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*tokens])
    return int(ended.value.code or 0)


@local
def test_a_version_is_written_for_others(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(place.dataset, place.registry, "m", place.spec)
    monkeypatch.chdir(tmp_path)
    assert run("export", place.registry, "m", "--to", "m.pt2", "--format", "torch") == 0
    told = capsys.readouterr()
    first, second = told.out.splitlines()
    assert first == f"file://{tmp_path}/m.pt2: version 0 of m as torch, {Path('m.pt2').stat().st_size:,} bytes"
    assert second.startswith("compared with predict on ")
    assert f"(made-up rows and the first rows of file://{place.dataset})" in second
    assert torch.export.load("m.pt2").module()(numbers=torch.zeros(3, 2).double()).shape == (3,)
    assert (
        run("export", place.registry, "m", "--to", "m.pt2", "--format", "torch", "--rows", place.dataset, "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["format"] == "torch"


@local
def test_what_cannot_be_exported_is_told_in_one_line(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place.dataset, place.registry, "m", place.spec)
    assert run("export", place.registry, "m", "--to", f"{tmp_path}/") == 1
    assert "names no file" in capsys.readouterr().err
    assert run("export", place.registry, "m", "--to", f"{tmp_path}/m.onnx", "--version", "best") == 1
    assert "no alias" in capsys.readouterr().err
    assert run("export", place.registry, "m", "--to", f"{tmp_path}/m.onnx", "--rows", f"{tmp_path}/nothing") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "m.onnx").exists()

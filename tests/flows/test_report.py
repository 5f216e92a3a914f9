"""`tidemill report` as a user meets it."""

import json
from pathlib import Path

import pytest

from tests.flows.conftest import Place
from tidemill.flows.cli import main
from tidemill.storage.errors import StorageError
from tidemill.tasks.batch import train
from tidemill.tasks.history import writing
from tidemill.tasks.online.doors import drain
from tidemill.tasks.settings import Archive, OnlineSettings

local = pytest.mark.parametrize("make_url", ["local"], indirect=True)


def run(*tokens: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*tokens])
    return int(ended.value.code or 0)


@pytest.fixture
def trained(place: Place) -> Place:
    train(place.dataset, place.registry, "m", place.spec)
    place.drop("a.parquet", "b.parquet")
    drain(place.inbox, place.registry, "m", OnlineSettings(after_commit=Archive(archive_to=place.archive)))
    return place


@local
def test_a_report_is_written_in_place_of_the_one_before(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.html"
    file.write_text("the one before")
    assert run("report", trained.registry, "m", str(file)) == 0
    assert capsys.readouterr().out == f"{file}: version 1 of m, made from 2 versions with 2 shards\n"
    text = file.read_text()
    assert text.startswith("<!doctype html>")
    assert text.endswith("</html>\n")
    assert "a.parquet" in text
    assert "frozen" not in text.partition("</style>")[2].partition("</style>")[2]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"report.html"}


@local
def test_with_an_archive_the_frozen_model_stands_beside_the_online_one(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.html"
    assert run("report", trained.registry, "m", str(file), "--frozen", "--archive", trained.archive, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"file": str(file), "bytes": file.stat().st_size, "versions": 2, "shards": 2}
    assert "as the batch training left it" in file.read_text()


@local
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-model", "r.html"], 1, "holds no model 'no-such-model'"),
        (["m", "nowhere/r.html"], 1, "make it first"),
        (["m", "."], 1, "is a folder: name a file"),
        (["m", "r.html", "--frozen"], 2, "--frozen needs --archive URL"),
        (["m", "r.html", "--archive", "x"], 2, "--archive is for --frozen"),
        (["m", "r.html", "--last", "0"], 2, "--last"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    trained: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", trained.registry, *arguments) == code
    told = capsys.readouterr()
    assert words in told.err
    assert "Traceback" not in told.err
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    writing.write(file, "first")
    inner = tmp_path / "gone" / "report.html"
    with pytest.raises(StorageError, match="cannot be written"):
        writing.write(inner, "second")
    assert file.read_text() == "first"
    assert writing.write(file, "ü") == 2

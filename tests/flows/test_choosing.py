"""`tidemill compare` and `tidemill backtest` as a user meets them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.flows.conftest import Place
from tests.flows.data import SPEC_FIELDS
from tidemill.flows.cli import main
from tidemill.tasks.batch import train
from tidemill.tasks.online.doors import drain
from tidemill.tasks.settings import Archive, OnlineSettings

pytestmark = pytest.mark.parametrize("make_url", ["local"], indirect=True)


def run(*tokens: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*tokens])
    return int(ended.value.code or 0)


@pytest.fixture
def trained(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A model, and in the current folder the specs `own`, `blind` and some that cannot be compared."""
    train(place.dataset, place.registry, "m", place.spec)
    place.drop("a.parquet", "b.parquet")
    drain(place.inbox, place.registry, "m", OnlineSettings(after_commit=Archive(archive_to=place.archive)))
    monkeypatch.chdir(tmp_path)
    files = {
        "own": SPEC_FIELDS,
        "blind": SPEC_FIELDS | {"features": ["b"]},
        "other": SPEC_FIELDS | {"target": "a", "features": ["b"]},
        "gone": SPEC_FIELDS | {"features": ["no_such"]},
        "typo": SPEC_FIELDS | {"epoch": 3},
    }
    for name, fields in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    return place


def test_specs_are_told_in_one_table_the_best_first(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", trained.dataset, "--specs", "blind.yaml", "own.yaml"]
    assert run(*command) == 0
    told = capsys.readouterr().out
    title, header, *rows = told.splitlines()
    assert title.startswith("2 specs on ")
    assert header.split()[:4] == ["SPEC", "RMSE", "MAE", "DIFFERENCE"]
    assert [row.split()[0] for row in rows[:3]] == ["own", "blind", "baseline"]
    assert " ± " in rows[1]
    assert "own has the lowest rmse" in told
    assert Path("tidemill-compare/compare.html").read_text().startswith("<!doctype html>")
    assert run(*command) == 0
    assert capsys.readouterr().out == told
    assert run(*command, "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["specs"]] == ["own", "blind"]


def test_another_spec_stands_beside_the_log(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["backtest", trained.registry, "m", "--archive", trained.archive, "--spec"]
    assert run(*command, "own.yaml") == 0
    told = capsys.readouterr().out
    assert "Every score of every shard is that of the log, exactly." in told
    assert told.splitlines()[1].split() == [
        *("VERSIONS", "SHARDS", "ROWS", "RMSE", "SPEC", "LEARNER", "CHAMPION", "DIFFERENCE")
    ]
    assert run(*command, "blind.yaml", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["spec"] > found["total"]["learner"]
    page = Path(found["page"].removeprefix("file://")).read_text()
    assert '<svg class="tm"' in page
    assert "trained anew with the other spec" in page


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("compare {data} --specs own.yaml other.yaml", 1, "own predicts 'y' and other predicts 'a'"),
        ("compare {data} --specs own.yaml gone.yaml", 1, "gone: "),
        ("compare {data} --specs own.yaml typo.yaml", 2, "typo.yaml: epoch: "),
        ("compare {data} --specs own.yaml none.yaml", 2, "none.yaml cannot be read"),
        ("compare {data} --specs own.yaml own.yaml", 2, "more than once"),
        ("compare {data} --specs own.yaml --holdout 0.2 --holdout-dataset {data}", 2, "not both"),
        ("compare ./none --specs own.yaml", 1, "none"),
        ("backtest {registry} m --archive {archive} --spec other.yaml", 1, "their errors cannot be compared"),
        ("backtest {registry} m --archive ./none --spec own.yaml", 1, "none"),
        ("backtest {registry} x --archive {archive} --spec own.yaml", 1, "holds no model 'x'"),
        ("backtest {registry} m --archive {data} --spec own.yaml", 1, "lacks 2 of 2 shards (a.parquet, b.parquet)"),
        ("backtest {registry} m --archive {archive} --spec own.yaml --to {registry}", 1, "which is only read"),
        ("backtest {registry} m --spec own.yaml", 2, "--archive"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    trained: Place, capsys: pytest.CaptureFixture[str], command: str, code: int, words: str
) -> None:
    places = {"data": trained.dataset, "registry": trained.registry, "archive": trained.archive}
    assert run(*(token.format(**places) for token in command.split())) == code
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told

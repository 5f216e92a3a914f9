"""The command line, as a user meets it: in this process where that is enough, in processes of its own where it matters."""

import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from cyclopts import CycloptsError

from tests.flows.command import Result, in_process
from tests.flows.conftest import Place
from tests.flows.data import NOT_PARQUET, SPEC, SPEC_FIELDS, parquet
from tests.guarantees.children import drain, train
from tests.s3_server import S3
from tidemill.flows import launch, specfile
from tidemill.flows.cli import app, main
from tidemill.flows.commands import reading
from tidemill.flows.usage import UsageError, spec_file
from tidemill.storage.aliases import all_aliases
from tidemill.storage.disposal import quarantined
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.batch import VersionInfo
from tidemill.tasks.errors import GateClosed
from tidemill.tasks.online.report import OnlineReport
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.spec import Column, Model, Optimizer, Spec

pytestmark = pytest.mark.xdist_group("flows")  # all in one worker, with one Prefect server

COMMANDS = [name for name in app if not name.startswith("-")]

memory = pytest.mark.parametrize("make_url", ["memory"], indirect=True)
local = pytest.mark.parametrize("make_url", ["local"], indirect=True)


Run = Callable[..., Result]


@pytest.fixture
def tidemill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)  # so that what the command sets is taken back

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        handlers = [*logging.getLogger().handlers]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert logging.getLogger().handlers == handlers
        return Result(ended.value.code, *capsys.readouterr())

    return run


# ---- help ------------------------------------------------------------------------------------------------------------
def test_help_lists_the_commands_and_shows_a_first_session(tidemill: Run) -> None:
    for arguments in (["--help"], []):
        result = tidemill(*arguments)
        assert (result.code, result.err) == (0, "")
        for command in COMMANDS:
            assert f"│ {command} " in result.out
        assert "tidemill train ./data ./registry flights" in result.out
        assert "AWS_ENDPOINT_URL_S3" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(tidemill: Run, command: str) -> None:
    result = tidemill(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"\n tidemill {command} ./" in result.out
    assert "[required]" in result.out or command in ("follow", "status")  # these take --pairs in place of them


ROOT = Path(__file__).parents[2]


def examples() -> list[list[str]]:
    """Every command line in `--help`, the README and the docs, as a shell would split it."""
    texts = [str(app.help), *(str(app[name].help) for name in COMMANDS)]
    texts += [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    shown = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?tidemill +[a-z]+ ", line)]
    return [shlex.split(re.split(r" [|>&#] ", line)[0], comments=True)[1:] for line in shown]


def test_every_command_line_in_help_and_docs_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed, with all its flags and their values. None is run."""
    monkeypatch.chdir(tmp_path)
    for name in ("spec.yaml", "spec.json"):
        (tmp_path / name).write_text("{features: [a], target: y}")
    found = examples()
    assert {line[0] for line in found} == set(COMMANDS)
    for line in found:
        app.config = spec_file(line)
        try:
            app.parse_args(line, print_error=False, exit_on_error=False)
        except (CycloptsError, UsageError) as error:
            pytest.fail(f"tidemill {shlex.join(line)}: {error}")


def test_the_settings_are_explained(tidemill: Run) -> None:
    words = " ".join(tidemill("train", "--help").out.replace("│", " ").split())
    assert "--model.arguments Keyword arguments of the factory, as JSON: '{\"hidden\": [64, 32]}'." in words
    assert "--batch-size INT Rows in one gradient step. [default: 64]" in words
    assert "--holdout FLOAT" in words
    assert "{NAME}" not in words
    assert "--empty" not in words
    assert "[default: follow]" in tidemill("follow", "--help").out


def test_version(tidemill: Run) -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        stated = tomllib.load(file)["project"]["version"]
    assert tidemill("--version").out == f"{stated}\n"


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(tidemill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, found in ((None, "passive"), ("active", "active")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        tidemill("--version")
        assert os.environ["OMP_WAIT_POLICY"] == found


# ---- reading ---------------------------------------------------------------------------------------------------------
@memory
def test_status_of_a_registry(tidemill: Run, model: Place) -> None:
    result = tidemill("status", model.registry)
    assert result.code == 3
    header, line, problem = result.out.splitlines()
    assert header.split() == ["MODEL", "HEAD", "KIND", "CREATED", "(UTC)", "ALIASES", "STATE"]
    assert line.startswith("model     2  online  20")
    assert line.endswith("champion = 0  1 problem")
    assert problem.startswith("model: 1 shard rejected within a day, the last by version 2: c.parquet: ")
    (found,) = tidemill("status", model.registry, "--json").json["models"]
    assert (found["model"], found["head"], found["aliases"]) == ("model", 2, {"champion": 0})


@memory
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_model_hides_no_others(tidemill: Run, model: Place, how: str) -> None:
    store = open_store(model.registry)
    for info in [*store.list("model/log/"), *store.list("model/aliases/")]:
        store.write(info.key.replace("model/", "damaged/", 1), store.read(info.key))
    if how == "cut":
        store.write("damaged/log/00000002.json", store.read("damaged/log/00000002.json")[:50])
    else:
        for info in [*store.list("damaged/log/")]:
            store.delete(info.key)
    result = tidemill("status", model.registry)
    assert result.code == 3
    assert re.search(r"^model +2 ", result.out, re.MULTILINE)
    assert re.search(r"^damaged +\? .*damaged$", result.out, re.MULTILINE)
    assert list(tidemill("status", model.registry, "--json").json["damaged"]) == ["damaged"]
    assert tidemill("status", model.registry, "damaged").code == 1


@memory
def test_status_of_an_empty_registry(tidemill: Run, place: Place) -> None:
    assert tidemill("status", place.registry).out == "no models\n"
    assert tidemill("status", place.registry, "--json").json == {"models": []}


@memory
def test_status_of_a_model(tidemill: Run, model: Place) -> None:
    result = tidemill("status", model.registry, "model")
    lines = result.out.splitlines()
    assert (result.code, lines[0]) == (3, f"model in {model.registry}: 1 problem")
    assert lines[1].startswith("  problem      1 shard rejected within a day, the last by version 2: c.parquet: ")
    assert f"`tidemill requeue {model.registry} model --all --inbox INBOX`" in lines[1]
    assert lines[2].startswith("  head         version 2, online, 20")
    assert lines[2].endswith(" ago)")
    assert lines[4:7] == [
        "  aliases      champion = 0",
        f"  trained on   2 epochs, 2 shards, {2 * 357 + 100:,} rows, 28 steps",
        "  quarantine   1 shard (see tidemill requeue), the newest:",
    ]
    assert lines[7].strip().startswith("version 2, c.parquet: ")
    facts = tidemill("status", model.registry, "model", "--json").json
    assert (facts["head"], facts["quarantined"], facts["aliases"]) == (2, 1, {"champion": 0})
    assert [problem["name"] for problem in facts["problems"]] == ["rejected"]


@memory
def test_the_score_of_a_version_that_only_rejected_shards(tidemill: Run, place: Place) -> None:
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    place.drop("a.parquet")
    drain(open_store, place.inbox, place.registry, OnlineSettings(grace_seconds=0))
    open_store(place.inbox).write("c.parquet", NOT_PARQUET)
    drain(open_store, place.inbox, place.registry, OnlineSettings(grace_seconds=0))
    assert "  score        none of its shards\n" in tidemill("status", place.registry, "model").out


@memory
def test_status_is_well_if_nothing_is_wrong(tidemill: Run, place: Place) -> None:
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    result = tidemill("status", place.registry, "model", "--inbox", place.inbox)
    assert (result.code, result.out.splitlines()[0]) == (0, f"model in {place.registry}: well")
    assert tidemill("status", place.registry).out.endswith("  well\n")


@memory
def test_status_looks_again_until_ctrl_c(tidemill: Run, model: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away is told, and looked at again; the exit code is of the last look."""
    looks: list[float] = []
    key = f"model/log/{2:08d}.json"
    head = open_store(model.registry).read(key)

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            open_store(model.registry).write(key, b"{}")
        if len(looks) == 2:
            open_store(model.registry).write(key, head)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(reading.time, "sleep", sleep)
    result = tidemill("status", model.registry, "model", "--watch")
    assert (result.code, looks) == (3, [reading.WATCH_SECONDS] * 3)
    seen = [line for line in result.out.splitlines() if line.startswith(("model in", "tidemill:"))]
    assert [line[:9] for line in seen] == ["model in ", "tidemill:", "model in "]


@memory
def test_status_of_an_inbox(tidemill: Run, model: Place) -> None:
    arguments = ("status", model.registry, "model", "--inbox", model.inbox)
    assert tidemill(*arguments).out.splitlines()[-1] == "  inbox        0 shards waiting"
    model.drop("b.parquet", "new.parquet")  # one of them again
    *_, waiting, there = tidemill(*arguments).out.splitlines()
    assert re.match(
        r"  inbox        1 shard waiting, \d\.\d KB, the oldest since 20.* UTC \(\d+ seconds? ago\)", waiting
    )
    assert there.strip() == "1 consumed shard still there; unless kept, the next run removes them"
    facts = tidemill(*arguments, "--json").json
    assert (facts["waiting"], facts["consumed_in_inbox"]) == (1, 1)


@memory
def test_log(tidemill: Run, model: Place) -> None:
    header, *lines = tidemill("log", model.registry, "model").out.splitlines()
    assert header.split() == ["VERSION", "CREATED", "(UTC)", "KIND", "MADE", "FROM", "SCORE", "ALIASES"]
    made_from = slice(header.index("MADE"), header.index("SCORE"))
    assert [line[:7].strip() for line in lines] == ["2", "1", "0"]
    assert [line[made_from].strip() for line in lines] == [
        "0 shards, 0 rows, 1 rejected",
        "2 shards, 100 rows",
        "2 files, 400 rows",
    ]
    assert re.search(r" loss \d", lines[1])
    assert lines[2].endswith("champion")
    assert len({line.index("20") for line in lines}) == 1

    assert len(tidemill("log", model.registry, "model", "-n", "2").out.splitlines()) == 3
    versions = tidemill("log", model.registry, "model", "--json").json
    assert [v["version"] for v in versions] == [2, 1, 0]
    assert versions[1]["shards"] == ["a.parquet", "b.parquet"]
    assert versions[2]["aliases"] == ["champion"]


@memory
def test_show(tidemill: Run, model: Place) -> None:
    head = tidemill("show", model.registry, "model").json
    assert (head["version"], head["kind"]) == (2, "online")
    assert tidemill("show", model.registry, "model", "champion", "--json").json["version"] == 0
    assert tidemill("show", model.registry, "model", "1").json["consumed"][0]["key"] == "a.parquet"


@memory
def test_predict(tidemill: Run, model: Place) -> None:
    result = tidemill("predict", model.registry, "model", model.dataset, model.archive, "--columns", "a", "y", "--json")
    assert result.json["rows"] == 400
    assert result.json["version"] == 0
    assert "(2 of 2 files)" in result.err
    table = pq.read_table(pa.BufferReader(open_store(model.archive).read("part-0.parquet")))
    assert table.column_names == ["a", "y", "prediction"]

    result = tidemill("predict", model.registry, "model", model.dataset, model.archive, "--version", "head")
    assert result.out == f"400 predictions of version 2 in 2 files below {model.archive}\n"


@memory
def test_an_audit_of_a_sound_history(tidemill: Run, model: Place) -> None:
    result = tidemill("audit", model.registry, "model")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "model: sound",
        "  versions     3, each made from the one before it",
        "  shards       2 consumed, 100 rows; 1 rejected",
        "  blobs        6 are what was committed; those of 0 versions are retired",
    ]
    assert tidemill("audit", model.registry, "model", "--json").json["findings"] == []


def test_places_that_overlap_are_refused_before_anything_starts(tidemill: Run, tmp_path: Path) -> None:
    place = Place(*(str(tmp_path / name) for name in ("dataset", "inbox", "registry", "archive")))
    open_store(place.dataset).write("part.parquet", parquet(200, seed="part"))
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    place.drop("a.parquet")
    (tmp_path / "link").symlink_to("dataset")
    spec = tmp_path / "spec.json"
    spec.write_text(SPEC.model_dump_json())
    before = sorted(path for path in tmp_path.rglob("*"))
    train_link = ("train", f"{tmp_path}/link", f"{place.dataset}/registry", "model", "--spec", str(spec))
    for command, words in (
        (train_link, "the registry, .* lies inside the dataset"),
        (("follow", f"{tmp_path}/link", place.registry, "model"), "the dataset of version 0, .* is the inbox"),
        (("follow", f"{tmp_path}//inbox", f"{place.inbox}/r", "model"), "the registry, .* lies inside the inbox"),
        (("predict", place.registry, "model", place.dataset, f"{tmp_path}/link"), "the output of .* is the dataset"),
    ):
        result = tidemill(*command)
        assert (result.code, result.out) == (1, "")
        assert re.fullmatch(f"tidemill: {words} .*", result.err.strip()), result.err
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_status_knows_a_kept_inbox_however_it_is_spelled(tidemill: Run, tmp_path: Path) -> None:
    place = Place(*(str(tmp_path / name) for name in ("dataset", "inbox", "registry", "archive")))
    open_store(place.dataset).write("part.parquet", parquet(200, seed="part"))
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    place.drop("a.parquet")
    drain(open_store, place.inbox, place.registry, OnlineSettings(after_commit="keep"))
    (tmp_path / "link").symlink_to("inbox")
    for spelling in (place.inbox, str(tmp_path / "link"), f"file:///{place.inbox}", f"{place.registry}/../inbox"):
        facts = tidemill("status", place.registry, "model", "--inbox", spelling, "--json").json
        assert (facts["waiting"], facts["consumed_in_inbox"]) == (0, 1), spelling


@memory
def test_an_audit_with_findings_fails(tidemill: Run, model: Place) -> None:
    """The shards were deleted: nothing can be trained again, and says so."""
    result = tidemill("audit", model.registry, "model", "--reproduce", "--archive", model.archive)
    assert result.code == 1
    title, finding = result.out.splitlines()
    assert title == "model: 1 finding"
    assert "holds no shard 'a.parquet'" in finding
    open_store(model.registry).delete("model/log/00000001.json")
    result = tidemill("audit", model.registry, "model", "--json")
    assert (result.code, len(result.json["findings"])) == (1, 1)


@memory
def test_archived_shards_are_trained_on_again(tidemill: Run, place: Place) -> None:
    train(open_store, place.dataset, place.registry, SPEC, BatchSettings())
    place.drop("a.parquet", "b.parquet")
    settings = OnlineSettings(after_commit={"archive_to": place.archive}, limits={"max_shards": 1})
    drain(open_store, place.inbox, place.registry, settings)
    result = tidemill("audit", place.registry, "model", "--reproduce", "--archive", place.archive)
    assert (result.code, result.err.count("1 shards trained on again")) == (0, 2)
    assert result.out.splitlines()[-1] == "  reproduced   2 versions made again from 2 shards: the same bits"
    tidemill("gc", place.registry, "model", "--keep", "1")
    result = tidemill("audit", place.registry, "model", "--reproduce", "--archive", place.archive)
    words = "; 2 could not be: their start is retired, or ranks trained them without parts"
    assert (result.code, words in result.out.splitlines()[-1]) == (0, True)


@memory
def test_to_reproduce_needs_an_archive(tidemill: Run, model: Place) -> None:
    for flags in (["--reproduce"], ["--archive", model.archive]):
        result = tidemill("audit", model.registry, "model", *flags)
        assert (result.code, result.err.splitlines()[-1][:37]) == (2, "tidemill: --reproduce needs --archive")
    result = tidemill("audit", model.registry, "model", "--reproduce", "--archive", "/no/such/folder")
    assert (result.code, result.err) == (
        1,
        "tidemill: file:///no/such/folder: there is no such folder. Check the URL\n",
    )


# ---- changing --------------------------------------------------------------------------------------------------------
@memory
def test_promote(tidemill: Run, model: Place) -> None:
    assert tidemill("promote", model.registry, "model", "2").out == "champion is version 2\n"
    result = tidemill("promote", model.registry, "model", "champion", "--alias", "previous", "--json")
    assert result.json == {"alias": "previous", "version": 2}
    assert all_aliases(open_log(model.registry, "model")) == {"champion": 2, "previous": 2}


@memory
def test_rollback(tidemill: Run, model: Place) -> None:
    words = "head is version 3, with the weights and state of version 1; champion is version 1\n"
    assert tidemill("rollback", model.registry, "model", "1").out == words
    result = tidemill("rollback", model.registry, "model", "champion", "--json")
    assert result.json == {"head": 4, "rolled_back_to": 1, "alias": "champion"}
    log = open_log(model.registry, "model")
    assert log.head().manifest.blobs.weights.sha256 == log.version(1).manifest.blobs.weights.sha256
    assert "version 1 " in tidemill("log", model.registry, "model", "-n", "1").out
    refused = tidemill("rollback", model.registry, "model", "1", "--alias", "head")
    assert (refused.code, log.head().number) == (1, 4)  # nothing has been done by halves


@memory
def test_requeue_lists_and_sends_back(tidemill: Run, model: Place) -> None:
    (name,) = quarantined(open_log(model.registry, "model"))
    first, second = tidemill("requeue", model.registry, "model").out.splitlines()
    assert first == f"{name}  {model.inbox}/c.parquet"
    assert "footer" in second
    assert tidemill("requeue", model.registry, "model", "--json").json[name]["key"] == "c.parquet"
    assert model.inbox_keys() == []

    assert (
        tidemill("requeue", model.registry, "model", name, "--inbox", model.inbox).out
        == f"{name} is c.requeued-{name}.parquet again\n"
    )
    assert model.inbox_keys() == [f"c.requeued-{name}.parquet"]
    assert tidemill("requeue", model.registry, "model").out == "quarantine is empty\n"
    assert tidemill("requeue", model.registry, "model", name).code == 1


@memory
def test_requeue_everything(tidemill: Run, model: Place) -> None:
    (name,) = quarantined(open_log(model.registry, "model"))
    result = tidemill("requeue", model.registry, "model", "--all", "--inbox", model.inbox, "--json")
    assert result.json == {name: f"c.requeued-{name}.parquet"}
    assert tidemill("requeue", model.registry, "model", "--all").out == "quarantine is empty\n"
    assert tidemill("requeue", model.registry, "model", name, "--all").code == 2


@memory
def test_gc(tidemill: Run, model: Place) -> None:
    result = tidemill("gc", model.registry, "model", "--keep", "1", "--json")
    assert {key.split("/")[-1][:8] for key in result.json["deleted"]} == {"00000001"}
    assert tidemill("gc", model.registry, "model", "--keep", "1").out == "0 blobs removed\n"


# ---- train and follow: from flags to the flows -----------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has a folder d, with a file of columns, and a folder i."""
    for name in ("d", "i"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"a": [1.0], "b": [2.0], "c": ["x"], "y": [0.5]}), tmp_path / "d/part.parquet")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def batch_calls(folders: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a batch training is called with; it does nothing."""
    calls: list[tuple[Any, ...]] = []

    def train(*arguments: Any, by_prefect: bool) -> VersionInfo:
        calls.append(arguments)
        metrics: dict[str, object] = {"holdout_rows": 40, "holdout": {"loss": 0.25}}
        return VersionInfo(registry=arguments[1], model=arguments[2], version=3, trained=True, metrics=metrics)

    monkeypatch.setattr(launch, "train", train)
    return calls


def test_train_with_flags_only(tidemill: Run, batch_calls: list[tuple[Any, ...]]) -> None:
    result = tidemill(
        *("train", "d", "r", "m", "--features", "a", '{"name": "c", "kind": "category"}', "--target", "y"),
        *("--model.factory", "mlp", "--model.arguments", '{"hidden": [8, "9"], "dropout": 0.5}'),
        *("--optimizer.name", "adam", "--optimizer.arguments", '{"amsgrad": true}'),
        *("--no-shuffle", "--learning-rate", "1e-3", "--holdout", "0.5", "--alias", "latest"),
    )
    assert result.out == "version 3 of m: trained\nscore: loss 0.25 on 40 held-out rows\n"
    spec = Spec(
        features=(Column(name="a"), Column(name="c", kind="category")),
        target="y",
        model=Model(factory="mlp", arguments={"hidden": [8, "9"], "dropout": 0.5}),
        optimizer=Optimizer(name="adam", arguments={"amsgrad": True}),
        shuffle=False,
        learning_rate=1e-3,
    )
    assert batch_calls == [("d", "r", "m", spec, BatchSettings(holdout=0.5, alias="latest"))]
    assert type(batch_calls[0][3]) is Spec


@pytest.mark.parametrize(
    ("flags", "target", "features"),
    [
        (("--target", "y"), "y", ("*",)),
        (("--target", "y", "b", "--features", "a"), ("y", "b"), ("a",)),
        (("--features", "a,b", "--target", "y"), "y", ("a,b",)),
        (("--features", "*", "!a", "--target=y"), "y", ("*", "!a")),
    ],
)
def test_a_target_is_all_that_a_training_needs(
    tidemill: Run, batch_calls: list[tuple[Any, ...]], flags: tuple[str, ...], target: object, features: tuple[str, ...]
) -> None:
    assert tidemill("train", "d", "r", "m", *flags).code == 0
    assert batch_calls[0][3] == Spec(target=target, features=features, recipe=1)


@pytest.mark.parametrize("flags", [("--epochs", "10"), ("--model.factory", "linear"), ("--spec", "{file}")])
def test_whoever_says_what_a_recipe_would_choose_gets_no_recipe(
    tidemill: Run, batch_calls: list[tuple[Any, ...]], tmp_path: Path, flags: tuple[str, str]
) -> None:
    """Even if it is what a spec has by default. A file has the defaults of a spec, unless it asks for a recipe."""
    (tmp_path / "spec.yaml").write_text("seed: 3")
    assert (
        tidemill("train", "d", "r", "m", "--target", "y", flags[0], flags[1].format(file=tmp_path / "spec.yaml")).code
        == 0
    )
    (tmp_path / "spec.yaml").write_text("recipe: 1")
    assert tidemill("train", "d", "r", "m", "--target", "y", "--spec", str(tmp_path / "spec.yaml")).code == 0
    assert [call[3].recipe for call in batch_calls] == [None, 1]


@pytest.mark.parametrize(("trained", "decided"), [(True, []), (False, ["  task: binary"])])
def test_how_the_score_stands_is_printed_below_it_and_what_was_decided_where_no_log_line_has_said_it(
    tidemill: Run, folders: None, monkeypatch: pytest.MonkeyPatch, trained: bool, decided: list[str]
) -> None:
    info = VersionInfo(
        registry="r",
        model="m",
        version=3,
        trained=trained,
        metrics={"holdout_rows": 40, "holdout": {"loss": 0.25}},
        chosen=["task: binary"],
        notes=["alias champion names version 3"],
    )
    monkeypatch.setattr(launch, "train", lambda *_, **__: info)
    printed = tidemill("train", "d", "r", "m", "--target", "y").out.splitlines()
    assert printed[1:] == ["score: loss 0.25 on 40 held-out rows", *decided, "  alias champion names version 3"]


@pytest.mark.parametrize("by", ["flags", "a list", "a word", "a word in a list"])
def test_weights_of_classes_are_a_list_or_a_word(
    tidemill: Run, batch_calls: list[tuple[Any, ...]], tmp_path: Path, by: str
) -> None:
    (tmp_path / "spec.yaml").write_text({"a list": "class_weights: [1, 0.5, 0]"}.get(by, "class_weights: balanced"))
    flags = {
        "flags": ("--class-weights", "1", "0.5", "0"),
        "a word in a list": ("--class-weights", "balanced"),
    }.get(by, ("--spec", str(tmp_path / "spec.yaml")))
    result = tidemill("train", "d", "r", "m", "--target", "y", *flags)
    assert result.code == 0, result.err
    assert batch_calls[0][3].class_weights == ((1, 0.5, 0) if by in ("flags", "a list") else "balanced")


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
@pytest.mark.parametrize("flag", ["--spec {}", "--spec={}"])
def test_train_with_a_file(
    tidemill: Run, batch_calls: list[tuple[Any, ...]], tmp_path: Path, write: Callable[[Any], str], flag: str
) -> None:
    """Flags override the file; what neither says has its default."""
    fields = SPEC_FIELDS | {
        "features": ["a", {"name": "c", "kind": "category", "buckets": 8}],
        "model": {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.5}},
        "optimizer": {"name": "adam", "arguments": {"betas": [0.5, 0.9]}},
        "shuffle": False,
        "loss": None,
    }
    file = tmp_path / "spec"
    file.write_text(write(fields))
    result = tidemill("train", "d", "r", "m", *flag.format(file).split(), "--epochs", "7", "--optimizer.name", "adamw")
    assert result.code == 0, result.err
    wanted = fields | {"epochs": 7, "optimizer": {"name": "adamw", "arguments": {"betas": [0.5, 0.9]}}}
    assert batch_calls == [("d", "r", "m", Spec.model_validate(wanted), BatchSettings())]


@pytest.mark.parametrize("word", ["on", "off", "auto", "'on'"])
def test_a_bare_on_is_a_word(tidemill: Run, batch_calls: list[tuple[Any, ...]], tmp_path: Path, word: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"features: [a]\ntarget: y\ncompile: {word}\n")
    assert tidemill("train", "d", "r", "m", "--spec", str(file)).code == 0
    assert batch_calls[0][3].compile == word.strip("'")


@memory
def test_the_spec_of_a_version_can_be_used_again(
    tidemill: Run, model: Place, batch_calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(tidemill("show", model.registry, "model").json["spec"]))
    assert tidemill("train", "d", "r", "m", "--spec", str(file)).code == 0
    assert batch_calls[0][3] == SPEC


@memory
def test_follow_with_flags(tidemill: Run, model: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def train_online(*arguments: Any, by_prefect: bool) -> OnlineReport:
        calls.append(arguments)
        return OnlineReport(
            model="m",
            first_version=4,
            head=5,
            versions=2,
            shards=3,
            rows=1500,
            score={"loss": 0.5},
            rejected=1,
            last_rejected={"x.parquet": "x.parquet: no column y"},
            owed=1,
        )

    monkeypatch.setattr(launch, "train_online", train_online)
    places = (model.inbox, model.registry, "model")
    result = tidemill("follow", *places, "--limits.max-shards", "8", "--after-commit.archive-to", "z")
    settings = OnlineSettings(mode="follow", limits={"max_shards": 8}, after_commit={"archive_to": "z"})
    assert calls == [(*places, settings)]
    assert type(calls[0][3]) is OnlineSettings
    assert result.out.splitlines() == [
        "head of m is version 5: 2 new versions from 3 shards, 1,500 rows",
        "  score        loss 0.5 on these shards, each before it was trained on",
        "  rejected     1 shard, moved to quarantine (see tidemill requeue)",
        "               x.parquet: no column y",
        "  not deleted  1 consumed shard; the next run tries again",
    ]
    result = tidemill("follow", *places, "--mode", "drain", "--json")
    assert calls[1][3] == OnlineSettings()
    assert OnlineReport.model_validate(result.json).shards == 3


@memory
def test_follow_and_status_of_many(tidemill: Run, model: Place, tmp_path: Path) -> None:
    """The exit code says that one fails, though the other is done."""
    model.drop("1.parquet")
    file = tmp_path / "pairs.yaml"
    other = {"inbox": f"{model.inbox}-2", "registry": model.registry, "model": "no-model"}
    pairs = [{"inbox": model.inbox, "registry": model.registry, "model": "model", "name": "mine"}, other]
    file.write_text(yaml.safe_dump(pairs))
    done = tidemill("follow", "--pairs", str(file), "--mode", "drain")
    assert done.code == 1
    assert done.out.startswith("2 models: 1 new version from 1 shard, 50 rows\n  failing      1 model, whose")
    assert "no-model: memory://" in done.out
    looked = tidemill("status", "--pairs", str(file), "--json")
    assert looked.code == 3
    assert [(each["model"], each["waiting"]) for each in looked.json["models"]] == [("mine", 0)]
    assert set(looked.json["unknown"]) == {"no-model"}

    file.write_text(yaml.safe_dump(pairs[:1]))
    done = tidemill("follow", "--pairs", str(file), "--mode", "drain", "--json")
    assert (done.code, done.json["models"]["mine"]["shards"]) == (0, 0)
    looked = tidemill("status", "--pairs", str(file))
    assert (looked.code, "\nmine: " in looked.out) == (3, True)  # what the fixture has rejected

    file.write_text(yaml.safe_dump([pairs[0], pairs[0]]))
    for usage, message in (
        (("--pairs", str(file)), f"tidemill: --pairs {file}: two pairs are called 'mine'"),
        (("--pairs", f"{file}.no"), "tidemill: --pairs "),
        (("i", "r", "m", "--pairs", str(file)), "--pairs stands in place of INBOX, REGISTRY and MODEL"),
        (("--pairs", str(file), "--prefect"), "--pairs stands in place of"),
        (("i", "r"), "tidemill: follow needs INBOX, REGISTRY and MODEL, or --pairs FILE"),
    ):
        wrong = tidemill("follow", *usage)
        assert wrong.code == 2
        assert message in wrong.err


# ---- wrong usage -----------------------------------------------------------------------------------------------------
FLAGS = ("train", "d", "r", "m", "--features", "a", "--target", "y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), 'Unknown command "nonsense". Available commands: train, follow'),
        (("status",), "tidemill: status needs REGISTRY, or --pairs FILE"),
        (("train", "a.parquet", "b.parquet", *FLAGS[2:]), "tidemill train: m is more than it takes. (A shell"),
        (("status", "r", "m", "--jsno"), "tidemill status: Unknown option: --jsno. Did you mean --json?"),
        (("status", "r", "--inbox", "i"), "--inbox needs the name of a model"),
        (("log", "r", "m", "-n", "x"), "Invalid value for -n: 'x' is no whole number"),
        (("report", "r", "m", "f", "-n", "2.5"), "Invalid value for -n: '2.5' is no whole number"),
        ((*FLAGS, "--alias", "head"), "--alias: 'head' cannot be an alias"),
        (("follow", "i", "r", "m", "--gate.alias", ""), "--gate.alias: '' cannot be an alias"),
        (("serve", "r", "m", "--alias", "head"), "--alias: 'head' cannot be an alias"),
        (("gc", "r", "m", "--keep", "0"), 'Invalid value "0" for --keep. Must be >= 1'),
        (("gc", "r", "m", "--keep", "2.5"), "Invalid value for --keep: '2.5' is no whole number"),
        (
            ("train", "d", "r", "m", "--target", "y", "--ranks", "2.5"),
            "Invalid value for --ranks: '2.5' is no whole number",
        ),
        (("train", "d", "r", "m"), "--target is missing: give it as a flag, or in the file that --spec names"),
        ((*FLAGS, "--epochs", "0"), "--epochs: input should be greater than or equal to 1, not '0'"),
        ((*FLAGS, "--task", "x"), "--task: input should be 'regression', 'binary' or 'multiclass', not 'x'"),
        (
            (*FLAGS, "--class-weights", "1", "-1"),
            "--class-weights.1: give balanced, or a number of at least 0 for each class",
        ),
        ((*FLAGS, "--class-weights", "1", "balanced"), "--class-weights: balanced stands alone"),
        ((*FLAGS, "--holdout", "2"), "--holdout: input should be less than 1, not '2'"),
        ((*FLAGS, "--epoch", "1"), "Unknown option: --epoch. Did you mean --epochs?"),
        ((*FLAGS, "--model", "mlp"), "--model is set by its parts, such as --model.factory"),
        ((*FLAGS, "--model.factory", "a-b:c"), "--model.factory: model.factory 'a-b:c' is none of linear, mlp"),
        ((*FLAGS, "--model.arguments", "5"), "--model.arguments: give one JSON object"),
        ((*FLAGS, "--model.arguments", '{"a'), "Invalid value for --model.arguments: JSONDecodeError"),
        (
            (*FLAGS, "--model.arguments.hidden", "8"),
            'give all arguments as one JSON object: --model.arguments \'{"hidden"',
        ),
        ((*FLAGS, "--optimizer.arguments", '{"lr": 1}'), "set learning_rate on the spec instead"),
        (("train", "d", "r", "m", "--features", "a", "--target", "a"), "target 'a' is also among the features"),
        (("train", "d", "r", "m", "--spec", "/no/such/file"), "--spec /no/such/file cannot be read: [Errno 2]"),
        (("follow", "i", "r", "m", "--mode", "x"), "--mode: input should be 'drain' or 'follow', not 'x'"),
        (
            ("follow", "i", "r", "m", "--after-commit", "archive"),
            "input should be 'delete' or 'keep', not 'archive'",
        ),
        (("follow", "i", "r", "m", "--after-commit", "keep", "--after-commit.archive-to", "z"), "Cannot combine"),
        (("follow", "i", "r", "m", "--after-commit.archive-to"), "--after-commit.archive-to must be given"),
        (("follow", "i", "r", "m", "--labels.inbox", "l"), "--labels.key must be given, with a value"),
        (("follow", "i", "r", "m", "--labels.inbox", "l", "--labels.kye", "k"), "--labels.key must be given"),
        (
            ("follow", "i", "r", "m", "--gate.champion", "score", "--gate.after-refusals", "stop"),
            "after_refusals needs champion='move'",
        ),
        (("follow", "i", "r", "m", "--learners", "3"), "--learners is for --pairs"),
        (("follow", "i", "r", "m", "--gate.tolerance", "-1"), "--gate.tolerance: input should be greater than"),
    ],
)
def test_wrong_usage(tidemill: Run, arguments: tuple[str, ...], message: str) -> None:
    result = tidemill(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("tidemill")
    assert message in result.err


def test_a_list_with_a_wrong_part_is_not_called_too_short_as_well(tidemill: Run) -> None:
    complaint, *_ = tidemill("train", "d", "r", "m", "--target", "").err.split("\nUsage: ")
    assert complaint == "tidemill train: --target.0: string should have at least 1 character, not ''"


def test_wrong_usage_shows_the_right_one(tidemill: Run) -> None:
    *_, usage, more = tidemill(*FLAGS, "--foo").err.splitlines()
    assert usage.startswith("Usage: tidemill train DATASET REGISTRY MODEL (--target COLUMN | --spec FILE) [--features")
    assert more == "`tidemill train --help` explains it."
    *_, usage, _ = tidemill("gc", "r", "m", "--foo").err.splitlines()
    assert usage == "Usage: tidemill gc [OPTIONS] REGISTRY MODEL"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("features: [a", "cannot be read at line 1, column 13: expected ',' or ']'"),
        ("[1, 2]", "must hold one mapping of settings"),
        (
            "{features: [a], target: y, epoch: 3}",
            "spec.yaml holds 'epoch', which is no setting; did you mean 'epochs'?",
        ),
        (
            "{features: [a], target: y, model: {factry: mlp}}",
            "holds 'model.factry', which is no setting; did you mean 'mod",
        ),
        ("{features: [{name: a, knd: number}], target: y}", "--features.0.knd: extra inputs are not permitted"),
        ("{features: [a], target: y, epochs: 0}", "--epochs: input should be greater than or equal to 1"),
        (
            "{features: [a], target: y, model: {factory: mlp, arguments: {day: !!timestamp 2026-01-01}}}",
            "cannot be written as JSON",
        ),
        ("{features: [a]}", "--target is missing"),
    ],
)
def test_a_bad_spec_file(tidemill: Run, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(content)
    result = tidemill("train", "d", "r", "m", "--spec", str(file))
    assert (result.code, result.out) == (2, "")
    assert message in result.err


# ---- what fails ------------------------------------------------------------------------------------------------------
@memory
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "{}", "modle"), "holds no model 'modle'. Did you mean 'model'? It holds: model."),
        (("log", "{}", "nothing"), "holds no model 'nothing'. It holds: model."),
        (("requeue", "{}", "nothing"), "holds no model 'nothing'. It holds: model."),
        (("gc", "{}", "nothing"), "holds no model 'nothing'. It holds: model."),
        (("show", "{}", "model", "17"), "has no version 17. `tidemill log` lists what there is."),
        (("show", "{}", "model", "latest"), "has no alias 'latest' (there are: champion)."),
        (("promote", "{}", "model", "1", "--alias", "head"), "'head' cannot be an alias"),
        (("rollback", "{}", "model", "17"), "has no version 17"),
        (("requeue", "{}", "model", "x"), "quarantine holds no 'x'"),
        (("predict", "{}", "model", "memory://void/x", "memory://void/y"), "holds no Parquet file"),
        (("status", "{}", "model", "--inbox", "/no/such/folder"), "there is no such folder"),
        (("status", "/no/such/folder"), "file:///no/such/folder: there is no such folder. Check the URL"),
        (("log", "/no/such/folder", "model"), "file:///no/such/folder: there is no such folder. Check the URL"),
        (("gc", "/no/such/folder", "model"), "file:///no/such/folder: there is no such folder. Check the URL"),
        (("status", "ftp://x/y"), "ftp:// is not known here"),
    ],
)
def test_failures_say_what_and_where(tidemill: Run, model: Place, arguments: tuple[str, ...], message: str) -> None:
    result = tidemill(*(argument.format(model.registry) for argument in arguments))
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("tidemill: ")
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_missing_bucket(tidemill: Run, s3_server: S3) -> None:
    result = tidemill("status", "s3://tidemill-no-such-bucket/registry", "model")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("tidemill: s3://tidemill-no-such-bucket")
    assert len(result.err.splitlines()) == 1


def test_wrong_credentials(s3_server: S3, tmp_path: Path) -> None:
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    result = in_process("status", "s3://tidemill-tests/registry", cwd=tmp_path, environment=environment)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("tidemill: s3://tidemill-tests")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "d", "r", "m", "--features", "a", "--target", "y", "--holdout-dataset"),
        ("follow", "i", "r", "m", "--after-commit.archive-to"),
        ("follow", "i", "r", "m", "--labels.key", "id", "--labels.inbox"),
        ("follow", "i", "r", "m", "--gate.holdout-dataset"),
        ("follow", "i", "r", "m", "--gate.after-refusals.retrain-on"),
    ],
)
@pytest.mark.usefixtures("folders")
def test_a_secret_in_a_url_is_refused_before_prefect_sees_it(
    tidemill: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.delattr(launch, "train")
    monkeypatch.delattr(launch, "train_online")
    result = tidemill(*arguments, "s3://me:hunter2@bucket/x")
    assert (result.code, result.out) == (1, "")
    assert "this s3 URL has credentials" in result.err
    assert "hunter2" not in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target", "Y"), "target 'Y' is missing from file:///.../d/part.parquet: did you mean 'y'?"),
        (
            ("--target", "y", "--features", "aa"),
            "column 'aa' is missing from file:///.../d/part.parquet: did you mean 'a'?",
        ),
        (
            ("--target", "y", "--features", "*", "!cc"),
            "features: '!cc' matches no column of the dataset: did you mean 'c'?",
        ),
        (
            ("--target", "y", "--features", "x*"),
            "features: 'x*' matches no column of the dataset: it has 'a', 'b', 'c', 'y'",
        ),
        (
            ("--target", "c", "--task", "regression"),
            "target 'c' of file:///.../d/part.parquet has type text: write a number",
        ),
        (("--target", "y", "--sample-weight", "w"), "column 'w' is missing from"),
        (("--target", "y", "--holdout-dataset", "i"), "holds no Parquet file"),
        (
            ("--target", "y", "--model.factory", "nomodule:Net"),
            "no module named 'nomodule': install its package, or start",
        ),
        (("--target", "y", "--model.factory", "nets:Nte"), "'nets' has no attribute 'Nte': did you mean 'Net'?"),
        (
            ("--target", "y", "--metrics", "torchmetrics:R2Scor"),
            "'torchmetrics' has no attribute 'R2Scor': did you mean 'R2",
        ),
        (
            ("--target", "y", "--loss", "torch.nn.functional:mse_los"),
            "'torch.nn.functional' has no attribute 'mse_los': did you mean",
        ),
    ],
)
def test_what_does_not_fit_the_dataset_is_told_before_anything_starts(
    folders: None, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    """In a process of its own: neither torch nor Prefect is imported for it."""
    (tmp_path / "nets.py").write_text("import torch\nclass Net(torch.nn.Linear): ...\n")
    line = ["train", "d", "r", "m", *flags]
    code = (
        "import sys; from tidemill.flows.cli import main\n"
        f"try:\n    main({line!r})\n"
        "finally:\n    print([name for name in ('torch', 'prefect', 'torchmetrics') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "[]\n")
    [told] = done.stderr.splitlines()
    assert message in told.replace(str(tmp_path), "/...")


@memory
def test_a_person_who_must_decide_is_told_so(tidemill: Run, model: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_online(*arguments: Any, by_prefect: bool) -> OnlineReport:
        raise GateClosed("3 versions in a row were worse")

    monkeypatch.setattr(launch, "train_online", train_online)
    result = tidemill("follow", model.inbox, model.registry, "model")
    assert (result.code, result.err.splitlines()[-1]) == (1, "tidemill: 3 versions in a row were worse")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tidemill.storage.log.open_log", broken)
    with pytest.raises(ZeroDivisionError):
        main(["log", "r", "m"])


# ---- words and numbers in a spec file --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("5.", 5.0), (".inf", math.inf)],
        *[("1", 1), ("+3", 3), ("010", 10), ("0", 0)],
        *[("no", "no"), ("on", "on"), ("off", "off"), ("Yes", "Yes"), ("y", "y"), ("n", "n")],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[
            ("12:30", "12:30"),
            ("2024-01-01", "2024-01-01"),
            ("1_000", "1_000"),
            ("0x1f", "0x1f"),
            ("1e", "1e"),
            ("'1'", "1"),
        ],
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    """Names of columns among them: Norway's `no` is one, and so is a date."""
    (tmp_path / "spec").write_text(f"given: {text}\nlist: [{text or '~'}, a]\n")
    found = specfile.read(str(tmp_path / "spec"))
    assert found == {"given": value, "list": [value, "a"]}
    assert type(found["given"]) is type(value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_spec_file_may_have_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "spec").write_bytes('{"a": "é"}'.encode(encoding))
    assert specfile.read(str(tmp_path / "spec")) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3", "at line 1, column 1: 'a' is given twice"),
        (b"features:\n\t- a", "at line 2, column 1: found character"),
        ('{"é": 1}'.encode("latin-1"), "invalid continuation byte"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        (b"a: 1\n---\nb: 2", "but found another document"),
        (b"[" * 5000, "recursion"),
    ],
)
def test_a_spec_file_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "spec").write_bytes(content)
    with pytest.raises(ValueError, match=rf"spec cannot be read.*{re.escape(message)}") as error:
        specfile.read(str(tmp_path / "spec"))
    assert "\n" not in str(error.value)


# ---- places ------------------------------------------------------------------------------------------------------------
@memory
@pytest.mark.parametrize("flag", ["--holdout-dataset", "dataset"])
def test_a_wrong_place_is_told_before_prefect_starts(
    tidemill: Run, place: Place, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.delattr(launch, "by_prefect")
    monkeypatch.delattr(launch, "train")
    monkeypatch.delattr(launch, "train_online")
    given = [place.dataset, place.registry, "model", "--features", "a", "--target", "y"]
    given = [*given, flag, "/no/such"] if flag.startswith("--") else ["/no/such", *given[1:]]
    result = tidemill("train", *given)
    assert (result.code, result.err) == (1, "tidemill: file:///no/such: there is no such folder. Check the URL\n")


def test_a_single_file_and_a_pattern_where_a_folder_is_looked_for(tidemill: Run, tmp_path: Path) -> None:
    """What a run takes, the look before the run takes too, and what it refuses is refused in its words."""
    file, pattern, registry = str(tmp_path / "one.parquet"), str(tmp_path / "*.parquet"), str(tmp_path / "registry")
    Path(file).write_bytes(parquet(40, seed="one"))
    train(open_store, file, registry, SPEC, BatchSettings())
    launch.before_training(file, registry, "model", SPEC, BatchSettings())
    assert tidemill("predict", registry, "model", file, str(tmp_path / "out")).code == 0
    for given in (
        ("predict", registry, "model", pattern, str(tmp_path / "out")),
        ("train", pattern, registry, "model", "--features", "a", "--target", "y"),
        ("follow", pattern, registry, "model"),
    ):
        result = tidemill(*given)
        assert (result.code, "is a pattern, which is not expanded" in result.err) == (1, True)
    result = tidemill("follow", file, registry, "model")
    assert (result.code, "has the name of a file" in result.err) == (1, True)


@memory
@pytest.mark.parametrize(
    "flags",
    [("--gate.holdout-dataset",), ("--gate.after-refusals.retrain-on",), ("--labels.key", "k", "--labels.inbox")],
)
def test_a_follower_asks_for_all_places_first(
    tidemill: Run, model: Place, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.delattr(launch, "by_prefect")
    monkeypatch.delattr(launch, "train")
    monkeypatch.delattr(launch, "train_online")
    result = tidemill("follow", model.inbox, model.registry, "model", *flags, "/no/such")
    assert (result.code, result.err) == (1, "tidemill: file:///no/such: there is no such folder. Check the URL\n")
    result = tidemill("follow", model.inbox, model.registry, "modle")
    assert (result.code, "Did you mean 'model'?" in result.err) == (1, True)

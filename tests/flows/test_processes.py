"""The command in processes of its own: what it imports, signals, streams, folders, and a Prefect server that goes away."""

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.exceptions import TerminationSignal

from tests.flows.command import TIDEMILL, ended, in_process, start
from tests.flows.conftest import Place
from tests.flows.data import OWN_MODEL, SPEC_FIELDS
from tests.flows.prefect_server import prefect_environment, running_prefect_server
from tests.guarantees.audit import audit
from tests.s3_server import wait_until
from tidemill.flows import terminal
from tidemill.storage.aliases import all_aliases
from tidemill.storage.log import open_log
from tidemill.tasks.batch import VersionInfo
from tidemill.tasks.online.report import OnlineReport

pytestmark = pytest.mark.xdist_group("flows")  # all in one worker, with one Prefect server

local = pytest.mark.parametrize("make_url", ["local"], indirect=True)

HEAVY = (
    *("torch", "torch._dynamo", "torchmetrics", "prefect", "pyarrow", "numpy", "pandas"),
    *("s3fs", "aiobotocore", "botocore", "aiohttp"),
)


def imported(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> set[str]:
    """Which heavy packages a command that succeeds imports, in a process of its own."""
    code = f"""
import sys
from tidemill.flows.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code in (None, 0, 3)  # 3: status has found a problem
print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=True)
    return set(done.stderr.splitlines()[-1].split())


@local
def test_light_commands_import_nothing_heavy(model: Place, tmp_path: Path) -> None:
    """Help, and what reads or moves names in a registry, waits for none of them; predictions not for Prefect."""
    commands = [
        ["--help"],
        ["train", "--help"],
        ["follow", "--help"],
        ["status", model.registry],
        ["status", model.registry, "model", "--inbox", model.inbox],
        ["log", model.registry, "model"],
        ["show", model.registry, "model"],
        ["promote", model.registry, "model", "1"],
        ["rollback", model.registry, "model", "1"],
        ["requeue", model.registry, "model"],
        ["gc", model.registry, "model"],
        ["audit", model.registry, "model"],
    ]
    assert {" ".join(command): imported(*command, cwd=tmp_path) for command in commands} == {
        " ".join(command): set() for command in commands
    }
    assert "prefect" not in imported("predict", model.registry, "model", model.dataset, model.archive, cwd=tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(("mlp",), id="embeddings"),
        pytest.param(("mlp", "--model.arguments", '{"embedding": null}'), id="one-hot"),
        pytest.param(("linear",), id="linear"),
    ],
)
def test_training_waits_neither_for_pandas_nor_for_torchs_compiler(model: tuple[str, ...], tmp_path: Path) -> None:
    """Arrow imports the first for any array that is made of Python or NumPy values.

    Torch imports the second for any optimizer, and for a layer of ids that is given no memory.
    """
    (tmp_path / "pandas").mkdir()
    (tmp_path / "pandas" / "__init__.py").write_text('__version__ = "3.0.0"')
    table = pa.table(
        {
            "x": [i / 7 for i in range(100)],
            "colour": ["red", "green"] * 50,
            "words": [["a", "b"], ["b"]] * 50,
            "y": [["small", "large"][i > 50] for i in range(100)],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "inbox").mkdir()
    pq.write_table(table, tmp_path / "inbox" / "a.parquet")
    (tmp_path / "asked").mkdir()
    (tmp_path / "labels").mkdir()
    named = table.append_column("id", pa.array([None, *(f"r{i}" for i in range(1, 100))]))
    pq.write_table(named.drop_columns("y").slice(1), tmp_path / "asked" / "a.parquet")
    pq.write_table(named.select(["id", "y"]), tmp_path / "labels" / "b.parquet")
    row_by_row = ("--labels.inbox", "labels", "--labels.key", "id", "--labels.wait-seconds", "3600")
    for command in (
        ("train", "rows.parquet", "registry", "model", "--target", "y", *("--model.factory", *model), "--epochs", "1"),
        ("follow", "inbox", "registry", "model", "--mode", "drain", "--grace-seconds", "0"),
        ("follow", "asked", "registry", "model", "--mode", "drain", *row_by_row),
        ("predict", "registry", "model", "rows.parquet", "predictions"),
    ):
        assert not imported(*command, cwd=tmp_path) & {"pandas", "torch._dynamo"}, command
    assert not list((tmp_path / "asked").glob("*.parquet")), "trained on"


@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
def test_reading_from_s3_imports_its_client_alone(model: Place, tmp_path: Path) -> None:
    found = imported("status", model.registry, "model", "--inbox", model.inbox, cwd=tmp_path)
    assert "botocore" in found
    assert not found & {
        "s3fs",
        "aiobotocore",
        "aiohttp",
        "torch",
        "torchmetrics",
        "prefect",
        "pyarrow",
        "numpy",
        "pandas",
    }


def without_artifacts(err: str) -> list[str]:
    """The lines but the one by which a run says that the Prefect server has not taken its artifacts in time."""
    return [line for line in err.splitlines() if "no more artifacts of this run: " not in line]


@local
@pytest.mark.usefixtures("prefect_api")
def test_training_in_processes_of_their_own(place: Place, tmp_path: Path) -> None:
    """A model from the current folder; progress once; only the result on stdout; a failure is one line."""
    (tmp_path / "mymodel.py").write_text(OWN_MODEL)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC_FIELDS))
    spec = ("--spec", "spec.json", "--model.factory", "mymodel:build")
    good = start("train", place.dataset, place.registry, "model", *spec, "--json", cwd=tmp_path)
    bad = start("train", "no-such-folder", place.registry, "model", *spec, cwd=tmp_path)

    result, failed = ended(good), ended(bad)
    assert result.code == 0, result.err
    info = VersionInfo.model_validate(result.json)
    assert (info.version, info.trained) == (0, True)
    view, dataset, *lines = without_artifacts(result.err)
    assert "View at http://127.0.0.1" in view
    assert dataset.endswith("/dataset: 2 files, 400 rows")
    told = list(dict.fromkeys(line.split(maxsplit=1)[1].split(":")[0] for line in lines))
    assert [words for words in told if words.startswith("epoch")] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "task" in told
    assert told[-1] == "epoch 2 of 2", "how it stands is told by the result"
    assert info.notes[-1] == "alias champion names version 0"
    assert not [note for note in info.notes[-2:] if note in result.err], "and by the result alone"

    assert (failed.code, failed.out) == (1, "")
    assert failed.err == f"tidemill: file://{tmp_path}/no-such-folder: there is no such folder. Check the URL\n"

    place.drop("a.parquet")
    follow = ("follow", place.inbox, place.registry, "model", "--mode", "drain", "--grace-seconds", "0")
    result = in_process(*follow, cwd=tmp_path)
    assert result.code == 1
    assert "if it is your code, set TIDEMILL_FACTORIES=mymodel" in result.err.splitlines()[-1]
    result = in_process(*follow, cwd=tmp_path, environment=os.environ | {"TIDEMILL_FACTORIES": "mymodel"})
    assert result.code == 0, result.err
    first, score, champion, recent, gate = result.out.splitlines()
    assert first == "head of model is version 1: 1 new version from 1 shard, 50 rows"
    assert score.startswith("  score        loss 0.")
    assert champion.startswith("  champion     loss 0.")
    assert (
        recent == f"{score.replace('score ', 'recent').partition(' on ')[0]} on the last shards, earlier runs included"
    )
    assert gate == "  gate         champion moved 1 time"
    assert [line.count("version 1: shards 1, rows 50") for line in without_artifacts(result.err)] == [0, 1]


def without_prefect(home: Path) -> dict[str, str]:
    """The environment of a machine on which nobody has set Prefect up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}


@local
def test_without_a_prefect_server_nothing_of_prefect_is_imported(place: Place, tmp_path: Path) -> None:
    """A first run on a new machine: no service, no setting, and no package that is only for flow runs."""
    environment = without_prefect(tmp_path)
    flags = ("--features", "a", "b", "--target", "y", "--epochs", "1")
    train = ("train", place.dataset, place.registry, "model", *flags)
    heavy = imported(*train, cwd=tmp_path, environment=environment)
    assert not heavy & {"prefect", "torchmetrics", "s3fs"}
    shards = place.drop("a.parquet", "b.parquet")
    drain = ("follow", place.inbox, place.registry, "model", "--mode", "drain", "--limits.max-shards", "1", "--json")
    result = in_process(*drain, cwd=tmp_path, environment=environment)
    assert (result.code, result.json["versions"]) == (0, 2), result.err
    assert [line.count(": shards 1, rows 50, loss before") for line in result.err.splitlines()] == [1, 1]
    audit(open_log(place.registry, "model"), shards.items())
    assert not imported(*drain, cwd=tmp_path, environment=environment) & {"prefect", "torchmetrics", "s3fs"}
    assert not (tmp_path / ".prefect").exists()


@local
def test_a_flow_run_that_is_asked_for_without_a_server(place: Place, tmp_path: Path) -> None:
    """A temporary server starts, and no other service or setting is needed."""
    environment = without_prefect(tmp_path) | {"PREFECT_HOME": str(tmp_path / "home")}
    began = time.monotonic()
    flags = ("--features", "a", "b", "--target", "y", "--epochs", "1", "--prefect")
    result = in_process("train", place.dataset, place.registry, "model", *flags, cwd=tmp_path, environment=environment)
    assert result.code == 0, result.err
    assert result.out.startswith("version 0 of model: trained\nscore: loss ")
    assert "PREFECT_API_URL is not set: a temporary Prefect server starts first" in result.err
    assert result.err.count("epoch 1 of 1") == 1
    assert "Finished in state" not in result.err
    print(f"{time.monotonic() - began:.0f} s")


@local
def test_a_prefect_server_that_does_not_answer(model: Place, tmp_path: Path) -> None:
    environment = os.environ | prefect_environment(tmp_path / "home") | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    result = in_process("follow", model.inbox, model.registry, "model", cwd=tmp_path, environment=environment)
    assert (result.code, result.out) == (1, "")
    (line,) = result.err.splitlines()
    assert line.startswith("tidemill: Failed to reach API at http://127.0.0.1:9/api/, the Prefect server that ")


@local
@pytest.mark.timeout(400)
def test_a_prefect_server_that_goes_away(model: Place, tmp_path: Path) -> None:
    """Killed in the middle of a run: all is trained, the report is printed, and the process ends within 30 s of its work."""
    with running_prefect_server(tmp_path) as url:
        environment = os.environ | prefect_environment(tmp_path) | {"PREFECT_API_URL": url}
        model.drop(*(f"{i:02}.parquet" for i in range(40)))
        follow = ("follow", model.inbox, model.registry, "model", "--mode", "drain", "--limits.max-shards", "1")
        process = start(*follow, cwd=tmp_path, environment=environment)
        log = open_log(model.registry, "model")
        wait_until(lambda: log.head().number > 4 or process.poll() is not None, seconds=120, what="a few versions")
        for server in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # of one that has ended, there is no command line
                if f"{urlsplit(url).port}" in server.cmdline():
                    server.kill()
        wait_until(
            lambda: log.head().number == 42 or process.poll() is not None, seconds=120, what="the other versions"
        )
        done = time.monotonic()
        result = ended(process)
    assert time.monotonic() - done < 30
    assert (result.code, model.inbox_keys(), log.head().number) == (0, [], 42), result.err
    assert result.out.startswith("head of model is version 42: 40 new versions from 40 shards")
    assert result.err.splitlines()[-1].endswith("was not told how this run ended. What was trained is committed.")
    assert "Unable to connect" not in result.err
    assert "Traceback" not in result.err


SIGNALS = [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]


def test_a_sigterm_of_which_prefect_fails_is_a_stop_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    def fail_as_prefect_does() -> None:
        try:
            raise TerminationSignal(signal=signal.SIGTERM)
        except TerminationSignal:
            logging.getLogger("prefect.task_engine").error("Crash detected! Execution was aborted.")
            raise ValueError("Task run is not set")  # noqa: B904  # without `from`, as Prefect has it

    with pytest.raises(SystemExit) as ended, terminal.attached("train", lambda error: None):
        fail_as_prefect_does()
    assert ended.value.code == 143
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("tidemill: stopped by SIGTERM; ")
    assert "Crash detected!" not in told


@local
@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(("number", "name", "code"), SIGNALS)
def test_a_signal_in_train_says_what_is_kept(
    place: Place, tmp_path: Path, number: int, name: str, code: int, flow: bool
) -> None:
    environment = None if flow else without_prefect(tmp_path)
    flags = ("--features", "a", "b", "--target", "y", "--epochs", "100000")
    train = ("train", place.dataset, place.registry, "model", *flags)
    process = start(*train, cwd=tmp_path, environment=environment)
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if "epoch 2 of" in line:
            process.send_signal(number)
            break
    result = ended(process)
    assert (result.code, result.out) == (code, ""), lines
    kept = "what checkpoints hold is kept, and the same command goes on from the last of them"
    assert result.err.splitlines()[-1] == f"tidemill: stopped by {name}; {kept}"
    assert "Traceback" not in result.err
    again = start(*train, cwd=tmp_path, environment=environment)
    assert again.stderr is not None
    first = [line for line in itertools.islice(again.stderr, 4) if "going on from the checkpoint after epoch" in line]
    assert len(first) == 1
    again.send_signal(signal.SIGTERM)
    assert ended(again).code == 143


@local
@pytest.mark.parametrize(("number", "name", "code"), SIGNALS)
def test_a_signal_ends_a_plain_follower_after_the_commit_in_hand(
    model: Place, tmp_path: Path, number: int, name: str, code: int
) -> None:
    """As it ends a flow run (test_flows.py): exit code 0, the report on stdout."""
    model.drop(*(f"{i:02}.parquet" for i in range(40)))
    follow = ("follow", model.inbox, model.registry, "model", "--limits.max-shards", "1", "--json")
    process = start(*follow, cwd=tmp_path, environment=without_prefect(tmp_path))
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(number)
    result = ended(process)
    assert result.code == 0, first + result.err
    report = OnlineReport.model_validate(result.json)
    assert report.head == open_log(model.registry, "model").head().number
    assert "version" in first
    assert len(model.inbox_keys()) == 40 - report.shards


@pytest.mark.parametrize(
    "program",
    [
        """
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from tidemill.flows.cli import main
main(["--version"])
""",
        """
import os, signal, sys, threading
def late():
    threading.main_thread().join()  # which has ended once the interpreter waits for the others
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()  # it still waits for this one when the signal comes
threading.Thread(target=late).start()
from tidemill.flows.cli import main
sys.argv[1:] = ["--version"]
main()
""",
    ],
    ids=["is torn down", "waits for threads"],
)
def test_ctrl_c_while_the_interpreter_ends_is_no_traceback(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    assert done.stdout


@local
def test_a_reader_that_has_had_enough(model: Place, tmp_path: Path) -> None:
    """`tidemill show ... | head -1`: no traceback, the code of a process that SIGPIPE ended; a full disk is told."""
    for name in ("show", "log", "status"):
        reader, writer = os.pipe()
        os.close(reader)
        command = [TIDEMILL, name, model.registry, "model"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("tidemill: the result cannot be written: No space left on device.")


@local
@pytest.mark.parametrize("closed", ["1", "2", "0", "1 2"])
def test_closed_streams(model: Place, closed: str) -> None:
    """As a daemon may be started: what the command does, it does."""
    redirected = " ".join(f"{number}>&-" if number != "0" else "<&-" for number in closed.split())
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "tidemill"]
    command += ["promote", model.registry, "model", "0"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    assert all_aliases(open_log(model.registry, "model"))["champion"] == 0


@local
def test_a_current_folder_that_is_gone(model: Place, tmp_path: Path) -> None:
    """What reads a registry works; what trains needs a folder, and says so in one line."""
    gone = tmp_path / "gone"
    train = ("train", model.dataset, model.registry, "model", "--features", "a", "--target", "y")
    for arguments, code in (
        (("log", model.registry, "model"), 0),
        (("status", "./registry"), 1),
        (train, 1),
        (("predict", model.registry, "model", model.dataset, model.archive), 1),
    ):
        gone.mkdir()
        script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", gone, TIDEMILL, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        if code:
            assert re.fullmatch(r"tidemill: .*current folder.*\n", done.stderr)


@local
def test_a_folder_of_prefect_that_cannot_be_written(place: Place, tmp_path: Path) -> None:
    """Without a server that runs, a temporary one needs it: told at once, not after a minute and a thousand lines."""
    (tmp_path / "file").touch()
    environment = without_prefect(tmp_path) | {"PREFECT_HOME": str(tmp_path / "file" / "home")}
    flags = ("--features", "a", "--target", "y", "--prefect")
    result = in_process("train", place.dataset, place.registry, "model", *flags, cwd=tmp_path, environment=environment)
    assert (result.code, result.out) == (1, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"tidemill: Prefect's folder {tmp_path}/file/home cannot be written (Not a directory)")
    assert "PREFECT_API_URL" in line

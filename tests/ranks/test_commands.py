"""`--ranks N` and torchrun, as a user starts them: in processes of their own, which are killed by their ids."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

import psutil
import pytest

from tests.guarantees.audit import audit
from tests.guarantees.children import bits, fill, waiting
from tests.ranks.crews import INBOX, begin, registered
from tests.s3_server import wait_until
from tidemill.flows import torchrun as torchrun_command
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store
from tidemill.tasks.errors import RanksRefused
from tidemill.tasks.online import doors
from tidemill.tasks.ranks import launched, transport
from tidemill.tasks.ranks.launched import Place
from tidemill.tasks.settings import OnlineSettings

SECONDS: Final = 120.0
FLAGS: Final = ["--limits.max-shards", "2", "--passes", "2", "--grace-seconds", "0", "--gate.champion", "score"]
SETTINGS: Final = OnlineSettings(limits={"max_shards": 2}, passes=2, grace_seconds=0, gate={"champion": "score"})


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, str]:
    """An inbox with all shards, and a registry with version 0 of "model", whose spec has parts."""
    registered(str(tmp_path / "dataset"), str(tmp_path / "base"))
    inbox, registry = str(tmp_path / "inbox"), str(tmp_path / "registry")
    begin(str(tmp_path / "base"), inbox, registry)
    return inbox, registry


@pytest.fixture
def expected(place: tuple[str, str], tmp_path: Path) -> tuple[str, str]:
    """What one process comes to."""
    inbox, registry = str(tmp_path / "alone" / "inbox"), str(tmp_path / "alone" / "registry")
    begin(str(tmp_path / "base"), inbox, registry)
    doors.drain(inbox, registry, "model", SETTINGS)
    return bits(VersionLog(open_store(registry), "model"))


def environment(**more: str) -> dict[str, str]:
    """Of a process that is no rank, and that finds this tree."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TORCH"))}
    return inherited | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | more


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tidemill", *arguments]


def torchrun(*options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *options,
        "-m",
        "tidemill",
    ]


@contextmanager
def started(arguments: list[str], folder: Path, **more: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that is killed in the end, and whoever it has started."""
    with (folder / "err").open("w") as err:
        process = subprocess.Popen(
            arguments, env=environment(**more), cwd=folder, stdout=subprocess.PIPE, stderr=err, text=True
        )
    family: list[psutil.Process] = []
    try:
        yield process
        family = family_of(process)
    finally:
        for each in [*family, process]:
            if each.pid is not None and psutil.pid_exists(each.pid):
                each.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]", folder: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that ends by itself."""
    out, _ = process.communicate(timeout=SECONDS)
    return process.returncode, out, (folder / "err").read_text()


def family_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """All processes below it."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def rank_of(process: psutil.Process) -> int | None:
    """Which rank a process is that torchrun has started."""
    try:
        found = process.environ()
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return None
    return int(found["RANK"]) if "TORCHELASTIC_RUN_ID" in found and "RANK" in found else None


def ranks_of(process: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """The ranks that live now."""
    found = {rank_of(each): each for each in family_of(process)}
    return {rank: each for rank, each in found.items() if rank is not None}


def head(registry: str) -> int:
    return VersionLog(open_store(registry), "model").head().number


def check(place: tuple[str, str], expected: tuple[str, str], shards: dict[str, bytes] = INBOX) -> None:
    log = VersionLog(open_store(place[1]), "model")
    audit(log, shards.items())
    assert waiting(place[0]) == []
    assert bits(log) == expected


def test_ranks_drain_an_inbox_with_the_bits_of_one_process(
    place: tuple[str, str], expected: tuple[str, str], tmp_path: Path
) -> None:
    arguments = command("follow", *place, "model", "--mode", "drain", "--ranks", "2", "--json", *FLAGS)
    with started(arguments, tmp_path) as process:
        code, out, err = ended(process, tmp_path)
    assert code == 0, err
    assert json.loads(out)["head"] == head(place[1])
    assert "2 ranks train together" in err
    check(place, expected)


@pytest.mark.ranks
def test_a_follower_goes_on_after_each_of_its_ranks_was_killed_and_stops_when_it_is_asked_to(
    place: tuple[str, str], expected: tuple[str, str], tmp_path: Path
) -> None:
    inbox, _ = place
    shards = sorted(INBOX)
    for key in shards[1:]:
        open_store(inbox).delete(key)
    arguments = command("follow", *place, "model", "--ranks", "2", "--poll-seconds", "0.2", *FLAGS)
    arguments[arguments.index("--limits.max-shards") + 1] = "1"
    with started(arguments, tmp_path) as process:
        for number, key in enumerate(shards[1:], 1):
            wait_until(lambda: not waiting(inbox), seconds=SECONDS, what="a version")
            if number <= 4:
                victim = ranks_of(process)[number % 2]
                victim.kill()
                wait_until(lambda: not victim.is_running(), seconds=10, what="its end")  # noqa: B023
            fill(inbox, {key: INBOX[key]})
        wait_until(lambda: not waiting(inbox), seconds=SECONDS, what="the last version")
        process.send_signal(signal.SIGTERM)
        code, _, err = ended(process, tmp_path)
    assert code == 0, err
    assert "Traceback" not in err
    check(place, expected)


KILLED_SECONDS: Final = 30.0
"""After which torchrun kills a rank that does not end by SIGTERM, once another one has ended."""
WAITED_SECONDS: Final = 6.0


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "crew"])
def test_a_rank_that_is_frozen_is_killed_in_the_time_that_is_promised_and_all_go_on(
    rank: int, place: tuple[str, str], expected: tuple[str, str], tmp_path: Path
) -> None:
    inbox, _ = place
    late = sorted(INBOX)[2:]
    for key in late:
        open_store(inbox).delete(key)
    arguments = command("follow", *place, "model", "--ranks", "2", "--poll-seconds", "0.2", *FLAGS)
    with started(arguments, tmp_path, TIDEMILL_RANK_TIMEOUT_SECONDS=str(WAITED_SECONDS)) as process:
        wait_until(lambda: not waiting(inbox), seconds=SECONDS, what="a version")
        frozen = ranks_of(process)[rank]
        frozen.suspend()
        since = time.monotonic()
        fill(inbox, {key: INBOX[key] for key in late})
        wait_until(lambda: not frozen.is_running(), seconds=SECONDS, what="its end")
        assert time.monotonic() - since < WAITED_SECONDS + KILLED_SECONDS + 15, "15 seconds for a busy machine"
        wait_until(lambda: not waiting(inbox), seconds=SECONDS, what="the last version")
        process.send_signal(signal.SIGTERM)
        code, _, err = ended(process, tmp_path)
    assert code == 0, err
    check(place, expected)


@pytest.mark.ranks
def test_ranks_end_with_the_command_that_has_started_them(place: tuple[str, str], tmp_path: Path) -> None:
    """Killed: the leader ends after the step in hand, and with it the crew."""
    with started(command("follow", *place, "model", "--ranks", "2", *FLAGS), tmp_path) as process:
        wait_until(lambda: not waiting(place[0]), seconds=SECONDS, what="the shards are consumed")
        family = family_of(process)
        assert len(family) >= 3, "torchrun and two ranks"
        process.kill()
        wait_until(lambda: not any(each.is_running() for each in family), seconds=60, what="all of them end")
    audit(VersionLog(open_store(place[1]), "model"), INBOX.items())


@pytest.mark.ranks
def test_the_second_signal_kills_ranks_that_do_not_end(place: tuple[str, str], tmp_path: Path) -> None:
    """The leader is frozen, and cannot stop after the step in hand."""
    with started(command("follow", *place, "model", "--ranks", "2", *FLAGS), tmp_path) as process:
        wait_until(lambda: head(place[1]) > 0, seconds=SECONDS, what="a version")
        family = family_of(process)
        ranks_of(process)[0].suspend()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGINT)
        code, _, _ = ended(process, tmp_path)
        assert code != 0
        wait_until(lambda: not any(each.is_running() for each in family), seconds=30, what="all of them end")
    assert VersionLog(open_store(place[1]), "model").head().number > 0


@pytest.mark.ranks
def test_an_error_of_the_leader_ends_the_command_once_and_in_one_line(place: tuple[str, str], tmp_path: Path) -> None:
    """A layer that looks at a whole batch has no part of one: no restart would mend that."""
    (tmp_path / "norms.py").write_text("from torch import nn\n\ndef net(inputs): return nn.BatchNorm1d(1)\n")
    asked = ["--features", "a", "--target", "y", "--model.factory", "norms:net", "--parts", "2", "--ranks", "2"]
    with started(command("train", str(tmp_path / "dataset"), place[1], "model", *asked), tmp_path) as process:
        code, out, err = ended(process, tmp_path)
    assert (code, out) == (1, "")
    assert err.count("nn.GroupNorm") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("what", ["train", "follow"])
def test_ranks_that_cannot_share_the_parts_are_refused_before_any_starts(
    what: str, place: tuple[str, str], tmp_path: Path
) -> None:
    """The version that an online run goes on from has 4 parts."""
    asked = (
        [str(tmp_path / "dataset"), place[1], "other", "--features", "x", "--target", "y", "--parts", "4"]
        if what == "train"
        else [*place, "model"]
    )
    with started(command(what, *asked, "--ranks", "3"), tmp_path) as process:
        code, out, err = ended(process, tmp_path)
    assert (code, out) == (1, "")
    assert err == ("tidemill: parts: 4 parts of a batch cannot be shared out among 3 ranks: start 1, 2 or 4 of them\n")


def test_what_is_wrong_with_a_place_is_told_before_ranks_start(tmp_path: Path) -> None:
    with started(command("follow", "./inbox", "./registry", "model", "--ranks", "2"), tmp_path) as process:
        code, _, err = ended(process, tmp_path)
    assert code == 1
    assert err.startswith("tidemill: ")
    assert len(err.splitlines()) == 1


@pytest.mark.ranks
def test_torchrun_starts_the_command_itself(place: tuple[str, str], expected: tuple[str, str], tmp_path: Path) -> None:
    arguments = [*torchrun(), "follow", *place, "model", "--mode", "drain", "--json", *FLAGS]
    with started(arguments, tmp_path) as process:
        code, out, err = ended(process, tmp_path)
    assert code == 0, err
    assert json.loads(out)["head"] == head(place[1])
    check(place, expected)


@pytest.mark.ranks
def test_torchrun_that_restarts_ranks_on_its_own_store_is_refused_and_nothing_hangs(
    place: tuple[str, str], tmp_path: Path
) -> None:
    arguments = [*torchrun("--max-restarts=1"), "follow", *place, "model", "--mode", "drain", *FLAGS]
    with started(arguments, tmp_path) as process:
        code, out, err = ended(process, tmp_path)
    assert code != 0
    assert out == ""
    assert "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun" in err
    assert head(place[1]) == 0


# ---- what the launcher says ------------------------------------------------------------------------------------------
TORCH: Final = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_a_process_is_a_rank_only_if_it_was_entered_as_one() -> None:
    assert launched.place(TORCH) is None
    assert launched.place(TORCH | {launched.ENTERED: "torch"}) == Place(1, 2)
    assert launched.place(TORCH | {launched.ENTERED: "torch", "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}, True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_MAX_RESTARTS": "3"}, False),
    ],
)
def test_a_store_that_outlives_ranks_is_refused_where_ranks_are_started_again(
    said: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TORCH | said).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(launched.ENTERED, "")  # so that what is set is taken back
    monkeypatch.setattr(launched, "end_with_parent", lambda: None)
    if refused:
        with pytest.raises(RanksRefused, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
            launched.enter()
    else:
        assert launched.enter() == Place(1, 2)


def test_ranks_of_horovod_are_told_from_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}
    assert launched.place(said | {launched.ENTERED: "horovod"}) == Place(1, 2, "horovod")
    assert launched.place(said | {launched.ENTERED: "torch"}) is None
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksRefused, match="--backend horovod"):
        launched.enter()


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e-9"])
def test_a_time_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.TIMEOUT, given)
    with pytest.raises(RanksRefused, match=f"{launched.TIMEOUT} is '{given}'"):
        launched.timeout_seconds()


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "0"), ("first", "2"), ("0", "")])
def test_what_no_launcher_says_is_refused(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is none would wait for the others for ten minutes."""
    for name, value in (TORCH | {"RANK": rank, "WORLD_SIZE": size}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksRefused, match=f"RANK is '{rank}' and WORLD_SIZE is '{size}'"):
        launched.enter()


def test_what_keeps_ranks_from_starting_is_told_before_any_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCH, "HOROVOD_RANK", "HOROVOD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RanksRefused, match="horovodrun has not started this process"):
        torchrun_command.entered(1, "horovod")
    with pytest.raises(RanksRefused, match="--ranks starts torchrun"):
        torchrun_command.entered(2, "horovod")
    assert torchrun_command.entered(2, "torch") is None
    monkeypatch.setenv(launched.TIMEOUT, "soon")
    with pytest.raises(RanksRefused, match=launched.TIMEOUT):
        torchrun_command.entered(2, "torch")
    assert torchrun_command.entered(1, "torch") is None, "one process waits for nobody"


def test_ranks_that_would_share_a_gpu_are_refused() -> None:
    with pytest.raises(
        RanksRefused, match=r"^2 ranks of this host are to compute on CUDA devices, of which it has 1, "
    ):
        launched.check_devices("cuda", 1, {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(
        RanksRefused, match=r"^3 ranks of this host are to compute on CUDA devices, of which it has 2, "
    ):
        launched.check_devices("cuda", 2, {"LOCAL_WORLD_SIZE": "3", "CUDA_VISIBLE_DEVICES": "0,1"})
    for device, here in (("cpu", {"LOCAL_WORLD_SIZE": "2"}), ("cuda", {"LOCAL_WORLD_SIZE": "1"}), ("cuda", {})):
        launched.check_devices(device, 1, here)


def test_ranks_that_are_each_shown_a_gpu_of_their_own_are_not_refused() -> None:
    """Each counts one, whatever the host has."""
    launched.check_devices("cuda", 1, {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"})


def test_a_port_that_is_none_and_one_that_is_taken_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "first")
    with pytest.raises(RanksRefused, match="MASTER_PORT is 'first'"):
        transport.connected(Place(0, 2), 1.0)
    with socket.socket() as taken, pytest.MonkeyPatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        patch.setattr(os, "_exit", exit_instead)
        with pytest.raises(SystemExit, match=str(os.EX_TEMPFAIL)):
            transport.connected(Place(0, 2), 1.0)
    assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), where ranks meet, cannot be used" in caplog.text


@pytest.mark.parametrize(
    ("code", "asked", "left"), [(143, False, False), (143, True, True), (1, False, True), (0, False, True)]
)
def test_a_signal_that_nobody_has_sent_to_the_command_is_torchruns_and_leaves_no_exit_code(
    code: int, asked: bool, left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the leader so too when another rank has died: else a training would end there, in place of going on."""
    for name, value in (TORCH | {"RANK": "0", launched.ENTERED: "torch"}).items():
        monkeypatch.setenv(name, value)
    result = tmp_path / "exit-code"
    monkeypatch.setenv(torchrun_command.RESULT, str(result))
    if asked:
        torchrun_command.was_asked(result).touch()
    assert torchrun_command.left_for_launcher(code) == (0 if left else code)
    assert result.exists() is left


def exit_instead(code: int) -> NoReturn:
    raise SystemExit(code)

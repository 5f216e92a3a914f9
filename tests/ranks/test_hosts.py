"""Ranks on two hosts, with the S3 server on a third: a link is cut, and healed."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import psutil
import pytest
from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError

from tests.guarantees.audit import audit
from tests.guarantees.children import ONLINE, bits, fill, start_server, waiting
from tests.ranks.crews import INBOX, begin, registered
from tests.ranks.hosts import Hosts, running
from tests.s3_server import S3, seaweed, wait_until
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store
from tidemill.tasks.online import doors
from tidemill.tasks.ranks import launched

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: run it as root"),
]
SECONDS: Final = 180.0
BUCKET: Final = "tidemill-hosts"
PLACES: Final = f"s3://{BUCKET}/inbox", f"s3://{BUCKET}/registry"
ALONE: Final = f"s3://{BUCKET}/alone/inbox", f"s3://{BUCKET}/alone/registry"
FIRST, SECOND, THIRD = (dict(sorted(INBOX.items())[at : at + 3]) for at in (0, 3, 6))


# ---- what is called on the host of the store -------------------------------------------------------------------------
def prepare(s3: S3) -> None:
    """Version 0, and what one process makes of all shards."""
    with s3.client() as client:
        wait_until(lambda: has_bucket(client), seconds=60, what="the S3 server")
    base = f"s3://{BUCKET}/base"
    registered(f"s3://{BUCKET}/dataset", base)
    for place in (ALONE, PLACES):
        begin(base, *place)
    for key in INBOX:
        open_store(PLACES[0]).delete(key)
    doors.drain(*ALONE, "model", ONLINE)


def has_bucket(client: BaseClient) -> bool:
    with suppress(ClientError, BotoCoreError):
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
        return True
    return False


def put(shards: dict[str, bytes]) -> None:
    fill(PLACES[0], shards)


def await_empty() -> None:
    wait_until(lambda: waiting(PLACES[0]) == [], seconds=SECONDS, what="an empty inbox")


def check() -> None:
    expected = bits(VersionLog(open_store(ALONE[1]), "model"))
    log = VersionLog(open_store(PLACES[1]), "model")
    audit(log, INBOX.items())
    assert bits(log) == expected


# ---- what runs on the hosts of the ranks -----------------------------------------------------------------------------
def torchrun(hosts: Hosts, host: str) -> list[str]:
    """The recipe of docs/scale.md for several hosts; the first keeps the rendezvous."""
    return [
        *hosts.inside(host),
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=20", "--rdzv-backend=c10d", "--rdzv-id=model"),
        f"--rdzv-endpoint={hosts.addresses['one']}:29400",
        f"--rdzv-conf=last_call_timeout=2,is_host={int(host == 'one')}",
        f"--local-addr={hosts.addresses[host]}",
        *("-m", "tidemill", "follow", *PLACES, "model", "--poll-seconds", "0.2"),
        *("--limits.max-shards", "2", "--passes", "2", "--grace-seconds", "0", "--gate.champion", "score"),
    ]


def environment(s3: S3) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_", "TORCH"))
    }
    return inherited | s3.environment() | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth",
        launched.SHARED_STORE: "1",
        launched.TIMEOUT: "20",
    }  # fmt: skip


def rank_below(process: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """The rank that lives on a host now, by the process that has started its torchrun."""
    for each in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "TORCHELASTIC_RUN_ID" in each.environ():
                return each
    return None


def of_how_many(process: "subprocess.Popen[bytes]") -> int:
    """How many ranks the one on a host is one of; 0: there is none."""
    with suppress(psutil.NoSuchProcess):
        rank = rank_below(process)
        return 0 if rank is None else int(rank.environ()["WORLD_SIZE"])
    return 0


@pytest.mark.timeout(600)
def test_a_link_is_cut_and_healed_and_the_bits_are_those_of_one_process(tmp_path: Path) -> None:
    start_server()
    with Hosts("one", "two", "store") as hosts, ExitStack() as stack:
        server = seaweed(tmp_path / "s3", hosts.addresses["store"], hosts.inside("store"))
        server.start(wait=False)
        stack.callback(server.kill)
        with pytest.MonkeyPatch.context() as patch:  # for what is called on the host of the store
            for name, value in server.s3.environment().items():
                patch.setenv(name, value)
            hosts.call("store", prepare, server.s3)
            ranks = {
                host: stack.enter_context(
                    running(torchrun(hosts, host), environment(server.s3), tmp_path / f"{host}.log")
                )
                for host in ("one", "two")
            }
            try:
                go_through(hosts, ranks)
            except (TimeoutError, AssertionError) as error:
                logs = "\n".join((tmp_path / f"{host}.log").read_text()[-5000:] for host in ranks)
                raise AssertionError(f"{error}\n{logs}") from None


def go_through(hosts: Hosts, ranks: dict[str, "subprocess.Popen[bytes]"]) -> None:
    one, two = ranks.values()
    wait_until(lambda: of_how_many(one) == of_how_many(two) == 2, seconds=SECONDS, what="two ranks")
    hosts.call("store", put, FIRST)
    hosts.call("store", await_empty)

    hosts.cut("two")
    wait_until(lambda: of_how_many(one) == 1, seconds=SECONDS, what="the first host goes on alone")
    hosts.call("store", put, SECOND)
    hosts.call("store", await_empty)

    hosts.heal("two")
    wait_until(lambda: of_how_many(one) == of_how_many(two) == 2, seconds=SECONDS, what="two ranks again")
    hosts.call("store", put, THIRD)
    hosts.call("store", await_empty)

    for process in ranks.values():
        process.send_signal(signal.SIGTERM)
    for process in ranks.values():
        process.wait(SECONDS)
    hosts.call("store", check)

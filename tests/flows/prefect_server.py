"""A real Prefect server for the tests, and the processes that talk to it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.s3_server import wait_until


def prefect_environment(home: Path) -> dict[str, str]:
    """Variables that keep a Prefect process to itself: its own database, no calls home, one thread."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        # A run's slot outlives a restart of the server
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # Look more often than the defaults do: nobody wants to wait for a test
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def running_prefect_server(folder: Path) -> Iterator[str]:
    """Start a server on a free port of 127.0.0.1; yields the URL of its API. Stopped by process id at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env=environment
            | prefect_environment(folder)
            | {"PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}/api"

        def healthy() -> bool:
            assert server.poll() is None, f"the Prefect server ended:\n{log.read_text()}"
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        wait_until(healthy, seconds=120, what=f"start of the Prefect server, see {log}")
        yield url
    finally:
        stop(server)


def stop(process: "subprocess.Popen[bytes]", number: signal.Signals = signal.SIGTERM) -> None:
    """Ask one process to end, and make it after a while."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

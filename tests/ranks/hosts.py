"""Hosts that are network namespaces of this machine, joined by a bridge in one more, and what runs on them. Needs root.

Addresses are those of 10.77.0.0/24, which nobody outside of the namespaces sees.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tests.guarantees.children import DEADLINE, start_child

_NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET of setns(2)


class Hosts:
    """Namespaces by name, each with one address on the bridge."""

    def __init__(self, *names: str) -> None:
        self._mark = f"tm{os.getpid()}"
        self._switch = f"{self._mark}-switch"
        self._names = names
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}

    def namespace(self, host: str) -> str:
        return f"{self._mark}-{host}"

    def __enter__(self) -> "Hosts":
        _ip("netns", "add", self._switch)
        self._at_switch("link", "add", "bridge", "type", "bridge")
        self._at_switch("link", "set", "bridge", "up")
        for host, address in self.addresses.items():
            inside = self.namespace(host)
            _ip("netns", "add", inside)
            self._at_switch("link", "add", host, "type", "veth", "peer", "name", "eth", "netns", inside)
            self._at_switch("link", "set", host, "master", "bridge", "up")
            _ip("-n", inside, "addr", "add", f"{address}/24", "dev", "eth")
            for device in ("eth", "lo"):
                _ip("-n", inside, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (*map(self.namespace, self._names), self._switch):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", namespace)

    def cut(self, host: str) -> None:
        """Nothing gets through to this host any more, nor from it."""
        self._at_switch("link", "set", host, "down")

    def heal(self, host: str) -> None:
        self._at_switch("link", "set", host, "up")

    def inside(self, host: str) -> list[str]:
        """What goes before a command that runs on a host."""
        return [shutil.which("ip") or "ip", "netns", "exec", self.namespace(host)]

    def call(self, host: str, work: Callable[..., None], *arguments: Any) -> None:
        """Call a function on a host, in a process of its own. Fails if it raises."""
        child = start_child(_on_host, f"/var/run/netns/{self.namespace(host)}", work, arguments)
        child.join(DEADLINE)
        assert child.exitcode == 0, f"{work.__name__} failed on {host}; its traceback is above"

    def _at_switch(self, *change: str) -> None:
        _ip("-n", self._switch, *change)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _on_host(namespace: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with open(namespace) as opened:
        assert ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), _NEW_NETWORK) == 0, os.strerror(
            ctypes.get_errno()
        )
    work(*arguments)


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process whose lines go to a file, and that is killed in the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()

"""`tidemill` for the shell blocks of the documents: each command is forked from a server that has imported what commands import.

    python -m tests.docs.warm SOCKET      the server
    python client.py SOCKET ARGUMENT...   one command (see CLIENT)

A command has the client's arguments, folder, environment and streams. Signals that the client gets are passed on; a client that
is killed takes its command along, as if it had been the command itself.

Nothing here may start a thread: a fork does not take threads along.
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Final

CLIENT: Final = """
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(server, [b"F"], [0, 1, 2])
    server.sendall(json.dumps(asked).encode() + b"\\n")
    answers = server.makefile()
    command = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os.kill(command, number))
    code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
"""Imports nothing heavy: it starts in a few hundredths of a second."""


def serve(path: str) -> None:
    """Answer until killed, or until the process that has started this one is gone."""
    parent = os.getppid()
    import pyarrow as pa
    import pyarrow.parquet
    import torch

    import tidemill.flows.cli
    import tidemill.storage.s3
    import tidemill.tasks.online.doors
    import tidemill.tasks.predict  # noqa: F401  # imported for the commands

    torch.set_num_threads(1)
    torch.nn.Linear(1, 1)(torch.from_dlpack(pa.array([1.0], pa.float32())).unsqueeze(1)).sum().backward()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        listening.settimeout(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
        while os.getppid() == parent:
            try:
                client, _ = listening.accept()
            except TimeoutError:
                continue
            client.setblocking(True)
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> None:
    """Fork the command, and tell its client how it ends. Only the command returns from here: it ends as any process does."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    asked = json.loads(client.makefile().readline())
    command = os.fork()
    if command == 0:
        client.close()
        _become(asked, streams)
        sys.exit(0)
    for stream in streams:
        os.close(stream)
    client.sendall(f"{command}\n".encode())
    ended = os.pidfd_open(command)
    gone, _, _ = select.select([client, ended], [], [])
    if ended not in gone:
        with suppress(ProcessLookupError):
            os.kill(command, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):
        client.sendall(f"{code}\n".encode())
    os._exit(0)


def _become(asked: dict[str, object], streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])  # type: ignore[call-overload]
    os.chdir(str(asked["folder"]))
    from tidemill.flows.cli import main

    sys.argv = ["tidemill", *asked["arguments"]]  # type: ignore[misc]
    main()


if __name__ == "__main__":
    serve(sys.argv[1])

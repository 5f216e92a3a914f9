"""`publish` in a process of its own that ends by SIGKILL at its n-th request, before that is sent or when its answer is there."""

import itertools
import os
import signal
import sys
from typing import Any

import requests


def main(registry: str, model: str, uri: str, kill_at: int, before: bool) -> None:
    """`kill_at`: from 1; 0: never."""
    count, send = itertools.count(1), requests.Session.send

    def counted(session: requests.Session, *args: Any, **named: Any) -> requests.Response:
        now = next(count) == kill_at
        if now and before:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = send(session, *args, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    requests.Session.send = counted  # type: ignore[method-assign]
    from tidemill.tasks.publishing.publish import publish

    print(publish(registry, model, uri).model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5] == "before")

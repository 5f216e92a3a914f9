"""The processes of a server: the port, the workers, and how they end.

uvicorn starts the workers, and another one for each that dies. All accept connections from one port, and a connection stays with
its worker.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from tidemill.storage.inbox import open_inbox
from tidemill.storage.log import VersionLog
from tidemill.storage.overlap import keep_out_of_dataset, keep_out_of_registry, named_datasets
from tidemill.storage.urls import open_store
from tidemill.tasks.errors import CannotServe, of_extra
from tidemill.tasks.settings import ServeSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    import uvicorn
    from starlette.routing import Router

logger = logging.getLogger("tidemill.serve")

TOKEN: Final = "TIDEMILL_TOKEN"
"""Environment variable: who asks for predictions or numbers must send this bearer token."""
BACKLOG: Final = 2048
"""Connections that wait until a worker takes them."""
IDLE_SECONDS: Final = 75
"""A connection is closed after this time without a request. Longer than the minute of most load balancers, which would otherwise
send a request into a connection that is just being closed."""
ENDING_SECONDS: Final = 20
"""How long requests that are under way have when a server ends. With the log it stays within Kubernetes' 30 seconds."""


def serve(registry: str, model: str, settings: ServeSettings) -> None:
    """Answer requests for predictions until SIGTERM or Ctrl-C; then finish those that are under way, and store the log.

    Args:
        registry: URL below which models live.
        model: Name of the model.
        settings: Where to listen, what to serve, and what a request may cost.

    Raises:
        MissingExtra: the packages of tidemill[serve] are not installed.
        CannotServe: the port cannot be had, or the token is empty.
        InvalidURL: there is no such store.
        PlacesOverlap: answers would be logged into the registry or a dataset of the model.
    """
    with of_extra("serve", "tidemill serve"):
        import httptools  # noqa: F401  # uvicorn's, and by name below
        import orjson  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
        import uvloop  # noqa: F401
        from uvicorn.supervisors import Multiprocess

    if os.environ.get(TOKEN) == "":  # a secret that was not filled in must not open the server to everybody
        raise CannotServe(f"{TOKEN} is set, and empty: give it a token, or unset it to let everybody ask")
    log = VersionLog(open_store(registry), model)
    if settings.log_to is not None:
        _check_place(log, open_inbox(settings.log_to).url)
    listening = listen(settings.host, settings.port)
    config = configured(partial(_application, registry, model, settings, url_of(listening)), settings.workers)
    if settings.workers == 1:
        try:
            uvicorn.Server(config).run([listening])
        except KeyboardInterrupt:  # raised again by uvicorn, once all is done
            return
    else:
        from tidemill.tasks.serving.metrics import of_several_workers

        class Workers(Multiprocess):
            def terminate_all(self) -> None:
                listening.close()  # or connections that nobody will take would still be let in
                super().terminate_all()

        with of_several_workers():
            Workers(config, [listening]).run()


def configured(application: "Callable[[], Router]", workers: int) -> "uvicorn.Config":
    """How uvicorn runs what `application` makes in each worker."""
    import uvicorn

    return uvicorn.Config(
        application,
        factory=True,
        workers=workers,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=ENDING_SECONDS,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        CannotServe: it cannot, and why.
    """
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)  # now: two that are bound and do not listen yet may have one port
    except OSError as error:
        raise CannotServe(
            f"port {port} of {host} cannot be listened on: {error.strerror or error}. Choose another one: --port, --host"
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a socket listens, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_place(log: VersionLog, inbox: str) -> None:
    """Shards that nobody looks for in a registry or a dataset would be taken for something else there."""
    keep_out_of_registry(log.url, "the inbox of --log-to", inbox)
    for dataset, number in named_datasets(log).items():
        keep_out_of_dataset(dataset, [("the inbox of --log-to", inbox)], f"the dataset of version {number}")


# ---- in each worker --------------------------------------------------------------------------------------------------
def _application(registry: str, model: str, settings: ServeSettings, url: str) -> "Router":
    if multiprocessing.parent_process() is not None:
        _as_in_the_parent()
        _end_with_parent()
    import torch

    from tidemill.tasks.serving.server import application

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more help no small request, and on busy cores they wait for each other
    return application(registry, model, settings, os.environ.get(TOKEN), url)


def _as_in_the_parent() -> None:
    """Log lines as the command line has them."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tidemill").setLevel(logging.INFO)


def _end_with_parent() -> None:
    """A worker whose parent was killed would hold the port, and nobody would restart it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="tidemill-parent", daemon=True).start()

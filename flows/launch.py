"""How a training starts, as a flow run or in plain Python: what can be known to be wrong is told before anything slow begins, and
a run whose Prefect server has gone ends all the same.

Prefect keeps the records of a run and shows them. What was trained lives in the registry alone.
"""

import functools
import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tidemill.flows import server

if TYPE_CHECKING:
    import pyarrow as pa
    from prefect import Flow

    from tidemill.tasks.batch import VersionInfo
    from tidemill.tasks.online.report import OnlineReport
    from tidemill.tasks.settings import BatchSettings, OnlineSettings
    from tidemill.tasks.tenants.pairs import Pair
    from tidemill.tasks.tenants.report import TenantsReport
    from tidemill.tasks.training.spec import Spec

logger = logging.getLogger("tidemill")

R = TypeVar("R")

PARTING_SECONDS: Final = 20.0
"""How long the records of a run may take to reach a Prefect server that answers, once the run is over."""
_DATABASE_BYTES: Final = 8 * 2**20
"""What the database of a new Prefect server takes, and some more."""
_RETRIES: Final = 2
"""Prefect repeats a request this often, after some 2 and 4 seconds. It would do so for a minute, three times in a row."""


class PrefectError(Exception):
    """Prefect's server or its folder cannot be used."""


# ---- the two ways ----------------------------------------------------------------------------------------------------
def train(
    dataset: "str | pa.Table",
    registry: str,
    model: str,
    spec: "Spec",
    settings: "BatchSettings",
    *,
    by_prefect: bool,
) -> "VersionInfo":
    """A batch training, as a flow run or in plain Python.

    Raises:
        Exception: see `tidemill.flows.calls.train`; of a flow run also what keeps Prefect from starting it.
    """
    if not by_prefect:
        from tidemill.tasks import batch

        return batch.train(dataset, registry, model, spec, settings)
    from tidemill.flows.batch import batch_training

    return _run(batch_training, dataset, registry, model, spec, settings)


def train_online(
    inbox: str, registry: str, model: str, settings: "OnlineSettings", *, by_prefect: bool
) -> "OnlineReport":
    """An online training in the mode of its settings, as a flow run or in plain Python.

    Raises:
        Exception: see `tidemill.flows.calls.drain`; of a flow run also what keeps Prefect from starting it.
    """
    if not by_prefect:
        from tidemill.tasks.online import doors

        plain = doors.drain if settings.mode == "drain" else doors.follow
        return plain(inbox, registry, model, settings)
    from tidemill.flows.online import online_training

    return _run(online_training, inbox, registry, model, settings)


def train_many(pairs: "Sequence[Pair]", settings: "OnlineSettings", learners: int) -> "TenantsReport":
    """An online training of many models, in plain Python and in the mode of its settings.

    Raises:
        PairsError, StorageError: two pairs may not stand beside each other.
    """
    from tidemill.tasks.tenants import doors

    plain = doors.drain if settings.mode == "drain" else doors.follow
    return plain(pairs, settings, learners=learners)


# ---- before either --------------------------------------------------------------------------------------------------
def before_training(
    dataset: str, registry: str, model: str, spec: "Spec", settings: "BatchSettings", ranks: int = 1
) -> None:
    """Look at all places of a batch training, and at the columns: a few requests, where a flow takes seconds to start.

    Raises:
        SpecError: `ranks` processes cannot share out the parts of a batch.
        StorageError: a place is not there, may not be used, or lies in another.
        ColumnError: a column is missing or cannot be used.
        FactoryError: the spec names what is not there.
    """
    from tidemill.storage.errors import Unavailable
    from tidemill.storage.log import open_log
    from tidemill.storage.overlap import keep_batch_apart
    from tidemill.tasks.checking import check_training
    from tidemill.tasks.sources import look_for_source

    check_ranks(ranks, spec.parts)
    find_own_modules()
    with suppress(Unavailable):  # the run tries again
        found, holdout = datasets_exist(dataset, settings.holdout_dataset)
        assert found is not None
        keep_batch_apart(open_log(registry, model), found, holdout)
        if settings.init_from is not None:
            look_for_source(settings.init_from)
        check_training(
            dataset if settings.where is None and settings.last is None else None, spec, settings.holdout_dataset
        )


def before_following(inbox: str, registry: str, model: str, settings: "OnlineSettings", ranks: int = 1) -> None:
    """Look at all places of an online training.

    Raises:
        SpecError: `ranks` processes cannot share out the parts of a batch.
        StorageError: a place is not there, may not be used, or lies in another; there is no such model.
    """
    from tidemill.storage.errors import Unavailable
    from tidemill.storage.inbox import open_inbox
    from tidemill.storage.log import open_log
    from tidemill.storage.urls import open_store
    from tidemill.tasks.online.places import keep_apart

    if settings.archive_to is not None:
        open_store(
            settings.archive_to
        )  # made when it is needed; a wrong URL may hold a secret, which Prefect must not store
    with suppress(Unavailable):  # the run tries again
        labels = None if settings.labels is None else settings.labels.inbox
        for url in (inbox, labels):
            if url is not None:
                open_inbox(url)  # refuses the name of a file, and a pattern, in its own words
        inboxes = must_exist(inbox, labels)
        datasets_exist(settings.gate.holdout_dataset, settings.gate.retrain_on)
        log = open_log(registry, model)
        keep_apart(log, [url for url in inboxes if url is not None], settings)
        check_ranks(ranks, log.head().manifest.spec.get("parts"))


def check_ranks(ranks: int, parts: int | None) -> None:
    """Raises SpecError: this number of ranks cannot share out the parts of a batch."""
    if ranks > 1 and parts is not None:
        from tidemill.tasks.training.spec import check_shares

        check_shares(parts, ranks)


def must_exist(*urls: str | None) -> list[str | None]:
    """The URLs of the stores at these URLs. Each store must be there.

    Raises:
        StorageError: there is no such folder or bucket, or it may not be read.
    """
    from tidemill.storage.urls import open_store

    stores = [None if url is None else open_store(url) for url in urls]
    for store in stores:
        if store is not None:
            next(iter(store.list(passed_over=lambda *_: None)), None)
    return [None if store is None else store.url for store in stores]


def datasets_exist(*urls: str | None) -> list[str | None]:
    """The same for datasets, each of which may be a single file.

    Raises:
        StorageError: there is no such folder, bucket or file, or it may not be read; or the URL is a pattern.
    """
    from tidemill.storage.errors import StoreNotFound

    try:
        return must_exist(*urls)
    except StoreNotFound:
        from tidemill.storage.dataset import look_for  # here, because it needs pyarrow

        return [None if url is None else look_for(url) for url in urls]


def find_own_modules() -> None:
    """Let `--model.factory mymodels:Net` find mymodels.py in the current folder; what is installed goes first.

    Raises:
        FileNotFoundError: the current folder has been removed. Torch's mathematical library would end the process.
    """
    folder = os.getcwd()
    if "" not in sys.path and folder not in sys.path:
        sys.path.append(folder)


def by_prefect(asked: bool) -> bool:
    """Whether a command is a flow run: if that was asked for, or a Prefect server is set up. Then Prefect is ready for it.

    Raises:
        PrefectError: see `_prepare`.
    """
    if not (asked or server.is_set_up()):
        return False
    _prepare()
    return True


def _prepare() -> None:
    """Import Prefect with our log lines going to its UI, and with time for a slow machine to start a temporary server.

    Raises:
        PrefectError: a temporary server would have no place for its database.
    """
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "tidemill")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", str(_RETRIES))
    # That the server has gone is told once, at the end
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
    logging.raiseExceptions = False
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a folder that cannot be made: with a server of its own, Prefect needs none
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    if PREFECT_API_URL.value():
        return
    if (problem := _unusable(home := PREFECT_HOME.value())) is not None:
        raise PrefectError(
            f"Prefect's folder {home} cannot be written ({problem}), and a temporary Prefect server keeps its database there. "
            "Let PREFECT_HOME name another folder, or PREFECT_API_URL a server that runs."
        )
    logger.info("PREFECT_API_URL is not set: a temporary Prefect server starts first, which takes up to a minute")


def _unusable(folder: Path) -> str | None:
    """Why no database can be written to a folder, which is made if need be; None if one can."""
    probe = folder / f".tidemill-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(_DATABASE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _run(flow: "Flow[..., R]", *arguments: Any) -> R:
    """Run a flow. If Prefect fails once the body of the flow has returned, what that returned is the result all the same.

    Raises:
        Exception: what the body of the flow raises, or what keeps Prefect from starting it.
    """
    from prefect.client.schemas.objects import State

    returned: list[Any] = []
    body = flow.fn

    @functools.wraps(body)
    def remembered(*args: Any, **named: Any) -> Any:
        returned.append(body(*args, **named))
        return returned[0]

    watched: Any = flow.with_options()
    watched.fn = remembered
    try:
        result: R = watched(*arguments)
    except Exception as error:
        if not returned or explained(error) is None:
            raise
        logger.warning(
            "the Prefect server does not answer, and was not told how this run ended. What was trained is committed."
        )
        last: Any = returned[0]
        value: Any = last.data if isinstance(last, State) else last
        result = value
    return result


def explained(error: Exception) -> str | None:
    """What an error of Prefect means; None if it is another's."""
    if isinstance(error, PrefectError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and text.startswith("Failed to reach API"):
        return (
            f"{text}, the Prefect server that PREFECT_API_URL or a profile names. Start it, or unset PREFECT_API_URL."
        )
    if isinstance(error, RuntimeError) and "ephemeral Prefect API server" in text:
        return (
            "the temporary Prefect server did not start. Let PREFECT_HOME name an empty folder with room for its database, or "
            "start a server of your own (`prefect server start`) and let PREFECT_API_URL name it."
        )
    if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "prefect"):
        return f"Prefect: {type(error).__name__}: {text[:300]}. What was committed stays; the same command goes on from there."
    return None


def _answers(url: str) -> bool:
    import urllib.error  # here, because they take a twentieth of the start of a light command
    import urllib.request

    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except urllib.error.HTTPError:  # an answer, if no friendly one
        return True
    except OSError:
        return False


def part(code: int) -> None:
    """Hand the last records to the Prefect server. If that takes too long the process ends here, with this exit code.

    Prefect would try for several seconds for each record, without end as far as a user can see.
    """
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return  # a temporary server lives as long as this process, and must be ended by it
    ends = time.monotonic() + (PARTING_SECONDS if _answers(PREFECT_API_URL.value()) else 0.5)
    workers: Iterable[Any] = (APILogWorker, EventsWorker)
    left = [worker.drain_all(timeout=max(0.0, ends - time.monotonic())).not_done for worker in workers]
    if any(left):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

"""How long each verb takes, and how many calls a second there are with several under way."""

import statistics
import time
from collections.abc import Callable
from typing import Final

from pydantic import BaseModel

from tidemill.storage.certify.trial import OBJECT, Trial
from tidemill.storage.errors import StorageError
from tidemill.storage.store import ObjectInfo

_RANGE_BYTES: Final = 4096


class Latency(BaseModel):
    """What one verb takes, one call after the other, on objects of 30 KB, as this process sees it: its own CPU time is in it."""

    verb: str
    calls: int
    p50_ms: float | None = None
    p99_ms: float | None = None
    """Of 100 calls, the second slowest."""
    failed: str | None = None
    """Why there are no numbers."""


def latencies(trial: Trial) -> list[Latency]:
    """One verb after the other, on as many objects as there are calls."""
    store, count = trial.store, trial.effort.calls
    keys = [f"latency/{number:04}" for number in range(count)]
    etags: dict[str, str] = {}

    def put(key: str, verb: Callable[[str], str]) -> None:
        etags[key] = verb(key)

    verbs: dict[str, Callable[[str], object]] = {
        "create": lambda key: put(key, lambda key: store.create(key, OBJECT).etag),
        "stat": store.stat,
        "read": store.read,
        "read 4 KB": lambda key: store.read(key, if_match=etags[key], start=_RANGE_BYTES, length=_RANGE_BYTES),
        "list": lambda key: [*store.list(key)],
        "replace": lambda key: put(key, lambda key: store.replace(key, OBJECT, if_match=etags[key]).etag),
        "delete": lambda key: store.delete(key, if_match=etags[key]),
    }
    return [_measured(verb, call, keys) for verb, call in verbs.items()]


def _measured(verb: str, call: Callable[[str], object], keys: list[str]) -> Latency:
    took = []
    try:
        for key in keys:
            began = time.perf_counter()
            call(key)
            took.append(1000 * (time.perf_counter() - began))
    except (StorageError, KeyError) as error:  # KeyError: no object was created
        return Latency(verb=verb, calls=len(took), failed=str(error))
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    return Latency(verb=verb, calls=len(took), p50_ms=cuts[49], p99_ms=cuts[98])


def rates(trial: Trial) -> dict[str, float]:
    """Calls a second with `IN_FLIGHT` under way, by verb, on what the check of listings has left."""
    store, infos = trial.store, [*trial.store.list("many/")]
    verbs: dict[str, Callable[[ObjectInfo], object]] = {
        "read": lambda info: store.read(info.key),
        "delete": lambda info: store.delete(info.key, if_match=info.etag),
    }
    for verb, call in verbs.items():
        began = time.monotonic()
        try:
            trial.many(call, infos)
        except StorageError:
            continue  # which promise does not hold, the table says
        trial.per_second[verb] = len(infos) / (time.monotonic() - began)
    return trial.per_second

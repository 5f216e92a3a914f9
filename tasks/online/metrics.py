"""Numbers of online runs for Prometheus: counted from what a run tells, shown by a scrape or in a file.

Each metric has its entry in `docs/operations.md`. Prometheus's client is imported only if somebody asks for the numbers; they
are in its default registry, so that Prefect's own endpoint of metrics (`PREFECT_CLIENT_METRICS_ENABLED`) shows them too.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from tidemill.storage.aliases import Alias
from tidemill.storage.manifest import Manifest
from tidemill.tasks.online.events import Committed, Looked, Stepped

if TYPE_CHECKING:
    from prometheus_client import Metric

    from tidemill.progress import Activity

logger = logging.getLogger("tidemill.metrics")


@dataclass(frozen=True)
class Told:
    """What Prometheus is told of a metric."""

    kind: Literal["gauge", "counter", "histogram", "summary"]
    help: str


METRICS: Final = {
    "tidemill_head_version": Told("gauge", "Number of the newest version."),
    "tidemill_champion_version": Told("gauge", "Version that the champion's alias names."),
    "tidemill_inbox_waiting_shards": Told("gauge", "Shards in the inbox that no version contains, at the last look."),
    "tidemill_inbox_oldest_timestamp_seconds": Told("gauge", "When the oldest of them was written; 0: none waits."),
    "tidemill_inbox_passed_over_objects": Told("gauge", "Objects in the inbox that stay until a person acts."),
    "tidemill_owed_objects": Told("gauge", "Consumed objects whose removal from the inbox failed so far."),
    "tidemill_last_look_timestamp_seconds": Told("gauge", "When the inbox was last listed."),
    "tidemill_last_commit_timestamp_seconds": Told("gauge", "When the newest version was committed."),
    "tidemill_refused_in_a_row": Told("gauge", "Versions in a row that the gate found worse than the champion."),
    "tidemill_failing": Told("gauge", "1 while the last turn of this model, in a run of many, has failed; else 0."),
    "tidemill_score": Told("gauge", "Scores of the last commit's shards, each before it was trained on."),
    "tidemill_versions": Told("counter", "Versions committed."),
    "tidemill_rows": Told("counter", "Rows trained on."),
    "tidemill_unlabelled_rows": Told(
        "counter", "Rows of consumed shards that no label came for in time: not trained on."
    ),
    "tidemill_unmatched_labels": Told("counter", "Labels row by row whose rows no shard had in time."),
    "tidemill_rejected_shards": Told("counter", "Shards rejected, to quarantine."),
    "tidemill_commit_lag_seconds": Told("histogram", "From the writing of a shard to the commit that contains it."),
    "tidemill_step_seconds": Told("summary", "Time of a step that committed."),
}
"""All of them; each has the label `model`, `tidemill_score` also `who` (learner, champion, or served: what was answered) and
`metric`, `tidemill_versions` also `kind`."""

LAG_BUCKETS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21_600.0, float("inf"))
"""Seconds. The largest but one is of a drain that is scheduled four times a day."""
WRITE_SECONDS: Final = 10.0
"""How often the file is written while a run goes on."""
LAST_WRITE_SECONDS: Final = 5.0
"""How long a run that ends waits for the file."""

_Labels = tuple[tuple[str, str], ...]
_PARTS: Final = ("", "_total", "_bucket", "_count", "_sum")
"""What the name of a sample has behind that of its metric."""


class Numbers:
    """The numbers of one model's runs. Listens to a run (`tidemill.progress`); threads may read them meanwhile."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._values: dict[tuple[str, _Labels], float] = {}
        """(name of a sample, its labels but for the model) -> value."""
        self._lock = threading.Lock()
        for name, labels in (
            ("tidemill_versions_total", {"kind": "online"}),
            ("tidemill_rows_total", {}),
            ("tidemill_unlabelled_rows_total", {}),
            ("tidemill_unmatched_labels_total", {}),
            ("tidemill_rejected_shards_total", {}),
        ):
            self._add(name, 0.0, **labels)  # there from the start: what appears with 1 has never increased
        self._set("tidemill_failing", 0.0)
        self._observe_lag([])
        self._add("tidemill_step_seconds_count", 0.0)
        self._add("tidemill_step_seconds_sum", 0.0)

    def begin(self, head: Manifest, champion: Alias | None) -> None:
        """Take in where the model stands before anything happens."""
        with self._lock:
            self._stands(head, None if champion is None else champion.version)
            if head.kind == "online":  # a scheduled drain that finds nothing writes them all the same
                self._scored(head)

    def failing(self, failing: bool) -> None:
        """Whether the last turn of this model, in a run of many, has failed."""
        with self._lock:
            self._set("tidemill_failing", float(failing))

    # ---- what happens ------------------------------------------------------------------------------------------------
    def on_activity(self, activity: "Activity") -> None:
        """Nothing: what is not committed does not count."""

    def on_event(self, event: object) -> None:
        with self._lock:
            match event:
                case Looked():
                    self._looked(event)
                case Committed():
                    self._committed(event)
                case Stepped(seconds=seconds):
                    self._add("tidemill_step_seconds_count", 1)
                    self._add("tidemill_step_seconds_sum", seconds)

    def _looked(self, found: Looked) -> None:
        self._set("tidemill_head_version", found.head)
        self._set("tidemill_inbox_waiting_shards", found.waiting)
        self._set("tidemill_inbox_oldest_timestamp_seconds", 0.0 if found.oldest is None else found.oldest.timestamp())
        self._set("tidemill_inbox_passed_over_objects", found.passed_over)
        self._set("tidemill_owed_objects", found.owed)
        self._set("tidemill_last_look_timestamp_seconds", time.time())

    def _committed(self, made: Committed) -> None:
        manifest = made.manifest
        self._stands(manifest, made.champion)
        self._set("tidemill_owed_objects", made.owed)
        self._add("tidemill_versions_total", 1, kind=manifest.kind)
        self._add("tidemill_rows_total", sum(shard.rows for shard in manifest.consumed))
        self._add("tidemill_unlabelled_rows_total", sum(shard.unlabelled for shard in manifest.consumed))
        self._add("tidemill_unmatched_labels_total", sum(each.unmatched for each in manifest.done_labels or ()))
        self._add("tidemill_rejected_shards_total", len(manifest.rejected))
        self._observe_lag([(manifest.created - shard.last_modified).total_seconds() for shard in manifest.consumed])
        self._scored(manifest)

    def _scored(self, manifest: Manifest) -> None:
        own = manifest.metrics
        for who, scores in (("learner", own), ("champion", own.get("champion", {})), ("served", own.get("served", {}))):
            for metric, score in scores.items():
                if isinstance(score, int | float):
                    self._set("tidemill_score", score, who=who, metric=metric)

    def _stands(self, head: Manifest, champion: int | None) -> None:
        self._set("tidemill_head_version", head.version)
        if champion is not None:
            self._set("tidemill_champion_version", champion)
        self._set("tidemill_last_commit_timestamp_seconds", head.created.timestamp())
        self._set("tidemill_refused_in_a_row", 0 if head.gate is None else head.gate.refusals)

    def _observe_lag(self, lags: list[float]) -> None:
        for bucket in LAG_BUCKETS:
            within = sum(lag <= bucket for lag in lags)
            self._add(
                "tidemill_commit_lag_seconds_bucket", within, le="+Inf" if bucket == float("inf") else str(bucket)
            )
        self._add("tidemill_commit_lag_seconds_count", len(lags))
        self._add("tidemill_commit_lag_seconds_sum", sum(max(0.0, lag) for lag in lags))

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._values[name, tuple(sorted(labels.items()))] = float(value)

    def _add(self, name: str, value: float, **labels: str) -> None:
        key = name, tuple(sorted(labels.items()))
        self._values[key] = self._values.get(key, 0.0) + value

    # ---- as Prometheus wants them ------------------------------------------------------------------------------------
    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """(name, labels, value) of each."""
        with self._lock:
            return [
                (name, {"model": self.model, **dict(labels)}, value) for (name, labels), value in self._values.items()
            ]

    def go_on_from(self, sample: str, labels: dict[str, str], value: float) -> None:
        """Count on from what an earlier process counted; `labels` without that of the model."""
        with self._lock:
            self._set(sample, value, **labels)


def _go_on_from(path: Path, models: Mapping[str, Numbers]) -> None:
    """Count on from a file that an earlier process wrote, so that counters of scheduled drains only ever rise.

    Raises:
        OSError, ValueError: there is such a file, and it cannot be read.
    """
    from prometheus_client.parser import text_string_to_metric_families

    if not path.is_file():  # none yet; or a device, which may have no end
        return
    for family in text_string_to_metric_families(path.read_text()):
        if (told := METRICS.get(family.name)) is None or told.kind == "gauge":
            continue
        for sample in family.samples:
            labels = dict(sample.labels)
            if (numbers := models.get(labels.pop("model", ""))) is not None:
                numbers.go_on_from(sample.name, labels, sample.value)


class _Collector:
    """The numbers of all models that this process trains, as a collector of Prometheus's client."""

    def __init__(self) -> None:
        self.models: dict[str, Numbers] = {}
        self.registered = False

    def describe(self) -> "list[Metric]":
        """Their names, which one registry knows once."""
        return list(_families({}))

    def collect(self) -> "Iterator[Metric]":
        return _families(self.models)


def _families(models: dict[str, Numbers]) -> "Iterator[Metric]":
    from prometheus_client import Metric

    families = {name: Metric(name, told.help, told.kind) for name, told in METRICS.items()}
    own = {f"{name}{part}": family for name, family in families.items() for part in _PARTS}
    for numbers in list(models.values()):
        for sample, labels, value in numbers.samples():
            own[sample].add_sample(sample, labels, value)
    yield from families.values()


_collector = _Collector()
_registering = threading.Lock()


def numbers_of(model: str) -> Numbers:
    """The numbers of a model in this process, from now on in the default registry of Prometheus's client."""
    from prometheus_client import REGISTRY

    with _registering:
        if not _collector.registered:
            REGISTRY.register(_collector)
            _collector.registered = True
        return _collector.models.setdefault(model, Numbers(model))


# ---- the file --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def written_to(path: Path, *models: Numbers) -> Iterator[None]:
    """While the context is open, and once more when it ends, the numbers of these are written to a file, whole or not at all.

    It is for a textfile collector, such as node exporter's. A thread writes it: a full or a slow disk does not hold up a run.
    """
    from prometheus_client import CollectorRegistry, write_to_textfile

    # One of its own: node exporter has metrics of its own process, and refuses files with the same names
    registry = CollectorRegistry()
    alone = _Collector()
    alone.models |= {numbers.model: numbers for numbers in models}
    registry.register(alone)
    over, told = threading.Event(), list[str]()

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(path), registry)
        except OSError as error:
            if not told:
                told.append(str(error))
                logger.warning("metrics cannot be written to %s: %s. The run goes on", path, error.strerror or error)

    def write_now_and_then() -> None:
        while not over.wait(WRITE_SECONDS):
            write()
        write()

    try:
        _go_on_from(path, alone.models)
    except (OSError, ValueError) as error:
        logger.warning("metrics of earlier runs in %s cannot be read, and are counted anew: %s", path, error)
    writer = threading.Thread(target=write_now_and_then, name="tidemill-metrics", daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join(LAST_WRITE_SECONDS)


def wanted_by_prefect() -> bool:
    """Whether Prefect's client serves metrics, which ours may stand beside."""
    return os.environ.get("PREFECT_CLIENT_METRICS_ENABLED", "").lower() in ("1", "true", "yes", "on")

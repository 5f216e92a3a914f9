"""Chaos on a real S3 server: trainers, garbage collection and a producer at once; workers killed and frozen, the server killed.

    python -m tests.guarantees.chaos [--minutes 30] [--seed 0] [--workers 4] [--folder NEW]

The last worker collects garbage; the others train, all of them one model from one inbox. Every choice of this driver derives
from the seed: what is put when, who is hit when. What the processes do in between is up to the machine, so that two runs of one
seed differ. It ends with the audit of all that was put, and with exit code 1 if that fails; then the folder is kept. Linux only.
"""

import argparse
import ctypes
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, Literal
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError

from tests.guarantees.audit import audit
from tests.guarantees.children import (
    BATCH,
    DATASET,
    SPEC,
    collect_garbage,
    fill,
    start_child,
    start_server,
    table,
    train,
    waiting,
)
from tests.s3_server import S3, Server, running_server, wait_until
from tidemill.storage.aliases import all_aliases
from tidemill.storage.disposal import quarantined
from tidemill.storage.errors import StorageError, Unavailable
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import sha256
from tidemill.storage.s3 import S3Store
from tidemill.storage.store import Store
from tidemill.storage.tombstones import WINDOW
from tidemill.storage.urls import open_store
from tidemill.tasks.online import step as online
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.stopping import stop_on_signals

BUCKET, MODEL = "chaos", "model"
REGISTRY, INBOX = f"s3://{BUCKET}/registry", f"s3://{BUCKET}/inbox"

ONLINE = OnlineSettings(mode="follow", limits={"max_shards": 8}, grace_seconds=1, poll_seconds=0.2)
KEEP = 3
"""How many versions keep their blobs: few, so that garbage collection is always near the head."""

PUTS_A_SECOND = 2.0
KILL_EVERY, STOP_EVERY, SERVER_KILL_EVERY = 3.0, 5.0, 30.0
"""Seconds, on average."""
PATIENCE = 5.0
"""For how many seconds the workers' stores retry: less than most outages last, so that steps fail and are begun again."""
DEADLINE = 120.0
"""Seconds for whatever must end by itself."""


# ---- what the seed decides -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Put:
    """One upload of the producer."""

    number: int
    kind: Literal["good", "late", "corrupt", "again"]
    key: str
    data: bytes


def upload(seed: int, number: int) -> Put:
    """A new shard; or one that sorts before all others, or that can never be used, or the same as an earlier one."""
    draw = random.Random(f"{seed}/put/{number}")
    kind = draw.choices(("good", "late", "corrupt", "again"), (75, 5, 8, 12))[0]
    if kind == "again":
        reach = min(number, WINDOW // 2)  # tombstones go back twice as far
        for earlier in range(number - 1 - int(reach * draw.random() ** 2), -1, -1):  # rather a recent one
            first = upload(seed, earlier)
            if first.kind in ("good", "late"):
                return Put(number, "again", first.key, first.data)
        kind = "good"
    data = table(draw.randint(40, 120), draw.getrandbits(60))
    if kind == "corrupt":
        data = unusable(draw, data)
    return Put(number, kind, f"0/{999_999 - number:06}.parquet" if kind == "late" else f"{number:06}.parquet", data)


def unusable(draw: random.Random, whole: bytes) -> bytes:
    """Bytes that must be rejected. The first three have no Parquet magic at both ends: a producer might still be writing."""
    rows = pq.read_table(io.BytesIO(whole))
    match draw.randrange(6):
        case 0:
            return b""
        case 1:
            return draw.randbytes(500)
        case 2:
            return whole[: len(whole) // 2]
        case 3:
            return b"PAR1" + draw.randbytes(500) + b"PAR1"
        case 4:
            rows = rows.drop_columns(["b"])
        case _:
            rows = rows.set_column(rows.schema.get_field_index("y"), "y", pa.array([float("inf")] * len(rows)))
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    return sink.getvalue()


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    """Seconds after the start."""
    what: Literal["kill", "stop", "kill server"]
    worker: int = 0
    seconds: float = 0.0
    """How long the worker stays frozen, or the server dead."""


def plan(seed: int, seconds: float, workers: int) -> list[Fault]:
    """All faults of a run. The first worker is never killed, only frozen: its memory tells of the whole run."""
    draw = random.Random(f"{seed}/faults")
    faults = []
    at = 0.0
    while (at := at + draw.expovariate(1 / KILL_EVERY)) < seconds:
        faults.append(Fault(at, "kill", draw.randrange(1, workers)))
    at = 0.0
    while (at := at + draw.expovariate(1 / STOP_EVERY)) < seconds:
        faults.append(Fault(at, "stop", draw.randrange(workers), 10 ** draw.uniform(-0.5, 1)))
    outages = max(1, round(seconds / SERVER_KILL_EVERY))
    for outage in range(outages):
        at, down = (outage + draw.uniform(0.2, 0.5)) * seconds / outages, draw.uniform(0, 6)
        faults.append(Fault(at, "kill server", seconds=down))
        if draw.random() < 1 / 3:  # and again while it starts
            faults.append(Fault(at + down + draw.uniform(0, 3), "kill server", seconds=draw.uniform(0, 2)))
    return sorted(faults, key=lambda fault: fault.at)


# ---- the processes ---------------------------------------------------------------------------------------------------
class Notes:
    """What the processes leave word of, in a file that outlives them: one line for each event, written at once."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "notes.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, event: str, number: int = 1) -> None:
        os.write(self._file, json.dumps([event, number]).encode() + b"\n")


def _work(task: Callable[..., None], name: str, folder: Path, arguments: tuple[Any, ...]) -> None:
    """The body of every process."""
    _die_with_driver()
    output = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    logging.basicConfig(format="%(asctime)s %(process)d %(message)s")
    logging.getLogger("tidemill").setLevel(logging.INFO)
    notes = Notes(folder)
    try:
        task(notes, *arguments)
    except Exception as error:  # whatever it is, the table at the end counts it
        notes.add(f"error {type(error).__name__}")
        raise


def _die_with_driver() -> None:
    """However the driver ends, this process ends too, even frozen: the first to see it kills the server of the forks."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with that server
    driver, fork_server = multiprocessing.parent_process(), os.getppid()
    assert driver is not None

    def watch() -> None:
        wait_for_any([driver.sentinel])
        if os.getppid() == fork_server:
            os.kill(fork_server, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def impatient(url: str) -> Store:
    """The store at this URL, which gives up early."""
    store = open_store(url)
    assert isinstance(store, S3Store)
    store.retry_seconds = PATIENCE
    return store


def follow(notes: Notes) -> None:
    """What the online flow does, without Prefect; but however often the store is away, it is tried again."""
    run, idle = None, False
    with stop_on_signals() as stop:
        while not stop:
            try:
                if run is None:
                    run = online.OnlineRun(INBOX, REGISTRY, MODEL, ONLINE, impatient)
                idle = not run.poll() if idle else _step(run, notes) is online.Outcome.IDLE
            except Unavailable as error:
                notes.add("unavailable")
                logging.getLogger("tidemill").warning("to be tried again: %s", error)
                idle = False
            if idle:
                stop.wait(ONLINE.poll_seconds)


def _step(run: online.OnlineRun, notes: Notes) -> online.Outcome:
    before = run.report.duplicates
    try:
        done = online.step(run)
    finally:
        if again := run.report.duplicates - before:
            notes.add("duplicates", again)
    if done.version is not None:
        notes.add("head", done.version)
    if done.outcome is online.Outcome.LOST:
        notes.add("lost")
    return done.outcome


def finish(notes: Notes) -> None:
    """Train until the inbox is empty, also of what is in its grace period; then nothing may be owed."""
    run = online.OnlineRun(INBOX, REGISTRY, MODEL, ONLINE)
    wait_until(
        lambda: _step(run, notes) is online.Outcome.IDLE and not waiting(INBOX), seconds=DEADLINE, what="an empty inbox"
    )
    run.forget()
    run.head()
    assert run.report.owed == 0, f"{run.report.owed} shards are still owed"


def collect(notes: Notes) -> None:
    """Garbage collection, over and over."""
    with stop_on_signals() as stop:
        while not stop:
            try:
                collect_garbage(impatient, REGISTRY, KEEP)
            except Unavailable:
                notes.add("unavailable")
            stop.wait(ONLINE.poll_seconds)


def produce(notes: Notes, folder: Path, s3: S3, seed: int) -> None:
    """Upload one after the other, each until it is acknowledged. The journal knows of each attempt before the server does."""
    begun = time.monotonic()
    with stop_on_signals() as stop, s3.client() as client, (folder / "journal.jsonl").open("a") as journal:
        for number in count():
            stop.wait(begun + number / PUTS_A_SECOND - time.monotonic())
            if stop:
                return
            attempt = partial(_put, client, upload(seed, number), journal, count(1))
            wait_until(attempt, seconds=DEADLINE, what=f"upload {number}")


def _put(client: BaseClient, put: Put, journal: IO[str], attempts: Iterator[int]) -> bool:
    """One attempt: True if the store has the shard, False if it must be tried again as nothing is known."""
    attempt = next(attempts)
    _write(journal, {"number": put.number, "attempt": attempt, "key": put.key, "sha256": sha256(put.data)})
    condition = {} if put.kind == "again" else {"IfNoneMatch": "*"}
    try:
        client.put_object(Bucket=BUCKET, Key=f"inbox/{put.key}", Body=put.data, **condition)
    except EndpointConnectionError:
        _write(journal, {"number": put.number, "refused": attempt})  # nobody listened: it cannot have been applied
        return False
    except BotoCoreError:
        return False
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= 500:
            return False
        if status != 412 or attempt == 1:  # 412 later on: an attempt was applied, whose answer was lost
            raise
    _write(journal, {"number": put.number, "acknowledged": attempt})
    return True


def _write(journal: IO[str], line: dict[str, Any]) -> None:
    journal.write(json.dumps(line) + "\n")
    journal.flush()


# ---- the driver ------------------------------------------------------------------------------------------------------
@dataclass
class Result:
    """What happened, and whether the guarantees held."""

    seed: int
    minutes: float
    versions: int = 0
    puts: int = 0
    consumed: int = 0
    rejected: int = 0
    rejected_again: int = 0
    """Of `rejected`: unusable shards that came twice, as the producer's first attempt was applied without an answer."""
    duplicates: int = 0
    worker_kills: int = 0
    worker_stops: int = 0
    server_kills: int = 0
    lost_races: int = 0
    unavailable: int = 0
    """Calls and steps of workers that failed with `Unavailable`, and were begun again."""
    unanswered: int = 0
    """Uploads that the server may have applied or not, and that were sent again."""
    errors: dict[str, int] = field(default_factory=dict)
    """Workers that ended by any other error, by its name; they were started again."""
    rss_mb: float = 0.0
    """The most that any worker ever held."""
    early_rss_mb: float = 0.0
    """The most that the first worker, which is never killed, held in the first quarter of the run."""
    late_rss_mb: float = 0.0
    """The same at the end."""
    failure: str | None = None
    """Why the audit failed."""

    def __str__(self) -> str:
        rows = {
            "seed": self.seed,
            "minutes": f"{self.minutes:g}",
            "versions": self.versions,
            "uploads": self.puts,
            "shards consumed": self.consumed,
            "shards rejected": f"{self.rejected} ({self.rejected_again} of them again, sent by a producer without an answer)",
            "duplicates removed": self.duplicates,
            "worker kills": self.worker_kills,
            "worker stops": self.worker_stops,
            "server kills": self.server_kills,
            "lost races": self.lost_races,
            "unavailable errors": self.unavailable,
            "uploads sent again": self.unanswered,
            "other errors": ", ".join(f"{name} {number}" for name, number in self.errors.items()) or "none",
            "most RSS of a worker": f"{self.rss_mb:.0f} MB",
            "most RSS of worker 0": f"{self.early_rss_mb:.0f} MB in the first quarter, {self.late_rss_mb:.0f} MB at the end",
            "audit": "passed" if self.failure is None else "FAILED",
        }
        return "\n".join(f"{name:24}{value}" for name, value in rows.items())


def run(seconds: float, seed: int, workers: int, folder: Path, say: Callable[[str], None] = print) -> Result:
    """Chaos for `seconds`, then peace, and the audit. Everything is in `folder`, which is new or empty."""
    torch.set_num_threads(1)  # as in the workers: the audit trains everything again, and compares bits
    result = Result(seed, seconds / 60)
    start_server()  # it imports torch while the S3 server starts
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with running_server(folder) as server, patch.dict(os.environ, others | server.s3.environment(), clear=True):
        with server.s3.client() as client:
            client.create_bucket(Bucket=BUCKET)
        fill(f"s3://{BUCKET}/dataset", DATASET)
        train(open_store, f"s3://{BUCKET}/dataset", REGISTRY, SPEC, BATCH)
        with ThreadPoolExecutor(1) as pool:
            chaos = _Chaos(result, folder, server, pool, workers, say)
            try:
                chaos.rage(seconds)
                chaos.calm()
                verify(result, folder)
            except (AssertionError, StorageError, TimeoutError):
                result.failure = traceback.format_exc()
            finally:
                chaos.end()
    return result


class _Worker:
    """A process, and another one each time that it dies."""

    def __init__(self, task: Callable[..., None], name: str, folder: Path) -> None:
        self.name = name
        self._start = partial(start_child, _work, task, name, folder, ())
        self.restart()

    def restart(self) -> None:
        self.process, self.frozen = self._start(), False

    def freeze(self, frozen: bool) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it ended just now
            os.kill(self.process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)
        self.frozen = frozen


class _Chaos:
    """The server, the processes, and what is done to them when. One thread: the server dies with the one that started it."""

    def __init__(
        self,
        result: Result,
        folder: Path,
        server: Server,
        pool: ThreadPoolExecutor,
        workers: int,
        say: Callable[[str], None],
    ) -> None:
        self._result, self._folder, self._server, self._pool, self._say = result, folder, server, pool, say
        self._ready: Future[None] | None = None
        self._down = False
        Notes(folder)  # makes the file
        self._notes = (folder / "notes.jsonl").open()
        self._head = 0
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()  # of actions at the same time
        self._workers = [_Worker(follow, f"trainer-{i}", folder) for i in range(workers - 1)]
        self._workers.append(_Worker(collect, "collector", folder))
        self._producer = start_child(_work, produce, "producer", folder, (folder, server.s3, result.seed))
        self._begun = time.monotonic()

    @property
    def _now(self) -> float:
        return time.monotonic() - self._begun

    def _at(self, at: float, action: Callable[[], None]) -> None:
        heappush(self._actions, (at, next(self._order), action))

    # ---- the time of faults ------------------------------------------------------------------------------------------
    def rage(self, seconds: float) -> None:
        """Carry out the plan, and start again at once what died."""
        for fault in plan(self._result.seed, seconds, len(self._workers)):
            self._at(fault.at, partial(self._strike, fault))
        self._at(seconds / 4, self._end_first_quarter)
        self._at(0, self._measure)
        self._at(0, self._progress)
        while self._now < seconds:
            while self._actions[0][0] <= self._now:
                heappop(self._actions)[2]()
            if self._ready is not None and self._ready.done():
                self._ready.result()  # raises if the server did not come back
            sentinels = [process.sentinel for process in (self._producer, *(w.process for w in self._workers))]
            wait_for_any(sentinels, timeout=max(0.0, self._actions[0][0] - self._now))
            assert self._producer.exitcode is None, f"the producer ended, see {self._folder}/producer.log"
            for worker in self._workers:
                if worker.process.exitcode is not None:
                    worker.restart()

    def _strike(self, fault: Fault) -> None:
        if fault.what == "kill server":
            self._server.kill()
            self._down, self._ready = True, None
            self._result.server_kills += 1
            self._at(fault.at + fault.seconds, self._revive)
            return
        worker = self._workers[fault.worker]
        if fault.what == "kill":
            worker.process.kill()
            worker.process.join()
            worker.restart()
            self._result.worker_kills += 1
        elif not worker.frozen:
            worker.freeze(True)
            self._result.worker_stops += 1
            self._at(fault.at + fault.seconds, partial(self._thaw, worker, worker.process))

    def _thaw(self, worker: _Worker, process: BaseProcess) -> None:
        """Let the process go on, unless it has been killed meanwhile."""
        if worker.process is process:
            worker.freeze(False)

    def _revive(self) -> None:
        self._server.start(wait=False)
        self._down, self._ready = False, self._pool.submit(self._server.wait_until_ready)

    def _measure(self) -> None:
        peaks = [_peak_rss_mb(worker.process) for worker in self._workers]
        self._result.rss_mb = max(self._result.rss_mb, *peaks)
        self._result.late_rss_mb = max(self._result.late_rss_mb, peaks[0])
        self._at(self._now + 1, self._measure)

    def _end_first_quarter(self) -> None:
        self._result.early_rss_mb = self._result.late_rss_mb

    def _progress(self) -> None:
        self._read_notes()
        done = self._result
        self._say(
            f"{self._now:6.0f} s: version {self._head}, lost races {done.lost_races}, worker kills {done.worker_kills}, "
            f"stops {done.worker_stops}, server kills {done.server_kills}, unavailable {done.unavailable}, "
            f"other errors {sum(done.errors.values())}, RSS {done.rss_mb:.0f} MB"
        )
        self._at(self._now + 10, self._progress)

    def _read_notes(self) -> None:
        for line in self._notes:
            event, number = json.loads(line)
            match event.split():
                case ["head"]:
                    self._head = max(self._head, number)
                case ["lost"]:
                    self._result.lost_races += number
                case ["unavailable"]:
                    self._result.unavailable += number
                case ["duplicates"]:
                    self._result.duplicates += number
                case ["error", name]:
                    self._result.errors[name] = self._result.errors.get(name, 0) + number

    # ---- the time after ----------------------------------------------------------------------------------------------
    def calm(self) -> None:
        """Let everything end by itself, and let a new trainer do what is left."""
        if self._down:
            self._revive()
        if self._ready is not None:
            self._ready.result(DEADLINE)
        for worker in self._workers:
            worker.freeze(False)
        for process in (self._producer, *(worker.process for worker in self._workers)):
            process.terminate()
            self._ended(process)
        self._ended(start_child(_work, finish, "finish", self._folder, ()))
        self._read_notes()

    def _ended(self, process: BaseProcess) -> None:
        process.join(DEADLINE)
        assert process.exitcode == 0, f"exit code {process.exitcode} at the end, see the logs in {self._folder}"

    def end(self) -> None:
        """Leave no process behind, whatever happened."""
        for process in (self._producer, *(worker.process for worker in self._workers)):
            process.kill()
            process.join()
        self._notes.close()


def _peak_rss_mb(process: BaseProcess) -> float:
    """The high-water mark that the kernel keeps; 0 for a process that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def verify(result: Result, folder: Path) -> None:
    """The audit, and what it does not know of: the inbox is empty, quarantine and retention hold what they must."""
    sent, attempts, acknowledged = _journal(folder)
    assert acknowledged == set(attempts) == set(range(len(attempts)))
    puts = [upload(result.seed, number) for number in sorted(attempts)]
    assert [(put.key, sha256(put.data)) for put in puts] == [sent[put.number] for put in puts], (
        "the code changed meanwhile"
    )
    result.puts, result.unanswered = len(attempts), attempts.total() - len(attempts)

    log = VersionLog(open_store(REGISTRY), MODEL)
    history = list(log.history(log.head()))
    rejected = Counter((shard.key, shard.sha256) for version in history for shard in version.manifest.rejected)
    result.versions, result.rejected = len(history), rejected.total()
    result.consumed = sum(len(version.manifest.consumed) for version in history)

    pairs, unusable_keys = [], set()
    for put in puts:
        if put.kind == "again":
            continue
        pairs.append((put.key, put.data))
        if put.kind == "corrupt":
            unusable_keys.add(put.key)
            # Rejected shards have no tombstones. One that was rejected before the producer, which had no answer, sent it again
            # is rejected again: as often as there were attempts, at most.
            extra = min(rejected[put.key, sha256(put.data)], attempts[put.number]) - 1
            pairs += [(put.key, put.data)] * extra
            result.rejected_again += max(extra, 0)
    audit(log, pairs)
    assert {key for key, _ in rejected} == unusable_keys, "a good shard was rejected, or an unusable one consumed"
    assert waiting(INBOX) == []
    assert {(kept["key"], kept["sha256"]) for kept in quarantined(log).values()} == set(rejected)
    collect_garbage(open_store, REGISTRY, KEEP)
    kept_versions = {version.number for version in history[:KEEP]} | set(all_aliases(log).values())
    retained = [version.manifest.blobs for version in history if version.number in kept_versions]
    assert {info.key for info in log.store.list(f"{MODEL}/blobs/")} == {
        ref.key for blobs in retained for ref in blobs.refs
    }


def _journal(folder: Path) -> tuple[dict[int, tuple[str, str]], Counter[int], set[int]]:
    """Key and sha256 of each upload, how many attempts of it may have been applied, and which were acknowledged."""
    sent: dict[int, tuple[str, str]] = {}
    attempts: Counter[int] = Counter()
    acknowledged: set[int] = set()
    for line in map(json.loads, (folder / "journal.jsonl").read_text().splitlines()):
        number = line["number"]
        if "acknowledged" in line:
            acknowledged.add(number)
        elif "refused" in line:
            attempts[number] -= 1
        else:
            sent[number] = line["key"], line["sha256"]
            attempts[number] += 1
    return sent, attempts, acknowledged


def main() -> int:
    """Run with the options of the command line, print the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults; the audit comes on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="trainers and one garbage collector, 3 at least")
    parser.add_argument("--folder", type=Path, help="a new or empty folder for data and logs, which is kept")
    options = parser.parse_args()
    if options.workers < 3:
        parser.error("--workers must be 3 at least: two trainers and the garbage collector")
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="tidemill-chaos-"))
    result = run(options.minutes * 60, options.seed, options.workers, folder, partial(print, flush=True))
    print(result)
    if result.failure is not None:
        print(f"\n{result.failure}\nData and logs are in {folder}")
        return 1
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The main job on real data: a batch model of January to June, then six months of daily shards, with one SIGKILL on the way.

Run by `make demo`. Everything it writes is below ./demo-data, which it makes anew. It starts one Prefect server of its own on
127.0.0.1, for all three runs, and stops it at the end.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from tidemill.storage.dataset import snapshot
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Consumed, sha256
from tidemill.storage.urls import open_store
from tidemill.tasks.training.loop import score
from tidemill.tasks.versions import load_learner

import data

HERE = Path(__file__).parent
ROOT = Path("demo-data")
DATASET, INBOX, ARCHIVE, REGISTRY = (str(ROOT / name) for name in ("dataset", "inbox", "archive", "registry"))
MODEL = "flights"
FOLLOW = ["follow", INBOX, REGISTRY, MODEL, "--mode", "drain", "--limits.max-shards", "4"]
ARCHIVED = ["--after-commit.archive-to", ARCHIVE]
KILL_AT = 20  # the version after which the online run is killed


def main() -> None:
    began = time.monotonic()
    shutil.rmtree(ROOT, ignore_errors=True)
    say("Preparing: January to June as a dataset, July to December as one shard a day")
    rows, shards = data.write_dataset(Path(DATASET)), data.drop_shards(Path(INBOX))
    print(f"{rows:,} flights in {DATASET}, {shards} shards in {INBOX}")

    with prefect_server() as environment:
        say("Batch training on January to June")
        tidemill("train", DATASET, REGISTRY, MODEL, "--spec", str(HERE / "spec.json"), environment=environment)

        say(f"Online training on July to December; SIGKILL once version {KILL_AT} is committed")
        log = open_log(REGISTRY, MODEL)
        with subprocess.Popen([*COMMAND, *FOLLOW, *ARCHIVED], env=environment) as online:
            wait_until(lambda: log.head().number >= KILL_AT or online.poll() is not None)
            online.send_signal(signal.SIGKILL)
        left = sum(1 for _ in open_store(INBOX).list())
        print(f"killed with SIGKILL at version {log.head().number}; {left} shards are left in the inbox")

        say("The same command again")
        tidemill(*FOLLOW, *ARCHIVED, environment=environment)

    say("What happened")
    head = log.head()
    history = list(log.history(head))[::-1]
    consumed = [shard for version in history for shard in version.manifest.consumed]
    print(
        f"versions 0 (batch) to {head.number}: {len(consumed)} shards, {sum(s.rows for s in consumed):,} labelled rows"
    )
    compare(log, consumed)
    check(consumed, shards)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Look further:")
    for command in (
        f"status {REGISTRY} {MODEL} --inbox {INBOX}",
        f"log {REGISTRY} {MODEL}",
        f"show {REGISTRY} {MODEL} head",
        f"predict {REGISTRY} {MODEL} {ARCHIVE} {ROOT / 'predictions'} --version head --columns date",
        f"rollback {REGISTRY} {MODEL} 0",
    ):
        print(f"  .venv/bin/tidemill {command}")


def compare(log: VersionLog, consumed: list[Consumed]) -> None:
    """Print the mean absolute error by month: online before it trained on each shard, frozen as the batch left it."""
    frozen = load_learner(log, log.version(0))
    groups = defaultdict(list)
    for group in snapshot(ARCHIVE).row_groups:
        groups[group.file].append(group)
    errors: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for shard in consumed:
        before = score(frozen, groups[shard.key])
        assert before.rows == shard.rows
        errors[shard.key[:7]].append((shard.rows, shard.score["mae"], before.metrics["mae"]))
    print(
        "\nMean absolute error in minutes of the predicted arrival delay, each flight predicted before it is trained on:"
    )
    print(f"{'month':>8} {'flights':>8} {'online':>8} {'frozen':>8} {'change':>8}")
    errors["all"] = [day for month in errors.values() for day in month]
    for month, days in sorted(errors.items()):
        rows = sum(n for n, _, _ in days)
        online, still = (sum(day[0] * day[i] for day in days) / rows for i in (1, 2))
        print(f"{month:>8} {rows:>8,} {online:>8.2f} {still:>8.2f} {online / still - 1:>8.1%}")
    if online >= still:
        print("The online model does NOT beat the frozen one here.")


def check(consumed: list[Consumed], shards: int) -> None:
    """Check from the log alone that nothing was lost and nothing counted twice; fail loudly otherwise."""
    times, archive = Counter(shard.key for shard in consumed), open_store(ARCHIVE)
    twice = [key for key, count in times.items() if count > 1]
    lost = {f"{day}.parquet" for day, _ in data.days()} - set(times)
    altered = [shard.key for shard in consumed if sha256(archive.read(shard.key)) != shard.sha256]
    left = [info.key for info in open_store(INBOX).list()]
    if twice or lost or altered or left:
        raise SystemExit(
            f"FAILED: trained twice {twice}, lost {sorted(lost)}, altered {altered}, left in the inbox {left}"
        )
    print(f"\nChecked from the log: each of the {shards} shards consumed exactly once, none lost, the inbox is empty.")


# ---- processes -------------------------------------------------------------------------------------------------------
COMMAND = [sys.executable, "-m", "tidemill"]


def tidemill(*arguments: str, environment: dict[str, str]) -> None:
    print(f"$ tidemill {' '.join(arguments)}", flush=True)
    subprocess.run([*COMMAND, *arguments], env=environment, check=True)


@contextlib.contextmanager
def prefect_server() -> Iterator[dict[str, str]]:
    """A Prefect server on a free port, with a database of its own; yields the environment that points to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {
            "PREFECT_HOME": home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",  # a net this small is no faster on two threads, and slower on a busy machine
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                wait_until(lambda: _healthy(f"http://127.0.0.1:{port}/api/health"), seconds=120)
                yield environment | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
            finally:
                server.terminate()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_until(done: Callable[[], bool], seconds: float = 300.0) -> None:
    """Look every 50 ms until `done()`."""
    ends = time.monotonic() + seconds
    while not done():
        if time.monotonic() > ends:
            raise SystemExit("FAILED: waited in vain; see the output above")
        time.sleep(0.05)


def say(what: str) -> None:
    print(f"\n== {what}", flush=True)


if __name__ == "__main__":
    main()

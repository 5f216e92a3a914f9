"""A large blob in S3 goes up in parts. SIGKILL around each request of it leaves nothing that counts, and `gc` removes it."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.storage.histories import append, grow, keys
from tidemill.storage.errors import HeadMoved
from tidemill.storage.log import VersionLog
from tidemill.storage.retention import collect_garbage
from tidemill.storage.s3 import S3Store
from tidemill.storage.urls import open_store

ROOT = Path(__file__).parents[2]
PARTS = 3
CHILD = """
import os, signal, sys
from tidemill.storage.log import VersionLog
from tidemill.storage.s3 import S3Store
from tidemill.storage.manifest import Blobs, Entry

url, moment = sys.argv[1:]

class Killed(S3Store):
    in_parts_above = part_bytes = 5 * 2**20
    concurrency = 1  # so that a moment is the same in every run
    requests = 0

    def _call(self, method, key, **params):
        if key is None or "/blobs/" not in key:
            return super()._call(method, key, **params)
        self.requests += 1
        at = f"{method} {self.requests}"
        if moment == f"before {at}":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super()._call(method, key, **params)
        if moment == f"after {at}":
            os.kill(os.getpid(), signal.SIGKILL)
        print(at)
        return answer

bucket, prefix = url.removeprefix("s3://").split("/", 1)
log = VersionLog(Killed(bucket, prefix), "taxi")
head = log.head()
data = [memoryview(bytes([number]) * (5 * 2**20 - number)) for number in range(3)]
weights = log.write_blob(head.number + 1, "safetensors", data)
blobs = Blobs(weights=weights, state=weights, tombstones=log.carried_tombstones(head))
log.commit(head, Entry(kind="online", spec={}, blobs=blobs))
"""


@pytest.fixture
def make_url(s3_server: object, tmp_path: Path) -> Callable[[str], str]:
    return lambda name: f"s3://tidemill-tests/{tmp_path.name}-{id(tmp_path):x}/{name}"


def run(url: str, moment: str) -> tuple[int, list[str]]:
    """(exit status, the requests that were made) of a process that writes a blob in parts and commits it."""
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, url, moment], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode in (0, -9), answer.stderr
    return answer.returncode, answer.stdout.splitlines()


def history(url: str) -> VersionLog:
    log = VersionLog(open_store(url), "taxi")
    grow(log, 2)
    return log


def check_head(log: VersionLog, number: int) -> None:
    head = log.head()
    assert head.number == number
    for ref in head.manifest.blobs.refs:
        log.verify_blob(ref)


def test_a_kill_at_any_request_of_an_upload_leaves_nothing_that_counts(
    make_url: Callable[[str], str], full: bool
) -> None:
    """CI takes each other one of the moments."""
    log = history(make_url("clean"))
    status, requests = run(make_url("clean"), "never")
    assert status == 0
    parts = [f"upload_part {number}" for number in range(2, 2 + PARTS)]
    assert requests == ["create_multipart_upload 1", *parts, f"complete_multipart_upload {2 + PARTS}"]
    assert log.head().number == 2

    def check(moment: str) -> None:
        url = make_url(moment.replace(" ", "-"))
        log = history(url)
        before = keys(log.store)
        assert run(url, moment) == (-9, requests[: int(moment.split()[-1]) - 1])
        whole = moment.startswith("after complete")
        begun = moment != "before create_multipart_upload 1" and not whole
        assert len(keys(log.store) - before) == whole, "what is not complete is no object"
        assert len(list(log.store.unfinished("taxi/"))) == begun
        check_head(log, 1)
        collect_garbage(log, keep=1)
        assert len(list(log.store.unfinished("taxi/"))) == begun, "its version may still be committed"
        assert run(url, "never")[0] == 0
        collect_garbage(log, keep=2)
        assert list(log.store.unfinished("taxi/")) == []
        named = {ref.key for version in log.history(log.head(), 2) for ref in version.manifest.blobs.refs}
        assert keys(log.store, "taxi/blobs/") == named
        check_head(log, 2)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        moments = [f"{phase} {request}" for request in requests for phase in ("before", "after")]
        list(pool.map(check, moments if full else moments[::2] + moments[-1:]))


def test_an_upload_whose_attempt_lost_is_given_up_and_says_so(make_url: Callable[[str], str]) -> None:
    """A writer that a collection has overtaken finds its upload gone: the same as a lost race."""
    log = history(make_url("overtaken"))
    plain = VersionLog(open_store(make_url("overtaken")), "taxi")

    class Overtaken(S3Store):
        in_parts_above = part_bytes = 5 * 2**20
        concurrency = 1

        def _call(self, method: str, key: str | None, **params: object) -> dict[str, object]:
            if method == "upload_part" and params["PartNumber"] == 2:
                append(plain, plain.head())
                collect_garbage(plain, keep=1)
            return super()._call(method, key, **params)

    bucket, _, prefix = make_url("overtaken").removeprefix("s3://").partition("/")
    slow = VersionLog(Overtaken(bucket, prefix), "taxi")
    with pytest.raises(HeadMoved, match="another run committed version 2 first"):
        slow.write_blob(2, "safetensors", [memoryview(bytes(11 * 2**20))])
    assert list(log.store.unfinished("taxi/")) == []
    check_head(log, 2)

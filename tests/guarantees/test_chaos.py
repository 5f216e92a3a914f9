"""A short run of the chaos driver; with --full the run of 30 minutes that docs/guarantees.md quotes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guarantees import chaos
from tidemill.storage.manifest import sha256

SECONDS, SEED = 12.0, 39
"""Of the sample: by the plan of this seed, 5 workers and the server are killed in time."""
FULL_SECONDS, FULL_SEED = 1800.0, 1


@pytest.mark.timeout(3600)  # the full run; whatever must end by itself has its own deadline
def test_chaos(full: bool, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Killed and frozen workers, a killed server, corrupt and repeated shards: in the end every shard counts exactly once."""
    seconds, seed = (FULL_SECONDS, FULL_SEED) if full else (SECONDS, SEED)
    result = chaos.run(seconds, seed, workers=4, folder=tmp_path)
    print(result)
    record_property("chaos", str(result))
    assert result.failure is None, result.failure
    assert result.errors == {}
    assert result.versions > 1
    assert result.worker_kills >= (500 if full else 3)
    assert result.server_kills >= (20 if full else 1)
    if full:
        assert min(result.rejected, result.duplicates, result.lost_races, result.unavailable, result.worker_stops) > 0
        assert result.late_rss_mb - result.early_rss_mb < 50


def test_everything_that_the_driver_chooses_follows_from_the_seed() -> None:
    assert [chaos.upload(2, n) for n in range(50)] == [chaos.upload(2, n) for n in range(50)]
    assert chaos.plan(2, 600, 4) == chaos.plan(2, 600, 4)
    assert chaos.upload(2, 0) != chaos.upload(3, 0)
    assert chaos.plan(2, 600, 4) != chaos.plan(3, 600, 4)


def test_uploads_are_of_every_kind() -> None:
    """What is sent again is one that was sent before; all else has a key of its own."""
    puts = [chaos.upload(SEED, number) for number in range(200)]
    assert {put.kind for put in puts} == {"good", "late", "corrupt", "again"}
    sent: dict[str, str] = {}
    for put in puts:
        assert (sent.get(put.key) == sha256(put.data)) == (put.kind == "again")
        sent[put.key] = sha256(put.data)
    lowest = min(put.key for put in puts if put.kind == "good")
    assert all(put.key < lowest for put in puts if put.kind == "late")

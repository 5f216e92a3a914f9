"""What the leader does beside training is the same for any number of ranks: late labels, triggers, the gate."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import parquet
from tests.guarantees.children import SHARDS, bits, fill, start_server, waiting
from tests.ranks.crews import SPEC, drained, registered
from tidemill.storage.audit import audit
from tidemill.storage.log import open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings

TARGETS = ["y", "z"]


def apart(shard: bytes) -> tuple[bytes, bytes]:
    """(features with a key, their labels with it) of a shard."""
    table = pq.read_table(io.BytesIO(shard))
    table = table.append_column("id", pa.array(range(table.num_rows)))
    return parquet(table.drop_columns(TARGETS)), parquet(table.select(["id", *TARGETS]))


@pytest.mark.ranks
@pytest.mark.parametrize("parts", [4, None])
def test_late_labels_triggers_and_the_gate_are_the_same_for_any_number_of_ranks(
    parts: int | None, tmp_path: Path
) -> None:
    start_server()
    base = str(tmp_path / "base")
    registered(str(tmp_path / "dataset"), base, SPEC.model_copy(update={"parts": parts}))
    found = []
    for size in (1, 2, 4) if parts is not None else (1, 3):
        inbox, labels, registry = (str(tmp_path / f"{name}-{size}") for name in ("inbox", "labels", "registry"))
        fill(registry, {info.key: open_store(base).read(info.key) for info in open_store(base).list()})
        late = {key: apart(shard) for key, shard in SHARDS.items()}
        fill(inbox, {key: features for key, (features, _) in late.items()})
        fill(labels, {key: their for key, (_, their) in list(late.items())[:-1]})  # of the last shard none has come
        settings = OnlineSettings.model_validate(
            {
                "limits": {"max_shards": 2},
                "grace_seconds": 0,
                "labels": {"inbox": labels, "key": "id"},
                "train_when": {"min_rows": 20, "drift": "page_hinkley"},
                "gate": {"champion": "move", "recent_shards": 2, "tolerance": 0.01},
            }
        )
        assert {ended.how for ended in drained(size, inbox, registry, tmp_path, settings=settings)} == {"done"}
        log = open_log(registry, "model")
        assert audit(log).findings == []
        versions = [log.version(number).manifest for number in range(1, log.head().number + 1)]
        assert sum(len(version.consumed) for version in versions) > 2
        told = [
            ([shard.key for shard in v.consumed], v.fired, None if v.gate is None else v.gate.decision)
            for v in versions
        ]
        found.append((told, waiting(inbox), bits(log) if parts is not None else None))
    assert found == found[:1] * len(found)
    assert any(gate is not None for _, _, gate in found[0][0])

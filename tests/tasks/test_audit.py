"""The audit, and a history made again: a sound history passes, and each kind of damage is found and named."""

import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from tests.data import parquet, put, rows
from tidemill.storage import tombstones
from tidemill.storage.aliases import aliased
from tidemill.storage.audit import Audit, audit
from tidemill.storage.errors import UnknownModel
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.manifest import Manifest, Parent, encode, sha256
from tidemill.storage.retention import collect_garbage
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store
from tidemill.tasks import batch, online
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.spec import Spec

SPEC = Spec.model_validate(
    {
        "features": ["a", "b"],
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [4], "dropout": 0.2}},
        "optimizer": {"name": "adam"},
        "batch_size": 16,
        "epochs": 2,
    }
)
SHARDS = {f"{i:02}.parquet": rows(30 + i, 50 + i) for i in range(5)}
BAD = {"02b.parquet": b"PAR1 this is no Parquet file PAR1"}
LATER = {"09.parquet": rows(25, 90)}

History = tuple[VersionLog, str]


def train(registry: str, dataset: str, seed: int) -> None:
    put(dataset, {"part.parquet": rows(100, seed)})
    batch.train(dataset, registry, "model", SPEC)


def drain(inbox: str, registry: str, archive: str) -> None:
    settings = OnlineSettings(
        limits={"max_shards": 2},
        passes=2,
        grace_seconds=0,
        after_commit={"archive_to": archive},
        gate={"champion": "score"},
    )
    online.drain(inbox, registry, "model", settings)


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> History:
    """0 batch, 1 to 3 online (one shard rejected), 4 rollback to 1, 5 online, 6 batch, 7 online; and the archive's URL."""
    monkeypatch.setattr(tombstones, "WHOLE_VERSIONS", 2)
    root = f"memory://{uuid.uuid4().hex}"
    inbox, registry, archive = f"{root}/inbox", f"{root}/registry", f"{root}/archive"
    train(registry, f"{root}/one", 1)
    put(inbox, SHARDS | BAD)
    drain(inbox, registry, archive)
    log = open_log(registry, "model")
    log.rollback(log.version(1))
    put(inbox, LATER)
    drain(inbox, registry, archive)
    train(registry, f"{root}/two", 2)
    put(inbox, {"10.parquet": rows(20, 91)})
    drain(inbox, registry, archive)
    kinds = ["batch", "online", "online", "online", "rollback", "online", "batch", "online"]
    assert [v.manifest.kind for v in log.history(log.head())][::-1] == kinds
    return log, archive


def forge(log: VersionLog, number: int, change: Callable[[Manifest], dict[str, Any]]) -> None:
    """Change a version as somebody would who knows the format: checksum and the hashes of all children are right again."""
    parent: Parent | None = None
    for n in range(log.head().number + 1):
        manifest = log.version(n).manifest
        fields = (change(manifest) if n == number else {}) | ({} if n <= number else {"parent": parent})
        data = encode(manifest.model_copy(update=fields))
        log.store.write(f"model/log/{n:08d}.json", data)
        parent = Parent(version=n, sha256=sha256(data))


def test_a_sound_history(history: History) -> None:
    log, archive = history
    rows_in_all = sum(len(table) for table in (SHARDS | LATER).values()) + 20
    assert audit(log) == Audit(
        model="model", versions=8, consumed=7, rejected=1, rows=rows_in_all, blobs=2 * 8 + 2, findings=[]
    )
    again = reproduce(log, [open_store(archive)])
    assert (again.reproduced, again.skipped, again.shards, again.findings) == (5, 0, 7, [])


def test_what_retention_removed_is_no_finding(history: History) -> None:
    log, archive = history
    collect_garbage(log, keep=2)
    found, again = audit(log), reproduce(log, [open_store(archive)])
    assert (found.removed, found.findings) == (6, [])
    assert (again.reproduced, again.skipped, again.findings) == (1, 4, [])


def test_an_unknown_model_is_an_error_and_not_a_sound_history() -> None:
    with pytest.raises(UnknownModel):
        audit(VersionLog(open_store(f"memory://{uuid.uuid4().hex}"), "model"))


def drop_tombstones(log: VersionLog) -> None:
    ref = log.write_tombstones(7, Tombstones())
    forge(log, 7, lambda m: {"blobs": m.blobs.model_copy(update={"tombstones": ref})})


def again(field: str, source: int, number: int) -> Callable[[VersionLog], None]:
    """Let version `number` name the first shard of version `source` as well."""

    def change(log: VersionLog) -> None:
        shard = log.version(source).manifest.consumed[0]
        if field == "rejected":
            values = {name: value for name, value in dict(shard).items() if name not in _ONLY_CONSUMED}
            refused = log.version(3).manifest.rejected or log.version(2).manifest.rejected
            forge(log, number, lambda m: {"rejected": (*m.rejected, refused[0].model_copy(update=values))})
        else:
            forge(log, number, lambda m: {"consumed": (*m.consumed, shard)})

    return change


_ONLY_CONSUMED = {"ordinal", "rows", "unlabelled", "score", "loss", "passes"}

DAMAGE: dict[str, tuple[Callable[[VersionLog], None], str]] = {
    "a manifest is missing": (lambda log: log.store.delete("model/log/00000003.json"), "version 3 is missing"),
    "a manifest was edited": (
        lambda log: log.store.write(
            "model/log/00000003.json", log.store.read("model/log/00000003.json").replace(b'"rows": 3', b'"rows": 4')
        ),
        "was edited or damaged",
    ),
    "a manifest was replaced": (
        lambda log: log.store.write(
            "model/log/00000003.json", encode(log.version(3).manifest.model_copy(update={"nonce": "other"}))
        ),
        "version 4: it was made from another version 3",
    ),
    "a blob was altered": (
        lambda log: log.store.write(
            (ref := log.version(2).manifest.blobs.weights).key, b"x" + log.store.read(ref.key)[1:]
        ),
        "version 2: .*sha256 .* instead of",
    ),
    "a blob was cut": (
        lambda log: log.store.write(log.version(2).manifest.blobs.state.key, b"x"),
        "1 bytes instead of",
    ),
    "the head's weights are gone": (
        lambda log: log.store.delete(log.head().manifest.blobs.weights.key),
        "version 7, the head: .*is missing",
    ),
    "the champion's weights are gone": (
        lambda log: log.store.delete(aliased(log, "champion").manifest.blobs.weights.key),
        "version 6, alias 'champion': .*is missing",
    ),
    "an alias to nowhere": (
        lambda log: log.store.write("model/aliases/lost.json", b'{"version": 77, "moves": 0}'),
        "alias 'lost' names version 77",
    ),
    "an alias that is none": (lambda log: log.store.write("model/aliases/lost.json", b"7"), "is no alias"),
    "a shard consumed twice": (again("consumed", 1, 7), "was consumed twice: 1 and 7"),
    "a shard consumed and rejected": (again("rejected", 1, 2), "was rejected by version 2 after it was consumed"),
    "a shard rejected and consumed": (again("rejected", 3, 1), "was rejected by version 1 and consumed by 3"),
    "a shard rejected twice": (
        lambda log: forge(log, 7, lambda m: {"rejected": _rejected(log)}),
        "was rejected twice: by versions",
    ),
    "a shard that nobody counted": (
        lambda log: forge(log, 5, lambda m: {"counters": m.counters | {"shards": 9}}),
        "version 5: it counts 9 shards",
    ),
    "ordinals with a gap": (
        lambda log: forge(
            log, 5, lambda m: {"consumed": tuple(s.model_copy(update={"ordinal": 8}) for s in m.consumed)}
        ),
        "version 5: the ordinals of its shards",
    ),
    "another spec": (
        lambda log: forge(log, 2, lambda m: {"spec": m.spec | {"seed": 1}}),
        "version 2: online training changed the spec",
    ),
    "a rollback to other weights": (
        lambda log: forge(log, 4, lambda m: {"rolled_back_to": 0}),
        "version 4: its weights, state or counters are not those of version 0",
    ),
    "a rollback into the future": (
        lambda log: forge(log, 4, lambda m: {"rolled_back_to": 9}),
        "version 4: it goes back to version 9",
    ),
    "a batch version that consumed": (again("consumed", 7, 6), "version 6: a version of kind 'batch' consumed shards"),
    "a retrain that forgot": (
        lambda log: forge(log, 6, lambda m: {"blobs": m.blobs.model_copy(update={"tombstones": None})}),
        "version 6: it does not carry on the tombstones",
    ),
    "a head that forgot": (drop_tombstones, "the head, version 7, does not remember 7 consumed shards"),
}


def _rejected(log: VersionLog) -> Any:
    return next(v.manifest.rejected for v in log.history(log.head()) if v.manifest.rejected)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(history: History, damage: str) -> None:
    log, _ = history
    do, message = DAMAGE[damage]
    do(log)
    assert re.search(message, "\n".join(audit(log).findings))


# ---- reproduce -------------------------------------------------------------------------------------------------------
def test_other_weights_than_the_shards_give(history: History) -> None:
    """Whole by every hash, but not made of what it says: only training again can tell."""
    log, archive = history
    weights, state = log.copy_blobs(2, log.version(3).manifest.blobs)
    forge(log, 2, lambda m: {"blobs": m.blobs.model_copy(update={"weights": weights, "state": state})})
    assert not audit(log).findings
    first, *_ = reproduce(log, [open_store(archive)]).findings
    assert first.startswith("version 2: the shards that it names give other weights")


def test_another_number_of_passes(history: History) -> None:
    log, archive = history
    forge(log, 5, lambda m: {"consumed": tuple(s.model_copy(update={"passes": 1}) for s in m.consumed)})
    assert [f.split(":")[0] for f in reproduce(log, [open_store(archive)]).findings] == ["version 5"]


def test_a_shard_that_is_not_archived_is_named_and_the_rest_is_reproduced(history: History) -> None:
    log, archive = history
    store = open_store(archive)
    store.write("02.parquet", parquet(rows(1, 1)))
    found = reproduce(log, [store])
    [finding] = found.findings
    assert "cannot be reproduced" in finding
    assert f"{archive} holds no shard '02.parquet'" in finding
    assert found.reproduced == 4


def test_shards_are_looked_for_in_every_archive(history: History) -> None:
    log, archive = history
    store, other = open_store(archive), open_store(f"memory://{uuid.uuid4().hex}")
    other.write("02.parquet", store.read("02.parquet"))
    store.delete("02.parquet")
    assert reproduce(log, [store, other]).findings == []

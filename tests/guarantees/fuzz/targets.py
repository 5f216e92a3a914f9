"""What is fed with mutations, and what must hold of each input."""

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError

from tests.guarantees.audit import audit
from tests.guarantees.children import train
from tests.guarantees.fuzz.mutate import Random, mutated, mutated_json, mutated_parquet, mutated_tensors, mutated_tree
from tests.storage.shards import dispose, requeue
from tidemill.storage.aliases import aliased, promote
from tidemill.storage.chain import Version
from tidemill.storage.disposal import quarantine_key, quarantined
from tidemill.storage.errors import InvalidKey, NotReady, ShardRejected, StorageError
from tidemill.storage.inbox import Inbox, Shard, is_shard
from tidemill.storage.local import LocalStore
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import Blobs, Entry, Owed, decode, encode, sha256
from tidemill.storage.memory import MemoryStore
from tidemill.storage.parquet import RowGroup
from tidemill.storage.runs import BatchProgress, Checkpoint
from tidemill.storage.store import ObjectInfo
from tidemill.storage.tombstones import Tombstones
from tidemill.storage.urls import open_store
from tidemill.tasks.online import step as online
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.errors import ColumnError, TrainingError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

Check = Callable[[Random], str]
"""Make an input, use it, and return how it ended. Raises if that is not one of the ways in which it may end."""

SPEC = Spec.model_validate(
    {
        "features": ["a", "n", {"name": "c", "kind": "category", "buckets": 8}, "v", "t"],
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [4]}},
        "optimizer": {"name": "adam", "arguments": {"betas": [0.9, 0.99]}},
        "learning_rate": 0.01,
        "batch_size": 16,
        "epochs": 1,
        "standardize_target": True,
    }
)


# ---- shards --------------------------------------------------------------------------------------------------------------
def table(rows: int, seed: int) -> pa.Table:
    """Columns of the types that have a path of their own, and a target that follows from them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, generator=generator).tolist()
    return pa.table(
        {
            "a": [None if i % 7 == 3 else value for i, value in enumerate(a)],
            "n": pa.array(range(rows), pa.int32()),
            "c": [("red", "green", None, "a longer one")[i % 4] for i in range(rows)],
            "v": pa.array([[value, -value] for value in a], pa.list_(pa.float32(), 2)),
            "t": pa.array([datetime(2026, 1, 1 + i % 28, tzinfo=UTC) for i in range(rows)], pa.timestamp("us", "UTC")),
            "y": [2 * value for value in a],
        }
    )


def parquet(data: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(data, sink, **options)
    return bytes(sink.getvalue())


def samples() -> list[bytes]:
    """The same rows in every way of writing that has a decoder of its own."""
    rows = table(48, 1)
    ways: list[dict[str, Any]] = [
        {"row_group_size": 20},
        {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 16},
        {"compression": "none", "use_dictionary": False, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"c": "DELTA_BYTE_ARRAY", "n": "DELTA_BINARY_PACKED"}},
        {"use_dictionary": False, "column_encoding": {"a": "BYTE_STREAM_SPLIT", "c": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"store_schema": False, "write_page_index": True, "compression": "gzip"},
    ]
    return [parquet(rows, **way) for way in ways]


def shard(data: bytes, key: str = "a.parquet") -> Shard:
    return Shard("memory://in", ObjectInfo(key, len(data), "e", datetime.now(UTC)), data, sha256(data))


def encoded(features: Features, groups: list[RowGroup]) -> int:
    """Decode and encode every row, as training does. What comes out must be what tensors of this shape may hold."""
    features.check(groups[0].schema, "a.parquet")
    for group in groups:
        table = group.read(features.names(labelled=True))
        y_N, _ = features.target(table, group.name)
        x_NF, ids_NC = features.encode(table, group.name)
        assert ids_NC is not None
        assert x_NF.shape == (group.num_rows, features.numbers)
        assert y_N.shape == (group.num_rows,)
        assert bool(torch.isfinite(x_NF).all())
        assert 0 <= int(ids_NC.min()) <= int(ids_NC.max()) <= features.buckets[0]
    return sum(group.num_rows for group in groups)


def shard_target(_: Path) -> Check:
    """Bytes of a shard, from the footer to tensors."""
    files = samples()
    groups = shard(files[0]).row_groups()
    features = Features.resolve(SPEC, groups[0].schema).fit(groups)
    assert encoded(features, groups) == 48

    def check(rng: Random) -> str:
        try:
            encoded(features, shard(mutated_parquet(rng, files)).row_groups())
        except (NotReady, ShardRejected, ColumnError) as error:
            return named(error)
        return "accepted"

    return check


def step_target(_: Path) -> Check:
    """Whole steps: each shard is consumed or rejected in exactly one version, and the next good one is trained on."""
    files, good = samples(), parquet(table(24, 2))
    run: online.OnlineRun | None = None
    sent: list[tuple[str, bytes]] = []

    def begin() -> online.OnlineRun:
        sent.clear()
        root = f"memory://{uuid.uuid4().hex}"
        open_store(f"{root}/dataset").write("a.parquet", parquet(table(200, 0)))
        train(open_store, f"{root}/dataset", f"{root}/registry", SPEC, BatchSettings())
        settings = OnlineSettings(grace_seconds=0)
        return online.OnlineRun(f"{root}/inbox", f"{root}/registry", "model", settings)

    def check(rng: Random) -> str:
        nonlocal run
        run = run or begin()
        bad, after = f"{len(sent):04}.parquet", f"{len(sent):04}b.parquet"
        for key, data in ((bad, mutated_parquet(rng, files)), (after, good)):
            run.places.inbox.store.write(key, data)
            sent.append((key, data))
        assert online.step(run).outcome is online.Outcome.COMMITTED
        assert not list(run.places.inbox.store.list())
        manifest = run.places.log.head().manifest
        consumed, rejected = ([s.key for s in shards] for shards in (manifest.consumed, manifest.rejected))
        assert (consumed, rejected) in (([bad, after], []), ([after], [bad]))
        if len(sent) >= 50:
            audit(run.places.log, sent)
            run = None
        return "rejected" if rejected else "accepted"

    return check


# ---- weights and state ---------------------------------------------------------------------------------------------------
def registry() -> tuple[VersionLog, Version, dict[str, bytes]]:
    """A registry with versions 0 (batch) and 1 (online: one shard consumed, one rejected), and all of its objects."""
    root = f"memory://{uuid.uuid4().hex}"
    open_store(f"{root}/dataset").write("a.parquet", parquet(table(64, 0)))
    train(open_store, f"{root}/dataset", f"{root}/registry", SPEC, BatchSettings())
    run = online.OnlineRun(f"{root}/inbox", f"{root}/registry", "model", OnlineSettings(grace_seconds=0))
    run.places.inbox.store.write("a/b.parquet", parquet(table(24, 2)))
    run.places.inbox.store.write("c.parquet", b"not Parquet")
    assert online.step(run).version == 1
    store = run.places.log.store
    return run.places.log, run.places.log.head(), {info.key: store.read(info.key) for info in store.list()}


def learner_target(_: Path) -> Check:
    """Weights and state: refused by their sha256 before they are parsed; and parsed all the same, only TrainingErrors."""
    log, version, objects = registry()
    refs = {"weights": version.manifest.blobs.weights, "state": version.manifest.blobs.state}
    originals = {name: objects[ref.key] for name, ref in refs.items()}

    def check(rng: Random) -> str:
        name = rng.choice(("weights", "state", "state"))
        ref, data = refs[name], mutated_tensors(rng, originals[name])
        log.store.write(ref.key, data)
        if data != originals[name]:
            refused_as_corrupt(lambda: load_learner(log, version))
        log.store.write(ref.key, originals[name])
        try:
            learner = Learner.load(SPEC, **{**originals, name: data})
        except TrainingError as error:
            return named(error)
        stored = learner.dump()
        assert Learner.load(SPEC, *stored).dump() == stored
        return "accepted"

    return check


def named(error: Exception, part: str = "") -> str:
    """The class of an error, whose message holds `part` and is short enough to be read."""
    assert part in str(error), error
    assert len(str(error)) < 20_000, f"{len(str(error))} characters"
    return type(error).__name__


def refused_as_corrupt(use: Callable[[], object]) -> None:
    """Only by length and sha256: not by whoever would have parsed the bytes."""
    try:
        use()
    except StorageError as error:
        named(error, "Nothing was loaded")
        return
    raise AssertionError("altered bytes were accepted")


# ---- manifests -----------------------------------------------------------------------------------------------------------
def manifest_target(_: Path) -> Check:
    """A stored manifest: what decodes is what was stored."""
    _, version, objects = registry()
    original, where = objects["model/log/00000001.json"], "memory://registry/model/log/00000001.json"
    assert encode(version.manifest) == original

    def check(rng: Random) -> str:
        data = mutated_json(rng, original)
        try:
            found = decode(data, where)
        except StorageError as error:
            return named(error, where)
        assert found == version.manifest
        return "accepted"

    return check


def version_target(_: Path) -> Check:
    """Manifests of someone who knows how to make the checksum: whatever they say, loading raises only stated errors."""
    log, version, objects = registry()
    fields = json.loads(objects["model/log/00000001.json"])
    del fields["checksum"]

    def check(rng: Random) -> str:
        changed = mutated_tree(rng, fields)
        canonical = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        if isinstance(changed, dict):
            changed["checksum"] = sha256(canonical.encode())
        log.store.write("model/log/00000001.json", json.dumps(changed).encode())
        try:
            head = log.head()
            log.tombstones(head)
            load_learner(log, head)
        except (StorageError, TrainingError) as error:
            return named(error)
        assert (head.number, head.manifest.parent) == (1, version.manifest.parent)
        return "accepted"

    return check


def tombstones_target(_: Path) -> Check:
    """The blob of tombstones: refused by its sha256, and parsed all the same, either corrupt or lines of four strings."""
    log, parent, _ = registry()
    ref = log.write_tombstones(2, log.tombstones(parent))
    blobs = parent.manifest.blobs.model_copy(update={"tombstones": ref})
    version = log.commit(parent, Entry(kind="online", spec=parent.manifest.spec, blobs=blobs))
    known = Tombstones()
    for i in range(8):
        known.add("s3://bucket/in", f"d/{i}\n.parquet", f"{i:064x}", f"{i:032x}")
    original = log.read_blob(ref)

    def check(rng: Random) -> str:
        line = rng.randrange(8)
        lines = known.encode().splitlines(keepends=True)
        lines[line] = mutated_json(rng, lines[line].strip()) + b"\n"
        data = b"".join(lines) if rng.random() < 0.7 else mutated(rng, known.encode())
        log.store.write(ref.key, data)
        refused_as_corrupt(lambda: log.tombstones(version))
        log.store.write(ref.key, original)
        try:
            found = Tombstones.decode(data, "memory://registry/blob")
        except StorageError as error:
            return named(error, "memory://registry/blob")
        assert list(Tombstones.decode(found.encode(), "again")) == list(found)
        assert len(found) <= data.count(b"[")
        return "accepted"

    return check


# ---- the small objects ---------------------------------------------------------------------------------------------------
def runs_target(folder: Path) -> Check:
    """The hint, an alias, a reason in quarantine, and the notes of a batch run: in a folder, whose names have limits."""
    root = folder / "registry"
    log = VersionLog(LocalStore(str(root)), "model")
    progress = BatchProgress(log, "0123456789abcdef")
    inbox = Inbox(MemoryStore(uuid.uuid4().hex))

    def commit(parent: Version | None, run: str | None = None) -> Version:
        number = 0 if parent is None else parent.number + 1
        blobs = Blobs(weights=log.write_blob(number, "w", b"w"), state=log.write_blob(number, "s", b"s"))
        return log.commit(parent, Entry(kind="batch", spec={}, blobs=blobs, run=run))

    first = commit(None)
    progress.begin()
    own = commit(first, progress.key)
    head = commit(own)
    promote(log, "champion", own)
    info = inbox.store.write("d/a.parquet", b"bad")
    name = quarantine_key("model", 1, sha256(b"bad"), info.key)
    debt = {"inbox": inbox.url, "key": info.key, "sha256": sha256(b"bad")}
    dispose(
        log,
        [
            Owed.model_validate(
                {**debt, "etag": info.etag, "action": "quarantine", "destination": name, "reason": "bad"}
            )
        ],
    )
    progress.finish(own)
    runs = f"model/runs/{progress.key}"
    keys = ["model/aliases/champion.json", f"{name}.json", f"{runs}/run.json", f"{runs}/done.json"]
    objects = {key: log.store.read(key) for key in keys}
    log.store.delete(f"{runs}/done.json")
    checkpoints: dict[int, Checkpoint] = {}
    for epochs in (1, 2):
        progress.save((0.5,) * epochs, b"weights %d" % epochs, b"state %d" % epochs)
        saved = progress.latest(lambda *stored: stored)
        assert saved is not None
        checkpoints[epochs] = saved[0]
    objects[f"{runs}/00000002.json"] = log.store.read(f"{runs}/00000002.json")
    objects["model/head.json"] = json.dumps({"version": 2}).encode()
    log.store.write("model/head.json", objects["model/head.json"])

    def use(key: str, data: bytes) -> str:
        if key.endswith("head.json"):
            try:
                assert log.head().number == head.number
            except StorageError as error:
                raise AssertionError("a hint is only ever a place to start looking") from error
            return "ignored or followed"
        if "aliases" in key:
            version = aliased(log, "champion")
            stated = json.loads(data)["version"]
            assert version.number == stated, f"{stated!r} was taken for {version.number}"
            return "accepted"
        if "quarantine" in key:
            (reason,) = quarantined(log).values()
            assert isinstance(reason["reason"], str), "printed by `tidemill requeue`"
            assert {k: reason[k] for k in debt} == debt
            return "accepted"
        if key.endswith("00000002.json"):
            found = progress.latest(lambda *stored: stored)
            assert found is not None, "the checkpoint before is whole"
            checkpoint, weights, state = found
            n = checkpoint.epochs
            assert (checkpoint, weights, state) == (checkpoints[n], b"weights %d" % n, b"state %d" % n)
            return "accepted" if n == 2 else "left out"
        registered = progress.registered()
        assert registered is None or registered[0] == own, "another version is not this run's"
        return "accepted" if registered else "left out"

    def check(rng: Random) -> str:
        key = rng.choice([*objects])
        path = root / key
        data = mutated_json(rng, objects[key])
        path.write_bytes(data)
        try:
            return f"{path.parent.name}: {use(key, data)}"
        except StorageError as error:
            return f"{path.parent.name}: {type(error).__name__}"
        finally:
            path.unlink()
            if not key.endswith("done.json"):  # as long as it is there, run.json is not looked at
                path.write_bytes(objects[key])

    return check


def spec_target(_: Path) -> Check:
    """A spec as Python values and as JSON: pydantic's own error, or a spec that is stored and read back as it is."""
    original = SPEC.model_dump(mode="json")

    def check(rng: Random) -> str:
        text = mutated_json(rng, json.dumps(original).encode())
        try:
            as_text = rng.random() < 0.5
            spec = Spec.model_validate_json(text) if as_text else Spec.model_validate(mutated_tree(rng, original))
        except ValidationError as error:
            return named(error, "Spec")
        assert Spec.model_validate_json(spec.model_dump_json()) == spec
        assert Spec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json"), allow_nan=False))) == spec
        return "accepted"

    return check


# ---- keys ----------------------------------------------------------------------------------------------------------------
PIECES = (
    *(
        "a",
        "b",
        ".",
        "..",
        "",
        "/",
        "//",
        "\\",
        "?versionId=1",
        "#x",
        "%2e%2e",
        "%2F",
        "\n",
        "\r",
        "\0",
        "\x1b[31m",
        "\u202e",
    ),
    *(
        "é",
        "e\u0301",
        "\udcff",
        "\U0001f980",
        " ",
        "in2",
        "log/00000000.json",
        ".parquet",
        ".tmp",
        "_",
        "-",
        "x" * 90,
        "=",
        "'",
    ),
    *('"', "$(id)", "`id`", "~", "*", "{}", "%s", "\u2028", ".tidemill-tmp-", "CON", ":", "\ufeff"),
)


def keys_target(folder: Path) -> Check:
    """Keys that a producer may choose, on a disk: refused, or exactly that object is listed, moved, sent back and removed."""
    inbox = Inbox(LocalStore(str(folder / "parent" / "in")))
    log = VersionLog(LocalStore(str(folder / "registry")), "model")
    for other in ("parent/x", "parent/in2/x", "x"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"not yours")
    (folder / "parent" / "in").mkdir()

    def stands(root: Path) -> list[str]:
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and ".tidemill-" not in p.name)

    def check(rng: Random) -> str:
        key = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 6)))
        name = quarantine_key("model", 1, sha256(b"bad"), key)
        assert re.fullmatch(r"model/quarantine/00000001-[0-9a-f]{32}", name)
        remembered = Tombstones()
        remembered.add(inbox.url, key, "s", "e")
        assert Tombstones.decode(remembered.encode(), "blob").has(inbox.url, key, "s")
        outcome = "accepted"
        try:
            info = inbox.store.write(key, b"bad")
        except InvalidKey:
            outcome = "InvalidKey"
        else:
            listing = inbox.list(10, lambda _: False)
            assert [s.key for s in listing.shards] == ([key] if is_shard(key) else [])
            owed = Owed(
                inbox=inbox.url,
                key=key,
                sha256=sha256(b"bad"),
                etag=info.etag,
                action="quarantine",
                destination=name,
                reason="bad",
            )
            assert dispose(log, [owed]) == ()
            assert not list(inbox.store.list())
            try:
                back = requeue(log, name.removeprefix("model/quarantine/"))
            except InvalidKey:  # too long with the mark in it
                log.store.delete(name)
                log.store.delete(f"{name}.json")
            else:
                assert [i.key for i in inbox.store.list()] == [back]
                inbox.store.delete(back)
        assert stands(folder) == ["parent/in2/x", "parent/x", "x"]
        return outcome

    return check


TARGETS: dict[str, Callable[[Path], Check]] = {
    "shard": shard_target,
    "step": step_target,
    "learner": learner_target,
    "manifest": manifest_target,
    "version": version_target,
    "tombstones": tombstones_target,
    "runs": runs_target,
    "spec": spec_target,
    "keys": keys_target,
}

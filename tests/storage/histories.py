"""What the tests of the version log are made of: short histories as runs make them, long ones as they leave them."""

import json
from datetime import UTC, datetime
from typing import Any

from tidemill.storage.chain import Version
from tidemill.storage.log import HINT_EVERY, VersionLog
from tidemill.storage.manifest import (
    Blobs,
    Entry,
    Manifest,
    Parent,
    encode,
    sha256,
)
from tidemill.storage.refs import BlobRef
from tidemill.storage.store import Store
from tidemill.storage.tombstones import Tombstones


def append(log: VersionLog, parent: Version | None, **fields: Any) -> Version:
    """What a run does: blobs first, then the manifest."""
    number = 0 if parent is None else parent.number + 1
    tombstones = Tombstones()
    tombstones.add("s3://in", f"{number}.parquet", f"sha-{number}", f"etag-{number}")
    blobs = Blobs(
        weights=log.write_blob(number, "safetensors", f"weights {number}".encode()),
        state=log.write_blob(number, "state.safetensors", f"state {number}".encode()),
        tombstones=log.write_tombstones(number, tombstones),
    )
    return log.commit(parent, Entry(**{"kind": "online", "spec": {"n": number}, "blobs": blobs, **fields}))


def grow(log: VersionLog, versions: int) -> Version:
    head = None
    for _ in range(versions):
        head = append(log, head)
    assert head is not None
    return head


def fabricate(log: VersionLog, versions: int) -> None:
    """A long history, without blobs, as `commit` leaves it."""
    blob = BlobRef(key="none", bytes=0, sha256="")
    parent: Parent | None = None
    for number in range(versions):
        data = encode(
            Manifest(
                kind="online",
                spec={},
                blobs=Blobs(weights=blob, state=blob),
                model=log.model,
                version=number,
                parent=parent,
                nonce="n",
                created=datetime.now(UTC),
            )
        )
        log.store.create(manifest_key(number, log.model), data)
        parent = Parent(version=number, sha256=sha256(data))
        if number % HINT_EVERY == 0:
            log.store.write(f"{log.model}/head.json", json.dumps({"version": number}).encode())


def manifest_key(number: int, model: str = "taxi") -> str:
    return f"{model}/log/{number:08d}.json"


def keys(store: Store, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}

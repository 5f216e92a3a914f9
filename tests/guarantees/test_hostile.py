"""Producers, registries and networks that mean harm: bombs, keys that lead elsewhere, bytes that would run code, enormous specs,
and errors that could tell a secret. Parsing at large is fuzzed in `test_fuzz.py`.
"""

import json
import logging
import os
import pickle
import re
import resource
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from botocore.client import BaseClient

from tests.conftest import BUCKET
from tests.guarantees.audit import audit
from tests.guarantees.children import in_child, start_server, train
from tests.guarantees.fuzz.mutate import footer, get, put, read_struct, struct_bytes, tensor_file, tensors, with_footer
from tests.guarantees.fuzz.targets import SPEC, parquet, table
from tests.s3_server import S3
from tests.storage.faults import Call, FaultStore
from tidemill.flows import views
from tidemill.flows.cli import main
from tidemill.flows.usage import UsageError, spec_file
from tidemill.storage.disposal import quarantined, requeue
from tidemill.storage.errors import InvalidKey, PermissionDenied, StorageError
from tidemill.storage.inbox import is_shard
from tidemill.storage.manifest import Blobs, Entry
from tidemill.storage.memory import MemoryStore
from tidemill.storage.s3 import S3Store
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.online.step import OnlineRun, Outcome, step
from tidemill.tasks.settings import BatchSettings, Limits, OnlineSettings
from tidemill.tasks.training.errors import StateMismatch, TrainingError
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.stored import METADATA_KEY
from tidemill.tasks.versions import load_learner

MakeUrl = Callable[[str], str]
Stores = Callable[[str], Store]


def begin(stores: Stores, root: str, **settings: Any) -> OnlineRun:
    """A registry with version 0 below a URL, and a run on an empty inbox."""
    stores(f"{root}/dataset").write("a.parquet", parquet(table(200, 0)))
    train(stores, f"{root}/dataset", f"{root}/registry", SPEC, BatchSettings())
    return OnlineRun(f"{root}/in", f"{root}/registry", "model", OnlineSettings(grace_seconds=0, **settings), stores)


@pytest.fixture
def memory_run() -> OnlineRun:
    return begin(open_store, f"memory://{uuid.uuid4().hex}")


# ---- bombs -----------------------------------------------------------------------------------------------------------
ADDRESS_SPACE = 3 * 2**30
PEAK = 512 * 2**20
"""How much a shard that is refused may take at its peak."""
BILLION = 10**9
ROWS = 48


def chunk(fields: list[Any], column: int) -> list[Any]:
    """The metadata of a column in the first row group."""
    found: list[Any] = get(get(get(fields, 4)[0], 1)[column], 3)
    return found


def plain(**options: Any) -> bytes:
    """A good shard in one row group, nothing compressed."""
    return parquet(table(ROWS, 1), **{"compression": "none", "write_statistics": False} | options)


COLUMNS = ("a", "n", "c", "v", "t", "y")


def lying(data: bytes, change: Callable[[list[Any], list[Any]], None]) -> bytes:
    """A good shard whose footer is changed: called with the footer and the metadata of column n."""
    fields = footer(data)
    change(fields, chunk(fields, COLUMNS.index("n")))
    return with_footer(data, fields)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def with_pages(data: bytes, column: str, pages: Callable[[list[Any], bytes], bytes], dictionary: bool) -> bytes:
    """The shard with other bytes in place of a column's first page (its dictionary, or its data), moved to the file's end.

    `pages` gets the header of that page and its body, and returns all that shall stand there.
    """
    fields = footer(data)
    about = chunk(fields, COLUMNS.index(column))
    place, size = get(about, 11 if dictionary else 9), get(about, 7)  # dictionary_page_offset, data_page_offset
    start = min(field[2] for field in about if field[0] in (9, 11))
    header, body = read_struct(data, place)
    after = body + get(header, 3)  # compressed_page_size
    new = data[start:place] + pages(header, data[body:after]) + data[after : start + size]
    footer_at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    shift = footer_at - start
    for field in about:
        if field[0] in (9, 11):
            field[2] += shift + (len(new) - size if field[0] == 9 and dictionary else 0)
    put(about, 7, len(new))
    return with_footer(data[:footer_at] + new + data[footer_at:], fields)


def a_billion_values(header: list[Any], body: bytes) -> bytes:
    """A page that says a billion times "the first of the dictionary", in a dozen bytes."""
    levels = varint(BILLION << 1) + b"\1"
    run = len(levels).to_bytes(4, "little") + levels + b"\1" + varint(BILLION << 1) + b"\0"
    put(header, 2, len(run))  # uncompressed_page_size
    put(header, 3, len(run))
    put(get(header, 5), 1, BILLION)  # num_values
    return struct_bytes(header) + run


def zstd_of_one_byte(start: bytes, count: int) -> bytes:
    """A zstd frame of `start` and `count` times the letter x: four bytes for each 128 KiB."""
    blocks = [(len(start) << 3).to_bytes(3, "little") + start]
    while count:
        size = min(count, 128 * 2**10)
        count -= size
        blocks.append((size << 3 | 2 | (not count)).to_bytes(3, "little") + b"x")
    total = len(start) + sum(int.from_bytes(block[:3], "little") >> 3 for block in blocks[1:])
    return b"\x28\xb5\x2f\xfd\xe0" + total.to_bytes(8, "little") + b"".join(blocks)


def a_string_of_two_gigabytes(header: list[Any], body: bytes) -> bytes:
    """A dictionary of one string. The footer, of which the bound is made, still tells of the small one."""
    size = 2**31 - 48  # the header of a page cannot say more
    frame = zstd_of_one_byte(size.to_bytes(4, "little"), size)
    put(header, 2, size + 4)
    put(header, 3, len(frame))
    put(get(header, 7), 1, 1)
    return struct_bytes(header) + frame


def claims(rows: int, values: int, size: int) -> Callable[[list[Any], list[Any]], None]:
    """The rows of the group, the values of a column, and the bytes of all of it, as the footer tells them."""

    def change(fields: list[Any], about: list[Any]) -> None:
        group = get(fields, 4)[0]
        put(fields, 3, rows)
        put(group, 2, size)
        put(group, 3, rows)
        put(about, 5, values)
        put(about, 6, size)

    return change


def sizes_of_nothing(fields: list[Any], about: list[Any]) -> None:
    claims(ROWS, ROWS, 0)(fields, about)
    put(about, 7, 0)


def hidden_encoding() -> bytes:
    """Strings as "like the one before", of which the footer says nothing: expanded, 40 MB from 100 kB."""
    rows = table(400, 1).set_column(2, "c", [["x" * 100_000] * 400])
    data = parquet(rows, use_dictionary=False, column_encoding={"c": "DELTA_BYTE_ARRAY"})

    def change(fields: list[Any], _: list[Any]) -> None:
        about = chunk(fields, COLUMNS.index("c"))
        next(field for field in about if field[0] == 2)[2] = (5, [0, 3])  # encodings: PLAIN, RLE
        put(about, 6, 100)

    return lying(data, change)


@cache
def bombs() -> dict[str, tuple[bytes, str | None]]:
    """Name -> (bytes, what the reason must say; None: a lie that changes nothing of what is read). All are small."""
    good, billions = plain(), with_pages(plain(), "n", a_billion_values, dictionary=False)
    nested = table(ROWS, 1).set_column(2, "c", pa.array([[["x" * 1_000] * 50] * 50] * ROWS))
    return {
        "a billion of a dictionary": (lying(billions, claims(BILLION, BILLION, 100)), "would decode to [0-9,]+ bytes"),
        "the same, said to be 48": (billions, None),
        "a billion rows in the footer alone": (
            lying(good, claims(BILLION, BILLION, 0)),
            "would decode to [0-9,]+ bytes",
        ),
        "2**62 rows": (lying(good, claims(2**62, 2**62, 2**62)), "would decode to [0-9,]+ bytes|cannot be read"),
        "fewer than no rows": (lying(good, claims(-1, ROWS, 0)), "negative number of rows"),
        "fewer than no values": (lying(good, claims(ROWS, -5, 0)), "cannot be read"),
        "fewer values than rows": (lying(good, claims(ROWS, 10, 0)), None),
        "pages of no bytes": (lying(good, sizes_of_nothing), "cannot be read"),
        "a string of two gigabytes": (
            with_pages(plain(compression="zstd"), "c", a_string_of_two_gigabytes, dictionary=True),
            "would decode to [0-9,]+ bytes",
        ),
        "a thousand dictionaries": (
            with_pages(good, "n", lambda header, body: (struct_bytes(header) + body) * 1_000, dictionary=True),
            "row group 0 cannot be read.*dictionary",
        ),
        "an encoding that the footer hides": (hidden_encoding(), "row group 0 cannot be read"),
        "lists of lists of strings": (parquet(nested), "'c'.*has type list"),
    }


def explode(stores: Stores, told: Path) -> None:
    """In a child: a run over all bombs, a good shard after each. Leaves the reasons and peaks, and checks the history."""
    run = begin(stores, "memory://bombs", limits={"max_shards": 2})
    sent, peaks = [], {}
    page = resource.getpagesize()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * page
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE, mapped + ADDRESS_SPACE))
    for number, (name, (data, _)) in enumerate(bombs().items()):
        for key, shard in ((name, data), (f"{number} good", parquet(table(20, number)))):
            run.places.inbox.store.write(key, shard)
            sent.append((key, shard))
        before = int(Path("/proc/self/statm").read_text().split()[1]) * page
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        assert step(run).outcome is Outcome.COMMITTED
        status = Path("/proc/self/status").read_text()
        peaks[name] = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 - before
    history = audit(run.places.log, sent)
    rejected = {shard.key: shard.reason for version in history for shard in version.manifest.rejected}
    assert len(quarantined(run.places.log)) == len(rejected)
    assert {shard.rows for version in history for shard in version.manifest.consumed} == {20, ROWS}
    told.write_text(json.dumps([rejected, peaks]))


def test_bombs_are_quarantined_for_what_they_are_and_the_run_goes_on(tmp_path: Path) -> None:
    start_server()
    in_child(explode, tmp_path / "told", kill=None, tmp_path=tmp_path)
    rejected, peaks = json.loads((tmp_path / "told").read_text())
    expected = {name: reason for name, (_, reason) in bombs().items() if reason is not None}
    assert rejected.keys() == expected.keys()
    assert {name: rejected[name] for name in rejected if not re.search(expected[name], rejected[name])} == {}
    assert {name: peak for name, peak in peaks.items() if peak > PEAK} == {}


def test_the_bombs_would_go_off() -> None:
    """The pages are what they claim to be: on a small scale Arrow decodes them."""
    frame = zstd_of_one_byte(b"abc", 300_000)
    assert pa.decompress(frame, 300_003, codec="zstd").to_pybytes() == b"abc" + b"x" * 300_000
    assert all(len(data) < 1_000_000 for data, _ in bombs().values())


# ---- enormous specs --------------------------------------------------------------------------------------------------
ENORMOUS: dict[str, dict[str, Any]] = {
    "a layer that fills the memory": {"model": {"factory": "mlp", "arguments": {"hidden": [10**9]}}},
    "a layer that fits": {"model": {"factory": "mlp", "arguments": {"hidden": [2 * 10**7]}}},
    "layers that fit each": {"model": {"factory": "mlp", "arguments": {"hidden": [5_000] * 12}}},
    "embeddings": {"model": {"factory": "mlp", "arguments": {"hidden": [4], "embedding": 10**7}}},
    "more than a number can say": {"model": {"factory": "mlp", "arguments": {"hidden": [10**30]}}},
    "outputs": {"task": "multiclass", "classes": 10**10, "standardize_target": False},
    "outputs that fit": {"task": "multiclass", "classes": 10**7, "standardize_target": False},
}


def load_enormous(stores: Stores, told: Path) -> None:
    """In a child: load versions whose spec asks for far more than their weights hold. Leaves the errors and peaks."""
    log = begin(stores, "memory://enormous").places.log
    load_learner(log, log.head())  # what the first one imports is no part of the peaks
    found = {}
    page = resource.getpagesize()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * page
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE, mapped + ADDRESS_SPACE))
    for name, change in ENORMOUS.items():
        head = log.head()
        spec = Spec.model_validate(SPEC.model_dump() | change).model_dump(mode="json")
        blobs = head.manifest.blobs
        if "task" in change:  # the state says so too
            header, body = tensors(log.read_blob(blobs.state))
            about = json.loads(header["__metadata__"][METADATA_KEY])
            about["features"] |= {"task": "multiclass", "classes": change["classes"]}
            header["__metadata__"][METADATA_KEY] = json.dumps(about)
            state = log.write_blob(head.number + 1, "state.safetensors", tensor_file(header, body))
            blobs = blobs.model_copy(update={"state": state})
        version = log.commit(head, Entry(kind="batch", spec=spec, blobs=blobs))
        before = int(Path("/proc/self/statm").read_text().split()[1]) * page
        Path("/proc/self/clear_refs").write_text("5")
        try:
            load_learner(log, version)
            error = "accepted"
        except TrainingError as refused:
            error = f"{type(refused).__name__}: {refused}"
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 - before
        found[name] = [error, peak]
    told.write_text(json.dumps(found))


def test_a_spec_that_asks_for_more_than_its_weights_is_refused_before_it_is_built(tmp_path: Path) -> None:
    start_server()
    in_child(load_enormous, tmp_path / "told", kill=None, tmp_path=tmp_path)
    found = json.loads((tmp_path / "told").read_text())
    assert found.keys() == ENORMOUS.keys()
    for name, (error, peak) in found.items():
        assert re.match("StateMismatch|FactoryError|SpecError", error), (name, error)
        assert "alloc" not in error, (name, error)
        assert peak < 64 * 2**20, (name, peak)


# ---- keys ------------------------------------------------------------------------------------------------------------
KEYS = (
    *(
        "../in2/a.parquet",
        "../a.parquet",
        "..",
        "a/../../registry/model/log/00000001.json",
        "./a.parquet",
        "a/./b.parquet",
    ),
    *(
        "a//b.parquet",
        "/a.parquet",
        "a\\..\\b.parquet",
        "a?versionId=1",
        "a?x=1#y",
        "%2e%2e/a.parquet",
        "..%2fin2%2fa.parquet",
    ),
    *(
        "a\nb.parquet",
        "a\rb.parquet",
        "a\x1b[2J.parquet",
        "a\x7f",
        "caf\u00e9.parquet",
        "cafe\u0301.parquet",
        "\u202eteuqrap.a",
    ),
    *(
        "x" * 240 + ".parquet",
        "x" * 900,
        "model/log/00000001.json",
        "model/head.json",
        "model/quarantine/00000001-0",
        "a b+c&d=e",
    ),
    *("$(touch x)`id`", "'; drop", "{0}%s%n", "a:b", "~root", "-rf", "CON", "\ufeffa"),
)


@pytest.fixture
def raw_put(request: pytest.FixtureRequest, make_url: MakeUrl) -> Callable[[str, bytes], None]:
    """Put an object under the inbox past Tidemill, as a producer may; nothing where the backend itself cannot hold the key."""
    inbox = make_url("in")
    if inbox.startswith("memory:"):
        store = MemoryStore(*inbox.removeprefix("memory://").split("/", 1))

        def write(key: str, data: bytes) -> None:
            store.write(key, data)

        return write
    if inbox.startswith("s3:"):
        client: BaseClient = request.getfixturevalue("s3_client")
        prefix = inbox.removeprefix(f"s3://{BUCKET}/")

        def put_object(key: str, data: bytes) -> None:
            with suppress(client.exceptions.ClientError):
                client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=data)

        return put_object

    def write_file(key: str, data: bytes) -> None:
        path = Path(inbox) / key
        if not {"", ".", ".."} & set(key.split("/")):  # to a disk, those are other names, not this one
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    return write_file


def objects(url: str) -> dict[str, tuple[bytes, str]]:
    """Key -> (bytes, etag) of everything below a URL: equal only if nothing was written again."""
    store = open_store(url)
    return {info.key: (store.read(info.key), info.etag) for info in store.list() if ".tidemill" not in info.key}


def test_hostile_keys_touch_nothing_but_themselves(make_url: MakeUrl, raw_put: Callable[[str, bytes], None]) -> None:
    """Good and bad shards under every key; archived or quarantined, and sent back. Neighbours of the inbox stay as they are."""
    root = make_url("in").removesuffix("/in")
    run = begin(open_store, root, after_commit={"archive_to": make_url("archive")}, limits={"max_shards": 100})
    neighbours = {"in2/a.parquet", "a.parquet", "in.parquet", "in2/a\nb.parquet"}
    for key in neighbours:
        open_store(root).write(key, b"not yours")
    for number, key in enumerate(KEYS):
        raw_put(key, parquet(table(10, number)) if number % 2 else b"bad %d" % number)
    assert {key: data for key, (data, _) in objects(root).items() if key in neighbours} == dict.fromkeys(
        neighbours, b"not yours"
    )
    before = {k: v for k, v in objects(root).items() if not k.startswith(("in/", "registry/", "archive/"))}
    taken = {key: data for key, (data, _) in objects(make_url("in")).items() if is_shard(key)}
    hidden = objects(make_url("in")).keys() - taken.keys()
    assert len(taken) >= 18, "most of them are names like others"

    while step(run).outcome is not Outcome.IDLE:
        pass

    rejected = {name: about["key"] for name, about in quarantined(run.places.log).items()}
    assert all(re.fullmatch(r"0000000\d-[0-9a-f]{32}", name) for name in rejected)
    archived = {key: data for key, (data, _) in objects(make_url("archive")).items()}
    left = objects(make_url("in")).keys() - hidden
    owed = {debt.key for debt in run.places.log.head().manifest.owed} & left
    assert {key: data for key, data in taken.items() if not data.startswith(b"bad")} == archived | {
        key: taken[key] for key in owed
    }, "what the archive cannot hold stays, and is owed"
    assert sorted(rejected.values()) == sorted(key for key, data in taken.items() if data.startswith(b"bad"))
    audit(run.places.log, [*taken.items()])
    assert left == owed

    back = []
    for name in rejected:
        try:
            back.append(requeue(run.places.log, name, run.places.may_touch))
        except InvalidKey:
            assert len(rejected[name]) > 200, "only a name too long with its mark"
    assert objects(make_url("in")).keys() == owed | hidden | set(back)
    after = {k: v for k, v in objects(root).items() if not k.startswith(("in/", "registry/", "archive/"))}
    assert after == before
    registry = {key.split("/")[1] for key in objects(make_url("registry"))}
    assert registry <= {"log", "blobs", "runs", "aliases", "head.json", "quarantine"}


FORGED = "a\n12:00:00 version 99: forged\r\x1b[2K\u2028forged.parquet"


def readable(text: str) -> bool:
    """Nothing in it begins a line of its own, goes back in one, or speaks to the terminal."""
    return all(c.isprintable() for c in text)


def no_delete(call: Call) -> None:
    if (call.verb, call.phase, "forged" in call.key) == ("delete", "before", True):
        raise PermissionDenied("not allowed")


def test_a_key_cannot_forge_a_line_of_the_log(memory_run: OnlineRun, caplog: pytest.LogCaptureFixture) -> None:
    """Each line that names a key: refused, sent again, too large, not deleted, sent back."""
    caplog.set_level(logging.DEBUG, "tidemill")
    run, store = memory_run, memory_run.places.inbox.store
    run.settings = run.settings.model_copy(update={"limits": Limits(max_shard_bytes=20_000)})
    good = parquet(table(20, 1))
    store.write(FORGED, good)
    store.write(f"big {FORGED}", b"x" * 30_000)
    store.write(f"bad {FORGED}", b"bad")
    assert step(run).outcome is Outcome.COMMITTED
    store.write(FORGED, good)  # sent again
    run = OnlineRun(
        store.url, run.places.log.store.url, "model", run.settings, lambda url: FaultStore(open_store(url), no_delete)
    )
    assert step(run).outcome is Outcome.IDLE
    (name,) = quarantined(run.places.log)
    requeue(run.places.log, name, run.places.may_touch)
    told = [record.getMessage() for record in caplog.records]
    assert len([message for message in told if "forged" in message]) >= 3
    assert [message for message in told if not readable(message)] == []


def test_a_key_cannot_forge_a_line_of_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    run = begin(open_store, str(tmp_path))
    run.places.inbox.store.write(FORGED, b"bad")
    assert step(run).outcome is Outcome.COMMITTED
    _, words = views.followed(run.report)
    with pytest.raises(SystemExit):
        main(["requeue", f"{tmp_path}/registry", "model"])
    (name,) = quarantined(run.places.log)
    with pytest.raises(SystemExit):
        main(["requeue", f"{tmp_path}/registry", "model", name])
    lines = f"{words}\n{capsys.readouterr().out}".split("\n")
    assert len([line for line in lines if "forged" in line]) >= 3
    assert [line for line in lines if not readable(line)] == []


def _errors_about(store: Store) -> list[str]:
    """What each verb says of a key that is not there, or cannot be."""
    told = []
    for use in (
        lambda: store.stat(FORGED),
        lambda: store.read(FORGED),
        lambda: store.delete(FORGED),
        lambda: store.read(f"{FORGED}/../x"),
        lambda: store.write(f"{FORGED}/" + "x" * 300, b"") and store.create(f"{FORGED}/" + "x" * 300, b""),
    ):
        try:
            use()
        except StorageError as error:
            told.append(str(error))
    return told


def test_errors_of_a_store_keep_a_key_to_their_line(store: Store) -> None:
    told = _errors_about(store)
    assert len(told) >= 3
    assert [message for message in told if not readable(message)] == []


# ---- code ------------------------------------------------------------------------------------------------------------
class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """What a payload makes when it runs; proven to work, and gone again."""
    path = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    return path


def test_weights_and_state_are_never_unpickled(memory_run: OnlineRun, sentinel: Path, tmp_path: Path) -> None:
    log = memory_run.places.log
    head = log.head()
    torch.save({"weight": Payload(sentinel)}, tmp_path / "new.pt")
    torch.save({"weight": Payload(sentinel)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    payloads = [pickle.dumps(Payload(sentinel)), *(path.read_bytes() for path in sorted(tmp_path.glob("*.pt")))]
    assert len(payloads) == 3
    for data in payloads:
        for name in ("weights", "state"):
            number = log.head().number + 1
            refs = dict(zip(("weights", "state"), log.copy_blobs(number, head.manifest.blobs), strict=True))
            refs[name] = log.write_blob(number, "safetensors", data)
            version = log.commit(log.head(), Entry(kind="batch", spec=head.manifest.spec, blobs=Blobs(**refs)))
            with pytest.raises(StateMismatch):
                load_learner(log, version)
        assert not sentinel.exists()


def test_arrow_metadata_of_a_shard_runs_nothing(memory_run: OnlineRun, sentinel: Path) -> None:
    """Extension types of pickles, which pyarrow itself once loaded, and of a name that nobody registered."""
    rows = table(20, 1)
    column = rows.schema.field("a")
    for name in ("arrow.py_extension_type", "arrow.unknown"):
        pickled = pickle.dumps(Payload(sentinel))
        metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickled}
        field = pa.field("a", column.type, metadata=metadata)
        schema = rows.schema.set(0, field).with_metadata({"pandas": pickled, "huggingface": pickled})
        data = parquet(rows.cast(schema))
        assert b"it ran" in data or b"ARROW:schema" in data
        memory_run.places.inbox.store.write(f"{name}.parquet", data)
    assert step(memory_run).outcome is Outcome.COMMITTED
    assert not sentinel.exists()
    manifest = memory_run.places.log.head().manifest
    assert len(manifest.consumed) + len(manifest.rejected) == 2


def test_yaml_of_a_spec_makes_nothing(sentinel: Path, tmp_path: Path) -> None:
    text = f"features: [a]\ntarget: !!python/object/apply:os.mkdir [{json.dumps(str(sentinel))}]\n"
    yaml.unsafe_load(text)
    sentinel.rmdir()
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(UsageError, match="python/object/apply"):
        spec_file(["train", "--spec", str(tmp_path / "spec.yaml")])
    assert not sentinel.exists()


# ---- secrets ---------------------------------------------------------------------------------------------------------
SECRET = "S3cretForTests0123456789abcdefABCDEF+x"
KEY_ID = "AKIATESTS3CRETKEYID0"

SECRET_URLS = (
    f"s3://{KEY_ID}:{SECRET}@bucket/x",
    f"s3://{SECRET}@bucket/x",
    f"s3:{KEY_ID}:{SECRET}@bucket/x",
    f"s3:/{KEY_ID}:{SECRET}@bucket/x",
    f"{KEY_ID}:{SECRET}@bucket/x",
    f"s3a://{KEY_ID}:{SECRET}@bucket/x",
    f"S3://{KEY_ID}:{SECRET}@bucket/x",
    f"https://{KEY_ID}:{SECRET}@host/bucket",
    f"file://{KEY_ID}:{SECRET}@host/x",
    f"s3://{KEY_ID}:{SECRET}@bucket/x\0",
    f"s3://bucket/x?secret={SECRET}",
    f"s3://bucket/x#{SECRET}",
    f"memory://{KEY_ID}:{SECRET}@bucket/x",
)


def whole(error: BaseException) -> str:
    """All that a traceback would show: messages and causes, without the lines of this file."""
    return "".join(
        "".join(traceback.TracebackException.from_exception(e, lookup_lines=False).format_exception_only())
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_secret_in_a_url_is_refused_and_not_repeated(
    url: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StorageError) as refused:
        open_store(url)
    assert SECRET not in whole(refused.value)
    for command in (["status", url], ["log", url, "model"], ["status", "./registry", "model", "--inbox", url]):
        with pytest.raises(SystemExit):
            main(command)
    out, err = capsys.readouterr()
    assert err
    assert SECRET not in out + err + caplog.text


TROUBLE: dict[str, dict[str, str]] = {
    "wrong secret": {"AWS_SECRET_ACCESS_KEY": SECRET},
    "unknown session": {"AWS_SESSION_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET},
    "nobody listens": {"AWS_ENDPOINT_URL_S3": f"http://{KEY_ID}:{SECRET}@127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": SECRET},
    "no host": {"AWS_ENDPOINT_URL_S3": f"http://{KEY_ID}:{SECRET}@", "AWS_SECRET_ACCESS_KEY": SECRET},
    "no URL": {"AWS_ENDPOINT_URL_S3": f"{KEY_ID}:{SECRET}@127.0.0.1", "AWS_SECRET_ACCESS_KEY": SECRET},
}


@pytest.mark.parametrize("name", TROUBLE)
def test_errors_of_s3_tell_no_secret(
    name: str, s3_server: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in messages, nor in their causes, nor in the log at DEBUG."""
    caplog.set_level(logging.DEBUG, "tidemill")
    monkeypatch.setattr(S3Store, "retry_seconds", 0.2)
    for variable, value in TROUBLE[name].items():
        monkeypatch.setenv(variable, value)
    told = []
    for use in (
        lambda: open_store(f"s3://{BUCKET}/x").read("a"),
        lambda: open_store(f"s3://{BUCKET}/x").write("a", b""),
        lambda: [*open_store(f"s3://{BUCKET}-none/x").list()],
    ):
        with pytest.raises(StorageError) as refused:
            use()
        told.append(whole(refused.value))
    log = "\n".join(f"{r.getMessage()} {r.args}" for r in caplog.records if r.name.startswith("tidemill"))
    assert SECRET not in "\n".join(told) + log
    assert SECRET not in repr(open_store(f"s3://{BUCKET}/x"))


@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
def test_no_secret_is_stored_or_logged(
    make_url: MakeUrl, s3_server: S3, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good day on S3: the secret that signs every request stands in no object, no line, no report."""
    caplog.set_level(logging.DEBUG, "tidemill")
    secret = s3_server.admin.secret_key
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == secret
    run = begin(open_store, make_url("in").removesuffix("/in"))
    run.places.inbox.store.write("a.parquet", parquet(table(20, 1)))
    run.places.inbox.store.write("b.parquet", b"bad")
    assert step(run).outcome is Outcome.COMMITTED
    for command in ("status", "show", "log", "requeue"):
        with pytest.raises(SystemExit):
            main([command, make_url("registry"), "model"])
    stored = b"".join(data for data, _ in objects(make_url("registry")).values())
    assert b"quarantine" in stored
    printed = "".join(capsys.readouterr())
    assert "b.parquet" in printed
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert secret not in stored.decode(errors="replace") + printed + logged + run.report.model_dump_json() + repr(
        run.places.log.store
    )

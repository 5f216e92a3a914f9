"""The manifest: what a version says of itself, and that nobody can change it unseen."""

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tidemill.storage.errors import CorruptObject, UnsupportedFormat
from tidemill.storage.manifest import (
    FORMAT,
    Blobs,
    Consumed,
    DatasetRef,
    Entry,
    Gate,
    LabelShard,
    Manifest,
    ObjectRef,
    Owed,
    Parent,
    Record,
    Rejected,
    decode,
    encode,
    sha256,
)
from tidemill.storage.refs import BlobRef, TombstonesRef

WHERE = "s3://bucket/registry/taxi/log/00000042.json"
WHEN = datetime(2026, 2, 3, 4, 5, 6, 789_012, tzinfo=UTC)


def blob(name: str) -> BlobRef:
    return BlobRef(key=f"taxi/blobs/{name}", bytes=len(name), sha256=sha256(name.encode()))


def manifest(**changes: Any) -> Manifest:
    """A full one: every field has a value."""
    shard = {"inbox": "s3://in", "key": "a b?c=1/ü\n.parquet", "sha256": "5" * 64, "etag": '"e"', "last_modified": WHEN}
    labels = LabelShard(**{**shard, "key": "l.parquet"}, size=1, column="id", unmatched=0)
    fields: dict[str, Any] = {
        "kind": "online",
        "spec": {"model": {"factory": "a:b"}, "passes": 1, "clip": None},
        "resolved_spec": {"model": {"factory": "a:b"}, "loss": "mse"},
        "columns": {"a": "double", "b": "dictionary<values=string, indices=int32, ordered=0>"},
        "blobs": Blobs(weights=blob("w"), state=blob("s"), tombstones=TombstonesRef(**dict(blob("t")), version=40)),
        "consumed": (
            Consumed(
                **shard, size=1, ordinal=7, rows=8, unlabelled=1, score={"mae": 0.1}, loss=1 / 3, labels=(labels,)
            ),
        ),
        "rejected": (Rejected(**shard, size=1, reason="no rows"),),
        "owed": (
            Owed(inbox="s3://in", key="k", sha256="5", etag="e", action="archive", destination="s3://old", reason="r"),
        ),
        "metrics": {"holdout": {"mae": 0.1}, "epoch_loss": [1e-300, 0.2]},
        "counters": {"rows": 2**60},
        "dataset": DatasetRef(url="file:///d", fingerprint="f", files=1, rows=2),
        "run": "r",
        "rolled_back_to": 3,
        "code": "1.0",
        "environment": {"torch": "2.13"},
        "model": "taxi",
        "version": 42,
        "parent": Parent(version=41, sha256="p"),
        "nonce": "n",
        "created": WHEN,
    }
    return Manifest(**{**fields, **changes})


def signed(fields: dict[str, Any]) -> bytes:
    """What an attacker who knows the format, or another Tidemill, would store."""
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({**fields, "checksum": sha256(canonical.encode())}).encode()


def test_a_manifest_comes_back_as_it_was_stored() -> None:
    assert decode(encode(manifest()), WHERE) == manifest()
    assert encode(decode(encode(manifest()), WHERE)) == encode(manifest())


def test_it_is_plain_json_that_jq_can_read() -> None:
    stored = json.loads(encode(manifest()))
    assert stored["format"] == FORMAT == "2.4"
    assert stored["version"] == 42
    assert stored["blobs"][0] == {"name": "weights", "key": "taxi/blobs/w", "bytes": 1, "sha256": sha256(b"w")}
    assert [part["name"] for part in stored["blobs"]] == ["weights", "state", "tombstones"]
    assert [labels["key"] for labels in stored["consumed"][0]["labels"]] == ["l.parquet"]
    assert stored["consumed"][0]["key"] == "a b?c=1/ü\n.parquet"
    assert stored["spec"]["clip"] is None  # a setting that is off stays apart from one that is not given
    assert encode(manifest()).endswith(b"}\n")


def test_fields_without_a_value_are_left_out() -> None:
    stored = json.loads(encode(manifest(parent=None, dataset=None, run=None)))
    assert not {"parent", "dataset", "run"} & stored.keys()
    assert decode(encode(manifest(parent=None)), WHERE).parent is None


@settings(max_examples=60, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_exactly(value: float) -> None:
    back = decode(encode(manifest(metrics={"x": value})), WHERE).metrics["x"]
    assert (back, math.copysign(1, back)) == (value, math.copysign(1, value))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_a_spec_survives_exactly(value: object) -> None:
    assert decode(encode(manifest(spec={"x": value})), WHERE).spec == {"x": value}


def test_numbers_as_keys_become_strings_before_the_checksum_is_taken() -> None:
    assert decode(encode(manifest(spec={"x": {2: "a", 10: "b"}})), WHERE).spec == {"x": {"2": "a", "10": "b"}}


def test_times_of_any_zone_stay_the_same_moment() -> None:
    east = WHEN.astimezone(timezone(timedelta(hours=9)))
    assert decode(encode(manifest(created=east)), WHERE).created == WHEN


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["metrics", "spec", "environment"])
def test_a_number_that_json_cannot_hold_is_refused_and_never_dropped(field: str, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(manifest(**{field: {"x": [number]}}))


def test_a_score_that_is_not_finite_is_refused() -> None:
    shard = manifest().consumed[0]
    for broken in (shard.model_copy(update={"loss": math.nan}), shard.model_copy(update={"score": {"mae": math.inf}})):
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode(manifest(consumed=(broken,)))


def test_a_shard_without_labels_has_no_loss() -> None:
    shard = manifest().consumed[0].model_copy(update={"rows": 0, "loss": None})
    assert decode(encode(manifest(consumed=(shard,))), WHERE).consumed == (shard,)


def test_records_are_immutable_and_know_their_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().version = 43  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        manifest(notes="typo")


# ---- what was not written by this Tidemill -------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", ["2.5", "3.0", "2.10", "10.0", 10**9])
def test_a_newer_format_is_named_as_such(newer: str | int) -> None:
    with pytest.raises(UnsupportedFormat, match=f"{WHERE} has format {newer}; .* up to 2.4. Upgrade"):
        decode(json.dumps({"format": newer, "anything": "else"}).encode(), WHERE)


def test_every_edited_field_is_noticed() -> None:
    stored = json.loads(encode(manifest()))
    for name in stored:
        for edited in ({**stored, name: "other"}, {k: v for k, v in stored.items() if k != name}):
            with pytest.raises(CorruptObject, match=WHERE):
                decode(json.dumps(edited).encode(), WHERE)


def test_an_added_field_is_noticed() -> None:
    stored = json.loads(encode(manifest()))
    with pytest.raises(CorruptObject, match="edited or damaged"):
        decode(json.dumps({**stored, "note": "hand made"}).encode(), WHERE)


@pytest.mark.parametrize(
    "edit", [{"version": "x"}, {"kind": "magic"}, {"note": 1}, {"format": 0}, {"format": "1"}, {"format": "1.0"}]
)
def test_a_right_checksum_does_not_make_wrong_fields_right(edit: dict[str, object]) -> None:
    stored = json.loads(encode(manifest()))
    del stored["checksum"]
    assert decode(signed(stored), WHERE) == manifest()
    with pytest.raises(CorruptObject, match=WHERE):
        decode(signed({**stored, **edit}), WHERE)


@pytest.mark.parametrize("blobs", [[], {}, [{"name": "weights"}], "weights", [1]], ids=repr)
def test_blobs_that_are_no_list_of_parts_are_corrupt(blobs: object) -> None:
    stored = json.loads(encode(manifest()))
    del stored["checksum"]
    for wrong in (blobs, [*stored["blobs"], stored["blobs"][0]]):  # the second: a name twice
        with pytest.raises(CorruptObject, match=WHERE):
            decode(signed({**stored, "blobs": wrong}), WHERE)


# ---- the format ----------------------------------------------------------------------------------------------------------


def models() -> Iterator[type[Record]]:
    """Manifest, and all that it is made of."""
    waiting: list[type[Record]] = [Record]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if model.__module__ in (Record.__module__, Manifest.__module__) and model not in (
            Record,
            ObjectRef,
            Entry,
            BlobRef,
        ):
            yield model


def test_the_format_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs/format.md").read_text()
    missing = [
        f"{m.__name__}.{name}" for m in models() for name in m.model_fields if not re.search(rf"\b{name}\b", page)
    ]
    assert Gate in models()
    assert missing == []


def test_whitespace_and_the_order_of_fields_do_not_matter_to_the_checksum() -> None:
    stored = json.loads(encode(manifest()))
    assert decode(json.dumps(dict(reversed(stored.items()))).encode(), WHERE) == manifest()


def test_a_truncated_manifest_is_corrupt_wherever_it_ends() -> None:
    data = encode(manifest())
    for end in range(len(data) - 2):  # without the last newline it is still whole
        with pytest.raises(CorruptObject, match=WHERE):
            decode(data[:end], WHERE)


def test_no_flipped_bit_goes_unseen() -> None:
    data = encode(manifest())
    for i in range(len(data)):
        flipped = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        try:
            found = decode(flipped, WHERE)
        except (CorruptObject, UnsupportedFormat):
            continue
        assert found == manifest()  # white space between fields


GARBAGE = [
    *(
        b"",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{}",
        b"\xff\xfe",
        b"PAR1",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"1" * 5_000,
    ),
    *(b'{"format": [2]}', b'{"format": 1e999}', b'{"format": true}', b'{"version": NaN}'),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda data: repr(data[:12]))
def test_whatever_is_no_manifest_is_corrupt(garbage: bytes) -> None:
    with pytest.raises(CorruptObject, match=rf"{WHERE} is no Tidemill manifest: .*Restore the object"):
        decode(garbage, WHERE)

"""Labels that come after their features: the join, row by row, against a dict."""

import random
import re
from collections.abc import Sequence
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import SPEC, rows
from tidemill.storage.errors import ShardRejected
from tidemill.storage.parquet import ParquetFile, RowGroup, row_groups
from tidemill.tasks.online import labels as module
from tidemill.tasks.online.labels import Labels
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.families import told
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import TableGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import score, train_shard
from tidemill.tasks.training.steps import Steps


def shard(table: pa.Table, name: str = "x.parquet", row_group_size: int = 7) -> list[RowGroup]:
    """A table as the row groups of a Parquet file, which is how shards are read: text comes dictionary-encoded."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size)
    data = bytes(sink.getvalue())
    return row_groups(ParquetFile(name, len(data), lambda start, length: data[start : start + length], ShardRejected))


def in_memory(table: pa.Table) -> TableGroup:
    """A table as one row group, its dictionaries as they are."""
    return TableGroup("g", table, "f")


def column(values: Sequence[object], kind: pa.DataType | None = None, name: str = "id") -> pa.Table:
    return pa.table({name: pa.array(values, kind)})


def labels_of(keys: pa.Array, values: Sequence[object], **settings: object) -> Labels:
    return Labels(shard(pa.table({"id": keys, "y": pa.array(values, pa.float64())}), "l.parquet"), "id", ["y"])


def joined_values(features: pa.Table, labels: Labels) -> tuple[list[object], int]:
    joined = labels.join(shard(features))
    return [y for group in joined.groups for y in group.read(["y"]).column("y").to_pylist()], joined.unmatched


# ---- the join --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.timestamp("ms"), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("seed", range(8))
def test_any_join_equals_that_of_a_dict(kind: pa.DataType, seed: int) -> None:
    source = random.Random(seed)
    space = source.choice([5, 30, 300])

    def key() -> object:
        if source.random() < 0.1:
            return None
        n = source.randrange(space)
        text = pa.types.is_string(kind) or pa.types.is_dictionary(kind)
        return f"k{n}" if text else datetime.fromtimestamp(n, UTC) if pa.types.is_timestamp(kind) else n

    label_of: dict[object, object] = {}
    label_keys = [key() for _ in range(source.randrange(1, 60))]
    for k in label_keys:
        label_of.setdefault(k, None if source.random() < 0.2 else source.random())
    null_keys = [source.random() for _ in label_keys]  # of which nothing is asked
    values = [null if k is None else label_of[k] for k, null in zip(label_keys, null_keys, strict=True)]
    keys = [key() for _ in range(source.randrange(1, 60))]

    found, unmatched = joined_values(column(keys, kind), labels_of(pa.array(label_keys, kind), values))
    assert found == [None if k is None else label_of.get(k) for k in keys]
    assert unmatched == sum(k is None or k not in keys for k in label_keys)


def uuids(*values: bytes | None) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(values, pa.binary(16)))


def test_keys_may_be_of_an_extension_type_on_either_side() -> None:
    one, two, three = (bytes([i]) * 16 for i in range(3))
    labels = labels_of(uuids(one, two), [0.1, 0.2])
    assert joined_values(pa.table({"id": uuids(two, None, three)}), labels) == ([0.2, None, None], 1)
    assert joined_values(column([one], pa.binary(16)), labels) == ([0.1], 1)


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.timestamp("us")])
def test_a_key_that_is_null_everywhere_has_no_labels_whatever_its_type_is(kind: pa.DataType) -> None:
    labels = labels_of(pa.nulls(1, kind), [0.1])
    assert joined_values(pa.table({"id": pa.nulls(2)}), labels) == ([None, None], 1)
    untyped = labels_of(pa.nulls(1), [0.1])
    assert joined_values(pa.table({"id": pa.nulls(2, kind)}), untyped) == ([None, None], 1)
    assert joined_values(pa.table({"id": pa.nulls(2)}), untyped) == ([None, None], 1)


def test_labels_that_are_all_null_need_no_type() -> None:
    labels = Labels(shard(pa.table({"id": [1, 2], "y": pa.nulls(2)})), "id", ["y"])
    assert joined_values(column([2, 3]), labels) == ([None, None], 1)


def test_types_are_told_in_plain_words() -> None:
    labels = labels_of(pa.array([1]), [0.1])
    with pytest.raises(ShardRejected, match=r"column 'id' is text, but int64 in l\.parquet; write both"):
        labels.join(shard(column(["a"])))
    with pytest.raises(
        ShardRejected, match=r"target 'y' of x\.parquet has type list of text: write a number or a label"
    ):
        Labels(shard(pa.table({"id": [1], "y": [["a"]]})), "id", ["y"])


def test_groups_are_those_of_the_features_with_the_targets_behind() -> None:
    features = pa.table({"a": [0.5, 1.5, 2.5], "id": [1, 2, 3], "b": ["x", "y", "x"]})
    labels = Labels(shard(pa.table({"z": [7, 8], "id": [3, 1], "ignored": [0, 0], "y": [0.3, 0.1]})), "id", ["y", "z"])
    plain = shard(features, row_group_size=2)
    groups = labels.join(plain).groups
    assert [(g.name, g.num_rows) for g in groups] == [(g.name, g.num_rows) for g in plain]
    assert groups[0].schema.names == ["a", "id", "b", "y", "z"]
    assert groups[0].schema.field("z").type == pa.int64()
    assert groups[0].read(["z", "a", "y"]).to_pydict() == {"z": [8, None], "a": [0.5, 1.5], "y": [0.1, None]}
    assert groups[1].read(["y"]).to_pydict() == {"y": [0.3]}
    assert groups[1].read(["b", "id"]).to_pydict() == {"b": ["x"], "id": [3]}
    assert groups[0].read(["b"]).schema == plain[0].read(["b"]).schema


def test_training_takes_joined_rows_as_if_the_target_had_been_there() -> None:
    whole = rows(40, 1)
    keyed = whole.append_column("id", [list(range(40))])
    late = keyed.select(["id", "y"]).take(list(range(39, -1, -1))).slice(0, 30)  # backwards, the first ten never come
    joined = Labels(shard(late), "id", ["y"]).join(shard(keyed.drop_columns("y"), row_group_size=16)).groups
    at_once = shard(whole.set_column(2, "y", [[None] * 10 + whole["y"].to_pylist()[10:]]), row_group_size=16)

    dumps = []
    for groups in (joined, at_once):
        learner = Learner.create(SPEC, Features.resolve(SPEC, whole.schema).fit(shard(whole)))
        before = score(learner, groups)
        result = train_shard(Steps(learner), groups, 2)
        assert (before.rows, result.rows, result.unlabelled) == (30, 30, 10)
        dumps.append((before, result, learner.dump()))
    assert dumps[0] == dumps[1]


# ---- keys of different types -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (pa.int32(), pa.int64()),
        (pa.uint8(), pa.int16()),
        (pa.uint16(), pa.uint64()),
        (pa.int64(), pa.uint64()),
        (pa.string(), pa.large_string()),
        (pa.string(), pa.binary()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.timestamp("s"), pa.timestamp("ns")),
        (pa.timestamp("us"), pa.timestamp("ms", "UTC")),
        (pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "UTC")),
    ],
)
def test_types_of_one_kind_match(kind: pa.DataType, other: pa.DataType) -> None:
    def keys(ids: list[int], of: pa.DataType) -> pa.Array:
        if pa.types.is_integer(of):
            return pa.array(ids, of)
        if pa.types.is_timestamp(of):
            return pa.array(ids, pa.timestamp("s")).cast(pa.timestamp(of.unit)).cast(of)
        return pa.array([str(i) for i in ids]).cast(of)

    for a, b in ((kind, other), (other, kind)):
        found = joined_values(pa.table({"id": keys([1, 2, 3], a)}), labels_of(keys([3, 9, 1], b), [0.3, 0.9, 0.1]))
        assert found == ([0.1, None, 0.3], 1)


def test_integers_beyond_the_other_type_match_nothing() -> None:
    large = [2**63 + 1, 2**64 - 1, 5]
    labels = labels_of(pa.array(large, pa.uint64()), [1.0, 2.0, 3.0])
    assert joined_values(column([-(2**63) + 1, -1, 5], pa.int64()), labels) == ([None, None, 3.0], 2)
    assert joined_values(column(large, pa.uint64()), labels) == ([1.0, 2.0, 3.0], 0)
    exact = labels_of(pa.array([2**53, 2**53 + 1]), [1.0, 2.0])
    assert joined_values(column([2**53 + 1], pa.uint64()), exact) == ([2.0], 1)


@pytest.mark.parametrize(
    ("kind", "other"),
    [(pa.int64(), pa.string()), (pa.timestamp("us"), pa.int64()), (pa.string(), pa.timestamp("us"))],
)
def test_types_of_different_kinds_are_refused(kind: pa.DataType, other: pa.DataType) -> None:
    labels = labels_of(pa.nulls(1, other), [1.0])
    said = re.escape(f"x.parquet: column 'id' is {told(kind)}, but {told(other)} in l.parquet;")
    with pytest.raises(ShardRejected, match=said):
        labels.join(shard(column([None], kind)))


@pytest.mark.parametrize("kind", [pa.float64(), pa.bool_(), pa.date32(), pa.list_(pa.int64())])
def test_types_that_are_no_keys_are_refused_on_both_sides(kind: pa.DataType) -> None:
    with pytest.raises(ShardRejected, match=r"key column 'id' of l.parquet has type .*; write integers"):
        labels_of(pa.nulls(1, kind), [1.0])
    with pytest.raises(ShardRejected, match=r"key column 'id' of x.parquet has type .*; write integers"):
        labels_of(pa.array([1]), [1.0]).join(shard(column([None], kind)))


def test_a_timestamp_that_the_finer_unit_cannot_hold_is_refused() -> None:
    labels = labels_of(pa.array([1], pa.timestamp("ns")), [1.0])
    with pytest.raises(ShardRejected, match=r"'id' is timestamp.*out of bounds"):
        labels.join(shard(column([datetime(9999, 12, 31)], pa.timestamp("us"))))


# ---- bad shards ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "fine"),
    [([1.0, 1.0], True), ([None, None], True), ([1.0, 2.0], False), ([None, 1.0], False), ([1.0, None], False)],
)
@pytest.mark.parametrize("kind", [pa.float16(), pa.float64(), pa.int32(), pa.duration("s")])
def test_a_key_may_come_twice_with_the_same_label_only(
    values: list[float | None], fine: bool, kind: pa.DataType
) -> None:
    whole = pa.types.is_integer(kind) or pa.types.is_duration(kind)
    typed = pa.array([v if v is None or not whole else int(v) for v in [7.0, *values, 8.0]], kind)
    table = pa.table({"id": ["other", "twice", "twice", None], "y": typed})
    for size in (1, 10):  # in one row group, and in several
        if fine:
            assert Labels(shard(table, row_group_size=size), "id", ["y"]).join(shard(column(["twice"]))).unmatched == 2
            continue
        with pytest.raises(ShardRejected, match=r"x.parquet.*'id' has 'twice' more than once, with different .*'y'"):
            Labels(shard(table, row_group_size=size), "id", ["y"])


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (12, "12"),
        ("a\nb", r"'a\\nb'"),
        ("x" * 1_000_000, r"'x{1,20}\.\.\.x{1,20}'"),
        (b"\xff\xfe", "'\ufffd\ufffd'"),
        (datetime(2026, 1, 2), "2026-01-02 00:00:00.000000"),
    ],
)
def test_the_message_shows_one_key_on_one_line(key: object, shown: str) -> None:
    secret = [f"other{i}" for i in range(3)] if isinstance(key, str) else []
    table = pa.table({"id": pa.array([*secret, key, key]), "y": [0.0] * len(secret) + [1.0, 2.0]})
    with pytest.raises(ShardRejected, match=f"column 'id' has {shown} more than once") as caught:
        Labels(shard(table), "id", ["y"])
    assert "\n" not in str(caught.value)
    assert "other" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_target_among_the_features_is_refused() -> None:
    labels = labels_of(pa.array([1]), [1.0])
    with pytest.raises(ShardRejected, match=r"x.parquet has a column 'y', which is to come from the labels"):
        labels.join(shard(pa.table({"id": [1], "y": [1.0]})))


def test_missing_columns_are_named() -> None:
    with pytest.raises(ShardRejected, match=r"x.parquet has no column 'id'"):
        Labels(shard(pa.table({"y": [1.0]})), "id", ["y"])
    with pytest.raises(ShardRejected, match=r"x.parquet has no column 'y'"):
        Labels(shard(pa.table({"id": [1]})), "id", ["y"])
    with pytest.raises(ShardRejected, match=r"x.parquet has no column 'id'"):
        labels_of(pa.array([1]), [1.0]).join(shard(pa.table({"a": [1.0]})))


@pytest.mark.parametrize("values", [[[1.0]], [datetime(2026, 1, 1)]])
def test_labels_that_are_neither_numbers_nor_text_are_refused(values: list[object]) -> None:
    with pytest.raises(ShardRejected, match=r"target 'y' of x.parquet has type .*: write a number"):
        Labels(shard(pa.table({"id": [1], "y": values})), "id", ["y"])


def test_a_key_that_is_a_target_is_a_mistake_of_the_settings() -> None:
    with pytest.raises(SpecError, match="both the key"):
        Labels(shard(column([1])), "id", ["id"])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labels_of(pa.array([1]), [1.0])
    monkeypatch.setattr(module, "MAX_DECODED_BYTES", 400)
    labels.join(shard(column(range(100))))
    with pytest.raises(ShardRejected, match="too many rows to join"):
        labels.join(shard(column(range(101))))
    with pytest.raises(ShardRejected, match=r"l.parquet row group 3: the labels up to here take more than 400 bytes"):
        labels_of(pa.array(range(50)), [1.0] * 50)


def test_a_long_key_in_many_rows_is_held_once() -> None:
    """Expanded, these keys would take 20 GB, more than one Arrow string array can hold."""
    long = "k" * 200_000
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), [long])
    joined = labels_of(pa.array([long]), [1.0]).join([in_memory(pa.table({"id": text}))])
    assert joined.groups[0].read(["y"]).column("y").to_pylist() == [1.0] * len(text)
    assert Labels([in_memory(pa.table({"id": text, "y": [1.0] * len(text)}))], "id", ["y"]).join([]).unmatched == len(
        text
    )


def test_a_dictionary_that_holds_a_value_twice_is_one_key() -> None:
    def keys(*indices: int) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), ["a", "b", "a"])

    for indices in ((0, 1), (2, 1), (0, 1, 2)):
        labels = Labels(
            [in_memory(pa.table({"id": keys(*indices), "y": [1.0, 2.0, 1.0][: len(indices)]}))], "id", ["y"]
        )
        (group,) = labels.join([in_memory(pa.table({"id": keys(0, 1, 2)}))]).groups
        assert group.read(["y"]).column("y").to_pylist() == [1.0, 2.0, 1.0]
    with pytest.raises(ShardRejected, match="'a' more than once"):
        Labels([in_memory(pa.table({"id": keys(0, 1, 2), "y": [1.0, 2.0, 3.0]}))], "id", ["y"])


def test_a_null_inside_the_dictionary_is_a_null_key() -> None:
    keys = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1], pa.int32()), pa.array([None, "a"]))
    joined = Labels([in_memory(pa.table({"id": keys, "y": [1.0, 2.0, 3.0]}))], "id", ["y"]).join(
        [in_memory(pa.table({"id": keys}))]
    )
    assert joined.groups[0].read(["y"]).column("y").to_pylist() == [None, None, 3.0]
    assert joined.unmatched == 2

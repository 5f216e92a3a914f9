"""Statistics are learned once and exactly; what cannot be used is refused with its column and row group."""

import datetime as dt
import json
import statistics

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.training.batches import Split
from tasks.training.errors import ColumnError
from tasks.training.features import Features
from tasks.training.spec import Column
from tests.training.rows import (
    VECTORS,
    WHERE,
    TableGroup,
    cut,
    encode,
    numbers_table,
    plain_spec,
    same_bits,
    spec_of,
    table_of,
)


# ---- standardising ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int64(), pa.int16()])
@pytest.mark.parametrize("width", [1, 3, 300])
def test_standardised_columns_have_mean_0_and_deviation_1(kind, width):
    generator = torch.Generator().manual_seed(0)
    data = {f"a{i}": torch.randint(-999, 999, (5000,), generator=generator).numpy() for i in range(width)}
    table = pa.table({name: pa.array(values).cast(kind) for name, values in data.items()} | {"y": [0.0] * 5000})
    x_NF = encode(spec_of(*data, standardize_features=True), table).x_NF.double()
    torch.testing.assert_close(x_NF.mean(0), torch.zeros(width).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x_NF.std(0, correction=0), torch.ones(width).double(), atol=1e-6, rtol=0)


def test_large_offsets_keep_their_digits():
    moments = [dt.datetime(2026, 1, 1) + dt.timedelta(milliseconds=i) for i in range(1000)]
    x_NF = encode(spec_of("a", standardize_features=True), table_of(pa.array(moments, pa.timestamp("ns")))).x_NF
    torch.testing.assert_close(
        x_NF.diff(dim=0), torch.full((999, 1), 1 / statistics.pstdev(range(1000))), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int64()])
def test_a_constant_column_becomes_0_and_a_null_the_mean(kind):
    constant = pa.array([0.1, None, 0.1] * 999).cast(kind, safe=False)
    assert encode(spec_of("a", standardize_features=True), table_of(constant)).x_NF.abs().max() == 0
    varied = pa.array([1, None, 3]).cast(kind)
    assert encode(spec_of("a", standardize_features=True), table_of(varied)).x_NF.squeeze(1).tolist() == [-1, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.none(), st.integers(-(2**20), 2**20).map(lambda i: i / 64)), min_size=2, max_size=60),
    offset=st.sampled_from([0.0, 1e9]),
    data=st.data(),
)
def test_statistics_do_not_depend_on_the_row_groups(values, offset, data):
    present = [value + offset for value in values if value is not None]
    if not present:
        return
    array = pa.array([None if value is None else value + offset for value in values], pa.float64())
    sizes, left = [], len(values)
    while left and (size := data.draw(st.integers(0, left))):
        sizes.append(size)
        left -= size
    spec = spec_of("a", standardize_features=True, standardize_target=True)
    table = pa.table({"a": array, "y": array})
    seen = Features.resolve(spec, table.schema).fit(cut(table, *sizes)).statistics
    mean, std = statistics.fmean(present), statistics.pstdev(present)
    assert seen.mean_F.item() == pytest.approx(mean, rel=1e-12, abs=1e-9)
    assert seen.std_F.item() == pytest.approx(std or 1.0, rel=1e-6, abs=1e-6)
    assert (seen.target_mean, seen.target_std) == (seen.mean_F.item(), seen.std_F.item())
    assert (seen.rows, seen.nulls) == (len(values), (len(values) - len(present),))


def test_statistics_are_of_the_split_only():
    table = numbers_table(1000, 1).append_column("s", pa.array(["a", None] * 500))
    groups = cut(table, 400)
    spec = spec_of("x0", "s", standardize_features=True)
    split = Split(0.4, held_out=False)
    kept = torch.cat([split.rows(group) for group in groups])
    filtered = table.filter(pa.array(kept.tolist()))
    seen = Features.resolve(spec, table.schema).fit(groups, split).statistics
    alone = Features.resolve(spec, table.schema).fit(cut(filtered)).statistics
    assert (seen.rows, seen.nulls) == (alone.rows, alone.nulls)
    torch.testing.assert_close(seen.mean_F, alone.mean_F)
    torch.testing.assert_close(seen.std_F, alone.std_F)


def test_float32_without_nulls_and_with_nulls_round_alike():
    table = numbers_table(500, 3)
    spec = plain_spec(3, standardize_features=True)
    features = Features.resolve(spec, table.schema).fit(cut(table))
    holes = table.set_column(1, "x1", pa.array([None, *table.column("x1").to_pylist()[1:]], pa.float32()))
    full, holed = features.encode(table, WHERE).x_NF, features.encode(holes, WHERE).x_NF
    assert same_bits(full[1:], holed[1:])
    assert holed[0, 1] == 0


def test_encoding_never_writes_to_the_table():
    table = pa.table(
        {
            "a": [1.0, 2.0],
            "b": pa.array([1, 2], pa.float32()),
            "v": VECTORS.cast(pa.list_(pa.float64(), 2))[2:],
            "y": [3.0, 5.0],
        }
    )
    copy = pa.table(table.to_pydict(), table.schema)
    spec = spec_of("a", "b", "v", standardize_features=True, standardize_target=True)
    first = encode(spec, table)
    assert table.equals(copy)
    assert first.y_N.tolist() == [-1, 1]


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("column", ["a", "b", "v", "y"])
def test_nan_and_infinity_are_refused(bad, kind, column):
    good = {name: pa.array([1.0] * 5000, kind) for name in ("a", "b", "y")}
    good["v"] = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 10_000, kind), 2)
    holed = [1.0] * 10_000
    holed[4321] = bad
    array = pa.array(holed, kind) if column == "v" else pa.array(holed[:5000], kind)
    broken = good | {column: pa.FixedSizeListArray.from_arrays(array, 2) if column == "v" else array}
    features = Features.resolve(spec_of("a", "b", "v"), pa.table(good).schema)
    message = f"'{column}' of {WHERE} has NaN.*write nulls for missing values"
    with pytest.raises(ColumnError, match=message):
        features.fit([TableGroup(WHERE, pa.table(broken))])
    with pytest.raises(ColumnError, match=message):
        features.encode(pa.table(broken), WHERE)


def test_nan_as_a_category_is_refused():
    with pytest.raises(ColumnError, match=r"'a' of .*nan is not a category"):
        encode(spec_of(Column(name="a", kind="category")), table_of(pa.array([1.0, float("nan")])))


def test_a_sum_that_overflows_is_no_infinity():
    table = table_of(pa.array([3e38, 3e38, 3e38], pa.float32()))
    assert encode(spec_of("a"), table).x_NF.squeeze(1).tolist() == table.column("a").to_pylist()


def test_a_value_beyond_float32_is_refused():
    with pytest.raises(ColumnError, match=r"'a' .*beyond float32 in 1 rows"):
        encode(spec_of("a"), table_of(pa.array([1.0, 1e300])))


@pytest.mark.parametrize(
    "array", [pa.nulls(4, pa.float32()), pa.nulls(4, pa.string()), pa.array([[1, None]] * 4, pa.list_(pa.int8(), 2))]
)
def test_a_wholly_null_column_of_the_dataset_is_refused(array):
    with pytest.raises(ColumnError, match="'a' is null in all 4 rows of the dataset: remove it"):
        encode(spec_of("a"), table_of(array))


def test_a_wholly_null_target_of_the_dataset_is_refused():
    table = pa.table({"a": [1.0, 2], "y": pa.nulls(2, pa.float32())})
    with pytest.raises(ColumnError, match="target 'y' is null in all 2 rows"):
        encode(spec_of("a"), table)


def test_a_row_group_that_is_null_in_a_column_is_fine():
    table = pa.table({"a": [1.0, 3, None, None], "y": [0.0, 1, 2, 3]})
    spec = spec_of("a", standardize_features=True)
    features = Features.resolve(spec, table.schema).fit(cut(table, 2))
    assert features.encode(table.slice(2), WHERE).x_NF.squeeze(1).tolist() == [0, 0]


SCHEMA = pa.schema(
    [("alpha", pa.int32()), ("text", pa.string()), ("v", pa.list_(pa.float32(), 3)), ("y", pa.float32())]
)
ALL = spec_of("alpha", "text", "v")


def changed(name, kind):
    return SCHEMA.set(SCHEMA.get_field_index(name), pa.field(name, kind))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (changed("alpha", pa.float64()), None),
        (changed("alpha", pa.bool_()), None),
        (changed("text", pa.dictionary(pa.int8(), pa.large_string())), None),
        (changed("y", pa.decimal128(9, 2)), None),
        (SCHEMA.append(pa.field("more", pa.string())), None),
        (pa.schema(reversed(list(SCHEMA))), None),
        (changed("alpha", pa.string()), "'alpha' of s.parquet has type string, .* a number: write the old type"),
        (changed("alpha", pa.timestamp("s")), "has type timestamp"),
        (changed("alpha", pa.null()), "has type null"),
        (changed("text", pa.int8()), "with a text"),
        (changed("v", pa.list_(pa.float32(), 4)), "with a number vector of 3"),
        (changed("y", pa.string()), "'y' of s.parquet has type string"),
        (SCHEMA.remove(0), "'alpha' is missing from s.parquet: it has 'text', 'v', 'y'"),
        (pa.schema([pa.field("Alpha", pa.int32()), *list(SCHEMA)[1:]]), "did you mean 'Alpha'"),
        (SCHEMA.append(pa.field("alpha", pa.int32())), "'alpha' occurs 2 times"),
    ],
)  # fmt: skip
def test_a_changed_schema(schema, message):
    features = Features.resolve(ALL, SCHEMA)
    if message is None:
        features.check(schema, "s.parquet")
    else:
        with pytest.raises(ColumnError, match=message):
            features.check(schema, "s.parquet")


def test_without_the_target_a_schema_does_for_prediction():
    features = Features.resolve(ALL, SCHEMA)
    features.check(SCHEMA.remove(3), "s.parquet", labelled=False)
    with pytest.raises(ColumnError, match="'y' is missing"):
        features.check(SCHEMA.remove(3), "s.parquet")


@pytest.mark.parametrize("kind", [pa.string(), pa.timestamp("s"), pa.list_(pa.float32(), 2)])
def test_a_target_must_be_a_number(kind):
    with pytest.raises(ColumnError, match=r"target 'y' .*write a number"):
        Features.resolve(spec_of("a"), pa.schema([("a", pa.int8()), ("y", kind)]))


@pytest.mark.parametrize(
    ("task", "labels", "kind", "expected"),
    [
        ("binary", [0, 1, None], pa.int64(), torch.float32),
        ("binary", [False, True, None], pa.bool_(), torch.float32),
        ("binary", [0.0, 1.0, None], pa.float64(), torch.float32),
        ("multiclass", [0, 2, None], pa.int8(), torch.int64),
        ("multiclass", [0.0, 2.0, None], pa.float32(), torch.int64),
    ],
)
def test_labels(task, labels, kind, expected):
    table = pa.table({"a": [1, 2, 3], "y": pa.array(labels, kind)})
    encoded = encode(spec_of("a", task=task, classes=3 if task == "multiclass" else None), table)
    assert encoded.y_N.dtype == expected
    assert encoded.y_N.tolist()[:2] == labels[:2]
    assert encoded.labelled_N.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("task", "bad", "message"),
    [
        ("binary", 2.0, "holds 2, but binary labels are 0 or 1"),
        ("binary", 0.5, "holds 0.5"),
        ("multiclass", 3.0, "holds 3, but multiclass labels are whole numbers from 0 to 2"),
        ("multiclass", -1.0, "holds -1"),
        ("multiclass", 1.5, "holds 1.5"),
        ("multiclass", float("nan"), "holds nan"),
    ],
)
def test_other_labels_are_refused(task, bad, message):
    spec = spec_of("a", task=task, classes=3 if task == "multiclass" else None)
    table = pa.table({"a": [1, 2], "y": [1.0, bad]})
    with pytest.raises(ColumnError, match=f"target 'y' of {WHERE} {message}"):
        Features.resolve(spec, table.schema).encode(table, WHERE)


# ---- state -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("standardize", [True, False])
def test_the_state_brings_back_the_same_features(standardize):
    table = pa.table({"alpha": [1, 5, 7], "text": ["a", None, "b"], "v": [[1.0, 2, 3]] * 3, "y": [0.1, 0.2, 0.4]})
    table = table.cast(SCHEMA)
    spec = ALL.model_copy(update={"standardize_features": standardize, "standardize_target": standardize})
    features = Features.resolve(spec, SCHEMA).fit(cut(table))
    tensors, config = features.state()
    again = Features.from_state(tensors, json.loads(json.dumps(config)))
    for before, after in zip(features.encode(table, WHERE)[:3], again.encode(table, WHERE)[:3], strict=True):
        assert same_bits(before, after)
    assert (again.columns, again.numbers, again.buckets, again.row_bytes) == (features.columns, 4, (1000,), 28)
    unfitted = Features.resolve(spec, SCHEMA)
    assert Features.from_state(*unfitted.state()).fitted is not standardize

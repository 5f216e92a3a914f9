"""Statistics are learned once and exactly; what cannot be used is refused with its column and row group."""

import datetime as dt
import json
import statistics

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.rows import (
    VECTORS,
    WHERE,
    TableGroup,
    cut,
    encode,
    encoded,
    numbers_table,
    plain_spec,
    same_bits,
    spec_of,
    table_of,
)
from tidemill.tasks.training import request_log
from tidemill.tasks.training.columns import hash_bucket
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.spec import Column


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
    assert same_bits(seen.target_mean, seen.mean_F)
    assert same_bits(seen.target_std, seen.std_F)
    assert (seen.rows, seen.nulls) == (len(values), (len(values) - len(present),))


def test_running_statistics_are_those_of_all_rows_seen_so_far():
    spec = spec_of(
        *("x0", Column(name="v"), "s"), standardize_features=True, standardize_target=True, running_statistics=True
    )
    table = numbers_table(300, 1).append_column("s", pa.array(["a", None, "b"] * 100))
    vectors = pa.array([[1.0, float(i)] if i % 7 else None for i in range(300)], pa.list_(pa.float32(), 2))
    table = table.append_column("v", vectors)
    features = Features.resolve(spec, table.schema).fit(cut(table.slice(0, 100)))
    for start, rows in ((100, 1), (101, 0), (101, 199)):
        features = features.updated(cut(table.slice(start, rows)))
        features = Features.from_state(*features.state())
    seen, straight = features.statistics, Features.resolve(spec, table.schema).fit(cut(table)).statistics
    assert (seen.rows, seen.nulls) == (straight.rows, straight.nulls)
    for name in ("mean_F", "std_F", "target_mean", "target_std"):
        torch.testing.assert_close(getattr(seen, name), getattr(straight, name))


@pytest.mark.parametrize("value", [1e30, 1e200, -1e38])
def test_running_statistics_refuse_a_value_far_out(value):
    spec = spec_of("x0", standardize_features=True, running_statistics=True)
    table = numbers_table(100, 1)
    features = Features.resolve(spec, table.schema).fit(cut(table))
    bad = table.set_column(0, "x0", pa.array([value] + [0.0] * 99, pa.float64()))
    with pytest.raises(ColumnError, match="column 'x0' has values so far out"):
        features.updated(cut(bad))


def test_running_statistics_of_a_constant_column_may_begin_to_vary():
    spec = spec_of("a", standardize_features=True, running_statistics=True)
    table = table_of(pa.array([3.0] * 10))
    features = Features.resolve(spec, table.schema).fit(cut(table))
    features = features.updated(cut(table_of(pa.array([1e6] * 10))))
    assert features.statistics.std_F.item() == pytest.approx((1e6 - 3) / 2)


def test_running_statistics_refuse_what_the_dataset_would_be_refused_for():
    spec = spec_of("x0", standardize_features=True, running_statistics=True)
    table = numbers_table(10, 1)
    features = Features.resolve(spec, table.schema).fit(cut(table))
    bad = table.set_column(0, "x0", pa.array([float("nan")] * 10, pa.float32()))
    with pytest.raises(ColumnError, match=r"column 'x0' of part-0\.parquet row group 0 has NaN"):
        features.updated(cut(bad))


def test_statistics_are_of_the_split_only():
    table = numbers_table(1000, 1).append_column("s", pa.array(["a", None] * 500))
    groups = cut(table, 400)
    spec = spec_of("x0", "s", standardize_features=True)
    split = Split(0.4, side="train")
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
        encoded(features, pa.table(broken))


def test_nan_as_a_category_is_refused():
    with pytest.raises(ColumnError, match=r"'a' of .*nan is not a category"):
        encode(spec_of(Column(name="a", kind="category")), table_of(pa.array([1.0, float("nan")])))


def test_a_sum_that_overflows_is_no_infinity():
    table = table_of(pa.array([3e38, 3e38, 3e38], pa.float32()))
    assert encode(spec_of("a"), table).x_NF.squeeze(1).tolist() == table.column("a").to_pylist()


def test_a_value_beyond_float32_is_refused():
    with pytest.raises(ColumnError, match=r"'a' .*beyond float32 in 1 rows"):
        encode(spec_of("a"), table_of(pa.array([1.0, 1e39])))


@pytest.mark.parametrize("column", ["a", "y"])
def test_a_value_without_a_finite_variance_is_refused(column):
    """All others would be scaled to 0, and the statistics could not be loaded again."""
    table = table_of(pa.array([1.0, 2.0, 3.0]))
    far = table.set_column(table.schema.get_field_index(column), column, [[0.0, 0.0, 1e200]])
    spec = spec_of("a", standardize_features=True, standardize_target=True)
    groups = [TableGroup("first", table), TableGroup("second", far)]
    with pytest.raises(ColumnError, match=f"'{column}' has values so far out"):
        Features.resolve(spec, table.schema).fit(groups)


def test_a_split_without_rows_blames_no_column():
    table = table_of(pa.array([1.0]))
    features = Features.resolve(spec_of("a"), table.schema)
    with pytest.raises(ColumnError, match="no row is left to train on"):
        features.fit([TableGroup("only", table.slice(0, 0))])


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
    [
        ("alpha", pa.int32()),
        ("text", pa.string()),
        ("v", pa.list_(pa.float32(), 3)),
        ("items", pa.list_(pa.int32())),
        ("y", pa.float32()),
    ]
)
ALL = spec_of("alpha", "text", "v", Column(name="items", length=2))


def changed(name, kind):
    return SCHEMA.set(SCHEMA.get_field_index(name), pa.field(name, kind))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (changed("alpha", pa.float64()), None),
        (changed("alpha", pa.int64()), None),
        (changed("alpha", pa.float16()), None),
        (changed("alpha", pa.bool_()), None),
        (changed("text", pa.large_string()), None),
        (changed("text", pa.dictionary(pa.int8(), pa.large_string())), None),
        (changed("y", pa.decimal128(9, 2)), None),
        (SCHEMA.append(pa.field("more", pa.string())), None),
        (pa.schema(reversed(list(SCHEMA))), None),
        (changed("alpha", pa.string()), "'alpha' of s.parquet has type text, .* a number: write the old type"),
        (changed("alpha", pa.timestamp("s")), "has type timestamp"),
        *((changed(name, pa.null()), None) for name in ("alpha", "text", "v", "items", "y")),
        (changed("items", pa.list_(pa.null())), None),
        (changed("text", pa.int8()), "with a text"),
        (changed("v", pa.list_(pa.float64(), 3)), None),
        (changed("v", pa.list_(pa.float32(), 4)), "with a number vector of 3"),
        (changed("v", pa.list_(pa.float32())), "has type list.*with a number vector of 3"),
        (changed("items", pa.large_list(pa.int64())), None),
        (changed("items", pa.list_(pa.dictionary(pa.int8(), pa.int16()))), None),
        (changed("items", pa.list_(pa.string())), "has type list of text, but .* with a list of integers"),
        (changed("items", pa.list_(pa.float64())), "with a list of integers"),
        (changed("items", pa.int32()), "with a list of integers"),
        (changed("y", pa.string()), "'y' of s.parquet has type text"),
        (SCHEMA.remove(0), "'alpha' is missing from s.parquet: it has 'text', 'v', 'items', 'y'"),
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
    features.check(SCHEMA.remove(4), "s.parquet", labelled=False)
    with pytest.raises(ColumnError, match="'y' is missing"):
        features.check(SCHEMA.remove(4), "s.parquet")


@pytest.mark.parametrize(
    ("column", "kinds", "values"),
    [
        ("n", [pa.int32(), pa.int64(), pa.float64(), pa.float16(), pa.decimal128(9, 1)], [3, None, -1]),
        (Column(name="n", kind="category"), [pa.int32(), pa.int64(), pa.float64(), pa.float16()], [3, None, -1]),
        ("n", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.binary()], ["a", None, "b"]),
        ("n", [pa.list_(pa.int32()), pa.large_list(pa.int64())], [[3, 4], None, []]),
    ],
)
def test_types_that_may_take_each_others_place_give_the_same_bits(column, kinds, values):
    tables = [pa.table({"n": pa.array(values, kind), "y": [0.0, 0, 0]}) for kind in kinds]
    features = Features.resolve(spec_of(column, standardize_features=True), tables[0].schema).fit(cut(tables[0]))
    first = features.encode(tables[0], WHERE)
    for table in tables:
        features.check(table.schema, WHERE)
        encoded = features.encode(table, WHERE)
        assert same_bits(encoded.x_NF, first.x_NF)
        assert first.ids_NC is None or same_bits(encoded.ids_NC, first.ids_NC)


def test_a_category_that_the_dataset_did_not_have_is_hashed_like_any_other():
    table = pa.table({"s": ["a", "b"], "l": [["a"], ["b"]], "y": [0.0, 1.0]})
    features = Features.resolve(spec_of("s", Column(name="l", length=2)), table.schema).fit(cut(table))
    later = pa.table({"s": ["new", "a"], "l": [["new", "a"], ["new"]], "y": [0.0, 1.0]})
    new, a = (1 + hash_bucket(value, 1000) for value in (b"new", b"a"))
    assert features.encode(later, WHERE).ids_NC.tolist() == [[new, new, a], [a, new, 0]]


def test_columns_that_the_dataset_did_not_have_are_told():
    features = Features.resolve(spec_of("alpha"), SCHEMA)  # text, v and items were there, though they are not used
    assert features.new_columns(SCHEMA) == {}
    later = SCHEMA.remove(1).append(pa.field("more", pa.list_(pa.int8()))).append(pa.field("alpha2", pa.string()))
    for name, kind in request_log.TYPES.items():  # Tidemill's own
        later = later.append(pa.field(name, kind))
    again = Features.from_state({}, json.loads(json.dumps(features.state()[1])))
    assert again.new_columns(later) == {"more": "list<item: int8>", "alpha2": "string"}


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
        encoded(Features.resolve(spec, table.schema), table)


# ---- several targets -------------------------------------------------------------------------------------------------
HOLED = {"a": [1.0, 2, 3, 4], "y": [1.0, None, 3.0, 5.0], "z": pa.array([10, 20, None, 40], pa.int32())}


def test_a_row_is_labelled_if_it_has_all_targets():
    table = pa.table(HOLED)
    encoded = encode(spec_of("a", target=["z", "y"]), table)
    assert encoded.y_N.dtype == torch.float32
    assert encoded.y_N.tolist() == [[10, 1], [20, 0], [0, 3], [40, 5]]
    assert encoded.labelled_N.tolist() == [True, False, False, True]
    assert encode(spec_of("a", target=["z", "y"]), table.slice(0, 1)).labelled_N is None
    features = Features.resolve(spec_of("a", target=["z", "y"]), table.schema)
    assert (features.labelled(table), features.row_bytes) == (2, 12)


def test_each_target_is_scaled_by_its_own_statistics():
    table = pa.table(HOLED)
    spec = spec_of("a", target=["y", "z"], standardize_target=True)
    features = Features.resolve(spec, table.schema).fit(cut(table, 1))
    y_NT = encoded(features, table).y_N
    for i, name in enumerate(spec.targets):
        alone = Features.resolve(spec_of("a", target=name, standardize_target=True), table.schema).fit(cut(table, 1))
        assert same_bits(y_NT[:, i].contiguous(), encoded(alone, table).y_N)
        assert same_bits(features.statistics.target_mean[i : i + 1], alone.statistics.target_mean)
        assert same_bits(features.statistics.target_std[i : i + 1], alone.statistics.target_std)


def test_one_target_in_a_list_is_one_target():
    table = pa.table(HOLED)
    listed, plain = (encode(spec_of("a", target=y, standardize_target=True), table) for y in (["y"], "y"))
    assert same_bits(listed.y_N, plain.y_N)
    assert listed.y_N.shape == (4,)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (pa.array([0, 2], pa.int8()), "target 'z' of .* holds 2, but binary labels are 0 or 1"),
        (pa.nulls(2, pa.int8()), "target 'z' is null in all 2 rows of the dataset"),
        (pa.array(["a", "b"]), "target 'z' of the dataset has type text"),
    ],
)
def test_every_target_is_checked(z, message):
    with pytest.raises(ColumnError, match=message):
        encode(spec_of("a", target=["y", "z"], task="binary"), pa.table({"a": [1.0, 2], "y": [0, 1], "z": z}))


# ---- weights ---------------------------------------------------------------------------------------------------------
def weighted(weights, *features):
    return spec_of(*(features or ("a",)), sample_weight="w"), pa.table({"a": [1, 2, 3], "w": weights, "y": [0.0, 1, 2]})


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int64(), pa.float16(), pa.float32(), pa.float64()])
def test_weights_of_any_number_type(kind):
    spec, table = weighted(pa.array([0, 1, 1]).cast(kind))
    encoded = encode(spec, table)
    assert encoded.w_N.dtype == torch.float32
    assert encoded.w_N.tolist() == [0, 1, 1]
    features = Features.resolve(spec, table.schema)
    assert features.row_bytes == 12
    assert features.encode(table.drop_columns(["w", "y"]), WHERE).x_NF.tolist() == [[1], [2], [3]]


def test_a_weight_may_be_a_feature_too_and_is_read_once():
    spec, table = weighted([0.5, 0.25, 2.0], "w", "a")
    features = Features.resolve(spec, table.schema)
    assert features.names(labelled=True) == ["w", "a", "y"]
    assert features.names(labelled=False) == ["w", "a"]
    rows = encoded(features, table)
    assert rows.w_N.tolist() == rows.x_NF[:, 0].tolist() == [0.5, 0.25, 2.0]
    alone = Features.resolve(spec_of("a", sample_weight="w"), table.schema)
    assert (alone.names(labelled=True), alone.names(labelled=False)) == (["a", "y", "w"], ["a"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, None, 1.0], "is null in 1 rows: write a weight for every row"),
        ([1.0, float("nan"), 1.0], "holds nan, but weights are finite and not negative"),
        ([1.0, float("inf"), 1.0], "holds inf"),
        ([1.0, 1e300, 1.0], "holds inf"),
        ([1, -2, 1], "holds -2"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    spec, table = weighted(weights)
    features = Features.resolve(spec, table.schema)
    for refusing in (lambda: encoded(features, table), lambda: features.fit(cut(table))):
        with pytest.raises(ColumnError, match=f"sample_weight 'w' of {WHERE} {message}"):
            refusing()


@pytest.mark.parametrize("kind", [pa.string(), pa.timestamp("s"), pa.list_(pa.float32(), 2)])
def test_a_weight_must_be_a_number(kind):
    good = pa.schema([("a", pa.int8()), ("w", pa.int8()), ("y", pa.int8())])
    bad = good.set(1, pa.field("w", kind))
    spec = spec_of("a", sample_weight="w")
    with pytest.raises(ColumnError, match=r"sample_weight 'w' of the dataset has type .*: write a number"):
        Features.resolve(spec, bad)
    features = Features.resolve(spec, good)
    features.check(bad, "s.parquet", labelled=False)
    with pytest.raises(ColumnError, match=r"sample_weight 'w' of s.parquet has type"):
        features.check(bad, "s.parquet")
    with pytest.raises(ColumnError, match=r"'w' is missing from s.parquet"):
        features.check(good.remove(1), "s.parquet")


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("binary", [0, 0, 0, 1, None], [2 / 3, 2]),
        ("multiclass", [2.0, 0, 1, 2, None, 2, 2], [2, 2, 0.5]),
    ],
)
def test_balanced_class_weights_are_inverse_to_the_labelled_rows(task, labels, expected):
    table = pa.table({"a": pa.array([1.0] * len(labels)), "y": labels})
    spec = spec_of("a", task=task, classes=3 if task == "multiclass" else None, class_weights="balanced")
    unfitted = Features.resolve(spec, table.schema)
    assert not unfitted.fitted
    features = unfitted.fit(cut(table, 2, 0))
    assert features.fitted
    torch.testing.assert_close(features.class_weights, torch.tensor(expected))
    tensors, config = features.state()
    again = Features.from_state(tensors, json.loads(json.dumps(config)))
    assert same_bits(again.class_weights, features.class_weights)


def test_classes_are_counted_on_one_side_of_the_split():
    labels = torch.randint(0, 2, (400,), generator=torch.Generator().manual_seed(0))
    table = pa.table({"a": pa.array([1.0] * 400), "y": labels.numpy()})
    split, groups = Split(0.3, side="train"), cut(table, 150)
    kept = torch.cat([split.rows(group) for group in groups])
    features = Features.resolve(spec_of("a", task="binary", class_weights="balanced"), table.schema).fit(groups, split)
    assert features.statistics.class_counts.tolist() == labels[kept].bincount().tolist()


def test_a_class_without_rows_has_no_balanced_weight():
    spec = spec_of("a", task="multiclass", classes=4, class_weights="balanced")
    table = pa.table({"a": [1.0] * 4, "y": [0, 1, 3, None]})
    with pytest.raises(ColumnError, match=r"target 'y' is 2 in no labelled row of the dataset.*'balanced'"):
        encode(spec, table)


def test_given_class_weights_need_no_dataset():
    spec = spec_of("a", task="binary", class_weights=(0.1, 3))
    features = Features.resolve(spec, SCHEMA.append(pa.field("a", pa.int8())))
    assert features.fitted
    assert same_bits(features.class_weights, torch.tensor([0.1, 3.0]))
    again = Features.from_state({}, json.loads(json.dumps(features.state()[1])))
    assert same_bits(again.class_weights, features.class_weights)
    assert Features.resolve(spec_of("alpha", task="binary"), SCHEMA).class_weights is None


# ---- state -----------------------------------------------------------------------------------------------------------
SETTINGS = (
    *("targets", "target_families", "sample_weight", "task", "classes", "class_weighting", "dataset_columns"),
    *("running_statistics", "standardize_features", "standardize_target"),
)


@pytest.mark.parametrize("standardize", [True, False])
def test_the_state_brings_back_the_same_features(standardize):
    table = pa.table(
        {"alpha": [1, 5, 7], "text": ["a", None, "b"], "v": [[1.0, 2, 3]] * 3, "items": [[1], [], [2, 3, 4]]}
    )
    table = table.append_column("y", [[0.1, 0.2, 0.4]]).cast(SCHEMA)
    spec = ALL.model_copy(update={"standardize_features": standardize, "standardize_target": standardize})
    features = Features.resolve(spec, SCHEMA).fit(cut(table))
    tensors, config = features.state()
    again = Features.from_state(tensors, json.loads(json.dumps(config)))
    for before, after in zip(encoded(features, table)[:3], encoded(again, table)[:3], strict=True):
        assert same_bits(before, after)
    assert (again.columns, again.numbers, again.buckets, again.row_bytes) == (features.columns, 4, (1000,), 44)
    assert again.sequences == ((2, 1000),)
    assert {name: getattr(again, name) for name in SETTINGS} == {name: getattr(features, name) for name in SETTINGS}
    unfitted = Features.resolve(spec, SCHEMA)
    assert Features.from_state(*unfitted.state()).fitted is not standardize

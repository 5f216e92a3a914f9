"""Each Arrow type becomes the numbers, or the category, that it stands for."""

import datetime as dt
import statistics
import subprocess
import sys
from decimal import Decimal

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.rows import VECTORS, TableGroup, encode, same_bits, spec_of, table_of
from tidemill.tasks.training import columns, families
from tidemill.tasks.training.columns import bucket_ids, hash_bucket
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.spec import Column

NUMBERS = [
    *((pa.array([3, None, 1], kind), [3, 0, 1]) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *((pa.array([3, None, 200], kind), [3, 0, 200]) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    *((pa.array([0.5, None, -2], kind), [0.5, 0, -2]) for kind in (pa.float16(), pa.float32(), pa.float64())),
    (pa.array([True, None, False]), [1, 0, 0]),
    (pa.array([Decimal("1.25"), None, Decimal("-3.50")]), [1.25, 0, -3.5]),
    (pa.array([Decimal("1.25"), None, Decimal("-3.50")], pa.decimal256(60, 2)), [1.25, 0, -3.5]),
    (pa.array([dt.date(1970, 1, 3), None, dt.date(1969, 12, 31)]), [2 * 86400, 0, -86400]),
    (pa.array([dt.date(1970, 1, 3), None, dt.date(1969, 12, 31)], pa.date64()), [2 * 86400, 0, -86400]),
    *((pa.array([dt.datetime(1970, 1, 1, 1), None], pa.timestamp(u)), [3600, 0]) for u in ("s", "ms", "us", "ns")),
    (pa.array([7_200_000], pa.timestamp("ms", "Europe/Paris")), [7200]),
    (pa.array([dt.time(0, 1, 30), None], pa.time32("s")), [90, 0]),
    (pa.array([dt.time(0, 1, 30, 500_000)], pa.time32("ms")), [90.5]),
    (pa.array([dt.time(0, 1, 30, 500_000)], pa.time64("us")), [90.5]),
    (pa.array([1_500_000_000], pa.time64("ns")), [1.5]),
    *((pa.array([dt.timedelta(minutes=2), None], pa.duration(u)), [120, 0]) for u in ("s", "ms", "us", "ns")),
    (pa.array([2.5, None, 2.5]).dictionary_encode(), [2.5, 0, 2.5]),
]


@pytest.mark.parametrize(("array", "expected"), NUMBERS, ids=lambda value: str(getattr(value, "type", "")))
def test_numbers_and_times(array, expected):
    encoded = encode(spec_of("a"), table_of(array))
    assert encoded.ids_NC is None
    assert encoded.x_NF.dtype == torch.float32
    assert encoded.x_NF.squeeze(1).tolist() == expected


TEXTS = [
    *(pa.array([b"red", None, b"blue", b"red"]).cast(kind) for kind in (
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    )),
    pa.array(["red", None, "blue", "red"]).dictionary_encode(),
    pa.array([b"red", None, b"blue", b"red"]).dictionary_encode(),
    pa.array(["green", "red", None, "blue", "red"]).dictionary_encode().slice(1),
    pa.array(["green"] * 9 + ["red", None, "blue", "red"]).dictionary_encode().slice(9),
    pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0]), pa.array(["red", None, "blue"])),
]  # fmt: skip
RED, BLUE = 1 + 771, 1 + 131  # the hash must never change: stored embeddings are indexed by it


@pytest.mark.parametrize("array", TEXTS, ids=lambda array: str(array.type))
def test_text_is_a_category_whatever_its_type(array):
    encoded = encode(spec_of("a"), table_of(array))
    assert encoded.x_NF.shape == (4, 0)
    assert encoded.ids_NC.dtype == torch.int64
    assert encoded.ids_NC.tolist() == [[RED], [0], [BLUE], [RED]]


@pytest.mark.slow
def test_the_hash_does_not_depend_on_the_process():
    code = (
        "from tidemill.tasks.training.columns import hash_bucket as h; "
        "print([h(b, 1000) for b in (b'red', b'blue', b'', b'3')])"
    )
    salted = {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=salted, capture_output=True, check=True)
    assert run.stdout == b"[771, 131, 876, 561]\n"


@pytest.mark.parametrize(
    "array",
    [
        *(pa.array([3, None, 0], kind) for kind in (pa.int8(), pa.int32(), pa.uint64(), pa.float32(), pa.float64())),
        pa.array([Decimal("3.00"), None, Decimal("0.00")]),
    ],
    ids=lambda array: str(array.type),
)
def test_numbers_as_categories_agree_across_types(array):
    encoded = encode(spec_of(Column(name="a", kind="category", buckets=500)), table_of(array))
    assert encoded.ids_NC.squeeze(1).tolist() == [1 + hash_bucket(b"3", 500), 0, 1 + hash_bucket(b"0", 500)]


def category(array, buckets=500):
    encoded = encode(spec_of(Column(name="a", kind="category", buckets=buckets)), table_of(array))
    return encoded.ids_NC.squeeze(1).tolist()


def of_bytes(*digits, buckets=500):
    return [1 + hash_bucket(data, buckets) for data in digits]


FRACTIONS = [0.1, 0.25, 19.99, 3.0, 1e-7, -0.0001]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(FRACTIONS, pa.float64()),
        pa.array(FRACTIONS, pa.float32()),
        pa.array(FRACTIONS, pa.float32()).dictionary_encode(),
        *(pa.array([Decimal(str(x)) for x in FRACTIONS], kind) for kind in (
            pa.decimal32(9, 7), pa.decimal64(18, 7), pa.decimal128(20, 9), pa.decimal256(60, 30),
        )),
    ],
    ids=lambda array: str(array.type),
)  # fmt: skip
def test_a_fraction_as_a_category_has_its_digits_whatever_its_type(array):
    assert category(array) == of_bytes(b"0.1", b"0.25", b"19.99", b"3", b"1e-07", b"-0.0001")


@given(st.lists(st.floats(width=64, min_value=-(2.0**24), max_value=2.0**24), min_size=1))
@settings(deadline=None)
def test_a_float_is_in_one_bucket_in_float64_and_float32(values):
    wide = pa.array([x for x in values if x != int(x)] or [0.5], pa.float64())
    assert category(wide) == category(wide.cast(pa.float32()))


def test_a_fraction_that_float16_holds_exactly_is_a_category_and_another_is_refused():
    assert category(pa.array([0.5, -1.75, 7.0], pa.float16())) == category(pa.array([0.5, -1.75, 7.0]))
    with pytest.raises(ColumnError, match=r"'a' of .*: 0\.1 is not a category: float16 has rounded it; write float32"):
        category(pa.array([0.1], pa.float16()))


@pytest.mark.parametrize(("kind", "bits"), [(pa.float16(), 11), (pa.float32(), 24), (pa.float64(), 53)], ids=str)
def test_a_whole_number_that_a_float_may_have_rounded_is_no_category(kind, bits):
    last = 2**bits
    assert category(pa.array([last, -last], kind)) == category(pa.array([last, -last], pa.int64()))
    with pytest.raises(
        ColumnError, match=rf"is not a category: .* round whole numbers beyond {last:,}; write integers"
    ):
        category(pa.array([2.0 * last], kind))


def test_whole_numbers_of_any_length_keep_their_digits():
    long = 12345678901234567890123
    assert category(pa.array([Decimal(long)], pa.decimal128(38, 2))) == of_bytes(b"12345678901234567890123")
    assert category(pa.array([2**64 - 1], pa.uint64())) == of_bytes(b"18446744073709551615")
    assert category(pa.array([True, False])) == of_bytes(b"1", b"0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Decimal("1" + "0" * 60 + ".5")], ids=str)
def test_what_is_no_number_or_beyond_all_floats_is_no_category(value):
    kind = pa.decimal256(70, 1) if isinstance(value, Decimal) else pa.float64()
    with pytest.raises(ColumnError, match="is not a category: "):
        category(pa.array([value], kind))


# ---- extension types, and columns without a type -----------------------------------------------------------------------
class Point(pa.ExtensionType):
    """An extension type that somebody has made."""

    def __init__(self):
        super().__init__(pa.list_(pa.float32(), 2), "tests.point")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


def extension(kind, values):
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


EXTENSIONS = [
    extension(pa.uuid(), [b"0123456789abcdef", None]),
    extension(pa.json_(), ['{"a": 1}', None]),
    extension(pa.bool8(), [1, None]),
    extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2], None]),
    extension(pa.opaque(pa.int32(), "geo", "vendor"), [5, None]),
    extension(Point(), [[1, 2], None]),
    pa.ListArray.from_arrays(pa.array([0, 2, 2], pa.int32()), extension(pa.uuid(), [b"0" * 16, b"1" * 16])),
]


@pytest.mark.parametrize("array", EXTENSIONS, ids=lambda array: str(array.type))
def test_an_extension_type_is_what_it_is_stored_as(array):
    kind = array.type.storage_type if isinstance(array.type, pa.BaseExtensionType) else pa.list_(pa.binary(16))
    found, expected = (encode(spec_of("a"), table_of(a)) for a in (array, array.cast(kind)))
    assert same_bits(found.x_NF, expected.x_NF)
    assert found.ids_NC is expected.ids_NC is None or same_bits(found.ids_NC, expected.ids_NC)


UNTYPED = [
    (pa.array([1.5, 2.5]), pa.nulls(2)),
    (pa.array(["x", "y"]), pa.nulls(2)),
    (pa.array(["x", "y"]), pa.nulls(2).dictionary_encode()),
    (pa.array([dt.date(2020, 1, 1), dt.date(2020, 1, 2)]), pa.nulls(2)),
    (pa.array([dt.timedelta(1), dt.timedelta(2)]), pa.nulls(2)),
    (pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)), pa.nulls(2)),
    (pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)), pa.nulls(2, pa.list_(pa.null(), 2))),
    (pa.array([[1], [2]]), pa.nulls(2)),
    (pa.array([[1], [2]]), pa.array([[], None], pa.list_(pa.null()))),
    (pa.array([["a"], ["b"]]), pa.array([[None, None], []], pa.large_list(pa.null()))),
]


@pytest.mark.parametrize(("typed", "untyped"), UNTYPED, ids=lambda array: str(array.type))
def test_a_column_of_nothing_but_nulls_may_have_the_type_of_nulls(typed, untyped):
    known = Features.resolve(spec_of("a"), table_of(typed).schema).fit([TableGroup("typed", table_of(typed))])
    empty = untyped.cast(typed.type) if pa.types.is_list(typed.type) else pa.nulls(2, typed.type)
    (found,) = known.tables([TableGroup("untyped", table_of(untyped))])
    (expected,) = known.tables([TableGroup("typed nulls", table_of(empty))])
    one, other = known.encode(found, "untyped"), known.encode(expected, "typed nulls")
    assert same_bits(one.x_NF, other.x_NF)
    assert one.ids_NC is other.ids_NC is None or same_bits(one.ids_NC, other.ids_NC)


@pytest.mark.parametrize(
    "kind",
    [pa.float32(), pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.float32(), 3), pa.list_(pa.int64()),
     pa.list_view(pa.string()), pa.large_list_view(pa.int8()), pa.large_list(pa.dictionary(pa.int32(), pa.string()))],
    ids=str,
)  # fmt: skip
def test_a_column_of_a_plain_type_is_used_as_it_is(kind):
    column = pa.chunked_array([pa.nulls(1, kind)])
    assert families.stored(column, pa.float64()) is column


def test_a_column_that_no_file_has_a_type_for_is_refused():
    with pytest.raises(ColumnError, match="column 'a' is null in all rows of the dataset: remove it from features"):
        encode(spec_of("a"), table_of(pa.nulls(3)))


def test_each_distinct_value_is_hashed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(columns, "hash_bucket", lambda data, buckets: calls.append(data) or len(data))
    array = pa.array([f"user {i % 100}" for i in range(10_000)])
    bucket_ids(array, 1000)
    assert len(calls) == 100
    calls.clear()
    bucket_ids(array.dictionary_encode().slice(0, 20), 1000)  # the other 80 of the dictionary are not needed
    assert len(calls) == 20


@pytest.mark.parametrize("item", [pa.int32(), pa.float32(), pa.float64(), pa.bool_()])
def test_a_fixed_size_list_is_that_many_numbers(item):
    array = VECTORS.cast(pa.list_(item, 2)).slice(1)
    table = pa.table({"b": pa.array([7.0, 8, 9], pa.float32()), "a": array, "c": [10, 11, 12], "y": [0.0, 0, 0]})
    encoded = encode(spec_of("b", "a", "c"), table)
    one = (lambda v: float(bool(v))) if item == pa.bool_() else float
    assert encoded.x_NF.tolist() == [[7, 0, 0, 10], [8, one(3), 0, 11], [9, one(5), one(6), 12]]


@pytest.mark.parametrize("item", [pa.int32(), pa.float32()])
def test_nulls_of_a_vector_become_its_means(item):
    table = table_of(VECTORS.cast(pa.list_(item, 2)))
    x_NF = encode(spec_of("a", standardize_features=True), table).x_NF
    std = statistics.pstdev([1, 3, 5])
    torch.testing.assert_close(x_NF, torch.tensor([[-2 / std, -1], [0, 0], [0, 0], [2 / std, 1]]))
    assert x_NF[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.bool_()),
        pa.list_(pa.list_(pa.int8())),
        pa.list_(pa.int8(), 0),
        pa.list_(pa.list_(pa.int8()), 2),
        pa.list_(pa.list_(pa.timestamp("s"), 2), 2),
        pa.dictionary(pa.int8(), pa.list_(pa.int8())),
        pa.struct([("a", pa.int8())]),
        pa.map_(pa.string(), pa.int8()),
        pa.list_(pa.string(), 2),
    ],
    ids=str,
)
def test_other_types_are_refused(kind):
    with pytest.raises(ColumnError, match=r"column 'a' has type .*which cannot be an input: write numbers"):
        Features.resolve(spec_of("a"), pa.schema([("a", kind), ("y", pa.float32())]))


@pytest.mark.parametrize(
    ("kind", "type_", "message"),
    [
        ("number", pa.string(), "cannot be a number: use kind 'category'"),
        ("number", pa.list_(pa.int8()), "cannot be a number: use kind 'sequence'"),
        ("category", pa.timestamp("s"), "cannot be a category: use kind 'number'"),
        ("category", pa.list_(pa.float32(), 2), "cannot be a category: use kind 'number'"),
        ("category", pa.large_list(pa.string()), "cannot be a category: use kind 'sequence'"),
        ("sequence", pa.string(), "cannot be a sequence: use kind 'category'"),
        ("sequence", pa.list_(pa.int8(), 2), "cannot be a sequence: use kind 'number'"),
    ],
)
def test_a_kind_that_the_type_does_not_allow(kind, type_, message):
    with pytest.raises(ColumnError, match=message):
        Features.resolve(spec_of(Column(name="a", kind=kind)), pa.schema([("a", type_), ("y", pa.float32())]))


# ---- sequences -------------------------------------------------------------------------------------------------------
LISTS = [["green"], ["red", "blue"], None, [], ["red", None], ["blue", "blue", "red", "blue"]]
PADDED = [
    [RED, BLUE, 0],
    [0, 0, 0],
    [0, 0, 0],
    [RED, 0, 0],
    [BLUE, RED, BLUE],
]  # the last 3 items, without the first row
TEXT_ITEMS = [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


def sequence(**settings):
    return Column(name="a", kind="sequence", **settings)


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(item) for item in TEXT_ITEMS),
        pa.large_list(pa.string()),
        pa.large_list(pa.dictionary(pa.int32(), pa.large_string())),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.string()),
    ],
    ids=str,
)
def test_a_list_is_its_last_items_whatever_its_type(kind):
    table = table_of(pa.array(LISTS, kind).slice(1))
    encoded = encode(spec_of(sequence(length=3)), table)
    assert encoded.x_NF.shape == (5, 0)
    assert encoded.ids_NC.dtype == torch.int64
    assert encoded.ids_NC.tolist() == PADDED
    assert same_bits(encode(spec_of(sequence(length=3)), table.slice(3)).ids_NC, encoded.ids_NC[3:])
    assert encode(spec_of(Column(name="a", length=1)), table).ids_NC.tolist() == [[BLUE], [0], [0], [0], [BLUE]]


def test_the_items_of_a_null_list_are_ignored():
    items = pa.array(["red", "blue", "green"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), items, mask=pa.array([False, True, False]))
    assert lists.values.to_pylist()[1] == "blue"
    views = pa.ListViewArray.from_arrays(  # out of order, overlapping
        pa.array([2, 0, 0]), pa.array([1, 2, 1]), items, mask=pa.array([False, True, False])
    )
    green = 1 + hash_bucket(b"green", 1000)
    assert encode(spec_of(sequence(length=2)), table_of(lists)).ids_NC.tolist() == [[RED, 0], [0, 0], [green, 0]]
    assert encode(spec_of(sequence(length=2)), table_of(views)).ids_NC.tolist() == [[green, 0], [0, 0], [RED, 0]]


@settings(max_examples=100, deadline=None)
@given(
    lists=st.lists(st.none() | st.lists(st.none() | st.integers(-3, 3), max_size=9), max_size=12),
    length=st.integers(1, 8),
    item=st.sampled_from([pa.int8(), pa.int64()]),
    block=st.sampled_from([1, 20, 65_536]),
    data=st.data(),
)
def test_sequences_are_those_of_a_plain_loop(lists, length, item, block, data):
    first = data.draw(st.integers(0, len(lists)))
    array = pa.array(lists, pa.list_(item))[first : first + data.draw(st.integers(0, len(lists)))]
    ids_NL = torch.full((len(array), length + 1), -1)
    ids = columns.sequence_ids(array, 50, length)
    for at in range(0, len(array), block):
        ids_NL[at : at + block, :length] = ids(slice(at, min(at + block, len(array))))
    expected = [
        [0 if item is None else 1 + hash_bucket(b"%d" % item, 50) for item in (row or [])[-length:]]
        for row in array.to_pylist()
    ]
    assert ids_NL.tolist() == [[*ids, *[0] * (length - len(ids)), -1] for ids in expected]


def test_only_the_items_of_a_slice_are_hashed_and_each_distinct_one_once(monkeypatch):
    calls = []
    monkeypatch.setattr(columns, "hash_bucket", lambda data, buckets: calls.append(data) or len(data))
    array = pa.array([[i % 100, -(i % 7)] for i in range(10_000)])
    columns.sequence_ids(array.slice(200, 10), 1000, 4)(slice(0, 10))
    assert sorted(calls) == sorted({b"%d" % item for pair in array.slice(200, 10).to_pylist() for item in pair})


def test_sequences_follow_the_categories_in_the_order_of_the_spec():
    table = pa.table({"s": [["red"]], "c": ["blue"], "t": [[3, 3]], "d": ["red"], "y": [0.0]})
    spec = spec_of(Column(name="s", length=2), "c", Column(name="t", length=3, buckets=500), "d")
    features = Features.resolve(spec, table.schema)
    three = 1 + hash_bucket(b"3", 500)
    assert features.encode(table, "t").ids_NC.tolist() == [[BLUE, RED, RED, 0, three, three, 0]]
    assert (features.buckets, features.sequences, features.ids) == ((1000, 1000), ((2, 1000), (3, 500)), 7)
    assert (features.numbers, features.row_bytes) == (0, 7 * 8 + 4)


# ---- lists of fixed size in each other -------------------------------------------------------------------------------
def test_an_image_is_its_numbers_in_row_major_order():
    pixels = torch.arange(4 * 2 * 3 * 5).view(4, 2, 3, 5)
    for item in (pa.uint8(), pa.float32(), pa.float64()):
        kind = pa.list_(pa.list_(pa.list_(item, 5), 3), 2)
        table = table_of(pa.array(pixels.tolist(), kind)).slice(1)
        assert torch.equal(encode(spec_of("a"), table).x_NF, pixels[1:].view(3, 30).float())


def test_nulls_inside_an_image_become_its_means():
    rows = [[[9, 9], [9, 9]], [[1, 2], [3, 4]], None, [None, [5, 6]], [[3, None], [7, 8]]]
    for item in (pa.int16(), pa.float64()):
        table = table_of(pa.array(rows, pa.list_(pa.list_(item, 2), 2)).slice(1))
        assert encode(spec_of("a"), table).x_NF.tolist() == [[1, 2, 3, 4], [0] * 4, [0, 0, 5, 6], [3, 0, 7, 8]]
        scaled = encode(spec_of("a", standardize_features=True), table).x_NF
        assert (scaled == 0).tolist() == [
            [False, True, False, False],
            [True, True, True, True],
            [True, True, True, True],  # 5 and 6 are the means of their places
            [False, True, False, False],
        ]


def test_what_lies_in_memory_below_a_null_of_an_image_does_not_count():
    pixels = pa.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    rows = pa.FixedSizeListArray.from_arrays(pixels, 2, mask=pa.array([False, True, False, False]))
    images = pa.FixedSizeListArray.from_arrays(rows, 2, mask=pa.array([False, True]))
    values_NK, present_NK = columns.as_tensor(images, 4)
    assert present_NK.tolist() == [[True, True, False, False], [False] * 4]
    assert values_NK[0].tolist() == [1, 2, 3, 4]
    assert columns.as_tensor(images[:1], 4)[1].tolist() == [[True, True, False, False]]

"""Each Arrow type becomes the numbers, or the category, that it stands for."""

import datetime as dt
import statistics
import subprocess
import sys
from decimal import Decimal

import pyarrow as pa
import pytest
import torch

from tasks.training import columns
from tasks.training.columns import bucket_ids, hash_bucket
from tasks.training.errors import ColumnError
from tasks.training.features import Features
from tasks.training.spec import Column
from tests.training.rows import VECTORS, encode, spec_of, table_of

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


def test_the_hash_does_not_depend_on_the_process():
    code = (
        "from tasks.training.columns import hash_bucket as h; print([h(b, 1000) for b in (b'red', b'blue', b'', b'3')])"
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


def test_a_fraction_as_a_category_keeps_its_digits():
    encoded = encode(spec_of(Column(name="a", kind="category")), table_of(pa.array([0.1, 1e300])))
    assert encoded.ids_NC[0].item() == 1 + hash_bucket(b"0.1", 1000)


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
        pa.struct([("a", pa.int8())]),
        pa.map_(pa.string(), pa.int8()),
        pa.null(),
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
        ("number", pa.string(), "not a number: use kind 'category'"),
        ("category", pa.timestamp("s"), "cannot be a category: use kind 'number'"),
        ("category", pa.list_(pa.float32(), 2), "cannot be a category"),
    ],
)
def test_a_kind_that_the_type_does_not_allow(kind, type_, message):
    with pytest.raises(ColumnError, match=message):
        Features.resolve(spec_of(Column(name="a", kind=kind)), pa.schema([("a", type_), ("y", pa.float32())]))

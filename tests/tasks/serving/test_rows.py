"""Rows that are dicts become the tensors that a table of the same values becomes: bit for bit, whatever the columns hold."""

import datetime as dt
import json
import math
from decimal import Decimal
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.rows import TableGroup, same_bits
from tidemill.tasks.serving.many import Part, id_part, number_part
from tidemill.tasks.serving.rows import BY_COLUMN, ROWS_AT_ONCE, Row, RowEncoder, RowError
from tidemill.tasks.serving.values import LONGEST, REMEMBERED, Ids, StoredType
from tidemill.tasks.training.columns import hash_bucket
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.families import type_name
from tidemill.tasks.training.features import Encoded, Features
from tidemill.tasks.training.spec import Column, Spec

# ---- the zoo: (Arrow type, how it is read, values) ---------------------------------------------------------------------
FLOATS: Final = st.floats(-(2.0**99), 2.0**99)
FLOATS32: Final = st.floats(-(2.0**99), 2.0**99, width=32)
TEXT: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MOMENTS: Final = st.datetimes(dt.datetime(1800, 1, 1), dt.datetime(2200, 1, 1))
SPANS: Final = st.timedeltas(dt.timedelta(days=-9999), dt.timedelta(days=9999))
TIMES: Final = st.times()


def ints(bits: int, *, signed: bool = True) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


def decimals(digits: int, places: int) -> st.SearchStrategy[Decimal]:
    return st.integers(1 - 10**digits, 10**digits - 1).map(lambda n: Decimal(f"{n}E-{places}"))


def whole_moments(micros: int) -> st.SearchStrategy[dt.datetime]:
    return MOMENTS.map(lambda moment: moment.replace(microsecond=moment.microsecond // micros * micros))


def whole_spans(micros: int) -> st.SearchStrategy[dt.timedelta]:
    return SPANS.map(lambda span: dt.timedelta(span.days, span.seconds, span.microseconds // micros * micros))


def whole_times(micros: int) -> st.SearchStrategy[dt.time]:
    return TIMES.map(lambda time: time.replace(microsecond=time.microsecond // micros * micros))


def lists(values: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | values, min_size=size, max_size=size)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | values, max_size=7)


INTEGERS: Final = [
    *((getattr(pa, f"int{bits}")(), ints(bits)) for bits in (8, 16, 32, 64)),
    *((getattr(pa, f"uint{bits}")(), ints(bits, signed=False)) for bits in (8, 16, 32, 64)),
]
UNITS: Final = (("s", 10**6), ("ms", 1000), ("us", 1), ("ns", 1))
NUMBERS: Final[list[tuple[Any, st.SearchStrategy[Any]]]] = [
    (pa.bool_(), st.booleans()),
    *INTEGERS,
    (pa.float16(), st.floats(-1e4, 1e4, width=16)),
    (pa.float32(), FLOATS32),
    (pa.float64(), FLOATS),
    (pa.dictionary(pa.int8(), pa.float64()), FLOATS),
    (pa.decimal32(7, 2), decimals(7, 2)),
    (pa.decimal64(15, 3), decimals(15, 3)),
    (pa.decimal128(38, 10), decimals(38, 10)),
    (pa.decimal256(60, 20), decimals(60, 20)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    *((pa.timestamp(unit), whole_moments(micros)) for unit, micros in UNITS),
    *((pa.timestamp(unit, "Europe/Paris"), whole_moments(micros)) for unit, micros in UNITS),
    (pa.timestamp("us", "+05:30"), MOMENTS),
    (pa.time32("s"), whole_times(10**6)),
    (pa.time32("ms"), whole_times(1000)),
    (pa.time64("us"), TIMES),
    (pa.time64("ns"), TIMES),
    *((pa.duration(unit), whole_spans(micros)) for unit, micros in UNITS),
    (pa.list_(pa.float32(), 3), lists(FLOATS32, 3)),
    (pa.list_(pa.float64(), 3), lists(FLOATS, 3)),
    (pa.list_(pa.float16(), 2), lists(st.floats(-1e4, 1e4, width=16), 2)),
    (pa.list_(pa.int64(), 2), lists(ints(64), 2)),
    (pa.list_(pa.bool_(), 2), lists(st.booleans(), 2)),
    (pa.list_(pa.decimal128(9, 2), 2), lists(decimals(9, 2), 2)),
    (pa.list_(pa.field("element", pa.float32(), nullable=False), 2), st.lists(FLOATS32, min_size=2, max_size=2)),
    (pa.list_(pa.list_(pa.float32(), 2), 3), lists(lists(FLOATS32, 2), 3)),
    (pa.list_(pa.list_(pa.float64(), 2), 2), lists(lists(FLOATS, 2), 2)),
]
TEXTS: Final = [
    *(
        (kind, TEXT)
        for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
    ),
    *((kind, st.binary(max_size=6)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
]
CATEGORIES: Final = [
    (pa.bool_(), st.booleans()),
    *INTEGERS,
    (pa.float16(), st.integers(-2048, 2048).map(float)),
    (pa.float32(), st.floats(-(2.0**24), 2.0**24, width=32)),
    (pa.float64(), st.floats(-(2.0**53), 2.0**53)),
    (pa.decimal32(7, 2), decimals(7, 2)),
    (pa.decimal128(20, 4), decimals(20, 4)),
]
SEQUENCES: Final = [
    *((kind(pa.string()), some(TEXT)) for kind in (pa.list_, pa.large_list, pa.list_view)),
    (pa.list_(pa.binary()), some(st.binary(max_size=4))),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), some(TEXT)),
    *((pa.list_(kind), some(values)) for kind, values in INTEGERS),
]
ZOO: Final = [
    *((kind, "number", values) for kind, values in NUMBERS),
    *((kind, "category", values) for kind, values in (*TEXTS, *CATEGORIES)),
    *((kind, "sequence", values) for kind, values in SEQUENCES),
]
SETTINGS: Final = {
    "raw": {"standardize_features": False},
    "scaled": {"standardize_features": True},
    "bent": {"standardize_features": True, "soft_limit": 3.0, "null_indicators": True},
}


def spec_of(columns: dict[str, str], **settings: Any) -> Spec:
    sizes: dict[str, dict[str, Any]] = {
        "number": {},
        "category": {"buckets": 1000},
        "sequence": {"buckets": 1000, "length": 4},
    }
    features = [Column(name=name, kind=kind, **sizes[kind]) for name, kind in columns.items()]
    return Spec(features=features, target="y", standardize_target=False, **settings)


def with_target(columns: dict[str, Any]) -> pa.Table:
    rows = len(next(iter(columns.values())))
    return pa.table(columns | {"y": pa.array([0.0] * rows, pa.float32())})


def encoders(table: pa.Table, kinds: dict[str, str], **settings: Any) -> tuple[Features, RowEncoder]:
    """Both ways to encode, for a dataset of one table."""
    features = Features.resolve(spec_of(kinds, **settings), table.schema).fit([TableGroup("dataset", table)])
    return features, RowEncoder(features, {field.name: type_name(field.type) for field in table.schema})


def assert_equal_bits(features: Features, encoder: RowEncoder, table: pa.Table) -> None:
    assert_same_however_many(features.encode(table, "the table"), encoder, table.to_pylist())


def assert_same_however_many(expected: Encoded, encoder: RowEncoder, rows: list[Row]) -> None:
    """Few rows are read one after the other, many column by column."""
    assert_same(expected, encoder.encode(rows))
    few = BY_COLUMN - 1
    assert_same(expected, joined([encoder.encode(rows[at : at + few]) for at in range(0, len(rows), few)]))
    if len(rows) < BY_COLUMN:
        assert_same(joined([expected] * BY_COLUMN), encoder.encode(rows * BY_COLUMN))


def joined(parts: list[Encoded]) -> Encoded:
    x_NF, ids_NC = zip(*parts, strict=True)
    return Encoded(torch.cat(x_NF), None if ids_NC[0] is None else torch.cat(ids_NC))


def assert_same(a: Encoded, b: Encoded) -> None:
    assert same_bits(a.x_NF, b.x_NF), (a.x_NF, b.x_NF)
    assert (a.ids_NC is None) == (b.ids_NC is None)
    if a.ids_NC is not None and b.ids_NC is not None:
        assert same_bits(a.ids_NC, b.ids_NC), (a.ids_NC, b.ids_NC)


# ---- equal bits ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "read_as", "values"), [pytest.param(*one, id=f"{one[0]} {one[1]}") for one in ZOO])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_rows_have_the_bits_of_a_table_of_their_types(
    kind: Any, read_as: str, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    how = data.draw(st.sampled_from([*SETTINGS]))
    fitted = data.draw(st.lists(values.filter(bool), min_size=2, max_size=5), label="dataset")
    dataset = with_target({"a": pa.array([*fitted, None], kind)})
    try:
        features, encoder = encoders(dataset, {"a": read_as}, **SETTINGS[how])
    except ColumnError:  # a vector of which a place is null in all rows, or a spread beyond float64
        return
    given_rows = data.draw(st.lists(st.none() | values, min_size=1, max_size=40), label="rows")
    table = with_target({"a": pa.array(given_rows, kind)})
    try:
        by_table = features.encode(table, "the table")
    except ColumnError:
        with pytest.raises(RowError, match="column 'a' of row"):
            encoder.encode(table.to_pylist())
        return
    assert_same_however_many(by_table, encoder, table.to_pylist())


MIXED: Final[dict[str, tuple[Any, str, st.SearchStrategy[Any]]]] = {
    "tags": (pa.list_(pa.string()), "sequence", some(TEXT)),
    "age": (pa.float32(), "number", FLOATS32),
    "city": (pa.string(), "category", TEXT),
    "at": (pa.timestamp("us", "UTC"), "number", MOMENTS),
    "embedding": (pa.list_(pa.float32(), 4), "number", lists(FLOATS32, 4)),
    "hour": (pa.int64(), "category", ints(64)),
    "price": (pa.float64(), "number", FLOATS),
    "clicks": (pa.list_(pa.int64()), "sequence", some(ints(64))),
    "new": (pa.bool_(), "number", st.booleans()),
}


def mixed_rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    row = st.fixed_dictionaries({name: st.none() | values for name, (_, _, values) in MIXED.items()})
    return st.lists(row, min_size=1, max_size=30)


def mixed_table(rows: list[dict[str, Any]]) -> pa.Table:
    return with_target({name: pa.array([row[name] for row in rows], kind) for name, (kind, _, _) in MIXED.items()})


def mixed_dataset() -> pa.Table:
    moment = dt.datetime(2026, 1, 1)
    rows = [
        {
            "tags": ["a", "b"], "age": 31.5 + i, "city": f"city {i}", "at": moment + dt.timedelta(hours=i),
            "embedding": [i, 0.25, -i / 3, 1.0], "hour": i, "price": 0.1 * i, "clicks": [i, 2, 3], "new": i % 2 == 0,
        }
        for i in range(20)
    ]  # fmt: skip
    return mixed_table([*rows, dict.fromkeys(MIXED)])


KINDS: Final = {name: read_as for name, (_, read_as, _) in MIXED.items()}


@pytest.mark.parametrize("how", SETTINGS)
@settings(max_examples=25, deadline=None)
@given(rows=mixed_rows())
def test_mixed_rows_have_the_bits_of_their_table(how: str, rows: list[dict[str, Any]]) -> None:
    features, encoder = encoders(mixed_dataset(), KINDS, **SETTINGS[how])
    assert_equal_bits(features, encoder, mixed_table(rows))


def test_extension_types_are_read_as_what_they_are_stored_as() -> None:
    images = np.arange(18, dtype=np.float32).reshape(3, 2, 3) / 7
    users = pa.array([bytes(range(i, 16 + i)) for i in range(3)], pa.binary(16))
    table = with_target(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
            "user": pa.ExtensionArray.from_storage(pa.uuid(), users),
            "note": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", None, "[1]"])),
        }
    )
    features, encoder = encoders(table, {"image": "number", "flag": "number", "user": "category", "note": "category"})
    assert_equal_bits(features, encoder, table)


def test_many_rows_have_the_bits_of_their_table() -> None:
    dataset = mixed_dataset()
    many = pa.concat_tables([dataset] * (2 * ROWS_AT_ONCE // dataset.num_rows + 7))
    features, encoder = encoders(dataset, KINDS, soft_limit=2.5, null_indicators=True)
    assert many.num_rows > 2 * ROWS_AT_ONCE
    assert_equal_bits(features, encoder, many)


def test_forty_plain_columns_side_by_side_have_the_bits_of_their_table() -> None:
    generator = np.random.default_rng(0)
    table = with_target({f"x{i}": generator.standard_normal(33, np.float32) * 1.5**i for i in range(40)})
    features, encoder = encoders(table, {f"x{i}": "number" for i in range(40)}, soft_limit=1.5)
    assert_equal_bits(features, encoder, table)


# ---- the forms of JSON -----------------------------------------------------------------------------------------------
def test_json_means_what_the_values_of_the_types_mean() -> None:
    features, encoder = encoders(mixed_dataset(), KINDS)
    table = mixed_dataset()
    rows = [row | {"at": None if row["at"] is None else row["at"].isoformat()} for row in table.to_pylist()]
    sent = json.loads(json.dumps(rows))
    assert_same_however_many(features.encode(table, "the table"), encoder, sent)


MOMENT: Final = dt.datetime(2026, 11, 28, 12, 30, 15, 250_000, dt.UTC)


@pytest.mark.parametrize(
    "form",
    [
        "2026-11-28T12:30:15.250Z",
        "2026-11-28T12:30:15.25+00:00",
        "2026-11-28 12:30:15.250",
        "20261128T123015.250",
        "2026-11-28T13:30:15.250+01:00",
        MOMENT,
        MOMENT.replace(tzinfo=None),
        MOMENT.astimezone(ZoneInfo("America/New_York")),
    ],
    ids=str,
)
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_time_is_read_in_any_form_and_in_utc_without_a_zone(form: Any, unit: str) -> None:
    dataset = with_target({"a": pa.array([MOMENT], pa.timestamp("us")).cast(pa.timestamp(unit), safe=False)})
    _, encoder = encoders(dataset, {"a": "number"}, standardize_features=False)
    assert encoder.encode([{"a": form}]).x_NF.item() == np.float32(MOMENT.timestamp())


def test_a_date_is_its_midnight_and_nanoseconds_are_not_cut_off() -> None:
    days = with_target({"a": pa.array([dt.date(2026, 1, 1), dt.date(2026, 1, 3)])})
    features, encoder = encoders(days, {"a": "number"})
    assert_same(features.encode(days, "t"), encoder.encode([{"a": "2026-01-01"}, {"a": "2026-01-03T00:00:00Z"}]))
    nanos = pa.array([1_000_000_001, 1_000_000_123, 1_000_000_999], pa.timestamp("ns"))
    table = with_target({"a": nanos})
    features, encoder = encoders(table, {"a": "number"})
    texts = [{"a": f"1970-01-01T00:00:01.000000{n:03}Z"} for n in (1, 123, 999)]
    assert_same(features.encode(table, "t"), encoder.encode(texts))


@pytest.mark.parametrize(("kind", "forms"), [
    (pa.duration("ms"), [dt.timedelta(seconds=1.5), 1.5]),
    (pa.time32("ms"), [dt.time(0, 0, 1, 500_000), 1.5, "00:00:01.500"]),
])  # fmt: skip
def test_a_length_of_time_is_seconds_where_it_is_a_number(kind: Any, forms: list[Any]) -> None:
    dataset = with_target({"a": pa.array([forms[0]], kind)})
    _, encoder = encoders(dataset, {"a": "number"}, standardize_features=False)
    assert encoder.encode([{"a": form} for form in forms]).x_NF.flatten().tolist() == [1.5] * len(forms)
    with pytest.raises(
        RowError, match="but the model takes a timedelta, or seconds"
    ):  # numpy's have a unit of their own
        encoder.encode([{"a": np.timedelta64(1500, "ns")}])


def test_whole_numbers_as_categories_never_pass_through_a_float() -> None:
    large = [2**53, 2**53 + 1, 2**63 - 1, 2**64 - 1]
    dataset = with_target({"a": pa.array(large, pa.uint64())})
    features, encoder = encoders(dataset, {"a": "category"})
    sent = json.loads(json.dumps([{"a": value} for value in large]))
    assert_same(features.encode(dataset, "t"), encoder.encode(sent))
    assert len(set(encoder.encode(sent).ids_NC.flatten().tolist())) == len(large)


def test_numbers_of_one_value_are_one_category_whatever_their_type() -> None:
    _, encoder = encoders(with_target({"a": pa.array([1, 2, 3])}), {"a": "category"})
    same: list[Any] = [1, 1.0, True, Decimal("1.00"), np.int8(1), np.float32(1), np.bool_(True)]
    assert len(set(encoder.encode([{"a": value} for value in same]).ids_NC.flatten().tolist())) == 1


def test_categories_that_nobody_has_seen_are_hashed() -> None:
    features, encoder = encoders(with_target({"a": ["x", "y"]}), {"a": "category"})
    unseen = with_target({"a": ["never seen", "", "\N{GRINNING FACE}", "e\u0301", "\u00e9", "z" * 10_000]})
    for _ in range(2):  # asked, then remembered
        assert_equal_bits(features, encoder, unseen)


def test_what_is_remembered_of_categories_is_bounded() -> None:
    hashed: list[object] = []

    def data_of(value: Any) -> bytes:
        hashed.append(value)
        return str(value).encode()

    ids = Ids(1000, data_of)
    assert [ids[value] for value in ("a", None, 7, "a", None, 7)] == [ids.of("a"), 0, ids.of(7)] * 2
    hashed.clear()
    for value in ("a", 7, "z" * (LONGEST + 1), 2**64):
        assert ids[value] == ids[value]
    assert hashed == ["z" * (LONGEST + 1)] * 2 + [2**64] * 2
    for number in range(REMEMBERED + 1):
        assert ids[number] == 1 + hash_bucket(b"%d" % number, 1000)
        assert len(ids) <= REMEMBERED


def test_arrays_of_numpy_are_lists_and_nested_lists_may_come_flat() -> None:
    image = np.arange(6, dtype=np.float32).reshape(3, 2) / 3
    kind = pa.list_(pa.list_(pa.float32(), 2), 3)
    table = with_target({"a": pa.array([image.tolist(), (image * 2).tolist()], kind), "ids": [[1, 2], [3]]})
    features, encoder = encoders(table, {"a": "number", "ids": "sequence"})
    expected = features.encode(table.slice(0, 1), "t")
    for form in (image, image.reshape(-1), image.flatten().tolist(), tuple(image.tolist())):
        assert_same(expected, encoder.encode([{"a": form, "ids": np.array([1, 2])}]))


def test_without_the_types_of_the_dataset_numbers_are_scaled_in_float64() -> None:
    """As those of versions of format 1, whose manifests do not name them."""
    table = mixed_dataset()
    features, _ = encoders(table, KINDS)
    wide = table.set_column(table.schema.get_field_index("age"), "age", table["age"].cast(pa.float64()))
    wide = wide.set_column(wide.schema.get_field_index("new"), "new", wide["new"].cast(pa.float64()))
    vectors = pa.array(table["embedding"].to_pylist(), pa.list_(pa.float64(), 4))
    wide = wide.set_column(wide.schema.get_field_index("embedding"), "embedding", vectors)
    assert_same(features.encode(wide, "t"), RowEncoder(features, {}).encode(wide.to_pylist()))


# ---- many rows -------------------------------------------------------------------------------------------------------
def texts_of(moments: st.SearchStrategy[dt.datetime], digits: int) -> st.SearchStrategy[str]:
    """Times as text, with some digits after those of the microseconds."""
    more = st.text("0123456789", min_size=digits, max_size=digits)
    fractions = moments.map(lambda moment: moment.replace(microsecond=moment.microsecond | 1).isoformat())
    return st.builds(str.__add__, fractions, more)


def vectors(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=2, max_size=2)


def whole(moments: st.SearchStrategy[dt.datetime]) -> st.SearchStrategy[str]:
    """Times as text, without fractions of a second."""
    return moments.map(lambda moment: moment.replace(microsecond=0).isoformat())


ISO: Final = MOMENTS.map(dt.datetime.isoformat)
ZONED_ISO: Final = st.datetimes(dt.datetime(1800, 1, 1), dt.datetime(2200, 1, 1), timezones=st.just(dt.UTC)).map(
    dt.datetime.isoformat
)
DATASETS: Final[dict[Any, list[Any]]] = {
    **{key: [1, 2, 4] for key in (pa.float32(), pa.float64(), pa.int64(), pa.duration("ms"))},
    **{key: [dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 3)] for key in (pa.timestamp(unit) for unit, _ in UNITS)},
    pa.date32(): [dt.date(2026, 1, 1), dt.date(2026, 1, 3)],
    pa.time64("us"): [dt.time(1), dt.time(2)],
    pa.string(): ["a", "b"],
    pa.list_(pa.float32(), 2): [[1, 2], [3, 5]],
    pa.list_(pa.float64(), 2): [[1, 2], [3, 5]],
    pa.list_(pa.list_(pa.float64(), 1), 2): [[[1], [2]], [[3], [5]]],
    pa.list_(pa.string()): [["a"]],
    pa.list_(pa.int64()): [[1]],
}
PLAIN_FORMS: Final[dict[str, tuple[Any, str, st.SearchStrategy[Any]]]] = {
    "numbers for float64": (pa.float64(), "number", FLOATS | ints(64) | st.booleans()),
    "numbers for float32": (pa.float32(), "number", FLOATS32 | ints(24) | st.booleans()),
    **{f"text for {unit}": (pa.timestamp(unit), "number", ISO) for unit, _ in UNITS},
    **{f"text with a zone for {unit}": (pa.timestamp(unit), "number", ZONED_ISO) for unit, _ in UNITS},
    "text for days": (pa.date32(), "number", st.dates(dt.date(1800, 1, 1), dt.date(2200, 1, 1)).map(dt.date.isoformat)),
    **{f"whole seconds for {unit}": (pa.timestamp(unit), "number", whole(MOMENTS)) for unit, _ in UNITS},
    "datetimes for ns": (pa.timestamp("ns"), "number", MOMENTS),
    "numbers for a vector of float32": (pa.list_(pa.float32(), 2), "number", vectors(FLOATS32 | ints(24))),
    "numbers for a vector of float64": (pa.list_(pa.float64(), 2), "number", vectors(FLOATS | ints(64))),
    "seconds for a duration": (pa.duration("ms"), "number", FLOATS),
    "whole numbers for a category": (pa.int64(), "category", ints(64)),
    "text for a category": (pa.string(), "category", TEXT),
    "text for a sequence": (pa.list_(pa.string()), "sequence", some(TEXT)),
    "whole numbers for a sequence": (pa.list_(pa.int64()), "sequence", some(ints(64))),
}
OTHER_FORMS: Final[dict[str, tuple[Any, str, st.SearchStrategy[Any]]]] = {
    "other numbers": (pa.float64(), "number", decimals(9, 2) | FLOATS32.map(np.float32) | st.booleans() | FLOATS),
    "text with nanoseconds": (pa.timestamp("ns"), "number", texts_of(MOMENTS, 3)),
    "text with picoseconds": (pa.timestamp("us"), "number", texts_of(MOMENTS, 6)),
    "text of all years": (pa.timestamp("ms"), "number", st.datetimes().map(dt.datetime.isoformat)),
    "whole seconds of all years": (pa.timestamp("us"), "number", whole(st.datetimes())),
    "days of weeks": (pa.timestamp("us"), "number", st.sampled_from(["2026-W48-6T12:30:15", "2026-11-28T12:30:15"])),
    "text with and without a zone": (pa.timestamp("us"), "number", ISO | ZONED_ISO),
    "times of several kinds": (pa.timestamp("us"), "number", MOMENTS | ISO | st.dates()),
    "times of day": (pa.time64("us"), "number", TIMES | TIMES.map(dt.time.isoformat) | st.floats(0, 86_400)),
    "other lists": (
        pa.list_(pa.float32(), 2),
        "number",
        vectors(st.none() | FLOATS32).flatmap(
            lambda pair: st.sampled_from([pair, tuple(pair), np.array([v or 0.5 for v in pair], np.float32)])
        ),
    ),
    "nested lists, and flat ones": (
        pa.list_(pa.list_(pa.float64(), 1), 2),
        "number",
        st.sampled_from([[[1.5], [2.0]], [1.5, 2.0], [None, [2.0]], [[None], [2.0]]]),
    ),
    "other numbers for a category": (
        pa.float64(),
        "category",
        ints(64) | st.booleans() | st.integers(-9, 9).map(float) | decimals(7, 2),
    ),
    "text, bytes and UUIDs for a category": (pa.string(), "category", TEXT | st.binary(max_size=4) | st.uuids()),
    "other sequences": (
        pa.list_(pa.int64()),
        "sequence",
        some(ints(64)).flatmap(
            lambda items: st.sampled_from(
                [items, tuple(items), np.array([i for i in items if i is not None], np.int64)]
            )
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", [*PLAIN_FORMS, *OTHER_FORMS])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_many_rows_have_the_bits_of_each_of_them_alone(form: str, data: st.DataObject) -> None:
    """In the forms that values have in JSON and in Python, beside each other as no table has them."""
    kind, read_as, values = (PLAIN_FORMS | OTHER_FORMS)[form]
    features, encoder = encoders(with_target({"a": pa.array(DATASETS[kind], kind)}), {"a": read_as})
    nulls = data.draw(st.sampled_from([values, st.none() | values]))
    rows = [{"a": value} for value in data.draw(st.lists(nulls, min_size=BY_COLUMN, max_size=3 * BY_COLUMN))]
    assert_same_however_many(joined([encoder.encode([row]) for row in rows]), encoder, rows)
    if form in PLAIN_FORMS:
        given_values = [row["a"] for row in rows if row["a"] is not None]
        part = part_of(features, kind)
        assert not given_values or part.many(given_values, set(map(type, given_values))) is not None, "one by one"


def part_of(features: Features, kind: Any) -> Part:
    """The only column of features, as it is read where rows are many."""
    column, stored = features.columns[0], StoredType(type_name(kind))
    return id_part(0, column, stored, 0) if column.buckets else number_part(0, column, stored, [0.0] * 2, [1.0] * 2, 0)


# ---- what is no row --------------------------------------------------------------------------------------------------
GOOD: Final[dict[str, Any]] = {
    "tags": ["a"], "age": 1.0, "city": "x", "at": "2026-01-01", "embedding": [1, 2, 3, 4], "hour": 3, "price": 0.5,
    "clicks": [1], "new": True,
}  # fmt: skip
WRONG: Final = [
    ("age", "31", "holds '31' (str), but the model takes a number"),
    ("age", [1.0], "holds [1.0] (list), but the model takes a number"),
    ("age", math.nan, "is NaN, infinity or beyond float32"),
    ("age", 1e39, "is NaN, infinity or beyond float32"),
    ("age", 10**400, "too large"),
    ("age", Decimal("NaN"), "column 'age'"),
    ("age", np.timedelta64(1500, "ns"), "but the model takes a number"),
    ("age", np.complex128(1 + 2j), "but the model takes a number"),
    ("price", math.inf, "is NaN, infinity or beyond float32"),
    ("price", "free", "holds 'free' (str), but the model takes a number"),
    ("city", 7, "holds 7 (int), but the model takes text"),
    ("city", "\ud800", "surrogates not allowed"),
    ("hour", "7", "holds '7' (str), but the model takes a number"),
    ("hour", np.datetime64("2026-01-01", "ns"), "but the model takes a number"),
    ("hour", math.nan, "nan is not a category"),
    ("hour", 2.0**53 + 2, "is not a category"),
    ("at", 1_700_000_000, "holds 1700000000 (int), but the model takes a time"),
    ("at", "28.11.2026", "holds '28.11.2026', but the model takes a time: give ISO 8601"),
    ("embedding", [1, 2, 3], "holds a list of 3, but the model takes 4 numbers"),
    ("embedding", 1.0, "holds 1.0 (float), but the model takes a list"),
    ("embedding", [1, 2, 3, "4"], "holds '4' (str), but the model takes a number"),
    ("embedding", np.array([1, 2, 3, 4], "m8[ns]"), "but the model takes a list"),
    ("embedding", [1, 2, 3, math.inf], "is NaN, infinity or beyond float32"),
    ("tags", "a", "holds 'a' (str), but the model takes a list"),
    ("tags", [1], "holds 1 (int), but the model takes text"),
    ("tags", [["a"]], "holds [['a']] (list), which no list of text is"),
    ("city", {}, "holds {} (dict), which no text is"),
    ("clicks", [1.0], "holds 1.0 (float), but the model takes an integer"),
    ("clicks", [np.timedelta64(1, "ns")], "but the model takes an integer"),
    ("clicks", [True], "holds True (bool), but the model takes an integer"),
]


@pytest.mark.parametrize("others", [1, BY_COLUMN])
@pytest.mark.parametrize(("column", "value", "said"), WRONG, ids=lambda value: str(value)[:20])
def test_what_a_column_cannot_hold_is_refused_by_row_and_column(
    column: str, value: Any, said: str, others: int
) -> None:
    _, encoder = encoders(mixed_dataset(), KINDS)
    with pytest.raises(RowError) as caught:
        encoder.encode([GOOD, GOOD, GOOD | {column: value}, *[GOOD] * others])
    assert (caught.value.row, caught.value.column) == (2, column)
    assert f"column {column!r} of row 2" in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_row_that_lacks_a_column_is_refused_and_what_it_has_besides_is_not_looked_at() -> None:
    _, encoder = encoders(mixed_dataset(), KINDS)
    assert_same(encoder.encode([GOOD]), encoder.encode([GOOD | {"y": object(), "more": 1}]))
    lacking = {name: value for name, value in GOOD.items() if name != "price"}
    for others in (0, BY_COLUMN):
        with pytest.raises(RowError, match="column 'price' is missing from row 1: did you mean 'prize'") as caught:
            encoder.encode([GOOD, lacking | {"prize": 1.0}, *[GOOD] * others])
        assert (caught.value.row, caught.value.column) == (1, "price")


@pytest.mark.parametrize("others", [0, BY_COLUMN])
@pytest.mark.parametrize("row", [[1, 2], "text", None, 5])
def test_a_row_that_is_no_dict_is_refused(row: Any, others: int) -> None:
    _, encoder = encoders(mixed_dataset(), KINDS)
    with pytest.raises(RowError, match=f"row 1 is a {type(row).__name__}: give a dict") as caught:
        encoder.encode([GOOD, row, *[GOOD] * others])
    assert (caught.value.row, caught.value.column) == (1, None)


def test_of_several_faults_the_first_row_s_is_told() -> None:
    _, encoder = encoders(mixed_dataset(), KINDS)
    rows = [GOOD] * ROWS_AT_ONCE + [
        GOOD | {"price": math.inf},
        GOOD | {"hour": "7"},
        GOOD | {"age": "31"},
        *[GOOD] * BY_COLUMN,
    ]
    with pytest.raises(RowError, match=f"column 'hour' of row {ROWS_AT_ONCE + 1}: holds '7'"):
        encoder.encode(rows)


def test_one_column_alone_is_read_too() -> None:
    table = with_target({"a": [0.5, None, 2.0]})
    features, encoder = encoders(table, {"a": "number"}, null_indicators=True)
    assert_equal_bits(features, encoder, table)
    with pytest.raises(RowError, match="column 'a' is missing from row 0"):
        encoder.encode([{}])

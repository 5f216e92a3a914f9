"""Which columns the features of a spec stand for."""

from typing import Any

import pyarrow as pa
import pytest

from tidemill.tasks.training import request_log
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.patterns import choose
from tidemill.tasks.training.spec import Column, Spec

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("dep_time", pa.float32()),
        ("dep_delay", pa.int16()),
        ("carrier", pa.string()),
        ("when", pa.timestamp("us")),
        ("route", pa.map_(pa.string(), pa.int64())),
        ("nothing", pa.null()),
        ("tags", pa.list_(pa.string())),
        ("w", pa.float64()),
        ("y", pa.float64()),
    ]
)
USABLE = ["id", "dep_time", "dep_delay", "carrier", "when", "tags", "w"]


def names(features: Any = None, schema: pa.Schema = SCHEMA, **settings: Any) -> list[str]:
    asked = {} if features is None else {"features": features}
    return [column.name for column in choose(Spec(target="y", **asked, **settings), schema).columns]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (None, USABLE),
        ("*", USABLE),
        (["*", "!id"], [name for name in USABLE if name != "id"]),
        (["!id", "!dep_*"], ["carrier", "when", "tags", "w"]),
        ("!id,!dep_*", ["carrier", "when", "tags", "w"]),
        (["dep_*", "carrier"], ["dep_time", "dep_delay", "carrier"]),
        ("carrier, dep_*", ["carrier", "dep_time", "dep_delay"]),
        (["carrier,", "when"], ["carrier", "when"]),
        (["carrier", "*"], ["carrier", "id", "dep_time", "dep_delay", "when", "tags", "w"]),
        ("dep_?i*", ["dep_time"]),
        ("[dw]*", ["dep_time", "dep_delay", "when", "w"]),
        (["*", "!*"], None),
        (["*", "!*", "id"], ["id"]),
    ],
)
def test_features_are_names_patterns_and_all_but_some(features: Any, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ColumnError, match="no column of the dataset is left for features"):
            names(features)
    else:
        assert names(features) == expected


def test_a_pattern_never_takes_the_weight_and_says_what_it_passes_over() -> None:
    chosen = choose(Spec(target="y", sample_weight="w"), SCHEMA)
    assert [column.name for column in chosen.columns] == USABLE[:-1]
    assert chosen.by_pattern == set(USABLE[:-1])
    assert chosen.unused == {
        "route": "of type map<string, int64>, which cannot be an input",
        "nothing": "null in all rows",
    }


def test_a_pattern_takes_no_column_of_a_log_of_requests_and_says_so() -> None:
    schema = pa.schema([*SCHEMA, (request_log.PREDICTION, pa.float32()), *request_log.TYPES.items()])
    assert names(schema=schema) == USABLE
    unused = choose(Spec(target="y"), schema).unused
    assert {name for name, why in unused.items() if "log of requests" in why} == {
        *request_log.TYPES,
        request_log.PREDICTION,
    }


def test_what_is_named_is_taken_as_it_is_named() -> None:
    spec = Spec(features=["*", Column(name="id", kind="category", buckets=7)], target="y")
    *others, last = choose(spec, SCHEMA).columns
    assert last == spec.features[1]
    assert "id" not in [column.name for column in others]
    settings = choose(Spec(features=[{"name": "dep_*", "kind": "category"}], target="y"), SCHEMA).columns
    assert [(column.name, column.kind) for column in settings] == [("dep_time", "category"), ("dep_delay", "category")]


def test_a_column_may_have_any_name() -> None:
    odd = pa.schema([(name, pa.int64()) for name in ("a,b", "!a", "*", "a", "b", "x[0]", "", "ä ö", "y")])
    assert names(["a,b"], odd) == ["a,b"]
    assert names(["!a"], odd) == ["!a"]
    assert names(["*"], odd) == ["*"]
    assert names(["x[0]", "ä ö"], odd) == ["x[0]", "ä ö"]
    assert names(["?", "!b"], odd) == ["*", "a"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["dep_tima*"], r"features: 'dep_tima\*' matches no column of the dataset: did you mean 'dep_time'"),
        (["*", "!idd"], "features: '!idd' matches no column of the dataset: did you mean 'id'"),
        (["*", "!CARRIER"], "did you mean 'carrier'"),
        ("a*,carrier", r"features: 'a\*' matches no column of the dataset: it has 'id', 'dep_time'"),
        ("carrier,carrier", "features name 'carrier' more than once"),
        (["ro*"], r"no column of the dataset is left for features \('route': of type map"),
        (["y*"], "no column of the dataset is left"),
    ],
)
def test_what_matches_nothing_is_an_error(features: Any, message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        names(features)


def test_a_dataset_of_nothing_but_the_target_is_told_so() -> None:
    with pytest.raises(ColumnError, match="the dataset has no column beside the target"):
        names(schema=pa.schema([("y", pa.float64())]))
    with pytest.raises(ColumnError, match="no column beside the target and the sample weight"):
        names(schema=pa.schema([("y", pa.float64()), ("w", pa.float64())]), sample_weight="w")


def test_a_pattern_takes_what_every_file_has_and_means_alike() -> None:
    files = [
        pa.schema([("a", pa.int64()), ("b", pa.int64()), ("c", pa.null()), ("d", pa.string()), ("y", pa.int64())]),
        pa.schema([("a", pa.float64()), ("c", pa.int8()), ("d", pa.int64()), ("y", pa.int64())]),
    ]
    chosen = choose(Spec(target="y"), files[0], files)
    assert chosen.unused == {
        "b": "not in every file",
        "c": "null in all rows",
        "d": "text in one file, int64 in another",
    }
    whole = pa.schema([("a", pa.int64()), ("c", pa.int8()), ("y", pa.int64())])
    assert [column.name for column in choose(Spec(target="y"), whole, files).columns] == ["a", "c"]


def test_a_name_that_occurs_twice_is_passed_over() -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("a", pa.int64()), ("y", pa.int64())])
    chosen = choose(Spec(target="y"), schema)
    assert ([c.name for c in chosen.columns], chosen.unused) == (
        ["b"],
        {"a": "the dataset has several columns of this name"},
    )

"""What the key of a file says: hidden or data, and the values of its `name=value` folders."""

from typing import Any

import pyarrow as pa
import pytest

from tidemill.storage.inbox import is_shard
from tidemill.storage.partitions import is_hidden, partition_types, partition_values, partitions

HIDDEN = ["_a.parquet", ".a.parquet", "_a=1.parquet", "_tmp/a.parquet", ".x=1/a.parquet", "x=1/_y/a.parquet", "._=/a"]


@pytest.mark.parametrize("key", HIDDEN)
def test_what_begins_with_a_dot_or_an_underscore_is_hidden(key: str) -> None:
    assert is_hidden(key)


@pytest.mark.parametrize("key", ["_x=1/a.parquet", "x=1/_y=/a.parquet", "a_.parquet", "a/b.c/d", "_=/a", "x=_/a"])
def test_a_folder_of_a_column_is_not_hidden_though_its_name_begins_with_an_underscore(key: str) -> None:
    assert not is_hidden(key)


def test_shards_in_partition_folders_are_shards() -> None:
    assert is_shard("_day=1/a.parquet")
    assert not is_shard("_day/a.parquet")


def test_values_are_decoded_and_the_default_partition_is_a_null() -> None:
    key = "a%3Db=1%2F2/__HIVE_DEFAULT_PARTITION__/y=__HIVE_DEFAULT_PARTITION__/=3/z=/last=no"
    assert partition_values(key) == {"a=b": "1/2", "y": None, "z": ""}


def test_a_column_is_a_number_if_each_of_its_values_is_whole() -> None:
    keys = ["a=1/b=1/c=__HIVE_DEFAULT_PARTITION__/x", "a=-007/b=x/c=5/x", "a=1/b=2/d=1234567890123456789/x"]
    assert partition_types(keys) == {"a": pa.int64(), "b": pa.string(), "c": pa.int64(), "d": pa.string()}


@pytest.mark.parametrize(
    ("kind", "value", "typed"),
    [
        (pa.string(), "7", pa.scalar("7", pa.string())),
        (pa.float64(), "1.5", pa.scalar(1.5, pa.float64())),
        (pa.float64(), "__HIVE_DEFAULT_PARTITION__", pa.scalar(None, pa.float64())),
        # Where any number will do, a whole one stays whole: as a category, it has more digits than a float.
        (pa.float64(), "12345678901234567", pa.scalar(12345678901234567, pa.int64())),
    ],
)
def test_a_value_has_the_type_of_its_column(kind: pa.DataType, value: str, typed: "pa.Scalar[Any]") -> None:
    assert partitions(f"a={value}/x", {"a": kind}) == {"a": typed}


def test_a_value_that_is_none_of_its_columns_type_is_named() -> None:
    with pytest.raises(ValueError, match="its folder a=x is no number"):
        partitions("a=x/x", {"a": pa.float64()})


def test_folders_that_contradict_each_other_are_named() -> None:
    assert partitions("a=1/b=2/a=1/x", {}) == {"a": pa.scalar(1, pa.int64()), "b": pa.scalar(2, pa.int64())}
    with pytest.raises(ValueError, match="its folders give column 'a' different values"):
        partitions("a=1/b=2/a=2/x", {})


def test_a_column_without_a_type_has_that_of_its_own_value() -> None:
    assert partitions("a=1/b=x/x", {}) == {"a": pa.scalar(1, pa.int64()), "b": pa.scalar("x", pa.string())}

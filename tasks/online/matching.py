"""Which rows of features and which rows of labels have the same key, and count for each other: one look at all that wait.

Shape legend: M rows of all shards of features, N rows of one of them, G rows of all shards of labels, one after the other, P
pairs of a row of features and one of labels.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tidemill.tasks.training.columns import from_arrow

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Match:
    """One shard of features beside all labels that count for it."""

    complete_at: datetime | None
    """When the last of its rows had a label, as long as each has one."""
    last_N: Any
    """int64: which of the G labels counts for each row, the last one; -1 where there is none."""
    touched: Any
    """int64, ascending: all of the G labels that have the key of a row."""


def matches(
    features: Sequence[tuple[datetime, pa.Array[Any]]],
    labels: Sequence[tuple[datetime, pa.Array[Any]]],
    wait: timedelta,
) -> list[Match]:
    """How shards belong together, for each shard of features.

    Args:
        features: When each was written, and the key of each of its rows, as bytes. A null has no label.
        labels: The same of the shards of labels, the one that counts more after the one that counts less.
        wait: Shards that were written further apart do not count for each other.
    """
    keys = [pa.nulls(0, pa.large_binary()), *(keys for _, keys in labels), *(keys for _, keys in features)]
    sizes_of_labels, sizes = (np.array([len(keys) for _, keys in some], dtype=np.int64) for some in (labels, features))
    key_G, key_M = np.split(_numbered(pa.concat_arrays(keys)), [int(sizes_of_labels.sum())])
    order_G = np.argsort(key_G, kind="stable")
    sorted_G = key_G[order_G]
    low_M, high_M = np.searchsorted(sorted_G, key_M, "left"), np.searchsorted(sorted_G, key_M, "right")
    count_M = np.where(key_M < 0, 0, high_M - low_M)
    row_P = np.repeat(np.arange(len(key_M)), count_M)
    nth_P = np.arange(len(row_P)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    label_P = order_G[np.repeat(low_M, count_M) + nth_P]
    written_G = np.repeat(_ticks(when for when, _ in labels), sizes_of_labels)
    written_M = np.repeat(_ticks(when for when, _ in features), sizes)
    counts_P = np.abs(written_G[label_P] - written_M[row_P]) <= wait // timedelta(microseconds=1)
    row_P, label_P = row_P[counts_P], label_P[counts_P]
    # The labels of a row stand side by side, in the order in which they count.
    edges = np.flatnonzero(np.diff(row_P, prepend=-1, append=-1))
    first_M, last_M = np.full(len(key_M), -1), np.full(len(key_M), -1)
    first_M[row_P[edges[:-1]]] = label_P[edges[:-1]]
    last_M[row_P[edges[1:] - 1]] = label_P[edges[1:] - 1]
    found, end = list[Match](), 0
    for (when, _), size in zip(features, sizes.tolist(), strict=True):
        begin, end = end, end + size
        first_N = first_M[begin:end]
        complete_at = None
        if len(first_N) and first_N.min() >= 0:
            complete_at = max(when, _EPOCH + timedelta(microseconds=int(written_G[first_N].max())))
        pairs = slice(*np.searchsorted(row_P, [begin, end]))
        found.append(Match(complete_at, last_M[begin:end], np.unique(label_P[pairs])))
    return found


def _numbered(keys: pa.Array[Any]) -> Any:
    """int64: the same number for the same key, whichever shard it is in; -1 for null."""
    if not len(keys):
        return np.zeros(0, dtype=np.int64)
    encoded: Any = keys.dictionary_encode("encode")
    numbers = from_arrow(encoded.indices).long().numpy()
    if encoded.dictionary.null_count:
        null = int(from_arrow(encoded.dictionary.is_null().cast(pa.uint8())).argmax())
        numbers[numbers == null] = -1
    return numbers


def _ticks(moments: Any) -> Any:
    """int64: microseconds since 1970, exact."""
    return np.array([(moment - _EPOCH) // timedelta(microseconds=1) for moment in moments], dtype=np.int64)

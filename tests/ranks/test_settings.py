"""The settings that have a say in an online run, with ranks: the same versions as of one process; with parts, the same bits.

A sample of the matrix in which all values of any two settings meet; `--full`: of any three.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pytest
import torch

from tests.conftest import BUCKET
from tests.data import parquet
from tests.guarantees.children import BATCH, bits, fill, start_server, train, waiting
from tests.ranks.covering import Cell, covering
from tests.ranks.crews import drained
from tests.ranks.matrix import largest
from tests.training.test_steps import furthest
from tidemill.storage.audit import audit
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.urls import open_store
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

# ---- the matrix ------------------------------------------------------------------------------------------------------
RANKS: Final = {
    "1, 4 parts": (1, 4),
    "2, 4 parts": (2, 4),
    "4, 4 parts": (4, 4),
    "2": (2, None),
    "3": (3, None),
    "4": (4, None),
}
"""How many, and how many parts."""
IN_SPEC: Final[Mapping[str, Mapping[str, dict[str, Any]]]] = {
    "batches": {
        "even": {"batch_size": 8},
        "uneven": {"batch_size": 7},
        "fewer rows than parts": {"batch_size": 3, "learning_rate": 0.01, "epochs": 40},
    },
    "weights": {
        "none": {},
        "of rows": {"sample_weight": "w"},
        "of classes": {"target": "k", "task": "binary", "class_weights": "balanced"},
    },
    "clipping": {"no": {}, "yes": {"clip_norm": 0.5}},
    "average": {"no": {}, "yes": {"ema_decay": 0.9}},
    "replay": {"no": {}, "yes": {"replay": {"rows": 30, "ratio": 0.5}}},
    "schedule": {"no": {}, "yes": {"schedule": {"name": "cosine", "arguments": {"T_max": 400}, "warmup_steps": 5}}},
    "dropout": {"no": {}, "yes": {"model": {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.1}}}},
}
ROWS, PLAIN, TURNED = 16, 8, 7
"""Of a shard; shards whose targets are as in the dataset; shards after them, whose targets are the opposite."""
IN_SETTINGS: Final[Mapping[str, Mapping[str, dict[str, Any]]]] = {
    "labels": {"with the rows": {}, "by shard": {"labels": {"key": "id"}}, "row by row": {"labels": {"key": "id"}}},
    "triggers": {
        "none": {},
        "rows": {"train_when": {"min_rows": (PLAIN + TURNED - 1) * ROWS}},
        "drift": {"train_when": {"drift": "page_hinkley"}},
    },
    "gate": {name: {"gate": {"champion": name, "recent_shards": 2}} for name in ("ignore", "score", "move")},
}
MATRIX: Final[Mapping[str, list[str]]] = {
    "ranks": list(RANKS),
    **{name: list(values) for name, values in (IN_SPEC | IN_SETTINGS).items()},
    "store": ["local", "s3"],
}
IN_CI: Final = 3
"""Cells of `make test`."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    cells = covering(MATRIX, 3 if metafunc.config.getoption("--full") else 2)[metafunc.config.getoption("--piece")]
    metafunc.parametrize(
        "cell",
        [
            pytest.param(cell, marks=() if number < IN_CI else pytest.mark.ranks, id="; ".join(cell.values()))
            for number, cell in enumerate(cells)
        ],
    )


@pytest.mark.parametrize("strength", [2, 3])
def test_all_values_of_any_two_settings_meet_in_the_sample_and_of_any_three_in_the_full_one(strength: int) -> None:
    cells = covering(MATRIX, strength)
    for names in combinations(MATRIX, strength):
        met = {tuple(cell[name] for name in names) for cell in cells}
        assert met == set(product(*(MATRIX[name] for name in names)))


def test_what_make_test_runs_of_the_sample_has_several_ranks_and_both_stores() -> None:
    cells = covering(MATRIX, 2)[:IN_CI]
    assert {cell["store"] for cell in cells} == {"local", "s3"}
    assert any(RANKS[cell["ranks"]][0] > 1 for cell in cells)


# ---- what is trained on ----------------------------------------------------------------------------------------------
LABELS: Final = ["y", "k"]


def table(rows: int, seed: int, first: int = 0, sign: int = 1) -> pa.Table:
    """Learnable rows with keys from `first` on; with `sign` -1 their targets are the opposite."""
    a, b = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed))
    y = sign * (2 * a - b)
    colours = [["red", "green", None][(first + row) % 3] for row in range(rows)]
    plain = {"a": a, "b": b, "w": 1 + a.abs(), "y": y, "k": (y > 0).long()}
    keys = {"id": list(range(first, first + rows)), "c": colours}
    return pa.table(keys | {name: column.tolist() for name, column in plain.items()})


@functools.cache
def shards() -> dict[str, pa.Table]:
    return {
        f"{i:02}.parquet": table(ROWS, 10 + i, i * ROWS, sign=1 if i < PLAIN else -1) for i in range(PLAIN + TURNED)
    }


def put(labels: str, inbox: str, inbox_of_labels: str) -> None:
    """All shards; of the last one no labels, where these come later."""
    late = labels != "with the rows"
    features = {key: rows.drop_columns(LABELS) if late else rows for key, rows in shards().items()}
    fill(inbox, {key: parquet(rows, 12) for key, rows in features.items()})
    if not late:
        return
    known = {key: rows.select(["id", *LABELS]) for key, rows in list(shards().items())[:-1]}
    if labels == "row by row":  # in shards of their own
        whole = pa.concat_tables(known.values())
        known = {f"labels-{at:03}.parquet": whole.slice(at, 23) for at in range(0, whole.num_rows, 23)}
    fill(inbox_of_labels, {key: parquet(rows) for key, rows in known.items()})


def spec_of(cell: Cell, parts: int | None) -> Spec:
    said: dict[str, Any] = {
        "features": ["a", "b", {"name": "c", "kind": "category", "buckets": 8}],
        "target": "y",
        "model": {"factory": "mlp", "arguments": {"hidden": [8]}},
        "learning_rate": 0.03,
        "epochs": 14,
        "seed": 5,
        "parts": parts,
    }
    for name, values in IN_SPEC.items():
        said |= values[cell[name]]
    return Spec.model_validate(said)


def settings_of(cell: Cell, labels: str) -> OnlineSettings:
    said: dict[str, Any] = {"limits": {"max_shards": 4}, "grace_seconds": 0}
    for name, values in IN_SETTINGS.items():
        said |= values[cell[name]]
    if "labels" in said:
        waits = {"wait_seconds": 86_400} if cell["labels"] == "row by row" else {}
        said["labels"] = said["labels"] | waits | {"inbox": labels}
    return OnlineSettings.model_validate(said)


# ---- what comes of it ------------------------------------------------------------------------------------------------
class Came(NamedTuple):
    """What a run has come to."""

    log: VersionLog
    told: list[Any]
    """Of each version: what it was trained on, what fired, and what the gate decided."""
    waiting: list[str]


class Place:
    """Where runs of one cell are, each with an inbox and a registry of its own."""

    def __init__(self, root: str, tmp_path: Path, cell: Cell) -> None:
        self._root, self._tmp_path, self._cell = root, tmp_path, cell
        fill(f"{root}/dataset", {f"part-{i}.parquet": parquet(table(64, i), 12) for i in range(2)})

    def drained(self, name: str, size: int, parts: int | None) -> Came:
        """By so many ranks, on from what one process has trained in batch."""
        inbox, labels, registry = (f"{self._root}/{name}/{what}" for what in ("inbox", "labels", "registry"))
        train(open_store, f"{self._root}/dataset", registry, spec_of(self._cell, parts), BATCH)
        put(self._cell["labels"], inbox, labels)
        settings = settings_of(self._cell, labels)
        ended = drained(size, inbox, registry, self._tmp_path, settings=settings)
        assert [each.how for each in ended] == ["done"] * size
        log = open_log(registry, "model")
        assert audit(log).findings == []
        versions = [log.version(number).manifest for number in range(1, log.head().number + 1)]
        told = [
            ([shard.key for shard in v.consumed], v.fired, None if v.gate is None else v.gate.decision)
            for v in versions
        ]
        left = waiting(inbox)
        assert Counter([*left, *(key for keys, _, _ in told for key in keys)]) == Counter(list(shards()))
        return Came(log, told, left)


def check_that_settings_counted(cell: Cell, came: Came) -> None:
    """Else the ranks would be compared in what does not happen."""
    fired = {reason for _, reasons, _ in came.told for reason in reasons}
    assert fired == {"none": set(), "rows": {"min_rows"}, "drift": {"drift"}}[cell["triggers"]]
    assert came.waiting == ([] if cell["labels"] == "with the rows" else [max(shards())]), "whose labels have not come"
    assert any(decision is not None for _, _, decision in came.told) is (cell["gate"] == "move")


def check_near(one: Came, other: Came) -> None:
    """The same numbers up to the order of sums."""
    learners = [load_learner(came.log, came.log.head()) for came in (one, other)]
    assert furthest(*learners) < 1e-6 * largest(learners[0])
    scored, again = (
        {name: score for name, score in came.log.head().manifest.metrics.items() if isinstance(score, float)}
        for came in (one, other)
    )
    assert scored == pytest.approx(again, rel=1e-5)


@pytest.mark.timeout(600)
def test_ranks_make_the_versions_of_one_process_whatever_is_set(
    cell: Cell, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start_server()
    if cell["store"] == "s3":
        request.getfixturevalue("s3_server")
    root = f"s3://{BUCKET}/{tmp_path.name}-{id(request):x}" if cell["store"] == "s3" else str(tmp_path / "stores")
    place, (size, parts) = Place(root, tmp_path, cell), RANKS[cell["ranks"]]
    # What one process trains in parts is near to what it trains without them
    alone = place.drained("alone", 1, parts if size > 1 else None)
    check_that_settings_counted(cell, alone)
    together = place.drained("together", size, parts)
    if size > 1 and parts is not None:
        assert bits(together.log) == bits(alone.log)
    elif cell["dropout"] == "no":
        check_near(alone, together)
    else:  # which rows are dropped depends on how many parts there are, but so many have the same bits again
        again = place.drained("again", size, parts)
        assert (bits(again.log), again.told) == (bits(together.log), together.told)
        return
    assert (together.told, together.waiting) == (alone.told, alone.waiting)

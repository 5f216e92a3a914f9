"""A model of tables with sparse gradients under SparseAdam: the same bits wherever a run is cut off, in batch and online."""

import hashlib
import random
from collections.abc import Callable

import pyarrow as pa
import pytest

from tests.data import SPEC, put
from tests.storage.faults import Call, act_at, hooked
from tidemill.storage.audit import audit
from tidemill.storage.log import open_log
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks import batch
from tidemill.tasks.online.doors import drain
from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.versions import load_learner

MakeUrl = Callable[[str], str]

CUTS = 6
"""Calls of the stores, spread over a run, at which it is cut off."""
SHARDS = 4
SPARSE = Spec.model_validate(
    SPEC.model_dump()
    | {
        "features": [{"name": "c", "kind": "category", "buckets": 500}, "words", "x"],
        "model": {"factory": "mlp", "arguments": {"hidden": [8], "embedding": 4, "sparse": True}},
        "optimizer": {"name": "sparse_adam"},
    }
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


class CutOff(BaseException):
    """The process ends here, as far as the stores can tell."""


def table_of(count: int, seed: int) -> pa.Table:
    chance = random.Random(seed)
    x = [chance.gauss(0, 1) for _ in range(count)]
    ids = [chance.randrange(40) for _ in range(count)]
    words = [[f"w{(i * k) % 23}" for k in range(i % 4)] for i in ids]
    y = [2 * a - i / 20 for a, i in zip(x, ids, strict=True)]
    return pa.table({"c": [f"v{i}" for i in ids], "words": words, "x": x, "y": y})


def cut_off_at(index: int) -> Callable[[str], Store]:
    """Stores of a process that ends at that call of any of them."""

    def end() -> None:
        raise CutOff

    return hooked(act_at(index, "before", end), concurrency=1)


def bits(registry: str) -> list[str]:
    """Of the newest version."""
    log = open_log(registry, "model")
    return [hashlib.sha256(part).hexdigest() for part in load_learner(log, log.head()).dump()]


def begin(make_url: MakeUrl, name: str, stores: Callable[[str], Store] = open_store) -> None:
    batch.train(make_url("dataset"), make_url(name), "model", SPARSE, stores=stores)


@pytest.fixture
def dataset(memory_url: MakeUrl) -> MakeUrl:
    put(memory_url("dataset"), {"part-0.parquet": table_of(150, 0)})
    return memory_url


def test_a_batch_run_that_is_cut_off_goes_on_to_the_same_bits(dataset: MakeUrl) -> None:
    calls: list[Call] = []
    begin(dataset, "straight", hooked(calls.append, concurrency=1))
    last = max(call.index for call in calls)
    for index in range(last // CUTS, last, last // CUTS):
        with pytest.raises(CutOff):
            begin(dataset, f"cut-{index}", cut_off_at(index))
        begin(dataset, f"cut-{index}")
        assert bits(dataset(f"cut-{index}")) == bits(dataset("straight"))


def test_an_online_run_that_is_cut_off_goes_on_to_the_same_bits(dataset: MakeUrl) -> None:
    """A shard in the middle is rejected after training on it: the learner goes back, and then is trained on the others."""
    too_far = table_of(20, 7).set_column(3, "y", [[1e38] * 20])
    shards = {f"{n}.parquet": table_of(30 + n, 10 + n) for n in range(SHARDS)} | {"1b.parquet": too_far}
    settings = OnlineSettings.model_validate({"grace_seconds": 0, "limits": {"max_shards": 3}})

    def run(name: str, stores: Callable[[str], Store]) -> None:
        drain(dataset(f"inbox-{name}"), dataset(name), "model", settings, stores=stores)

    def prepared(name: str) -> str:
        begin(dataset, name)
        put(dataset(f"inbox-{name}"), shards)
        return name

    calls: list[Call] = []
    run(prepared("straight"), hooked(calls.append, concurrency=1))
    head = open_log(dataset("straight"), "model").head()
    assert (head.number, head.manifest.counters["shards"]) == (2, SHARDS)
    last = max(call.index for call in calls)
    for index in range(last // CUTS, last, last // CUTS):
        name = prepared(f"cut-{index}")
        with pytest.raises(CutOff):
            run(name, cut_off_at(index))
        run(name, open_store)
        assert bits(dataset(name)) == bits(dataset("straight"))
        assert audit(open_log(dataset(name), "model")).findings == []

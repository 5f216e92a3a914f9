"""A pass that is stopped between any two blocks of steps goes on to the same bits."""

from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.training.rows import begin, cut, numbers_table, plain_spec
from tidemill.tasks.training.errors import ColumnError, NonFiniteLoss
from tidemill.tasks.training.groups import Split
from tidemill.tasks.training.kept import Kept
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import PassResult, train_pass
from tidemill.tasks.training.midway import Midway
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

pytestmark = pytest.mark.slow

TABLE = numbers_table(230)
GROUPS = cut(TABLE, 60, 60, 40)
KEY = ("epoch", 0)


class Everything:
    """Stores a pass after every n-th block of steps."""

    def __init__(self, learner: Learner, every: int = 1) -> None:
        self._learner, self._every, self._asked = learner, every, 0
        self.stored: list[tuple[bytes, bytes, str]] = []

    def due(self, rows: int) -> bool:
        self._asked += 1
        return self._asked % self._every == 0

    def keep(self, midway: Midway) -> None:
        self.stored.append((*self._learner.dump(), midway.model_dump_json()))


def wide(**settings: Any) -> Spec:
    """All that makes a learner more than its weights."""
    defaults: dict[str, Any] = {
        "model": {"factory": "tests.training.rows:DropoutNet"},
        "optimizer": {"name": "adamw"},
        "learning_rate": 1e-2,
        "batch_size": 16,
        "shuffle": True,
        "shuffle_bytes": 2 * 90 * 48,
        "standardize_features": True,
        "ema_decay": 0.9,
        "schedule": {"name": "cosine", "arguments": {"T_max": 20}, "warmup_steps": 4},
    }
    return plain_spec(**(defaults | settings))


CASES: dict[str, dict[str, Any]] = {
    "all at once": {},
    "in order": {"shuffle": False},
    "one window": {"shuffle_bytes": 2**20},
    "a memory of old rows": {"replay": {"rows": 40}},
    "a memory by class": {
        "replay": {"rows": 40, "policy": "balanced"},
        "task": "binary",
        "loss": "bce",
        "target": "label",
    },
    "parts": {"parts": 2, "model": {"factory": "mlp", "arguments": {"hidden": [8], "dropout": 0.5}}},
    "no average": {"ema_decay": None, "optimizer": {"name": "sgd", "arguments": {"momentum": 0.9}}},
}


def groups_of(spec: Spec) -> list[Any]:
    label = pa.array([float(i % 3 == 0) for i in range(TABLE.num_rows)])
    return cut(TABLE.append_column("label", label), 60, 60, 40)


def goes_on_everywhere(
    spec: Spec, groups: Any, *, split: Split | None = None, every: int = 1, memory: bool = True, **steps: Any
) -> None:
    """A pass from every place that was stored ends with the bits of the whole one, and says the same of itself."""
    learner = begin(spec, groups if isinstance(groups, list) else GROUPS)
    keeper = Everything(learner, every)

    def passed(learner: Learner, **more: Any) -> PassResult:
        return train_pass(
            Steps(learner, **steps), groups, key=KEY, split=split, remember=memory and spec.replay is not None, **more
        )

    result = passed(learner, keeper=keeper)
    if not steps:
        plain = begin(spec, groups if isinstance(groups, list) else GROUPS)
        assert passed(plain) == result
        assert plain.dump() == learner.dump(), "to be stored changes no bit"
    assert keeper.stored
    for weights, state, midway in keeper.stored:
        resumed = Learner.load(spec, weights, state)
        torch.rand(7)  # what else the process does is no matter
        assert passed(resumed, start=Midway.model_validate_json(midway)) == result
        assert resumed.dump() == learner.dump()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_from_any_block_on_the_bits_are_the_same(settings: dict[str, Any]) -> None:
    spec = wide(**settings)
    goes_on_everywhere(spec, groups_of(spec))


def test_a_split_and_rows_without_a_label_are_the_same_from_there_on() -> None:
    holed = pa.array([None if i % 5 == 0 else float(i) for i in range(TABLE.num_rows)], pa.float32())
    groups = cut(TABLE.set_column(TABLE.schema.get_field_index("y"), "y", holed), 60, 60, 40)
    goes_on_everywhere(wide(), groups, split=Split(0.3, side="train"))


def test_rows_that_are_kept_in_memory_are_gone_on_with() -> None:
    spec = wide()
    features = begin(spec, GROUPS).features
    goes_on_everywhere(spec, Kept(GROUPS, features, 2**20, None))


@pytest.mark.parametrize("memory", [False, True])
def test_blocks_of_several_steps_are_the_same_from_there_on(memory: bool) -> None:
    spec = wide(compile="on", batch_size=8, **({"replay": {"rows": 40}} if memory else {}))
    goes_on_everywhere(spec, GROUPS, per_call=4, backend="eager", every=4)


def test_a_pass_that_has_diverged_is_stored_no_more() -> None:
    spec = plain_spec(learning_rate=1e30, batch_size=16)
    learner = begin(spec, GROUPS)
    keeper = Everything(learner)
    with pytest.raises(NonFiniteLoss):
        train_pass(Steps(learner), GROUPS, key=KEY, keeper=keeper)
    assert len(keeper.stored) < 5


def test_rows_that_were_cut_otherwise_are_not_gone_on_with() -> None:
    learner = begin(wide(), GROUPS)
    keeper = Everything(learner)
    train_pass(Steps(learner), GROUPS, key=KEY, keeper=keeper)
    midway = Midway.model_validate_json(keeper.stored[0][2])
    with pytest.raises(ColumnError, match="no batch of the pass ends where a checkpoint stands"):
        train_pass(Steps(begin(wide(batch_size=7), GROUPS)), GROUPS, key=KEY, start=midway)

"""A new model is tried before it is trained, and once more before it is first committed.

What a whole run would show at its end, or after a restart, a few rows show at once: metrics that give no number, a model that
cannot be read back, state that is kept where no checkpoint finds it. Only the user's own code is tried.
"""

import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tidemill.tasks.training.errors import FactoryError, NonFiniteLoss, TrainingError
from tidemill.tasks.training.groups import RowGroup, TableGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import score, train_shard
from tidemill.tasks.training.steps import Steps

logger = logging.getLogger("tidemill.batch")

SCORED_ROWS: Final = 64
"""Metrics are tried on this many rows, which is enough for those that need several."""


def try_out(learner: Learner, groups: Sequence[RowGroup]) -> None:
    """Let a copy of a new learner be scored and take a step on the first rows of the dataset. The learner is not changed.

    Raises:
        FactoryError: a metric of the user's fails, or gives no single number.
        StateMismatch: what was stored of the learner cannot be read back.
        ModelError, OutputShapeError: the model or the loss fails.
    """
    if not learner.spec.import_paths:
        return
    copy = Learner.load(learner.spec, *learner.dump(), learner.device.type)
    rows = _first_rows(learner, groups, max(SCORED_ROWS, learner.spec.batch_size))
    if not rows:
        return
    for name, reason in score(copy, rows).left_out.items():
        raise FactoryError(f"metrics {name!r} fails on the first rows of the dataset: {reason}")
    try:
        _take_step(copy, rows)
        Learner.load(copy.spec, *copy.dump(), copy.device.type)  # with the state that the step has made
    except NonFiniteLoss:
        return  # training says how to go on


def warn_of_hidden_state(learner: Learner, weights: bytes, state: bytes, groups: Sequence[RowGroup]) -> None:
    """Let the learner and what is stored of it each take the same step, and warn if they differ. The learner is used up.

    Not on accelerators, whose kernels need not give the same bits twice.
    """
    if not learner.spec.import_paths or learner.device.type != "cpu":
        return
    try:
        read_back = Learner.load(learner.spec, weights, state, "cpu")
        rows = _first_rows(learner, groups, learner.spec.batch_size)
        for each in (learner, read_back):
            _take_step(each, rows)
    except TrainingError as error:
        logger.warning("whether a restart changes the bits was not found out: %s", error)
        return
    stored = read_back.model.state_dict()
    if differing := [name for name, value in learner.model.state_dict().items() if not _equal(value, stored[name])]:
        logger.warning(
            "after a restart this model goes on with other bits: one step after it was stored and read back, %r%s is not what "
            "it is without that. It keeps state where no checkpoint finds it, such as a counter in Python, a buffer that is not "
            "persistent, or random numbers of numpy, of Python or of a generator of its own. Keep state in persistent buffers, "
            "and draw from torch's global generator.",
            differing[0],
            f" (and {len(differing) - 1} more)" if len(differing) > 1 else "",
        )


def _first_rows(learner: Learner, groups: Sequence[RowGroup], count: int) -> list[TableGroup]:
    """The first labelled rows of the dataset, at most `count`, of one row group; none if the first row groups have no labels."""
    names = learner.features.names(labelled=True)
    for group in groups[:4]:
        labelled = group.read(names)
        for target in learner.features.targets:
            labelled = labelled.filter(labelled.column(target).is_valid())
        if labelled.num_rows:
            return [TableGroup(group.name, labelled.slice(0, count))]
    return []


def _take_step(learner: Learner, rows: Sequence[TableGroup]) -> None:
    few = [TableGroup(group.name, group.table.slice(0, learner.spec.batch_size)) for group in rows]
    train_shard(Steps(learner), few, passes=1)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(torch.all((one == other) | (one.isnan() & other.isnan())))

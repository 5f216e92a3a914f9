"""A model is tried on a few rows: before it is trained, before it is first committed, and where a shard may be at fault.

What a whole run would show at its end, or after a restart, a few rows show at once: metrics that give no number, a model that
cannot be read back, state that is kept where no checkpoint finds it. Before training, only the user's own code is tried.

Two kinds of rows are at hand before the first epoch. Made-up rows are those of the schema: any run has them, `follow` too, and
they hold every class, where a sorted dataset may begin with 64 rows of one class. The first rows of the dataset are real: they
have what a user's code may rightly take for granted, as that a price is positive. So what fails on made-up rows alone, or on
the first rows alone, may be sound; what fails on both is refused, and so is what gives something else than a number on either.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from tidemill.tasks.training.calling import numbered, random_numbers_kept
from tidemill.tasks.training.errors import (
    ColumnError,
    FactoryError,
    ModelError,
    NonFiniteLoss,
    StateMismatch,
    TrainingError,
)
from tidemill.tasks.training.groups import RowGroup, TableGroup, generator
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.loop import score, train_shard
from tidemill.tasks.training.made_up import made_up
from tidemill.tasks.training.metrics import number_of
from tidemill.tasks.training.replay import ReplayBuffer
from tidemill.tasks.training.steps import Steps

logger = logging.getLogger("tidemill.batch")

SCORED_ROWS: Final = 64
"""Metrics are tried on this many rows, which is enough for those that need several."""
COPIED_BYTES: Final = 256 * 2**20
"""Bytes of a stored learner above which there is never a second one in memory."""


# ---- before the first epoch, and before the first shard --------------------------------------------------------------
def try_out(learner: Learner, groups: Sequence[RowGroup]) -> bool:
    """Let a copy of a new learner be scored and take a step on made-up rows and on the first rows of the dataset.

    Returns:
        True if the learner itself is used up: of one above `COPIED_BYTES` no copy is made, and whether it can be read back is
        not tried.

    Raises:
        FactoryError: a metric of the user's gives no single number, or fails on both.
        StateMismatch: what was stored of the learner cannot be read back.
        ModelError, OutputShapeError: the model or the loss fails on the first rows; on made-up ones, where no row group at the
            dataset's beginning has labels.
    """
    if not learner.spec.import_paths:
        return False
    copies = learner.stored_bytes <= COPIED_BYTES
    copy = _read_back(learner) if copies else learner
    doubtful = try_metrics(learner)
    count = max(SCORED_ROWS, learner.spec.batch_size)
    rows = _first_rows(learner, groups, count) or [made_up(learner.features, count)]
    for name, reason in score(copy, rows).left_out.items():
        _refuse_unless_a_number(copy, name, "the first rows of the dataset")
        if name in doubtful:
            raise FactoryError(
                f"metrics {name!r} fails on made-up rows ({doubtful[name]}) and on the first rows of the dataset: {reason}"
            )
    try:
        _take_step(copy, rows)
        if copies:
            _read_back(copy)  # with the state that the step has made
    except NonFiniteLoss:
        pass  # training says how to go on
    return not copies


def tried(make: Callable[[], Learner], groups: Sequence[RowGroup]) -> Learner:
    """A new learner that was tried out: the one that was tried, or another where that used it up. Raises as `try_out`."""
    learner = make()
    if not try_out(learner, groups):
        return learner
    del learner  # before the next one takes memory
    return make()


def try_metrics(learner: Learner) -> Mapping[str, str]:
    """Let a copy of its network be scored on made-up rows: the same rule in `train` and in `follow`.

    Returns:
        Name -> reason of the metrics that fail on these rows, whose values may be at fault: real rows decide. `train` has some.
        `follow` leaves such a metric out of each shard on which it fails, with a warning, because a metric only tells of the
        model, and must not stop it.

    Raises:
        FactoryError: a metric of the user's cannot be made, or gives something else than one number, whatever the rows are.
    """
    if not learner.spec.metrics:
        return {}
    copy, rows = learner.network(), made_up(learner.features, SCORED_ROWS)
    try:
        left_out = score(copy, [rows]).left_out
    except (ColumnError, ModelError) as error:
        return dict.fromkeys(copy.metrics, f"the model fails on them: {error}")
    for name in left_out:
        _refuse_unless_a_number(copy, name, "made-up rows")
    return left_out


def _refuse_unless_a_number(learner: Learner | Network, name: str, rows: str) -> None:
    """Raise FactoryError if this metric, which was left out, gives something else than one number."""
    try:
        number_of(learner.metrics[name])
    except FactoryError as error:
        raise FactoryError(f"metrics {name!r} fails on {rows}: {error}") from error
    except Exception:  # noqa: BLE001  # of whatever class: it fails, which was found out before
        return


# ---- before the first commit -----------------------------------------------------------------------------------------
def warn_of_hidden_state(learner: Learner, groups: Sequence[RowGroup]) -> bool:
    """Let the learner and what would be stored of it each take the same step, and warn if they differ.

    The learner takes a step before, so that state which it keeps elsewhere has begun to move, even if it was read from a
    checkpoint a moment ago. Not on accelerators, whose kernels need not give the same bits twice, and not above `COPIED_BYTES`.

    Returns:
        True if the learner is used up.
    """
    if not learner.spec.import_paths or learner.device.type != "cpu":
        return False
    if learner.stored_bytes > COPIED_BYTES:
        logger.info("whether a restart changes the bits was not found out: the learner is too large for a second one")
        return False
    try:
        size = learner.spec.batch_size
        rows = _first_rows(learner, groups, size) or [made_up(learner.features, size)]
        _take_step(learner, rows)
        read_back = _copy(learner)
        for each in (learner, read_back):
            _take_step(each, rows)
    except TrainingError as error:
        logger.warning("whether a restart changes the bits was not found out: %s", error)
        return True
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
    return True


# ---- where a shard may be at fault -----------------------------------------------------------------------------------
def rows_at_hand(learner: Learner) -> str:
    """On which rows `try_step` takes its step, in words."""
    return "remembered rows" if remembers(learner) else "made-up rows"


def remembers(learner: Learner) -> bool:
    """Whether `try_step` takes its step on rows that the learner was trained on before."""
    return _memory(learner) is not None


def try_step(steps: Steps) -> None:
    """Let a learner be scored and take a step where no shard can be trained on. It is used up. No other rank takes part.

    On rows that it remembers, which are real, if the spec has a replay memory; else on made-up ones.

    Raises:
        TrainingError: it cannot. Any other error of memory, an accelerator or the user's own code, too.
    """
    learner, steps = steps.learner, steps.alone()
    if (memory := _memory(learner)) is None:
        rows = [made_up(learner.features, learner.spec.batch_size)]
        score(learner, rows)
        train_shard(steps, rows, passes=1)
        return
    old = next(memory.draws(min(memory.rows, learner.spec.batch_size), generator(learner.spec.seed, "trial")))
    with random_numbers_kept(numbered(learner.device)):  # a caller's random numbers are left alone
        steps.loss_after(old)
        with steps.training():
            before = steps.take(old)
        if not (torch.isfinite(before) and torch.isfinite(steps.loss_after(old)) and steps.is_finite()):
            raise NonFiniteLoss("a step on remembered rows made the loss or a weight non-finite")


def _memory(learner: Learner) -> ReplayBuffer | None:
    return learner.memory if learner.memory is not None and learner.memory.rows else None


def _read_back(learner: Learner) -> Learner:
    """A copy by way of what would be stored.

    Raises:
        StateMismatch: it cannot be read back, as no version could be.
    """
    try:
        return _copy(learner)
    except StateMismatch as error:
        raise StateMismatch(
            f"model.factory {learner.spec.model.factory!r}: what is stored of the model cannot be read back: "
            f"{' '.join(str(error).split())}. All parameters and buffers must be there, and have their shapes, when the factory "
            "returns, and state_dict() must hold them under the names by which load_state_dict() takes them"
        ) from error


# ---- rows and steps --------------------------------------------------------------------------------------------------
def _copy(learner: Learner) -> Learner:
    return Learner.load(learner.spec, *learner.dump(), learner.device.type)


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

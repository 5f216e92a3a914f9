"""The training loop, scores and predictions.

Shape legend: N rows of a row group, B rows of a batch, F numbers and C categories of one row, O outputs.
"""

import logging
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Final

import torch
from torch import Tensor

from tidemill.progress import NOBODY, Activity
from tidemill.tasks.training.batches import Stream
from tidemill.tasks.training.calling import numbered, random_numbers_kept, seed_random_numbers, told, usual_types
from tidemill.tasks.training.cutting import Batch, Blocks, joined
from tidemill.tasks.training.errors import ColumnError, NonFiniteLoss
from tidemill.tasks.training.features import Encoded
from tidemill.tasks.training.groups import RowGroup, Subset, generator, prefetch, stable_seed
from tidemill.tasks.training.kept import Kept, KeptStream
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.losses import is_column
from tidemill.tasks.training.midway import Keeper, Midway
from tidemill.tasks.training.once import labelled_rows
from tidemill.tasks.training.order import Place
from tidemill.tasks.training.replay import ReplayBuffer, mixed
from tidemill.tasks.training.scoring import Scoring, unscaled
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps, forward_of, moved

EVALUATION_ROWS: Final = 8192  # rows of a forward pass without gradients

logger = logging.getLogger("tidemill.training")


@dataclass(frozen=True)
class PassResult:
    """What one pass trained on."""

    rows: int
    steps: int
    loss: float  # mean over the rows, each with the weights at its step; NaN if there were no rows
    unlabelled: int  # rows left out because their target is null


@dataclass(frozen=True)
class Score:
    """How the model does on rows that it was not changed by."""

    rows: int
    loss: float  # the training loss, mean over the rows; NaN if there were no rows
    metrics: dict[str, float] = field(default_factory=dict)  # in units of the target
    left_out: dict[str, str] = field(default_factory=dict)
    """Metrics that could not be computed, as R2 of one row, with the reason."""

    @property
    def finite(self) -> dict[str, float]:
        """Loss and metrics that are numbers: JSON, and so a manifest, knows no others."""
        return {name: v for name, v in {"loss": self.loss, **self.metrics}.items() if math.isfinite(v)}


def train_pass(
    steps: Steps,
    groups: Sequence[RowGroup] | Kept,
    *,
    key: tuple[str | int, ...],
    split: Subset | None = None,
    replay: bool = False,
    remember: bool = False,
    labelled: int | None = None,
    activity: Activity = NOBODY,
    start: Midway | None = None,
    keeper: Keeper | None = None,
) -> PassResult:
    """Trains on every labelled row of the groups (of `split`), or on kept rows, once; adds to the learner's rows and steps.

    The rows are cut into as few batches of at most `batch_size` rows as hold them all, which differ by at most one row.
    `labelled` says how many rows there are; None: they are counted first, for which the targets are read.

    All random numbers derive from the spec's seed and `key` (the epoch or the shard), none from what ran before, so the
    same pass from the same learner always gives the same bits. With `shuffle` off and nothing standardised, the weights
    equal those of a plain PyTorch loop over the rows.

    If the learner has a replay buffer, `replay` adds old rows from it to each step, and `remember` shows it the rows of the
    pass. `activity` is told how far the pass is.

    `keeper` may store where the pass stands. From there, `start`, another process goes on with the learner of the time, by the
    same arguments; not with `replay`.

    Raises:
        ColumnError, ModelError, NonFiniteLoss: the learner is then half trained and must be loaded again.
    """
    learner, steps_before = steps.learner, 0 if start is None else start.steps
    began = learner.counters.steps - steps_before
    spec, memory = learner.spec, learner.memory if replay or remember else None
    if labelled is None:
        labelled = groups.rows if isinstance(groups, Kept) else labelled_rows(groups, learner.features, split)
    plan = steps.plan(labelled)
    stream = _stream(
        learner,
        groups,
        batch_size=spec.batch_size,
        shuffle_seed=(spec.seed, *key) if spec.shuffle else None,
        split=split,
        plan=[Blocks(size, 1, held * blocks) for size, held, blocks in plan] if memory else plan,
        start=None if start is None else start.place,
    )
    total, rows = zero(learner.device), 0
    after: Tensor | None = None
    shown = None if memory is None else _Shown(memory, spec, key, replay=replay, remember=remember)
    assert shown is None or not replay or (start is None and keeper is None), "old rows are drawn from the beginning"

    def mean_so_far() -> float:
        return total.item() / rows

    # Closed whatever happens: the traceback of an error would keep its threads alive.
    with (
        closing(iter(stream)) as batches,
        _seeded(learner.device, spec.seed, "pass", *key),
        steps.training(*key, step=steps_before),
    ):
        if start is not None:
            rows = start.place.rows
            total.fill_(start.loss)
            start.restore(learner.device, None if shown is None else shown.chance)
            activity.advance(rows)
        blocks: Iterator[tuple[Batch, int]]
        if shown is None:
            held = chain.from_iterable(repeat(part.held, part.blocks) for part in plan)
            blocks = zip(batches, chain(_after(held, steps_before), repeat(1)))  # noqa: B905  # the second has no end
        else:
            shown.rows = rows
            blocks = _gathered(shown.batches(batches), steps.per_call)
        block: Batch | None = None
        for block, count in blocks:
            of_block = block.y_B.shape[0]  # `len` of a tensor takes 1% of a small step
            total.add_(steps.take(block, count), alpha=of_block)
            rows += of_block
            activity.advance(of_block, loss=mean_so_far)
            if keeper is not None and keeper.due(rows) and rows < labelled and (shown is None or shown.rows == rows):
                _keep(keeper, learner, stream.place(rows), total, began, shown)
        if block is not None:  # the last step is followed by no loss that would show what it has done
            after = steps.loss_after(block, count)
    mean = total.item() / rows if rows else float("nan")
    if after is not None and not (torch.isfinite(total) and torch.isfinite(after) and steps.is_finite()):
        raise NonFiniteLoss(
            f"training on {_named(groups)} made the loss {mean}, then {after.item()}, or a weight, a buffer or the optimizer's "
            "state non-finite: lower learning_rate, standardise the columns, or look for extreme values there"
        )
    if stream.rows != labelled:
        raise ColumnError(
            f"{_named(groups)} has {stream.rows} rows with all targets, {labelled} were counted: were the files rewritten?"
        )
    learner.counters.rows += stream.rows
    if stream.unlabelled:
        logger.debug("left out %d rows of %s without a target", stream.unlabelled, _named(groups))
    return PassResult(stream.rows, learner.counters.steps - began, mean, stream.unlabelled)


def _stream(
    learner: Learner | Network,
    groups: Sequence[RowGroup] | Kept,
    *,
    batch_size: int,
    split: Subset | None,
    shuffle_seed: tuple[str | int, ...] | None = None,
    plan: Sequence[Blocks] | None = None,
    start: Place | None = None,
) -> Stream | KeptStream:
    """One pass over row groups, or over kept rows: a split has been applied to these already."""
    if isinstance(groups, Kept):
        return KeptStream(groups, batch_size=batch_size, shuffle_seed=shuffle_seed, plan=plan, start=start)
    return Stream(
        groups,
        learner.features,
        batch_size=batch_size,
        window_bytes=learner.spec.window_bytes,
        shuffle_seed=shuffle_seed,
        split=split,
        plan=plan,
        start=start,
    )


def _gathered(batches: Iterable[Batch], per_call: int) -> Iterator[tuple[Batch, int]]:
    """(block, how many batches it holds): neighbours of one size as blocks of `per_call`, the others one by one."""
    some: list[Batch] = []
    for batch in batches:
        if some and len(batch.y_B) != len(some[0].y_B):
            yield from zip(some, repeat(1))  # the second has no end
            some = []
        some.append(batch)
        if len(some) == per_call:
            yield joined(some), per_call
            some = []
    yield from zip(some, repeat(1))


class _Shown:
    """The replay memory in a pass: it is shown the batches (`remember`), and old rows are added to them (`replay`)."""

    def __init__(
        self, memory: ReplayBuffer, spec: Spec, key: tuple[str | int, ...], *, replay: bool, remember: bool
    ) -> None:
        self._memory, self._spec, self._key, self._replay, self._remember = memory, spec, key, replay, remember
        self.chance = generator(spec.seed, "remember", *key)
        """Decides which rows it keeps."""
        self.rows = 0
        """That it was shown, or that went past it."""

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, each with its old rows."""
        memory, spec = self._memory, self._spec
        count = round(memory.ratio * spec.batch_size)
        draws: Iterator[Batch] = iter(())
        if self._replay and count:
            draws = memory.draws(count, generator(spec.seed, "replay", *self._key))
        for batch in batches:
            old = next(draws, None)
            if self._remember:
                memory.offer(batch, self.chance)
            self.rows += len(batch.y_B)
            yield batch if old is None else mixed(batch, old, round(memory.ratio * len(batch.y_B)))
        memory.admit(self.chance)


def _after(held: Iterator[int], steps: int) -> Iterator[int]:
    """How many batches each block of a plan holds, after those that make so many steps."""
    while steps > 0:
        steps -= next(held)
    return held


def _keep(keeper: Keeper, learner: Learner, place: Place, total: Tensor, began: int, shown: _Shown | None) -> None:
    """Lets the keeper store where a pass stands. One that has diverged is stored no more: it is going to end with an error."""
    loss, steps = total.item(), learner.counters.steps - began
    if math.isfinite(loss):
        keeper.keep(Midway.of(place, loss, steps, learner.device, None if shown is None else shown.chance))


def train_shard(steps: Steps, groups: Sequence[RowGroup], passes: int, *, labelled: int | None = None) -> PassResult:
    """Trains on the next shard of the stream `passes` times, and counts it. Returns what the last pass trained on.

    `labelled`: as in `train_pass`; whoever has scored the shard knows it.

    The shard's place in the stream seeds its random numbers. With a memory, old rows are mixed into every pass, and the
    shard's rows are shown to it once. Running statistics take the shard in before the first pass. Raises what `train_pass`
    raises.
    """
    learner = steps.learner
    ordinal = learner.counters.shards
    if learner.spec.running_statistics:
        learner.update_statistics(groups)
    if learner.spec.limit_predictions:
        learner.widen_limits(groups)
    for number in range(passes):
        key, first = ("shard", ordinal, number), number == 0
        result = train_pass(steps, groups, key=key, replay=True, remember=first, labelled=labelled)
    learner.counters.shards += 1
    return result


@torch.no_grad()  # no inference mode: what a model caches meanwhile is used in training too
def score(learner: Learner | Network, groups: Sequence[RowGroup] | Kept, split: Subset | None = None) -> Score:
    """Loss and metrics of the served network on every labelled row of the groups (of `split`), or on kept rows.

    The learner is not changed.

    Metrics: mae and rmse for regression, in units of the target; accuracy and auroc (from binned scores; left out when
    only one class occurs) for binary; accuracy for multiclass; and the spec's own. Class and sample weights count in the
    loss, not in the metrics. A metric that cannot be computed, as R2 of one row, is left out with a warning. A
    non-finite loss is returned, not raised. Raises ColumnError and ModelError.
    """
    device = learner.device
    stream = _stream(learner, groups, batch_size=EVALUATION_ROWS, split=split)
    scoring = Scoring(learner, zero(device))
    learner.served.eval()
    with closing(iter(stream)) as batches:
        for batch in batches:
            x_BF, ids_BC, y_B, w_B = moved(batch, device)
            output = _outputs(learner, x_BF, ids_BC)
            scoring.add(output, y_B, w_B, _in_target_units(learner, output).cpu(), batch.y_B)
    if not stream.rows:
        return Score(0, float("nan"))
    loss, metrics = scoring.result(_named(groups))
    return Score(stream.rows, loss, metrics, scoring.left_out)


def predict(learner: Learner | Network, groups: Sequence[RowGroup]) -> Generator[Tensor]:
    """One tensor for each row group, rows in file order: nothing is left out, and no target is needed.

    Regression: float32 [N] in units of the target. Binary: probability of class 1, float32 [N]. Multiclass:
    probabilities, float32 [N, O].

    Row groups are read as for training, and encoded in slices of at most `window_bytes`, one slice ahead of its use. To be
    closed as `prefetch` is. Raises ColumnError and ModelError.
    """
    features = learner.features
    piece = max(
        1, learner.spec.window_bytes // features.row_bytes
    )  # encoded sequences may be far larger than the table

    def encoded() -> Generator[tuple[Encoded, bool]]:
        with closing(features.tables(groups, labelled=False)) as tables:
            for group, table in zip(groups, tables, strict=True):
                for at in range(0, max(table.num_rows, 1), piece):
                    yield features.encode(table.slice(at, piece), group.name), at + piece >= table.num_rows

    learner.served.eval()
    done: list[Tensor] = []
    for rows, last in prefetch(encoded()):
        done.append(predicted(learner, rows))
        if last:
            yield torch.cat(done)
            done = []


@torch.no_grad()
def predicted(learner: Learner | Network, rows: Encoded) -> Tensor:
    """The outputs for encoded rows, as `predict` gives them. The network is in evaluation mode already. Raises ModelError."""
    device = learner.device

    def outputs(x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
        return _outputs(learner, x_BF.to(device), None if ids_BC is None else ids_BC.to(device))

    if len(rows.x_NF) <= EVALUATION_ROWS:  # of one row, cutting and joining would take as long as a layer
        output = outputs(*rows)
    else:
        xs = torch.split(rows.x_NF, EVALUATION_ROWS)
        ids = repeat(None) if rows.ids_NC is None else torch.split(rows.ids_NC, EVALUATION_ROWS)
        output = torch.cat([outputs(x_BF, ids_BC) for x_BF, ids_BC in zip(xs, ids, strict=False)])
    return _in_target_units(learner, output).float().cpu()


def zero(device: torch.device) -> Tensor:
    """Where losses add up: on the device, so that no step waits for a number."""
    return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _outputs(learner: Learner | Network, x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
    """The served network's outputs, [B] for one output, else [B, O]."""
    with told("the model, in evaluation mode,", x_BF, ids_BC), usual_types():
        output = forward_of(learner.spec, learner.device)(learner.served, x_BF, ids_BC)
    output = output.squeeze(1) if is_column(learner.spec, output, len(x_BF)) else output
    return _limited(learner, output) if learner.features.limit_predictions else output


def _limited(learner: Learner | Network, output: Tensor) -> Tensor:
    """Outputs for regression, kept between the lowest and the highest target that was trained on."""
    seen = learner.features.statistics
    assert seen is not None, "limits are learned"
    assert seen.target_range is not None, "limits are learned"
    range_2T = seen.target_range
    if learner.features.standardize_target:
        range_2T = (range_2T - seen.target_mean) / seen.target_std
    low_T, high_T = range_2T.to(output.device, output.dtype)
    return output.clamp(low_T, high_T)


def _in_target_units(learner: Learner | Network, output: Tensor) -> Tensor:
    """Outputs as values (regression, float64) or probabilities (float32)."""
    if learner.spec.task == "regression":
        values, seen = unscaled(learner, output), learner.features.statistics
        if seen is None or seen.target_range is None:
            return values
        return values.clamp(*seen.target_range)  # scaled and back, a limit is no longer exactly what it was
    return output.sigmoid() if learner.spec.task == "binary" else output.softmax(1)


@contextmanager
def _seeded(device: torch.device, *key: str | int) -> Iterator[None]:
    """Seeds torch's global generators (dropout uses them) for a while, and puts them back as they were."""
    with random_numbers_kept(numbered(device)):
        seed_random_numbers(device, stable_seed(*key))
        yield


def _named(groups: Sequence[RowGroup] | Kept) -> str:
    if isinstance(groups, Kept):
        return groups.name
    more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
    return f"{groups[0].name}{more}"

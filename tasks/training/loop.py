"""The training loop, scores and predictions.

Shape legend: N rows of a row group, B rows of a batch, F numbers and C categories of one row, O outputs.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Final

import torch
from torch import Tensor

from tidemill.tasks.training.batches import Batch, RowGroup, Split, Stream, ahead, in_batches, joined
from tidemill.tasks.training.errors import NonFiniteLoss
from tidemill.tasks.training.features import Encoded
from tidemill.tasks.training.groups import generator, stable_seed
from tidemill.tasks.training.learner import Frozen, Learner
from tidemill.tasks.training.losses import LossFunction, is_column, loss_of
from tidemill.tasks.training.optimizers import Update, backward
from tidemill.tasks.training.replay import Memory, mixed
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import CompiledSteps, Forward, tracing, wanted

EVALUATION_ROWS: Final = 8192  # rows of a forward pass without gradients

log = logging.getLogger("tidemill.training")


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

    @property
    def finite(self) -> dict[str, float]:
        """Loss and metrics that are numbers: JSON, and so a manifest, knows no others."""
        return {name: v for name, v in {"loss": self.loss, **self.metrics}.items() if math.isfinite(v)}


def train_pass(
    learner: Learner,
    groups: Sequence[RowGroup],
    *,
    key: tuple[str | int, ...],
    split: Split | None = None,
    replay: bool = False,
    remember: bool = False,
    repeats: int = 1,
) -> PassResult:
    """Trains on every labelled row of the groups (of `split`) once, and adds to the learner's rows and steps.

    All random numbers derive from the spec's seed and `key` (the epoch or the shard), none from what ran before, so the
    same pass from the same learner always gives the same bits. With `shuffle` off and nothing standardised, the weights
    equal those of a plain PyTorch loop over the rows.

    The steps are compiled if the spec says so; with `compile: auto` `repeats`, how many passes of this length the run
    makes, decides with the number of rows.

    If the learner has a memory, `replay` adds old rows from it to each step, and `remember` shows it the rows of the pass.

    Raises ColumnError, OutputShapeError, NonFiniteLoss; the learner is then half trained and must be loaded again.
    """
    spec, model, optimizer, device = learner.spec, learner.model, learner.optimizer, learner.device
    compiled = _compiled(learner, groups, repeats)
    at_once = 1 if compiled is None else compiled.steps  # steps of a call
    replays = learner.memory is not None and (replay or remember)
    stream = Stream(
        groups,
        learner.features,
        batch_size=spec.batch_size if replays else spec.batch_size * at_once,
        window_bytes=spec.window_bytes,
        shuffle_seed=(spec.seed, *key) if spec.shuffle else None,
        split=split,
    )
    forward, loss_function = _forward(learner), loss_of(spec, learner.features)
    parameters = list(model.parameters())
    total = _zero(device)
    rows = steps = 0
    trainable = [p for p in parameters if p.requires_grad]
    update: Update | None = None  # after the first step, which makes the optimizer's state
    column: bool | None = None  # whether the output is [B, 1] where the targets are [B]; None: not seen yet

    def step(batch: Batch) -> Tensor:
        """The loss of one eager step."""
        nonlocal column, update
        x_BF, ids_BC, y_B, w_B = batch
        output = forward(model, x_BF, ids_BC)
        if column is None:
            column = is_column(spec, output, len(y_B))
        loss = loss_function(output, y_B.unsqueeze(1) if column else y_B, w_B)
        for parameter in parameters:  # optimizer.zero_grad() without its bookkeeping, 8% of a small step
            parameter.grad = None
        backward(loss)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm)
        if update is not None:
            update.step()
        else:
            optimizer.step()
            # Without a gradient, torch leaves some out, today's or others tomorrow.
            if all(p.grad is not None for p in trainable) and Update.serves(optimizer):
                update = Update(optimizer, spec.optimizer.name, trainable)
        if learner.schedule is not None:
            learner.schedule.step()
        if learner.averaged is not None:
            learner.averaged.update_parameters(model)
        return loss.detach()

    full = spec.batch_size + _old_rows(learner, replay)
    model.train()
    # Closed whatever happens: the traceback of an error would keep its threads alive.
    with closing(iter(stream)) as new, _seeded(device, spec.seed, "pass", *key), tracing(compiled):
        batches: Iterator[Batch] = new  # without a memory, those of a call as one block
        if learner.memory is not None and replays:
            batches = _with_memory(batches, learner.memory, spec, key, replay=replay, remember=remember)
        if device.type != "cpu":
            batches = (_moved(batch, device) for batch in batches)
        batch: Batch | None = None
        while some := list(islice(batches, at_once if replays else 1)):
            batch = some[-1]
            size = sum(len(batch.y_B) for batch in some)
            done = None
            # Which steps are compiled depends on the learner and the pass alone, so that a resumed run has the same bits.
            if compiled is not None and learner.counters.steps + steps and size == full * at_once:
                done = compiled.run(joined(some))
            if done is not None:
                total.add_(done)
                rows, steps = rows + size, steps + at_once
                continue
            for part in _apart(some, full):
                size = len(part.y_B)
                total.add_(step(part), alpha=size)  # on the device: no step waits for a number
                rows, steps = rows + size, steps + 1
            del part  # a view: where later calls are compiled, it would keep this window's memory
        # The last step is followed by no loss that would show what it has done.
        after = total if batch is None else _loss_after(learner, loss_function, _apart([batch], full))
    mean = total.item() / rows if rows else float("nan")
    if rows and not (torch.isfinite(total) and torch.isfinite(after) and _is_finite(learner)):
        raise NonFiniteLoss(
            f"training on {_named(groups)} made the loss {mean}, then {after.item()}, or a weight, a buffer or the optimizer's "
            "state non-finite: lower learning_rate, standardise the columns, or look for extreme values there"
        )
    learner.counters.rows += stream.rows
    learner.counters.steps += steps
    if stream.unlabelled:
        log.debug("left out %d rows of %s without a target", stream.unlabelled, _named(groups))
    return PassResult(stream.rows, steps, mean, stream.unlabelled)


def _compiled(learner: Learner, groups: Sequence[RowGroup], repeats: int) -> CompiledSteps | None:
    """The learner's compiled steps, made when first asked for; None if this pass is not to be compiled."""
    rows = sum(group.num_rows for group in groups)
    if not wanted(learner.spec.compile, rows * repeats // learner.spec.batch_size):
        return None
    if learner.compiled is None:
        learner.compiled = CompiledSteps(learner, _forward(learner), loss_of(learner.spec, learner.features))
    return learner.compiled


@torch.no_grad()
def _loss_after(learner: Learner, loss_function: LossFunction, batches: Iterable[Batch]) -> Tensor:
    """The loss of the last of these batches with the weights as they are now."""
    *_, (x_BF, ids_BC, y_B, w_B) = batches
    learner.model.eval()  # so that nothing changes: neither buffers nor the random state
    output = _forward(learner)(learner.model, x_BF, ids_BC)
    return loss_function(output, y_B.unsqueeze(1) if is_column(learner.spec, output, len(y_B)) else y_B, w_B)


def _is_finite(learner: Learner) -> bool:
    """Whether all that a version would hold is: weights, buffers, the optimizer's state."""
    states = (value for state in learner.optimizer.state.values() for value in state.values())
    kept = chain(learner.model.parameters(), learner.model.buffers(), (v for v in states if isinstance(v, Tensor)))
    return all(bool(torch.isfinite(tensor).all()) for tensor in kept)


def _apart(blocks: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The blocks cut to batches of `size` rows."""
    for block in blocks:
        if len(block.y_B) <= size:
            yield block
        else:
            yield from in_batches(block, size)


def _old_rows(learner: Learner, replay: bool) -> int:
    """How many rows of the memory a full batch is given."""
    return round(learner.memory.ratio * learner.spec.batch_size) if replay and learner.memory is not None else 0


def _with_memory(
    batches: Iterator[Batch], memory: Memory, spec: Spec, key: tuple[str | int, ...], *, replay: bool, remember: bool
) -> Iterator[Batch]:
    """The batches, each with old rows added (`replay`), while the memory learns of the new ones (`remember`)."""
    chance = generator(spec.seed, "remember", *key)
    count = round(memory.ratio * spec.batch_size)
    draws = memory.draws(count, generator(spec.seed, "replay", *key)) if replay and count else iter(())
    for batch in batches:
        old = next(draws, None)
        if remember:
            memory.offer(batch, chance)
        yield batch if old is None else mixed(batch, old, round(memory.ratio * len(batch.y_B)))
    memory.settle(chance)


def train_shard(learner: Learner, groups: Sequence[RowGroup], passes: int) -> PassResult:
    """Trains on the next shard of the stream `passes` times, and counts it. Returns what the last pass trained on.

    The shard's place in the stream seeds its random numbers. With a memory, old rows are mixed into every pass, and the
    shard's rows are shown to it once. Running statistics take the shard in before the first pass. Raises what `train_pass`
    raises.
    """
    ordinal = learner.counters.shards
    if learner.spec.running_statistics:
        learner.follow(groups)
    for number in range(passes):
        result = train_pass(learner, groups, key=("shard", ordinal, number), replay=True, remember=number == 0)
    learner.counters.shards += 1
    return result


@torch.inference_mode()
def score(learner: Learner | Frozen, groups: Sequence[RowGroup], split: Split | None = None) -> Score:
    """Loss and metrics of the served network on every labelled row of the groups (of `split`). The learner is not changed.

    Metrics: mae and rmse for regression, in units of the target; accuracy and auroc (from binned scores; left out when
    only one class occurs) for binary; accuracy for multiclass; and the spec's own. Class and sample weights count in the
    loss, not in the metrics. A metric that cannot be computed of so few rows, as R2 of one, is left out with a warning. A
    non-finite loss is returned, not raised. Raises ColumnError and OutputShapeError.
    """
    spec, device = learner.spec, learner.device
    stream = Stream(groups, learner.features, batch_size=EVALUATION_ROWS, window_bytes=spec.window_bytes, split=split)
    loss_function, metrics = loss_of(spec, learner.features), learner.metrics
    for metric in metrics.values():
        metric.reset()
    total = _zero(device)
    learner.served.eval()
    with closing(iter(stream)) as batches:
        for batch in batches:
            x_BF, ids_BC, y_B, w_B = batch if device.type == "cpu" else _moved(batch, device)
            output = _outputs(learner, x_BF, ids_BC)
            total.add_(loss_function(output, y_B, w_B), alpha=len(y_B))
            predicted, actual = _in_target_units(learner, output).cpu(), batch.y_B
            if spec.task == "regression":
                actual = _unscaled(learner, actual)
            elif spec.task == "binary":
                actual = actual.long()
            for metric in metrics.values():
                metric.update(predicted, actual)
    if not stream.rows:
        return Score(0, float("nan"))
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            found[name] = metric.compute().item()
        except ValueError as error:  # how torchmetrics says so
            log.warning("metric %s of %s (%d rows) is left out: %s", name, _named(groups), stream.rows, error)
    if math.isnan(found.get("auroc", 0.0)):  # the area under the curve needs both classes
        del found["auroc"]
    return Score(stream.rows, total.item() / stream.rows, found)


def predict(learner: Learner | Frozen, groups: Sequence[RowGroup]) -> Generator[Tensor]:
    """One tensor for each row group, rows in file order: nothing is left out, and no target is needed.

    Regression: float32 [N] in units of the target. Binary: probability of class 1, float32 [N]. Multiclass:
    probabilities, float32 [N, O].

    Row groups are read as for training, and encoded in slices of at most `window_bytes`, one slice ahead of its use. To be
    closed as `ahead` is. Raises ColumnError and OutputShapeError.
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
    for rows, last in ahead(encoded()):
        done.append(_predicted(learner, rows))
        if last:
            yield torch.cat(done)
            done = []


@torch.inference_mode()
def _predicted(learner: Learner | Frozen, rows: Encoded) -> Tensor:
    xs = torch.split(rows.x_NF, EVALUATION_ROWS)
    ids = repeat(None) if rows.ids_NC is None else torch.split(rows.ids_NC, EVALUATION_ROWS)
    device = learner.device
    outputs = [
        _outputs(learner, x_BF.to(device), None if ids_BC is None else ids_BC.to(device))
        for x_BF, ids_BC in zip(xs, ids, strict=False)
    ]
    return _in_target_units(learner, torch.cat(outputs)).float().cpu()


def _forward(learner: Learner | Frozen) -> Forward:
    """How a network is called, in the spec's precision."""

    def plain(network: Callable[..., Tensor], x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
        return network(x_BF) if ids_BC is None else network(x_BF, ids_BC)

    if learner.spec.precision == "float32":
        return plain
    device, dtype = learner.device.type, torch.bfloat16

    def mixed_precision(network: Callable[..., Tensor], x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            output = plain(network, x_BF, ids_BC)
        return output.float() if isinstance(output, Tensor) else output

    return mixed_precision


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(None if tensor is None else tensor.to(device) for tensor in batch))  # type: ignore[arg-type]


def _zero(device: torch.device) -> Tensor:
    """Where losses add up: on the device, so that no step waits for a number."""
    return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _outputs(learner: Learner | Frozen, x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
    """The served network's outputs, [B] for one output, else [B, O]."""
    output = _forward(learner)(learner.served, x_BF, ids_BC)
    return output.squeeze(1) if is_column(learner.spec, output, len(x_BF)) else output


def _in_target_units(learner: Learner | Frozen, output: Tensor) -> Tensor:
    """Outputs as values (regression, float64) or probabilities (float32)."""
    if learner.spec.task == "regression":
        return _unscaled(learner, output)
    return output.sigmoid() if learner.spec.task == "binary" else output.softmax(1)


def _unscaled(learner: Learner | Frozen, values_B: Tensor) -> Tensor:
    features, values_B = learner.features, values_B.cpu().double()
    if not features.standardize_target or features.statistics is None:
        return values_B
    return values_B * features.statistics.target_std + features.statistics.target_mean


@contextmanager
def _seeded(device: torch.device, *key: str | int) -> Iterator[None]:
    """Seeds torch's global generators (dropout uses them) for a while, and puts them back as they were."""
    seed = stable_seed(*key)
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace each time: 0.2 ms
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def _named(groups: Sequence[RowGroup]) -> str:
    more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
    return f"{groups[0].name}{more}"

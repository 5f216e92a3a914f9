"""The training loop, scores and predictions.

Shape legend: N rows of a row group, B rows of a batch, F numbers and C categories of one row, O outputs.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from tasks.training.batches import RowGroup, Split, Stream, ahead
from tasks.training.errors import NonFiniteLoss, OutputShapeError
from tasks.training.features import Encoded
from tasks.training.groups import stable_seed
from tasks.training.learner import Learner
from tasks.training.metrics import metrics_of
from tasks.training.spec import Loss, Spec

LOSS_FUNCTIONS: Final[dict[Loss, Callable[[Tensor, Tensor], Tensor]]] = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "bce": functional.binary_cross_entropy_with_logits,
    "cross_entropy": functional.cross_entropy,
}
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


def train_pass(
    learner: Learner, groups: Sequence[RowGroup], *, key: tuple[str | int, ...], split: Split | None = None
) -> PassResult:
    """Trains on every labelled row of the groups (of `split`) once, and adds to the learner's rows and steps.

    All random numbers derive from the spec's seed and `key` (the epoch or the shard), none from what ran before, so the
    same pass from the same learner always gives the same bits. With `shuffle` off and nothing standardised, the weights
    equal those of a plain PyTorch loop over the rows.

    Raises ColumnError, OutputShapeError, NonFiniteLoss; the learner is then half trained and must be loaded again.
    """
    spec, model, optimizer = learner.spec, learner.model, learner.optimizer
    stream = Stream(
        groups,
        learner.features,
        batch_size=spec.batch_size,
        window_bytes=spec.window_bytes,
        shuffle_seed=(spec.seed, *key) if spec.shuffle else None,
        split=split,
    )
    loss_function = LOSS_FUNCTIONS[spec.loss_name]
    parameters = list(model.parameters())
    total = torch.zeros((), dtype=torch.float64)
    rows = steps = 0
    column = False  # whether the output is [B, 1]
    model.train()
    with _seeded(spec.seed, "pass", *key):
        for x_BF, ids_BC, y_B in stream:
            output = model(x_BF) if ids_BC is None else model(x_BF, ids_BC)
            if not steps:
                column = _is_column(spec, output, len(y_B))
            loss = loss_function(output, y_B.unsqueeze(1) if column else y_B)
            for parameter in parameters:  # optimizer.zero_grad() without its bookkeeping, 8% of a small step
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            size = len(y_B)
            total.add_(loss.detach(), alpha=size)  # on the device: no step waits for a number
            rows += size
            steps += 1
    mean = total.item() / rows if rows else float("nan")
    if rows and not (torch.isfinite(total) and all(bool(torch.isfinite(p).all()) for p in parameters)):
        raise NonFiniteLoss(
            f"training on {_named(groups)} made the loss {mean} or a weight non-finite: lower learning_rate, "
            f"standardise the columns, or look for extreme values there"
        )
    learner.counters.rows += rows
    learner.counters.steps += steps
    if stream.unlabelled:
        log.debug("left out %d rows of %s without a target", stream.unlabelled, _named(groups))
    return PassResult(rows, steps, mean, stream.unlabelled)


def train_shard(learner: Learner, groups: Sequence[RowGroup], passes: int) -> PassResult:
    """Trains on the next shard of the stream `passes` times, and counts it. Returns what the last pass trained on.

    The shard's place in the stream seeds its random numbers. Raises what `train_pass` raises.
    """
    ordinal = learner.counters.shards
    for number in range(passes):
        result = train_pass(learner, groups, key=("shard", ordinal, number))
    learner.counters.shards += 1
    return result


@torch.inference_mode()
def score(learner: Learner, groups: Sequence[RowGroup], split: Split | None = None) -> Score:
    """Loss and metrics on every labelled row of the groups (of `split`). The learner is not changed.

    Metrics: mae and rmse for regression, in units of the target; accuracy and auroc (from binned scores; left out when
    only one class occurs) for binary; accuracy for multiclass. A non-finite loss is returned, not raised.
    Raises ColumnError and OutputShapeError.
    """
    spec, model = learner.spec, learner.model
    stream = Stream(groups, learner.features, batch_size=EVALUATION_ROWS, window_bytes=spec.window_bytes, split=split)
    loss_function = LOSS_FUNCTIONS[spec.loss_name]
    metrics = metrics_of(spec)
    total = torch.zeros((), dtype=torch.float64)
    rows = 0
    model.eval()
    for x_BF, ids_BC, y_B in stream:
        output = _outputs(learner, x_BF, ids_BC)
        total.add_(loss_function(output, y_B), alpha=len(y_B))
        predicted, actual = _in_target_units(learner, output), y_B
        if spec.task == "regression":
            actual = _unscaled(learner, y_B)
        elif spec.task == "binary":
            actual = y_B.long()
        for metric in metrics.values():
            metric.update(predicted, actual)
        rows += len(y_B)
    if not rows:
        return Score(0, float("nan"))
    found = {name: metric.compute().item() for name, metric in metrics.items()}
    if math.isnan(found.get("auroc", 0.0)):  # the area under the curve needs both classes
        del found["auroc"]
    return Score(rows, total.item() / rows, found)


def predict(learner: Learner, groups: Sequence[RowGroup]) -> Iterator[Tensor]:
    """One tensor for each row group, rows in file order: nothing is left out, and no target is needed.

    Regression: float32 [N] in units of the target. Binary: probability of class 1, float32 [N]. Multiclass:
    probabilities, float32 [N, O]. Raises ColumnError and OutputShapeError.
    """
    features = learner.features
    names = features.names(labelled=False)

    def encoded() -> Iterator[Encoded]:
        for group in groups:
            features.check(group.schema, group.name, labelled=False)
            yield features.encode(group.read(names), group.name, labelled=False)

    learner.model.eval()
    for rows in ahead(encoded()):
        yield _predicted(learner, rows)


@torch.inference_mode()
def _predicted(learner: Learner, rows: Encoded) -> Tensor:
    xs = torch.split(rows.x_NF, EVALUATION_ROWS)
    ids = repeat(None) if rows.ids_NC is None else torch.split(rows.ids_NC, EVALUATION_ROWS)
    outputs = [_outputs(learner, x_BF, ids_BC) for x_BF, ids_BC in zip(xs, ids, strict=False)]
    return _in_target_units(learner, torch.cat(outputs)).float()


def _outputs(learner: Learner, x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
    """The model's outputs, [B] for one output, else [B, O]."""
    output: Tensor = learner.model(x_BF) if ids_BC is None else learner.model(x_BF, ids_BC)
    return output.squeeze(1) if _is_column(learner.spec, output, len(x_BF)) else output


def _in_target_units(learner: Learner, output: Tensor) -> Tensor:
    """Outputs as values (regression, float64) or probabilities (float32)."""
    if learner.spec.task == "regression":
        return _unscaled(learner, output)
    return output.sigmoid() if learner.spec.task == "binary" else output.softmax(1)


def _unscaled(learner: Learner, values_B: Tensor) -> Tensor:
    features, values_B = learner.features, values_B.double()
    if not features.standardize_target or features.statistics is None:
        return values_B
    return values_B * features.statistics.target_std + features.statistics.target_mean


def _is_column(spec: Spec, output: object, rows: int) -> bool:
    """Whether the output is [B, 1]; False for the other allowed shape. Raises OutputShapeError."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if spec.task == "multiclass":
        if shape != (rows, spec.outputs):
            raise OutputShapeError(
                f"the model returned {shape} for {rows} rows of {spec.outputs} classes: return [{rows}, {spec.outputs}]"
            )
        return False
    if shape not in ((rows, 1), (rows,)):
        raise OutputShapeError(f"the model returned {shape} for {rows} rows of a {spec.task} task: return [{rows}, 1]")
    return shape == (rows, 1)


@contextmanager
def _seeded(*key: str | int) -> Iterator[None]:
    """Seeds torch's global generator (dropout uses it) for a while, and puts it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(*key))
        yield


def _named(groups: Sequence[RowGroup]) -> str:
    more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
    return f"{groups[0].name}{more}"

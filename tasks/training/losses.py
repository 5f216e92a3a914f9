"""The loss of a step: torch's where nothing more is asked for, else a mean of weighted losses of rows.

Shape legend: B rows of a batch, T targets, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

from torch import Tensor
from torch.nn import functional

from tidemill.tasks.training.errors import OutputShapeError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.imports import imported
from tidemill.tasks.training.spec import Spec

BUILT_IN: Final[dict[str, Callable[..., Tensor]]] = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "bce": functional.binary_cross_entropy_with_logits,
    "cross_entropy": functional.cross_entropy,
}

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(outputs, targets, weights_B or None) to a scalar. Outputs are shaped like the targets, or [B, O] for classes."""


def loss_of(spec: Spec, features: Features) -> LossFunction:
    """The spec's loss as one scalar: the mean over samples of weight * loss of the row.

    A row's weight is that of its class (`class_weights`) times that of its column (`sample_weight`); its loss is the mean
    over its targets. The sum is divided by the number of rows, not by the sum of the weights: a row of weight 2 counts as two
    rows would, whatever else is in its batch. (torch's cross_entropy(weight=...) divides by the sum.)

    Raises:
        FactoryError: a loss of the user's that cannot be imported.
        OutputShapeError: when the result is called: that loss does not return one number for each row.
    """
    weights = features.class_weights
    built_in = BUILT_IN.get(spec.loss_name)
    if built_in is not None and weights is None and spec.sample_weight is None:
        return lambda output, target, _: built_in(output, target)
    row_loss = partial(built_in, reduction="none") if built_in is not None else _user_loss(spec)

    def weighted(output: Tensor, target: Tensor, weight_B: Tensor | None) -> Tensor:
        loss = row_loss(output, target)
        loss_B = loss.flatten(1).mean(1) if loss.ndim > 1 else loss
        if weights is not None:
            loss_B = loss_B * weights.to(loss_B.device)[target.flatten().long()]
        if weight_B is not None:
            loss_B = loss_B * weight_B
        return loss_B.mean()

    return weighted


def _user_loss(spec: Spec) -> Callable[[Tensor, Tensor], Tensor]:
    function = imported(spec.loss_name, "loss")

    def row_loss(output: Tensor, target: Tensor) -> Tensor:
        if output.ndim == 2 and output.shape[1] == 1:  # one output: both are [B] to the user
            output, target = output.squeeze(1), target.flatten()
        loss = function(output, target)
        if not isinstance(loss, Tensor) or loss.shape[:1] != target.shape[:1]:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OutputShapeError(
                f"loss {spec.loss_name!r} returned {found} for {len(target)} rows: return one number for each, "
                f"[{len(target)}], without reducing them"
            )
        return loss

    return row_loss


def is_column(spec: Spec, output: object, rows: int) -> bool:
    """Whether the output is [B, 1] for a single target; False for the other allowed shapes.

    Raises:
        OutputShapeError: it has a shape or a type that the task does not allow.
    """
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if isinstance(output, Tensor) and not output.is_floating_point():
        raise OutputShapeError(
            f"the model returned {output.dtype} for a {spec.task} task: return real numbers, as float32"
        )
    if spec.outputs > 1:
        if shape != (rows, spec.outputs):
            what = "targets" if spec.classes is None else "classes"
            raise OutputShapeError(
                f"the model returned {shape} for {rows} rows of {spec.outputs} {what}: return [{rows}, {spec.outputs}]"
            )
        return False
    if shape not in ((rows, 1), (rows,)):
        raise OutputShapeError(f"the model returned {shape} for {rows} rows of a {spec.task} task: return [{rows}, 1]")
    return shape == (rows, 1)

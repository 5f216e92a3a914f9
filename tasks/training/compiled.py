"""Gradient steps as compiled functions: several steps of a process that trains alone in a call, or one part of a batch.

Both do what eager steps do, but sums are made in another order, so the bits are not the same.

Shape legend: K steps of a call, B rows of a batch or of a part of it, F numbers and C ids of one row, P parameters that are
trained, G numbers of all their gradients.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from tidemill.tasks.training.cutting import Batch
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.losses import LossFunction, is_column
from tidemill.tasks.training.optimizers import (
    OPTIMIZERS,
    arguments_of,
    next_rates,
    next_shares,
    restore_schedule,
    states_of,
)

Forward = Callable[[Callable[..., Tensor], Tensor, Tensor | None], Tensor]
"""(network, x_BF, ids_BC or None) to the network's outputs, in float32 whatever the network computes in."""

_INDUCTOR: Final = {
    "fallback_random": True,  # dropout draws what it would draw in eager mode
    # Its fusion of `add(weight, mm, alpha)` into `addmm` drops alpha in torch 2.13.0: weights went up instead of down.
    "pattern_matcher": False,
}

logger = logging.getLogger("tidemill.training")


def _compile(
    function: Callable[..., Tensor], device: torch.device, backend: str, *, fixed: bool
) -> Callable[..., Tensor]:
    """`fixed`: the function is called with one number of rows; else with those that are marked as open."""
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = _INDUCTOR | {"cpp_wrapper": device.type == "cpu"}
    dynamic = False if fixed else None
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend, options=options)


def _warn(error: Exception) -> None:
    reason = " ".join(str(error).split("\n", 2)[:2])  # the second line has the cause of a backend's failure
    logger.warning("compile: trained without compilation, which failed: %s: %s", type(error).__name__, reason)


# ---- whole steps -----------------------------------------------------------------------------------------------------
class CompiledSteps:
    """Several steps of a learner as one compiled function. What does not compile is said once."""

    def __init__(
        self,
        learner: Learner,
        forward: Forward,
        loss_function: LossFunction,
        steps: int,
        backend: str,
        *,
        equal: bool,
    ) -> None:
        """`equal`: all passes have the same length."""
        self._learner, self._forward, self._loss, self._steps = learner, forward, loss_function, steps
        self._backend = backend
        self._full = full_sizes(learner)
        self._equal = equal
        self._functions: dict[bool, Callable[..., Tensor]] = {}
        """Of batches of a fixed size (True), and of any size. Made when first called: only then the optimizer has its state."""
        self._works: bool | None = None
        """None: not tried yet."""

    def call(self, block: Batch) -> Tensor | None:
        """Trains on the rows of a block of steps. Returns the mean loss, float64; None: nothing was done, it does not compile."""
        if self._works is False:
            return None
        learner = self._learner
        shape = self._steps, len(block.y_B) // self._steps
        parts = [None if tensor is None else tensor.view(*shape, *tensor.shape[1:]) for tensor in block]
        fixed = self._equal or shape[1] in self._full
        if fixed not in self._functions:
            if not self._functions:
                torch._dynamo.reset()  # what it compiled for learners before this one counts against its limit
            # Two functions, since torch keeps the code of one function together, and would open the size of both.
            function = _function(learner, self._forward, self._loss, self._steps)
            self._functions[fixed] = _compile(function, learner.device, self._backend, fixed=fixed)
        if not fixed:
            for part in parts:
                if part is not None:
                    torch._dynamo.mark_dynamic(part, 1)
        position = None if learner.schedule is None else learner.schedule.state_dict()
        rate_K = next_rates(learner.optimizer, learner.schedule, self._steps, learner.device)
        follow_K = next_shares(learner.spec, learner.averaged, self._steps, learner.device)
        began = time.perf_counter()
        try:
            with torch.no_grad():
                loss: Tensor = self._functions[fixed](*parts, rate_K, follow_K)
        except Exception as error:
            if self._works:
                raise
            self._works = False
            if learner.schedule is not None and position is not None:
                restore_schedule(learner.schedule, position)
            _warn(error)
            return None
        if not self._works:
            logger.info("compile: %d steps a call, compiled in %.1f s", self._steps, time.perf_counter() - began)
        self._works = True
        if learner.averaged is not None:
            learner.averaged.n_averaged += self._steps
            for average, buffer in zip(learner.averaged.module.buffers(), learner.model.buffers(), strict=True):
                average.copy_(buffer)  # as `update_parameters` does at each step
        return loss


def _function(learner: Learner, forward: Forward, loss_function: LossFunction, count: int) -> Callable[..., Tensor]:
    """The function to compile: (x_KBF, ids_KBC, y_KB, w_KB, rate_K, follow_K) to the mean loss. It changes the learner."""
    model, spec = learner.model, learner.spec
    clip_norm, decay = spec.clip_norm, spec.ema_decay
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages: dict[str, nn.Parameter] = {}
    if learner.averaged is not None:
        averages = {name: p for name, p in learner.averaged.module.named_parameters() if name in named}
    update = OPTIMIZERS[spec.optimizer.name].update
    names_of = {id(parameter): name for name, parameter in named.items()}
    # (names of its parameters, arguments) of each group of the optimizer
    groups = [
        ([names_of[id(p)] for p in group["params"] if id(p) in names_of], arguments_of(group, update))
        for group in learner.optimizer.param_groups
    ]
    # Looked up here: a lookup in the graph would add an entry for what has none, and so compile everything again.
    states = {name: states_of(learner.optimizer, spec.optimizer.name, [p]) for name, p in named.items()}

    def steps(
        x_KBF: Tensor,
        ids_KBC: Tensor | None,
        y_KB: Tensor,
        w_KB: Tensor | None,
        rate_K: Tensor,
        follow_K: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x_KBF.device)
        for k in range(count):
            y_B = y_KB[k]
            with torch.enable_grad():
                leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
                output = forward(
                    lambda *inputs, leaves=leaves: functional_call(model, leaves, inputs),
                    x_KBF[k],
                    None if ids_KBC is None else ids_KBC[k],
                )
                if is_column(spec, output, len(y_B)):
                    y_B = y_B.unsqueeze(1)
                loss = loss_function(output, y_B, None if w_KB is None else w_KB[k])
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            used = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
            if clip_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
                scale = (clip_norm / (get_total_norm(list(used.values())) + 1e-6)).clamp(max=1.0)
                used = {name: g * scale for name, g in used.items()}
            for names, arguments in groups:
                of_group = [name for name in names if name in used]
                state_lists = [
                    [value for part in parts for value in part]
                    for parts in zip(*(states[name] for name in of_group), strict=True)
                ]
                parameters, clipped = [named[name] for name in of_group], [used[name] for name in of_group]
                update(parameters, clipped, *state_lists, lr=rate_K[k], **arguments)
            for name, average in averages.items():
                average.lerp_(named[name], 1 - cast(float, decay) if follow_K is None else follow_K[k])
            total = total + loss.detach().double()
        return total / count

    return steps


# ---- one part of a batch ---------------------------------------------------------------------------------------------
class CompiledPart:
    """Forward and backward of one part of a batch as a compiled function. It is called for part after part: the code is the same
    however many of them are a rank's. What does not compile is said once."""

    def __init__(
        self, learner: Learner, forward: Forward, loss_function: LossFunction, dtype: torch.dtype, backend: str
    ) -> None:
        """`dtype`: of what `call` returns."""
        self._learner, self._forward, self._loss, self._dtype = learner, forward, loss_function, dtype
        self._backend = backend
        self._full = full_sizes(learner)
        self._functions: dict[bool, Callable[..., Tensor]] = {}
        """Of parts of full batches (True), and of any size."""
        self.works: bool | None = None
        """None: not tried yet."""
        self.no_gradient: set[int] = set()
        """Places, among the parameters that are trained, of those that have no gradient. The graph fixes which ones."""

    def call(self, part: Batch, share: float, rows: int, parts: int) -> Tensor | None:
        """As `flattened`, of a part that has this share of the batch's rows; None: nothing was done, it does not compile.

        Args:
            part: Rows of the batch.
            share: What the loss and the gradients are weighed with.
            rows: Of the whole batch.
            parts: In how many it is cut.
        """
        learner, began = self._learner, time.perf_counter()
        fixed = rows in self._full and rows % parts == 0  # else parts differ by a row
        if fixed not in self._functions:
            if not self._functions:
                torch._dynamo.reset()
            function = _part_function(learner, self._forward, self._loss, self._dtype)
            self._functions[fixed] = _compile(function, learner.device, self._backend, fixed=fixed)
        if not fixed:
            for tensor in part:
                if tensor is not None:
                    torch._dynamo.mark_dynamic(tensor, 0)
        weight = torch.tensor(share, dtype=torch.float32, device=learner.device)
        try:
            with torch.no_grad():
                flat = self._functions[fixed](*part, weight)
        except Exception as error:
            if self.works:
                raise
            self.works = False
            _warn(error)
            return None
        if not self.works:
            logger.info("compile: a part of a batch, compiled in %.1f s", time.perf_counter() - began)
            trained = sum(parameter.requires_grad for parameter in learner.model.parameters())
            self.no_gradient = {i for i, used in enumerate(flat[-trained - 1 : -1].tolist()) if not used}
        self.works = True
        return flat


def _part_function(
    learner: Learner, forward: Forward, loss_function: LossFunction, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """The function to compile: (x_BF, ids_BC, y_B, w_B, share) to what `flattened` returns. It changes nothing."""
    model, spec = learner.model, learner.spec
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def part(x_BF: Tensor, ids_BC: Tensor | None, y_B: Tensor, w_B: Tensor | None, share: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
            output = forward(lambda *inputs: functional_call(model, leaves, inputs), x_BF, ids_BC)
            if is_column(spec, output, len(y_B)):
                y_B = y_B.unsqueeze(1)
            loss = loss_function(output, y_B, w_B) * share
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return flattened(list(leaves.values()), gradients, loss.detach(), dtype)

    return part


def flattened(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], loss: Tensor, dtype: torch.dtype
) -> Tensor:
    """[G + 1 + P + 1]: the gradients, zeros where there is none; the loss; of each parameter 1 if it has a gradient, else 0; a 0.

    One tensor, since ranks send one large tensor faster than many small ones.
    """
    used_P = [float(gradient is not None) for gradient in gradients]
    pieces = [
        torch.zeros(parameter.numel(), device=loss.device) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    ends = torch.tensor([*used_P, 0.0], device=loss.device)
    return torch.cat([piece.to(dtype) for piece in (*pieces, loss.reshape(1), ends)])


def full_sizes(learner: Learner) -> tuple[int, int]:
    """Rows of a full batch, without old rows from the memory and with them."""
    batch_size = learner.spec.batch_size
    old = 0 if learner.memory is None else round(learner.memory.ratio * batch_size)
    return batch_size, batch_size + old

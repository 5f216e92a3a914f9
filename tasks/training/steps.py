"""Gradient steps of a learner: forward, loss, backward, clipping, optimizer, schedule and average of the weights.

Eager, one step at a time; or compiled, many in one call. Both do the same, but sums are made in another order, so the bits are
not the same. The learner knows neither.

Shape legend: K steps of a call, B rows of a batch, F numbers and C ids of one row, T targets.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, get_total_norm

from tidemill.tasks.training.calling import model_error, told, torch_as_usual
from tidemill.tasks.training.cutting import Batch, Blocks, even, in_batches
from tidemill.tasks.training.errors import ModelError, TrainingError, of_the_machine
from tidemill.tasks.training.keras_models import KerasModule
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.losses import LossFunction, is_column, loss_of
from tidemill.tasks.training.optimizers import (
    OPTIMIZERS,
    Update,
    arguments_of,
    backward,
    next_rates,
    next_shares,
    restore_schedule,
    states_of,
)
from tidemill.tasks.training.spec import Spec

Forward = Callable[[Callable[..., Tensor], Tensor, Tensor | None], Tensor]
"""(network, x_BF, ids_BC or None) to the network's outputs, in float32 whatever the network computes in."""

STEPS_PER_CALL: Final = 16
"""Twice as many gain little and double the time of compilation."""
OPEN_SHARE: Final = 10
"""Batches that are not full are compiled from a tenth of a pass on: of fewer, the time of compilation is not won back."""
AUTO_STEPS: Final = 200_000
"""Steps of a run from which `compile: auto` compiles. Compilation takes 16 s (a linear model) to 43 s (an MLP) the first time,
5 to 8 s from the cache; a compiled step saves 0.15 ms (linear) to 0.5 ms (MLP): this many win it back (docs/performance.md)."""
_INDUCTOR: Final = {
    "fallback_random": True,  # dropout draws what it would draw in eager mode
    # Its fusion of `add(weight, mm, alpha)` into `addmm` drops alpha in torch 2.13.0: weights went up instead of down.
    "pattern_matcher": False,
}

logger = logging.getLogger("tidemill.training")


def wanted(mode: str, steps: int) -> bool:
    """Whether a run of `steps` gradient steps is compiled in this mode of the spec."""
    return mode == "on" or (mode == "auto" and steps >= AUTO_STEPS)


def forward_of(spec: Spec, device: torch.device) -> Forward:
    """How a network is called, in the spec's precision."""

    def plain(network: Callable[..., Tensor], x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
        output = network(x_BF) if ids_BC is None else network(x_BF, ids_BC)
        if isinstance(output, Tensor) and output.dtype is not torch.float32 and output.is_floating_point():
            return output.float()  # of a model in float64 or bfloat16
        return output

    if spec.precision == "float32":
        return plain

    def mixed_precision(network: Callable[..., Tensor], x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return plain(network, x_BF, ids_BC)

    return mixed_precision


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    if device.type == "cpu":
        return batch
    return Batch(*(None if tensor is None else tensor.to(device) for tensor in batch))  # type: ignore[arg-type]


class Steps:
    """Gradient steps of one learner, kept from pass to pass: what is compiled, and the optimizer's arithmetic, are made once.

    Which steps are compiled depends on the learner and the pass alone, so that a resumed run has the same bits: with the
    spec's `compile: on` all calls of full size but the learner's first, with `auto` the same if the run is long enough.
    """

    def __init__(
        self, learner: Learner, expected: int = 0, *, per_call: int = STEPS_PER_CALL, backend: str = "inductor"
    ) -> None:
        """`expected`: gradient steps of a run of equal passes, which decide about `compile: auto`; 0: passes of any length.

        `backend` is torch.compile's.

        Raises:
            FactoryError: a loss of the user's that cannot be imported.
        """
        spec, model = learner.spec, learner.model
        self.learner = learner
        compiles = wanted(spec.compile, expected) and not isinstance(model, KerasModule)  # it holds its weights itself
        self.per_call = per_call if compiles else 1
        """Steps that one block may hold."""
        self._device = learner.device
        self._elsewhere = self._device.type != "cpu"
        self._forward, self._loss = forward_of(spec, self._device), loss_of(spec, learner.features)
        self._parameters = list(model.parameters())
        self._trainable = [p for p in self._parameters if p.requires_grad]
        self._update: Update | None = None
        """Made after the first step, which makes the optimizer's state."""
        self._column: bool | None = None
        """Whether the output is [B, 1] where the targets are [B]; None: not seen yet."""
        self._masks = {id(tensor) for tensor in _kept(model) if not is_finite(tensor)}
        """Tensors that were not finite when the learner was made or loaded."""
        self._compiled = (
            _Compiled(learner, self._forward, self._loss, per_call, backend, equal=expected > 0) if compiles else None
        )

    def plan(self, rows: int) -> list[Blocks]:
        """How a pass of `rows` rows is cut: into batches that differ by at most one row, several in a block that is compiled.

        Full batches have compiled code of their own, and so has every size of a run of equal passes. In other passes all other
        sizes share one code whose size is open: it takes 10% longer, but nothing is compiled anew for every shard. Batches that
        are not full are compiled only where they are a tenth of a pass or more.
        """
        batch_size = self.learner.spec.batch_size
        found: list[Blocks] = []
        sizes = even(rows, batch_size)
        total = sum(count for _, count in sizes)
        for size, count in sizes:
            compiles = self.per_call > 1 and (size == batch_size or (size > 1 and OPEN_SHARE * count >= total))
            calls = count // self.per_call if compiles else 0
            if calls:
                found.append(Blocks(size, self.per_call, calls))
            if rest := count - calls * self.per_call:
                found.append(Blocks(size, 1, rest))
        return found

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the steps of a pass: the model is in training mode, but for what its factory left in evaluation mode."""
        self.learner.model.train()
        for module in self.learner.resting:
            module.training = False
        with torch_as_usual(), self._tracing():
            yield

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        # Backward is inside of the compiled graph, which torch does not trace by default: an older torch, which has no option
        # for it, does not compile and says so. For a whole pass, since the option takes 5% of a call.
        if self._compiled is None or not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            yield
            return
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            yield

    def take(self, block: Batch, count: int = 1) -> Tensor:
        """Trains on the rows of `count` batches of one size, one after the other; to be called inside of `training`.

        Returns the mean loss of the rows, each with the weights at its step, on the device: no step waits for a number.

        Raises:
            ModelError: the model, the loss or the optimizer raised; or returned another shape than the task needs
                (OutputShapeError). Errors of the machine, as no memory, are raised as they are.
        """
        counters = self.learner.counters
        if self._elsewhere:
            block = moved(block, self._device)
        if count == 1:
            counters.steps += 1
            return self._told(block)
        loss = None
        if self._compiled is not None and counters.steps:  # the first steps are eager: they make the optimizer's state
            loss = self._compiled.call(block)
        if loss is None:
            size = len(block.y_B) // count
            loss = torch.stack([self._told(batch) for batch in in_batches(block, size)]).double().mean()
        else:
            counters.compiled_steps += count
        counters.steps += count
        return loss

    def _told(self, batch: Batch) -> Tensor:
        """As `_eager`; an error of the model's is told with its frames and shapes."""
        try:
            return self._eager(batch)
        except Exception as error:  # not `calling.told`, which would take a percent of a small step
            if isinstance(error, TrainingError) or of_the_machine(error):
                raise
            alone = " on a single row" if len(batch.y_B) == 1 else ""
            raise model_error(f"a gradient step of the model{alone}", error, batch.x_BF, batch.ids_BC) from error

    def _eager(self, batch: Batch) -> Tensor:
        """One step. Returns its loss."""
        learner = self.learner
        x_BF, ids_BC, y_B, w_B = batch
        output = self._forward(learner.model, x_BF, ids_BC)
        if self._column is None:
            self._column = is_column(learner.spec, output, len(y_B))
        loss = self._loss(output, y_B.unsqueeze(1) if self._column else y_B, w_B)
        for parameter in self._parameters:  # optimizer.zero_grad() without its bookkeeping, 8% of a small step
            parameter.grad = None
        backward(loss)
        if learner.spec.clip_norm is not None:
            if self._update is None and any(p.grad is not None and p.grad.is_sparse for p in self._parameters):
                raise ModelError(
                    "clip_norm: torch has no norm of sparse gradients: leave clip_norm out, or use sparse=False"
                )
            clip_grad_norm_(self._parameters, learner.spec.clip_norm)
        if self._update is not None:
            self._update.step()
        else:
            optimizer = learner.optimizer
            optimizer.step()
            # torch skips parameters without a gradient, and which ones may change from step to step, so all must have one.
            if Update.serves(optimizer) and all(p.grad is not None and not p.grad.is_sparse for p in self._trainable):
                name, alone = learner.spec.optimizer.name, self._compiled is None
                self._update = Update(optimizer, name, self._trainable, alone=alone)
        if learner.schedule is not None:
            learner.schedule.step()
        if learner.averaged is not None:
            learner.averaged.update_parameters(learner.model)
        return loss.detach()

    @torch.no_grad()
    def loss_after(self, block: Batch, count: int = 1) -> Tensor:
        """The loss of the last batch of a block with the weights as they are now; nothing changes but the model's mode."""
        learner = self.learner
        *_, batch = in_batches(moved(block, self._device), len(block.y_B) // count)
        learner.model.eval()  # so that neither buffers nor the random state change
        with told("the model, in evaluation mode,", batch.x_BF, batch.ids_BC):
            output = self._forward(learner.model, batch.x_BF, batch.ids_BC)
            column = is_column(learner.spec, output, len(batch.y_B))
            return self._loss(output, batch.y_B.unsqueeze(1) if column else batch.y_B, batch.w_B)

    def is_finite(self) -> bool:
        """Whether all that a version would hold is: weights, buffers, the optimizer's state.

        What was not from the start, as a causal mask of -inf, may stay so, but for NaN.
        """
        states = (value for state in self.learner.optimizer.state.values() for value in state.values())
        kept = chain(_kept(self.learner.model), (value for value in states if isinstance(value, Tensor)))
        return all(
            is_finite(tensor) or (id(tensor) in self._masks and not bool(torch.isnan(tensor).any())) for tensor in kept
        )


def _kept(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; of any layout and type."""
    values = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
    if values.dtype.itemsize == 1 and values.is_floating_point():
        values = values.float()  # torch has no such check for its 8-bit types
    return bool(torch.isfinite(values).all())


class _Compiled:
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
        batch_size = learner.spec.batch_size
        old = 0 if learner.memory is None else round(learner.memory.ratio * batch_size)
        self._full = (batch_size, batch_size + old)
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
            options: dict[str, Any] | None = None
            if self._backend == "inductor":
                options = _INDUCTOR | {"cpp_wrapper": learner.device.type == "cpu"}
            if not self._functions:
                torch._dynamo.reset()  # what it compiled for learners before this one counts against its limit
            # Two functions, since torch keeps the code of one function together, and would open the size of both.
            function = _function(learner, self._forward, self._loss, self._steps)
            dynamic = False if fixed else None
            self._functions[fixed] = torch.compile(
                function, fullgraph=True, dynamic=dynamic, backend=self._backend, options=options
            )
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
            reason = " ".join(str(error).split("\n", 2)[:2])  # the second line has the cause of a backend's failure
            logger.warning("compile: trained without compilation, which failed: %s: %s", type(error).__name__, reason)
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

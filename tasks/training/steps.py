"""Gradient steps of a learner: forward, loss, backward, clipping, optimizer, schedule and average of the weights.

Eager, one step at a time; or compiled, many in one call. Both do the same, but sums are made in another order, so the bits are
not the same. The learner knows neither, nor whether the gradient of a batch is the sum of its parts (`parts`).

Shape legend: K steps of a call, B rows of a batch, F numbers and C ids of one row, T targets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tidemill.tasks.ranks.group import ALONE, Group
from tidemill.tasks.training.calling import model_error, told, torch_as_usual
from tidemill.tasks.training.compiled import CompiledSteps, Forward
from tidemill.tasks.training.cutting import Batch, Blocks, even, in_batches
from tidemill.tasks.training.errors import ModelError, TrainingError, of_the_machine
from tidemill.tasks.training.finite import Finite
from tidemill.tasks.training.keras_models import KerasModule
from tidemill.tasks.training.large import take_step
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.losses import is_column, loss_of
from tidemill.tasks.training.optimizers import TAKING_SPARSE, Update, backward
from tidemill.tasks.training.parts import Parts
from tidemill.tasks.training.spec import Spec

STEPS_PER_CALL: Final = 16
"""Twice as many gain little and double the time of compilation."""
OPEN_SHARE: Final = 10
"""Batches that are not full are compiled from a tenth of a pass on: of fewer, the time of compilation is not won back."""
AUTO_STEPS: Final = 200_000
"""Steps of a run from which `compile: auto` compiles. Compilation takes 16 s (a linear model) to 43 s (an MLP) the first time,
5 to 8 s from the cache; a compiled step saves 0.15 ms (linear) to 0.5 ms (MLP): this many win it back (docs/performance.md)."""


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
    """The batch on a device. To a CUDA device it goes by way of pinned memory, while the CPU goes on."""
    if device.type == "cpu":
        return batch
    pinned = device.type == "cuda"
    # A copy in pinned memory, not the batch itself: rows of a window are overwritten once no batch refers to them, and torch
    # keeps this copy until the device has read it.
    return Batch._make(
        None if tensor is None else (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)
        for tensor in batch
    )


class Steps:
    """Gradient steps of one learner, kept from pass to pass: what is compiled, and the optimizer's arithmetic, are made once.

    Which steps are compiled depends on the learner and the pass alone, so that a resumed run has the same bits: with the
    spec's `compile: on` all calls of full size but the learner's first, with `auto` the same if the run is long enough.
    """

    def __init__(
        self,
        learner: Learner,
        expected: int = 0,
        *,
        group: Group = ALONE,
        per_call: int = STEPS_PER_CALL,
        backend: str = "inductor",
    ) -> None:
        """`expected`: gradient steps of a run of equal passes, which decide about `compile: auto`; 0: passes of any length.

        `group`: the ranks that make the same steps. `backend` is torch.compile's.

        Raises:
            FactoryError: a loss of the user's that cannot be imported.
            SpecError: the model cannot be trained in parts; or the parts are not to be shared out among so many ranks.
        """
        spec, model = learner.spec, learner.model
        self.learner, self.expected, self._group = learner, expected, group
        in_parts = spec.parts is not None or group.size > 1
        by_itself = isinstance(model, KerasModule)  # it holds its weights itself
        self._compiles = wanted(spec.compile, expected) and not by_itself
        self._device = learner.device
        in_blocks = self._device.type == "cuda"  # many small batches are there sooner as one
        self.per_call = per_call if in_blocks or (self._compiles and not in_parts) else 1
        """Steps that one block may hold."""
        self._elsewhere = self._device.type != "cpu"
        self._forward, self._loss = forward_of(spec, self._device), loss_of(spec, learner.features)
        self._parameters = list(model.parameters())
        self._trainable = [p for p in self._parameters if p.requires_grad]
        self._update: Update | None = None
        """Made after the first step, which makes the optimizer's state."""
        self._column: bool | None = None
        """Whether the output is [B, 1] where the targets are [B]; None: not seen yet."""
        self._finite = Finite(learner)
        self._parts = self._compiled = None
        if in_parts:
            self._parts = Parts(learner, self._forward, self._loss, group, backend if self._compiles else None)
        elif self._compiles:
            self._compiled = CompiledSteps(learner, self._forward, self._loss, per_call, backend, equal=expected > 0)

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

    def alone(self) -> "Steps":
        """Steps of the same learner that no other rank makes."""
        return self if self._group.size == 1 else Steps(self.learner)

    @contextmanager
    def training(self, *key: str | int, step: int = 0) -> Iterator[None]:
        """Around the steps of a pass, which its key tells from others, from this step on: the model is in training mode, but for
        what its factory left in evaluation mode."""
        if self._parts is not None:
            self._parts.begin(self.learner.spec.seed, "parts", *key, step=step)
        self.learner.model.train()
        for module in self.learner.resting:
            module.training = False
        with torch_as_usual(), self._tracing():
            yield

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        # Backward is inside of the compiled graph, which torch does not trace by default: an older torch, which has no option
        # for it, does not compile and says so. For a whole pass, since the option takes 5% of a call.
        if not self._compiles or not hasattr(torch._dynamo.config, "trace_autograd_ops"):
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
        if self._parts is not None:
            loss = self._parts.backward(batch)
            learner.counters.compiled_steps += self._parts.compiles(len(batch.y_B))
        else:
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
            if sparse := [p for p in self._trainable if p.grad is not None and p.grad.is_sparse]:
                if (name := learner.spec.optimizer.name) not in TAKING_SPARSE:
                    raise ModelError(
                        f"optimizer: {name} takes no sparse gradients: use {' or '.join(TAKING_SPARSE)}, or sparse=False"
                    )
                with learner.changes.step(sparse):
                    take_step(optimizer)
            else:
                take_step(optimizer)
            # torch skips parameters without a gradient, and which ones may change from step to step, so all must have one.
            if not sparse and Update.serves(optimizer) and all(p.grad is not None for p in self._trainable):
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
        """Whether all that a version would hold is: weights, buffers, the optimizer's state."""
        return self._finite.all()

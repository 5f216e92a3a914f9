"""Whole gradient steps, compiled: forward, loss, backward, clipping, optimizer and average, many steps a call.

Shape legend: K steps of a call, B rows of a batch, F numbers and C ids of one row, T targets.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from tidemill.tasks.training.batches import Batch
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.losses import LossFunction, is_column
from tidemill.tasks.training.optimizers import FUNCTIONAL, arguments_of, states_of

Forward = Callable[[Callable[..., Tensor], Tensor, Tensor | None], Tensor]
"""(network, x_BF, ids_BC or None) to the network's outputs in float32."""

STEPS: Final = 16  # of a call; twice as many gain little and double the time of compilation
AUTO_STEPS: Final = 200_000
"""Steps of a run from which `compile: auto` compiles. Compilation takes 16 s (a linear model) to 43 s (an MLP) the first time,
5 to 8 s from the cache; a compiled step saves 0.15 ms (linear) to 0.5 ms (MLP): so many win it back (docs/performance.md)."""

log = logging.getLogger("tidemill.training")

_INDUCTOR: Final = {
    "fallback_random": True,  # dropout draws what it would draw in eager mode
    # Its fusion of `add(weight, mm, alpha)` into `addmm` drops alpha in torch 2.13.0: weights went up instead of down.
    "pattern_matcher": False,
}


def wanted(mode: str, steps: int) -> bool:
    """Whether a run of so many gradient steps is compiled in this mode of the spec."""
    return mode == "on" or (mode == "auto" and steps >= AUTO_STEPS)


@contextmanager
def tracing(compiled: "CompiledSteps | None") -> Iterator[None]:
    """While steps may be compiled: backward is inside of their graph, which torch does not trace by default."""
    # Without the option an older torch does not compile, and `run` says so.
    if compiled is None or not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        yield
        return
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # for a whole pass: it takes 5% of a call
        yield


class CompiledSteps:
    """Several gradient steps of a learner as one compiled function.

    The semantics are those of the eager loop; sums are made in another order, so the bits are not the same. The learner
    must have made an eager step before, which makes the optimizer's state. What does not compile is said once, and is
    trained by the eager loop from then on.
    """

    def __init__(
        self,
        learner: Learner,
        forward: Forward,
        loss_function: LossFunction,
        *,
        steps: int = STEPS,
        backend: str = "inductor",
    ) -> None:
        """`steps` of a call; `backend` is torch.compile's."""
        self.steps = steps
        self._learner = learner
        self._parts = forward, loss_function
        self._backend = backend
        self._call: Callable[..., Tensor] | None = None
        self._compiles: bool | None = None  # None: not tried yet

    def run(self, block: Batch) -> Tensor | None:
        """Trains on the rows of `steps` batches of one size, one after the other; to be called inside of `tracing`.

        Returns the sum of loss * rows, float64; None: nothing was done, it does not compile.
        """
        if self._compiles is False:
            return None
        learner = self._learner
        if self._call is None:  # not earlier: only now the optimizer has its state
            options: dict[str, Any] | None = None
            if self._backend == "inductor":
                options = _INDUCTOR | {"cpp_wrapper": learner.device.type == "cpu"}
            torch._dynamo.reset()  # what it compiled for learners before this one counts against its limit
            function = _steps(learner, *self._parts, self.steps)
            self._call = torch.compile(function, fullgraph=True, dynamic=False, backend=self._backend, options=options)
        shape = self.steps, len(block.y_B) // self.steps
        parts = [None if tensor is None else tensor.view(*shape, *tensor.shape[1:]) for tensor in block]
        position = None if learner.schedule is None else learner.schedule.state_dict()
        rate_K = _rates(learner, self.steps)
        began = time.perf_counter()
        try:
            with torch.no_grad():
                total: Tensor = self._call(*parts, rate_K)
        except Exception as error:
            if self._compiles:
                raise
            self._compiles = False
            if learner.schedule is not None and position is not None:
                learner.schedule.load_state_dict(position)
                for group, rate in zip(learner.optimizer.param_groups, learner.schedule.get_last_lr(), strict=True):
                    group["lr"] = rate
            reason = " ".join(str(error).split("\n", 2)[:2])  # the second line has the cause of a backend's failure
            log.warning("compile: trained without compilation, which failed: %s: %s", type(error).__name__, reason)
            return None
        if not self._compiles:
            log.info("compile: %d steps a call, compiled in %.1f s", self.steps, time.perf_counter() - began)
        self._compiles = True
        if learner.averaged is not None:
            learner.averaged.n_averaged += self.steps
            for average, buffer in zip(learner.averaged.module.buffers(), learner.model.buffers(), strict=True):
                average.copy_(buffer)  # as `update_parameters` does at each step
        learner.counters.compiled_steps += self.steps
        return total


def _rates(learner: Learner, steps: int) -> Tensor:
    """float32 [K]: the learning rate of each step; the schedule moves on. An input, because a constant would be compiled in."""
    (group,) = learner.optimizer.param_groups
    rates = []
    for _ in range(steps):
        rates.append(group["lr"])
        if learner.schedule is not None:
            learner.schedule.step()
    return torch.tensor(rates, device=learner.device)


def _steps(learner: Learner, forward: Forward, loss_function: LossFunction, count: int) -> Callable[..., Tensor]:
    """The function to compile: (x_KBF, ids_KBC, y_KB, w_KB, rate_K) to the sum of loss * rows. It changes the learner."""
    model, spec = learner.model, learner.spec
    clip_norm, decay = spec.clip_norm, spec.ema_decay
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages: dict[str, Tensor] = {}
    if learner.averaged is not None:
        averages = {name: p for name, p in learner.averaged.module.named_parameters() if name in named}
    update, _ = FUNCTIONAL[spec.optimizer.name]
    arguments = arguments_of(learner.optimizer, update)
    # Looked up here: a lookup in the graph would add an entry for what has none, and so compile everything again.
    states = {name: states_of(learner.optimizer, spec.optimizer.name, [p]) for name, p in named.items()}

    def steps(x_KBF: Tensor, ids_KBC: Tensor | None, y_KB: Tensor, w_KB: Tensor | None, rate_K: Tensor) -> Tensor:
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
            found = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
            parameters, used = [named[name] for name in found], list(found.values())
            if clip_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
                scale = (clip_norm / (get_total_norm(used) + 1e-6)).clamp(max=1.0)
                used = [g * scale for g in used]
            state_lists = [
                [value for part in parts for value in part]
                for parts in zip(*(states[name] for name in found), strict=True)
            ]
            update(parameters, used, *state_lists, lr=rate_K[k], **arguments)
            for name, average in averages.items():
                average.lerp_(named[name], 1 - cast(float, decay))
            total = total + loss.detach().double() * len(y_B)
        return total

    return steps

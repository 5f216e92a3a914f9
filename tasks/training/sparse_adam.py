"""torch's SparseAdam for parameters whose gradients are sparse, and torch's Adam for the others, as one optimizer.

torch's SparseAdam takes no dense gradients, and its Adam no sparse ones. Models with a large embedding have both: they are
trained with the one beside the other. Here both have the same learning rate, betas and eps, and the same kind of state.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import _functional, adam


class SparseAdam(torch.optim.SparseAdam):
    """Of the rows of a sparse gradient it moves weights and moments, as torch's SparseAdam, and leaves all other rows alone."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has two
        """As of any optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._step_dense(group, [parameter for parameter in used if not parameter.grad.is_sparse])
            self._step_sparse(group, [parameter for parameter in used if parameter.grad.is_sparse])
        return loss

    def _step_dense(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        if not parameters:
            return
        states = [self._state_of(parameter) for parameter in parameters]
        adam.adam(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _step_sparse(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            state, gradient = self._state_of(parameter), parameter.grad
            assert gradient is not None, "asked before"
            state["step"] += 1
            _functional.sparse_adam(
                [parameter],
                [gradient],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [int(state["step"])],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                eps=group["eps"],
                maximize=group["maximize"],
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """As torch's Adam has it. torch's SparseAdam counts its steps in an int, which Adam does not take."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

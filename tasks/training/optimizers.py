"""Gradients and the optimizer's step: torch's own arithmetic, without the Python that torch has around it.

Of a small net's step `Tensor.backward` spends 35 to 50 us on what is of no use here, `Optimizer.step` 60 to 90 us. The
state stays in the optimizer, which makes it in its own first step and stores and restores it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import adadelta, adagrad, adam, adamax, nadam, radam, rmsprop, sgd
from torch.overrides import has_torch_function_unary

# Of each optimizer: the function, and the state that it takes for every parameter, in the order of its arguments.
FUNCTIONAL: Final[dict[str, tuple[Callable[..., None], tuple[str, ...]]]] = {
    "sgd": (sgd.sgd, ("momentum_buffer",)),
    "adam": (adam.adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")),
    "adamw": (adam.adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")),
    "adagrad": (adagrad.adagrad, ("sum", "step")),
    "rmsprop": (rmsprop.rmsprop, ("square_avg", "grad_avg", "momentum_buffer", "step")),
    "adadelta": (adadelta.adadelta, ("square_avg", "acc_delta", "step")),
    "adamax": (adamax.adamax, ("exp_avg", "exp_inf", "step")),
    "nadam": (nadam.nadam, ("exp_avg", "exp_avg_sq", "mu_product", "step")),
    "radam": (radam.radam, ("exp_avg", "exp_avg_sq", "step")),
}

_engine: Final = torch.autograd.Variable._execution_engine  # what `Tensor.backward` calls in the end


def backward(loss: Tensor) -> None:
    """As `loss.backward()`: adds the gradients of a loss to those of the parameters, and raises what torch raises.

    What it leaves out serves devices that have threads of their own, and torch's own logs.
    """
    plain = loss.device.type == "cpu" and not loss.ndim and loss.is_floating_point()
    if not plain or has_torch_function_unary(loss):
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return
    _engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def arguments_of(optimizer: torch.optim.Optimizer, function: Callable[..., None]) -> dict[str, Any]:
    """What the function takes of the settings of the optimizer's only group, beside the learning rate."""
    (group,) = optimizer.param_groups
    settings = dict(group) | dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
    ours = {"params", "lr", "capturable", "differentiable", "foreach", "fused"}
    names = inspect.signature(function).parameters.keys() - ours
    return {name: settings[name] for name in names if name in settings} | {"foreach": False}


def states_of(optimizer: torch.optim.Optimizer, name: str, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """The state of these parameters, a list for each argument; empty where the settings need none of a kind."""
    states = [optimizer.state.get(p, {}) for p in parameters]  # never `state[p]`, which would add an entry
    found: list[list[Tensor | None]] = [
        [state[key] for state in states if state.get(key) is not None] for key in FUNCTIONAL[name][1]
    ]
    if name == "sgd" and not found[0]:
        return [[None] * len(parameters)]  # what SGD takes for no momentum
    return found


class Update:
    """A step of an optimizer that has made its first step on all of the parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, parameters: Sequence[Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        (self._group,) = optimizer.param_groups
        self._function, _ = FUNCTIONAL[name]
        self._arguments = arguments_of(optimizer, self._function)
        self._states = states_of(optimizer, name, parameters)

    @staticmethod
    def serves(optimizer: torch.optim.Optimizer) -> bool:
        """Whether the arithmetic would be the same: not if the optimizer's arguments ask for another implementation.

        On an accelerator torch's own choice is another one: all parameters at once.
        """
        (group,) = optimizer.param_groups
        chosen = any(group.get(name) for name in ("foreach", "fused", "capturable", "differentiable"))
        return not chosen and all(parameter.device.type == "cpu" for parameter in group["params"])

    def step(self) -> None:
        """As `Optimizer.step`: changes the parameters by their gradients."""
        gradients = [p.grad for p in self._parameters]
        if any(gradient is None for gradient in gradients):  # what this step did not use, torch leaves out
            self._optimizer.step()
            return
        with torch.no_grad():
            self._function(self._parameters, gradients, *self._states, lr=self._group["lr"], **self._arguments)

"""What the machine allows a trainer: loops by hand over tensors in memory, and what is left when Python and autograd go."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.loader import limits
from benchmarks.speed.measure import consumed
from benchmarks.speed.training import TRAINERS
from benchmarks.speed.training.nets import Step, eager, network
from benchmarks.speed.work import LEARNING_RATE, Work

STEPS = 16  # of one call, where several are compiled together


def over_memory(work: Work, began: float, step: Step, batches: int = 1) -> dict[str, Any]:
    """Steps over slices, made beforehand, of the whole dataset in memory, permuted once; each of so many batches."""
    slices = list(limits.views(limits.permuted(limits.all_rows(work)), batches * work.batch))
    if len(slices[-1][0]) < batches * work.batch:
        slices.pop()  # compiled code has one shape
    return consumed(lambda number: iter(slices), work.seconds, began, step)


@TRAINERS.case("limit")
def eager_in_memory(work: Work, began: float) -> dict[str, Any]:
    """Eager PyTorch loop by hand over pre-sliced tensors in memory."""
    return over_memory(work, began, eager(network(work)))


@TRAINERS.case("limit")
def eager_in_memory_fused(work: Work, began: float) -> dict[str, Any]:
    """The same with the fused optimizer."""
    return over_memory(work, began, eager(network(work), fused=True))


@TRAINERS.case("limit")
def eager_streaming(work: Work, began: float) -> dict[str, Any]:
    """Eager loop over the streaming limit, one row group ahead in a thread."""
    return consumed(limits.streaming(work), work.seconds, began, eager(network(work), fused=True))


@TRAINERS.case("limit")
def compiled_model(work: Work, began: float) -> dict[str, Any]:
    """torch.compile of the model alone, in memory."""
    return over_memory(work, began, eager(torch.compile(network(work)), fused=True))


@TRAINERS.case("limit")
def compiled_step(work: Work, began: float) -> dict[str, Any]:
    """torch.compile of one whole step, in memory."""
    return over_memory(work, began, compiled(work, 1))


@TRAINERS.case("limit")
def compiled_16_steps(work: Work, began: float) -> dict[str, Any]:
    """torch.compile of 16 whole steps a call, with inductor's C++ wrapper, in memory."""
    import torch._inductor.config as inductor

    inductor.cpp_wrapper = True
    return over_memory(work, began, compiled(work, STEPS), STEPS)


def compiled(work: Work, steps: int) -> Step:
    """So many steps (forward, loss, backward, SGD) as one functional graph."""
    model = network(work)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(model, weights, (x,)), y.unsqueeze(1))

    gradients_of = torch.func.grad(loss)

    @torch.compile(fullgraph=True, dynamic=False)
    def several(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        for i in range(steps):
            gradients = gradients_of(weights, x[i], y[i])
            weights = {name: weight - LEARNING_RATE * gradients[name] for name, weight in weights.items()}
        return weights

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> None:
        nonlocal weights
        weights = several(weights, x.view(steps, work.batch, -1), y.view(steps, work.batch))

    return step


@TRAINERS.case("limit")
def by_hand(work: Work, began: float) -> dict[str, Any]:
    """The same gradients in plain tensor calls, without autograd, in memory."""
    return over_memory(work, began, hand_written(network(work)))


def hand_written(model: nn.Module) -> Step:
    """Forward, backward and SGD of a model's linear layers, with ReLU between them if it has that."""
    modules = list(model.modules())
    layers = [(m.weight.data, m.bias.data) for m in modules if isinstance(m, nn.Linear)]
    relu = any(isinstance(m, nn.ReLU) for m in modules)

    @torch.inference_mode()
    def step(x: Tensor, y: Tensor) -> None:
        inputs = [x]
        for number, (weight, bias) in enumerate(layers, 1):
            output = torch.addmm(bias, inputs[-1], weight.t())
            inputs.append(output.relu_() if relu and number < len(layers) else output)
        gradient = inputs.pop().sub_(y.unsqueeze(1)).mul_(2 / len(y))
        for weight, bias in reversed(layers):
            given = inputs.pop()
            below = gradient.mm(weight) if inputs else None
            if below is not None and relu:
                below.mul_(given > 0)
            weight.addmm_(gradient.t(), given, alpha=-LEARNING_RATE)
            bias.sub_(gradient.sum(0), alpha=LEARNING_RATE)
            gradient = below

    return step


@TRAINERS.case("limit")
def matrix_products(work: Work, began: float) -> dict[str, Any]:
    """Only the matrix products of forward and backward, into buffers made beforehand."""
    sizes = [len(work.features), *(m.out_features for m in network(work).modules() if isinstance(m, nn.Linear))]
    rows = [torch.randn(work.batch, size) for size in sizes]
    weights = [torch.randn(pair) for pair in pairwise(sizes)]
    gradients, into = [torch.empty_like(w) for w in weights], [torch.empty_like(r) for r in rows]

    @torch.inference_mode()
    def step(x: Tensor, y: Tensor) -> None:
        for i, weight in enumerate(weights):
            torch.mm(rows[i], weight, out=into[i + 1])
        for i in reversed(range(len(weights))):
            torch.mm(rows[i].t(), rows[i + 1], out=gradients[i])
            if i:
                torch.mm(rows[i + 1], weights[i].t(), out=into[i])

    return over_memory(work, began, step)

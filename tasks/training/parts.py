"""The gradient of a batch as the sum of its parts, which the ranks of a group share out.

With the spec's `parts` a batch has as many parts on one rank as on several, and they are added up in one fixed tree: the bits do
not depend on the number of ranks. Without it each rank has one part.

Shape legend: B rows of a part, F numbers and C ids of one row, P parameters that are trained, G numbers of all their gradients.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from tidemill.tasks.ranks.group import Group
from tidemill.tasks.training.calling import model_error, seed_random_numbers
from tidemill.tasks.training.compiled import CompiledPart, Forward, flattened
from tidemill.tasks.training.cutting import Batch
from tidemill.tasks.training.errors import ModelError, ModelFails, SpecError, TrainingError, described, of_the_machine
from tidemill.tasks.training.groups import stable_seed
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.losses import LossFunction, is_column
from tidemill.tasks.training.optimizers import backward
from tidemill.tasks.training.spec import Spec, check_shares

TOLD: Final = 1000
"""Bytes of an error that the other ranks are told."""
_NAMED: Final = 3
"""Layers, or parts of a model's state, that an error names."""


# ---- what can be shared out ------------------------------------------------------------------------------------------
def parts_of(spec: Spec, group: Group) -> int:
    """In how many parts each batch is cut; 1: it is left whole.

    Raises:
        SpecError: the ranks of the group cannot have equal shares of them.
    """
    if spec.parts is None:
        return group.size
    check_shares(spec.parts, group.size)
    return spec.parts


def check_model(learner: Learner) -> None:
    """Raises SpecError: the model has layers that look at all rows of a batch at once, which no part has."""
    resting = set(learner.resting)
    found = [
        f"{type(module).__name__} ({name or 'the model itself'})"
        for name, module in learner.model.named_modules()
        if isinstance(module, _NormBase)
        and module not in resting
        and (isinstance(module, _BatchNorm) or module.track_running_stats)
    ]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise SpecError(
            f"model.factory {learner.spec.model.factory!r} has {', '.join(found[:_NAMED])}{more}, which takes statistics of "
            "all rows of a batch, and no part of it has them: use nn.LayerNorm or nn.GroupNorm, or train by one process, without "
            "parts"
        )


# ---- sums ------------------------------------------------------------------------------------------------------------
def tree_sum(flats: Iterable[Tensor]) -> Tensor:
    """The sum of 1, 2, 4 or so on tensors: neighbours first, then their sums, and so on. They are changed.

    At most one of each level is kept, so that of 64 parts 7 are in memory.
    """
    held: list[Tensor | None] = []
    for flat in flats:
        level = 0
        while level < len(held) and (other := held[level]) is not None:
            flat, held[level] = other.add_(flat), None
            level += 1
        held[level : level + 1] = [flat]
    (total,) = [flat for flat in held if flat is not None]
    return total


class Parts:
    """The parts of a learner's batches that are this rank's to compute, and how all of them are added up."""

    def __init__(
        self, learner: Learner, forward: Forward, loss_function: LossFunction, group: Group, backend: str | None
    ) -> None:
        """`backend` is torch.compile's; None: nothing is compiled.

        Raises:
            SpecError: the parts cannot be shared out among these ranks, or the model looks at all rows of a batch at once.
        """
        self.count = parts_of(learner.spec, group)
        if self.count > 1:
            check_model(learner)
        self._learner, self._forward, self._loss, self._group = learner, forward, loss_function, group
        share = self.count // group.size
        self._own = range(group.rank * share, (group.rank + 1) * share)
        self._device = learner.device
        self._parameters = list(learner.model.parameters())
        self._trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._dtype = _sum_type(self._trained)
        self._sizes = [parameter.numel() for parameter in self._trained]
        self._numbers = sum(self._sizes)
        self._no_gradient: set[int] = set()
        """Places, among the parameters that are trained, of those that a part of this step has left without a gradient."""
        self._column: bool | None = None
        self._checks_state = self.count > 1
        self._pass_seed = self._step = 0
        self._compiled = (
            None if backend is None else CompiledPart(learner, forward, loss_function, self._dtype, backend)
        )

    def begin(self, *key: str | int, step: int = 0) -> None:
        """A pass begins, at this step: random numbers follow from its key, the step in it, and the part."""
        self._pass_seed, self._step = stable_seed(*key), step

    def compiles(self, rows: int) -> bool:
        """Whether the parts of a batch of so many rows are compiled: whichever of them are this rank's."""
        return self._compiled is not None and self._compiled.works is not False and rows >= 2 * self.count

    def backward(self, batch: Batch) -> Tensor:
        """Set the gradient of each parameter to that of the loss of a batch: the mean over all of its rows, on whichever rank.

        Returns that loss.

        Raises:
            ModelError: the model failed on a part, on this rank or another one.
            ModelFails: the model changes its own state in training, as no part may.
        """
        state = self._state() if self._checks_state else None
        flat = self._sum_of_own(batch)
        if self._learner.spec.parts is None:
            self._group.sum_(flat)
        else:
            distance = 1
            while distance < self._group.size:
                self._group.sum_pair_(flat, distance)
                distance *= 2
        if self._group.size > 1 and flat[-1]:  # on each rank: they have the same bits
            raise ModelError(self._told_by_ranks())
        if state is not None and len(batch.y_B) >= self.count:
            self._check_state(state)
        self._step += 1
        for parameter in self._parameters:
            parameter.grad = None
        used = flat[self._numbers + 1 : -1].tolist() if self._no_gradient else ()
        gradients = torch.split(flat[: self._numbers], self._sizes)
        for i, (parameter, gradient) in enumerate(zip(self._trained, gradients, strict=True)):
            if i not in self._no_gradient or used[i]:
                parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return flat[self._numbers]

    def _sum_of_own(self, batch: Batch) -> Tensor:
        """[G + 1 + P + 1]: gradients, loss, whether each parameter has a gradient, and how many ranks have failed."""
        self._no_gradient.clear()
        self._error: str | None = None
        try:
            return tree_sum(self._part(batch, number) for number in self._own)
        except Exception as error:
            if self._group.size == 1 or of_the_machine(error):
                raise
            self._error = described(error)  # told once the others know of it: they wait for this rank's sum
            flat = self._zeros()
            flat[-1] = 1
            return flat

    def _part(self, batch: Batch, number: int) -> Tensor:
        """The same for one part, each gradient weighed with the part's share of the rows."""
        rows = len(batch.y_B)
        start, stop = rows * number // self.count, rows * (number + 1) // self.count
        if start == stop:
            self._no_gradient.update(range(len(self._trained)))
            return self._zeros()
        part = batch if self.count == 1 else Batch._make(None if t is None else t[start:stop] for t in batch)
        seed_random_numbers(self._device, stable_seed(self._pass_seed, self._step, number))
        if self._compiled is not None and self.compiles(rows):
            flat = self._compiled.call(part, (stop - start) / rows, rows, self.count)
            if flat is not None:
                self._no_gradient |= self._compiled.no_gradient
                return flat
        try:
            return self._eager(part, (stop - start) / rows)
        except Exception as error:
            if isinstance(error, TrainingError) or of_the_machine(error):
                raise
            alone = " on a single row" if stop - start == 1 else ""
            raise model_error(f"a gradient step of the model{alone}", error, part.x_BF, part.ids_BC) from error

    def _eager(self, part: Batch, share: float) -> Tensor:
        x_BF, ids_BC, y_B, w_B = part
        output = self._forward(self._learner.model, x_BF, ids_BC)
        if self._column is None:
            self._column = is_column(self._learner.spec, output, len(y_B))
        loss = self._loss(output, y_B.unsqueeze(1) if self._column else y_B, w_B) * share
        for parameter in self._parameters:
            parameter.grad = None
        backward(loss)
        gradients = [parameter.grad for parameter in self._trained]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            raise ModelError("the model has sparse gradients, which parts and ranks cannot add up: use sparse=False")
        self._no_gradient.update(i for i, gradient in enumerate(gradients) if gradient is None)
        return flattened(self._trained, gradients, loss.detach(), self._dtype)

    def _zeros(self) -> Tensor:
        return torch.zeros(self._numbers + len(self._trained) + 2, dtype=self._dtype, device=self._device)

    def _told_by_ranks(self) -> str:
        """What failed, in the words of the first rank that failed."""
        own = (self._error or "").encode()[:TOLD]
        told = torch.zeros(self._group.size, TOLD, dtype=torch.int32, device=self._device)
        told[self._group.rank, : len(own)] = torch.tensor(list(own), dtype=torch.int32)
        self._group.sum_(told)
        (first, *_) = [bytes(row).rstrip(b"\0") for row in told.tolist() if any(row)]
        return first.decode(errors="replace")

    # ---- state that a model keeps by itself --------------------------------------------------------------------------
    def _state(self) -> dict[str, Tensor]:
        """A copy of all that is stored of the model, but for the weights that are trained, which only the optimizer changes."""
        model = self._learner.model
        trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: t.clone() for name, t in model.state_dict().items() if name not in trained}

    def _check_state(self, before: dict[str, Tensor]) -> None:
        """Raises ModelFails: the first parts of a batch have changed it, as each rank would in its own way."""
        self._checks_state = False
        now = self._learner.model.state_dict()
        if changed := [name for name, value in before.items() if not _same_bits(value, now[name])]:
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            raise ModelFails(
                f"model.factory {self._learner.spec.model.factory!r} changes {', '.join(changed[:_NAMED])}{more} by itself while "
                "it is trained, which parts of a batch, on several ranks, would each do in their own way: keep no such state (of "
                "layers that normalise, nn.LayerNorm and nn.GroupNorm have none), or train it by one process, without parts"
            )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    mine, theirs = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(mine, theirs)


def _sum_type(parameters: Sequence[nn.Parameter]) -> torch.dtype:
    """In which type gradients are added up: float32, or the widest of the parameters."""
    dtype = torch.float32
    for parameter in parameters:
        if parameter.is_complex():
            raise SpecError(
                "the model has complex weights, which parts and ranks cannot add up: train it by one process"
            )
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype

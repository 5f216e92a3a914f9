"""torch's optimizers, schedules and average of the weights: made as the spec says, stepped, stored and restored.

The step and the backward pass are torch's own arithmetic without the Python that torch has around it. Of a small net's step
`Tensor.backward` spends 35 to 50 us on what is of no use here, `Optimizer.step` 60 to 90 us. The state stays in the optimizer,
which makes it in its own first step.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import adadelta, adagrad, adam, adamax, lr_scheduler, nadam, radam, rmsprop, sgd, swa_utils
from torch.overrides import has_torch_function_unary

from tidemill.tasks.training.calling import first_line
from tidemill.tasks.training.errors import FactoryError, SpecError, StateMismatch
from tidemill.tasks.training.large import BLOCK, serves, step_in_blocks, take_step
from tidemill.tasks.training.sparse_adam import SparseAdam
from tidemill.tasks.training.spec import Optimizer, OptimizerName, ScheduleName, Spec


def _uncompiled(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """One of torch's optimizers, whose methods do not import `torch._dynamo`: that takes more than a second of CPU time.

    torch marks them on their first use as what its compiler is to leave alone. Ours never comes upon them: a compiled step calls
    the optimizer's arithmetic (`Kind.update`). What they do is torch's own code.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    own = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    take_step = inspect.unwrap(optimizer.step)

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            loss: float | None = take_step(self, closure)
        return loss

    return type(optimizer.__name__, (optimizer,), own | {"step": step})


class Kind(NamedTuple):
    """One of torch's optimizers."""

    make: type[torch.optim.Optimizer]
    update: Callable[..., None]
    """Its arithmetic, as a function of the parameters, their gradients, and one list of each of `state`."""
    state: tuple[str, ...]
    """What it keeps for every parameter, in the order of the arguments of `update`."""


_ADAM: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
OPTIMIZERS: Final[dict[OptimizerName, Kind]] = {
    "sgd": Kind(_uncompiled(torch.optim.SGD), sgd.sgd, ("momentum_buffer",)),
    "adam": Kind(_uncompiled(torch.optim.Adam), adam.adam, _ADAM),
    "adamw": Kind(_uncompiled(torch.optim.AdamW), adam.adam, _ADAM),
    "adagrad": Kind(_uncompiled(torch.optim.Adagrad), adagrad.adagrad, ("sum", "step")),
    "rmsprop": Kind(
        _uncompiled(torch.optim.RMSprop), rmsprop.rmsprop, ("square_avg", "grad_avg", "momentum_buffer", "step")
    ),
    "adadelta": Kind(_uncompiled(torch.optim.Adadelta), adadelta.adadelta, ("square_avg", "acc_delta", "step")),
    "adamax": Kind(_uncompiled(torch.optim.Adamax), adamax.adamax, ("exp_avg", "exp_inf", "step")),
    "nadam": Kind(_uncompiled(torch.optim.NAdam), nadam.nadam, ("exp_avg", "exp_avg_sq", "mu_product", "step")),
    "radam": Kind(_uncompiled(torch.optim.RAdam), radam.radam, ("exp_avg", "exp_avg_sq", "step")),
    "sparse_adam": Kind(_uncompiled(SparseAdam), partial(adam.adam, amsgrad=False, weight_decay=0.0), _ADAM),
}
SCHEDULES: Final[dict[ScheduleName, Callable[..., lr_scheduler.LRScheduler]]] = {
    "constant": partial(lr_scheduler.ConstantLR, factor=1.0),
    "linear": lr_scheduler.LinearLR,
    "step": lr_scheduler.StepLR,
    "multistep": lr_scheduler.MultiStepLR,
    "exponential": lr_scheduler.ExponentialLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "cosine_restarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "polynomial": lr_scheduler.PolynomialLR,
}

TAKING_SPARSE: Final[tuple[OptimizerName, ...]] = ("sparse_adam", "adagrad", "sgd")
"""torch's others raise RuntimeError for sparse gradients."""
TABLE: Final = 2**15
"""Numbers of a matrix from which on it is worth a look whether few of its rows are in use."""

_adam: Final[Callable[..., None]] = adam.adam
_engine: Final = torch.autograd.Variable._execution_engine  # what `Tensor.backward` calls in the end


# ---- making ----------------------------------------------------------------------------------------------------------
def make_optimizer(spec: Spec, model: nn.Module) -> torch.optim.Optimizer:
    """The spec's optimizer of all parameters. Raises SpecError: arguments that it does not take."""
    settings = spec.optimizer
    make = OPTIMIZERS[settings.name].make
    taken = [name for name in inspect.signature(make).parameters if name not in ("params", "lr")]
    if unknown := sorted(set(settings.arguments) - set(taken)):
        raise SpecError(f"optimizer.arguments holds {unknown}, which {settings.name} does not take: it takes {taken}")
    # JSON has no tuples, and torch compares betas with them.
    arguments: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.arguments.items()}
    parameters: Any = model.parameters()
    if not settings.decay_biases:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        parameters = [group for group in groups if group["params"]]
    try:
        return make(parameters, lr=spec.learning_rate, **arguments)  # type: ignore[call-arg]  # not in the base
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"optimizer.arguments: {settings.name} refuses {settings.arguments}: {error}") from error


def goes_by_rows(settings: Optimizer) -> bool:
    """Whether the optimizer leaves all rows alone, weights and its own state, that are not in a sparse gradient."""
    if settings.name == "sgd":
        return not (settings.arguments.get("momentum") or settings.arguments.get("weight_decay"))
    return settings.name in TAKING_SPARSE


def make_schedule(spec: Spec, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler | None:
    """The spec's schedule of the learning rate, or None. Raises SpecError: arguments that it does not take."""
    if (settings := spec.schedule) is None:
        return None
    make = SCHEDULES[settings.name]
    try:
        main = make(optimizer, **settings.arguments)
        if not settings.warmup_steps:
            return main
        rise = lr_scheduler.LinearLR(optimizer, 1 / (settings.warmup_steps + 1), total_iters=settings.warmup_steps)
        return lr_scheduler.SequentialLR(optimizer, [rise, main], [settings.warmup_steps])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SpecError(f"schedule.arguments: {settings.name} refuses {settings.arguments}: {error}") from error


def make_average(spec: Spec, model: nn.Module) -> swa_utils.AveragedModel | None:
    """The moving average of the weights, or None. Raises FactoryError: the model cannot be copied."""
    if spec.ema_decay is None:
        return None
    average = swa_utils.get_ema_multi_avg_fn(spec.ema_decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if spec.ema_warmup:
        average = partial(_warming_average, spec.ema_decay)
    try:
        return swa_utils.AveragedModel(model, multi_avg_fn=average)
    except Exception as error:  # of the user's classes
        raise FactoryError(
            f"ema_decay: the model of {spec.model.factory!r} cannot be copied: {type(error).__name__}: {first_line(error)}"
        ) from error


def decay_after(steps: int, decay: float) -> float:
    """The decay of an average with warm-up in the step that follows `steps` others."""
    return min(decay, (2 + steps) / (11 + steps))


@torch.no_grad()
def _warming_average(decay: float, averages: list[Tensor], weights: list[Tensor], steps: Tensor | int) -> None:
    """As torch's functions for `AveragedModel`: moves the averages towards the weights."""
    torch._foreach_lerp_(averages, weights, 1 - decay_after(int(steps), decay))


# ---- stepping --------------------------------------------------------------------------------------------------------
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


def arguments_of(group: dict[str, Any], function: Callable[..., None]) -> dict[str, Any]:
    """What the function takes of the settings of a group of the optimizer, beside the learning rate."""
    settings = dict(group) | dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
    ours = {"params", "lr", "capturable", "differentiable", "foreach", "fused"}
    names = inspect.signature(function).parameters.keys() - ours
    return {name: settings[name] for name in names if name in settings} | {"foreach": False}


def states_of(
    optimizer: torch.optim.Optimizer, name: OptimizerName, parameters: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """The state of these parameters, a list for each argument; empty where the settings need none of a kind."""
    states = [optimizer.state.get(p, {}) for p in parameters]  # never `state[p]`, which would add an entry
    found: list[list[Tensor | None]] = [
        [state[key] for state in states if state.get(key) is not None] for key in OPTIMIZERS[name].state
    ]
    if name == "sgd" and not found[0]:
        return [[None] * len(parameters)]  # what SGD takes for no momentum
    return found


def next_rates(
    optimizer: torch.optim.Optimizer, schedule: lr_scheduler.LRScheduler | None, steps: int, device: torch.device
) -> Tensor:
    """float32 [K]: the learning rate of each of so many steps; the schedule moves on. For compiled steps, where a number would
    be compiled in."""
    group, *_ = optimizer.param_groups  # all have one rate
    rates = []
    for _ in range(steps):
        rates.append(group["lr"])
        if schedule is not None:
            schedule.step()
    return torch.tensor(rates, dtype=torch.float32, device=device)


def next_shares(
    spec: Spec, averaged: swa_utils.AveragedModel | None, steps: int, device: torch.device
) -> Tensor | None:
    """float32 [K]: how far the average goes towards the weights in each step; None: always as far, or there is none."""
    if averaged is None or spec.ema_decay is None or not spec.ema_warmup:
        return None
    before = int(averaged.n_averaged)
    shares = [1 - decay_after(before + k, spec.ema_decay) for k in range(steps)]
    return torch.tensor(shares, dtype=torch.float32, device=device)


class _Table:
    """A large table of which few rows are in use, as the weights of categories: most buckets of a hash never occur.

    All that Adam and AdamW do to a row that has never had a gradient is the decay: its moments are 0, and stay so. The rows in
    use are updated as copies. The bits are those of an update of all rows, in a fraction of its time.

    Shape legend: R rows, E columns, U rows in use.
    """

    def __init__(
        self, group: dict[str, Any], table_RE: Tensor, state: dict[str, Tensor], arguments: dict[str, Any]
    ) -> None:
        """Of a group of the optimizer, which has made its first step; `arguments`: what `arguments_of` finds there."""
        self._group, self.table_RE, self._state = group, table_RE, state
        self._arguments = arguments | {"weight_decay": 0.0}
        self.look()

    def look(self) -> None:
        """Find the rows in use: those that have moments."""
        moments = (self._state["exp_avg"], self._state["exp_avg_sq"])
        in_use = [moment_RE.view(torch.int32).any(1) for moment_RE in moments]  # a negative 0 does not stay as it is
        self._used_R = in_use[0] | in_use[1]
        self._rows_U = self._used_R.nonzero().squeeze(1)

    @staticmethod
    def serves(group: dict[str, Any], name: OptimizerName, parameter: Tensor) -> bool:
        """Whether rows without a gradient are left alone but for the decay, and there may be enough of them to matter."""
        return (
            name in ("adam", "adamw")
            and (parameter.ndim, parameter.dtype) == (2, torch.float32)
            and parameter.numel() >= TABLE
            and group["eps"] > 0
            and (not group["weight_decay"] or group["decoupled_weight_decay"])
            and not (group["amsgrad"] or group["maximize"])
        )

    @property
    def is_sparse(self) -> bool:
        """Whether few of its rows are in use: of many, the copies cost more than they save."""
        return 2 * len(self._rows_U) < len(self._used_R)

    def step(self, gradient_RE: Tensor) -> None:
        """A step of the optimizer, as of all rows."""
        used_R = self._used_R | (gradient_RE.amax(1) != 0) | (gradient_RE.amin(1) != 0)  # without a tensor beside it
        if int(used_R.count_nonzero()) > len(self._rows_U):
            self._used_R, self._rows_U = used_R, used_R.nonzero().squeeze(1)
        rate, decay = self._group["lr"], self._group["weight_decay"]
        if decay:
            self.table_RE.mul_(1 - rate * decay)
        whole = [self.table_RE, self._state["exp_avg"], self._state["exp_avg_sq"]]
        *earlier, last_U = torch.split(self._rows_U, max(1, BLOCK // self.table_RE.shape[1]))
        for rows_U in (*earlier, last_U):
            parts = [tensor.index_select(0, rows_U) for tensor in whole]
            values_UE, average_UE, square_UE = parts
            gradient_UE = gradient_RE.index_select(0, rows_U)
            count = self._state["step"] if rows_U is last_U else self._state["step"].clone()
            _adam([values_UE], [gradient_UE], [average_UE], [square_UE], [], [count], lr=rate, **self._arguments)
            for tensor, part in zip(whole, parts, strict=True):
                tensor.index_copy_(0, rows_U, part)


class Update:
    """A step of an optimizer that has made its first step on all of the parameters."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: OptimizerName,
        parameters: Sequence[Tensor],
        *,
        alone: bool = True,
    ) -> None:
        """`alone`: nothing else makes steps of this optimizer."""
        self._optimizer, self._function = optimizer, OPTIMIZERS[name].update
        trained = {id(parameter) for parameter in parameters}
        self._tables: list[_Table] = []
        self._groups = []  # (settings, parameters, their state, arguments)
        self._large: list[tuple[dict[str, Any], Tensor]] = []
        """Parameters, each with the settings of its group, that are updated in blocks."""
        for group in optimizer.param_groups:
            arguments = arguments_of(group, self._function)
            of_group = []
            for parameter in (one for one in group["params"] if id(one) in trained):
                if alone and _Table.serves(group, name, parameter):
                    table = _Table(group, parameter, optimizer.state[parameter], arguments)
                    if table.is_sparse:
                        self._tables.append(table)
                        continue
                if parameter.grad is not None and serves(parameter, parameter.grad):
                    self._large.append((group, parameter))
                    continue
                of_group.append(parameter)
            self._groups.append((group, of_group, states_of(optimizer, name, of_group), arguments))

    @staticmethod
    def serves(optimizer: torch.optim.Optimizer) -> bool:
        """Whether the arithmetic would be the same: not if the optimizer's arguments ask for another implementation.

        On an accelerator torch's own choice is another one: all parameters at once.
        """
        groups, others = optimizer.param_groups, ("foreach", "fused", "capturable", "differentiable")
        chosen = any(group.get(name) for group in groups for name in others)
        return not chosen and all(p.device.type == "cpu" for group in groups for p in group["params"])

    def step(self) -> None:
        """As `Optimizer.step`: changes the parameters by their gradients."""
        gradients = [[p.grad for p in parameters] for _, parameters, _, _ in self._groups]
        of_tables = [table.table_RE.grad for table in self._tables]
        of_large = [parameter.grad for _, parameter in self._large]
        if any(
            gradient is None for of_group in (*gradients, of_tables, of_large) for gradient in of_group
        ):  # what was not used, torch leaves out
            take_step(self._optimizer)
            for table in self._tables:
                table.look()
            return
        with torch.no_grad():
            for table, gradient in zip(self._tables, of_tables, strict=True):
                assert gradient is not None
                table.step(gradient)
            for (group, parameters, states, arguments), of_group in zip(self._groups, gradients, strict=True):
                self._function(parameters, of_group, *states, lr=group["lr"], **arguments)
            for group, parameter in self._large:
                step_in_blocks(self._optimizer, group, parameter)


# ---- storing ---------------------------------------------------------------------------------------------------------
def restore_optimizer(
    optimizer: torch.optim.Optimizer, spec: Spec, about: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Fills the spec's optimizer with stored state: tensors by `parameter.name`, the rest in `about`. Raises StateMismatch."""
    if about["name"] != spec.optimizer.name:
        raise StateMismatch(f"the stored state is of {about['name']}, the spec's optimizer is {spec.optimizer.name}")
    values: dict[int, dict[str, Any]] = {int(index): dict(plain) for index, plain in about["values"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, named in values.items():
        for name, value in named.items():
            fits = number < len(parameters) and (
                not isinstance(value, Tensor) or not value.ndim or value.shape == parameters[number].shape
            )
            if not fits:
                raise StateMismatch(f"the stored {name} of parameter {number} does not fit the model of the spec")
    # The groups hold learning rate and the like, which are the spec's to say; only the state comes from storage.
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def schedule_position(state: dict[str, Any]) -> dict[str, Any]:
    """What of a schedule's state moves; the rest, such as its milestones, is the spec's to say."""
    moving = {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i"}
    moved = {name: value for name, value in state.items() if name in moving}
    if "_schedulers" in state:
        moved["_schedulers"] = [schedule_position(inner) for inner in state["_schedulers"]]
    return moved


def restore_schedule(schedule: lr_scheduler.LRScheduler, position: dict[str, Any]) -> None:
    """Brings a schedule, and the learning rate of its optimizer, to a position."""
    schedule.load_state_dict(position)
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
